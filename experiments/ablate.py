"""Why is each part of the model there? Train without it, and see.

    python experiments/ablate.py --arm baseline --seeds 1       # 10 minutes
    python experiments/ablate.py --arm pooled-text flow         # three seeds each: an hour
    python experiments/ablate.py                                # all: 7 hours

A small model learns a small world: circles of six colours that move in one of four directions, then
in another. Every arm differs from the baseline in one part, and trains for the same time. Then it
draws every caption of that world, and the oracle says how many are right. Prints a JSON line for
each run, and one for each arm with the means over the seeds and their standard errors.

It is a race as well: change anything in the model, run the baseline before and after, and see
whether it helps.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import Parser, autocast, number, pick_device, print_row, run_command

import copy
import itertools
import time
from dataclasses import replace

import numpy as np
import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import train
from data import FPS, FRAMES, to_model
from diffusion import NoiseSchedule
from experiments.slices import CIRCLES
from sample import CHECKPOINT, Pipeline, load_autoencoder
from shapes import Thing, caption_accuracy, describe, place_in_frame, render
from text_encoder import TextEncoder, Tokenizer
from unet3d import UNet3D

# ------------------------------------------------------------------------------ the arms


class PooledText(TextEncoder):
    """One vector for the whole sentence, the mean of its words, as small projects often have it."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        context = super().forward(tokens, mask)
        mean = context.sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        return mean * mask.unsqueeze(-1)  # all keys are alike: attention can only return this


class NoFramePosition(UNet3D):
    """No frame knows where in the clip it is; attention in time still knows their distances."""

    def embedding(self, t, fps, frames, context, context_mask):
        middle = super().embedding(t, fps, 1, context, context_mask)
        return repeat(middle, "b e -> (b f) e", f=frames)


class NoPlaces(UNet3D):
    """No place knows where in the frame it is."""

    def __init__(self, config):
        super().__init__(config)
        self.conv_in.register_forward_pre_hook(drop_places)


def drop_places(conv_in: nn.Module, inputs: tuple) -> tuple:
    x = inputs[0].clone()
    x[:, -64:] = 0  # the last channels are the features of y and x
    return (x,)


class NoTimeAtTop(UNet3D):
    """Attention in time only where the maps are small."""

    def __init__(self, config):
        super().__init__(config)
        for block in (*self.down[0]["blocks"], *self.up[-1]["blocks"]):
            block.temporal = Skip()


class Skip(nn.Module):
    def forward(self, x: Tensor, *_) -> Tensor:
        return x


class Flow(NoiseSchedule):
    """Flow matching on straight lines from video to noise (Lipman 2023, Liu 2023).

    On such a line x_t = (1 - s) x_start + s eps, and the network predicts its direction, eps -
    x_start. Here x_t is scaled to unit variance, as for the other arms, which leaves alphas_cumprod
    = (1 - s)^2 / ((1 - s)^2 + s^2); shift means the same.
    """

    def __init__(self, config):
        super().__init__(config)
        s = torch.linspace(0, 1, config.timesteps + 1, dtype=torch.float64)[1:]
        noise, video = (config.shift * s) ** 2, (1 - s) ** 2
        self.alphas_cumprod = video / (video + noise)

    def target(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return noise - x_start

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(t, x_t)
        x_start = (x_t - sigma * output) / (alpha + sigma)
        return x_start.to(x_t.dtype), (x_start + output).to(x_t.dtype)


# Name -> what is other than in the baseline: classes of text, unet and schedule; fields of the
# configs of diffusion and training; and whether latents are brought to unit variance.
ARMS = {
    "baseline": {},
    "pooled-text": {"text": PooledText},
    "no-frame-position": {"unet": NoFramePosition},
    "no-places": {"unet": NoPlaces},
    "no-time-at-top": {"unet": NoTimeAtTop},
    "no-easy-start": {"training": {"easy_start": 0}},
    "adamw": {"training": {"optimizer": "adamw"}},
    "no-normalisation": {"normalise": False},
    "no-shift": {"diffusion": {"shift": 1.0}},
    "no-zero-snr": {"diffusion": {"zero_terminal_snr": False}},
    "eps": {"diffusion": {"prediction": "eps", "zero_terminal_snr": False}},
    "x_start": {"diffusion": {"prediction": "x_start"}},
    "flow": {"schedule": Flow},
}

# ------------------------------------------------------------------------------ the race


def make_world(num: int) -> tuple[list, list, np.ndarray]:
    """Captions, scenes and clips, uint8 (num, f, h, w, 3), of CIRCLES in turn."""
    rng, scenes = np.random.default_rng(0), []
    for colour, actions in itertools.islice(itertools.cycle(CIRCLES), num):
        thing = Thing(colour, "circle", "", actions, 0.0, 0.0, 0.0)
        scenes.append([place_in_frame(thing, rng, FRAMES, FPS)])
    return [describe(scene) for scene in scenes], scenes, np.stack([render(s) for s in scenes])


@torch.no_grad()
def encode(vae: nn.Module, clips: np.ndarray, device: torch.device) -> Tensor:
    """Clips, a batch at a time -> float16 latents (n, c, f, h, w)."""
    parts = np.array_split(clips, -(-len(clips) // 16))
    with autocast(device):
        z = [vae.encode_video(to_model(part).to(device)).half().cpu() for part in parts]
    return torch.cat(z)


def train_arm(arm: dict, steps: int, seed: int, captions, latents, vae, device) -> Pipeline:
    """A small model, trained as train.py does it, and differently where the arm says so."""
    preset = train.PRESETS["shapes"]()
    own = preset.diffusion_training
    strides = train.scaled_strides(own, steps)
    # So short a run stays easy to its end, or the words would stay unread.
    config = replace(
        own, steps=steps, strides=strides, easy_start=steps * 4 // 3, batch_size=8, ema=0.99
    )
    config = replace(config, **arm.get("training", {}))
    torch.manual_seed(seed)
    text_encoder = arm.get("text", TextEncoder)(preset.text)
    unet = arm.get("unet", UNet3D)(replace(preset.unet, widths=(32, 64), blocks=(1, 2)))
    diffusion = replace(preset.diffusion, **arm.get("diffusion", {}))
    schedule = arm.get("schedule", NoiseSchedule)(diffusion)
    tokenizer = Tokenizer.train(captions, preset.text.vocab_size)
    _, *words = train.encode_captions(tokenizer, captions, preset.text, device)
    model = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet}).to(device).train()
    ema, optimizers = train.EMA(model, config.ema), train.make_optimizers(model, config)
    clips, fps = torch.arange(len(captions)), torch.full((len(captions),), FPS)
    for step in tqdm(range(steps), mininterval=10):
        batch = train.draw_batch(seed, step, config, clips, fps, latents, schedule)
        train.set_learning_rate(optimizers, step, config)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        with autocast(device):
            batch = [x.to(device) for x in batch]
            losses = train.text_to_video_loss(model, schedule, *words, *batch)
        losses.mean().backward()
        clip_grad_norm_(model.parameters(), config.grad_clip)
        for optimizer in optimizers.values():
            optimizer.step()
        ema.update(model, step)
    parts = ema.model["text_encoder"], ema.model["unet"]
    return Pipeline(tokenizer, *parts, vae, schedule, device)


def clock(device: torch.device) -> float:
    """Seconds: of a CPU those that this program had, as if it had the machine to itself."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def seconds_a_step(arm: dict, world: tuple, device: torch.device) -> float:
    """What 60 steps more cost: not what an arm needs to begin. 20 and 80 have the same share of
    steps with few frames as a long run."""
    times = [clock(device)]
    for steps in (20, 20, 80):  # the first one warms up
        train_arm(arm, steps, 0, *world)
        times.append(clock(device))
    return max(1e-3, (times[3] - 2 * times[2] + times[1]) / 60)


def ablate(checkpoint: str, arms: list[str], minutes: float, seeds: int, clips: int) -> None:
    device = pick_device("auto")
    captions, scenes, videos = make_world(clips)
    vaes = {True: load_autoencoder(checkpoint).to(device)}
    vaes[False] = copy.deepcopy(vaes[True])
    vaes[False].latent_mean.zero_()
    vaes[False].latent_std.fill_(1)
    latents = {normalise: encode(vae, videos, device) for normalise, vae in vaes.items()}
    asked = 2 * captions[: len(CIRCLES)]
    for name in arms:
        arm, found = ARMS[name], []
        normalise = arm.get("normalise", True)
        world = captions, latents[normalise], vaes[normalise], device
        steps = max(1, int(60 * minutes / seconds_a_step(arm, world, device)))
        for seed in range(seeds):
            pipeline = train_arm(arm, steps, seed, *world)
            drawn = pipeline.generate(asked)
            read = caption_accuracy(2 * scenes[: len(CIRCLES)], drawn, FPS)
            found.append([read["colour"], read["order"], read["all"]])
            print_row(arm=name, seed=seed, steps=steps, **read)
        means = np.mean(found, axis=0)
        errors = np.std(found, axis=0, ddof=1) / seeds**0.5 if seeds > 1 else [None] * 3
        print_row(arm=name, seeds=seeds, steps=steps, **{
            key: value for part, mean, error in zip(("colour", "order", "all"), means, errors)
            for key, value in ((part, mean), (f"{part}_error", error))
        })


def parse_args(argv=None):
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--arm", dest="arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM",
        help=f"some of: {', '.join(ARMS)} (all)",
    )
    parser.add_argument(
        "--minutes", type=number(float, 0.0001, 1e5), default=10.0,
        help="of training for each arm and seed, on an idle machine (%(default)g)",
    )
    parser.add_argument(
        "--seeds", type=number(int, 1, 1000), default=3, help="runs of each arm (%(default)s)"
    )
    parser.add_argument(
        "--clips", type=number(int, len(CIRCLES), 10**6), default=15 * len(CIRCLES),
        help="size of the world (%(default)s)",
    )
    parser.add_argument(
        "--checkpoint", default=CHECKPOINT, help="its autoencoder is used (the shipped model)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: ablate(**vars(parse_args())))
