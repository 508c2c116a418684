"""Sampling: what a seed means, what the command prints and writes, and how it says no.

The command runs in this process (`command` below), as `python sample.py ...` would.
"""

import contextlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
from data import FPS
from metrics import read_things
from sample import SAMPLERS, load_pipeline

PROMPT = "a red circle moves right, then up"
SLUG = "a-red-circle-moves-right-then-up"
PRETRAINED = Path(sample.__file__).parent / "pretrained" / "shapes.pt"


@pytest.fixture
def float32(monkeypatch):
    """No autocast: in bfloat16 the sums of another batch size round visibly differently."""
    monkeypatch.setattr(sample, "autocast", lambda device: contextlib.nullcontext())


def distance(a, b):
    """The largest difference between two uint8 arrays, in levels."""
    return np.abs(a.astype(int) - b.astype(int)).max()


# ------------------------------------------------------------------------------ Pipeline.generate


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sample_i_has_the_seed_plus_i(tiny_pipeline, float32, sampler):
    def draw(count, seed):
        return tiny_pipeline.generate([PROMPT] * count, seed, steps=3, sampler=sampler)

    together = draw(3, seed=5)
    assert together.dtype == np.uint8 and together.shape == (3, 16, 32, 32, 3)
    for i in range(3):
        assert distance(draw(1, seed=5 + i)[0], together[i]) <= 1
    assert distance(together[0], together[1]) > 8


def test_batch_size_does_not_change_the_videos(tiny_pipeline, float32):
    prompts = [PROMPT, "a star spins", "a small blue ring grows", "a green square stays still"]
    one, three, all_four = (
        tiny_pipeline.generate(prompts, seed=1, steps=3, sampler="ddpm", batch_size=n)
        for n in (1, 3, 4)
    )
    assert distance(one, all_four) <= 1
    assert distance(three, all_four) <= 1


def test_words_matter_and_their_case_and_spaces_do_not(tiny_pipeline):
    def draw(prompt):
        return tiny_pipeline.generate([prompt], steps=2)

    assert distance(draw(PROMPT), draw(f"  {PROMPT.upper()} ".replace(" ", "  "))) == 0
    assert distance(draw(PROMPT), draw("a red circle moves up, then right")) > 0


@pytest.mark.parametrize("frames", [1, 5, 24])
def test_any_number_of_frames(tiny_pipeline, frames):
    videos = tiny_pipeline.generate([PROMPT], frames=frames, steps=2)
    assert videos.shape == (1, frames, 32, 32, 3)


def test_the_frame_rate_reaches_the_model(tiny_pipeline):
    slow, fast = (tiny_pipeline.generate([PROMPT], fps=fps, steps=2) for fps in (6, 12))
    assert distance(slow, fast) > 0


@pytest.mark.parametrize("guidance, evaluated", [(1, 2), (0, 4), (3, 4)])
def test_without_guidance_the_null_caption_costs_nothing(tiny_pipeline, guidance, evaluated):
    sizes = []
    hook = tiny_pipeline.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    try:
        tiny_pipeline.generate([PROMPT] * 2, steps=3, guidance=guidance)
    finally:
        hook.remove()
    assert sizes == [evaluated] * 3


def test_guidance_0_ignores_the_words(tiny_pipeline, float32):
    first, second = tiny_pipeline.generate([PROMPT], steps=2, guidance=0), tiny_pipeline.generate(
        ["a star spins"], steps=2, guidance=0
    )
    assert distance(first, second) <= 1


def test_a_checkpoint_rebuilds_the_pipeline(tiny_pipeline, tiny_checkpoint, float32):
    loaded = load_pipeline(tiny_checkpoint)
    for name in ("text_encoder", "unet", "vae"):
        ours, theirs = getattr(tiny_pipeline, name), getattr(loaded, name)
        assert ours.config == theirs.config and not theirs.training
        for key, value in ours.state_dict().items():
            assert torch.equal(value.half().float(), theirs.state_dict()[key]), key
    assert loaded.tokenizer.state_dict() == tiny_pipeline.tokenizer.state_dict()
    assert loaded.schedule.config == tiny_pipeline.schedule.config
    a, b = (p.generate([PROMPT], steps=2) for p in (tiny_pipeline, loaded))
    assert distance(a, b) <= 4  # half precision on disk is not visible


# ------------------------------------------------------------------------------ the command


@pytest.fixture
def command(monkeypatch, tmp_path, tiny_checkpoint, capsys):
    """Runs `python sample.py ...` inside tmp_path: (exit status, lines of stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, prompt=PROMPT, checkpoint=tiny_checkpoint):
        argv = ["sample.py", prompt, "--checkpoint", checkpoint, "--steps", 2, *arguments]
        monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
        status = 0
        try:
            sample.run_command(sample.main)
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return run


def tree(folder):
    """Every file with its bytes, and every folder, below `folder`."""
    return {p: p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


def test_stdout_is_the_path(command, tmp_path):
    status, out, err = command()
    assert (status, out) == (0, [f"samples/{SLUG}-0.gif"])
    assert "warning" not in err and "Traceback" not in err
    with Image.open(out[0]) as gif:
        assert gif.n_frames == 16 and gif.size == (128, 128)
    assert set(tree(tmp_path)) == {tmp_path / "samples", tmp_path / out[0]}


def test_num_writes_one_file_for_each_seed(command, tiny_checkpoint):
    status, out, _ = command("--num", 3, "--seed", 7, "--out", "a/b", "--format", "png")
    assert (status, out) == (0, [f"a/b/{SLUG}-{seed}.png" for seed in (7, 8, 9)])
    videos = load_pipeline(tiny_checkpoint).generate([PROMPT] * 3, seed=7, steps=2)
    for path, video in zip(out, videos):  # the file of seed s holds the video of seed s
        sheet = data.contact_sheet(video.repeat(4, 1).repeat(4, 2))
        assert distance(np.asarray(Image.open(path)), sheet) <= 1


def test_same_command_same_file(command):
    first = tree(Path(command("--out", "a")[1][0]).parent)
    second = tree(Path(command("--out", "b")[1][0]).parent)
    assert list(first.values()) == list(second.values())


def test_unknown_words_are_named(command):
    status, out, err = command(prompt="a red Zebra moves right, Quickly")
    assert status == 0 and out == ["samples/a-red-zebra-moves-right-quickly-0.gif"]
    (warning,) = [line for line in err.splitlines() if line.startswith("warning")]
    assert "'zebra', 'quickly'" in warning and "red" not in warning


@pytest.mark.parametrize("prompt", ["字" * 300, "a" * 300, "?!", "../../x", "a/b\0c"])
def test_any_prompt_gives_a_file_name(prompt):
    arguments = [prompt, "--seed", str(2**62), "--num", "2", "--out", "folder"]
    first, second = sample.output_paths(sample.parse_args(arguments))
    assert first.parent == second.parent == Path("folder") and first != second
    assert 0 < len(first.name.encode()) <= 230  # systems allow 255, some go to a temporary name
    assert "/" not in first.name and "\0" not in first.name


@pytest.mark.parametrize("upscale", [1, 3])
def test_upscale_enlarges(command, upscale):
    _, (path,), _ = command("--upscale", upscale)
    with Image.open(path) as gif:
        assert gif.size == (32 * upscale, 32 * upscale)


@pytest.mark.parametrize("arguments", [("--out", "v.mp4"), ("--format", "mp4", "--out", "v")])
def test_mp4(command, arguments):
    status, (path,), _ = command(*arguments, "--frames", 5, "--fps", 10)
    assert status == 0 and path in ("v.mp4", f"v/{SLUG}-0.mp4")
    assert iio.imread(path, plugin="pyav").shape == (5, 128, 128, 3)
    assert iio.immeta(path, plugin="pyav")["fps"] == 10


@pytest.mark.parametrize("name", ["x.gif", "new/folder/x.png"])
def test_out_may_be_a_file(command, name):
    assert command("--out", name)[:2] == (0, [name])
    assert Path(name).stat().st_size > 0


def test_frames_and_fps_reach_the_file(command):
    _, (path,), _ = command("--frames", 3, "--fps", 4)
    with Image.open(path) as gif:
        assert gif.n_frames == 3 and gif.info["duration"] == 250


def test_help_is_complete(command):
    for module in (sample, sys.modules["metrics"]):
        with pytest.raises(SystemExit) as stop:
            module.parse_args(["--help"])  # a stray % in a help text would raise here
        assert stop.value.code == 0


# ------------------------------------------------------------------------------ mistakes


class Malicious:
    """Pickled, this is a program."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def bad_checkpoint(kind, good):
    """Write a checkpoint that cannot be used to bad.pt; good: the path of a good one."""
    path, content = Path("bad.pt"), Path(good).read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    if kind == "almost complete":
        path.write_bytes(content[:-30])
    if kind == "empty":
        path.write_bytes(b"")
    if kind == "text":
        path.write_text("hello world\n")
    if kind == "other archive":
        torch.save({"weights": torch.zeros(3)}, path)
    if kind == "a tensor":
        torch.save(torch.zeros(3), path)
    if kind == "program":
        path.write_bytes(pickle.dumps(Malicious()))
    if kind == "program in an archive":
        torch.save({"unet": Malicious()}, path)
    if kind in ("another shape", "another program"):
        checkpoint = torch.load(good, weights_only=True)
        change = {"widths": (32, 64)} if kind == "another shape" else {"colour": "red"}
        checkpoint["unet"]["config"] |= change
        torch.save(checkpoint, path)
    if kind == "no tokenizer":
        checkpoint = torch.load(good, weights_only=True)
        checkpoint["tokenizer"] = {}
        torch.save(checkpoint, path)
    return path


def assert_refused(result, before, words=""):
    """Exit status 2, one line on stderr that holds `words`, and not a file changed."""
    status, out, err = result
    assert (status, out) == (2, [])
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert words in err, err
    assert tree(".") == before


CHECKPOINTS = (
    "truncated", "almost complete", "empty", "text", "other archive", "a tensor", "program",
    "program in an archive", "another shape", "another program", "no tokenizer",
)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_bad_checkpoints_are_refused(command, tiny_checkpoint, kind):
    path = bad_checkpoint(kind, tiny_checkpoint)
    before = tree(".")
    assert_refused(command("--out", "new", checkpoint=path), before)


def test_a_missing_checkpoint_is_refused(command):
    assert_refused(command("--out", "a/b", checkpoint="nowhere/model.pt"), {}, "nowhere/model.pt")


@pytest.mark.parametrize("prompt, words", [("", "empty"), (" \t ", "empty"), ("red " * 99, "long")])
def test_prompts_that_cannot_be_drawn_are_refused(command, prompt, words):
    assert_refused(command(prompt=prompt), {}, words)


@pytest.mark.parametrize("arguments, words", [
    ("--num 0", "--num"),
    ("--frames 0", "--frames"),
    ("--steps 0", "--steps"),
    ("--fps nan", "--fps"),
    ("--sampler euler", "euler"),
    ("--format avi", "avi"),
    ("--out x.gif --num 2", "--num 2"),
    ("--out x.gif --format mp4", ".mp4"),
    ("--out x.webm", ".gif, .mp4, .png"),
])
def test_settings_that_do_not_fit_are_refused(command, arguments, words):
    assert_refused(command(*arguments.split()), {}, words)


@pytest.mark.parametrize("out", ["file/new", "file/new/x.gif", "folder.gif"])
def test_an_unwritable_out_is_refused_before_the_work(command, monkeypatch, out):
    Path("file").write_text("not a folder")
    Path("folder.gif").mkdir()
    monkeypatch.setattr(sample, "load_pipeline", None)  # would fail if it were called
    before = tree(".")
    assert_refused(command("--out", out), before, out)


@pytest.mark.parametrize("suffix", ["gif", "mp4", "png"])
def test_an_existing_file_survives_a_failure(command, monkeypatch, suffix):
    path = Path(f"x.{suffix}")
    path.write_bytes(b"precious")
    before = tree(".")
    assert_refused(command("--out", path, checkpoint="none.pt"), before, "none.pt")

    def fill_the_disk(path, *_):
        path.write_bytes(b"half of a vid")
        raise OSError(28, "No space left on device")

    for name in ("_write_gif", "_write_mp4", "_write_sheet"):
        monkeypatch.setattr(data, name, fill_the_disk)
    status, out, err = command("--out", path)
    assert (status, out) == (2, []) and "No space left" in err.splitlines()[-1]
    assert tree(".") == before


# ------------------------------------------------------------------------------ the shipped model

shipped = pytest.mark.skipif(not PRETRAINED.is_file(), reason=f"there is no {PRETRAINED.name} yet")


@shipped
def test_the_shipped_model_is_small():
    assert PRETRAINED.stat().st_size <= 16 * 2**20
    checkpoint = torch.load(PRETRAINED, weights_only=True)
    for part in ("text_encoder", "unet", "vae"):
        kinds = {v.dtype for v in checkpoint[part]["state"].values() if v.is_floating_point()}
        assert kinds == {torch.float16}, part


@shipped
def test_the_shipped_model_draws_what_it_is_told():
    video = load_pipeline().generate([PROMPT], seed=0)[0]
    assert video.shape == (16, 64, 64, 3)
    seen = read_things(video, FPS)[0]
    assert (seen.colour, seen.shape, seen.actions) == ("red", "circle", ("right", "up"))


@shipped
def test_the_first_command_of_the_readme(tmp_path):
    """As a person would type it: a new process, the shipped model, default settings."""
    done = subprocess.run(
        [sys.executable, "sample.py", PROMPT, "--out", tmp_path],
        cwd=PRETRAINED.parent.parent, capture_output=True, text=True, timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / SLUG}-0.gif\n"
    with Image.open(done.stdout.strip()) as gif:
        assert gif.n_frames == 16 and gif.size == (256, 256)
