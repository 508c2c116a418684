"""How fast is it? Not a test: timings depend on the machine and on what else it does.

    python experiments/speed.py step        # a training step of a preset, phase by phase
    python experiments/speed.py step --preset ucf101 --batch-size 4 --grad-checkpoint
    python experiments/speed.py sample      # seconds from a sentence to its video; for 16 at once
    python experiments/speed.py kernels     # what the device can do; attention, both ways
    python experiments/speed.py peers       # UNet steps, beside other people's UNets
    python experiments/speed.py shapes      # captioned clips rendered per second
    python experiments/speed.py data --data FOLDER         # clips of a folder decoded per second
    python experiments/speed.py i3d         # clips through I3D per second

One JSON line for each row. How good it is: the other files in experiments/.
"""

import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train
from data import sides
from diffusion import NoiseSchedule
from sample import Pipeline
from text_encoder import TextEncoder, Tokenizer, attention_weights
from tools import DEVICES, Parser, autocast, number, pick_device, print_row, product_dtype
from tools import run_command
from unet3d import UNet3D
from vae import AutoencoderKL

PROMPT = "a red circle moves right, then up"

# ------------------------------------------------------------------------------ clocks


def now():
    """Seconds, when all that a GPU was asked to do is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()
    return time.perf_counter()


def seconds(*actions, rounds=7, limit=60):
    """The median time of each action, after one more round to warm up; of fewer rounds, two at
    least, where they take longer than `limit`. The actions take turns, so that whatever else the
    machine does hits all alike."""
    times, begin = [], now()
    while len(times) < 3 or len(times) <= rounds and now() - begin < limit:
        times.append([])
        for action in actions:
            start = now()
            action()
            times[-1].append(now() - start)
    return np.median(times[1:], axis=0).tolist()


def flops(action):
    """Of the matrix products and convolutions, also of those that --grad-checkpoint makes twice; a
    multiplication and an addition are two."""
    eager = torch.compiler.set_stance("force_eager")
    with eager, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        action()
    return counter.get_total_flops()


def kernels_of(action):
    """How many kernels a CUDA GPU runs in the action."""
    if not torch.cuda.is_available():
        return {}
    with torch.profiler.profile() as profile:
        action()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return {"kernels": sum(e.device_type == on_gpu for e in profile.events())}


def memory_gib():
    """Peak memory so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, else kiB


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def matrix_peak(device, dtype):
    """FLOP/s of a product of two large matrices."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / seconds(lambda: a @ b)[0]


# ------------------------------------------------------------------------------ our steps


class Step:
    """The training step of `train.train_diffusion`, on random latents and captions of 16 tokens.

    times: None, or {phase: its seconds in each step}: the device is waited for after each phase.
    """

    def __init__(self, args, device, clips=64):
        preset = train.PRESETS[args.preset]()
        self.args, self.device, config = args, device, preset.diffusion_training
        size = args.batch_size or config.batch_size
        self.config = replace(config, batch_size=size, strides=((0, 1),), easy_start=0)
        models = {"text_encoder": TextEncoder(preset.text), "unet": UNet3D(preset.unet)}
        self.model = nn.ModuleDict(models).to(device).train()
        self.schedule = NoiseSchedule(preset.diffusion)
        self.ema = train.EMA(self.model, config.ema)
        self.optimizers = train.make_optimizers(self.model, config, args.precision)
        train.economize(args, *self.model.values())
        channels, height, width = preset.vae.latent_shape(*sides(preset.size))
        latents = torch.randn(clips, channels, 16, height, width)
        self.data = torch.arange(clips), torch.full((clips,), 8.0), latents.half(), self.schedule
        self.tokens = torch.randint(3, 259, (clips + 1, 16), device=device)
        self.mask = torch.ones_like(self.tokens, dtype=torch.bool)
        self.number, self.times = 0, None

    def lap(self, phase=None):
        if self.times is not None:
            last, self.last = getattr(self, "last", 0), now()
            self.times[phase].append(self.last - last)

    def gradients(self):
        self.number += 1
        self.lap()
        batch = train.draw_batch(0, self.number, self.config, *self.data)
        self.lap("draw")
        for share, part in train.parts(batch, self.args.grad_accum, self.device):
            with autocast(self.device, self.args.precision):
                losses = train.text_to_video_loss(
                    self.model, self.schedule, self.tokens, self.mask, *part
                )
            self.lap("forward")
            (share * losses.mean()).backward()
            self.lap("backward")

    def __call__(self):
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        self.gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip).item()
        self.lap("clip")
        for name, optimizer in self.optimizers.items():
            optimizer.step()
            self.lap(name)
        self.ema.update(self.model, self.number)
        self.lap("average")


def step(args):
    """Milliseconds of a training step with all frames, and of its phases when each is waited for
    (train.py draws the next batch beside the step); what it computes, as a share of what large
    matrices reach."""
    device = pick_device(args.device, args.precision)
    dtype = product_dtype(device, args.precision)
    run, begin = Step(args, device), now()
    run()
    first, work = now() - begin, flops(run.gradients)
    total, = seconds(run)
    run.times = defaultdict(list)
    seconds(run)
    phases = {f"{name}_ms": 1e3 * np.median(times) for name, times in run.times.items() if name}
    run.times, peak = None, matrix_peak(device, dtype)
    print_row(
        preset=args.preset, device=device.type, precision=str(dtype), clips=run.config.batch_size,
        parameters=count_parameters(run.model), first_ms=1e3 * first, step_ms=1e3 * total, **phases,
        **kernels_of(run), clips_per_second=run.config.batch_size / total, gflop=work / 1e9,
        gflops=work / total / 1e9, of_peak=work / total / peak, gib=memory_gib(),
    )


def sample(args):
    """Seconds from a sentence to its video, with random weights: the first time, again, and for
    several at once."""
    device, preset = pick_device(args.device), train.PRESETS[args.preset]()
    pipeline = Pipeline(
        Tokenizer.train([PROMPT] * 2), TextEncoder(preset.text).eval(), UNet3D(preset.unet).eval(),
        AutoencoderKL(preset.vae).eval(), NoiseSchedule(preset.diffusion), device,
        {"size": preset.size},
    )
    if args.compile:
        pipeline.unet.compile()
    row = {"preset": args.preset, "device": device.type}
    for count in (1, args.num):
        start = now()
        pipeline.generate([PROMPT] * count)
        row[f"first_{count}"] = now() - start
        row[f"again_{count}"], = seconds(lambda: pipeline.generate([PROMPT] * count), rounds=3)
    print_row(**row)


def kernels(args):
    """Matrix products, copies, and the sizes of attention in ucf101: forward and backward written
    out and by PyTorch's kernel, which is for long sequences here."""
    device = pick_device(args.device)
    for dtype in (torch.float32, torch.bfloat16):
        print_row(matrices=str(dtype), gflops=matrix_peak(device, dtype) / 1e9)
    x = torch.randn(2**24, device=device)
    print_row(copies="float32", gb_per_second=8 * len(x) / seconds(x.clone)[0] / 1e9)
    for name, (b, n, i, j) in {
        "temporal, 16x16": (256, 3, 16, 16), "temporal, 4x4": (16, 16, 16, 16),
        "spatial, 8x8": (16, 6, 64, 64), "spatial, 16x16": (16, 6, 256, 256),
        "words, 8x8": (1, 6, 1024, 16),
    }.items():
        shapes, dtype = [(args.batch_size * b, n, k, 32) for k in (i, j, j)], product_dtype(device)
        q, k, v = (torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes)
        written, fused = seconds(
            lambda: torch.autograd.grad((attention_weights(q, k) @ v).sum(), (q, k, v)),
            lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).sum(), (q, k, v)),
            limit=5,
        )
        print_row(attention=name, written_out_ms=1e3 * written, fused_ms=1e3 * fused)


# ------------------------------------------------------------------------------ other UNets


def unet_inputs(preset, batch, device):
    """What a UNet takes, of clips of 16 frames: latents, timesteps, 16 encoded words, their mask
    and the frame rate."""
    channels, height, width = preset.vae.latent_shape(*sides(preset.size))
    x = torch.randn(batch, channels, 16, height, width, device=device)
    words = torch.randn(batch, 16, preset.text.width, device=device)
    mask = torch.ones(batch, 16, dtype=torch.bool, device=device)
    fps = torch.full((batch,), 8.0, device=device)
    return x, torch.arange(batch, device=device), words, mask, fps


def matched(build, wanted):
    """The model build(width, multiple) that comes within 5% of the wanted number of parameters, all
    its widths multiples of as round a number as will do."""
    for multiple in (32, 16, 8, 4):
        for width in range(32, 1024, multiple):
            with torch.device("meta"):  # no memory, no work
                count = count_parameters(build(width, multiple))
            if count > 0.95 * wanted:
                break
        if count < 1.05 * wanted:
            return build(width, multiple)
    raise ValueError(f"no width gives {wanted} parameters")


def diffusers_unet(config, wanted):
    """The UNet of ModelScope's text-to-video: as many resolutions and blocks in each as ours, heads
    as wide, widths in the same proportion. Attention where it has it by default, at all resolutions
    but the lowest, and in the middle."""
    from diffusers.models.unets.unet_3d_condition import UNet3DConditionModel

    kinds = ["CrossAttn"] * (len(config.widths) - 1) + [""]

    def build(width, multiple):
        widths = [round(width * w / config.widths[-1] / multiple) * multiple for w in config.widths]
        widths = [max(w, config.head_width) for w in widths]
        return UNet3DConditionModel(
            in_channels=config.channels, out_channels=config.channels, block_out_channels=widths,
            layers_per_block=config.blocks[0], norm_num_groups=multiple,
            attention_head_dim=config.head_width, cross_attention_dim=config.text_width,
            down_block_types=[f"{kind}DownBlock3D" for kind in kinds],
            up_block_types=[f"{kind}UpBlock3D" for kind in reversed(kinds)],
        )

    model = matched(build, wanted)
    return model, lambda x, t, words, mask, fps: model(x, t, words, return_dict=False)[0]


def lucidrains_unet(config, wanted):
    """The UNet of Video Diffusion Models with as many resolutions as ours, each twice as wide as
    the one before. It reads one vector, not words: it gets their mean."""
    with mock.patch.dict(sys.modules, torchvision=mock.MagicMock()):  # only its trainer needs that
        from video_diffusion_pytorch import Unet3D

    factors = [2**i for i in range(len(config.widths))]

    def build(width, _):
        return Unet3D(width, config.text_width, dim_mults=factors, channels=config.channels)

    model = matched(build, wanted)
    return model, lambda x, t, words, mask, fps: model(x, t, cond=words.mean(1))


PEERS = {"diffusers": diffusers_unet, "video-diffusion-pytorch": lucidrains_unet}


class Contender:
    """A UNet in training with AdamW, and in sampling one clip: a batch of two, with its caption and
    without. predict: its forward as a function of `unet_inputs`."""

    def __init__(self, name, model, predict, args, preset, device):
        self.name, self.predict, self.device, self.args = name, predict, device, args
        self.model = model.to(device).train()
        training = replace(preset.diffusion_training, optimizer="adamw")
        self.optimizer = train.make_optimizers(model, training)["adamw"]
        self.batch = unet_inputs(preset, args.batch_size or training.batch_size, device)
        self.pair = unet_inputs(preset, 2, device)

    def gradients(self):
        for _, part in train.parts(self.batch, self.args.grad_accum, self.device):
            with autocast(self.device, self.args.precision):
                loss = (self.predict(*part).float() - part[0]).square().mean()
            loss.backward()

    def train(self):
        self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def sample(self):
        self.model.eval()
        with torch.inference_mode(), autocast(self.device, self.args.precision):
            self.predict(*self.pair)


def peers(args):
    """Training and sampling steps of a preset's UNet, and of other people's with as many parameters
    where their packages are installed: the same batch, latents, words and number format, all with
    AdamW, one step of each in turn."""
    device, preset = pick_device(args.device, args.precision), train.PRESETS[args.preset]()
    unet = UNet3D(preset.unet)
    train.economize(args, unet)
    contenders = [Contender("UNet3D", unet, unet, args, preset, device)]
    for name, build in PEERS.items():
        try:
            model, predict = build(preset.unet, count_parameters(unet))
            contenders.append(Contender(name, model, predict, args, preset, device))
        except ImportError as error:
            print(f"without {name}: {error}", file=sys.stderr)
    work = [flops(c.gradients) for c in contenders]
    training = seconds(*(c.train for c in contenders))
    sampling = seconds(*(c.sample for c in contenders), rounds=21)
    for c, operations, learn, draw in zip(contenders, work, training, sampling):
        print_row(
            unet=c.name, parameters=count_parameters(c.model), clips=len(c.batch[0]), step_s=learn,
            gflop=operations / 1e9, gflops=operations / learn / 1e9, sampling_s=draw,
            times_ours=learn / training[0], times_ours_sampling=draw / sampling[0],
        )


# ------------------------------------------------------------------------------ the rest


def shapes(args, clips=1000):
    """Captioned clips of the built-in world, on one core."""
    from shapes import MovingShapes

    dataset = MovingShapes(clips)
    begin = now()
    for i in range(clips):
        dataset[i]
    print_row(clips_per_second=clips / (now() - begin))


def data(args, videos=8, rounds=4):
    """Clips of 16 frames at 128 pixels, beside reading the same files whole with imageio."""
    import imageio.v3 as iio
    from data import VideoFolder, read_ahead

    dataset = VideoFolder(args.data, size=128)
    picked = np.linspace(0, len(dataset) - 1, min(videos, len(dataset))).astype(int).tolist()
    for workers in (1, 2):
        begin = now()
        clips = sum(clip is not None for _, clip in read_ahead(dataset, picked * rounds, workers))
        print_row(workers=workers, clips_per_second=clips / (now() - begin))
    begin = now()
    paths = [Path(args.data) / dataset.items[i][0] for i in picked]
    frames = [len(iio.imread(path, plugin="pyav")) for path in paths]
    print_row(reader="imageio, whole files", files_per_second=len(frames) / (now() - begin),
              frames_in_a_file=np.mean(frames))


def i3d(args, batch=4):
    """Clips through the network of FVD."""
    import metrics

    device = pick_device(args.device)
    arguments = metrics.parse_args(["--fake", "shapes"])
    network = metrics.load_networks(arguments, ["fvd"], device)[0]["i3d"]
    video = torch.rand(batch, 3, 16, 64, 64, device=device) * 2 - 1
    with torch.inference_mode():
        print_row(clips_per_second=batch / seconds(lambda: network(video))[0])


SPEEDS = {f.__name__: f for f in (step, sample, kernels, peers, shapes, data, i3d)}


def parse_args(argv=None):
    """The command line."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    options = {name: commands.add_parser(name, description=f.__doc__) for name, f in SPEEDS.items()}
    for name in ("step", "sample", "kernels", "peers", "i3d"):
        options[name].add_argument("--device", default="auto", choices=DEVICES)
    for name in ("step", "sample", "peers"):
        options[name].add_argument("--preset", default="shapes", choices=train.PRESETS)
    for name, clips in (("step", None), ("peers", None), ("kernels", 8)):
        options[name].add_argument("--batch-size", type=number(int, 1, 10**6), default=clips)
    for name in ("step", "peers"):
        train.add_memory_options(options[name].add_argument_group("as in train.py"))
    options["sample"].add_argument("--num", type=number(int, 2, 10_000), default=16)
    options["sample"].add_argument("--compile", action="store_true")
    options["data"].add_argument("--data", required=True, help="a folder of videos")
    return parser.parse_args(argv)


def main():
    """The command: prints the rows of one benchmark."""
    args = parse_args()
    SPEEDS[args.what](args)


if __name__ == "__main__":
    run_command(main)
