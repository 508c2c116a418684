"""Train the two halves of the text-to-video model, one after the other.

    python train.py vae       --data shapes --out runs/shapes    # frames <-> latents
    python train.py diffusion --data shapes --out runs/shapes    # words -> latents, over time

--data also takes a folder of videos; `data.find_captions` says how it finds their captions.

A run folder holds `config.json`, `log.jsonl` (one JSON object per logged step), `vae.pt`, `last.pt`
(the whole training state, for --resume), `model.pt` (self-contained: what sample.py takes),
`latents.bin` and `latents.json` (the encoded data set), `skipped.txt` (unusable videos) and
`samples/`.

Every random draw of step n comes from a generator seeded by (seed, n). So a resumed run sees the
very batches, noise and masks that an uninterrupted one would have seen, and no random state needs
saving.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

import data
from data import FPS, DataError, MovingShapes, VideoError, VideoFolder, atomic_path, contact_sheet
from data import prefetch, read_ahead, to_model, to_uint8, write_video
from diffusion import DiffusionConfig, NoiseSchedule, diffusion_loss
from sample import Parser, Pipeline, UserError, autocast, load_checkpoint, load_pipeline, number
from sample import pack, pick_device, run_command, unpack
from text_encoder import TextEncoder, TextEncoderConfig, Tokenizer
from unet3d import UNet3D, UNet3DConfig
from vae import AutoencoderKL, VAEConfig, VAELoss, VAELossConfig

# ------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class TrainConfig:
    """One stage's training; for `lr`, `warmup` and `decay` see `learning_rate`."""

    steps: int
    batch_size: int  # frames for the VAE, clips for the diffusion model
    lr: float
    optimizer: str = "adamw"  # or "muon"
    warmup: int = 100
    decay: float = 0.4  # fraction of the steps
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema: float = 0.999  # decay of the averaged weights that are sampled from
    videos: int = 10_000  # size of the procedural data set
    caption_dropout: float = 0.1  # share of captions replaced by "": trains the null for guidance
    text_only: float = 0.5  # share of clips in which no frame is given clean
    easy_start: int = 0  # steps of easier questions at first, see `beginning`
    log_every: int = 50
    save_every: int = 500  # checkpoint and sample pictures


@dataclass(frozen=True)
class Preset:
    """Everything that differs between data sets; one name on the command line."""

    size: int  # side of a frame in pixels
    vae: VAEConfig
    vae_loss: VAELossConfig
    vae_training: TrainConfig
    text: TextEncoderConfig
    unet: UNet3DConfig
    diffusion: DiffusionConfig
    diffusion_training: TrainConfig


# Real frames: no folded pixels at the entrance, twice the depth, and a discriminator for the
# texture that L1 and MSE blur away.
UCF101_VAE = VAEConfig(patch=1, widths=(64, 128, 256, 256), blocks=2, groups=32)
UCF101_VAE_LOSS = VAELossConfig(kl_weight=1e-5, gan_weight=0.5, gan_start=10_000)
PRESETS = {
    "shapes": Preset(
        size=64,
        vae=VAEConfig(widths=(32, 64, 128)),
        vae_loss=VAELossConfig(),
        vae_training=TrainConfig(steps=2500, batch_size=32, lr=1e-3),
        text=TextEncoderConfig(),
        unet=UNet3DConfig(),
        diffusion=DiffusionConfig(shift=3.0),
        diffusion_training=TrainConfig(
            steps=6600, batch_size=16, lr=1e-3, decay=0.65, optimizer="muon", easy_start=1500
        ),
    ),
    "ucf101": Preset(
        size=128,
        vae=UCF101_VAE,
        vae_loss=UCF101_VAE_LOSS,
        vae_training=TrainConfig(steps=50_000, batch_size=32, lr=2e-4),
        text=TextEncoderConfig(vocab_size=2048, width=256, depth=4),
        unet=UNet3DConfig(  # 49 M parameters
            latent_size=16, widths=(128, 256, 512), blocks=(2, 2, 3), attention=(True, True, True),
            text_width=256, embedding_width=512, groups=32,
        ),
        diffusion=DiffusionConfig(shift=2.0),
        diffusion_training=TrainConfig(
            steps=100_000, batch_size=32, lr=3e-4, optimizer="muon", ema=0.9999
        ),
    ),
    "ucf101-256": Preset(
        size=256,
        vae=UCF101_VAE,
        vae_loss=UCF101_VAE_LOSS,
        vae_training=TrainConfig(steps=50_000, batch_size=16, lr=2e-4),
        text=TextEncoderConfig(vocab_size=2048, width=256, depth=4),
        unet=UNet3DConfig(  # 155 M parameters
            latent_size=32, widths=(192, 384, 768), blocks=(2, 2, 5), attention=(True, True, True),
            text_width=256, embedding_width=768, groups=32,
        ),
        diffusion=DiffusionConfig(shift=3.0),
        diffusion_training=TrainConfig(
            steps=200_000, batch_size=16, lr=2e-4, optimizer="muon", ema=0.9999
        ),
    ),
}
VGG_WEIGHT = 0.2  # of the distance of VGG16 features, where --vgg gives their weights
CLIP_OPTIONS = ("split", "clip_seconds", "stride", "flip")  # of `VideoFolder`
PROMPTS = (  # drawn into samples/ while training on shapes
    "a red circle moves right, then up",
    "a small blue star grows, then spins",
    "a green square moves left while a white ring moves down",
    "a yellow triangle spins, then moves down",
)


def options(**values):
    """The command-line options that set these values; none for what is not set."""
    words = []
    for name, value in values.items():
        if value is not None and value is not False:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [shlex.quote(str(value))]
    return " ".join(words)


def learning_rate(step, config):
    """Linear warm-up, constant, then a linear fall to zero over the last `decay` of the steps."""
    rise = (step + 1) / config.warmup if config.warmup else 1
    fall = (config.steps - step) / (config.decay * config.steps) if config.decay else 1
    return config.lr * min(1, rise, fall)


# ------------------------------------------------------------------------------ optimizer


def orthogonalize(g, steps=5):
    """The nearest (semi-)orthogonal matrix to g, roughly: singular values pulled to about 1.

    Newton-Schulz iteration of Jordan 2024 (Muon): x <- (a + b x x' + c (x x')^2) x. The factors act
    from the left, so they are multiplied together in a small square matrix first.
    """
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)  # the iteration converges for singular values up to 1
    gram, identity = x @ x.T, torch.eye(len(x), device=x.device, dtype=x.dtype)
    product = identity
    for _ in range(steps):
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    x = product @ x
    return x.T if g.shape[0] > g.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan 2024): for the hidden layers' matrices and convolutions.

    An ordinary update is dominated by a few directions; this one moves along all of them equally.
    Scaled as in Liu 2025 (arXiv 2502.16982, eq. 4) so that AdamW's learning rate and weight decay
    fit.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p.grad)
                average = self.state[p]["momentum"]
                average.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(average, group["momentum"])  # Nesterov's look ahead
                update = orthogonalize(update.flatten(1))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-0.2 * group["lr"] * max(update.shape) ** 0.5)


def make_optimizers(model, config):
    """The optimizers of a model by name: "adamw", and where the config says so "muon" for the
    matrices and convolutions between the first and the last layer."""
    hidden, outer, vectors = [], [], []
    for name, p in model.named_parameters():
        ends = any(part in name for part in ("embed", "conv_in", "conv_out"))
        (vectors if p.ndim < 2 else outer if ends else hidden).append(p)
    optimizers = {}
    if config.optimizer == "muon":
        optimizers["muon"] = Muon(hidden, config.lr, weight_decay=config.weight_decay)
        hidden = []
    # No weight decay for gains and biases: pulling a norm's gain to 0 is no prior.
    groups = [
        {"params": hidden + outer, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return optimizers | {"adamw": torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.99))}


# ------------------------------------------------------------------------------ a run


class Run:
    """What both stages share: optimizer step, log, progress bar, checkpoints, resume.

    stage: "vae" or "diffusion"; models: what to save, of which `update` trains the first;
    discriminator: trained by `update_discriminator`, or None.
    """

    def __init__(self, args, stage, config, models, discriminator=None):
        self.out, self.stage, self.config, self.models = Path(args.out), stage, config, models
        self.resume, self.start = args.resume, 0
        # What must be the same when a run goes on; the rest (steps, learning rate) may change.
        names = ("preset", "data", "seed", *CLIP_OPTIONS)
        self.settings = {name: getattr(args, name) for name in names}
        self.record = {"arguments": vars(args), "preset": asdict(configure(args))}
        trained = next(iter(models.values()))
        self.parameters = list(trained.parameters())
        self.optimizers = make_optimizers(trained, config)
        if discriminator is not None:
            self.models = models | {"discriminator": discriminator}
            # Low momentum: its opponent moves with every step.
            self.optimizers["discriminator"] = torch.optim.AdamW(
                discriminator.parameters(), config.lr, betas=(0.5, 0.9), weight_decay=0.0
            )

    def prepare(self):
        """Resume from last.pt, or make sure that nothing of an earlier run is overwritten."""
        last = self.out / "last.pt"
        if self.resume:
            state = load_checkpoint(last, "stage", "settings", "step", "models", "optimizers")
            if state["stage"] != self.stage:
                raise UserError(f"{last} is of the {state['stage']} stage: there is no "
                                f"{self.stage} run to resume")
            for name, value in state["settings"].items():
                if value != self.settings[name]:
                    was = options(**{name: value}) or f"no --{name.replace('_', '-')}"
                    raise UserError(f"{last} was started with {was}: use the same")
            try:
                for name, model in self.models.items():
                    model.load_state_dict(state["models"][name])
                for name, optimizer in self.optimizers.items():
                    optimizer.load_state_dict(state["optimizers"][name])
            except (KeyError, ValueError, RuntimeError) as error:
                raise UserError(f"{last} does not fit the preset as it is now: restore its "
                                "settings, or choose another --out") from error
            self.start = state["step"]
        elif last.is_file():
            found = load_checkpoint(last, "stage")["stage"]
            if found == self.stage:
                raise UserError(f"{last} is a {found} run: add --resume, or choose another --out")
            if found == "diffusion":  # a new VAE would make its UNet worthless
                raise UserError(f"{last} is a {found} run: choose another --out")
        try:
            (self.out / "samples").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.out}: {error.strerror}") from error
        self._rewind_log()
        with atomic_path(self.out / "config.json") as path:
            path.write_text(json.dumps(self.record, indent=2) + "\n")

    def _rewind_log(self):
        """Drop log lines of this stage from after the checkpoint: those steps come again."""
        path = self.out / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        # A full disk may have cut the last line short.
        lines = [json.loads(line) for line in lines if line.endswith("\n")]
        lines = [r for r in lines if r["stage"] != self.stage or r["step"] <= self.start]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def steps(self):
        """The remaining step numbers, behind a progress bar; sets the learning rate of each."""
        steps = range(self.start, self.config.steps)
        bar = tqdm(
            steps, initial=self.start, total=self.config.steps, desc=self.stage,
            mininterval=progress_interval(),
        )
        self.clock, self.clock_step, self.sums = time.time(), self.start, {}
        for step in bar:
            for optimizer in self.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, self.config)
            yield step

    def update(self, loss):
        """Backward, clip, step. Returns the gradient's norm. Raises UserError if not finite."""
        for p in self.parameters:
            p.grad = None
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip).item()
        self._check_finite(norm + loss.item())
        for name, optimizer in self.optimizers.items():
            if name != "discriminator":
                optimizer.step()
        return norm

    def update_discriminator(self, loss):
        """Backward and step of the discriminator alone."""
        optimizer = self.optimizers["discriminator"]
        optimizer.zero_grad()
        loss.backward()
        self._check_finite(loss.item())
        optimizer.step()

    def _check_finite(self, value):
        if not math.isfinite(value):
            last = self.out / "last.pt"
            start = f"go on from {last} with --resume and" if last.is_file() else "start again with"
            raise UserError(f"the loss is not finite any more: {start} a lower --lr")

    def log(self, step, **values):
        """Every `log_every` steps, the means since the last time: an aligned line on stderr and a
        JSON object in log.jsonl."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value
        done = step + 1
        if done % self.config.log_every and done != self.config.steps:
            return
        steps, seconds = done - self.clock_step, time.time() - self.clock
        means = {name: total / steps for name, total in self.sums.items()}
        self.clock, self.clock_step, self.sums = time.time(), done, {}
        lr, speed = learning_rate(step, self.config), steps * self.config.batch_size / seconds
        minutes = (self.config.steps - done) * seconds / steps / 60
        text = "  ".join(f"{name} {value:7.4f}" for name, value in means.items())
        tqdm.write(
            f"step {done:6d}  {text}  lr {lr:.1e}  {speed:6.1f}/s  {memory_gib():4.1f} GiB  "
            f"{minutes:5.1f} min left",
            file=sys.stderr,
        )
        self.record_line(step, **means, lr=lr, per_second=speed)

    def record_line(self, step, **values):
        """Append one JSON object to log.jsonl."""
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps({"stage": self.stage, "step": step + 1, **values}) + "\n")

    def due(self, step):
        """Is it time for a checkpoint and sample pictures after this step?"""
        return (step + 1) % self.config.save_every == 0 or step + 1 == self.config.steps

    def save(self, step):
        """Write the whole training state to last.pt."""
        state = {
            "stage": self.stage,
            "settings": self.settings,
            "step": step + 1,
            "models": {name: model.state_dict() for name, model in self.models.items()},
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
        }
        save_atomically(state, self.out / "last.pt")


def progress_interval():
    """Seconds between updates of a progress bar: few when stderr is a file."""
    return 0.5 if sys.stderr.isatty() else 60


def save_atomically(checkpoint, path):
    """torch.save that leaves the old file or the new one, never half of one."""
    with atomic_path(path) as temporary:
        torch.save(checkpoint, temporary)


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


def generator(seed, step):
    """The source of all torch randomness of one step, on the CPU: the same on every device."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


# ------------------------------------------------------------------------------ the data set


def open_dataset(args, config, size):
    """What --data names: `MovingShapes` or a `VideoFolder`. Raises UserError, DataError."""
    clips = {name: getattr(args, name) for name in CLIP_OPTIONS}
    if args.data == "shapes":
        if options(**clips):
            raise UserError(f"{options(**clips)} is for --data FOLDER, a folder of videos")
        return MovingShapes(config.videos, seed=args.seed, size=size)
    if args.videos is not None:
        raise UserError("--videos is for --data shapes; a folder has as many as there are in it")
    dataset = VideoFolder(args.data, seed=args.seed, size=size, **clips)
    print(f"{args.data}: {len(dataset)} videos, captions from {dataset.source}, for example "
          f'"{dataset.caption(0)}"', file=sys.stderr)
    return dataset


def report_skipped(dataset, out):
    """List the videos that cannot be used in skipped.txt, each once, with the reason."""
    path, skipped = out / "skipped.txt", sorted(dataset.skipped.items())
    if not skipped:
        path.unlink(missing_ok=True)  # of an earlier run
        return
    text = "".join(f"{name}: {why}\n" for name, why in skipped).encode("utf-8", "backslashreplace")
    if not path.is_file() or path.read_bytes() != text:
        with atomic_path(path) as temporary:
            temporary.write_bytes(text)
        tqdm.write(f"skipped {len(skipped)} videos: {path} says why", file=sys.stderr)


# ------------------------------------------------------------------------------ stage 1: VAE


def draw_frames(dataset, rng, count, per_video=2):
    """`count` random frames: (count, 3, h, w) in [-1, 1]. Raises DataError where there are none."""
    frames = []
    while len(frames) * per_video < count:
        with contextlib.suppress(VideoError):  # another one instead
            frames.append(dataset.random_frames(rng.integers(len(dataset)), rng, per_video))
    return to_model(np.concatenate(frames)[None, :count])[0].transpose(0, 1)


def psnr(x, x_hat):
    """Peak signal-to-noise ratio in dB of values in [-1, 1] (peak to peak 2)."""
    mse = (x.clamp(-1, 1) - x_hat.float().clamp(-1, 1)).square().mean()
    return (10 * torch.log10(4 / mse)).item()


@torch.no_grad()
def reconstruct(vae, frames, device):
    """Frames (b, 3, h, w) through the autoencoder and back, without sampling noise."""
    with autocast(device):
        return torch.cat([vae.decode(vae.encode(x.to(device)).mean) for x in frames.split(64)])


def vae_loss(args, preset):
    """The loss of the preset, and with --vgg the distance of VGG features. Raises UserError."""
    if not args.vgg:
        return VAELoss(preset.vae_loss)
    try:
        return VAELoss(replace(preset.vae_loss, vgg_weight=VGG_WEIGHT), args.vgg)
    except Exception as error:  # as many kinds as there are wrong files
        raise UserError(f"--vgg {args.vgg} cannot be read as torchvision's vgg16-397923af.pth"
                        ) from error


def train_vae(args, preset, device):
    """Stage 1: train the autoencoder; writes vae.pt."""
    config = preset.vae_training
    torch.manual_seed(args.seed)  # of the initial weights
    dataset = open_dataset(args, config, preset.size)
    if args.data == "shapes":
        held_out = MovingShapes(128, "heldout", seed=args.seed, size=preset.size)
    else:
        dataset, held_out = dataset.divide()
    try:
        test = draw_frames(held_out, np.random.default_rng(0), 256)
    except DataError:  # the few held-out videos of a small folder cannot be used
        test = draw_frames(dataset, np.random.default_rng(0), 256)
    if args.init:
        vae = unpack(AutoencoderKL, VAEConfig, load_checkpoint(args.init, "vae")["vae"])
    else:
        vae = AutoencoderKL(preset.vae)
    vae = vae.to(device).train()
    losses = vae_loss(args, preset).to(device)
    run = Run(args, "vae", config, {"vae": vae}, losses.discriminator)
    run.prepare()

    def draw(step):
        return draw_frames(dataset, np.random.default_rng((args.seed, step)), config.batch_size)

    batches = prefetch(draw, range(run.start, config.steps))
    for step, x in zip(run.steps(), batches):
        x, source = x.to(device), generator(args.seed, step)
        with autocast(device):
            posterior = vae.encode(x)
            eps = torch.randn(posterior.mean.shape, generator=source).to(device)
            x_hat = vae.decode(posterior.sample(eps))
            loss, terms = losses.generator_loss(x, x_hat, posterior, vae.last_layer, step)
        terms |= {"grad": run.update(loss), "psnr": psnr(x, x_hat)}
        if losses.discriminator is not None:
            with autocast(device):
                loss_d = losses.discriminator_loss(x, x_hat)
            run.update_discriminator(loss_d)
            terms["discriminator"] = loss_d.item()
        run.log(step, loss=loss.item(), **terms)

        if run.due(step):
            run.save(step)
            report_skipped(dataset, run.out)
            x_hat = reconstruct(vae, test, device).cpu()
            run.record_line(step, held_out_psnr=psnr(test, x_hat))
            tqdm.write(f"held-out frames: {psnr(test, x_hat):.2f} dB PSNR", file=sys.stderr)
            pairs = torch.cat([test[:8], x_hat[:8]]).transpose(0, 1)[None]
            sheet = contact_sheet(to_uint8(pairs)[0], columns=8)
            write_video(run.out / f"samples/vae_{step + 1:06d}.png", sheet[None])
    measure_latents(vae, dataset, device)
    save_atomically({"vae": pack(vae)}, run.out / "vae.pt")
    print(f"{run.out / 'vae.pt'} is done; next: {command('diffusion', args)}")


def command(stage, args):
    """The command line that runs a stage with the same data, preset and folder."""
    same = {name: getattr(args, name) for name in ("data", *CLIP_OPTIONS, "preset", "out")}
    return f"python train.py {stage} {options(**same)}"


@torch.no_grad()
def measure_latents(vae, dataset, device, videos=256):
    """Store the mean and standard deviation of the training set's latents in the VAE."""
    vae.eval()
    # From all over the data set: the videos of a folder are in order.
    indices = np.linspace(0, len(dataset) - 1, min(videos, len(dataset))).astype(int).tolist()
    z = []
    for _, sample in read_ahead(dataset, indices):
        if sample is not None:
            with autocast(device):
                frames = to_model(sample.video[None])[0].transpose(0, 1)
                z.append(vae.encode(frames.to(device)).mean.cpu())
    vae.set_latent_statistics(rearrange(torch.stack(z), "b f c h w -> b c f h w"))


# ------------------------------------------------------------------------------ stage 2: diffusion


class EMA:
    """Exponential moving average of a model's weights, which samples better than the last weights.

    The average starts quickly and slows down to `decay`, so that it soon forgets the
    initialisation.
    """

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, values = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(averages, values, 1 - decay)


@torch.no_grad()
def encode_dataset(vae, dataset, device, out):
    """Captions, frame rates (n,) and latents float16 (n, c, f, h, w) of every usable clip.

    Each clip is encoded once, into `latents.bin` in the folder `out`. The file is mapped into
    memory, not loaded, so that it may be larger than that. `latents.json` says which clips are in
    it; encoding that was interrupted goes on there, unless anything has changed that the latents
    depend on.
    """
    file, progress = out / "latents.bin", out / "latents.json"
    weights = b"".join(v.numpy(force=True).tobytes() for v in vae.state_dict().values())
    key = hashlib.sha256(weights + Path(data.__file__).read_bytes())
    key.update(dataset.identity().encode("utf-8", "backslashreplace"))
    state = json.loads(progress.read_text()) if file.is_file() and progress.is_file() else {}
    if state.get("key") != key.hexdigest():
        progress.unlink(missing_ok=True)  # first: it must never speak of another file
        file.write_bytes(b"")
        state = {"key": key.hexdigest(), "done": 0, "clips": [], "fps": [], "skipped": {}}
    dataset.skipped.update(state["skipped"])

    side = dataset.size // vae.config.factor
    shape = (vae.config.latent_channels, dataset.frames, side, side)
    todo = range(state["done"], len(dataset))
    bar = tqdm(
        read_ahead(dataset, todo), initial=state["done"], total=len(dataset), desc="encoding",
        mininterval=progress_interval(),
    )
    with file.open("rb+") as latents:
        latents.seek(len(state["clips"]) * 2 * math.prod(shape))
        for i, sample in bar:
            if sample is not None:
                with autocast(device):
                    z = vae.encode_video(to_model(sample.video[None]).to(device))
                latents.write(z.half().cpu().numpy().tobytes())
                state["clips"].append(i)
                state["fps"].append(float(sample.fps))
            state |= {"done": i + 1, "skipped": dict(dataset.skipped)}
            if state["done"] % 100 == 0 or state["done"] == len(dataset):
                latents.flush()
                os.fsync(latents.fileno())  # what is called done must be on the disk
                with atomic_path(progress) as path:
                    path.write_text(json.dumps(state))
    shape = (len(state["clips"]), *shape)
    latents = np.memmap(file, np.float16, mode="c", shape=shape)  # "c": the file stays as it is
    captions = [dataset.caption(i) for i in state["clips"]]
    return captions, torch.tensor(state["fps"]), torch.from_numpy(latents)


def draw_given_frames(rng, batch, frames, text_only):
    """Which frames the model is given clean: bool (batch, frames), at least one is left to draw.

    A share `text_only` gets none; the rest is divided evenly between the first frame (image to
    video), the first few (continuation), the last few, both ends (interpolation), and random
    frames.
    """
    mask = np.zeros((batch, frames), bool)
    for row in mask:
        if frames == 1 or rng.random() < text_only:
            continue
        task = rng.choice(["first", "first few", "last few", "ends", "random"])
        count = rng.integers(1, max(frames // 2, 1) + 1)
        if task in ("first", "ends"):
            row[0] = True
        if task == "first few":
            row[:count] = True
        if task == "last few":
            row[-count:] = True
        if task == "ends" and frames > 2:
            row[-1] = True
        if task == "random":
            row[rng.choice(frames, size=count, replace=False)] = True
    return torch.from_numpy(mask)


def build_models(args, preset):
    """(tokenizer or None, text encoder, unet, schedule, vae): all of --init, or a new model for a
    trained VAE."""
    vae_path = Path(args.init or Path(args.out) / "vae.pt")
    if not vae_path.is_file() and not args.init:
        raise UserError(
            f"no {vae_path}: train it first with `{command('vae', args)}`, or name a trained one "
            "with --init"
        )
    checkpoint = load_checkpoint(vae_path, "vae")
    vae = unpack(AutoencoderKL, VAEConfig, checkpoint["vae"])
    if "unet" in checkpoint:
        whole = load_pipeline(vae_path)
        return whole.tokenizer, whole.text_encoder, whole.unet, whole.schedule, vae
    schedule = NoiseSchedule(preset.diffusion)
    return None, TextEncoder(preset.text), UNet3D(preset.unet), schedule, vae


def beginning(step, config):
    """How much of the easy start is left: falls from 1 to 0 in the first `easy_start` steps.

    Training begins with one question: here is the first frame, there is a sentence, all else is
    noise; what happens? Then the words are all there is to go by. Drawn from all timesteps alike,
    most clips show their motion through the noise, and the words for it were still unread after
    thousands of steps. So as long as it lasts, the first frame is given in this share of clips, and
    the timesteps are the noisiest ones: the last 5% at first, all of them at the end.
    """
    return max(0.0, 1 - step / config.easy_start) if config.easy_start else 0.0


def draw_batch(seed, step, config, latents, schedule):
    """All that is random in a step: which clips and which captions (b,), the clips' latents, given
    frames (b, f), timesteps (b,), and noise. Caption number len(latents) is the null one."""
    rng, source = np.random.default_rng((seed, step)), generator(seed, step)
    index = rng.integers(len(latents), size=config.batch_size)
    dropped = rng.random(config.batch_size) < config.caption_dropout
    rows = np.where(dropped, len(latents), index)
    given = draw_given_frames(rng, len(index), latents.shape[2], config.text_only)
    easy = beginning(step, config)
    given[rng.random(len(index)) < easy] = torch.arange(latents.shape[2]) == 0
    noise = torch.randn((len(index), *latents.shape[1:]), generator=source)
    # One timestep from each of b equal intervals: a quieter gradient (Kingma 2021, appendix I.1).
    u = (torch.rand(1, generator=source) + torch.arange(len(index)) / len(index)) % 1
    u = 1 - (1 - u) * (1 - 0.95 * easy)
    t = (u * schedule.config.timesteps).long()
    clips, rows = torch.from_numpy(index), torch.from_numpy(rows)
    return clips, rows, latents[clips].float(), given, t, noise


def train_diffusion(args, preset, device):
    """Stage 2: train text encoder and UNet on the VAE's latents; writes model.pt."""
    config = preset.diffusion_training
    torch.manual_seed(args.seed)  # of the initial weights
    tokenizer, text_encoder, unet, schedule, vae = build_models(args, preset)
    size = unet.config.latent_size * vae.config.factor
    if size != preset.size or unet.config.channels != vae.config.latent_channels:
        raise UserError(f"the VAE does not fit --preset {args.preset} of {preset.size} pixels")
    dataset = open_dataset(args, config, preset.size)
    schedule = schedule.to(device)
    model = torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet}).to(device).train()
    ema = EMA(model, config.ema)
    run = Run(args, "diffusion", config, {"model": model, "ema": ema.model})
    run.prepare()

    captions, fps, latents = encode_dataset(vae.to(device), dataset, device, run.out)
    report_skipped(dataset, run.out)
    if run.resume:  # with other --videos the captions differ, but the tokens must stay the same
        tokenizer = load_pipeline(run.out / "model.pt").tokenizer
    tokenizer = tokenizer or Tokenizer.train(captions, preset.text.vocab_size)
    tokenizer.add_words(captions)
    length = text_encoder.config.context_length
    try:  # the last row is the null caption
        tokens, mask = tokenizer.batch(captions + [""], length, device)
    except ValueError as error:
        raise UserError(f"one of the captions is too long: {error}") from error
    prompts, rate = (PROMPTS, FPS) if args.data == "shapes" else typical(captions, fps)
    fps = fps.to(device)
    pipeline = Pipeline(
        tokenizer, ema.model["text_encoder"], ema.model["unet"], vae, schedule, device
    )

    for step in run.steps():
        batch = draw_batch(args.seed, step, config, latents, schedule)
        clips, rows, x_start, given, t, noise = (part.to(device) for part in batch)
        with autocast(device):
            longest = int(mask[rows].sum(1).max())
            words, words_mask = tokens[rows, :longest], mask[rows, :longest]
            context = model["text_encoder"](words, words_mask)

            def denoise(x_t, t):
                return model["unet"](x_t, t, context, words_mask, fps[clips], x_start, given)

            loss = diffusion_loss(denoise, schedule, x_start, t, noise, keep=~given)
        grad_norm = run.update(loss)
        ema.update(model, step)
        run.log(step, loss=loss.item(), grad=grad_norm)
        if run.due(step):
            # In this order, so that where there is a last.pt to resume from there is a model.pt.
            save_pipeline(pipeline, run.out / "model.pt")
            run.save(step)
            draw_samples(pipeline, run.out / f"samples/step_{step + 1:06d}.gif", prompts, rate)
    print(f"python sample.py {shlex.quote(prompts[0])} --fps {rate:g} --checkpoint "
          f"{shlex.quote(str(run.out / 'model.pt'))}")


def typical(captions, fps, count=4):
    """A few different captions from all over the data set, and the middle frame rate."""
    captions = sorted(set(captions))
    picked = np.linspace(0, len(captions) - 1, min(count, len(captions))).astype(int)
    return [captions[i] for i in picked], max(round(fps.median().item(), 1), 0.1)


def save_pipeline(pipeline, path):
    """model.pt: weights in half precision, which halves the file and changes nothing visible."""
    checkpoint = pipeline.pack()
    for part in checkpoint.values():
        if "state" in part:
            part["state"] = {k: v.half() for k, v in part["state"].items()}
    save_atomically(checkpoint, path)


def draw_samples(pipeline, path, prompts, fps):
    """The fixed prompts with fixed seeds, side by side."""
    videos = pipeline.generate(list(prompts), fps=fps)
    write_video(path, rearrange(videos, "b f h w c -> f h (b w) c"), fps, upscale=2)


# ------------------------------------------------------------------------------ command line


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae", "diffusion"], help="which half to train")
    parser.add_argument(
        "--data", default="shapes", metavar="shapes|FOLDER",
        help="the built-in captioned clips, or a folder of videos (%(default)s)",
    )
    parser.add_argument("--out", required=True, help="the run folder, for example runs/shapes")
    parser.add_argument(
        "--preset", default="shapes", choices=PRESETS, help="model sizes and settings (%(default)s)"
    )
    parser.add_argument(
        "--init", metavar="CHECKPOINT",
        help="start from trained weights: a vae.pt, or a model.pt to fine-tune",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where the run in --out stopped"
    )
    parser.add_argument(
        "--vgg", metavar="FILE",
        help="torchvision's vgg16-397923af.pth: the VAE also compares VGG features",
    )
    group = parser.add_argument_group("clips of a folder of videos")
    group.add_argument("--split", help="an official list of UCF-101, train01 to test03")
    window = group.add_mutually_exclusive_group()
    window.add_argument(
        "--clip-seconds", type=number(float, 0.01, 1e6), metavar="S",
        help="a clip covers a window of S seconds, from a random place (the whole video)",
    )
    window.add_argument(
        "--stride", type=number(int, 1, 10**6), metavar="N",
        help="a clip is every N-th frame, from a random place",
    )
    group.add_argument(
        "--flip", action="store_true", help="mirror half of the clips (left and right get lost)"
    )
    group = parser.add_argument_group("instead of the preset's values")
    group.add_argument("--steps", type=number(int, 1, 10**9), help="training steps in total")
    group.add_argument("--batch-size", type=number(int, 1, 10**6))
    group.add_argument("--lr", type=number(float, 0, 1), help="peak learning rate")
    group.add_argument("--videos", type=number(int, 1, 10**9), help="size of the procedural data")
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="(%(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    return parser.parse_args(argv)


def configure(args):
    """The preset with the command line's values in place of its own. In a shorter or longer run the
    discriminator joins in after the same share of the steps."""
    preset = PRESETS[args.preset]
    field = f"{args.stage}_training"
    names = ("steps", "batch_size", "lr", "videos")
    values = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.stage == "vae" and args.steps is not None:
        start = preset.vae_loss.gan_start * args.steps // preset.vae_training.steps
        preset = replace(preset, vae_loss=replace(preset.vae_loss, gan_start=start))
    return replace(preset, **{field: replace(getattr(preset, field), **values)})


def main():
    args = parse_args()
    if args.vgg and args.stage != "vae":
        raise UserError("--vgg is for the autoencoder: python train.py vae")
    preset = configure(args)
    stage = {"vae": train_vae, "diffusion": train_diffusion}[args.stage]
    try:
        stage(args, preset, pick_device(args.device))
    except KeyboardInterrupt:
        if (Path(args.out) / "last.pt").is_file():
            print("stopped; the same command with --resume goes on from the last checkpoint",
                  file=sys.stderr)
        raise
    except DataError as error:
        raise UserError(error) from error
    except torch.cuda.OutOfMemoryError as error:
        raise UserError("the GPU's memory is full: try a smaller --batch-size") from error


if __name__ == "__main__":
    run_command(main)
