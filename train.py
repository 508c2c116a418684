"""Train the two halves of the text-to-video model, one after the other.

    python train.py vae       --data shapes --out runs/shapes    # frames <-> latents
    python train.py diffusion --data shapes --out runs/shapes    # words -> latents, over time

--data also takes a folder of videos; `data.find_captions` says how it finds their captions.

A run folder holds `config.json`, `log.jsonl` (one JSON object per logged step), `vae.pt`, `last.pt`
(the whole training state, for --resume), `model.pt` (self-contained: what sample.py takes),
`latents.bin` and `latents.json` (the encoded data set), `skipped.txt` (unusable videos), `samples/`
and, with --tensorboard, `tensorboard/`.

Every random draw of step n comes from a generator seeded by (seed, n). So a resumed run sees the
very batches, noise and masks that an uninterrupted one would have seen, and no random state needs
saving. Killed at any moment and resumed, on the same CPU, a run ends with the same bits.

Letters used here: `b` batch, `c` channels, `f` frames, `h w` height and width, `t` timestep.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import importlib.util
import json
import math
import os
import shlex
import signal
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import FPS, DataError, VideoError, VideoFolder, contact_sheet, prefetch, read_ahead
from data import to_model, to_uint8, write_video
from diffusion import DiffusionConfig, NoiseSchedule, diffusion_loss
from sample import Pipeline, load_pipeline
from shapes import MovingShapes
from text_encoder import TextEncoder, TextEncoderConfig, Tokenizer
from tools import Parser, UserError, atomic_path, autocast, load_checkpoint, number, pack
from tools import out_of_memory, pick_device, product_dtype, run_command, save_atomically
from tools import unpack
from unet3d import SpaceTimeBlock, UNet3D, UNet3DConfig
from vae import AutoencoderKL, ResBlock, VAEConfig, VAELoss, VAELossConfig

# ------------------------------------------------------------------------------ stage 1: frames


def train_vae(args, preset, device):
    """Stage 1: train the autoencoder on single frames; writes vae.pt."""
    config = preset.vae_training
    torch.manual_seed(args.seed)  # of the initial weights
    dataset, identity, test = open_frames(args, config, preset.size)
    vae = build_vae(args, preset).to(device).train()
    run = Run(args, adopt(args, preset, vae=vae.config))
    vae_loss = make_vae_loss(args, run.preset.vae_loss).to(device)
    models, optimizers = {"vae": vae}, make_optimizers(vae, config, args.precision)
    if vae_loss.discriminator is not None:
        models["discriminator"] = vae_loss.discriminator
        # Low momentum: its opponent moves with every step.
        optimizers["discriminator"] = torch.optim.AdamW(
            vae_loss.discriminator.parameters(), config.lr, (0.5, 0.9), weight_decay=0.0, fused=True
        )
    run.begin(models, optimizers, {"data": identity})
    economize(args, vae.encoder, vae.decoder)

    draw = functools.partial(draw_frames, dataset, args.seed, config.batch_size)
    side = preset.size // vae.config.factor
    latent_shape = (config.batch_size, vae.config.latent_channels, side, side)
    for step, frames in zip(run.steps(), prefetch(draw, range(run.start, config.steps))):
        noise = torch.randn(latent_shape, generator=generator(args.seed, step))
        set_learning_rate(optimizers, step, config)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        values = {}
        for share, (x, eps) in parts((frames, noise), args.grad_accum, device):
            with autocast(device, args.precision):
                posterior = vae.encode(x)
                x_hat = vae.decode(posterior.sample(eps))
                loss, terms = vae_loss.generator_loss(x, x_hat, posterior, vae.last_layer, step)
            (share * loss).backward()
            terms = {"loss": loss.item(), **terms, "psnr": psnr(x, x_hat)}
            if vae_loss.discriminator is not None:
                with autocast(device, args.precision):
                    loss = vae_loss.discriminator_loss(x, x_hat)
                (share * loss).backward()
                terms["discriminator"] = loss.item()
            add(values, share, terms)
        values["grad"] = clip_grad_norm_(vae.parameters(), config.grad_clip).item()
        run.check_finite(values["loss"], values["grad"], values.get("discriminator", 0))
        for optimizer in optimizers.values():
            optimizer.step()
        run.log(step, values)
        if run.due(step):
            report_skipped(dataset, run.out)
            show_frames(run, step, vae, test, device)
        run.save(step)
    measure_latents(vae, dataset, device, args.precision)
    save_atomically({"vae": pack(vae)}, run.out / "vae.pt")
    print(f"{run.out / 'vae.pt'} is done; next: {next_command('diffusion', args)}")


# ------------------------------------------------------------------------------ stage 2: videos


def train_diffusion(args, preset, device):
    """Stage 2: train text encoder and UNet on the autoencoder's latents; writes model.pt."""
    config = preset.diffusion_training
    torch.manual_seed(args.seed)  # of the initial weights
    tokenizer, text_encoder, unet, schedule, vae = build_models(args, preset)
    run = Run(args, adopt(args, preset, vae=vae.config, text=text_encoder.config,
                          unet=unet.config, diffusion=schedule.config))
    config = run.preset.diffusion_training
    dataset = open_dataset(args, config, preset.size)
    captions = [dataset.caption(i) for i in range(len(dataset))]
    tokenizer, tokens, token_mask = encode_captions(
        run.tokenizer or tokenizer, captions, text_encoder.config, device
    )
    vae = vae.to(device)
    model = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet}).to(device).train()
    ema, optimizers = EMA(model, config.ema), make_optimizers(model, config, args.precision)
    same = {"data": dataset.identity(), "autoencoder": digest(vae)}
    run.begin({"model": model, "ema": ema.model}, optimizers, same, tokenizer)
    economize(args, text_encoder, unet)

    with first_process_first():
        clips, fps, latents = encode_dataset(vae, dataset, device, run.out, args.precision)
    report_skipped(dataset, run.out)
    prompts, rate = (PROMPTS, FPS) if args.data == "shapes" else typical(captions, fps)
    pipeline = Pipeline(
        tokenizer, ema.model["text_encoder"], ema.model["unet"], vae, schedule, device
    )
    for step in run.steps():
        batch = draw_batch(args.seed, step, config, clips, fps, latents, schedule)
        set_learning_rate(optimizers, step, config)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        values = {}
        for share, part in parts(batch, args.grad_accum, device):
            with autocast(device, args.precision):
                loss = text_to_video_loss(model, schedule, tokens, token_mask, *part)
            (share * loss).backward()
            add(values, share, {"loss": loss.item()})
        values = sum_over_processes(model, values)
        values["grad"] = clip_grad_norm_(model.parameters(), config.grad_clip).item()
        run.check_finite(*values.values())
        for optimizer in optimizers.values():
            optimizer.step()
        ema.update(model, step)
        run.log(step, values)
        if run.due(step):
            draw_samples(pipeline, run.out / f"samples/step_{step + 1:06d}.gif", prompts, rate)
        run.save(step, lambda: save_pipeline(pipeline, run.out / "model.pt"))
    if process() == 0:
        print(f"python sample.py {shlex.quote(prompts[0])} --fps {rate:g} --checkpoint "
              f"{shlex.quote(str(run.out / 'model.pt'))}")


# ------------------------------------------------------------------------------ batches, losses


def generator(seed, step):
    """The source of all torch randomness of one step, on the CPU: the same on every device."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def add(sums, share, values):
    """Adds `share` times each of the values to the sum of the same name."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + share * value


def draw_frames(dataset, seed, count, step, per_video=2):
    """The frames of a step of stage 1: (count, 3, h, w) in [-1, 1]. Raises DataError where no video
    can be used."""
    frames, attempt, failures = [], 0, 0
    while len(frames) * per_video < count:
        # What is drawn must not depend on what failed, in this step or before it.
        rng = np.random.default_rng((seed, step, attempt))
        attempt += 1
        try:
            frames.append(dataset.random_frames(rng.integers(len(dataset)), rng, per_video))
            failures = 0
        except VideoError:  # another one instead
            failures += 1
            if failures > 10 * len(dataset) + 100:
                raise dataset.unusable()
    return to_model(np.concatenate(frames)[None, :count])[0].transpose(0, 1)


def make_vae_loss(args, config):
    """The preset's loss, and with --vgg the distance of VGG features. Raises UserError."""
    if not args.vgg:
        return VAELoss(config)
    try:
        return VAELoss(replace(config, vgg_weight=VGG_WEIGHT), args.vgg)
    except Exception as error:  # as many kinds as there are wrong files
        raise UserError(f"--vgg {args.vgg} cannot be read as torchvision's vgg16-397923af.pth"
                        ) from error


def psnr(x, x_hat):
    """Peak signal-to-noise ratio in dB of values in [-1, 1] (peak to peak 2)."""
    mse = (x.clamp(-1, 1) - x_hat.float().clamp(-1, 1)).square().mean()
    return (10 * torch.log10(4 / mse)).item()


@torch.no_grad()
def show_frames(run, step, vae, test, device):
    """PSNR of the held-out frames (b, 3, h, w) and a picture of some, above what became of them."""
    with autocast(device, run.args.precision):
        x_hat = torch.cat([vae.decode(vae.encode(x.to(device)).mean).cpu() for x in test.split(64)])
    run.record_line(step, held_out_psnr=psnr(test, x_hat))
    say(f"held-out frames: {psnr(test, x_hat):.2f} dB PSNR")
    pairs = torch.cat([test[:8], x_hat[:8]]).transpose(0, 1)[None]
    sheet = contact_sheet(to_uint8(pairs)[0], columns=8)
    write_video(run.out / f"samples/vae_{step + 1:06d}.png", sheet[None])


@torch.no_grad()
def measure_latents(vae, dataset, device, precision, videos=256):
    """Store the mean and standard deviation of the training set's latents in the VAE."""
    vae.eval()
    # From all over the data set: the videos of a folder are in order.
    indices = np.linspace(0, len(dataset) - 1, min(videos, len(dataset))).astype(int).tolist()
    z = []
    for _, sample in read_ahead(dataset, indices):
        if sample is not None:
            with autocast(device, precision):
                frames = to_model(sample.video[None])[0].transpose(0, 1)
                z.append(vae.encode(frames.to(device)).mean.cpu())
    vae.set_latent_statistics(rearrange(torch.stack(z), "b f c h w -> b c f h w"))


def beginning(step, config):
    """How much of the easy start is left: falls from 1 to 0 in the first `easy_start` steps.

    Training begins with one question: here is the first frame, there is a sentence, all else is
    noise; what happens? Then the words are all there is to go by. Drawn from all timesteps alike,
    most clips show their motion through the noise, and the words for it were still unread after
    thousands of steps. So as long as it lasts, the first frame is given in this share of clips, and
    the timesteps are the noisiest ones: the last 5% at first, all of them at the end.
    """
    return max(0.0, 1 - step / config.easy_start) if config.easy_start else 0.0


def frame_stride(step, config):
    """N, where a step learns from every N-th frame of its clips. What words mean shows in four
    frames of an action as well as in sixteen, and in a quarter of the time. Such clips have a lower
    frame rate, as any clip of a longer action has."""
    return next((n for share, n in config.strides if step < share * config.steps), 1)


def draw_batch(seed, step, config, clips, fps, latents, schedule):
    """The batch of a step of stage 2, and all that is random in it.

    clips: int64 (n,), the numbers of the clips whose frame rates (n,) and latents (n, c, f, h, w)
    follow. Returns rows of the captions (b,), -1 where it is dropped; frame rates (b,); clean
    latents (b, c, f, h, w); given_mask (b, f); timesteps (b,); noise like the latents; and which
    clips are single pictures (b,).
    """
    stride = frame_stride(step, config)
    fps, latents = fps / stride, latents[:, :, ::stride]
    rng, source = np.random.default_rng((seed, step)), generator(seed, step)
    index = rng.integers(len(latents), size=config.batch_size)
    dropped = rng.random(config.batch_size) < config.caption_dropout
    rows = torch.where(torch.from_numpy(dropped), -1, clips[index])
    given_mask = draw_given_frames(rng, len(index), latents.shape[2], config.text_only)
    easy = beginning(step, config)
    given_mask[rng.random(len(index)) < easy] = torch.arange(latents.shape[2]) == 0
    # Joint training (Ho 2022, section 3.1): frames that see no other one, nor is any given.
    images = torch.from_numpy(rng.random(len(index)) < config.image_fraction)
    given_mask[images] = False
    noise = torch.randn((len(index), *latents.shape[1:]), generator=source)
    # One timestep from each of b equal intervals: a quieter gradient (Kingma 2021, appendix I.1).
    u = (torch.rand(1, generator=source) + torch.arange(len(index)) / len(index)) % 1
    u = 1 - (1 - u) * (1 - 0.95 * easy)  # may round to 1
    t = (u * schedule.config.timesteps).long().clamp(max=schedule.config.timesteps - 1)
    return rows, fps[index], latents[index].float(), given_mask, t, noise, images


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


def text_to_video_loss(
    model, schedule, tokens, token_mask, rows, fps, x_start, given_mask, t, noise, images
):
    """The loss of a part of a batch, a scalar; tokens and their mask are of all captions, the rest
    is as from `draw_batch`."""
    tokens, token_mask = tokens[rows], token_mask[rows]  # always as long: compiled once
    context = model["text_encoder"](tokens, token_mask)

    def denoise(x_t, t):
        return model["unet"](x_t, t, context, token_mask, fps, x_start, given_mask, images)

    return diffusion_loss(denoise, schedule, x_start, t, noise, keep=~given_mask)


def encode_captions(tokenizer, captions, config, device):
    """Tokens and mask of all captions; the last row is the null one. The tokenizer, or a new one
    where it is None, learns all words. Returns (tokenizer, tokens, token_mask). Raises UserError.
    """
    tokenizer = tokenizer or Tokenizer.train(captions, config.vocab_size)
    tokenizer.add_words(captions)
    try:
        return tokenizer, *tokenizer.batch(captions + [""], config.context_length, device)
    except ValueError as error:
        raise UserError(f"one of the captions is too long: {error}") from error


def typical(captions, fps, count=4):
    """A few different captions from all over the data set, and the middle frame rate."""
    captions = sorted(set(captions))
    picked = np.linspace(0, len(captions) - 1, min(count, len(captions))).astype(int)
    return [captions[i] for i in picked], max(round(fps.median().item(), 1), 0.1)


def save_pipeline(pipeline, path):
    """model.pt: weights in half precision, which halves the file and changes nothing visible."""
    packed = pipeline.pack()
    for part in packed.values():
        if "state" in part:
            part["state"] = {k: v.half() for k, v in part["state"].items()}
    save_atomically(packed, path)


def draw_samples(pipeline, path, prompts, fps):
    """The fixed prompts with fixed seeds, side by side."""
    videos = pipeline.generate(list(prompts), fps=fps)
    write_video(path, rearrange(videos, "b f h w c -> f h (b w) c"), fps, upscale=2)


# ------------------------------------------------------------------------------ models, data


def build_vae(args, preset):
    """The autoencoder of --init, or a new one."""
    if args.init:
        return unpack(AutoencoderKL, VAEConfig, load_checkpoint(args.init, "vae")["vae"])
    return AutoencoderKL(preset.vae)


def build_models(args, preset):
    """(tokenizer or None, text encoder, unet, schedule, vae): all of --init, or a new model for a
    trained VAE."""
    path = Path(args.init or Path(args.out) / "vae.pt")
    if not path.is_file() and not args.init:
        raise UserError(f"no {path}: train it first with `{next_command('vae', args)}`, or name a "
                        "trained one with --init")
    weights = load_checkpoint(path, "vae")
    vae = unpack(AutoencoderKL, VAEConfig, weights["vae"])
    if "unet" in weights:
        whole = load_pipeline(path)
        return whole.tokenizer, whole.text_encoder, whole.unet, whole.schedule, vae
    schedule = NoiseSchedule(preset.diffusion)
    return None, TextEncoder(preset.text), UNet3D(preset.unet), schedule, vae


def adopt(args, preset, **configs):
    """The preset with the configs of the models that training starts from; a line says where they
    differ from its own. Raises UserError where the parts do not fit together."""
    for part, config in configs.items():
        for name, value in vars(config).items():
            own = getattr(getattr(preset, part), name)
            if value != own:
                say(f"{part}.{name} is {value}, as in the trained weights, not {own}")
    preset = replace(preset, **configs)
    size = preset.unet.latent_size * preset.vae.factor
    if size != preset.size or preset.unet.channels != preset.vae.latent_channels:
        raise UserError(f"the VAE does not fit --preset {args.preset} of {preset.size} pixels")
    return preset


def digest(model, *more):
    """A text that tells the weights of a model, and more that has a repr, from any others."""
    weights = hashlib.sha256(repr(more).encode())
    for value in model.state_dict().values():
        weights.update(value.numpy(force=True).tobytes())
    return weights.hexdigest()


def open_dataset(args, config, size):
    """What --data names: `MovingShapes` or a `VideoFolder`. Raises UserError, DataError."""
    clips = {name: getattr(args, name) for name in CLIP_OPTIONS}
    if args.data == "shapes":
        if options(**clips):
            raise UserError(f"{options(**clips)} is for --data FOLDER, a folder of videos")
        return MovingShapes(config.videos, seed=args.seed, size=size)
    if args.videos is not None:
        raise UserError("--videos is for --data shapes; a folder has as many as there are in it")
    if Path(args.out).resolve().is_relative_to(Path(args.data).resolve()):
        raise UserError(f"--out {args.out} lies inside --data {args.data}: its sample videos would "
                        "be taken for data")
    dataset = VideoFolder(args.data, seed=args.seed, size=size, **clips)
    say(f"{args.data}: {len(dataset)} videos, captions from {dataset.source}, for example "
        f'"{dataset.caption(0)}"')
    return dataset


def open_frames(args, config, size):
    """The data set of stage 1, its identity, and frames (256, 3, h, w) held out of it."""
    dataset = open_dataset(args, config, size)
    identity = dataset.identity()
    if args.data == "shapes":
        held_out = MovingShapes(128, "heldout", seed=args.seed, size=size)
    else:
        dataset, held_out = dataset.divide()
    try:
        return dataset, identity, draw_frames(held_out, 0, 256, 0)
    except DataError:  # the few held-out videos of a small folder cannot be used
        return dataset, identity, draw_frames(dataset, 0, 256, 0)


def report_skipped(dataset, out):
    """List the videos that cannot be used in skipped.txt, each once, with the reason."""
    path, skipped = out / "skipped.txt", sorted(dataset.skipped.items())
    if process() > 0:
        return
    if not skipped:
        path.unlink(missing_ok=True)  # of an earlier run
        return
    text = "".join(f"{name}: {why}\n" for name, why in skipped).encode("utf-8", "backslashreplace")
    if not path.is_file() or path.read_bytes() != text:
        with atomic_path(path) as temporary:
            temporary.write_bytes(text)
        say(f"skipped {len(skipped)} videos: {path} says why")


@torch.no_grad()
def encode_dataset(vae, dataset, device, out, precision=None):
    """Numbers (n,), frame rates (n,) and latents float16 (n, c, f, h, w) of every usable clip.

    Each clip is encoded once, into `latents.bin` in the folder `out`. The file is mapped into
    memory, not loaded, so that it may be larger than that. `latents.json` says which clips are in
    it. The next start tries the others (again), or all if anything has changed that the latents
    depend on.
    """
    file, contents = out / "latents.bin", out / "latents.json"
    side = dataset.size // vae.config.factor
    shape = (vae.config.latent_channels, dataset.frames, side, side)
    key = digest(vae, dataset.identity(), precision)
    state = read_contents(contents, key, len(dataset))
    size = 2 * math.prod(shape) * len(state["clips"])  # in bytes
    if not state["clips"] or not file.is_file() or file.stat().st_size < size:
        contents.unlink(missing_ok=True)  # first: it must never speak of another file
        file.write_bytes(b"")
        state, size = {"key": key, "clips": [], "fps": []}, 0
    known = set(state["clips"])
    todo = [i for i in range(len(dataset)) if i not in known] if process() == 0 else []
    with file.open("rb+") as latents:
        latents.seek(size)
        clips = read_ahead(dataset, todo)
        for n, (i, sample) in enumerate(progress(clips, "encoding", len(known), len(dataset)), 1):
            if sample is not None:
                with autocast(device, precision):
                    z = vae.encode_video(to_model(sample.video[None]).to(device))
                latents.write(z.half().cpu().numpy().tobytes())
                state["clips"].append(i)
                state["fps"].append(float(sample.fps))
            if n % 100 == 0 or n == len(todo):
                latents.flush()
                os.fsync(latents.fileno())  # what is called done must be on the disk
                with atomic_path(contents) as path:
                    path.write_text(json.dumps(state))
    shape = (len(state["clips"]), *shape)
    latents = np.memmap(file, np.float16, mode="c", shape=shape)  # "c": the file stays as it is
    return torch.tensor(state["clips"]), torch.tensor(state["fps"]), torch.from_numpy(latents)


def read_contents(path, key, length):
    """What latents.json says: numbers of the encoded clips below `length` and their frame rates. No
    clips where it is damaged or has another key."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        state = json.loads(path.read_bytes())
        clips, fps = state["clips"], state["fps"]
        whole = len(set(clips)) == len(clips) == len(fps) and state["key"] == key
        if whole and all(type(i) is int and 0 <= i < length for i in clips) and all(
            type(rate) is float and 0 < rate < math.inf for rate in fps
        ):
            return {"key": key, "clips": clips, "fps": fps}
    return {"clips": []}


# ------------------------------------------------------------------------------ optimizer


def orthogonalize(g: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices to those in g (k, m, n), roughly: singular values
    pulled to about 1. dtype: the number format of the products.

    Newton-Schulz iteration of Jordan 2024 (Muon): x <- (a + b x x' + c (x x')^2) x.
    """
    # It converges for singular values up to 1.
    x = (g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    x = x.mT if x.shape[1] > x.shape[2] else x  # x x' is the smaller one then
    for _ in range(steps):
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return (x if x.shape == g.shape else x.mT).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan 2024): for the hidden layers' matrices and convolutions.

    An ordinary update is dominated by a few directions; this one moves along all of them equally.
    Scaled as in Liu 2025 (arXiv 2502.16982, eq. 4) so that AdamW's learning rate and weight decay
    fit. dtype: see `orthogonalize`.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            stacks = defaultdict(list)  # matrices of one shape go together: large products are fast
            for p in group["params"]:
                if p.grad is not None:
                    stacks[tuple(sorted((len(p), p[0].numel())))].append(p)
            for (_, long), params in stacks.items():
                for p in params:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p.grad)
                grads = [p.grad for p in params]
                averages = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
                # Nesterov's look ahead
                updates = torch._foreach_lerp(grads, averages, group["momentum"])
                updates = [u.flatten(1) for u in updates]
                stack = torch.stack([u if u.shape[1] == long else u.T for u in updates])
                stack = orthogonalize(stack, self.dtype)
                updates = [x if len(x) == len(p) else x.T for x, p in zip(stack, params)]
                updates = [u.reshape(p.shape) for u, p in zip(updates, params)]
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates, alpha=-0.2 * group["lr"] * long**0.5)


def make_optimizers(
    model: nn.Module, config: "TrainConfig", precision: str | None = None
) -> dict[str, torch.optim.Optimizer]:
    """The optimizers of a model by name: "adamw", and where the config says so "muon" for the
    matrices and convolutions between the first and the last layer. precision: as for `autocast`."""
    hidden, outer, vectors = [], [], []
    for name, p in model.named_parameters():
        ends = any(part in name for part in ("embed", "conv_in", "conv_out"))
        (vectors if p.ndim < 2 else outer if ends else hidden).append(p)
    optimizers = {}
    if config.optimizer == "muon":
        device = hidden[0].device
        dtype = product_dtype(device, precision)
        if device.type == "cuda" and dtype == torch.bfloat16:
            dtype = torch.float16  # three more bits, and no value comes near 2
        optimizers["muon"] = Muon(hidden, config.lr, weight_decay=config.weight_decay, dtype=dtype)
        hidden = []
    # No weight decay for gains and biases: pulling a norm's gain to 0 is no prior.
    groups = [
        {"params": hidden + outer, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.99), fused=True)
    return optimizers | {"adamw": adamw}


def learning_rate(step, config):
    """Linear warm-up, constant, then a linear fall to zero over the last `decay` of the steps."""
    rise = (step + 1) / config.warmup if config.warmup else 1
    fall = (config.steps - step) / (config.decay * config.steps) if config.decay else 1
    return config.lr * min(1, rise, fall)


def set_learning_rate(optimizers, step, config):
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)


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


def economize(args, *modules):
    """--grad-checkpoint and --compile, which change neither the weights nor their names."""
    torch.backends.cudnn.benchmark = True  # of training: the shapes of all steps are the same
    for module in modules:
        for block in module.modules():
            if args.grad_checkpoint and isinstance(block, (SpaceTimeBlock, ResBlock)):
                # Chen 2016 (arXiv 1604.06174): keep what goes into a block, not what is inside.
                block.forward = functools.partial(
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )
        if args.compile:
            module.compile()


# ------------------------------------------------------------------------------ a run


class Run:
    """The log and the checkpoints of a stage, and how it goes on from them.

    `last.pt` holds all that a step depends on, and is written after the log and the pictures of its
    step and after the stage's result. So wherever a run is killed, what lies on the disk is at
    least as new as `last.pt`, and --resume makes the steps since then again, bit for bit.

    preset: what to train with; tokenizer: of the run that goes on, or None.
    """

    def __init__(self, args, preset):
        self.args, self.out, self.stage, self.preset = args, Path(args.out), args.stage, preset
        self.config = getattr(preset, f"{args.stage}_training")
        self.start, self.logged, self.sums = 0, 0, {}  # the last logged step, all values since
        self.signalled = self.stopping = False  # by Ctrl-C: in this process, in all
        self.state = self.tokenizer = self.writer = None
        # What must be the same when a run goes on; the rest (steps, learning rate) may change.
        names = ("preset", "seed", *CLIP_OPTIONS)
        self.settings = {name: getattr(args, name) for name in names} | {"vgg": bool(args.vgg)}
        self._find()

    def _find(self):
        """Finds last.pt for --resume, or makes sure that nothing of an earlier run is overwritten.
        """
        last = self.out / "last.pt"
        state = load_checkpoint(last, *STATE) if last.is_file() else {"stage": None}
        if state["stage"] == self.stage and not self.args.resume:
            raise UserError(f"{last} is a {self.stage} run: add --resume, or choose another --out")
        if state["stage"] == "diffusion" != self.stage:  # a new VAE would make its UNet worthless
            raise UserError(f"{last} is a diffusion run: choose another --out")
        if self.args.resume and not (self.out / "config.json").is_file():
            raise UserError(f"there is no {self.stage} run in {self.out} to resume")
        if state["stage"] != self.stage:
            return
        for name, value in state["settings"].items():
            if value != self.settings[name]:
                was = options(**{name: value}) or f"no --{name.replace('_', '-')}"
                raise UserError(f"{last} was started with {was}: use the same")
        self.state, self.start, self.sums = state, state["step"], state["sums"]
        self.logged = state["logged"]
        if state["tokenizer"] is not None:
            self.tokenizer = Tokenizer.from_state_dict(state["tokenizer"])

    def begin(self, models, optimizers, same, tokenizer=None):
        """Everything as it was when last.pt was written, and a folder ready for what comes.

        models, optimizers: dicts; same: digests of what must not change, by name."""
        self.models, self.optimizers, self.same = models, optimizers, same
        self.kept = {"tokenizer": tokenizer and tokenizer.state_dict()}
        if self.state is not None:
            self._restore(self.state, self.out / "last.pt")
        self.state = None
        if process() > 0:
            return
        if self.args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = self.out / "tensorboard" / self.stage
            self.writer = SummaryWriter(folder, purge_step=self.start + 1)
        try:
            (self.out / "samples").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.out}: {error.strerror}") from error
        for path in self.out.rglob(".[0-9]*-*"):  # left by a process that was killed while writing
            path.unlink()
        self._rewind_log()
        record = {"arguments": vars(self.args), "preset": asdict(self.preset)}
        with atomic_path(self.out / "config.json") as path:
            path.write_text(json.dumps(record, indent=2) + "\n")

    def _restore(self, state, last):
        for name, value in self.same.items():
            if state["same"].get(name) != value:
                raise UserError(f"{last} was trained with other {name}: use the same")
        try:
            for name, model in self.models.items():
                model.load_state_dict(state["models"][name])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{last} does not fit the preset as it is now: restore its settings, "
                            "or choose another --out") from error

    def _rewind_log(self):
        """Drop log lines of this stage from after the checkpoint: those steps come again."""
        path = self.out / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        # A kill or a full disk may have cut the last line short.
        lines = [json.loads(line) for line in lines if line.endswith("\n")]
        lines = [r for r in lines if r["stage"] != self.stage or r["step"] <= self.start]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def steps(self):
        """The remaining step numbers, behind a progress bar.

        Ctrl-C lets the step come to its end and be saved, and is raised then. So does SIGTERM,
        with which torchrun and job schedulers end a process. A second one ends it at once.
        """
        handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

        def note(name, frame):
            self.signalled = True
            if processes() == 1:  # torchrun passes signals on, so that each comes twice
                signal.signal(name, handlers[name])

        for name in handlers:
            signal.signal(name, note)
        self.clock = self.saved = time.monotonic()
        try:
            remaining = range(self.start, self.config.steps)
            for step in progress(remaining, self.stage, self.start, self.config.steps):
                yield step
                if self.stopping:
                    say("stopped; the same command with --resume goes on from there")
                    raise KeyboardInterrupt
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)

    def check_finite(self, *values):
        """Raises UserError unless all of these numbers are finite."""
        if not math.isfinite(sum(values)):
            last, other = self.out / "last.pt", "a lower --lr"
            if self.args.precision != "fp32":
                other += " or --precision fp32"
            start = f"go on from {last} with --resume and" if last.is_file() else "start again with"
            raise UserError(f"the loss is not finite any more: {start} {other}")

    def log(self, step, values):
        """Every `log_every` steps, the means since the last time: an aligned line on stderr and a
        JSON object in log.jsonl."""
        self.stopping = in_any_process(self.signalled)
        add(self.sums, 1, values)
        done = step + 1
        if done % self.config.log_every and done != self.config.steps:
            return
        means = {name: total / (done - self.logged) for name, total in self.sums.items()}
        seconds = max(time.monotonic() - self.clock, 1e-9) / (done - max(self.logged, self.start))
        self.clock, self.logged, self.sums = time.monotonic(), done, {}
        lr, speed = learning_rate(step, self.config), self.config.batch_size / seconds
        minutes = (self.config.steps - done) * seconds / 60
        text = "  ".join(f"{name} {value:7.4f}" for name, value in means.items())
        say(f"step {done:6d}  {text}  lr {lr:.1e}  {speed:6.1f}/s  {memory_gib():4.1f} GiB  "
            f"{minutes:5.1f} min left")
        self.record_line(step, **means, lr=lr, per_second=speed)

    def record_line(self, step, **values):
        """Append one JSON object to log.jsonl; with --tensorboard, show the values there too."""
        if process() > 0:
            return
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps({"stage": self.stage, "step": step + 1, **values}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step + 1)
            self.writer.flush()

    def due(self, step):
        """Is it time for sample pictures and a checkpoint after this step?"""
        last = step + 1 == self.config.steps
        return process() == 0 and (last or (step + 1) % self.config.save_every == 0)

    def save(self, step, write_result=None):
        """Where it is due, or ten minutes have passed, or Ctrl-C was pressed: write last.pt, the
        whole training state. Before that call `write_result()`, for the file that a finished stage
        leaves."""
        late = time.monotonic() - self.saved > SAVE_SECONDS
        if process() > 0 or not (self.due(step) or late or self.stopping):
            return
        weights = [v.float().sum() for m in self.models.values() for v in m.state_dict().values()]
        self.check_finite(torch.stack(weights).sum().item())  # or nothing good would be kept
        if write_result is not None:
            write_result()
        state = {
            "stage": self.stage,
            "settings": self.settings,
            "same": self.same,
            "preset": asdict(self.preset),
            **self.kept,
            "step": step + 1,
            "logged": self.logged,
            "sums": self.sums,
            "models": {name: model.state_dict() for name, model in self.models.items()},
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
        }
        save_atomically(state, self.out / "last.pt")
        self.saved = time.monotonic()


SAVE_SECONDS = 600  # between two checkpoints at most
STATE = ("stage", "settings", "same", "tokenizer", "step", "logged", "sums", "models", "optimizers")


# ------------------------------------------------------------------------------ several GPUs
# torchrun starts a process for each GPU. All do the same, each with its share of every batch, and
# the first one alone writes files and messages. Without torchrun there is only the first one.


def join_processes(device):
    """Under torchrun: meet the other processes, and take one GPU each."""
    if "LOCAL_RANK" in os.environ:  # set by torchrun
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The others wait for as long as the first one encodes the data set.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))


def processes():
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process():
    """The number of this one; 0 is the first."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def first_process_first():
    """The others do what is inside when the first one is through, with what it left on the disk."""
    if process() > 0:
        dist.barrier()
    yield
    if process() == 0 and processes() > 1:
        dist.barrier()


def parts(batch, count, device):
    """This process's parts of a batch of tensors (b, ...), which is the same in every process, as
    pairs: the share of the batch that a part is, and its tensors. `count` parts in each process go
    one after the other, for --grad-accum."""
    pieces = (x.tensor_split(count * processes())[process() :: processes()] for x in batch)
    for part in zip(*pieces):
        yield len(part[0]) / len(batch[0]), [x.to(device) for x in part]


def sum_over_processes(model, values):
    """Adds up what the processes found, each in its share of the batch: the gradients of the model,
    where they are, and a dict of floats, which is returned."""
    if processes() == 1:
        return values
    parameters = list(model.parameters())
    for p in parameters:  # a process whose share does not need it has none
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    gradients = [p.grad for p in parameters]
    numbers = torch.tensor(list(values.values()), device=gradients[0].device)
    flat = torch.cat([x.flatten() for x in (*gradients, numbers)])
    dist.all_reduce(flat)
    *sums, numbers = flat.split([x.numel() for x in (*gradients, numbers)])
    for gradient, total in zip(gradients, sums):
        gradient.copy_(total.view(gradient.shape))
    return dict(zip(values, numbers.tolist()))


def in_any_process(flag):
    """Is the flag set in this process or another?"""
    if processes() == 1:
        return flag
    flag = torch.tensor(float(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag)
    return flag.item() > 0


# ------------------------------------------------------------------------------ messages


def progress(remaining, title, done, total):
    """A progress bar around the remaining items."""
    interval = 0.5 if sys.stderr.isatty() else 60  # seconds; few lines when stderr is a file
    return tqdm(
        remaining, title, initial=done, total=total, mininterval=interval, disable=process() > 0
    )


def say(text):
    """A line on stderr, above a progress bar if there is one."""
    if process() == 0:
        tqdm.write(text, file=sys.stderr)


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


# ------------------------------------------------------------------------------ presets


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
    image_fraction: float = 0.0  # share of clips whose frames are learnt as single pictures
    easy_start: int = 0  # steps of easier questions at first, see `beginning`
    strides: tuple = ()  # (share of the steps, N): until then, every N-th frame; see `frame_stride`
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
        # Mostly the squared error: the L1 term is soon about a background that is right already.
        vae_loss=VAELossConfig(l1_weight=0.25, mse_weight=4.0),
        vae_training=TrainConfig(steps=1300, batch_size=32, lr=2e-3, optimizer="muon"),
        text=TextEncoderConfig(),
        unet=UNet3DConfig(attention=(True, True)),
        diffusion=DiffusionConfig(shift=3.0),
        diffusion_training=TrainConfig(
            steps=4800, batch_size=16, lr=1e-3, decay=0.65, optimizer="muon", easy_start=1100,
            strides=((0.45, 4), (0.75, 2)), videos=12_000,
        ),
    ),
    "ucf101": Preset(
        size=128,
        vae=UCF101_VAE,
        vae_loss=UCF101_VAE_LOSS,
        vae_training=TrainConfig(steps=50_000, batch_size=32, lr=2e-4),
        text=TextEncoderConfig(vocab_size=2048, width=256, depth=4),
        unet=UNet3DConfig(  # 56 M parameters, most of them where the maps are small
            latent_size=16, widths=(96, 192, 512), blocks=(2, 2, 4), attention=(False, True, True),
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
        unet=UNet3DConfig(  # 145 M parameters
            latent_size=32, widths=(128, 256, 768), blocks=(2, 2, 5), attention=(False, True, True),
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


# ------------------------------------------------------------------------------ command line


def options(**values):
    """The command-line options that set these values; none for what is not set."""
    words = []
    for name, value in values.items():
        if value is not None and value is not False:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [shlex.quote(str(value))]
    return " ".join(words)


def next_command(stage, args):
    """The command line that runs a stage with the same data, preset and folder."""
    same = {name: getattr(args, name) for name in ("data", *CLIP_OPTIONS, "preset", "out")}
    return f"python train.py {stage} {options(**same)}"


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae", "diffusion"], help="which half to train")
    parser.add_argument(
        "--data", default="shapes", metavar="shapes|FOLDER", type=os.path.normpath,
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
    parser.add_argument("--resume", action="store_true", help="go on where the run stopped")
    parser.add_argument(
        "--tensorboard", action="store_true",
        help="also write the log for TensorBoard, if that package is installed",
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
    group.add_argument(
        "--ema", type=number(float, 0, 1), metavar="DECAY",
        help="decay of the averaged weights that are sampled from; 0 takes the last ones",
    )
    group.add_argument(
        "--easy-start", type=number(int, 0, 10**9), metavar="STEPS",
        help="easier questions in the first steps; 0 to refine a trained model",
    )
    group.add_argument(
        "--image-fraction", type=number(float, 0, 1), metavar="P",
        help="learn from the frames of this share of clips as single pictures with the caption",
    )
    add_memory_options(parser.add_argument_group("memory and speed"))
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="(%(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    return parser.parse_args(argv)


def add_memory_options(group):
    """The options that trade memory and time, and leave what is learned as it is."""
    group.add_argument(
        "--grad-accum", type=number(int, 1, 10**6), default=1, metavar="N",
        help="go through each batch in N parts and add up their gradients: the same result in less "
             "memory (%(default)s)",
    )
    group.add_argument(
        "--grad-checkpoint", action="store_true",
        help="compute what is inside a block again on the way back, instead of keeping it: the "
             "same gradients in less memory and more time",
    )
    group.add_argument(
        "--precision", choices=["bf16", "fp32"],
        help="number format of matrix products in training (bf16 where the hardware has them)",
    )
    group.add_argument(
        "--compile", action="store_true", help="translate the model with torch.compile (CUDA)"
    )


def configure(args):
    """The preset with the command line's values in place of its own. In a shorter or longer run the
    discriminator joins in after the same share of the steps."""
    preset = PRESETS[args.preset]
    field = f"{args.stage}_training"
    names = ("steps", "batch_size", "lr", "videos", "ema", "easy_start", "image_fraction")
    values = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.stage == "vae" and args.steps is not None:
        start = preset.vae_loss.gan_start * args.steps // preset.vae_training.steps
        preset = replace(preset, vae_loss=replace(preset.vae_loss, gan_start=start))
    return replace(preset, **{field: replace(getattr(preset, field), **values)})


def check(args, batch_size, device):
    """Raises UserError where options do not fit together, or to this machine."""
    if args.vgg and args.stage != "vae":
        raise UserError("--vgg is for the autoencoder: python train.py vae")
    for name in ("ema", "easy_start", "image_fraction"):
        if getattr(args, name) is not None and args.stage != "diffusion":
            raise UserError(f"--{name.replace('_', '-')} is for python train.py diffusion")
    if args.compile and device.type != "cuda":
        raise UserError("--compile is for CUDA GPUs: leave it out")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs that package: pip install tensorboard")
    if args.grad_accum * processes() > batch_size:
        raise UserError(f"a batch of {batch_size} cannot be divided into "
                        f"{args.grad_accum * processes()} parts: choose a larger --batch-size")
    if processes() > 1 and args.stage == "vae":
        raise UserError("the autoencoder trains in one process: leave out torchrun")


def memory_advice(args):
    """What helps against a full memory, of what is not in use yet."""
    advice = [f"--grad-accum {2 * args.grad_accum} (the same result, in more parts)"]
    advice += [] if args.grad_checkpoint else ["--grad-checkpoint"]
    advice += [] if args.precision == "bf16" else ["--precision bf16"]
    return f"{', '.join(advice)} or a smaller --batch-size"


def main():
    args = parse_args()
    device = pick_device(args.device, args.precision)
    join_processes(device)
    preset = configure(args)
    check(args, getattr(preset, f"{args.stage}_training").batch_size, device)
    stage = {"vae": train_vae, "diffusion": train_diffusion}[args.stage]
    try:
        stage(args, preset, device)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"the memory is full: try {memory_advice(args)}") from error


if __name__ == "__main__":
    run_command(main)
