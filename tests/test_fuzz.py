"""Bad inputs by the thousand: each gives the right result, or one line and exit status 2; no
traceback, no hang, bounded memory, no half-written file, and the inputs as they were.

    python -m pytest tests/test_fuzz.py --inputs 5000      # of all kinds together; takes an hour

A kind is a function (rng, good) -> (module, arguments, {name of a file: content, or None for a
pipe}), where `good` has files that are as they should be. Input i of a kind is drawn by the seed
"kind i", so that each is the same in every run.
"""

import csv
import functools
import io
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import sys
import traceback
import warnings
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_metrics import Stub
from test_train import tiny_preset

import data
import metrics
import sample
import train
import vae
from data import write_video
from tools import UserError, memory_gib, printable

SECONDS, GIB = 30, 1  # that one input may take
KINDS = {}


def kind(function):
    KINDS[function.__name__] = function
    return function


# ------------------------------------------------------------------------------ good files


def encoded(video, form, codec):
    """The bytes of a video file."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return file.getvalue()


def picture(frames, form, **options):
    """The bytes of a picture file, an animation where there are several frames."""
    file, (first, *rest) = io.BytesIO(), map(Image.fromarray, frames)
    first.save(file, form, **options, **({"save_all": True, "append_images": rest} if rest else {}))
    return file.getvalue()


@pytest.fixture(scope="module")
def good(tiny_pipeline, tmp_path_factory):
    """{name: bytes} of good files, and the programs with tiny models as long as this lasts."""
    folder, preset = tmp_path_factory.mktemp("good"), tiny_preset()
    video = np.random.default_rng(0).integers(0, 255, (17, 32, 32, 3), np.uint8)
    files = {f"a.{form}": picture(video[:1], form) for form in ("png", "jpeg", "webp", "tiff")}
    files["clip.webp"] = picture(video, "webp", duration=125)
    files["clip.avi"] = encoded(video, "avi", "mpeg4")
    files["clip.mkv"] = encoded(video, "matroska", "libx264")
    files["lines.txt"] = b"a red circle spins\na star moves up\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for name in train.PRESETS:
            patch.setitem(train.PRESETS, name, lambda: preset)
        narrow = functools.partial(vae.PatchDiscriminator, width=8, layers=1)
        patch.setattr(vae, "PatchDiscriminator", narrow)
        patch.setattr(train, "HELD_OUT", 8)
        patch.setattr(train, "draw_samples", lambda *_: None)
        load_i3d = metrics.load_i3d
        patch.setattr(metrics, "load_i3d", lambda path: load_i3d(path) if path else Stub())
        patch.setattr(metrics, "i3d_path", lambda: folder / "clip.gif")
        for name in ("clip.gif", "clip.mp4"):
            write_video(name, video)
        data_of_training = {"frames": 4, "size": 32, "fps": [4.0, 9.0],
                            "captions": ["a red circle spins", "a star moves up"]}
        torch.save(tiny_pipeline.pack() | {"data": data_of_training}, "model.pt")
        same = "--steps 2 --batch-size 2 --videos 2".split()
        for words in ("vae --out begun", "diffusion --out run --init begun/vae.pt"):
            patch.setattr(sys, "argv", ["train.py", *words.split(), *same])
            train.main()
        files |= tree(folder)
        yield files


def tree(folder):
    """{name: content} of all files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_file()}


def some(files, *beginnings):
    return {name: content for name, content in files.items() if name.startswith(beginnings)}


# ------------------------------------------------------------------------------ what goes wrong

ODD = ["", "-1", "0", "1", "2", "4.5", "nan", "inf", "1e999", "9" * 30, "--", "-", "x", ".", " ",
       "\x1b[2J", "a\nb", "\udcff", "🙂", "a\u202eb", "x" * 300, "a.png", "clip.gif", "clip.mp4",
       "model.pt", "lines.txt", "run", "videos", "none/x", "a.png/x.gif", "/dev/null",
       "/proc/self/mem", "pipe", "NUL", "a:b", "file:a.png", "%s", "*"]  # fmt: skip
SENTENCES = ["a red circle spins", "a red circle", "", " ", "red " * 300, "字", "e\u0301\u0301", "\ufeffx",
             "\udcff", "\x1b[31mred", "a\tb\nc", "-", "A RED CIRCLE", "\u2028", "😀" * 90, "../x"]
CONTENTS = [b"", b"\0", b"text\n", b"\xff\xfe", b"GIF89a", b"PK\x03\x04", b"\x80\x02.", b"#EXTM3U\nx.ts",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(trace) (w) file closefile\nshowpage\n",
            b"ffconcat version 1.0\nfile clip.gif\n", b"<svg/>", b"RIFF\xff\xff\xff\xffAVI "]


@functools.cache
def odd_values():
    with warnings.catch_warnings(action="ignore"):
        nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    return [0, -1, 1, 2, 3, 7, 2**20, 2**40, 10**400, True, False, None, "", "x", "a\nb", "\x1b[2J",
            0.0, 1.5, -1.0, 1e300, math.nan, math.inf, [], {}, (), [1], (1, 2), [[1]], {"a": 1}, b"x",
            1j, [None] * 9, torch.zeros(2), torch.tensor(math.nan), torch.zeros(0), torch.ones(2) > 0,
            torch.zeros(2).int(), torch.empty(2, device="meta"), torch.zeros(2).to_sparse(), nested,
            torch.zeros(1).expand(10**10), "[" * 9999]  # fmt: skip


OTHER_TENSORS = [
    lambda x: x[:-1] if x.dim() else x[None], lambda x: x[None], lambda x: x.T, lambda x: x * math.nan,
    lambda x: x * 1e30, lambda x: x * 0, lambda x: x.int(), lambda x: x.double(), lambda x: x.half(),
    lambda x: x.bool(), lambda x: x.tolist(), lambda x: x.to("meta"), lambda x: x + math.inf,
    lambda x: torch.zeros(()).expand(x.shape), lambda x: x.to_sparse(), lambda x: x.flatten(),
    lambda x: x * 1j, lambda x: x.to(torch.float8_e5m2), lambda x: torch.nn.Parameter(x.float()),
]  # fmt: skip


def spoiled(rng, x):
    """Plain values and tensors, with another one somewhere in them."""
    if isinstance(x, dict) and x and rng.random() < 0.85:
        key, x = rng.choice(list(x)), dict(x)
        x[rng.choice([key] * 9 + [1, "zz", None, "\x1b"])] = spoiled(rng, x[key])
        if rng.random() < 0.1:
            del x[key]
        return x
    if isinstance(x, (list, tuple)) and x and rng.random() < 0.7:
        i = rng.randrange(len(x))
        return type(x)([*x[:i], spoiled(rng, x[i]), *x[i + 1 :]])
    if isinstance(x, torch.Tensor) and rng.random() < 0.8:
        return rng.choice(OTHER_TENSORS)(x)
    return rng.choice(odd_values())


def damaged(rng, content, *others):
    """The bytes with some flipped, cut out, doubled, zeroed, or those of another file in front."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        i = int(len(content) * rng.random() ** rng.choice([1, 4]))  # rather near the beginning
        n = int(len(content) * rng.random() ** 6) + 1
        match rng.randrange(9):
            case 0 | 1 if i < len(content):
                content[i] ^= 1 << rng.randrange(8)
            case 2 | 3:
                value = rng.choice([0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1])
                content[i : i + 4] = struct.pack(rng.choice("<>") + "I", value)
            case 4:
                content[i : i + n] = bytes(n)
            case 5:
                del content[i : i + n]
            case 6:
                content[i:i] = content[i : i + n]
            case 7 if rng.random() < 0.2:
                del content[i:]
            case 8 if others and rng.random() < 0.2:
                content[:n] = rng.choice(others)[:n]
    return bytes(content)


def packed(rng, content):
    """A checkpoint with a value changed, or bytes."""
    if rng.random() < 0.25:
        return damaged(rng, content) if rng.random() < 0.8 else rng.choice(CONTENTS)
    file = io.BytesIO()
    while not file.getvalue():
        try:
            torch.save(spoiled(rng, torch.load(io.BytesIO(content), weights_only=True)), file)
        except (RuntimeError, NotImplementedError, TypeError):  # what cannot be made, or not stored
            file = io.BytesIO()
    return file.getvalue()


def options(rng, table, count):
    """So many options of a table, {option: values that it may have}, with these or odd values."""
    words = []
    for option in rng.choices(list(table), k=count):
        values = table[option].split()
        value = rng.choice(values if values and rng.random() < 0.6 else ODD)
        words += rng.choice([[option, value], [f"{option}={value}"]]) if values else [option]
    return words


# ------------------------------------------------------------------------------ command lines

SAMPLE = {
    "--num": "1 2 10001", "--seed": "7 5000000000", "--frames": "1 2 5 513", "--fps": "3 8 24 0.1",
    "--extend": "1 2 1001", "--image": "a.png a.webp", "--last-image": "a.tiff", "--video":
    "clip.gif clip.mp4 clip.avi videos", "--overlap": "1 2 3", "--conditioning":
    "mask replacement reconstruction", "--steps": "1 2 1001", "--sampler": "dpm ddim ddpm",
    "--guidance": "0 1 9 101", "--batch-size": "1 3", "--out": "o.gif o.MP4 o.png o o.webm a.png",
    "--format": "gif mp4 png", "--upscale": "1 3 65", "--attention": "w.png a.png", "--denoising":
    "d.gif d.png model.pt", "--prompts": "captions lines.txt", "--device": "auto cpu cuda mps",
    "--grid": "", "--words": "",
}  # fmt: skip
TRAIN = {
    "--data": "shapes videos", "--out": "run begun new videos/new a.png", "--preset": "shapes ucf101",
    "--init": "begun/vae.pt run/model.pt run/last.pt", "--seed": "1", "--split": "train01 test03",
    "--clip-seconds": "1 0.2", "--stride": "1 2", "--steps": "1 3", "--batch-size": "1 2", "--lr":
    "0 1e-3 2", "--videos": "1 3", "--ema": "0 1", "--easy-start": "0 5", "--image-fraction": "0.5",
    "--grad-accum": "2 3", "--precision": "bf16 fp32", "--vgg": "a.png run/vae.pt", "--device":
    "cpu cuda", "--resume": "", "--flip": "", "--tensorboard": "", "--compile": "",
    "--grad-checkpoint": "",
}  # fmt: skip
METRICS = {
    "--real": "shapes videos model.pt run", "--fake": "shapes videos model.pt clip.gif", "--metrics":
    "fvd kvd is fid captions", "--num": "1 2 3", "--frames": "9 10 17 513", "--stride": "1 2",
    "--split": "train01 test03", "--seed": "3", "--i3d": "a.png model.pt", "--inception": "a.png",
    "--steps": "1 1001", "--sampler": "dpm ddim", "--guidance": "1 2", "--json":
    "o.json videos a.png model.pt", "--device": "cpu cuda", "--cache": "",
}  # fmt: skip


def surroundings(good):
    """Files that command lines name."""
    videos = {f"videos/{name}": good[name] for name in ("clip.gif", "clip.mp4")}
    return good | videos | {"pipe": None, "videos/trainlist01.txt": b"x/clip.gif 1\n"}


@kind
def lines_of_sample(rng, good):
    sentences = rng.choice([SENTENCES[:1]] * 9 + [[], SENTENCES[:2], rng.choices(SENTENCES, k=1)])
    words = ["--checkpoint", "model.pt", "--steps", "1", "--frames", "3", *sentences]
    return sample, words + options(rng, SAMPLE, rng.randrange(5)), surroundings(good)


@kind
def lines_of_train(rng, good):
    stage = rng.choice(["vae", "diffusion"])
    words = [stage, "--out", rng.choice(["run", "begun", "new"]), "--steps", "1", "--batch-size", "2"]
    words += rng.choice([["--data", "videos"], ["--videos", "2"]])
    words += ["--init", "begun/vae.pt"] if rng.random() < 0.7 else []
    return train, words + options(rng, TRAIN, rng.randrange(4)), surroundings(good)


@kind
def lines_of_metrics(rng, good):
    words = ["--fake", rng.choice(["videos", "shapes", "model.pt"]), "--num", "2", "--steps", "1"]
    words += ["--real", rng.choice(["videos", "shapes"])] * (rng.random() < 0.7)
    return metrics, words + options(rng, METRICS, rng.randrange(4)), surroundings(good)


@kind
def prompts(rng, good):
    def sentence():
        parts = rng.choices(SENTENCES, k=rng.randrange(1, 4))
        parts += [chr(rng.randrange(1, 0xD800)) for _ in range(rng.randrange(9))]
        return rng.choice([" ", ""]).join(rng.sample(parts, len(parts)))

    words = ["--checkpoint", "model.pt", "--steps", "1", "--frames", "3"]
    words += rng.choice([[], ["--grid"], ["--attention", "w.png"], ["--format", "png"]])
    text = "\n".join(sentence() for _ in range(rng.randrange(3)))
    if rng.random() < 0.5:
        content = text.encode(rng.choice(["utf-8", "utf-16", "latin-1", "utf-8-sig"]), "replace")
        content = damaged(rng, content) if rng.random() < 0.3 else content
        return sample, words + ["--prompts", "p.txt"], some(good, "model") | {"p.txt": content}
    sentences = [sentence() for _ in range(rng.choice([1, 1, 2]))]
    return sample, [*words, "--extend", "1", "--", *sentences], some(good, "model")


# ------------------------------------------------------------------------------ pictures, videos


def reading(rng, name, content, good):
    """A command that reads the picture or the video of this name."""
    files = some(good, "model.pt", "begun/vae")
    match rng.randrange(4):
        case 0:
            folder = rng.choice([f"videos/{name}", f"videos/frames/{name}", f"videos/sub/{name}"])
            files |= {folder: content} | rng.choice([{}, {"videos/good.gif": good["clip.gif"]}])
            words = rng.choice([["--clip-seconds", "1"], ["--stride", "1"], []])
            return train, ["vae", "--out", "new", "--data", "videos", "--steps", "1", "--batch-size",
                           "2", *words], files
        case 1:
            files |= {f"videos/{name}": content, "videos/good.gif": good["clip.gif"]}
            return metrics, ["--real", "videos", "--fake", "videos", "--num", "2", "--frames",
                             "9"], files
    option = "--video" if Path(name).suffix in data.VIDEOS or rng.random() < 0.1 else rng.choice(
        ["--image", "--last-image"])
    words = ["a red circle", "--checkpoint", "model.pt", "--steps", "1", "--frames", "5", option, name]
    return sample, words + ["--overlap", "2", "--fps", "4"], files | {name: content}


def mutated(rng, good, names):
    name = rng.choice(names)
    content = damaged(rng, good[name], *(good[other] for other in names))
    content = rng.choice(CONTENTS) if rng.random() < 0.1 else content
    suffix = Path(name if rng.random() < 0.9 else rng.choice([*names, "x.tiff", "x.ts"])).suffix
    return reading(rng, rng.choice(["v", "\x1b[2J", "a\nb", "a:b"]) + suffix, content, good)


@kind
def videos(rng, good):
    return mutated(rng, good, ["clip.gif", "clip.mp4", "clip.avi", "clip.mkv", "clip.webp"])


@kind
def pictures(rng, good):
    return mutated(rng, good, ["a.png", "a.jpeg", "a.webp", "a.tiff", "clip.webp", "clip.gif"])


@kind
def bombs(rng, good):
    """Small files that say that they are large, in sizes, layers or repetitions."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    width, height = (rng.choice([1, 2, 999, 20_000, 65_535, 10**6, 2**31 - 1]) for _ in range(2))
    small = struct.pack("<HH", min(width, 65_535), min(height, 65_535))
    pixels = bytes(min((1 + (width + 7) // 8) * height, 2**22))
    bomb = rng.randrange(6)
    if bomb == 0:
        header = struct.pack(">IIBBBBB", width, height, rng.choice([1, 8, 16]), 0, 0, 0, 0)
        content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels))
        return reading(rng, "b.png", content + chunk(b"IEND", b""), good)
    if bomb == 1:
        content = good["clip.gif"]
        return reading(rng, "b.gif", content[:6] + small + content[10:], good)
    if bomb == 2:
        content = picture([np.zeros((8, 8), np.uint8)], "tiff").replace(
            struct.pack("<HHI", 256, 4, 1) + b"\x08\0\0\0", struct.pack("<HHII", 256, 4, 1, width))
        return reading(rng, "b.tiff", content, good)
    if bomb == 3:
        content = good["clip.webp"]
        return reading(rng, "b.webp", content[:24] + b"\xff\xff\xff" * 2 + content[30:], good)
    if bomb == 4:
        words = rng.choice([b"[", b'{"a":', b'"', b"\0", b"a,", b'[{"file":"a.gif","caption":'])
        name = rng.choice(["a.json", "a.jsonl", "a.csv", "captions.txt", "trainlist01.txt"])
        files = {f"videos/{name}": words * rng.choice([1000, 200_000]), "videos/a.gif": good["clip.gif"]}
        return train, ["vae", "--out", "new", "--data", "videos", "--steps", "1", "--split",
                       "train01"][: rng.choice([7, 9])], files
    checkpoint = torch.load(io.BytesIO(good["model.pt"]), weights_only=True)
    part = rng.choice(["unet", "vae", "text_encoder", "diffusion"])
    config = checkpoint[part]["config"]
    name = rng.choice([name for name, value in config.items() if type(value) in (int, tuple)])
    large = rng.choice([2**10, 2**15, 2**20, 2**40])
    config[name] = large if type(config[name]) is int else type(config[name])([large] * len(config[name]))
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return sample, ["a star", "--checkpoint", "b.pt", "--steps", "1"], {"b.pt": file.getvalue()}


# ------------------------------------------------------------------------------ captions, states


@kind
def captions(rng, good):
    """Tables, texts and lists of a folder of three videos."""
    names = ["a.gif", "sub/b.gif", rng.choice(["c.gif", "\x1b[2J.gif", "a\nb.gif", "\udcff.gif"])]
    odd = [*names, *SENTENCES, None, 7, "../a.gif", "/dev/zero", '"', "'", "a,b", "nan", ["x"], {}, [],
           "a.gif\nsub/b.gif,x"]  # fmt: skip

    def row(name):
        cells = [name, f"a {name} spins"]
        return [cell if rng.random() < 0.9 else rng.choice(odd) for cell in cells]

    rows, file = [row(name) for name in names], io.StringIO()
    columns = rng.choice([["file", "caption"]] * 5 + [["video", "text"], ["file", "x"], ["file"]])
    name = rng.choice(["t.csv", "t.tsv", "t.json", "t.jsonl", "a.txt", "prompts.txt", "sub/b.json",
                       "trainlist01.txt", "t.xlsx", "t.yaml", "labels/a.txt"])  # fmt: skip
    dicts = [dict(zip(columns, cells)) for cells in rows]
    if name.endswith("sv"):
        style = {"delimiter": rng.choice(",,;\t|"), "quoting": rng.choice([0, 0, 1, 3]),
                 "escapechar": "\\"}
        csv.writer(file, **style).writerows([columns, *rows])
    elif name.endswith("json"):
        layout = [dicts, dict(rows) if all(isinstance(r[0], str) for r in rows) else rows, {"x": rows}]
        json.dump(rng.choice(layout), file)
    elif name.endswith("jsonl"):
        file.write("\n".join(map(json.dumps, dicts)))
    else:
        file.write("\n".join(str(cells[rng.randrange(2)]) for cells in rows))
    coding = rng.choice(["utf-8", "utf-8", "utf-16", "utf-32", "latin-1", "utf-8-sig", "utf-7"])
    content = file.getvalue().encode(coding, rng.choice(["replace", "xmlcharrefreplace"]))
    content = damaged(rng, content) if rng.random() < 0.3 else content
    files = {f"videos/{video}": good["clip.gif"] for video in names} | {f"videos/{name}": content}
    files |= rng.choice([{}, {"videos/videos.txt": "\n".join(names).encode("utf-8", "replace")}])
    words = rng.choice([[], [], ["--split", "train01"]])
    if rng.random() < 0.3:
        return metrics, ["--real", "videos", "--fake", "videos", "--num", "2", *words], files
    words = ["--data", "videos", "--steps", "1", "--batch-size", "2", *words]
    if rng.random() < 0.6:
        return train, ["vae", "--out", "new", *words], files
    files |= some(good, "begun/vae")
    return train, ["diffusion", "--out", "new", "--init", "begun/vae.pt", *words], files


@kind
def checkpoints(rng, good):
    if rng.random() < 0.2:
        files = {"m.pt": packed(rng, good["begun/vae.pt"])}
        return train, ["vae", "--out", "new", "--init", "m.pt", "--steps", "1", "--videos", "2",
                       "--batch-size", "1"], files
    files = {"m.pt": packed(rng, good["model.pt"])} | some(good, "a.png", "clip.gif")
    match rng.randrange(5):
        case 0:
            return train, ["diffusion", "--out", "new", "--init", "m.pt", "--steps", "1", "--videos",
                           "1", "--batch-size", "1"], files
        case 1:
            return metrics, ["--fake", "m.pt", "--real", "shapes", "--num", "2", "--steps", "1"], files
    words = rng.choice([[], ["--image", "a.png"], ["--words"], ["--prompts", "captions"]])
    words += [] if {"--words", "--prompts"} & {*words} else ["a red circle"]
    words += ["--checkpoint", "m.pt", "--steps", "1"]
    return sample, words + rng.choice([[], [], ["--frames", "3"], ["--extend", "1"]]), files


@kind
def states(rng, good):
    """A run with one damaged file goes on."""
    stage, out = rng.choice([("vae", "begun"), ("diffusion", "run")])
    files = some(good, out)
    name = f"{out}/" + rng.choice(["config.json", "log.jsonl", "latents.json", "latents.bin"]
                                  + ["last.pt"] * 4 + ["skipped.txt", "vae.pt"])  # fmt: skip
    content = files.get(name, b"")
    if name.endswith(".pt") and content:
        content = packed(rng, content)
    elif name.endswith("json") and content and rng.random() < 0.6:
        content = json.dumps(spoiled(rng, json.loads(content)), default=repr).encode()
    else:
        content = rng.choice([damaged(rng, content), *CONTENTS[:5], None])
    words = [stage, "--out", out, "--resume", "--steps", "3", "--batch-size", "2", "--videos", "2"]
    words += ["--init", "begun/vae.pt"] if stage == "diffusion" else []
    files |= some(good, "begun/vae.pt") if stage == "diffusion" else {}
    return train, words, files | {name: content}


# ------------------------------------------------------------------------------ the rule

ASIDE = re.compile(r"warning: |.*(\d%\||\dit \[|\dclip \[|\?it/s|\?clip/s)|\s*$")
INPUTS = ("--checkpoint", "--image", "--last-image", "--video", "--prompts", "--init", "--real",
          "--fake", "--i3d", "--inception", "--vgg")  # fmt: skip


class Hang(BaseException):
    """An input took too long."""


def hang(*_):
    raise Hang


def call(module, arguments):
    """The exit status of a command, or the traceback that it ends in."""
    sys.argv = [f"{module.__name__}.py", *arguments]
    signal.alarm(SECONDS)
    try:
        module.run_command(module.main)
    except SystemExit as stop:
        return stop.code
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    return 0


def refuse(constant):
    raise ValueError(constant)


def broken_rules(module, arguments, status, out, err, before):
    """Yields what is wrong with what a command did."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    value, after = dict(zip(words, words[1:])), tree(".")
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    lines = err.replace("\r", "\n").split("\n")
    errors = [line for line in lines if line.startswith("error: ")]
    if status not in (0, 2) or len(errors) != (status == 2) or status == 2 and out:
        yield f"status {status}"
    others = [line for line in lines if line not in errors and not ASIDE.match(line)]
    if others and module is not train or "Traceback" in err:
        yield "more on stderr"
    if not all(c.isprintable() or c in "\r\n" for c in out + err):
        yield "control characters"
    if any(re.match(r"\.\d+-", os.path.basename(name)) for name in after):
        yield "temporary files"
    own = os.path.normpath(value.get("--out", ".")) + "/"
    if module is train:  # writes into its folder, and loses none of the checkpoints there
        wrong = [name for name in changed if not name.startswith(own)
                 or status == 2 and name.endswith(".pt") and name in before]
    elif status == 0 and module is sample and "--words" not in arguments:
        printed = {os.path.normpath(line) for line in out.splitlines()}
        wrong = {printable(name) for name in changed} ^ printed
    else:
        wrong = changed - {os.path.normpath(value.get("--json", "."))} if status == 0 else changed
    given = {os.path.normpath(value[option]) for option in INPUTS if option in value}
    wrong = {*wrong} | {name for name in changed & given if not name.startswith(own)}
    if wrong:
        yield f"files {sorted(wrong)}"
    if status == 0 and module is metrics:
        try:
            json.loads(out, parse_constant=refuse)
        except ValueError as error:
            yield f"result {error}"


@pytest.mark.parametrize("name", KINDS)
def test_the_right_result_or_one_line(name, good, request, tmp_path, monkeypatch, capfd):
    broken, folder = [], tmp_path / "work"
    monkeypatch.setattr(sys, "argv", [])
    signal.signal(signal.SIGALRM, hang)
    for i in range(-(-request.config.getoption("--inputs") // len(KINDS))):
        module, arguments, files = KINDS[name](random.Random(f"{name} {i}"), good)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        monkeypatch.chdir(folder)
        for path, content in files.items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            os.mkfifo(path) if content is None else Path(path).write_bytes(content)
        before, memory = tree("."), memory_gib()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            warnings.simplefilter("always", RuntimeWarning)
            warnings.filterwarnings("ignore", module=r"PIL\.")  # as in data.py
            status = call(module, arguments)
        out, err = capfd.readouterr()
        rules = [*broken_rules(module, arguments, status, out, err, before), *(str(w.message) for w in told)]
        rules += ["memory"] * (memory_gib() - memory > GIB)
        if rules:
            broken.append(f"{name} {i}: {module.__name__} {arguments}: {rules} {out!r} {err[-300:]!r}")
    assert not broken, "\n".join([f"{len(broken)} broken rules", *broken])
