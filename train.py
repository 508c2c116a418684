"""Train the two halves of the text-to-video model, one after the other.

    python train.py vae       --data shapes --out runs/shapes    # frames <-> latents
    python train.py diffusion --data shapes --out runs/shapes    # words -> latents, over time

--data also takes a folder of videos; `data.find_captions` says how it finds their captions.

A run folder holds `config.json`, `log.jsonl` (one JSON object per logged step), `vae.pt`, `last.pt`
(the whole training state, for --resume), `model.pt` (self-contained: what sample.py takes),
`latents.bin` and `latents.json` (the encoded data set; `held_out.*` of what is not trained on),
`skipped.txt` (unusable videos) and `samples/`: drawn clips beside real ones, and `loss.png`.

In log.jsonl, `loss_1` to `loss_4` are the losses at the timesteps of the first to the last quarter,
from little noise to much; `held_out_loss` and so on are those of clips that are not trained on.

Every random draw of step n comes from a generator seeded by (seed, n). So a resumed run sees the
very batches, noise and masks that an uninterrupted one would have seen, and no random state needs
saving. Killed at any moment and resumed, on the same CPU, a run ends with the same bits.

Letters used here: `b` batch, `c` channels, `f` frames, `h w` height and width, `t` timestep.
"""

from tools import DEVICES, Parser, UserError, accumulate, atomic_path, autocast, digest
from tools import first_process_first, fits, frame_size, join_processes, load_checkpoint, locked
from tools import no_weights, noted_signals, number, pack, parts, pick_device, printable, process
from tools import processes, product_dtype, progress, read, read_log, restore, run_command
from tools import save_atomically, say, set_fields, sum_over_processes, unpack

import argparse
import contextlib
import copy
import functools
import json
import math
import os
import re
import shlex
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from data import FRAMES, DataError, VideoError, VideoFolder, chart, contact_sheet, different
from data import evenly, prefetch, read_ahead, sides, to_model, to_uint8, write_picture, write_video
from diffusion import DiffusionConfig, NoiseSchedule, diffusion_loss
from sample import STEPS, Pipeline, captioned_grid, load_autoencoder, load_pipeline
from sample import read_prompts
from shapes import MovingShapes
from text_encoder import TextEncoder, TextEncoderConfig, Tokenizer, normalize
from unet3d import SpaceTimeBlock, UNet3D, UNet3DConfig
from vae import AutoencoderKL, ResBlock, VAEConfig, VAELoss, VAELossConfig

# ------------------------------------------------------------------------------ stage 1: frames


def train_vae(
    args: argparse.Namespace, preset: "Preset", device: torch.device, state: dict | None = None
) -> None:
    """Stage 1: train the autoencoder on single frames; writes vae.pt. state: see `find_state`."""
    torch.manual_seed(args.seed)  # of the initial weights
    dataset, test, identity = open_dataset(args, preset)
    if args.init:
        vae = load_autoencoder(args.init)
    else:
        vae = AutoencoderKL(preset.vae)
    vae = vae.to(device).train()
    preset = adopt(args, preset, vae)
    run = Run(args, preset, state, {"data": identity})
    test = held_out_frames(test, dataset)
    config, vae_loss = run.config, make_vae_loss(args, preset.vae_loss).to(device)
    models, optimizers = {"vae": vae}, make_optimizers(vae, config, args.precision)
    if vae_loss.discriminator is not None:
        models["discriminator"] = vae_loss.discriminator
        optimizers["discriminator"] = make_adversary_optimizer(vae_loss.discriminator, config)
    run.begin(models, optimizers)
    economize(args, vae.encoder, vae.decoder)

    shape = (config.batch_size, *vae.config.latent_shape(*sides(preset.size)))

    def draw(step):
        frames = torch.from_numpy(draw_frames(dataset, args.seed, config.batch_size, step))
        return pinned((frames, torch.randn(shape, generator=generator(args.seed, step))), device)

    for step, batch in zip(run.steps(), prefetch(draw, range(run.start, config.steps))):
        set_learning_rate(optimizers, step, config)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        values = {}
        for share, (frames, eps) in parts(batch, args.grad_accum, device):
            x = pictures(frames)
            with autocast(device, args.precision):
                posterior = vae.encode(x)
                x_hat = vae.decode(posterior.sample(eps))
                loss, terms = vae_loss.generator_loss(x, x_hat, posterior, vae.last_layer, step)
            (share * loss).backward()
            terms = {"loss": loss, **terms, "psnr": psnr(x, x_hat)}
            if vae_loss.discriminator is not None:
                with autocast(device, args.precision):
                    loss = vae_loss.discriminator_loss(x, x_hat)
                (share * loss).backward()
                terms["discriminator"] = loss
            accumulate(values, share, terms)
        values["grad"] = clip_grad_norm_(vae.parameters(), config.grad_clip)
        values = read(values)
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


def train_diffusion(
    args: argparse.Namespace, preset: "Preset", device: torch.device, state: dict | None = None
) -> None:
    """Stage 2: train text encoder and UNet on the autoencoder's latents; writes model.pt."""
    torch.manual_seed(args.seed)  # of the initial weights
    vae, whole = load_models(args)
    preset = adopt(args, preset, vae, whole)
    dataset, held_out, identity = open_dataset(args, preset)
    (captions, wordings), (others, _) = list_captions(dataset), list_captions(held_out)
    tokenizer, preset = find_tokenizer(state, whole, captions, preset)
    run = Run(args, preset, state, {"data": identity, "autoencoder": digest("", vae)})
    config = run.config
    captions, *encoded = encode_captions(tokenizer, captions, preset.text, device, others)
    prompts = [tokenizer.cut(prompt, preset.text.context_length)
               for prompt in args.prompts or different(captions, 4)]
    text_encoder, unet, schedule = build_models(whole, preset)
    vae = vae.to(device)
    model = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet}).to(device).train()
    ema, optimizers = EMA(model, config.ema), make_optimizers(model, config, args.precision)
    run.begin({"model": model, "ema": ema.model}, optimizers, tokenizer)
    economize(args, text_encoder, unet)
    with first_process_first():
        clips, fps, latents = encode_dataset(vae, dataset, device, run.out, args.precision)
    measured = draw_held_out(run, vae, held_out, device, len(captions), schedule)
    report_skipped(dataset, run.out)
    about = describe_data(dataset, captions, fps)
    pipeline = Pipeline(tokenizer, *ema.model.values(), vae, schedule, device, about)
    pipeline.precision = args.precision
    real, rates = real_clips(dataset, captions, wordings, clips.tolist(), fps, prompts)

    def draw(step):
        rows, *rest = draw_batch(args.seed, step, config, clips, fps, latents, schedule)
        return pinned([reword(args.seed, step, rows, wordings), *rest], device)

    for step, batch in zip(run.steps(), prefetch(draw, range(run.start, config.steps), workers=1)):
        set_learning_rate(optimizers, step, config)
        model.zero_grad()
        values = {}
        for share, part in parts(batch, args.grad_accum, device):
            with autocast(device, args.precision):
                losses = text_to_video_loss(model, schedule, *encoded, *part)
            (share * losses.mean()).backward()
            *_, t, _, _ = part
            accumulate(values, share, by_noise(losses, t, schedule.config.timesteps))
        values = sum_over_processes(values, model.parameters())
        values["grad"] = clip_grad_norm_(model.parameters(), config.grad_clip)
        values = read(values)
        run.check_finite(*values.values())
        for optimizer in optimizers.values():
            optimizer.step()
        ema.update(model, step)
        run.log(step, values)
        if run.due(step):
            path = run.out / f"samples/step_{step + 1:06d}.gif"
            draw_samples(pipeline, path, prompts, real, rates)
            measure(run, step, model, schedule, encoded, measured, device)
        run.save(step, lambda: save_pipeline(pipeline, run.out / "model.pt"))
    if process() == 0:
        print(f"python sample.py {shlex.quote(prompts[0])} --fps {rates[0]:g} --checkpoint "
              f"{shlex.quote(str(run.out / 'model.pt'))}")


# ------------------------------------------------------------------------------ batches, losses


def generator(seed: int, step: int) -> torch.Generator:
    """The source of all torch randomness of one step, on the CPU: the same on every device."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def pinned(batch: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors where a GPU can fetch them by itself."""
    return [x.pin_memory() if device.type == "cuda" else x for x in batch]


def pictures(frames: Tensor | np.ndarray) -> Tensor:
    """uint8 (n, h, w, 3) -> float (n, 3, h, w) in [-1, 1]."""
    return to_model(frames[:, None])[:, :, 0]


def draw_frames(
    dataset: MovingShapes | VideoFolder, seed: int, count: int, step: int, per_video: int = 2
) -> np.ndarray:
    """The frames of a step of stage 1: uint8 (count, h, w, 3). Raises DataError where no video can
    be used."""
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
    return np.concatenate(frames)[:count]


def held_out_frames(
    held_out: MovingShapes | VideoFolder, dataset: MovingShapes | VideoFolder
) -> Tensor:
    """HELD_OUT frames (n, 3, h, w) of the held-out videos, fewer if they are very large; of the
    training videos where none of those can be used."""
    count = max(8, min(HELD_OUT, 2**24 // math.prod(sides(dataset.size))))
    try:
        return pictures(draw_frames(held_out, 0, count, 0))
    except DataError:
        return pictures(draw_frames(dataset, 0, count, 0))


def make_vae_loss(args: argparse.Namespace, config: VAELossConfig) -> VAELoss:
    """The preset's loss, and with --vgg the distance of VGG features. Raises UserError."""
    if args.vgg:
        config = replace(config, vgg_weight=config.vgg_weight or VGG_WEIGHT)
    try:
        return VAELoss(config, args.vgg)
    except Exception as error:  # as many kinds as there are wrong files
        raise UserError(f"--vgg {args.vgg} cannot be read as torchvision's vgg16-397923af.pth"
                        ) from error


def psnr(x: Tensor, x_hat: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of values in [-1, 1] (peak to peak 2)."""
    mse = (x.clamp(-1, 1) - x_hat.float().clamp(-1, 1)).square().mean()
    return 10 * torch.log10(4 / mse.clamp(min=1e-10))


@torch.no_grad()
def show_frames(
    run: "Run", step: int, vae: AutoencoderKL, test: Tensor, device: torch.device
) -> None:
    """PSNR of the held-out frames (b, 3, h, w) and a picture of some, above what became of them."""
    with autocast(device, run.args.precision):
        x_hat = torch.cat([vae.decode(vae.encode(x.to(device)).mean).cpu() for x in test.split(64)])
    measured = psnr(test, x_hat).item()
    run.record_line(step, {"held_out_psnr": measured})
    say(f"held-out frames: {measured:.2f} dB PSNR")
    pairs = torch.cat([test[:8], x_hat[:8]]).transpose(0, 1)[None]
    sheet = contact_sheet(to_uint8(pairs)[0], columns=8)
    write_video(run.out / f"samples/vae_{step + 1:06d}.png", sheet[None])


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, dataset: MovingShapes | VideoFolder, device: torch.device,
                    precision: str | None, videos: int = 256) -> None:
    """Store the mean and standard deviation of the training set's latents in the VAE."""
    vae.eval()
    # From all over the data set: the videos of a folder are in order.
    indices = np.linspace(0, len(dataset) - 1, min(videos, len(dataset))).astype(int).tolist()
    z = []
    for _, sample in read_ahead(dataset, indices):
        if sample is not None:
            with autocast(device, precision):
                z.append(vae.encode(pictures(sample.video).to(device)).mean.cpu())
    vae.set_latent_statistics(rearrange(torch.stack(z), "b f c h w -> b c f h w"))


def beginning(step: int, config: "TrainConfig") -> float:
    """How much of the easy start is left: falls from 1 to 0 in the first `easy_start` steps.

    Training begins with one question: here is the first frame, there is a sentence, all else is
    noise; what happens? Then the words are all there is to go by. Drawn from all timesteps alike,
    most clips show their motion through the noise, and the words for it were still unread after
    thousands of steps. So as long as it lasts, the first frame is given in this share of clips, and
    the timesteps are the noisiest ones: the last 5% at first, all of them at the end.
    """
    return max(0.0, 1 - step / config.easy_start) if config.easy_start else 0.0


def frame_stride(step: int, config: "TrainConfig") -> int:
    """N, where a step learns from every N-th frame of its clips. What words mean shows in four
    frames of an action as well as in sixteen, and in a quarter of the time. Such clips have a lower
    frame rate, as any clip of a longer action has."""
    return next((n for until, n in config.strides if step < until), 1)


def scaled_strides(config: "TrainConfig", steps: int) -> tuple:
    """The strides of so many steps instead of config.steps, with the same share for each."""
    return tuple((until * steps // config.steps, n) for until, n in config.strides)


def draw_batch(seed: int, step: int, config: "TrainConfig", clips: Tensor, fps: Tensor,
               latents: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, ...]:
    """The batch of a step of stage 2, and all that is random in it.

    clips: int64 (n,), the numbers of the clips whose frame rates (n,) and latents (n, c, f, h, w)
    follow. Returns rows of the captions (b,), -1 where it is dropped; frame rates (b,); clean
    latents (b, c, f, h, w); given_mask (b, f); timesteps (b,); noise like the latents; and which
    clips are single pictures (b,).
    """
    stride = min(frame_stride(step, config), max(1, latents.shape[2] // 4))  # four frames are left
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


def draw_given_frames(
    rng: np.random.Generator, batch: int, frames: int, text_only: float
) -> Tensor:
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
        if task == "random":
            row[rng.choice(frames, size=count, replace=False)] = True
        else:
            ends = [0] if frames == 2 else [0, -1]
            tasks = {"first": 0, "first few": slice(count), "last few": slice(-count, None)}
            row[tasks.get(task, ends)] = True
    return torch.from_numpy(mask)


def reword(seed: int, step: int, rows: Tensor, wordings: list[list[int]]) -> Tensor:
    """Rows of captions (b,) -> for each, any caption of the same video; see `list_captions`."""
    rng = np.random.default_rng((seed, step, 1))
    return torch.tensor([i if i < 0 else int(rng.choice(wordings[i])) for i in rows.tolist()])


def list_captions(dataset: MovingShapes | VideoFolder) -> tuple[list[str], list[list[int]]]:
    """A caption of each video, then all others; and for each video the rows of its captions."""
    of = [dataset.captions(i) for i in range(len(dataset))]
    captions, wordings = [texts[0] for texts in of], []
    for i, (_, *more) in enumerate(of):
        wordings.append([i, *range(len(captions), len(captions) + len(more))])
        captions += more
    return captions, wordings


def text_to_video_loss(
    model: nn.ModuleDict, schedule: NoiseSchedule, tokens: Tensor, token_mask: Tensor, rows: Tensor,
    fps: Tensor, x_start: Tensor, given_mask: Tensor, t: Tensor, noise: Tensor, images: Tensor,
) -> Tensor:
    """The losses (b,) of a part of a batch; tokens and their mask are of all captions, the rest is
    as from `draw_batch`."""
    tokens, token_mask = tokens[rows], token_mask[rows]  # always as long: compiled once
    context = model["text_encoder"](tokens, token_mask)

    def denoise(x_t, t):
        return model["unet"](x_t, t, context, token_mask, fps, x_start, given_mask, images)

    return diffusion_loss(denoise, schedule, x_start, t, noise, keep=~given_mask)


def by_noise(losses: Tensor, t: Tensor, timesteps: int) -> dict[str, Tensor]:
    """The mean of losses (b,). For each quarter of the timesteps also loss_i, the sum of its
    losses, and share_i, their number, both divided by b: `averages` makes a mean of them."""
    values = {"loss": losses.mean()}
    for i in range(4):
        inside = (4 * t // timesteps == i).to(losses)
        values |= {f"loss_{i + 1}": (losses * inside).mean(), f"share_{i + 1}": inside.mean()}
    return values


def averages(sums: dict[str, float], count: int) -> dict[str, float]:
    """The means of values that were added up in `count` steps, see `by_noise`."""
    means = {name: total / count for name, total in sums.items()}
    for name in [name for name in means if name.startswith("share_")]:
        share, name = means.pop(name), name.replace("share", "loss")
        total = means.pop(name, 0.0)
        means |= {name: total / share} if share else {}
    return means


@torch.no_grad()
def measure(run: "Run", step: int, model: nn.ModuleDict, schedule: NoiseSchedule,
            encoded: Sequence[Tensor], batch: Sequence[Tensor], device: torch.device) -> None:
    """The losses of the held-out clips of `draw_held_out`, in the log; and loss.png, a chart of
    these and the losses in training."""
    losses = []
    for part in zip(*(x.split(run.config.batch_size) for x in batch)):
        part = [x.to(device) for x in part]
        with autocast(device, run.args.precision):
            losses.append(text_to_video_loss(model, schedule, *encoded, *part).cpu())
    if losses:
        *_, t, _, _ = batch
        values = by_noise(torch.cat(losses), t, schedule.config.timesteps)
        values = averages(read(values), 1)
        run.record_line(step, {f"held_out_{name}": value for name, value in values.items()})
        say("held-out " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
    lines = [line for line in read_log(run.out / "log.jsonl") if line["stage"] == run.stage]
    curves = {title: [(line["step"], line[name]) for line in lines if name in line]
              for title, name in (("training", "loss"), ("held out", "held_out_loss"))}
    curves = {title: points for title, points in curves.items() if points}
    if curves:
        write_picture(run.out / "samples/loss.png", chart(curves, "steps", "loss"))


def draw_held_out(run: "Run", vae: AutoencoderKL, held_out: MovingShapes | VideoFolder,
                  device: torch.device, first: int, schedule: NoiseSchedule) -> tuple[Tensor, ...]:
    """A batch of HELD_OUT held-out clips as from `draw_batch`, the same in every run; empty where
    none of them can be used. first: the row of the first one's caption."""
    if process() > 0:
        return ()
    try:
        clips, fps, latents = encode_dataset(
            vae, held_out, device, run.out, run.args.precision, "held_out"
        )
    except DataError:
        return ()
    config = replace(run.config, batch_size=HELD_OUT)
    # Step 10**9 is past every easy start and stride.
    return draw_batch(run.args.seed, 10**9, config, clips + first, fps, latents, schedule)


def find_tokenizer(
    state: dict | None, whole: Pipeline | None, captions: list[str], preset: "Preset"
) -> tuple[Tokenizer, "Preset"]:
    """The tokenizer of what training goes on from, or a new one for these captions; and the preset.
    With a new tokenizer its context grows to the longest caption, to LONGEST tokens at most."""
    known = state and state["tokenizer"] or whole and whole.tokenizer
    if known:
        return known, preset
    tokenizer = Tokenizer.train(captions, preset.text.vocab_size)
    longest = max(len(tokenizer.encode(normalize(caption))) for caption in captions)
    context_length = max(preset.text.context_length, min(longest, LONGEST))
    if context_length > preset.text.context_length:
        say(f"the longest caption has {longest} tokens: text.context_length is {context_length}")
    return tokenizer, replace(preset, text=replace(preset.text, context_length=context_length))


def encode_captions(tokenizer: Tokenizer, captions: list[str], config: TextEncoderConfig,
                    device: torch.device, others: Sequence[str] = ()) -> tuple:
    """The captions, cut after a word where they are longer than the context; tokens and mask of
    these, then of `others`, last of the null caption. The tokenizer learns their words. Raises
    UserError."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{tokenizer.vocab_size} tokens are too many for a text encoder that knows "
                        f"{config.vocab_size}: choose another --init or --preset")
    tokenizer.add_words(captions)
    whole = [*captions, *others]
    short = [tokenizer.cut(caption, config.context_length) for caption in whole]
    if count := sum(a != b for a, b in zip(whole, short)):
        say(f"{count} captions are cut: they are longer than {config.context_length} tokens")
    return short[: len(captions)], *tokenizer.batch([*short, ""], config.context_length, device)


def save_pipeline(pipeline: Pipeline, path: Path) -> None:
    """model.pt: weights in half precision, which halves the file and changes nothing visible."""
    packed = pipeline.pack()
    for part in packed.values():
        if "state" in part:
            part["state"] = {k: v.half() for k, v in part["state"].items()}
    save_atomically(packed, path)


def describe_data(dataset: MovingShapes | VideoFolder, captions: list[str], fps: Tensor) -> dict:
    """What a checkpoint says of the data that it was trained on, see `Pipeline`."""
    rates = [fps.min().clamp(0.1).item(), fps.max().clamp(max=1000).item()]
    return {"form": dataset.form, "frames": dataset.frames, "size": dataset.size, "fps": rates,
            "captions": evenly(captions, 6000)}


def real_clips(dataset: MovingShapes | VideoFolder, captions: list[str], wordings: list[list[int]],
               clips: list[int], fps: Tensor, prompts: list[str]) -> tuple[np.ndarray, list[float]]:
    """For each prompt a clip with that caption, (n, f, h, w, 3), black where there is none; and the
    frame rates to draw it with, that of the clip or the median. clips: numbers of those encoded;
    wordings: see `list_captions`."""
    encoded = list(zip(clips, fps.tolist()))[::-1]  # of several clips the first one
    where = {normalize(captions[row]): known for known in encoded for row in wordings[known[0]]}
    real, rates, median = [], [], fps.median().item()
    for prompt in prompts:
        i, rate = where.get(normalize(prompt), (None, median))
        video = np.zeros((dataset.frames, *sides(dataset.size)[::-1], 3), np.uint8)
        with contextlib.suppress(VideoError):
            video = video if i is None else dataset[i].video
        real.append(video)
        rates.append(max(round(rate, 1), 0.1))
    return np.stack(real), rates


def draw_samples(
    pipeline: Pipeline, path: Path, prompts: list[str], real: np.ndarray, rates: list[float]
) -> None:
    """The prompts drawn with fixed seeds, each beside its real clip and above its words."""
    videos = np.concatenate([pipeline.generate(prompts, fps=rates), real], axis=3)
    large = videos.repeat(2, axis=2).repeat(2, axis=3)
    write_video(path, captioned_grid(large, prompts), rates[0])


# ------------------------------------------------------------------------------ models, data


def load_models(args: argparse.Namespace) -> tuple[AutoencoderKL, Pipeline | None]:
    """The autoencoder to train on, and where --init is a model.pt its whole Pipeline, else None."""
    path = Path(args.init or args.vae or Path(args.out) / "vae.pt")
    if not path.is_file() and not (args.init or args.vae):
        raise UserError(f"no {path}: train it first with `{next_command('vae', args)}`, or name a "
                        "trained one with --vae")
    weights = load_checkpoint(path, "vae")
    if args.init and "unet" in weights:
        whole = load_pipeline(path)
        return whole.vae, whole
    return unpack(AutoencoderKL, VAEConfig, weights["vae"]), None


def build_models(whole: Pipeline | None, preset: "Preset") -> tuple:
    """Text encoder, UNet and noise schedule: of a Pipeline, or new ones."""
    if whole:
        return whole.text_encoder, whole.unet, whole.schedule
    return TextEncoder(preset.text), UNet3D(preset.unet), NoiseSchedule(preset.diffusion)


def adopt(
    args: argparse.Namespace, preset: "Preset", vae: AutoencoderKL, whole: Pipeline | None = None
) -> "Preset":
    """The preset with the configs of the models that training starts from; a line says where they
    differ from its own. Raises UserError where the parts do not fit together."""
    configs = {"vae": vae.config}
    if whole:
        configs |= {"text": whole.text_encoder.config, "unet": whole.unet.config,
                    "diffusion": whole.schedule.config}
    for part, config in configs.items():
        for name, value in vars(config).items():
            own = getattr(getattr(preset, part), name)
            if value != own:
                say(f"{part}.{name} is {value}, as in the trained weights, not {own}")
    preset = replace(preset, **configs)
    preset = replace(preset, unet=replace(preset.unet, channels=preset.vae.latent_channels))
    check_preset(args.preset, preset)
    return preset


def open_dataset(args: argparse.Namespace, preset: "Preset") -> tuple:
    """Two data sets, the one to train on and what is held out to measure with, each `MovingShapes`
    or a `VideoFolder`; and a digest of all that their pictures depend on. Raises DataError."""
    settings = {"seed": args.seed, "frames": preset.frames, "size": preset.size}
    if args.data == "shapes":
        dataset = MovingShapes(getattr(preset, f"{args.stage}_training").videos, **settings)
        held_out = MovingShapes(HELD_OUT // 2, "heldout", **settings)
        return dataset, held_out, digest(dataset.identity())
    dataset = VideoFolder(args.data, **settings, **{x: getattr(args, x) for x in CLIP_OPTIONS})
    for line in dataset.summary():
        say(printable(f"{args.data}: {line}"))
    return *dataset.divide(), digest(dataset.identity())


def report_skipped(dataset: MovingShapes | VideoFolder, out: Path) -> None:
    """List the videos that cannot be used in skipped.txt, each once, with the reason."""
    path = out / "skipped.txt"
    text = "".join(f"{name}: {why}\n" for name, why in sorted(dataset.skipped.items()))
    text = text.encode("utf-8", "backslashreplace")
    if process() == 0 and text != (path.read_bytes() if path.is_file() else b""):
        with atomic_path(path) as temporary:
            temporary.write_bytes(text)
        say(f"skipped {len(dataset.skipped)} videos: {path} says why")


@torch.no_grad()
def encode_dataset(vae: AutoencoderKL, dataset: MovingShapes | VideoFolder, device: torch.device,
                   out: Path, precision: str | None = None, name: str = "latents") -> tuple:
    """Numbers (n,), frame rates (n,) and latents float16 (n, c, f, h, w) of every usable clip.

    Each clip is encoded once, into `name`.bin in the folder `out`. The file is mapped into memory,
    not loaded, so that it may be larger than that. `name`.json says which clips are in it. The next
    start tries the others (again), or all if anything has changed that the latents depend on.
    """
    file, contents = out / f"{name}.bin", out / f"{name}.json"
    channels, height, width = vae.config.latent_shape(*sides(dataset.size))
    shape = (channels, dataset.frames, height, width)
    key = digest(f"{dataset.identity()} {precision}", vae)
    clips, fps = read_contents(contents, key, len(dataset))
    size = 2 * math.prod(shape) * len(clips)  # in bytes
    if not clips or not file.is_file() or file.stat().st_size < size:
        contents.unlink(missing_ok=True)  # first: it must never speak of another file
        file.unlink(missing_ok=True)
        clips, fps, size = [], [], 0
    known = set(clips)
    todo = [i for i in range(len(dataset)) if i not in known] if process() == 0 else []
    with file.open("ab") as latents:
        latents.truncate(size)  # without what a killed run left half done
        samples = progress(read_ahead(dataset, todo), "encoding", len(known), len(dataset))
        for n, (i, sample) in enumerate(samples, 1):
            if sample is not None:
                with autocast(device, precision):
                    z = vae.encode_video(to_model(sample.video[None]).to(device))
                latents.write(z.half().cpu().numpy().tobytes())
                clips.append(i)
                fps.append(float(sample.fps))
            if n % 100 == 0 or n == len(todo):
                latents.flush()
                os.fsync(latents.fileno())  # what is called done must be on the disk
                with atomic_path(contents) as path:
                    path.write_text(json.dumps({"key": key, "clips": clips, "fps": fps}))
    latents = np.memmap(file, np.float16, mode="c", shape=(len(clips), *shape))  # never written to
    return torch.tensor(clips), torch.tensor(fps), torch.from_numpy(latents)


def read_contents(path: Path, key: str, length: int) -> tuple[list[int], list[float]]:
    """What such a file says: numbers of the encoded clips below `length` and their frame rates;
    none where it is damaged or has another key."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        state = json.loads(path.read_bytes() if path.is_file() else b"")
        clips, fps = state["clips"], state["fps"]
        good = [type(i) is int and 0 <= i < length and type(rate) is float and 0 < rate < math.inf
                for i, rate in zip(clips, fps, strict=True)]
        if state["key"] == key and all(good) and len(set(clips)) == len(clips):
            return clips, fps
    return [], []


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

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95,
                 weight_decay: float = 0.0, dtype: torch.dtype = torch.float32):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Move each matrix by its gradient, all matrices of one shape together."""
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
                momenta = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                # Nesterov's look ahead
                updates = torch._foreach_lerp(grads, momenta, group["momentum"])
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


def make_adversary_optimizer(discriminator: nn.Module, config: "TrainConfig") -> torch.optim.AdamW:
    """Of low momentum, because the discriminator's opponent moves with every step."""
    return torch.optim.AdamW(
        discriminator.parameters(), config.lr, (0.5, 0.9), weight_decay=0.0, fused=True
    )


def learning_rate(step: int, config: "TrainConfig") -> float:
    """Linear warm-up, constant, then a linear fall to zero over the last `decay` of the steps."""
    rise = (step + 1) / config.warmup if config.warmup else 1
    fall = (config.steps - step) / (config.decay * config.steps) if config.decay else 1
    return config.lr * min(1, rise, fall)


def set_learning_rate(optimizers: dict, step: int, config: "TrainConfig") -> None:
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)


class EMA:
    """Exponential moving average of a model's weights, which samples better than the last weights.

    The average starts quickly and slows down to `decay`, so that it soon forgets the
    initialisation.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


def economize(args: argparse.Namespace, *modules: nn.Module) -> None:
    """--grad-checkpoint and --compile, which change neither the weights nor their names."""
    torch.backends.cudnn.benchmark = True  # a run has few shapes
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

    state: see `find_state`; digests: of what training starts from, by name. Raises UserError.
    """

    def __init__(
        self, args: argparse.Namespace, preset: "Preset", state: dict | None, digests: dict
    ):
        self.args, self.out, self.stage, self.preset = args, Path(args.out), args.stage, preset
        self.config = getattr(preset, f"{args.stage}_training")
        self.state, self.record = state, describe_run(args, preset, digests)
        self.start, self.logged, self.sums = 0, 0, {}  # the last logged step, all values since
        self.signals, self.stopping = [], False  # of Ctrl-C and its like: here, anywhere
        if state:
            self.start, self.logged, self.sums = state["step"], state["logged"], state["sums"]
            for name, now in self.record.items():
                then = state["record"].get(name)
                if repr(now) != repr(then):
                    raise UserError(f"{self.out / 'last.pt'} was started with {name} {then}, not "
                                    f"{now}: use the same, or choose another --out")

    def begin(self, models: dict, optimizers: dict, tokenizer: Tokenizer | None = None) -> None:
        """Models and optimizers, dicts of what will be saved, as they were when last.pt was
        written; and a folder ready for what comes. Raises UserError."""
        self.models, self.optimizers, self.tokenizer = models, optimizers, tokenizer
        if self.state:
            restore(self.state, models, optimizers, self.out / "last.pt")
            self.state.clear()  # it takes as much memory as the models
        if process() > 0:
            return
        (self.out / "samples").mkdir(parents=True, exist_ok=True)
        for path in (*self.out.iterdir(), *(self.out / "samples").iterdir()):
            if UNFINISHED.fullmatch(path.name) and path.is_file():
                path.unlink()  # left by a run that was killed while writing
        # The steps since the checkpoint come again.
        lines = [line for line in read_log(self.out / "log.jsonl")
                 if line["stage"] != self.stage or line["step"] <= self.start]
        with atomic_path(self.out / "log.jsonl") as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with atomic_path(self.out / "config.json") as path:
            what = {"arguments": vars(self.args), "preset": asdict(self.preset)}
            path.write_text(json.dumps(what, indent=2) + "\n")

    def steps(self) -> Iterator[int]:
        """The remaining step numbers, behind a progress bar. After a signal (`noted_signals`) the
        step is finished and saved, then the signal is raised."""
        self.saved = time.monotonic()
        with noted_signals() as self.signals:
            remaining = range(self.start, self.config.steps)
            for step in progress(remaining, self.stage, self.start, self.config.steps):
                yield step
                if self.stopping:
                    say("stopped; the same command with --resume goes on from there")
                    break
        if self.stopping:
            signal.raise_signal(self.signals[0] if self.signals else signal.SIGINT)
            raise KeyboardInterrupt

    def check_finite(self, *values: float) -> None:
        """Raises UserError unless all of these numbers are finite."""
        if not math.isfinite(sum(values)):
            raise UserError("loss or weights are not finite any more: go on from the last "
                            "checkpoint with --resume and a lower --lr or --precision fp32")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Every `log_every` steps, the means since the last time: an aligned line on stderr and a
        JSON object in log.jsonl."""
        stop = sum_over_processes({"stop": torch.tensor(len(self.signals))})["stop"]
        self.stopping = stop.item() > 0
        accumulate(self.sums, 1, values)
        done = step + 1
        if done % self.config.log_every and done != self.config.steps:
            return
        means = averages(self.sums, done - self.logged)
        self.logged, self.sums, lr = done, {}, learning_rate(step, self.config)
        text = "  ".join(f"{name} {value:7.4f}" for name, value in means.items()
                         if not name.startswith("loss_"))
        say(f"step {done:6d}  {text}  lr {lr:.1e}")
        self.record_line(step, means | {"lr": lr})

    def record_line(self, step: int, values: dict[str, float]) -> None:
        """Append one JSON object to log.jsonl."""
        if process() == 0:
            with (self.out / "log.jsonl").open("a") as file:
                file.write(json.dumps({"stage": self.stage, "step": step + 1, **values}) + "\n")

    def due(self, step: int) -> bool:
        """Is it time for sample pictures and a checkpoint after this step?"""
        last = step + 1 == self.config.steps
        return process() == 0 and (last or (step + 1) % self.config.save_every == 0)

    def save(self, step: int, write_result: Callable | None = None) -> None:
        """Where it is due, and not just done, or ten minutes have passed, or Ctrl-C was pressed:
        write last.pt, the whole training state. Before that call `write_result()`, for the file
        that a finished stage leaves."""
        least, most = SAVE_SECONDS
        waited, last = time.monotonic() - self.saved, step + 1 == self.config.steps
        now = last or self.stopping or waited > most or self.due(step) and waited >= least
        if process() > 0 or not now:
            return
        weights = [v.float().sum() for m in self.models.values() for v in m.state_dict().values()]
        self.check_finite(torch.stack(weights).sum().item())  # or nothing good would be kept
        if write_result is not None:
            write_result()
        save_atomically({
            "stage": self.stage, "record": self.record, "step": step + 1,
            "gan_start": self.preset.vae_loss.gan_start, "easy_start": self.config.easy_start,
            "strides": self.config.strides, "logged": self.logged, "sums": self.sums,
            "tokenizer": self.tokenizer and self.tokenizer.state_dict(),
            "models": {name: model.state_dict() for name, model in self.models.items()},
            "optimizers": {name: o.state_dict()["state"] for name, o in self.optimizers.items()},
        }, self.out / "last.pt")
        self.saved = time.monotonic()


SAVE_SECONDS = 120, 600  # between two checkpoints, at least and at most
UNFINISHED = re.compile(  # names that `atomic_path` gives to what a run writes
    r"\.\d+-(config\.json|log\.jsonl|(latents|held_out)\.json|skipped\.txt|(vae|last|model)\.pt"
    r"|(vae|step)_\d+\.(png|gif)|loss\.png)"
)


def describe_run(args: argparse.Namespace, preset: "Preset", digests: dict) -> dict:
    """What must be the same when a run goes on, by name; the rest (steps, learning rate) may
    change."""
    names = ("preset", "seed", *CLIP_OPTIONS)
    record = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    record |= {"--vgg": bool(args.vgg), "size": preset.size, "frames": preset.frames}
    record |= {f"{name} of digest": text[:16] for name, text in digests.items()}
    parts_of = {"vae": ("vae", "vae_loss"), "diffusion": ("vae", "text", "unet", "diffusion")}
    for part in parts_of[args.stage]:
        record |= {f"{part}.{k}": value for k, value in vars(getattr(preset, part)).items()}
    record.pop("vae_loss.gan_start", None)  # moves with the steps
    return record


def find_state(args: argparse.Namespace) -> dict | None:
    """What `Run.save` wrote, to go on from; None for a run that begins. Raises UserError where that
    would overwrite or mix runs."""
    out, stage = Path(args.out), args.stage
    last = out / "last.pt"
    state = read_state(last) if last.is_file() else {"stage": None}
    if state["stage"] == stage and args.resume:
        return state
    if state["stage"] in (stage, "diffusion"):  # a new VAE would make its UNet worthless
        raise UserError(f"{last} is a {state['stage']} run: add --resume to train.py "
                        f"{state['stage']}, or choose another --out")
    if args.resume and not (out / "config.json").is_file():
        raise UserError(f"there is no {stage} run in {out} to resume")
    foreign = [path for path in (out / "config.json", out / "log.jsonl") if path.exists()]
    if foreign and not last.is_file() and not is_run(out):
        raise UserError(f"{foreign[0]} is not of a run and would be overwritten: choose another "
                        "--out")
    result = out / ("vae.pt" if stage == "vae" else "model.pt")
    if args.resume:
        say(f"{out} has no checkpoint of the {stage} stage yet: it begins at step 1")
    elif result.exists():
        raise UserError(f"{result} would be overwritten: choose another --out")
    return None


def is_run(out: Path) -> bool:
    """Is the config.json in a folder that of a run?"""
    try:
        return {"arguments", "preset"} <= json.loads((out / "config.json").read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def read_state(path: Path) -> dict:
    """What `Run.save` wrote, its tokenizer rebuilt. Raises UserError for anything else."""
    examples = {"stage": "", "record": {}, "step": 0, "gan_start": 0, "easy_start": 0,
                "strides": ((0, 1),), "logged": 0, "sums": {}, "models": {}, "optimizers": {}}
    state = load_checkpoint(path, *examples, "tokenizer")
    try:
        wrong = [name for name, like in examples.items() if not fits(state[name], like, 10**9)]
        wrong += [name for name, total in state["sums"].items()
                  if type(name) is not str or not fits(total, 0.0, 0)]
        repr(state["record"])  # fails here, not later, for numbers too long to print
        if wrong or state["logged"] > state["step"]:
            raise ValueError(", ".join(map(str, wrong)) or "logged")
        if state["tokenizer"] is not None:
            state["tokenizer"] = Tokenizer.from_state_dict(state["tokenizer"])
    except Exception as error:  # damaged values fail in many ways
        raise UserError(f"{path} is damaged ({error}): choose another --out") from error
    return state


# ------------------------------------------------------------------------------ presets


@dataclass(frozen=True)
class TrainConfig:
    """One stage's training; for `lr`, `warmup` and `decay` see `learning_rate`."""

    steps: int = 1000
    batch_size: int = 16  # frames for the VAE, clips for the diffusion model
    lr: float = 1e-3
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
    strides: tuple = ((0, 1),)  # pairs (step, N): every N-th frame until then, see `frame_stride`
    log_every: int = 50
    save_every: int = 500  # checkpoint and sample pictures

    def __post_init__(self):
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"unknown optimizer {self.optimizer!r}: choose adamw or muon")
        if not (min(self.lr, self.weight_decay) >= 0 and self.grad_clip > 0):
            raise ValueError("lr, weight_decay and grad_clip cannot be negative, nor grad_clip 0")
        for name in ("decay", "ema", "caption_dropout", "text_only", "image_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if not all(len(pair) == 2 and pair[1] > 0 for pair in self.strides):
            raise ValueError(f"strides must be pairs (step, N), N at least 1, got {self.strides}")


@dataclass(frozen=True)
class Preset:
    """Everything that differs between data sets; one name on the command line."""

    size: int | tuple  # of a frame in pixels, see `data.sides`
    vae: VAEConfig
    vae_loss: VAELossConfig
    vae_training: TrainConfig
    text: TextEncoderConfig
    unet: UNet3DConfig
    diffusion: DiffusionConfig
    diffusion_training: TrainConfig
    frames: int = FRAMES  # of a clip


PRESETS = {  # functions, so that one that contradicts itself stops nobody who takes another
    "shapes": lambda: Preset(
        size=64,
        vae=VAEConfig(),
        # Mostly the squared error: the L1 term is soon about a background that is right already.
        vae_loss=VAELossConfig(l1_weight=0.25, mse_weight=4.0),
        vae_training=TrainConfig(steps=4000, batch_size=32, lr=2e-3, optimizer="muon"),
        text=TextEncoderConfig(),
        unet=UNet3DConfig(),
        diffusion=DiffusionConfig(shift=3.0),
        diffusion_training=TrainConfig(
            steps=12_000, batch_size=16, lr=1e-3, decay=0.65, optimizer="muon", easy_start=2000,
            strides=((5400, 4), (9000, 2)), videos=12_000, text_only=0.7,
        ),
    ),
    "ucf101": lambda: Preset(
        size=128,
        # Real frames: no folded pixels at the entrance, twice the depth, and a discriminator for
        # the texture that L1 and MSE blur away.
        vae=VAEConfig(patch=1, widths=(64, 128, 256, 256), blocks=2, groups=32),
        vae_loss=VAELossConfig(kl_weight=1e-5, gan_weight=0.5, gan_start=10_000),
        vae_training=TrainConfig(steps=50_000, batch_size=32, lr=2e-4),
        text=TextEncoderConfig(vocab_size=2048, width=256, depth=4),
        unet=UNet3DConfig(  # 56 M parameters, most of them where the maps are small
            widths=(96, 192, 512), blocks=(2, 2, 4), attention=(False, True, True), text_width=256,
            embedding_width=512, groups=32,
        ),
        diffusion=DiffusionConfig(shift=2.0),
        diffusion_training=TrainConfig(
            steps=100_000, batch_size=32, lr=3e-4, optimizer="muon", ema=0.9999
        ),
    ),
    "ucf101-256": lambda: replace(
        PRESETS["ucf101"](),
        size=256,
        vae_training=TrainConfig(steps=50_000, batch_size=16, lr=2e-4),
        unet=UNet3DConfig(  # 145 M parameters
            widths=(128, 256, 768), blocks=(2, 2, 5), attention=(False, True, True), text_width=256,
            embedding_width=768, groups=32,
        ),
        diffusion=DiffusionConfig(shift=3.0),
        diffusion_training=TrainConfig(
            steps=200_000, batch_size=16, lr=2e-4, optimizer="muon", ema=0.9999
        ),
    ),
}
HELD_OUT = 256  # frames or clips to measure with
LONGEST = 256  # tokens of a caption at most; what is longer is cut
VGG_WEIGHT = 0.2  # of the distance of VGG16 features, where --vgg gives their weights
CLIP_OPTIONS = ("split", "clip_seconds", "stride", "flip")  # of `VideoFolder`


@torch.no_grad()
def check_preset(name: str, preset: Preset) -> None:
    """Raises UserError where the parts of a preset do not fit together."""
    try:
        NoiseSchedule(preset.diffusion).timesteps(STEPS)
        with no_weights():  # nothing is computed either
            vae, unet = AutoencoderKL(preset.vae), UNet3D(preset.unet)
            TextEncoder(preset.text), Tokenizer.train([], preset.text.vocab_size)
            (width, height), levels = sides(preset.size), len(preset.unet.widths)
            multiple = preset.vae.factor * 2 ** (levels - 1)
            if width % multiple or height % multiple:
                raise ValueError(f"the sides of frames of {width}x{height} pixels must be "
                                 f"multiples of {multiple}")
            latents = vae.encode(torch.zeros(2, 3, height, width)).mean
            x, context = latents.movedim(0, 1)[None], torch.zeros(1, 2, preset.text.width)
            unet(x, torch.zeros(1).long(), context, context[..., 0] > 0, torch.ones(1))
    except Exception as error:  # as many kinds as there are wrong numbers
        raise UserError(f"the parts of --preset {name} do not fit together: {error}") from error


# ------------------------------------------------------------------------------ command line


def options(**values: object) -> str:
    """The command-line options that set these values; none for what is not set."""
    line = []
    for name, value in values.items():
        if value is not None and value is not False and value != []:
            words = value if isinstance(value, list) else [] if value is True else [value]
            line += [f"--{name.replace('_', '-')}", *(shlex.quote(str(word)) for word in words)]
    return " ".join(line)


def next_command(stage: str, args: argparse.Namespace) -> str:
    """The command line that runs a stage with the same data, preset and folder."""
    same = {name: getattr(args, name) for name in ("data", *CLIP_OPTIONS, "preset", "out")}
    size = args.size and "x".join(map(str, sides(args.size)))
    other = [x for x in args.set if x.partition(".")[0] not in ("training", "vae_loss")]
    return f"python train.py {stage} {options(**same, size=size, frames=args.frames, set=other)}"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, `sys.argv` if none is given; ends the program where it is wrong."""
    parser = Parser(description=__doc__)
    option = parser.add_argument
    option("stage", choices=["vae", "diffusion"], help="which half to train")
    option("--data", default="shapes", metavar="shapes|FOLDER",
           help="the built-in captioned clips, or a folder of videos (%(default)s)")
    option("--out", required=True, help="the run folder, for example runs/shapes")
    option("--preset", default="shapes", choices=PRESETS,
           help="model sizes and settings (%(default)s)")
    option("--init", metavar="CHECKPOINT",
           help="start from trained weights: a vae.pt, or a model.pt to fine-tune")
    option("--vae", metavar="FILE", help="a vae.pt or model.pt: begin a new text encoder and UNet "
           "on its autoencoder (OUT/vae.pt)")
    option("--resume", action="store_true", help="go on where the run stopped")
    option("--prompts", metavar="FILE", type=lambda path: read_prompts(path, 100), help="sentences "
           "to draw into samples/ while training, one a line (the most different captions)")
    option("--vgg", metavar="FILE",
           help="torchvision's vgg16-397923af.pth: the VAE also compares VGG features")
    option("--seed", type=number(int, 0, 2**31), default=0, help="(%(default)s)")
    option("--device", default="auto", choices=DEVICES)
    group = parser.add_argument_group("clips of a folder of videos")
    group.add_argument("--split", help="an official list of UCF-101, train01 to test03")
    group.add_argument("--flip", action="store_true",
                       help="mirror half of the clips (left and right get lost)")
    option = group.add_mutually_exclusive_group().add_argument
    option("--clip-seconds", type=number(float, 0.01, 1e6), metavar="S",
           help="a clip covers a window of S seconds, from a random place (the whole video)")
    option("--stride", type=number(int, 1, 10**6), metavar="N",
           help="a clip is every N-th frame, from a random place")
    option = parser.add_argument_group("instead of the preset's values").add_argument
    option("--steps", type=number(int, 1, 10**9), help="training steps in total")
    option("--batch-size", type=number(int, 1, 10**6))
    option("--lr", type=number(float, 0, 1), help="peak learning rate")
    option("--videos", type=number(int, 1, 2**20), help="size of the procedural data")
    option("--size", type=frame_size, metavar="N|WxH", help="of a frame in pixels")
    option("--frames", type=number(int, 2, 512), help="of a clip")
    option("--set", nargs="+", action="extend", default=[], metavar="PART.FIELD=VALUE",
           help="any field of the classes in which presets are written: unet.widths=96,192 "
           "diffusion.prediction=x_start training.easy_start=0")
    add_memory_options(parser.add_argument_group("memory and speed"))
    return parser.parse_args(argv)


def add_memory_options(group: argparse._ArgumentGroup) -> None:
    """The options that trade memory and time, and leave what is learned as it is."""
    option = group.add_argument
    option("--grad-accum", type=number(int, 1, 10**6), default=1, metavar="N",
           help="go through each batch in N parts and add up their gradients: the same result in "
                "less memory (%(default)s)")
    option("--grad-checkpoint", action="store_true",
           help="compute what is inside a block again on the way back, instead of keeping it: the "
                "same gradients in less memory and more time")
    option("--precision", choices=["bf16", "fp32"],
           help="number format of matrix products (bf16 where the hardware has them)")
    option("--compile", action="store_true", help="translate the model with torch.compile (CUDA)")


def configure(args: argparse.Namespace, state: dict | None = None) -> Preset:
    """The preset with the command line's values in place of its own. Steps at which something
    begins or ends scale with --steps; a resumed run keeps those of `state`. Raises UserError."""
    try:
        preset = PRESETS[args.preset]()
    except ValueError as error:
        raise UserError(f"--preset {args.preset} contradicts itself: {error}") from error
    stage = f"{args.stage}_training"
    own, names = getattr(preset, stage), ("vae", "vae_loss", "text", "unet", "diffusion")
    flags = {name: getattr(args, name) for name in ("steps", "batch_size", "lr", "videos")}
    chosen = args.set + [f"training.{k}={v}" for k, v in flags.items() if v is not None]
    configs = {name: getattr(preset, name) for name in names} | {"training": own}
    configs = set_fields(configs, chosen)
    steps, gan_start = configs["training"].steps, preset.vae_loss.gan_start
    state, context_length = state or {"record": {}}, configs["text"].context_length
    follows = {  # from other values, unless it is chosen, too
        "training.easy_start": state.get("easy_start", own.easy_start * steps // own.steps),
        "training.strides": state.get("strides", list(scaled_strides(own, steps))),
        "vae_loss.gan_start": state.get("gan_start", gan_start * steps // own.steps),
        "text.context_length": state["record"].get("text.context_length", context_length),
        "unet.channels": configs["vae"].latent_channels,
        "unet.text_width": configs["text"].width,
    }
    configs = set_fields(configs, [f"{name}={value}" for name, value in follows.items()] + chosen)
    preset = replace(preset, **{stage: configs.pop("training")}, **configs,
                     size=args.size or preset.size, frames=args.frames or preset.frames)
    check_preset(args.preset, preset)
    return preset


def check(args: argparse.Namespace, preset: Preset, device: torch.device) -> None:
    """Raises UserError where options do not fit together, or to this machine."""
    for name, stage in {"vgg": "vae", "vae": "diffusion", "prompts": "diffusion"}.items():
        if getattr(args, name) is not None and args.stage != stage:
            raise UserError(f"--{name} is for python train.py {stage}")
    batch_size = getattr(preset, f"{args.stage}_training").batch_size
    count, shapes = args.grad_accum * processes(), args.data == "shapes"
    clips = options(**{name: getattr(args, name) for name in CLIP_OPTIONS})
    inside = Path(args.out).resolve().is_relative_to(Path(args.data).resolve())
    for wrong, message in (
        (shapes and clips, f"{clips} is for --data FOLDER, a folder of videos"),
        (shapes and isinstance(preset.size, tuple),
         "--data shapes has square frames: give --size one number"),
        (not shapes and args.videos is not None,
         "--videos is for --data shapes; a folder has as many as there are in it"),
        (not shapes and inside, f"--out {args.out} lies inside --data {args.data}: its sample "
         "videos would be taken for data"),
        (args.vae and args.init, "--init goes on with all of a model, --vae begins a new one"),
        (preset.vae_loss.vgg_weight and args.stage == "vae" and not args.vgg,
         "vae_loss.vgg_weight needs --vgg FILE"),
        (args.compile and device.type != "cuda", "--compile is for CUDA GPUs: leave it out"),
        (count > batch_size, f"a batch of {batch_size} cannot be divided into {count} parts: "
         "choose a larger --batch-size"),
        (processes() > 1 and args.stage == "vae",
         "the autoencoder trains in one process: leave out torchrun"),
    ):
        if wrong:
            raise UserError(message)


def main() -> None:
    """Train what the command line asks for."""
    args = parse_args()
    device = pick_device(args.device, args.precision)
    join_processes(device)
    stage = {"vae": train_vae, "diffusion": train_diffusion}[args.stage]
    with locked(args.out) if process() == 0 else contextlib.nullcontext():
        state = find_state(args)
        preset = configure(args, state)
        check(args, preset, device)
        stage(args, preset, device, state)


if __name__ == "__main__":
    run_command(main)
