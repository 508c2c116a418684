"""A sentence in, a video out.

    python sample.py "a red circle moves right, then up"
    python sample.py "a white star spins" --num 4 --seed 7 --format mp4
    python sample.py "a blue ring grows" --checkpoint runs/shapes/model.pt --steps 50 --guidance 2
    python sample.py --prompts captions --grid                  # all that the model was trained on

It goes on from given frames (scaled and cut to the model's size), and chunk by chunk:

    python sample.py "a red circle moves up" --image first.png
    python sample.py "a red circle moves up" --image first.png --last-image last.png
    python sample.py "a red circle moves up" --video clip.mp4
    python sample.py "a red circle moves right" "a red circle moves up" --extend 1

From Python:

    pipeline = load_pipeline("pretrained/shapes.pt")
    videos = pipeline.generate(["a red circle moves right, then up"])  # uint8 (1, 16, 64, 64, 3)

The path of each file written goes to stdout, everything else to stderr.
"""

from tools import DEVICES, Parser, UserError, autocast, check_file, check_output, file_name
from tools import fits, load_checkpoint, number, pack, pick_device, printable, read_config, reason
from tools import run_command, unpack

import contextlib
import difflib
import itertools
import math
import os
import re
import sys
import textwrap
import unicodedata
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data import FORMATS, FPS, FRAMES, IMAGES, UCF101, VIDEOS, contact_sheet, evenly, middle_part
from data import read_frames, read_image, read_text, sides, to_model, to_uint8, write_picture
from data import write_video
from diffusion import SAMPLERS, DiffusionConfig, NoiseSchedule
from diffusion import guided, reconstruction_guided, replaced
from text_encoder import TextEncoder, TextEncoderConfig, Tokenizer, normalize
from unet3d import UNet3D, UNet3DConfig, record_attention
from vae import AutoencoderKL, VAEConfig

CHECKPOINT = Path(__file__).parent / "pretrained" / "shapes.pt"
STEPS, SAMPLER, GUIDANCE = 10, "ddpm", 2.5
# Guidance is for where there is more noise than this. With less, what happens is decided, and it
# would only make the picture harsher (Kynkaanniemi 2024, arXiv 2404.07724).
GUIDED_ABOVE = 0.8  # sigma_t
# How the model learns of given frames. mask: beside its input, as in training; the others are for
# models that were trained without: see diffusion.py.
CONDITIONINGS = ("mask", "replacement", "reconstruction")
# Frames that a chunk takes over from the one before. In training all frames do what the caption
# says, so a new sentence is at odds with several frames of the old motion: one makes no jump.
OVERLAP = 1
AT_ONCE = 2**20  # pixels of the clips that are drawn at once: 16 of 16 frames of 64x64


# ------------------------------------------------------------------------------ the pipeline


class Pipeline:
    """Everything between a sentence and its video. Attributes are the modules of the same names.

    data: what the model was trained on, as far as that is known: {"frames": of a clip, "size": of a
    frame in pixels, see `data.sides`, "fps": [lowest, highest], "captions": up to 6,000 of them,
    "form": what they all look like, or ""}.
    """

    precision = None  # of matrix products, as for `tools.autocast`

    def __init__(
        self, tokenizer: Tokenizer, text_encoder: TextEncoder, unet: UNet3D, vae: AutoencoderKL,
        schedule: NoiseSchedule, device: str | torch.device = "cpu", data: dict | None = None,
    ):
        self.device, self.data = torch.device(device), data or {}
        self.tokenizer, self.schedule, self.vae = tokenizer, schedule, vae.to(device)
        self.text_encoder, self.unet = text_encoder.to(device), unet.to(device)
        self.frames, self.size = self.data.get("frames", FRAMES), self.data.get("size", 64)
        low, high = self.data.get("fps", (FPS, FPS))
        self.fps = min(max(FPS, low), high)  # where nothing else is said: the nearest trained one

    def pack(self) -> dict:
        """A checkpoint of plain values and tensors, for `load_pipeline`."""
        parts = ("text_encoder", "unet", "vae")
        return {name: pack(getattr(self, name)) for name in parts} | {
            "tokenizer": self.tokenizer.state_dict(),
            "diffusion": {"config": vars(self.schedule.config)},
            "data": {"size": self.size, **self.data},
        }

    @torch.no_grad()
    def generate(
        self, prompts: list, seed: int = 0, frames: int | None = None,
        fps: float | Sequence[float] | None = None, steps: int = STEPS, sampler: str = SAMPLER,
        guidance: float = GUIDANCE, rescale: float = 0.0, batch_size: int | None = None,
        pictures: dict | None = None, conditioning: str = "mask", overlap: int = OVERLAP,
        watch: Callable | None = None,
    ) -> np.ndarray:
        """Videos for a list of prompts: uint8 (len(prompts), f, h, w, 3), f = `frames`.

        Prompt i is drawn with seed + i, so its video does not depend on the others. fps: frames per
        second, which decides how far things move, for all or one for each prompt; guidance: 1 is
        none, larger follows the words more closely; rescale: see `diffusion.guided`; sampler: a key
        of `diffusion.SAMPLERS`; watch: see there; batch_size: clips at once.

        pictures: {number of a frame: picture}, uint8 (h, w, 3) for all prompts or (len(prompts), h,
        w, 3); these frames come back as they are. conditioning: one of CONDITIONINGS.

        A prompt may be a story, a list of sentences, as many for each prompt. Each sentence gets a
        chunk of `frames` frames, which begins with the last `overlap` of the chunk before, so that
        f = frames + (sentences - 1) * (frames - overlap). `pictures` belong to the first chunk.

        Raises ValueError for prompts, pictures and overlaps that do not fit the model, and where
        its output is not finite.
        """
        stories = [[prompt] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        frames = self.frames if frames is None else frames
        fps = np.broadcast_to(np.float32(self.fps if fps is None else fps), len(stories))
        _, at_once = self.check(stories, frames, overlap)
        batch_size = batch_size or at_once
        where, pictures = stack_pictures(pictures or {}, len(stories), frames, self.size)
        channels, height, width = self.vae.config.latent_shape(*sides(self.size))
        shape = (channels, frames, height, width)
        videos = []
        for start in range(0, len(stories), batch_size):
            part, known, chunks = slice(start, start + batch_size), where, []
            noise = seeded_noise(seed + start, len(stories[part]), shape, self.device)
            given = torch.zeros(len(stories[part]), *shape, device=self.device)
            # One context for all steps: it rounds each weight that may require gradients once.
            with autocast(self.device, self.precision):
                if where:
                    shown = to_model(pictures[part]).to(self.device)
                    given[:, :, where] = self.vae.encode_video(shown)
                for sentences in zip(*stories[part]):
                    model = self.denoiser(
                        sentences, fps[part], guidance, rescale, given, known, conditioning)
                    latents = SAMPLERS[sampler](
                        model, self.schedule, noise(), steps, randn_like=noise, watch=watch)
                    if not latents.isfinite().all():
                        raise ValueError("the output is not finite: is the checkpoint damaged?")
                    new = latents[:, :, overlap if chunks else 0 :]
                    chunks.append(to_uint8(self.vae.decode_video(new)))
                    # The next chunk begins with the last latents, not with pixels: a pass through
                    # the autoencoder would blur every seam.
                    given, known = latents.roll(overlap, dims=2), list(range(overlap))
            videos.append(np.concatenate(chunks, axis=1))
        videos = np.concatenate(videos)
        videos[:, where] = pictures  # their own pixels, not what the autoencoder makes of them
        return videos

    def denoiser(
        self, prompts: Sequence[str], fps: np.ndarray, guidance: float, rescale: float,
        given: torch.Tensor, known: list[int], conditioning: str,
    ) -> Callable:
        """The guided model(x_t, t) -> output for these prompts, frame rates (b,) and given frames.

        given: clean latents (b, c, f, h, w); known: the numbers of the frames to take from them.
        """
        given_mask = torch.zeros(len(given), given.shape[2], dtype=torch.bool, device=self.device)
        given_mask[:, known] = True
        null = [""] * len(prompts) if guidance != 1 else []
        length = self.text_encoder.config.context_length
        tokens, token_mask = self.tokenizer.batch([*prompts, *null], length, self.device)
        context = self.text_encoder(tokens, token_mask)
        rates = torch.tensor(fps, device=self.device).repeat(len(tokens) // len(prompts))
        shown = ()
        if conditioning == "mask":
            shown = [torch.cat([x, x]) if null else x for x in (given, given_mask)]

        def denoise(x_t, t):
            """With the first len(x_t) of the sentences: the prompts, after them the empty ones."""
            words = (part[: len(x_t)] for part in (context, token_mask, rates, *shown))
            return self.unet(x_t, t, *words)

        def denoise_pair(x_t, t):
            return denoise(torch.cat([x_t, x_t]), torch.cat([t, t])).chunk(2)

        strong = guided(denoise_pair, guidance, rescale)

        def where_noisy(x_t, t):
            noisy = self.schedule.alpha_sigma(t, x_t)[1].min() > GUIDED_ABOVE
            return (strong if noisy else denoise)(x_t, t)

        model = where_noisy if null else denoise
        if not known:
            return model
        informed = reconstruction_guided if conditioning == "reconstruction" else replaced
        return informed(model, self.schedule, given, given_mask)

    def check(self, stories: list[list[str]], frames: int, overlap: int) -> tuple[int, int]:
        """How many frames each story (a list of sentences) has, and how many stories to draw at
        once. Raises ValueError for those that cannot be drawn."""
        for story in stories:
            if not story or not all(sentence.strip() for sentence in story):
                raise ValueError("the prompt is empty: say what should happen")
            if len(story) != len(stories[0]):
                raise ValueError("every prompt needs the same number of sentences")
        if len(stories[0]) > 1 and not 0 < overlap < frames:
            raise ValueError(f"chunks of {frames} frames cannot overlap by {overlap}")
        for sentence in dict.fromkeys(itertools.chain(*stories)):
            try:
                self.tokenizer.batch([sentence], self.text_encoder.config.context_length)
            except ValueError as error:
                raise ValueError(f"{sentence!r:.60}: {error}") from error
        length = frames + (len(stories[0]) - 1) * (frames - overlap)
        return length, max(1, AT_ONCE // (length * math.prod(sides(self.size))))


def load_pipeline(path: str | Path = CHECKPOINT, device: str | torch.device = "cpu") -> Pipeline:
    """Rebuild a Pipeline from a checkpoint alone. Raises UserError if it cannot be read."""
    checkpoint = load_checkpoint(path, "tokenizer", "text_encoder", "unet", "vae", "diffusion")
    vae = unpack(AutoencoderKL, VAEConfig, checkpoint["vae"])
    try:
        tokenizer = Tokenizer.from_state_dict(checkpoint["tokenizer"])
        schedule = NoiseSchedule(read_config(DiffusionConfig, checkpoint["diffusion"]["config"]))
        # Where older ones have the size of a frame, as that of its latents.
        size = checkpoint["unet"]["config"].pop("latent_size", 8) * vae.config.factor
        data = check_data({"size": size} | (checkpoint.get("data") or {}), vae.config.factor)
    except Exception as error:  # damaged values fail in many ways
        raise UserError(f"{path} is not a checkpoint of this program: {reason(error)}") from error
    text_encoder = unpack(TextEncoder, TextEncoderConfig, checkpoint["text_encoder"])
    if tokenizer.vocab_size > text_encoder.config.vocab_size:  # on a GPU the process would end
        raise UserError(f"{path}: the tokenizer has more tokens than the text encoder knows")
    unet = unpack(UNet3D, UNet3DConfig, checkpoint["unet"])
    if (unet.config.channels, unet.config.text_width) != (
            vae.config.latent_channels, text_encoder.config.width):
        raise UserError(f"{path}: the UNet's channels or text_width are not those of its inputs")
    return Pipeline(tokenizer, text_encoder, unet, vae, schedule, device, data)


def load_autoencoder(path: str | Path) -> AutoencoderKL:
    """The autoencoder of a checkpoint, vae.pt or model.pt. Raises UserError."""
    return unpack(AutoencoderKL, VAEConfig, load_checkpoint(path, "vae")["vae"])


def check_data(data: dict, factor: int) -> dict:
    """A checkpoint's "data" as in `Pipeline`; the sides of its size are multiples of `factor`.
    Raises ValueError."""
    (width, height), (low, high) = sides(data["size"]), data.get("fps", (FPS, FPS))
    if not (fits((width, height), (1, 1), 4096) and width % factor == height % factor == 0
            and fits(data.get("frames", FRAMES), FRAMES, 512) and 0.1 <= low <= high <= 1000
            and isinstance(data.get("captions", []), list)
            and all(isinstance(x, str) for x in (data.get("form", ""), *data.get("captions", ())))):
        raise ValueError("its size, frames, fps or captions of the training data cannot be")
    return data | {"size": width if width == height else (width, height)}


def stack_pictures(
    pictures: dict, videos: int, frames: int, size: int | tuple
) -> tuple[list[int], np.ndarray]:
    """The numbers of the given frames in order, and their pictures, uint8 (videos, len(pictures),
    h, w, 3), from `pictures` as in `Pipeline.generate`. ValueError if they do not fit."""
    where = sorted(pictures)
    if where and not 0 <= where[0] <= where[-1] < frames:
        raise ValueError(f"given frames {where} are not all among frames 0 to {frames - 1}")
    if len(where) == frames:
        raise ValueError(f"all {frames} frames are given and none is left to draw")
    one = (*sides(size)[::-1], 3)
    stacked = np.empty((videos, len(where), *one), np.uint8)
    for i, frame in enumerate(where):
        picture = np.asarray(pictures[frame])
        if picture.dtype != np.uint8 or picture.shape not in (one, (videos, *one)):
            raise ValueError(f"a given frame is {picture.dtype} {picture.shape}, not uint8 {one}")
        stacked[:, i] = picture
    return where, stacked


def seeded_noise(seed: int, count: int, shape: tuple, device: torch.device) -> Callable:
    """A function that draws unit noise (count, *shape), sample i from the seed `seed` + i."""
    # One generator per sample, on the CPU: the same noise for a seed on every device.
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]

    def noise(_=None):
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    return noise


# ------------------------------------------------------------------------------ pictures


def word_attention(record: dict, tokenizer: Tokenizer, prompt: str) -> tuple:
    """How strongly each frame attended to each word of the prompt of sample 0: the words, and
    weights (words, f), means over layers, heads and steps. What is missing to 1 went to the start
    and end tokens. record: of `unet3d.record_attention` around `Pipeline.generate`.
    """
    layers = [torch.stack([call[0] for call in calls]).mean(0) for calls in record.values()]
    weights = torch.stack(layers).mean(0)  # f l
    words, lengths = zip(*tokenizer.words_and_lengths(prompt))
    # A word's weight is the sum over its tokens, of which START is none.
    parts = weights[:, 1 : 1 + sum(lengths)].split(lengths, dim=1)
    return words, torch.stack([part.sum(1) for part in parts]).numpy()


def attention_picture(
    words: tuple, weights: np.ndarray, video: np.ndarray, cell: int = 48
) -> np.ndarray:
    """A table of the frames in a row, and below them for each word how strongly each frame attends
    to it, the brighter the more: uint8 (h, w, 3). weights: (words, f), see `word_attention`."""
    width, height = cell * len(video), cell // 2 * len(words)
    frames = Image.fromarray(np.concatenate(video, axis=1)).resize((width, cell))
    levels = Image.fromarray(np.round(255 * weights / weights.max()).astype(np.uint8))
    font = ImageFont.load_default(size=16)
    left = max(round(font.getlength(word)) for word in words) + 12
    picture = Image.new("RGB", (left + width, cell + height))
    picture.paste(frames, (left, 0))
    picture.paste(levels.resize((width, height), Image.Resampling.NEAREST), (left, cell))
    for y, word in enumerate(words):
        place = left - 6, cell + cell // 2 * y + cell // 4
        ImageDraw.Draw(picture).text(place, word, anchor="rm", font=font)
    return np.asarray(picture)


def captioned_grid(videos: np.ndarray, captions: list) -> np.ndarray:
    """Videos side by side, each above its caption: uint8 (n, f, h, w, 3) -> (f, H, W, 3)."""
    n, frames, height, width, _ = videos.shape
    columns = math.ceil(n**0.5)
    labels = ["\n".join(textwrap.wrap(text, max(width // 7, 4))) for text in captions]
    strip = 6 + 17 * max(label.count("\n") + 1 for label in labels)
    cells = np.zeros((-(-n // columns) * columns, frames, height + strip, width, 3), np.uint8)
    cells[:n, :, :height] = videos
    for cell, label in zip(cells, labels):
        picture = Image.new("RGB", (width, strip))
        ImageDraw.Draw(picture).text((3, 1), label, font=ImageFont.load_default(size=13))
        cell[:, height:] = picture
    return rearrange(cells, "(r q) f h w c -> f (r h) (q w) c", q=columns)


def write_denoising(path: Path, believed: np.ndarray) -> None:
    """What the model believes the clip to be at steps of sampling, uint8 (steps, f, h, w, 3):
    a .gif that shows the steps one after the other, or a .png with a row for each of up to 8."""
    if path.suffix == ".gif":
        sheets = [contact_sheet(clip, min(4, len(clip))) for clip in believed]
        return write_video(path, np.stack(sheets), fps=4, upscale=2)
    steps, frames = (np.linspace(0, n - 1, min(n, 8)).astype(int) for n in believed.shape[:2])
    rows = rearrange(believed[steps][:, frames], "s f h w c -> (s h) (f w) c")
    write_picture(path, rows.repeat(2, axis=0).repeat(2, axis=1))


# ------------------------------------------------------------------------------ warnings

UNLIKE = 20  # levels of 255 that the autoencoder is wrong by where pictures are of another kind


def grams(sentence: str) -> list[tuple]:
    """Its words and marks by none, one, two and three, with "" for its beginning and end; and a
    pair with itself of each that comes twice."""
    parts = ["", *re.findall(r"\w+|[.,]", sentence.lower()), ""]
    twice = [(part, part) for part, count in Counter(parts[1:-1]).items() if count > 1]
    pairs, threes = zip(parts, parts[1:]), zip(parts, parts[1:], parts[2:])
    return [*[()] * len(parts), *zip(parts), *pairs, *threes, *twice]


def is_new(gram: tuple, counts: Counter) -> bool:
    """Is this in no caption, though five of them should have it by chance? counts: of the
    captions' grams; of the empty one, the number of all words and marks."""
    if counts[gram] or len(gram) < 2:
        return False
    first, second, both = gram[:-1], gram[1:], gram[1:-1]
    if gram == second * 2:  # anywhere in a caption, of which each has two ""
        both = ("",)
    return counts[first] * counts[second] >= 5 * counts[both]


@torch.no_grad()
def warnings_about(
    pipeline: Pipeline, args: Namespace, stories: list[list[str]], pictures: dict
) -> Iterator[str]:
    """Yields a line for everything that is asked for and was not trained."""
    sentences, data = list(dict.fromkeys(itertools.chain(*stories))), pipeline.data
    known, near = sorted(pipeline.tokenizer.words), []
    for word in pipeline.tokenizer.unknown_words(" ".join(sentences))[:9]:
        like = [other for other in known if other[0] == word[0]] if len(word) > 3 else []
        close = difflib.get_close_matches(word, like, 1, 0.7)
        near.append(f"{word!r} (did you mean {close[0]!r}?)" if close else repr(word))
    if near:
        yield f"the model never saw {', '.join(near)} in training and can only guess what is meant"
    captions = data.get("captions", ())
    new = [s for s in sentences if s not in captions and not pipeline.tokenizer.unknown_words(s)]
    if new:  # counting takes a tenth of a second
        counts = Counter(itertools.chain(*map(grams, captions)))
        new = [s for s in new if any(is_new(gram, counts) for gram in grams(s))]
    for sentence in new[:3] if captions else ():
        like = map(repr, difflib.get_close_matches(sentence.lower(), captions, 2, 0))
        yield f"no sentence in training is built like {sentence!r}; there are {' or '.join(like)}"
    if (near or new) and data.get("form"):
        yield f"what it understands looks like this: {data['form']}"
    low, high = (round(rate, 1) for rate in data.get("fps", (0, math.inf)))
    for outside, line in (
        (not low <= round(args.fps, 1) <= high,
         f"--fps {args.fps:g}: in training {low:g} to {high:g}"),
        (args.frames != data.get("frames", args.frames),
         f"--frames {args.frames}: in training {pipeline.frames}"),
        (args.guidance > 8, f"--guidance {args.guidance:g}: above 8 the picture suffers"),
        (args.steps < 5, f"--steps {args.steps}: with fewer than 5 the picture is blurred"),
    ):
        if outside:
            yield line
    if pictures:
        shown = np.stack(list(pictures.values()))[None]
        latents = pipeline.vae.encode_video(to_model(shown).to(pipeline.device))
        again = to_uint8(pipeline.vae.decode_video(latents))
        if np.square(again - shown.astype(float)).mean() > UNLIKE**2:
            yield "what is given looks unlike anything in training: it may soon be dropped"


# ------------------------------------------------------------------------------ command line


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("prompt", nargs="*", help="what should happen, in words; several are a story for --extend")
    add("--prompts", metavar="FILE", help="draw each line of a text file; or `captions`: those "
        "that the model was trained on")
    add("--words", action="store_true", help="list the words and captions that the model knows")
    add("--checkpoint", default=CHECKPOINT, help="a model.pt (the shipped one)")
    add("--device", default="auto", choices=DEVICES)
    add = parser.add_argument_group("what to draw").add_argument
    add("--num", type=number(int, 1, 10_000), default=1, help="videos of each prompt (%(default)s)")
    add("--seed", type=number(int, 0, 2**62), default=0, help="video i is drawn with seed + i")
    add("--frames", type=number(int, 1, 512), help="(as in training)")
    add("--fps", type=number(float, 0.1, 1000), help="frames per second: with fewer, things move "
        f"further from frame to frame ({FPS:g}, or the nearest in training)")
    add("--extend", type=number(int, 1, 1000), default=0, metavar="N", help="go on for N more "
        "chunks, each with its own prompt, or the last one")
    add = parser.add_argument_group("given frames").add_argument
    add("--image", metavar="FILE", help="a picture: the first frame")
    add("--last-image", metavar="FILE", help="a picture: the last frame")
    add("--video", metavar="FILE", help="a clip to go on from: its last frames")
    add("--overlap", type=number(int, 1, 511), default=OVERLAP, metavar="N",
        help="frames to take over from --video, and from chunk to chunk (%(default)s)")
    add("--conditioning", choices=CONDITIONINGS, default="mask",
        help="mask as in training; the others for models trained without (%(default)s)")
    add = parser.add_argument_group("how to draw it").add_argument
    add("--steps", type=number(int, 1, 1000), default=STEPS, help="of denoising (%(default)s)")
    add("--sampler", choices=list(SAMPLERS), default=SAMPLER, help="(%(default)s)")
    add("--guidance", type=number(float, 0, 100), default=GUIDANCE,
        help="how closely to follow the words; 1 is no guidance (%(default)s)")
    add("--batch-size", type=number(int, 1, 10_000), metavar="N", help="videos at once (by size)")
    add = parser.add_argument_group("where to put it").add_argument
    add("--out", type=Path, default=Path("samples"),
        help="a folder, or for one video a file name ending in .gif, .mp4 or .png (samples/)")
    add("--format", choices=[f[1:] for f in FORMATS], help="png is a sheet of frames (gif)")
    add("--upscale", type=number(int, 1, 64), default=4, help="enlarge for viewing (%(default)s)")
    add("--grid", action="store_true", help="all videos in one, with their captions")
    picture = file_name(".gif", ".png")
    add("--attention", type=picture, metavar="FILE.png", help="draw each frame's attention to each "
        "word, too")
    add("--denoising", type=picture, metavar="FILE.gif", help="draw what the model believes the "
        "clip to be at each step, too; or FILE.png")
    args = parser.parse_intermixed_args(argv)  # options may stand between the sentences
    if bool(args.prompt) + (args.prompts is not None) + args.words != 1:
        parser.error("give one of: what should happen, in quotes; --prompts FILE; --words")
    return args


def check_options(args: Namespace) -> None:
    """Raises UserError for files that cannot be read or written, and for options that do not go
    together, as far as can be told without the checkpoint."""
    prompts = None if args.prompts == "captions" else args.prompts
    for path in (prompts, args.image, args.last_image, args.video):
        try:
            if path is not None and not os.path.isdir(path):  # a folder of frames is a clip
                check_file(path)
        except ValueError as error:
            raise UserError(f"{path!r}: {error}") from error
    out, suffix, more = f"--out {args.out}", args.out.suffix.lower(), len(args.prompt) - 1
    several = args.num > 1 or args.prompts is not None
    extras = list(filter(None, (args.attention, args.denoising)))
    for wrong, message in (
        (suffix in (*VIDEOS, *IMAGES) and suffix not in FORMATS,
         f"{out}: the formats are {', '.join(FORMATS)}"),
        (suffix in FORMATS and several and not args.grid,
         f"{out} is one file: give a folder, or add --grid"),
        (suffix in FORMATS and args.format and suffix != f".{args.format}",
         f"{out} does not end in .{args.format}"),
        (args.image and args.video, "--image and --video both say how the video begins"),
        (args.last_image and args.extend,
         "--last-image says how the video ends, --extend goes on"),
        (more > args.extend,
         f"{more + 1} prompts: put a sentence in quotes, or add --extend {more}"),
        (extras and (several or args.extend),
         "--attention and --denoising show one clip: no --num, --prompts or --extend"),
    ):
        if wrong:
            raise UserError(message)
    if suffix not in FORMATS and args.out.exists() and not args.out.is_dir():
        raise UserError(f"{out} is neither a folder nor a {', '.join(FORMATS)} file")
    for path in (args.out if suffix in FORMATS else args.out / "video.gif", *extras):
        check_output(path)


def read_prompts(path: str | Path, most: int = 10_000) -> list[str]:
    """The sentences of a text file, one a line, from 1 to `most`. Raises UserError."""
    try:
        lines = [line.strip() for line in read_text(path, 2**24).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts {path}: {reason(error)}") from error
    if not 0 < len(lines) <= most:
        raise UserError(f"--prompts {path}: {len(lines)} sentences, of 1 to {most}")
    return lines


def read_stories(args: Namespace, captions: Sequence[str]) -> list[list[str]]:
    """A list of sentences for each video, from the command line. Raises UserError."""
    if args.prompts is not None:
        lines = captions if args.prompts == "captions" else read_prompts(args.prompts)
        if not 0 < len(lines) * args.num <= 10_000:
            raise UserError(f"--prompts {args.prompts}: {len(lines)} sentences with {args.num} "
                            "videos each, and it takes 1 to 10000 videos")
        stories = [[line] * (1 + args.extend) for line in lines for _ in range(args.num)]
    else:  # the last sentence goes on for as long as there are chunks
        more = args.prompt[-1:] * (1 + args.extend - len(args.prompt))
        stories = [args.prompt + more] * args.num
    known = set("".join(captions))
    # A class of UCF-101, by the sentence that stands for it in training.
    return [[UCF101.get(line.strip()) or without_marks(line, known) for line in story]
            for story in stories]


def without_marks(sentence: str, known: set[str]) -> str:
    """Marks and symbols that no caption has become spaces: "a-red-circle" is "a red circle". known:
    the characters of the captions; where there is none, nothing is said about them."""
    if not known:
        return sentence
    told = "".join(char if char in known or unicodedata.category(char)[0] not in "PS" else " "
                   for char in sentence)  # fmt: skip
    return told if told.strip() else sentence


def output_paths(args: Namespace, stories: list[list[str]]) -> list[Path]:
    """The file of each video, or of --grid. Raises UserError where one would replace an input."""
    paths = [args.out]
    if args.out.suffix.lower() not in FORMATS:
        paths, end = [], f"{'-grid' * args.grid}.{args.format or 'gif'}"
        for i, story in enumerate(stories[:1] if args.grid else stories):
            # \w keeps letters of every script; file systems take names of up to 255 bytes.
            slug = re.sub(r"\W+", "-", normalize(" ".join(dict.fromkeys(story)))).strip("-")
            slug = slug.encode(errors="replace")[:200].decode(errors="ignore") or "video"
            paths.append(args.out / f"{slug}-{args.seed + i}{end}")
    outputs = [*paths, *filter(None, (args.attention, args.denoising))]
    if len(set(map(os.path.abspath, outputs))) < len(outputs):
        raise UserError("--out, --attention and --denoising are both the same file")
    inputs = (args.checkpoint, args.prompts, args.image, args.last_image, args.video)
    for path in outputs:
        check_output(path, *inputs)
    return paths


def last_frames(times: np.ndarray, count: int, fps: float) -> np.ndarray:
    """Which frames of a clip to go on from, for `read_frames`: up to `count`, `fps` a second, and
    the last is the clip's. Raises ValueError if the clip has none, or too few a second for that."""
    if not len(times):
        raise ValueError("there are no frames in it")
    wanted = times[-1] - np.arange(count)[::-1] / fps
    wanted = wanted[wanted > -0.5 / fps]  # a shorter clip gives what it has
    index = np.abs(times[:, None] - wanted).argmin(0)
    if (np.diff(index) == 0).any():
        rate = (len(times) - 1) / times[-1]
        raise ValueError(f"it has {rate:.1f} frames a second: give --fps {rate:.1f} or less")
    return index


def read_given(args: Namespace, size: int | tuple) -> dict[int, np.ndarray]:
    """{number of a frame: picture} of the frames that the command line gives, see `generate`."""
    pictures = {}
    for option, first in (("video", 0), ("image", 0), ("last_image", args.frames - 1)):
        path = vars(args)[option]
        if path is None:
            continue
        try:
            if option == "video":
                clip, _ = read_frames(path, lambda x: last_frames(x, args.overlap, args.fps), None)
                pictures |= {i: middle_part(frame, size) for i, frame in enumerate(clip)}
            else:
                pictures[first] = read_image(path, size)
        except ValueError as error:
            raise UserError(f"--{option.replace('_', '-')} {path}: {error}") from error
    return pictures


def write(path: Path, writer: Callable, *what: object) -> None:
    """writer(path, *what), and the path to stdout. Raises UserError if that is impossible."""
    try:
        writer(path, *what)
    except Exception as error:  # a full disk, to Pillow and ffmpeg, is many things
        raise UserError(f"cannot write {path}: {reason(error)}") from error
    tqdm.write(printable(path))  # not into the middle of the progress bar


def draw_all(
    args: Namespace, pipeline: Pipeline, stories: list[list[str]], pictures: dict, paths: list[Path]
) -> None:
    """Draws the videos and writes what the command line asks for, batch by batch."""
    batches, beliefs, grid = range(0, len(stories), args.batch_size), [], []
    bar = tqdm(desc="sampling", total=len(batches) * len(stories[0]) * args.steps)
    shown = np.linspace(0, args.steps - 1, min(args.steps, 32)).astype(int)

    def watch(step, t, x_t, x_start):
        bar.update()
        if args.denoising and step in shown:
            beliefs.append(x_start)

    recording = record_attention(pipeline.unet) if args.attention else contextlib.nullcontext()
    with recording as record, bar:
        for start in batches:
            videos = pipeline.generate(
                stories[start : start + args.batch_size], seed=args.seed + start,
                frames=args.frames, fps=args.fps, steps=args.steps, sampler=args.sampler,
                guidance=args.guidance, batch_size=args.batch_size, watch=watch,
                pictures=pictures, conditioning=args.conditioning, overlap=args.overlap)
            if args.grid:
                grid.append(videos)
                continue
            for path, video in zip(paths[start:], videos):
                write(path, write_video, video, args.fps, args.upscale)
    if args.grid:
        large = np.concatenate(grid).repeat(args.upscale, 2).repeat(args.upscale, 3)
        labels = [", then: ".join(dict.fromkeys(story)) for story in stories]
        write(paths[0], write_video, captioned_grid(large, labels), args.fps)
    if args.attention:
        words, weights = word_attention(record, pipeline.tokenizer, stories[0][0])
        write(args.attention, write_picture, attention_picture(words, weights, videos[0]))
    if args.denoising:
        with torch.no_grad():
            believed = np.concatenate([to_uint8(pipeline.vae.decode_video(x)) for x in beliefs])
        write(args.denoising, write_denoising, believed)


def main() -> None:
    """The command: prints the path of each file."""
    args = parse_args()
    check_options(args)
    pipeline = load_pipeline(args.checkpoint, pick_device(args.device))
    captions = pipeline.data.get("captions", ())
    if args.words:
        lines = ["words: " + " ".join(sorted(pipeline.tokenizer.words))]
        lines += [f"form: {form}"] if (form := pipeline.data.get("form")) else []
        lines += [f"{len(captions)} captions, such as:", *evenly(captions, 20)]
        print(*map(printable, lines), sep="\n")
        return
    args.frames, args.fps = args.frames or pipeline.frames, args.fps or pipeline.fps
    stories = read_stories(args, captions)
    paths = output_paths(args, stories)
    pictures = read_given(args, pipeline.size)
    try:
        length, at_once = pipeline.check(stories, args.frames, args.overlap)
        stack_pictures(pictures, 0, args.frames, pipeline.size)
        pipeline.schedule.timesteps(args.steps)
        width, height = (side * args.upscale for side in sides(pipeline.size))
        # Bytes of the pixels, of a grid of its copies as well: more fill the memory.
        if 3 * length * width * height * (4 * len(stories) if args.grid else 1) > 2**30:
            raise UserError(f"one file of {length} frames of {width}x{height} pixels is too large: "
                            "lower --upscale, --frames or --extend, or leave out --grid")
        for line in warnings_about(pipeline, args, stories, pictures):
            print(f"warning: {printable(line)}", file=sys.stderr)
        args.batch_size = args.batch_size or at_once
        draw_all(args, pipeline, stories, pictures, paths)
    except ValueError as error:
        raise UserError(error) from error


if __name__ == "__main__":
    run_command(main)
