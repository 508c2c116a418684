"""How fast is it? Not a test: timings depend on the machine and on what else it does.

    python experiments/speed.py shapes      # captioned clips rendered per second, on one core
    python experiments/speed.py data --data FOLDER         # clips of a folder decoded per second
    python experiments/speed.py train       # UNet steps of a preset, beside other people's UNets
    python experiments/speed.py train --preset ucf101 --batch-size 1 --grad-checkpoint
    python experiments/speed.py start       # seconds from starting sample.py to the finished GIF
    python experiments/speed.py i3d         # clips through I3D per second

How good it is: the other files in experiments/.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import Parser, autocast, memory_gib, number, pick_device, run_command
from train import PRESETS, add_memory_options, economize, make_optimizers
from unet3d import UNet3D


def shapes(clips=1000):
    from shapes import MovingShapes

    dataset = MovingShapes(clips)
    start = time.perf_counter()
    for i in range(clips):
        dataset[i]
    return {"clips per second": clips / (time.perf_counter() - start)}


def data(folder, videos=8, rounds=4):
    """Clips of 16 frames at 128 pixels, beside reading the same files whole with imageio."""
    import imageio.v3 as iio
    from data import VideoFolder, read_ahead

    dataset, results = VideoFolder(folder, size=128), {}
    picked = np.linspace(0, len(dataset) - 1, min(videos, len(dataset))).astype(int).tolist()
    for workers in (1, 2):
        start = time.perf_counter()
        clips = sum(clip is not None for _, clip in read_ahead(dataset, picked * rounds, workers))
        seconds = time.perf_counter() - start
        results[f"clips per second, {workers} worker{'s' * (workers > 1)}"] = clips / seconds
    start = time.perf_counter()
    frames = [len(iio.imread(Path(folder) / dataset.items[i][0], plugin="pyav")) for i in picked]
    seconds = time.perf_counter() - start
    results["files per second, whole, with imageio"] = len(frames) / seconds
    return results | {"frames in a file, on average": sum(frames) / len(frames)}


# ------------------------------------------------------------------------------ the UNet


def unet_inputs(config, batch, device):
    """What a UNet takes, of clips of 16 frames: latents, timesteps, 16 encoded words, their mask
    and the frame rate."""
    side = config.latent_size
    x = torch.randn(batch, config.channels, 16, side, side, device=device)
    words = torch.randn(batch, 16, config.text_width, device=device)
    mask = torch.ones(batch, 16, dtype=torch.bool, device=device)
    fps = torch.full((batch,), 8.0, device=device)
    return x, torch.arange(batch, device=device), words, mask, fps


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def matched(build, wanted):
    """The model build(width, multiple) that comes within 5% of the wanted number of parameters, all
    its widths multiples of as round a number as will do."""
    for multiple in (32, 16, 8, 4):
        for width in range(32, 1024, multiple):
            with torch.device("meta"):  # no memory, no work
                count = parameters(build(width, multiple))
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
    """A UNet in training, and in sampling one clip: a batch of two, with its caption and without.

    predict: its forward as a function of `unet_inputs`.
    """

    def __init__(self, name, model, predict, training, config, args, device):
        self.name, self.predict, self.device, self.args = name, predict, device, args
        self.model = model.to(device).train()
        self.optimizers = make_optimizers(model, training).values()
        self.batch = unet_inputs(config, args.batch_size, device)
        self.pair = unet_inputs(config, 2, device)

    def gradients(self):
        for part in zip(*(x.tensor_split(self.args.grad_accum) for x in self.batch)):
            with autocast(self.device, self.args.precision):
                loss = (self.predict(*part).float() - part[0]).square().mean()
            loss.backward()

    def update(self):
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def sample(self):
        with torch.inference_mode(), autocast(self.device, self.args.precision):
            self.predict(*self.pair)

    def flops(self):
        """Of the matrix products and convolutions of forward and backward, also of those that
        --grad-checkpoint makes twice; a multiplication and an addition are two."""
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.gradients()
        return counter.get_total_flops()


def seconds(actions, rounds):
    """The median time of each action, after one more round to warm up; of fewer rounds, two at
    least, where they take over a minute. The actions take turns, so that whatever else the machine
    does hits all alike."""
    times, begin = [], time.perf_counter()
    while len(times) < 3 or len(times) <= rounds and time.perf_counter() - begin < 60:
        times.append([])
        for action in actions:
            start = time.perf_counter()
            action()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[-1].append(time.perf_counter() - start)
    return np.median(times[1:], axis=0)


def matrix_peak(device, dtype, size=4096):
    """FLOP/s of a product of two large matrices."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / seconds([lambda: a @ b], 5)[0]


def compare(contenders, peak, rounds=7):
    """A line for each: medians, and their speed in training and sampling beside the first one's.
    A training step is what comes before the optimizer and the optimizer."""
    row = "{:24}{:>9}{:>8}{:>10}{:>8}{:>8}{:>8}{:>9}{:>11}{:>7}{:>7}".format
    print(row("", "params", "s/step", "optimizer", "clips/s", "GFLOP", "GFLOP/s", "of peak",
              "s/sampling", "train", "sample"))
    flops = [c.flops() for c in contenders]
    halves = seconds([half for c in contenders for half in (c.gradients, c.update)], rounds)
    training = halves[::2] + halves[1::2]
    for c in contenders:
        c.model.eval()
    sampling = seconds([c.sample for c in contenders], 3 * rounds)
    for c, work, step, update, sample in zip(contenders, flops, training, halves[1::2], sampling):
        print(row(
            c.name, f"{parameters(c.model) / 1e6:.2f} M", f"{step:.3f}", f"{update:.3f}",
            f"{len(c.batch[0]) / step:.2f}", f"{work / 1e9:.0f}", f"{work / step / 1e9:.0f}",
            f"{work / step / peak:.0%}", f"{sample:.4f}", f"{training[0] / step:.2f}x",
            f"{sampling[0] / sample:.2f}x",
        ))


def train(**options):
    """Training and sampling steps of a preset's UNet, and of other people's with as many parameters
    where their packages are installed: the same batch, latents, words and number format, all with
    AdamW then, one step of each in turn."""
    args, device = argparse.Namespace(**options), pick_device("auto")
    preset = PRESETS[args.preset]()
    config, training = preset.unet, preset.diffusion_training
    args.batch_size = args.batch_size or training.batch_size
    unet = UNet3D(config)
    economize(args, unet)
    ours = Contender("UNet3D", unet, unet, training, config, args, device)
    for _ in range(2):
        ours.gradients()
        ours.update()
    memory = memory_gib()
    peaks = [matrix_peak(device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    with autocast(device, args.precision):
        fast = torch.is_autocast_enabled(device.type)
    print(f"{tuple(ours.batch[0].shape)} in {'bfloat16' if fast else 'float32'}; large matrices: "
          f"{peaks[0] / 1e9:.0f} GFLOP/s in float32, {peaks[1] / 1e9:.0f} in bfloat16")
    print(f"with {training.optimizer}:")
    compare([ours], peaks[fast])

    training = replace(training, optimizer="adamw")
    contenders = [Contender("UNet3D", unet, unet, training, config, args, device)]
    for name, build in PEERS.items():
        try:
            model, predict = build(config, parameters(unet))
            contenders.append(Contender(name, model, predict, training, config, args, device))
        except ImportError as error:
            print(f"without {name}: {error}")
    if len(contenders) > 1:
        print("with adamw:")
        compare(contenders, peaks[fast])
    return {"GiB of memory at most, UNet3D alone": memory}


# ------------------------------------------------------------------------------ the rest


def start():
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        prompt = "a red circle moves right, then up"
        command = [sys.executable, "sample.py", prompt, "--out", folder]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return {"seconds": time.perf_counter() - begin}


def i3d(batch=4, repeats=3):
    import metrics

    args, device = metrics.parse_args(["--fake", "shapes"]), pick_device("auto")
    network = metrics.load_networks(args, ["fvd"], device)[0]["i3d"]
    video = torch.rand(batch, 3, 16, 64, 64, device=device) * 2 - 1
    with torch.inference_mode():
        network(video)
        start = time.perf_counter()
        for _ in range(repeats):
            network(video).sum().item()  # waits for the GPU
    return {"clips per second": batch * repeats / (time.perf_counter() - start)}


SPEEDS = {"shapes": shapes, "data": data, "train": train, "start": start, "i3d": i3d}


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    options = {name: commands.add_parser(name, description=f.__doc__) for name, f in SPEEDS.items()}
    options["data"].add_argument("--data", dest="folder", required=True, help="a folder of videos")
    group = options["train"].add_argument_group("as in train.py")
    group.add_argument("--preset", default="shapes", choices=PRESETS, help="(%(default)s)")
    group.add_argument("--batch-size", type=number(int, 1, 10**6), help="(the preset's)")
    add_memory_options(group)
    return parser.parse_args(argv)


def main():
    options = vars(parse_args())
    what = options.pop("what")
    for name, value in SPEEDS[what](**options).items():
        print(f"{what}: {value:.3g} {name}")


if __name__ == "__main__":
    run_command(main)
