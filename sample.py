"""A sentence in, a video out.

    python sample.py "a red circle moves right, then up"
    python sample.py "a white star spins" --num 4 --seed 7 --format mp4
    python sample.py "a blue ring grows" --checkpoint runs/shapes/model.pt --steps 50 --guidance 2

The same model goes on from given frames (pictures and clips are scaled and cut to its size), and
chunk by chunk for as long as wanted:

    python sample.py "a red circle moves up" --image first.png
    python sample.py "a red circle moves up" --image first.png --last-image last.png
    python sample.py "a red circle moves up" --video clip.mp4
    python sample.py "a red circle moves right" "a red circle moves up" --extend 1

From Python:

    pipeline = load_pipeline("pretrained/shapes.pt")
    videos = pipeline.generate(["a red circle moves right, then up"])  # uint8 (1, 16, 64, 64, 3)

The path of each file written goes to stdout, everything else to stderr.
"""

import argparse
import contextlib
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data import FORMATS, FPS, FRAMES, middle_square, read_frames, read_image
from data import to_model, to_uint8, write_picture, write_video
from diffusion import SAMPLERS, DiffusionConfig, NoiseSchedule
from diffusion import guided, reconstruction_guided, replaced
from shapes import FPS_RANGE
from text_encoder import TextEncoder, TextEncoderConfig, Tokenizer, normalize
from tools import Parser, UserError, autocast, load_checkpoint, number, pack, pick_device
from tools import run_command, unpack
from unet3d import UNet3D, UNet3DConfig, record_attention
from vae import AutoencoderKL, VAEConfig

CHECKPOINT = Path(__file__).parent / "pretrained" / "shapes.pt"
STEPS, SAMPLER, GUIDANCE = 20, "dpm", 4.0
# How the model learns of given frames. mask: beside its input, as in training; the others are for
# models that were trained without: see diffusion.py.
CONDITIONINGS = ("mask", "replacement", "reconstruction")
# Frames that a chunk takes over from the one before. In training all frames do what the caption
# says, so a new sentence is at odds with several frames of the old motion: in 20 stories of "moves
# right", "moves up" and the like, neighbouring frames differed as much at the seam as elsewhere
# with 1, and 1.6 times as much with 4. Where the sentence stays the same ("spins") 4 are as smooth,
# and more of the stories are told. (python tests/experiments.py tasks)
OVERLAP = 1


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

    @property
    def size(self):
        """The sides of a frame in pixels."""
        return self.unet.config.latent_size * self.vae.config.factor

    def denoiser(self, prompts, fps, guidance, rescale, given, mask, conditioning):
        """The guided model(x_t, t) -> output for these prompts, frame rates (b,) and given frames.

        given: clean latents (b, c, f, h, w); mask: bool (b, f), True at the frames given there.
        """
        null = [""] * len(prompts) if guidance != 1 else []
        length = self.text_encoder.config.context_length
        tokens, words = self.tokenizer.batch([*prompts, *null], length, self.device)
        context = self.text_encoder(tokens, words)
        rates = torch.tensor(fps, device=self.device).repeat(len(tokens) // len(prompts))
        shown = ()
        if conditioning == "mask":
            shown = [torch.cat([x, x]) if null else x for x in (given, mask)]

        def denoise(x_t, t):
            return self.unet(x_t, t, context, words, rates, *shown)

        def denoise_pair(x_t, t):
            return denoise(torch.cat([x_t, x_t]), torch.cat([t, t])).chunk(2)

        model = guided(denoise_pair, guidance, rescale) if null else denoise
        if not mask.any():
            return model
        informed = reconstruction_guided if conditioning == "reconstruction" else replaced
        return informed(model, self.schedule, given, mask)

    @torch.no_grad()
    def generate(
        self, prompts, seed=0, frames=FRAMES, fps=FPS, steps=STEPS, sampler=SAMPLER,
        guidance=GUIDANCE, rescale=0.0, batch_size=16, progress=False, given=None,
        conditioning="mask", overlap=OVERLAP,
    ):
        """Videos for a list of prompts: uint8 (len(prompts), f, h, w, 3), f = `frames`.

        Prompt i is drawn with seed + i, so its video does not depend on the others. fps: frames per
        second, which decides how far things move, for all or one for each prompt; guidance: 1 is
        none, larger follows the words more closely; rescale: see `diffusion.guided`; sampler: a key
        of `diffusion.SAMPLERS`.

        given: {number of a frame: picture}, uint8 (h, w, 3) for all prompts or (len(prompts), h, w,
        3); these frames come back as they are. conditioning: one of CONDITIONINGS.

        A prompt may be a story, a list of sentences, as many for each prompt. Each sentence gets a
        chunk of `frames` frames, which begins with the last `overlap` of the chunk before, so that
        f = frames + (sentences - 1) * (frames - overlap). `given` belongs to the first chunk.

        Raises ValueError for an empty prompt or one longer than the text encoder's context, and for
        given frames or an overlap that do not fit.
        """
        stories = [[prompt] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        fps = np.broadcast_to(np.float32(fps), len(stories))
        check_stories(stories, frames, overlap)
        where, pictures = stack_given(given or {}, len(stories), frames, self.size)
        size = self.unet.config.latent_size
        shape = (self.unet.config.channels, frames, size, size)

        def bar(walk):
            return tqdm(walk, desc="sampling", disable=not progress)

        videos = []
        for start in range(0, len(stories), batch_size):
            part = slice(start, start + batch_size)
            noise = seeded_noise(seed + start, len(stories[part]), shape, self.device)

            def draw(sentences, clean, mask):
                model = self.denoiser(
                    sentences, fps[part], guidance, rescale, clean, mask, conditioning
                )
                return SAMPLERS[sampler](
                    model, self.schedule, noise(), steps, randn_like=noise, progress=bar
                )

            clean = torch.zeros(len(stories[part]), *shape, device=self.device)
            with autocast(self.device):
                if where:
                    given_frames = to_model(pictures[part]).to(self.device)
                    clean[:, :, where] = self.vae.encode_video(given_frames)
                latents = draw_chunks(draw, stories[part], clean, where, overlap)
                videos.append(to_uint8(self.vae.decode_video(latents)))
        videos = np.concatenate(videos)
        videos[:, where] = pictures  # their own pixels, not what the autoencoder makes of them
        return videos


def check_stories(stories, frames, overlap):
    """Raises ValueError for stories (lists of sentences) that cannot be drawn."""
    for story in stories:
        if not story or not all(sentence.strip() for sentence in story):
            raise ValueError("the prompt is empty: say what should happen")
        if len(story) != len(stories[0]):
            raise ValueError("every prompt needs the same number of sentences")
        if len(story) > 1 and not 0 < overlap < frames:
            raise ValueError(f"chunks of {frames} frames cannot overlap by {overlap}")


def stack_given(given, videos, frames, size):
    """The given frames' numbers in order and their pictures, uint8 (videos, len(given), size, size,
    3), from `given` as in `Pipeline.generate`. Raises ValueError if they do not fit."""
    where = sorted(given)
    if where and not 0 <= where[0] <= where[-1] < frames:
        raise ValueError(f"given frames {where} are not all among frames 0 to {frames - 1}")
    if len(where) == frames:
        raise ValueError(f"all {frames} frames are given and none is left to draw")
    pictures = np.empty((videos, len(where), size, size, 3), np.uint8)
    for i, frame in enumerate(where):
        picture, one = np.asarray(given[frame]), (size, size, 3)
        if picture.dtype != np.uint8 or picture.shape not in (one, (videos, *one)):
            raise ValueError(f"a given frame is {picture.dtype} {picture.shape}, not uint8 {one}")
        pictures[:, i] = picture
    return where, pictures


def seeded_noise(seed, count, shape, device):
    """A function that draws unit noise (count, *shape), sample i from the seed `seed` + i."""
    # One generator per sample, on the CPU: the same noise for a seed on every device.
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]

    def noise(_=None):
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    return noise


def draw_chunks(draw, stories, clean, where, overlap):
    """The latents of whole stories, each chunk conditioned on the end of the one before.

    draw(sentences, clean, mask): latents of one chunk; clean: latents (b, c, f, h, w) that hold the
    first chunk's given frames at `where`. Returns (b, c, f + (sentences - 1) * (f - overlap), h,
    w).
    """
    b, _, frames = clean.shape[:3]
    mask = torch.zeros(b, frames, dtype=torch.bool, device=clean.device)
    mask[:, where] = True
    chunks = []
    for sentences in zip(*stories):
        latents = draw(sentences, clean, mask)
        chunks.append(latents[:, :, overlap:] if chunks else latents)
        # Latents are handed on, not pixels: a pass through the autoencoder would blur every seam.
        clean = latents.roll(overlap, dims=2)  # the last `overlap` frames come first
        mask = torch.arange(frames, device=clean.device).expand(b, -1) < overlap
    return torch.cat(chunks, dim=2)


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


# ------------------------------------------------------------------------------ word attention


def word_attention(record, tokenizer, prompt):
    """How strongly each frame attended to each word of the prompt of sample 0.

    record: of `unet3d.record_attention` around `Pipeline.generate`. Returns the words and weights
    (words, f): means over layers, heads and denoising steps. What is missing to 1 went to the start
    and end tokens.
    """
    layers = [torch.stack(calls)[:, 0].mean(0) for calls in record.values()]
    weights = torch.stack(layers).mean(0)  # f l
    words, lengths = zip(*tokenizer.words_and_lengths(prompt))
    # A word's weight is the sum over its tokens, of which START is none.
    parts = weights[:, 1 : 1 + sum(lengths)].split(lengths, dim=1)
    return words, torch.stack([part.sum(1) for part in parts]).numpy()


def attention_picture(words, weights, video, cell=48):
    """A table of the frames in a row, and below them for each word how strongly each frame attends
    to it, the brighter the more: uint8 (h, w, 3). weights: (words, f), see `word_attention`."""
    font = ImageFont.load_default(size=16)
    row = cell // 2
    left = max(round(font.getlength(word)) for word in words) + 12
    picture = Image.new("RGB", (left + cell * len(video), cell + row * len(words)))
    draw = ImageDraw.Draw(picture)
    for i, frame in enumerate(video):
        picture.paste(Image.fromarray(frame).resize((cell, cell)), (left + cell * i, 0))
    levels = np.round(255 * weights / weights.max()).astype(int)
    for y, (word, line) in enumerate(zip(words, levels)):
        top = cell + row * y
        draw.text((left - 6, top + row / 2), word, anchor="rm", font=font)
        for i, level in enumerate(line):
            corner = left + cell * i
            draw.rectangle([corner, top, corner + cell - 2, top + row - 2], (level,) * 3)
    return np.asarray(picture)


# ------------------------------------------------------------------------------ command line


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "prompts", nargs="+", metavar="prompt",
        help="what should happen, in words; several are a story for --extend",
    )
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
        "--fps", type=number(float, 0.1, 1000), default=FPS,
        help=f"frames per second, {FPS_RANGE[0]:g} to {FPS_RANGE[1]:g} in training: with fewer, "
        "things move further from frame to frame (%(default)s)",
    )
    group.add_argument(
        "--extend", type=number(int, 1, 1000), default=0, metavar="N",
        help="go on for N more chunks of --frames frames; each begins with the last --overlap "
        "frames of the one before, and follows its own prompt, or the last one",
    )
    add_given_frames(parser.add_argument_group("given frames"))
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
    group.add_argument(
        "--attention", type=Path, metavar="FILE.png",
        help="also draw how strongly each frame attends to each word",
    )
    args = parser.parse_intermixed_args(argv)  # options may stand between the sentences
    check_combination(args, parser.error)
    return args


def add_given_frames(group):
    """The options about frames that are given."""
    group.add_argument("--image", metavar="FILE", help="a picture: the first frame")
    group.add_argument("--last-image", metavar="FILE", help="a picture: the last frame")
    group.add_argument(
        "--video", metavar="FILE", help="a clip: the video begins with its last frames and goes on"
    )
    group.add_argument(
        "--overlap", type=number(int, 1, 511), default=OVERLAP, metavar="N",
        help="frames to take over from --video and from chunk to chunk; 1 lets a new sentence set "
        "off at once, more are smoother where the motion stays the same (%(default)s)",
    )
    group.add_argument(
        "--conditioning", choices=CONDITIONINGS, default=CONDITIONINGS[0],
        help="how the model learns of given frames: mask, beside its input, as it was trained; "
        "replacement or reconstruction guidance for models trained without (%(default)s)",
    )


def check_combination(args, error):
    """Calls error(message) for options that do not go together."""
    given = {0} if args.image else set(range(args.overlap if args.video else 0))
    given |= {args.frames - 1} if args.last_image else set()
    if args.image and args.video:
        error("--image and --video both say how the video begins: give one of them")
    if args.image and args.last_image and args.frames == 1:
        error("--image and --last-image are two frames, and --frames is 1")
    if len(given) >= args.frames:
        error(f"--frames {args.frames}: all are given and none is left to draw")
    if args.last_image and args.extend:
        error("--last-image says how the video ends and --extend goes on: give one of them")
    if args.extend and args.overlap >= args.frames:
        error(f"--overlap {args.overlap} leaves nothing to draw of chunks of {args.frames} frames")
    if len(args.prompts) > 1 + args.extend:
        error(f"{len(args.prompts)} prompts are as many chunks: put a sentence in quotes, or add "
              f"--extend {len(args.prompts) - 1}")
    if args.attention and (args.num > 1 or args.extend):
        error("--attention shows one video of one chunk: leave out --num and --extend")
    if args.attention and args.attention.suffix != ".png":
        error(f"--attention {args.attention}: the file name must end in .png")
    if args.attention == args.out:
        error(f"--attention and --out are both {args.out}")


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
        slug = re.sub(r"\W+", "-", normalize(" ".join(args.prompts))).encode()[:200]
        slug = slug.decode(errors="ignore").strip("-") or "video"
        suffix = args.format or "gif"
        paths = [args.out / f"{slug}-{args.seed + i}.{suffix}" for i in range(args.num)]
    for path in [paths[0], *filter(None, [args.attention])]:
        check_writable(path)
    return paths


def check_writable(path):
    """Fails now rather than after the work, and leaves nothing behind. Raises UserError."""
    try:
        folder = next(p for p in path.absolute().parents if p.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK)) or path.is_dir():
            raise UserError(f"cannot write {path}: choose another name")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def last_frames(count, fps):
    """A `pick` for `read_frames`: up to `count` frames, `fps` a second, and the last is the clip's.

    Raises ValueError if the clip has none, or too few a second for that.
    """
    def pick(times):
        if not len(times):
            raise ValueError("there are no frames in it")
        wanted = times[-1] - np.arange(count)[::-1] / fps
        wanted = wanted[wanted > -0.5 / fps]  # a shorter clip gives what it has
        index = np.abs(times[:, None] - wanted).argmin(0)
        if (np.diff(index) == 0).any():
            rate = (len(times) - 1) / times[-1]
            raise ValueError(f"it has {rate:.1f} frames a second: give --fps {rate:.1f} or less")
        return index

    return pick


def write(path, writer, *what):
    """writer(path, *what), and the path to stdout. Raises UserError if that is impossible."""
    try:
        writer(path, *what)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    print(path)


def read_given(args, size):
    """{number of a frame: picture} of the frames that the command line gives, see `generate`."""
    def read(option, reader, path, *how):
        try:
            return reader(path, *how)
        except ValueError as error:
            raise UserError(f"{option} {path}: {error}") from error

    given = {}
    if args.video:
        pick = last_frames(args.overlap, args.fps)
        clip, _ = read("--video", read_frames, args.video, pick, None)
        given |= {i: middle_square(frame, size) for i, frame in enumerate(clip)}
    if args.image:
        given[0] = read("--image", read_image, args.image, size)
    if args.last_image:
        given[args.frames - 1] = read("--last-image", read_image, args.last_image, size)
    return given


def main():
    args = parse_args()
    paths = output_paths(args)
    pipeline = load_pipeline(args.checkpoint, pick_device(args.device))
    unknown = pipeline.tokenizer.unknown_words(" ".join(args.prompts))
    if unknown:
        words = ", ".join(map(repr, unknown))
        print(f"warning: the model never saw {words} in training and can only guess what is meant",
              file=sys.stderr)
    # The last sentence goes on for as long as there are chunks.
    story = args.prompts + args.prompts[-1:] * (1 + args.extend - len(args.prompts))
    given = read_given(args, pipeline.size)
    recording = record_attention(pipeline.unet) if args.attention else contextlib.nullcontext()
    try:
        with recording as record:
            videos = pipeline.generate(
                [story] * args.num, args.seed, args.frames, args.fps, args.steps, args.sampler,
                args.guidance, progress=True, given=given, conditioning=args.conditioning,
                overlap=args.overlap,
            )
    except ValueError as error:
        raise UserError(error) from error
    for path, video in zip(paths, videos):
        write(path, write_video, video, args.fps, args.upscale)
    if args.attention:
        words, weights = word_attention(record, pipeline.tokenizer, story[0])
        write(args.attention, write_picture, attention_picture(words, weights, videos[0]))


if __name__ == "__main__":
    run_command(main)
