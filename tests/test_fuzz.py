"""Bad inputs by the thousand: each gives the right result, or one line and exit status 2; no
traceback, no hang, bounded memory, no half-written file, and the inputs as they were.

    python -m pytest tests/test_fuzz.py --inputs 5000

A kind of input is a function (rng, good) -> (module, arguments, {name of a file: content, None for
a pipe}); `good` are files as they should be. Input i of a kind is drawn by the seed "kind i", so it
is the same in every run.
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
from experiments.speed import memory_gib
from tools import printable

SECONDS, GIB = 60, 1  # that one input may take
TINY = tiny_preset()

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


def picture(frames, form):
    """The bytes of a picture file, an animation where there are several frames."""
    file, (first, *rest) = io.BytesIO(), map(Image.fromarray, frames)
    first.save(file, form, **{"save_all": True, "append_images": rest} if rest else {})
    return file.getvalue()


def saved(checkpoint):
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue()


def loaded(content):
    return torch.load(io.BytesIO(content), weights_only=True)


def tree(folder):
    """{name: content} of all files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def good(tiny_pipeline, tmp_path_factory):
    """{name: content} of good files; and as long as this lasts, the programs have tiny models."""
    folder = tmp_path_factory.mktemp("good")
    video = np.random.default_rng(0).integers(0, 255, (17, 32, 32, 3), np.uint8)
    files = {f"a.{form}": picture(video[:1], form) for form in ("png", "jpeg", "webp", "tiff")}
    files |= {"clip.webp": picture(video, "webp"), "clip.avi": encoded(video, "avi", "mpeg4"),
              "clip.mkv": encoded(video, "matroska", "libx264"), "lines.txt": b"a ring\na star\n"}
    about = {"frames": 4, "size": 32, "fps": [4.0, 9.0], "captions": ["a red circle", "a star"]}
    files["model.pt"] = saved(tiny_pipeline.pack() | {"data": about})
    discriminator, load_i3d = vae.PatchDiscriminator, metrics.load_i3d
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for name in train.PRESETS:
            patch.setitem(train.PRESETS, name, lambda: TINY)
        patch.setattr(vae, "PatchDiscriminator",
                      functools.partial(discriminator, width=8, layers=1))
        patch.setattr(train, "HELD_OUT", 8)
        patch.setattr(train, "draw_samples", lambda *_: None)
        patch.setattr(metrics, "load_i3d", lambda path: load_i3d(path) if path else Stub())
        patch.setattr(metrics, "i3d_path", lambda: folder / "clip.gif")
        for name in ("clip.gif", "clip.mp4"):
            write_video(name, video)
        for words in ("vae --out begun", "diffusion --out run --init begun/vae.pt"):
            words = ["train.py", *words.split(), *"--steps 2 --batch-size 2 --videos 2".split()]
            patch.setattr(sys, "argv", words)
            train.main()
        files |= tree(folder)
        for name in ("begun/last.pt", "run/last.pt"):  # as if between two lines of the log
            files[name] = saved(loaded(files[name]) | {"logged": 1, "sums": {"loss": 1.0}})
        yield files


def some(good, *beginnings):
    return {name: content for name, content in good.items() if name.startswith(beginnings)}


# ------------------------------------------------------------------------------ what goes wrong

WORDS = ["", "-1", "0", "1", "2", "4.5", "nan", "inf", "1e999", "9" * 30, "--", "-", ".", " ",
         "\x1b[2J", "a\nb", "\udcff", "🙂", "a\u202eb", "x" * 300, "a.png", "clip.gif", "model.pt",
         "lines.txt", "run", "videos", "none/x", "a.png/x.gif", "/dev/null", "/proc/self/mem",
         "pipe", "a:b", "file:a.png", "%s", "*"]  # fmt: skip
SENTENCES = ["a red circle", "", " ", "red " * 300, "字", "e\u0301", "\ufeffx", "\udcff",
             "\x1b[31mx", "a\tb\nc", "-", "A RED CIRCLE", "\u2028", "😀" * 90, "../x", '"', "a,b",
             "nan"]
CONTENTS = [b"", b"\0", b"text\n", b"\xff\xfe", b"GIF89a", b"PK\x03\x04", b"#EXTM3U\nclip.gif\n",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(trace) (w) file closefile\n",
            b"ffconcat version 1.0\nfile clip.gif\n", b"<svg/>", b"RIFF\xff\xff\xff\xffAVI "]
NUMBERS = [0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]
VALUES = [
    0, -1, 1, 2, 3, 7, 2**20, 2**40, 10**400, True, False, None, "", "x", "a\nb", "\x1b[2J", 0.0,
    1.5, -1.0, 1e300, math.nan, math.inf, [], {}, (), [1], (1, 2), [[1]], {"a": 1}, b"x", 1j,
    [None] * 9, torch.zeros(2), torch.tensor(math.nan), torch.zeros(0), torch.ones(2) > 0,
    "[" * 9999, torch.zeros(2).int(), torch.zeros(1).expand(10**10), "lr",
    torch.zeros(2).to_sparse(),
]  # fmt: skip
TENSORS = [
    lambda x: x[:-1] if x.dim() else x[None], lambda x: x[None], lambda x: x.mT, lambda x: x * 1e30,
    lambda x: x * math.nan, lambda x: x * 0, lambda x: x.int(), lambda x: x.double(),
    lambda x: x.bool(), lambda x: x.tolist(), lambda x: x.to("meta"), lambda x: x + math.inf,
    lambda x: torch.zeros(()).expand(x.shape), lambda x: x.to_sparse(), lambda x: x * 1j,
    lambda x: x.to(torch.float8_e5m2), lambda x: torch.nn.Parameter(x.float()), lambda x: -x,
]  # fmt: skip


def spoiled(rng, x):
    """Plain values and tensors, with another one somewhere in them."""
    if isinstance(x, dict) and x and rng.random() < 0.9:
        key, x = rng.choice(list(x)), dict(x)
        x[rng.choice([key] * 9 + [1, "lr", None, "\x1b"])] = spoiled(rng, x[key])
        if rng.random() < 0.1:
            del x[key]
        return x
    if isinstance(x, (list, tuple)) and x and rng.random() < 0.8:
        i = rng.randrange(len(x))
        return type(x)([*x[:i], spoiled(rng, x[i]), *x[i + 1 :]])
    if isinstance(x, torch.Tensor) and rng.random() < 0.8:
        return rng.choice(TENSORS)(x)
    return rng.choice(VALUES)


def damaged(rng, content, *others):
    """The bytes with some changed, cut out, doubled, zeroed, or those of another file in front."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        i = int(len(content) * rng.random() ** rng.choice([1, 4]))  # rather near the beginning
        n = int(len(content) * rng.random() ** 6) + 1
        what = rng.randrange(9)
        if what < 3:
            content[i : i + 1] = rng.randbytes(1)
        elif what < 5:
            content[i : i + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(NUMBERS))
        elif what == 5:
            content[i : i + n] = bytes(n)
        elif what == 6:
            content[i : i + n] = content[i : i + n] * rng.choice([0, 2])
        elif what == 7 and others:
            content[:n] = rng.choice(others)[:n]
        elif rng.random() < 0.2:
            del content[i:]
    return bytes(content)


def bad_file(rng, content, *others):
    """Damaged bytes, or for a checkpoint or a .json some other value."""
    if rng.random() < 0.1:
        return rng.choice(CONTENTS)
    if rng.random() < 0.8 and content[:2] == b"PK":
        try:
            return saved(spoiled(rng, loaded(content)))
        except (RuntimeError, NotImplementedError, TypeError):  # what cannot be made or stored
            pass
    elif rng.random() < 0.6 and content[:1] == b"{" and content.count(b"}\n{") == 0:
        return json.dumps(spoiled(rng, json.loads(content)), default=repr).encode()
    return damaged(rng, content, *others)


# ------------------------------------------------------------------------------ command lines

PATHS = (" a.png a.webp clip.gif clip.mp4 videos videos/clip.gif model.pt run/model.pt run/last.pt "
         "begun/vae.pt pipe ")
PARTS = {"training": TINY.vae_training, "vae": TINY.vae, "vae_loss": TINY.vae_loss,
         "text": TINY.text, "unet": TINY.unet, "diffusion": TINY.diffusion}
SETTINGS = """0 1 2 3 8 32 0.5 -1 1e300 1e999 nan inf 10000000000000000000000 none true 1,1 32,64
    8,16,16 true,true 0,0 () [[0,2]] (1,2),(2,0) linear eps x_start adamw muon x 1; '' [ {}"""
SET = " ".join(f"{part}.{name}={value}" for part, config in PARTS.items() for name in vars(config)
               for value in SETTINGS.split())  # small or impossible: in between, memory fills
OPTIONS = {
    sample: {
        "--num": "1 2", "--seed": "7 5000000000", "--frames": "1 2 5 513", "--fps": "3 8 24 0.1",
        "--extend": "1 2", "--image": PATHS, "--last-image": PATHS, "--video": PATHS,
        "--overlap": "1 2 3", "--conditioning": "mask replacement reconstruction",
        "--steps": "1 2", "--sampler": "dpm ddim ddpm", "--guidance": "0 1 9", "--batch-size": "3",
        "--out": "o.gif o.MP4 o.png o o.webm" + PATHS, "--format": "gif mp4 png", "--upscale": "3",
        "--attention": "w.png" + PATHS, "--denoising": "d.gif d.png" + PATHS, "--grid": "",
        "--prompts": "captions lines.txt" + PATHS, "--device": "cpu cuda mps", "--words": "",
        "--checkpoint": PATHS,
    },
    train: {
        "--data": "shapes" + PATHS, "--out": "run begun new . videos/new" + PATHS, "--seed": "1",
        "--preset": "shapes ucf101", "--init": PATHS, "--vae": PATHS, "--vgg": PATHS, "--flip": "",
        "--prompts": "lines.txt" + PATHS, "--split": "train01 test03", "--set": SET,
        "--clip-seconds": "1 0.2", "--stride": "1 2", "--steps": "1 3", "--batch-size": "1 2",
        "--lr": "0 1e-3 1", "--videos": "1 3", "--frames": "2 3 17 24 512 513",
        "--size": "8 16 33 48x32 32X32 0x32 32x4096 4097", "--grad-accum": "2 3",
        "--precision": "bf16 fp32", "--device": "cpu cuda", "--resume": "", "--compile": "",
        "--grad-checkpoint": "",
    },
    metrics: {
        "--real": "shapes" + PATHS, "--fake": "shapes" + PATHS, "--num": "1 2 3", "--i3d": PATHS,
        "--metrics": "fvd kvd is fid captions", "--frames": "9 10 17", "--stride": "1 2",
        "--split": "train01 test03", "--seed": "3", "--inception": PATHS, "--steps": "1",
        "--sampler": "dpm ddim", "--guidance": "1 2", "--json": "o.json" + PATHS, "--cache": "",
        "--device": "cpu cuda",
    },
}  # fmt: skip
OUTPUTS = {"--out", "--json", "--attention", "--denoising"}
INPUTS = {option for options in OPTIONS.values() for option, values in options.items()
          if PATHS in values} - OUTPUTS


@pytest.mark.parametrize("module", OPTIONS)
def test_every_option_is_tried_and_none_that_is_gone(module, capsys):
    with pytest.raises(SystemExit):
        module.parse_args(["--help"])
    usage, _ = capsys.readouterr().out.split("\n\n", 1)
    known = set(re.findall(r"--[\w-]+", usage)) - {"--help", "--fetch-i3d"}  # that is a download
    assert known == set(OPTIONS[module])


def command_lines(rng, good, module):
    words = {
        sample: [["--checkpoint", "model.pt", "--frames", "3", "a red circle"]],
        train: [["vae", "--out", "begun", "--resume"], ["diffusion", "--out", "run", "--resume"],
                ["vae", "--out", "new"], ["diffusion", "--out", "new"]],
        metrics: [["--fake", "videos"], ["--fake", "shapes"], ["--fake", "model.pt"]],
    }[module]  # fmt: skip
    words = [*rng.choice(words), "--steps", "3" if module is train else "1"]
    words += {sample: [], train: ["--batch-size", "2"], metrics: ["--num", "2"]}[module]
    if module is train:
        words += ["--videos", "2"] if rng.random() < 0.7 else ["--data", "videos"]
        words += [rng.choice(["--init", "--vae"]), "begun/vae.pt"] * (words[0] == "diffusion")
        words += ["--set", rng.choice(SET.split())] * (rng.random() < 0.3)
    elif module is metrics:
        words += ["--real", rng.choice(["videos", "shapes"])] * (rng.random() < 0.8)
    for option in rng.choices(list(OPTIONS[module]), k=rng.randrange(4)):
        values = OPTIONS[module][option].split()
        value = rng.choice(values if values and rng.random() < 0.75 else WORDS)
        words += rng.choice([[option, value], [f"{option}={value}"]]) if values else [option]
    files = {f"videos/{name}": good[name] for name in ("clip.gif", "clip.mp4")}
    return module, words, good | files | {"pipe": None, "videos/trainlist01.txt": b"clip.gif 1\n"}


def prompts(rng, good):
    def sentence():
        parts = rng.choices(SENTENCES, k=rng.randrange(1, 4))
        parts += [chr(rng.randrange(1, 0xD800)) for _ in range(rng.randrange(9))]
        return rng.choice([" ", ""]).join(rng.sample(parts, len(parts)))

    words = ["--checkpoint", "model.pt", "--steps", "1", "--frames", "3"]
    words += rng.choice([[], ["--grid"], ["--attention", "w.png"], ["--format", "png"]])
    sentences = [sentence() for _ in range(rng.choice([1, 1, 2]))]
    if rng.random() < 0.5:
        return sample, [*words, "--extend", "1", "--", *sentences], some(good, "model")
    coding = rng.choice(["utf-8", "utf-16", "latin-1", "utf-8-sig"])
    content = "\n".join(sentences).encode(coding, "replace")
    content = damaged(rng, content) if rng.random() < 0.3 else content
    return sample, words + ["--prompts", "p.txt"], some(good, "model") | {"p.txt": content}


# ------------------------------------------------------------------------------ files


def reading(rng, name, content, good):
    """A command that reads the picture or the video of this name."""
    files = some(good, "model.pt")
    match rng.randrange(4):
        case 0:
            name = rng.choice([f"videos/{name}", f"videos/frames/{name}", f"videos/sub/{name}"])
            files |= {name: content} | rng.choice([{}, {"videos/good.gif": good["clip.gif"]}])
            words = "vae --out new --data videos --steps 1 --batch-size 2".split()
            return train, words + rng.choice(["--clip-seconds 1", "--stride 1", ""]).split(), files
        case 1:
            files |= {f"videos/{name}": content, "videos/good.gif": good["clip.gif"]}
            return metrics, "--real videos --fake videos --num 2 --frames 9".split(), files
    film = Path(name).suffix in data.VIDEOS or rng.random() < 0.1
    words = ["a star", "--video" if film else rng.choice(["--image", "--last-image"]), name]
    words += "--checkpoint model.pt --steps 1 --frames 5 --overlap 2 --fps 4".split()
    return sample, words, files | {name: content}


def media(rng, good, films):
    names = [name for name in some(good, "a.", "clip.")
             if (Path(name).suffix in data.VIDEOS) == films]
    name = rng.choice(names)
    content = bad_file(rng, good[name], *(good[other] for other in names))
    suffix = Path(name if rng.random() < 0.9 else rng.choice([*names, "x.ts", "x.bmp"])).suffix
    return reading(rng, rng.choice(["v", "\x1b[2J", "a\nb", "a:b"]) + suffix, content, good)


def png(width, height, bits, pixels):
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    for name, part in ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")):
        content += struct.pack(">I", len(part)) + name + part
        content += struct.pack(">I", zlib.crc32(name + part))
    return content


def bombs(rng, good):
    """Small files that say that they are large."""
    width, height = (rng.choice([1, 2, 999, 20_000, 65_535, 10**6, 2**31 - 1]) for _ in range(2))
    gif, webp = good["clip.gif"], good["clip.webp"]
    bomb = rng.choice(["png", "gif", "tiff", "webp", "text", "config", "config"])
    if bomb == "text":
        words = rng.choice([b"[", b'{"a":', b'"', b"\0", b"a,", b'[{"file":"a.gif","caption":'])
        name = rng.choice(["a.json", "a.jsonl", "a.csv", "captions.txt", "trainlist01.txt"])
        files = {f"videos/{name}": words * rng.choice([999, 200_000]), "videos/a.gif": gif}
        return train, "vae --out new --data videos --steps 1 --batch-size 2".split() + rng.choice(
            [[], ["--split", "train01"]]), files
    if bomb == "config":
        checkpoint, part = loaded(good["model.pt"]), rng.choice(["unet", "vae", "text_encoder"])
        config, large = checkpoint[part]["config"], rng.choice([2**10, 2**15, 2**20, 2**40])
        name = rng.choice([name for name in config if type(config[name]) in (int, tuple)])
        config[name] = large if type(config[name]) is int else (large,) * len(config[name])
        return sample, "star --steps 1 --checkpoint b.pt".split(), {"b.pt": saved(checkpoint)}
    content = {
        "png": png(width, height, rng.choice([1, 8, 16]), bytes(min(width * height, 2**22))),
        "gif": gif[:6] + struct.pack("<HH", width % 2**16, height % 2**16) + gif[10:],
        "webp": webp[:24] + b"\xff" * rng.randrange(7) + webp[30:],
        "tiff": re.sub(rb"(?s)(?<=\0\x01\x04\0\x01\0\0\0)....", struct.pack("<I", width).replace(
            b"\\", b"/"), good["a.tiff"]),
    }[bomb]  # fmt: skip
    return reading(rng, f"b.{bomb}", content, good)


def captions(rng, good):
    """Tables, texts and lists of a folder of three videos."""
    names = ["a.gif", "sub/b.gif", rng.choice(["c.gif", "\x1b[2J.gif", "a\nb.gif", "\udcff.gif"])]
    odd = [*names, *SENTENCES, None, 7, "../a.gif", "/dev/zero", ["x"], {}, [], "a\nsub/b.gif,x"]
    rows = [[cell if rng.random() < 0.9 else rng.choice(odd) for cell in (name, f"a {name} spins")]
            for name in names]
    columns = rng.choice([["file", "caption"]] * 5 + [["video", "text"], ["file", "x"], ["file"]])
    dicts, file = [dict(zip(columns, row)) for row in rows], io.StringIO()
    name = rng.choice(["t.csv", "t.tsv", "t.json", "t.jsonl", "a.txt", "prompts.txt", "sub/b.json",
                       "trainlist01.txt", "t.xlsx", "t.yaml", "labels/a.txt"])  # fmt: skip
    if name.endswith("sv"):
        csv.writer(file, delimiter=rng.choice(",,;\t|"), quoting=rng.choice([0, 0, 1, 3]),
                   escapechar="\\").writerows([columns, *rows])  # fmt: skip
    elif name.endswith("json"):
        json.dump(rng.choice([dicts, {str(k): v for k, v in rows}, {"x": rows}]), file)
    else:
        rows = map(json.dumps, dicts) if name.endswith("l") else [str(row[-1]) for row in rows]
        file.write("\n".join(rows))
    coding = rng.choice(["utf-8", "utf-8", "utf-16", "utf-32", "latin-1", "utf-8-sig", "utf-7"])
    content = file.getvalue().encode(coding, rng.choice(["replace", "xmlcharrefreplace"]))
    content = damaged(rng, content) if rng.random() < 0.3 else content
    files = {f"videos/{video}": good["clip.gif"] for video in names} | {f"videos/{name}": content}
    files |= rng.choice([{}, {"videos/videos.txt": "\n".join(names).encode("utf-8", "replace")}])
    split = rng.choice([[], [], ["--split", "train01"]])
    if rng.random() < 0.3:
        return metrics, ["--real", "videos", "--fake", "videos", "--num", "2", *split], files
    words = ["--out", "new", "--data", "videos", "--steps", "1", "--batch-size", "2", *split]
    if rng.random() < 0.6:
        return train, ["vae", *words], files
    return train, ["diffusion", "--init", "begun/vae.pt", *words], files | some(good, "begun/vae")


def checkpoints(rng, good):
    name = "model.pt" if rng.random() < 0.8 else "begun/vae.pt"
    files = {"m.pt": bad_file(rng, good[name])} | some(good, "a.png", "clip.gif")
    words = "--out new --init m.pt --steps 1 --videos 1 --batch-size 1".split()
    if name != "model.pt" or rng.random() < 0.2:
        return train, ["diffusion" if name == "model.pt" else "vae", *words], files
    if rng.random() < 0.2:
        return metrics, "--fake m.pt --real shapes --num 2 --steps 1".split(), files
    words = ["a star", "a star --image a.png", "a star --video clip.gif --fps 4", "--words",
             "--prompts captions", "a star --frames 3", "a star --extend 1"]  # fmt: skip
    return sample, rng.choice(words).split() + ["--checkpoint", "m.pt", "--steps", "1"], files


def states(rng, good):
    """A run goes on with one damaged file."""
    stage, out = rng.choice([("vae", "begun"), ("diffusion", "run")])
    name = rng.choice(["config.json", "log.jsonl", "latents.json", "latents.bin", "skipped.txt",
                       "last.pt", "last.pt", "last.pt", "vae.pt"])  # fmt: skip
    content = bad_file(rng, good.get(f"{out}/{name}", b""))
    files = some(good, out, "begun/vae.pt") | {f"{out}/{name}": rng.choice([content] * 9 + [None])}
    words = [stage, "--out", out, *"--resume --steps 3 --batch-size 2 --videos 2".split()]
    return train, words + ["--init", "begun/vae.pt"] * (stage == "diffusion"), files


KINDS = {
    "lines of sample.py": functools.partial(command_lines, module=sample),
    "lines of train.py": functools.partial(command_lines, module=train),
    "lines of metrics.py": functools.partial(command_lines, module=metrics),
    "prompts": prompts, "videos": functools.partial(media, films=True),
    "pictures": functools.partial(media, films=False), "bombs": bombs, "captions": captions,
    "checkpoints": checkpoints, "states of runs": states,
}  # fmt: skip

# ------------------------------------------------------------------------------ the rule

ASIDE = re.compile(r"warning: |.*(\d%\||\dit \[|\dclip \[|\?it/s|\?clip/s)|\s*$")  # and progress


def call(module, arguments):
    """The exit status of a command, 130 where it takes too long, or the traceback it ends in."""
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


def wrong_files(module, arguments, status, out, before):
    """Names of files that the command may not have made or changed, or has not made."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    value, after = dict(zip(words, words[1:])), tree(".")
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    given = [value[option] for option in INPUTS if value.get(option)]
    lost = {name for name in changed & before.keys() if "--resume" not in arguments
            and any(Path(name).is_relative_to(path) for path in given)}
    if module is train:  # in its own folder it may do all but lose a checkpoint
        kept = ".pt" if status else ("model.pt", "vae.pt") if "--resume" not in arguments else ()
        wrong = {name for name in changed if not Path(name).is_relative_to(value["--out"])
                 or name in before and name.endswith(kept)}
    elif status:
        wrong = changed
    elif module is metrics:
        wrong = changed - {os.path.normpath(value.get("--json", "."))}
    else:
        printed = [] if "--words" in arguments else out.splitlines()
        printed = {os.path.normpath(line) for line in printed}
        wrong = {printable(name) for name in changed} ^ printed
    return wrong | lost | {name for name in after if re.match(r"\.\d+-", os.path.basename(name))}


def broken_rules(module, arguments, status, out, err, before):
    """Yields what is wrong with what a command did."""
    lines = err.replace("\r", "\n").split("\n")
    errors = [line for line in lines if line.startswith("error: ")]
    if status not in (0, 2) or len(errors) != (status == 2) or status == 2 and out:
        yield f"status {status}"
    others = [line for line in lines if line not in errors and not ASIDE.match(line)]
    if others and module is not train or "Traceback" in err:  # train.py says what it does
        yield "more on stderr"
    if not all(c.isprintable() or c in "\r\n" for c in out + err):
        yield "control characters"
    if wrong := wrong_files(module, arguments, status, out, before):
        yield f"files {sorted(wrong)}"
    if status == 0 and module is metrics and re.search("NaN|Infinity", json.dumps(json.loads(out))):
        yield "not finite"


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_result_or_one_line(kind, good, request, tmp_path, monkeypatch, capfd):
    broken, folder = [], tmp_path / "work"
    monkeypatch.setattr(sys, "argv", [])
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for i in range(-(-request.config.getoption("--inputs") // len(KINDS))):
        module, arguments, files = KINDS[kind](random.Random(f"{kind} {i}"), good)
        shutil.rmtree(folder, ignore_errors=True)
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            os.mkfifo(path) if content is None else path.write_bytes(content)
        monkeypatch.chdir(folder)
        before, memory = tree("."), memory_gib()
        with warnings.catch_warnings(record=True) as told:
            for category in (UserWarning, RuntimeWarning):
                warnings.simplefilter("always", category)
            warnings.filterwarnings("ignore", module=r"PIL\.")  # as in data.py
            status = call(module, arguments)
        out, err = capfd.readouterr()
        rules = [*broken_rules(module, arguments, status, out, err, before),
                 *(f"warning {w.message}" for w in told if issubclass(
                     w.category, (UserWarning, RuntimeWarning))),
                 *["memory"] * (memory_gib() > memory + GIB)]  # fmt: skip
        if rules:
            broken.append(f"{i}: {module.__name__} {arguments}: {rules} {out!r} {err[-300:]!r}")
    assert not broken, "\n".join([f"{len(broken)} inputs", *broken])
