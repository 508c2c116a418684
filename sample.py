"""A sentence in, a video out.

    python sample.py "a red circle moves right, then up"
    python sample.py "a white star spins" --num 4 --seed 7 --format mp4
    python sample.py "a blue ring grows" --checkpoint runs/shapes/model.pt --steps 50 --guidance 2

From Python:

    pipeline = load_pipeline("pretrained/shapes.pt")
    videos = pipeline.generate(["a red circle moves right, then up"])  # uint8 (1, 16, 64, 64, 3)

The path of each file written goes to stdout, everything else to stderr.
"""

import argparse
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import FORMATS, FPS, FRAMES, to_uint8, write_video
from diffusion import SAMPLERS, DiffusionConfig, NoiseSchedule, guided
from text_encoder import TextEncoder, TextEncoderConfig, Tokenizer, normalize
from unet3d import UNet3D, UNet3DConfig
from vae import AutoencoderKL, VAEConfig

CHECKPOINT = Path(__file__).parent / "pretrained" / "shapes.pt"
STEPS, SAMPLER, GUIDANCE = 20, "dpm", 4.0


# ------------------------------------------------------------------------------ command-line
# manners


class UserError(Exception):
    """A mistake of the user's: shown as one line, exit status 2."""


def run_command(command):
    """Call `command()` for a command line: a UserError ends it with one line and exit status 2."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without argparse's summary of every option."""

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the options)\n")


def number(kind, low, high):
    """An argparse type: int or float from `low` to `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            name = {int: "a whole number", float: "a number"}[kind]
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low} to {high}")
        return value

    return parse


def pick_device(name):
    """"auto", "cpu" or "cuda" -> torch.device. Raises UserError where there is no CUDA GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(device, precision=None):
    """bfloat16 autocast where the hardware multiplies bfloat16 matrices: recent GPUs, and CPUs with
    AMX tiles. With AVX-512 alone float32 was faster: 282 against 137 GFLOP/s on 2 cores.

    precision: "bf16" or "fp32" instead, whatever the hardware."""
    if precision is not None:
        fast = precision == "bf16"
    elif device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


# ------------------------------------------------------------------------------ checkpoints


def load_checkpoint(path, *parts):
    """Read a checkpoint that holds at least the named parts. Raises UserError otherwise."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: check the path, or train one with train.py")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a foreign pickle, one error says enough
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated archives and foreign files fail in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise UserError(f"{path} is not a readable checkpoint ({reason})") from error
    missing = [p for p in parts if not isinstance(checkpoint, dict) or p not in checkpoint]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}: it is not a checkpoint of this kind")
    return checkpoint


def pack(model):
    """A model as plain values and tensors: its config and its weights."""
    return {"config": vars(model.config), "state": model.state_dict()}


def unpack(model_class, config_class, packed):
    """The inverse of `pack`: rebuild a model from a checkpoint alone, in float32."""
    try:
        model = model_class(config_class(**packed["config"]))
        model.load_state_dict(packed["state"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:80]
        name = model_class.__name__
        raise UserError(f"the checkpoint's {name} does not fit this program ({reason})") from error
    return model.float().eval()


# ------------------------------------------------------------------------------ the pipeline


class Pipeline:
    """Everything between a sentence and its video. Attributes are the modules of the same names."""

    def __init__(self, tokenizer, text_encoder, unet, vae, schedule, device="cpu"):
        self.device = torch.device(device)
        self.tokenizer = tokenizer
        self.text_encoder, self.unet = text_encoder.to(device), unet.to(device)
        self.vae, self.schedule = vae.to(device), schedule.to(device)

    def pack(self):
        """The whole pipeline as a checkpoint of plain values and tensors; `load_pipeline` reads
        it."""
        parts = ("text_encoder", "unet", "vae")
        return {name: pack(getattr(self, name)) for name in parts} | {
            "tokenizer": self.tokenizer.state_dict(),
            "diffusion": {"config": vars(self.schedule.config)},
        }

    def denoiser(self, prompts, fps, guidance, rescale):
        """The guided model(x_t, t) -> output for these prompts."""
        null = [""] * len(prompts) if guidance != 1 else []
        length = self.text_encoder.config.context_length
        tokens, mask = self.tokenizer.batch(prompts + null, length, self.device)
        context = self.text_encoder(tokens, mask)
        rates = torch.full((len(tokens),), float(fps), device=self.device)

        def denoise(x_t, t):
            return self.unet(x_t, t, context, mask, rates)

        if not null:
            return denoise
        return guided(
            lambda x_t, t: denoise(torch.cat([x_t, x_t]), torch.cat([t, t])).chunk(2),
            guidance, rescale,
        )

    @torch.no_grad()
    def generate(
        self, prompts, seed=0, frames=FRAMES, fps=FPS, steps=STEPS, sampler=SAMPLER,
        guidance=GUIDANCE, rescale=0.0, batch_size=16, progress=False,
    ):
        """Videos for a list of prompts: uint8 (len(prompts), frames, h, w, 3).

        Prompt i is drawn with seed + i, so its video does not depend on the others. fps: frames per
        second, which decides how far things move; guidance: 1 is none, larger follows the words
        more closely; rescale: see `diffusion.guided`; sampler: a key of `diffusion.SAMPLERS`.
        Raises ValueError for an empty prompt or one longer than the text encoder's context.
        """
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError("the prompt is empty: say what should happen")
        size = self.unet.config.latent_size
        shape = (self.unet.config.channels, frames, size, size)
        videos = []
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            # One generator per sample, on the CPU: the same noise for a seed on every device.
            seeds = range(seed + start, seed + start + len(batch))
            generators = [torch.Generator().manual_seed(s) for s in seeds]

            def noise(_=None):
                draws = [torch.randn(shape, generator=g) for g in generators]
                return torch.stack(draws).to(self.device)

            def bar(walk):
                return tqdm(walk, desc="sampling", disable=not progress)

            with autocast(self.device):
                model = self.denoiser(batch, fps, guidance, rescale)
                latents = SAMPLERS[sampler](
                    model, self.schedule, noise(), steps, randn_like=noise, progress=bar
                )
                videos.append(to_uint8(self.vae.decode_video(latents)))
        return np.concatenate(videos)


def load_pipeline(path=CHECKPOINT, device="cpu"):
    """Rebuild a Pipeline from a checkpoint alone. Raises UserError if it cannot be read."""
    checkpoint = load_checkpoint(path, "tokenizer", "text_encoder", "unet", "vae", "diffusion")
    try:
        tokenizer = Tokenizer.from_state_dict(checkpoint["tokenizer"])
        schedule = NoiseSchedule(DiffusionConfig(**checkpoint["diffusion"]["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} was written by another version of this program") from error
    return Pipeline(
        tokenizer,
        unpack(TextEncoder, TextEncoderConfig, checkpoint["text_encoder"]),
        unpack(UNet3D, UNet3DConfig, checkpoint["unet"]),
        unpack(AutoencoderKL, VAEConfig, checkpoint["vae"]),
        schedule,
        device,
    )


# ------------------------------------------------------------------------------ command line


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", help="what should happen, in words")
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="a model.pt (the shipped one)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    group = parser.add_argument_group("what to draw")
    group.add_argument("--num", type=number(int, 1, 10_000), default=1, help="videos (%(default)s)")
    group.add_argument(
        "--seed", type=number(int, 0, 2**62), default=0,
        help="video i is drawn with seed + i (%(default)s)",
    )
    group.add_argument("--frames", type=number(int, 1, 512), default=FRAMES, help="(%(default)s)")
    group.add_argument(
        "--fps", type=number(float, 0.1, 240), default=FPS,
        help="frames per second, 6 to 12 in training: fewer get further (%(default)s)",
    )
    group = parser.add_argument_group("how to draw it")
    group.add_argument(
        "--steps", type=number(int, 1, 1000), default=STEPS, help="denoising steps (%(default)s)"
    )
    group.add_argument("--sampler", choices=list(SAMPLERS), default=SAMPLER, help="(%(default)s)")
    group.add_argument(
        "--guidance", type=number(float, 0, 100), default=GUIDANCE,
        help="how closely to follow the words; 1 is no guidance (%(default)s)",
    )
    group = parser.add_argument_group("where to put it")
    group.add_argument(
        "--out", type=Path, default=Path("samples"),
        help="a folder, or for one video a file name ending in .gif, .mp4 or .png (samples/)",
    )
    group.add_argument(
        "--format", choices=[f[1:] for f in FORMATS],
        help="gif, mp4, or png: a contact sheet of the frames (gif)",
    )
    group.add_argument(
        "--upscale", type=number(int, 1, 64), default=4,
        help="enlarge for viewing, nearest neighbour (%(default)s)",
    )
    return parser.parse_args(argv)


def output_paths(args):
    """The file of each video. Raises UserError where --out does not fit or cannot be written."""
    if args.out.suffix.lower() in (".avi", ".jpg", ".jpeg", ".mkv", ".mov", ".webm", ".webp"):
        raise UserError(f"--out {args.out}: the formats are {', '.join(FORMATS)}")
    if args.out.suffix in FORMATS:
        if args.num > 1:
            raise UserError(f"--out {args.out} is one file and --num {args.num} asks for more: "
                            "give a folder")
        if args.format and args.out.suffix != f".{args.format}":
            raise UserError(f"--out {args.out} does not end in .{args.format}")
        paths = [args.out]
    else:
        # \w keeps letters of every script; file systems take names of up to 255 bytes.
        slug = re.sub(r"\W+", "-", normalize(args.prompt)).encode()[:200].decode(errors="ignore")
        slug = slug.strip("-") or "video"
        suffix = args.format or "gif"
        paths = [args.out / f"{slug}-{args.seed + i}.{suffix}" for i in range(args.num)]
    try:  # fails now rather than after the work, and leaves nothing behind
        folder = next(p for p in paths[0].absolute().parents if p.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK)) or paths[0].is_dir():
            raise UserError(f"cannot write {paths[0]}: choose another --out")
    except OSError as error:
        raise UserError(f"cannot write {paths[0]}: {error.strerror}") from error
    return paths


def main():
    args = parse_args()
    paths = output_paths(args)
    pipeline = load_pipeline(args.checkpoint, pick_device(args.device))
    unknown = pipeline.tokenizer.unknown_words(args.prompt)
    if unknown:
        words = ", ".join(map(repr, unknown))
        print(f"warning: the model never saw {words} in training and can only guess what is meant",
              file=sys.stderr)
    try:
        videos = pipeline.generate(
            [args.prompt] * args.num, args.seed, args.frames, args.fps, args.steps, args.sampler,
            args.guidance, progress=True,
        )
    except ValueError as error:
        raise UserError(error) from error
    for path, video in zip(paths, videos):
        try:
            write_video(path, video, args.fps, args.upscale)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        print(path)


if __name__ == "__main__":
    run_command(main)
