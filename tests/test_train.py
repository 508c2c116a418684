"""Training: exact resume, what is drawn in a step, the optimizers, and what a run leaves on disk.

`run_train` calls the command in this process, with the shapes preset shrunk to a tiny model that
goes four steps and saves after the second and the last. `start_training` does so in another
process, which can be killed.
"""

import contextlib
import copy
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import tiny_configs
from torch import nn

import data
import sample
import shapes
import tools
import train
import vae
from data import VideoError, VideoFolder, to_model, write_video
from diffusion import DiffusionConfig, NoiseSchedule, diffusion_loss
from sample import load_pipeline
from shapes import MovingShapes
from text_encoder import END, START, TextEncoder
from tools import UserError, autocast, run_command
from train import EMA, Muon, Run, TrainConfig, beginning, draw_batch, draw_given_frames
from train import learning_rate, make_optimizers, orthogonalize
from unet3d import UNet3D
from vae import AutoencoderKL, VAELossConfig

train.SAVE_SECONDS = 0, 600  # a checkpoint wherever one is due
TRAINING = TrainConfig(
    steps=4, batch_size=4, lr=1e-3, warmup=2, videos=6, log_every=1, save_every=2
)


def tiny_preset(training=TRAINING, optimizer="muon", gan_weight=0.5):
    """The shapes preset with tiny models; the autoencoder has a discriminator from the start."""
    unet, text, autoencoder = tiny_configs()
    return replace(
        train.PRESETS["shapes"](),
        size=32,
        vae=autoencoder,
        vae_loss=VAELossConfig(gan_weight=gan_weight, gan_start=0),
        vae_training=training,
        text=text,
        unet=unet,
        diffusion_training=replace(training, optimizer=optimizer),
    )


@pytest.fixture(scope="module")
def preset():
    return tiny_preset()


@contextlib.contextmanager
def patched(*triples):
    """Replace attributes, as (object, name, value), for as long as the context lasts."""
    with pytest.MonkeyPatch.context() as patch:
        for target, name, value in triples:
            patch.setattr(target, name, value)
        yield patch


check_preset = functools.cache(train.check_preset)  # of the same presets over and over


def run_train(preset, *arguments, pictures=False):
    """`python train.py ARGUMENTS` where the shapes preset is `preset`. Returns its stdout."""
    small = functools.partial(vae.PatchDiscriminator, width=8, layers=1)
    generate = functools.partialmethod(sample.Pipeline.generate, steps=1)
    stdout = io.StringIO()
    with patched(
        (sys, "argv", ["train.py", *map(str, arguments)]), (vae, "PatchDiscriminator", small),
        (sample.Pipeline, "generate", generate), (train, "HELD_OUT", 8),
        (train, "check_preset", check_preset),
        (train, "draw_samples", train.draw_samples if pictures else lambda *_: None),
    ) as patch, contextlib.redirect_stdout(stdout):
        patch.setitem(train.PRESETS, "shapes", lambda: preset)
        train.main()
    return stdout.getvalue()


def load(path):
    return torch.load(path, weights_only=True)


def differences(a, b, path=""):
    """Where two checkpoints differ in the slightest: a list of paths into them."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}/{i}")]
    return [] if a == b else [path]


def log(out):
    """The lines of log.jsonl about training steps."""
    return [line for line in map(json.loads, (out / "log.jsonl").open()) if "loss" in line]


@pytest.fixture(scope="module")
def finished(preset, tmp_path_factory):
    """A run folder after both stages, and beside it what each of them printed and its last.pt.
    Not to be changed: copy it first."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    for stage in ("vae", "diffusion"):
        printed = run_train(preset, stage, "--out", out, pictures=True)
        (out.parent / f"{stage}.txt").write_text(printed)
        shutil.copy(out / "last.pt", out.parent / f"{stage}.pt")
    return out


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copied"))


# ------------------------------------------------------------------------------ learning rate


def test_learning_rate_rises_stays_and_falls():
    config = TrainConfig(steps=1000, batch_size=1, lr=2.0, warmup=100, decay=0.4)
    rates = [learning_rate(step, config) for step in range(1001)]
    assert rates[0] == pytest.approx(0.02) and rates[49] == pytest.approx(1.0)
    assert set(rates[99:601]) == {2.0}
    assert rates[800] == pytest.approx(1.0) and rates[999] == pytest.approx(2 / 400)
    assert rates[1000] == 0
    assert rates == sorted(rates[:100]) + rates[100:600] + sorted(rates[600:], reverse=True)
    flat = replace(config, warmup=0, decay=0)
    assert {learning_rate(step, flat) for step in range(1000)} == {2.0}


def draw(step, config, clips=8, frames=4):
    """`draw_batch` on clips of so many frames, as a dict."""
    schedule = NoiseSchedule(DiffusionConfig(timesteps=1000))
    clips, latents = torch.arange(clips), torch.zeros(clips, 2, frames, 1, 1)
    batch = draw_batch(0, step, config, clips, torch.full((len(clips),), 8.0), latents, schedule)
    names = ("rows", "fps", "x_start", "given_mask", "t", "noise", "images")
    return dict(zip(names, batch, strict=True))


def test_training_starts_with_the_first_frame_and_much_noise():
    config = replace(TRAINING, easy_start=100, batch_size=64, text_only=1.0)
    first = torch.tensor([True, False, False, False])
    for step, lowest, share in [(0, 950, 1), (50, 475, 0.5), (100, 0, 0), (5000, 0, 0)]:
        batch = draw(step, config)
        t, given = batch["t"], batch["given_mask"]
        spacing = (1000 - lowest) / 64  # one timestep from each of 64 equal intervals
        assert lowest <= t.min() < lowest + spacing + 1 and 1000 - spacing - 1 <= t.max() < 1000
        easy = (given == first).all(1)
        assert abs(easy.float().mean() - share) < 0.2 and not given[~easy].any()
    assert beginning(99, config) == pytest.approx(0.01)
    # In float32 a draw just below 1 rounds to 1, and there is no such timestep.
    ones = [torch.ones(1) - 2**-25, torch.ones(1)]
    for u in ones:
        with patched((torch, "rand", lambda *_, **__: u)):
            assert draw(3, replace(config, batch_size=1))["t"].max() < 1000
    assert beginning(0, replace(config, easy_start=0)) == 0


@pytest.mark.parametrize("frames, kept", [(16, 4), (9, 5), (8, 4), (7, 7), (2, 2)])
def test_a_stride_leaves_four_frames(frames, kept):
    config = replace(TRAINING, strides=((100, 4),), easy_start=100, batch_size=64)
    batch = draw(0, config, frames=frames)
    assert batch["x_start"].shape[2] == kept and not batch["given_mask"].all(1).any()


# ------------------------------------------------------------------------------ resume


def interrupt(preset, arguments, at):
    """Start a run and break it off in its step number `at`, counted from 1, before it is logged."""
    with counted_steps(stop_at=at), pytest.raises(KeyboardInterrupt):
        run_train(preset, *arguments)


@contextlib.contextmanager
def counted_steps(stop_at=None):
    """A list that grows by the values of every step; step number `stop_at`, counted from 1, is
    interrupted."""
    write_log, steps = Run.log, []

    def log_or_stop(self, step, values):
        steps.append(values)
        if len(steps) == stop_at:
            raise KeyboardInterrupt
        write_log(self, step, values)

    with patched((Run, "log", log_or_stop)):
        yield steps


def count_steps(preset, *arguments):
    """Run to the end: how many steps were made?"""
    with counted_steps() as steps:
        run_train(preset, *arguments)
    return len(steps)


@pytest.mark.parametrize("stage", ["vae", "diffusion"])
def test_resume_is_exact(preset, finished, tmp_path, stage):
    """Stopped in step 4, after the checkpoint of step 2 and one more logged step."""
    arguments = (stage, "--out", tmp_path)
    if stage == "diffusion":
        shutil.copy(finished / "vae.pt", tmp_path)
    interrupt(preset, arguments, at=4)
    assert load(tmp_path / "last.pt")["step"] == 2
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3]
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"stage": "di')  # a line cut short by a full disk
    assert count_steps(preset, *arguments, "--resume") == 2

    assert log(tmp_path) == [line for line in log(finished) if line["stage"] == stage]
    result = {"vae": "vae.pt", "diffusion": "model.pt"}[stage]
    assert differences(load(tmp_path / result), load(finished / result)) == []
    ours, theirs = load(tmp_path / "last.pt"), load(finished.parent / f"{stage}.pt")
    kept = {"vae": {"vae", "discriminator"}, "diffusion": {"model", "ema"}}[stage]
    used = {"vae": {"adamw", "discriminator"}, "diffusion": {"muon", "adamw"}}[stage]
    assert set(ours["models"]) == kept and set(ours["optimizers"]) == used
    assert all(ours["optimizers"].values())
    assert differences(ours, theirs) == []
    assert count_steps(preset, *arguments, "--resume") == 0  # a finished run
    assert differences(load(tmp_path / "last.pt"), theirs) == []


# ------------------------------------------------------------------------------ killed processes

# Log lines between checkpoints, and checkpoints between log lines.
NINE_STEPS = tiny_preset(replace(TRAINING, steps=9, log_every=4, save_every=3))
posix = pytest.mark.skipif(os.name != "posix", reason="signals as on Unix")


def train_in_process(preset, arguments, messages, kill_at, interrupt_at, environment):
    """What a process of `start_training` does."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.stderr = open(messages, "w", buffering=1)
    torch_save, replace_file, write_log, writes = torch.save, os.replace, Run.log, 0

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def save_half(checkpoint, path):
        torch_save(checkpoint, path)
        if writes + 1 == kill_at and kill_at % 2:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    def replace_or_die(source, target):
        nonlocal writes
        writes += 1
        if writes == kill_at and kill_at % 2:
            die()
        replace_file(source, target)
        if writes == kill_at:
            die()

    def log_or_interrupt(self, step, values):
        write_log(self, step, values)
        if step + 1 == interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)

    torch.save, os.replace, Run.log = save_half, replace_or_die, log_or_interrupt
    run_command(lambda: run_train(preset, *arguments, pictures=True))


def start_training(
    preset, *arguments, messages=os.devnull, kill_at=None, interrupt_at=None, environment=()
):
    """`python train.py ARGUMENTS` in a process of its own. kill_at: kills itself at this write of a
    file, counted from 1: halfway through an odd one, right after an even one; interrupt_at: presses
    Ctrl-C after this step."""
    context = multiprocessing.get_context("forkserver")  # imports torch once for all of them
    context.set_forkserver_preload(["test_train", "torch._dynamo"])  # optimizers import the latter
    arguments = (preset, arguments, messages, kill_at, interrupt_at, dict(environment))
    process = context.Process(target=train_in_process, args=arguments)
    process.start()
    return process


def finish_training(*arguments, **options):
    process = start_training(*arguments, **options)
    process.join()
    return process.exitcode


def begun(out, stage):
    return (out / "last.pt").is_file() and load(out / "last.pt")["stage"] == stage


def go_on(stage, out):
    """The command that starts or resumes a run, whichever it takes."""
    return (stage, "--out", out, *(["--resume"] if (out / "config.json").is_file() else []))


def assert_same_run(ours, theirs):
    """The same files with the same content, but for the time."""
    files = {p.relative_to(theirs) for p in theirs.rglob("*") if p.is_file()}
    assert {p.relative_to(ours) for p in ours.rglob("*") if p.is_file()} == files
    for file in files - {Path("config.json")}:
        if file.suffix == ".pt":
            assert differences(load(ours / file), load(theirs / file)) == [], file
        elif file.name == "log.jsonl":
            a, b = ([json.loads(x) for x in (out / file).open()] for out in (ours, theirs))
            assert a == b
        else:
            assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file


@pytest.fixture(scope="module")
def unharmed(finished, tmp_path_factory):
    """For each stage the folder of a run of nine steps that nothing has happened to."""
    runs = {}
    for stage in ("vae", "diffusion"):
        out = runs[stage] = tmp_path_factory.mktemp("unharmed")
        if stage == "diffusion":
            shutil.copy(finished / "vae.pt", out)
        assert finish_training(NINE_STEPS, stage, "--out", out) == 0
    return runs


@posix
@pytest.mark.parametrize("stage, kills", [("vae", (5,)), ("diffusion", (2, 7, 8))])
def test_killed_at_many_moments_and_resumed(unharmed, finished, tmp_path, stage, kills):
    """Halfway through a write (an odd number) or right after it, where a dead process has also left
    a half of a log line and of a clip."""
    if stage == "diffusion":
        shutil.copy(finished / "vae.pt", tmp_path)
    steps = [0]
    for number in kills:
        code = finish_training(NINE_STEPS, *go_on(stage, tmp_path), kill_at=number)
        assert code == -signal.SIGKILL
        if begun(tmp_path, stage):
            steps.append(load(tmp_path / "last.pt")["step"])
            if stage == "diffusion":
                load(tmp_path / "model.pt")
    assert finish_training(NINE_STEPS, *go_on(stage, tmp_path)) == 0
    assert steps == sorted(steps) and 0 < steps[-1] < 9
    assert_same_run(tmp_path, unharmed[stage])


def press_ctrl_c(preset, arguments, times, before_log=False):
    """Run and press Ctrl-C so many times in step 3; it ends the program."""
    write_log = Run.log

    def log_and_press(self, step, values):
        write_log(self, step, values)
        if step + 1 == 3:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    with patched((Run, "log", log_and_press)), pytest.raises(KeyboardInterrupt):
        run_train(preset, *arguments)


def test_ctrl_c_saves_and_says_how_to_go_on(preset, finished, tmp_path, capsys):
    shutil.copy(finished / "vae.pt", tmp_path)
    arguments, handler = ("diffusion", "--out", tmp_path), signal.getsignal(signal.SIGINT)
    press_ctrl_c(preset, arguments, times=2)  # the second one ends it at once
    assert load(tmp_path / "last.pt")["step"] == 2
    press_ctrl_c(preset, (*arguments, "--resume"), times=1)
    assert load(tmp_path / "last.pt")["step"] == 4  # the step after that was the last
    assert "the same command with --resume goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
    assert differences(load(tmp_path / "last.pt"), load(finished / "last.pt")) == []


def test_a_run_without_a_checkpoint_begins_again(preset, finished, tmp_path, capsys):
    """With --resume as well as without it, and says so."""
    shutil.copy(finished / "vae.pt", tmp_path)
    for resume in ([], ["--resume"]):
        interrupt(preset, ("diffusion", "--out", tmp_path, *resume), at=1)
        assert ("it begins at step 1" in capsys.readouterr().err) == bool(resume)
    assert not (tmp_path / "last.pt").exists()
    with patched((train, "SAVE_SECONDS", (600, 600))):  # the one of step 2 would come too soon
        interrupt(preset, ("diffusion", "--out", tmp_path), at=3)
    assert not (tmp_path / "last.pt").exists()
    with patched((train, "SAVE_SECONDS", (0, -1))):  # a checkpoint after every step
        interrupt(preset, ("diffusion", "--out", tmp_path), at=2)
    assert load(tmp_path / "last.pt")["step"] == 1
    assert count_steps(preset, "diffusion", "--out", tmp_path, "--resume") == 3


def test_what_happens_at_a_step_stays_where_it_was(tmp_path):
    """The discriminator, the easy start and the strides, in a run that is resumed with other
    --steps."""
    training = replace(TRAINING, easy_start=2, strides=((2, 2),))
    preset = replace(tiny_preset(training), vae_loss=VAELossConfig(gan_weight=0.5, gan_start=2))
    for stage, name in (("vae", "gan_start"), ("diffusion", "easy_start")):
        for steps, more in ((2, []), (4, ["--resume"])):
            run_train(preset, stage, "--out", tmp_path, "--steps", steps, *more)
            state = load(tmp_path / "last.pt")
            assert state[name] == 1 and state["step"] == steps  # its share of the first steps
    assert state["strides"] == ((1, 2),)
    lines = [line for line in log(tmp_path) if line["stage"] == "vae"]
    assert ["gan" in line for line in lines] == [False, True, True, True]


def test_a_run_has_its_folder_for_itself(preset, copied):
    """What a killed run left behind goes; all else that is hidden stays, at any depth."""
    others = (".notes", ".2024-notes.txt", ".7-backup/x", "samples/.12-mine.gif",
              "deeper/.99-last.pt", "samples/other/.9-step_000002.gif")
    remains = (".99-last.pt", ".1-latents.json", "samples/.77-step_000002.gif")
    for name in others + remains:
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text("here")
    command = ("diffusion", "--out", copied, "--resume")
    with tools.locked(copied), pytest.raises(UserError, match="another run writes into"):
        run_train(preset, *command)
    assert all((copied / name).is_file() for name in others + remains)
    run_train(preset, *command)
    assert all((copied / name).is_file() for name in others)
    assert not any((copied / name).exists() for name in remains)


# ------------------------------------------------------------------------------ damaged files


def first(state, kind):
    """The first value of state[kind][name], for the first name."""
    inner = next(iter(state[kind].values()))
    return inner, next(iter(inner))


def other_tensor(kind, make):
    def edit(state):
        inner, key = first(state, kind)
        if kind == "optimizers":
            inner = inner[key]
            key = next(name for name in inner if name != "step")
        inner[key] = make(inner[key])

    return edit


DAMAGES = {
    "another type": lambda state: state.update(step=torch.zeros(2)),
    "negative": lambda state: state.update(step=-1),
    "too large": lambda state: state.update(easy_start=10**400),
    "logged later": lambda state: state.update(logged=9),
    "no sum": lambda state: state.update(sums={"loss": math.nan}),
    "sum without a name": lambda state: state.update(sums={1: 1.0}),
    "sum of another type": lambda state: state.update(sums={"loss": 10**400}),
    "no record": lambda state: state.update(record={}),
    "unknown tokens": lambda state: state.update(
        tokenizer={"merges": [[3, i] for i in range(3, 259)], "words": []}),
    "merges": lambda state: state.update(tokenizer={"merges": [[1, 10**6]], "words": []}),
    "no models": lambda state: state.update(models={}),
    "model missing": lambda state: state["models"].pop("ema"),
    "model a list": lambda state: state["models"].update(ema=[1, 2]),
    "weight missing": lambda state: (lambda d, k: d.pop(k))(*first(state, "models")),
    "weight too many": lambda state: first(state, "models")[0].update(x=torch.zeros(1)),
    "weight cut": other_tensor("models", lambda x: x[:-1]),
    "weight no tensor": other_tensor("models", lambda x: 3),
    "weight not finite": other_tensor("models", lambda x: x * math.nan),
    "weight whole numbers": other_tensor("models", lambda x: x.int()),
    "optimizer gone": lambda state: state["optimizers"].popitem(),
    "optimizer a list": lambda state: state["optimizers"].update(adamw=[]),
    "momentum cut": other_tensor("optimizers", lambda x: x[:-1]),
    "momentum turned": other_tensor("optimizers", lambda x: x[None]),
    "momentum sparse": other_tensor("optimizers", lambda x: x.to_sparse()),
    "momentum missing": lambda state: (lambda d, k: d[k].popitem())(*first(state, "optimizers")),
    "optimizer state shifted": lambda state: state["optimizers"].update(
        adamw={i + 1: x for i, x in state["optimizers"]["adamw"].items()}),
    "optimizer state of nobody": lambda state: state["optimizers"]["adamw"].update(
        {10**6: state["optimizers"]["adamw"][0]}),
}


def test_a_damaged_checkpoint_is_named_in_one_line(preset, copied):
    good, path = (copied / "last.pt").read_bytes(), copied / "last.pt"
    for damage, edit in DAMAGES.items():
        state = torch.load(io.BytesIO(good), weights_only=True)
        edit(state)
        torch.save(state, path)
        with pytest.raises(UserError) as error:
            run_train(preset, "diffusion", "--out", copied, "--resume", "--steps", 5)
        name = "for a text encoder that knows" if damage == "unknown tokens" else str(path)
        assert name in str(error.value) and "\n" not in str(error.value), damage


def test_other_damaged_files_cost_what_is_damaged(preset, copied, capsys):
    """config.json is only written; a log loses its damaged lines; latents are encoded again."""
    whole = (copied / "log.jsonl").read_text().splitlines()
    damaged = ["{", "[1]", "7", "null", '{"stage": "vae"}', '{"stage": [], "step": 1}', "[" * 10**5,
               '{"stage": "vae", "step": "1"}', '{"stage": "vae", "step": 1, "loss": {}}', "\xff"]
    text = "\n".join(damaged[:5] + whole + damaged[5:]).encode("latin-1")
    for contents in ("{", "[]", '{"key": 1}', "[" * 10**5, None):
        (copied / "log.jsonl").write_bytes(text)
        (copied / "config.json").write_text(contents or "")
        state = json.loads((copied / "latents.json").read_text())
        if contents is None:
            state["clips"][0] = -1
        (copied / "latents.json").write_text(contents or json.dumps(state))
        with encoder_calls() as calls:
            run_train(preset, "diffusion", "--out", copied, "--resume")
        assert len(calls) == TRAINING.videos  # not those held out
        assert f"{len(damaged)} damaged lines dropped" in capsys.readouterr().err
        assert (copied / "log.jsonl").read_text().splitlines() == whole
        assert json.loads((copied / "config.json").read_text())["arguments"]["seed"] == 0


# ------------------------------------------------------------------------------ refused

REFUSED = {  # arguments after --out OUT, where lies a finished run: what the one line says
    "diffusion": "add --resume",
    "vae": "choose another --out",
    "vae --resume": "choose another --out",
    "diffusion --resume --seed 1": "was started with --seed 0, not 1: use the same",
    "diffusion --resume --preset ucf101": "--preset shapes",
    "diffusion --resume --videos 7": "data of digest",
    "diffusion --resume --init ELSEWHERE/vae.pt": "autoencoder of digest",
    "diffusion --resume --init ELSEWHERE/gone.pt": "no checkpoint at",
    "vae --out ELSEWHERE/new --resume": "there is no vae run",
    "diffusion --out ELSEWHERE/new": "train it first with",
    "diffusion --out ELSEWHERE/new --init OUT/log.jsonl": "is not a readable checkpoint",
    "vae --out ELSEWHERE": "vae.pt would be overwritten",
    "diffusion --out ELSEWHERE --vae OUT/vae.pt": "model.pt would be overwritten",
    "vae --out ELSEWHERE/new --steps 0": "0",
    "vae --out ELSEWHERE/new --clip-seconds 1.5": "--clip-seconds 1.5 is for --data FOLDER",
    "vae --out ELSEWHERE/new --flip": "--flip is for --data FOLDER",
    "vae --out ELSEWHERE/new --vae OUT/vae.pt": "--vae is for python train.py diffusion",
    "vae --out ELSEWHERE/new --prompts OUT/log.jsonl": "--prompts is for python train.py diffusion",
    "diffusion --out ELSEWHERE/new --vae OUT/vae.pt --init OUT/vae.pt": "--vae begins a new one",
    "diffusion --out ELSEWHERE/new --vae OUT/log.jsonl": "is not a readable checkpoint",
    "diffusion --out ELSEWHERE/new --vae ELSEWHERE/gone.pt": "no checkpoint at",
    "diffusion --resume --prompts ELSEWHERE/empty.txt": "empty.txt: 0 sentences",
    "diffusion --resume --prompts ELSEWHERE/many.txt": "many.txt: 101 sentences, of 1 to 100",
    "diffusion --resume --prompts ELSEWHERE/latin.txt": "latin.txt: 'utf-8' codec",
    "diffusion --resume --prompts ELSEWHERE": "not a file",
    "diffusion --resume --prompts ELSEWHERE/gone": "no such file",
    "diffusion --resume --frames 8": "was started with frames 16, not 8",
    "diffusion --resume --size 64": "was started with size 32, not 64",
    "vae --out ELSEWHERE/new --size 36": "36x36 pixels must be multiples of 16",
    "vae --out ELSEWHERE/new --size 96x64": "--data shapes has square frames",
    "vae --out ELSEWHERE/new --size 96x64x32": "is not 64 or 96x64",

    "vae --out ELSEWHERE/new --frames 1": "1",
    "vae --out ELSEWHERE/new --set nonsense": "a PART of vae, vae_loss, text, unet, diffusion, tra",
    "vae --out ELSEWHERE/new --set unet=3": "'' is none of channels, widths, blocks",
    "vae --out ELSEWHERE/new --set unet.width=3": "'width' is none of channels, widths, blocks",
    "vae --out ELSEWHERE/new --set vae.factor=4": "'factor' is none of latent_channels, patch",
    "vae --out ELSEWHERE/new --set unet.widths=a,b": "widths cannot be ('a,b',)",
    "vae --out ELSEWHERE/new --set unet.widths=0,32": "widths",
    "vae --out ELSEWHERE/new --set unet.blocks=1": "do not fit together",
    "vae --out ELSEWHERE/new --set text.heads=5": "do not fit together",
    "vae --out ELSEWHERE/new --set vae.groups=7": "do not fit together",

    "vae --out ELSEWHERE/new --set training.lr=1e999": "lr cannot be inf",
    "vae --out ELSEWHERE/new --set training.ema=2": "ema must be from 0 to 1",
    "vae --out ELSEWHERE/new --set training.log_every=0": "log_every cannot be 0",
    "vae --out ELSEWHERE/new --set training.steps=many": "steps cannot be 'many'",
    "vae --out ELSEWHERE/new --set training.strides=((5,0),)": "pairs (step, N), N at least 1",
    "vae --out ELSEWHERE/new --set training.strides=((5,),)": "pairs (step, N), N at least 1",
    "vae --out ELSEWHERE/new --set training.strides=((-1,2),)": "strides cannot be ((-1, 2),)",
    "vae --out ELSEWHERE/new --set diffusion.timesteps=5": "do not fit together",
    "vae --out ELSEWHERE/new --preset ucf101-256": "ucf101-256 contradicts itself: unknown",
    "vae --out ELSEWHERE/new --set training.optimizer=sgd": "choose adamw or muon",
    "vae --out ELSEWHERE/new --set diffusion.prediction=eps": "prediction 'eps' needs",
    "vae --out ELSEWHERE/new --set vae_loss.vgg_weight=1": "vgg_weight needs --vgg",
    "vae --out ELSEWHERE/new --set unet.channels=3": "do not fit together",
    "vae --out ELSEWHERE/new --set text.vocab_size=9": "do not fit together",
    "vae --out ELSEWHERE/new --compile --device cpu": "--compile is for CUDA",
    "vae --out ELSEWHERE/new --grad-accum 5": "cannot be divided into 5 parts",
    "vae --out ELSEWHERE/new --vgg OUT/vae.pt": "vgg16-397923af.pth",
    "vae --out ELSEWHERE/new --vgg ELSEWHERE/gone": "vgg16-397923af.pth",
    "diffusion --resume --vgg OUT/vae.pt": "--vgg is for python train.py vae",
    "vae --out ELSEWHERE/videos/run --data ELSEWHERE/videos": "lies inside --data",
    "vae --out ELSEWHERE/new --data ELSEWHERE/nowhere": "neither a folder of videos nor",
    "vae --out ELSEWHERE/new --data ELSEWHERE/empty": "no videos in",
    "vae --out ELSEWHERE/new --data ELSEWHERE/videos": "none of the 1 videos",
    "vae --out ELSEWHERE/new --data ELSEWHERE/videos --split train01": "trainlist01.txt",
    "vae --out ELSEWHERE/new --data ELSEWHERE/videos --videos 3": "--videos is for",
    "vae --out ELSEWHERE/new --data ELSEWHERE/videos --stride 2 --clip-seconds 1": "not allowed",
    "vae --out OUT/log.jsonl": "log.jsonl",
    "vae --out ELSEWHERE/mine": "config.json is not of a run and would be overwritten",
    "vae --out ELSEWHERE/mine --resume": "config.json is not of a run and would be overwritten",
    "vae --out ELSEWHERE/logs": "log.jsonl is not of a run and would be overwritten",
}


def test_what_is_refused_is_one_line_and_changes_nothing(
    preset, finished, tmp_path, run_script, monkeypatch
):
    def snapshot():
        return {p: p.read_bytes() if p.is_file() else None
                for folder in (finished, tmp_path) for p in folder.rglob("*")}

    for name in ("videos", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "videos" / "a.avi").write_text("text")
    for name, text in (("mine/config.json", '{"editor": 1}'), ("logs/log.jsonl", "mine")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "many.txt").write_text("a cat runs\n" * 101)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    other = load(finished / "vae.pt")
    other["vae"]["state"]["latent_std"] *= 2
    torch.save(other, tmp_path / "vae.pt")
    shutil.copy(finished / "model.pt", tmp_path)
    for name in ("shapes", "ucf101"):
        monkeypatch.setitem(train.PRESETS, name, lambda: preset)
    monkeypatch.setitem(train.PRESETS, "ucf101-256", lambda: TrainConfig(optimizer="no"))
    monkeypatch.setattr(train, "check_preset", check_preset)
    before = snapshot()
    for line, words in REFUSED.items():
        stage, *arguments = line.split()
        arguments = [x.replace("OUT", str(finished)).replace("ELSEWHERE", str(tmp_path))
                     for x in arguments]
        arguments += [] if "--out" in line else ["--out", finished]
        status, out, err = run_script(train, stage, *arguments)
        lines = [x for x in err.splitlines() if not x.startswith(f"{tmp_path / 'videos'}:")]
        assert status == 2 and not out and len(lines) == 1, (line, err)
        assert lines[0].startswith("error: ") and words in lines[0], (line, err)
        assert snapshot() == before, line


def eps(preset):
    return replace(preset, diffusion=DiffusionConfig(prediction="eps", zero_terminal_snr=False))


def test_weights_that_do_not_fit_are_refused_or_named(preset, finished, copied, tmp_path, capsys):
    """By name: the preset of a run that goes on, and that of --init."""
    wider = replace(preset, unet=replace(preset.unet, widths=(32, 64)))
    for other, field in ((wider, "unet.widths"), (eps(preset), "diffusion.prediction v, not eps")):
        with pytest.raises(UserError, match=field):
            run_train(other, "diffusion", "--out", copied, "--resume")
    start = ("--init", finished / "model.pt", "--steps", 1)
    run_train(wider, "diffusion", "--out", tmp_path / "new", *start)
    assert "unet.widths is (32, 32), as in the trained weights, not (32, 64)" in (
        capsys.readouterr().err)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["preset"]["unet"]["widths"] == [32, 32]
    shallow = replace(preset, size=8, vae=replace(preset.vae, widths=(16, 32)))
    for stage in ("vae", "diffusion"):  # before the first stage, not after it
        with pytest.raises(UserError, match="frames of 8x8 pixels must be multiples of 16"):
            start = ("--init", finished / "vae.pt")
            run_train(shallow, stage, "--out", tmp_path / "newer", *start)
    assert not (tmp_path / "newer").exists()


# ------------------------------------------------------------------------------ several processes


def train_together(preset, *arguments, interrupt_second=None):
    """What `torchrun --nproc_per_node=2 train.py ARGUMENTS` starts. Returns both exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        start_training(preset, *arguments, interrupt_at=at, environment=common | {
            "RANK": str(rank), "LOCAL_RANK": str(rank)
        })
        for rank, at in enumerate((None, interrupt_second))
    ]
    for worker in workers:
        worker.join(120)
        worker.kill()
    return [worker.exitcode for worker in workers]


def test_two_processes_train_like_one(finished, tmp_path):
    """On batches of 5, which neither 2 processes nor 4 parts divide evenly; and when Ctrl-C in one
    of them has stopped both in the same step."""
    preset = tiny_preset(replace(TRAINING, batch_size=5), optimizer="adamw")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(finished / "vae.pt", tmp_path / name)
    command = ("diffusion", "--precision", "fp32", "--out")
    run_train(preset, *command, tmp_path / "one")
    more = (*command, tmp_path / "two", "--grad-accum", 2)
    assert train_together(preset, *more, interrupt_second=2) == [130, 130]
    assert load(tmp_path / "two" / "last.pt")["step"] == 3
    assert train_together(preset, *more, "--resume") == [0, 0]
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        assert b == {k: v if k in ("stage", "step") else pytest.approx(v, rel=1e-3)
                     for k, v in a.items()}
    ours, theirs = (load(tmp_path / name / "last.pt")["models"]["ema"] for name in ("one", "two"))
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-4) for k in ours)


# ------------------------------------------------------------------------------ options


def test_parts_of_a_batch_add_up_to_its_gradient():
    torch.manual_seed(0)
    model, x, gradients = nn.Linear(3, 2), torch.randn(7, 3), []
    for count in (1, 3, 7):
        model.zero_grad()
        pieces = list(train.parts((x, x), count, CPU))
        for share, (part, same) in pieces:
            assert torch.equal(part, same)
            (share * model(part).square().mean()).backward()
        assert len(pieces) == count and sum(share for share, _ in pieces) == pytest.approx(1)
        gradients.append(model.weight.grad.clone())
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


def test_grad_checkpoint_gives_the_same_gradients_in_less_memory(tiny_pipeline):
    def gradients(arguments):
        """Of UNet and autoencoder, and the bytes that autograd kept for them."""
        models = copy_trainable(tiny_pipeline.unet), copy_trainable(tiny_pipeline.vae)
        train.economize(train.parse_args(["vae", "--out", "x", *arguments]), *models)
        torch.manual_seed(0)
        x, context = torch.randn(2, 4, 16, 4, 4), torch.randn(2, 5, 32)
        mask, kept = torch.ones(2, 5, dtype=torch.bool), []

        def keep(tensor):
            kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            t, fps = torch.tensor([3, 900]), torch.tensor([8.0, 12.0])
            y = models[0](x, t, context, mask, fps).square().mean()
            frames = models[1].decode(models[1].encode(torch.randn(4, 3, 32, 32)).mean)
            loss = y + frames.square().mean()
        loss.backward()
        return [p.grad for model in models for p in model.parameters()], sum(kept)

    plain, memory = gradients([])
    again, less = gradients(["--grad-checkpoint"])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True) if a is not None)
    assert any(a.any() for a in again) and less < memory / 3


def copy_trainable(model):
    return copy.deepcopy(model).requires_grad_(True).train()


def test_grad_accum_gives_the_same_training(tmp_path):
    preset = tiny_preset(optimizer="adamw", gan_weight=0)
    for name, count in (("one", 1), ("three", 3)):
        run_train(preset, "vae", "--out", tmp_path / name, "--precision", "fp32", "--steps", 2,
                  "--grad-accum", count)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "three"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad"] == pytest.approx(a["grad"], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precision_is_that_of_every_product(preset, tmp_path, precision):
    """In training and in all that is measured, encoded and drawn; weights are kept in float32."""
    kinds, convolution = set(), nn.Conv2d.forward

    def product(self, x):
        y = convolution(self, x)
        kinds.update([y.dtype] if y.device == CPU else [])  # not on "meta", where nothing is
        return y

    def dtype(device, precision=None):  # of hardware with the other number format
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision or other]

    other = "bf16" if precision == "fp32" else "fp32"
    with patched((nn.Conv2d, "forward", product), (tools, "product_dtype", dtype)):
        for stage in ("vae", "diffusion"):
            run_train(preset, stage, "--out", tmp_path, "--steps", 1, "--precision", precision,
                      pictures=True)
            state = load(tmp_path / "last.pt")["models"]
            assert {v.dtype for m in state.values() for v in m.values()} == {torch.float32}
    assert kinds == {dtype(CPU, precision)}


@pytest.mark.gpu
def test_a_compiled_model_trains(preset, finished, tmp_path):
    for more in ([], ["--compile"]):
        out = tmp_path / f"out{len(more)}"
        out.mkdir()
        shutil.copy(finished / "vae.pt", out)
        run_train(preset, "diffusion", "--out", out, "--device", "cuda", *more)
    losses = [[x["loss"] for x in log(tmp_path / f"out{i}")] for i in (0, 1)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def full_memory_of_the_gpu(*_):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 EiB")


def test_a_full_memory_says_which_options_help(preset, copied, run_script, monkeypatch):
    monkeypatch.setitem(train.PRESETS, "shapes", lambda: preset)
    for fill in (full_memory_of_the_gpu, lambda *_, **__: torch.empty(2**60)):
        with patched((train, "text_to_video_loss", fill)):
            status, _, err = run_script(
                train, "diffusion", "--out", copied, "--resume", "--steps", 6)
        line = err.splitlines()[-1]
        assert status == 2 and line.startswith("error: the memory is full: try ")
        assert all(x in line for x in ("batch", "--grad-accum", "--grad-checkpoint", "bf16"))


def test_other_errors_are_not_taken_for_a_full_memory(preset, copied):
    def fail(*_):
        raise RuntimeError("a size of 3 is not one of 4")

    with patched((train, "text_to_video_loss", fail)), pytest.raises(RuntimeError, match="not one"):
        run_train(preset, "diffusion", "--out", copied, "--resume", "--steps", 6)


def test_single_pictures_are_their_share_and_given_nothing():
    config = replace(TRAINING, batch_size=500, image_fraction=0.3, text_only=0.0)
    drawn, without = draw(3, config), draw(3, replace(config, image_fraction=0.0))
    images, given = drawn.pop("images"), drawn.pop("given_mask")
    assert abs(images.float().mean() - 0.3) < 0.07
    assert not given[images].any() and given[~images].any(1).all()
    assert not without["images"].any()
    for name, value in drawn.items():  # all else is drawn as it would have been
        assert torch.equal(without[name], value)


def test_settings_of_the_training_reach_the_network(preset, finished, tmp_path):
    """At first clips are every fourth and every second frame, at a quarter and half of the frame
    rate; the clips of image_fraction are closed to temporal attention; with an average of decay 0
    the last weights are kept."""
    shutil.copy(finished / "vae.pt", tmp_path)
    training = replace(preset.diffusion_training, strides=((1, 4), (3, 2)), image_fraction=0.5)
    assert [train.frame_stride(step, training) for step in range(4)] == [4, 2, 2, 1]
    assert train.frame_stride(0, preset.diffusion_training) == 1
    seen, forward = [], UNet3D.forward

    def watch(self, *arguments):
        if torch.is_grad_enabled() and len(arguments) > 5:  # a training step
            seen.append(arguments[4:])  # frame rates, clean clips, their masks, who is a picture
        return forward(self, *arguments)

    with patched((UNet3D, "forward", watch)):
        run_train(replace(preset, diffusion_training=training), "diffusion", "--out", tmp_path,
                  "--set", "training.ema=0")
    latents = np.fromfile(tmp_path / "latents.bin", np.float16).reshape(-1, 4, 16, 4, 4)
    rates = json.loads((tmp_path / "latents.json").read_text())["fps"]
    assert any(images.any() and not images.all() for *_, images in seen)
    for step, (fps, clips, _, images) in enumerate(seen):
        stride = (4, 2, 2, 1)[step]
        expected = draw(step, training, TRAINING.videos, 16)["images"]
        assert torch.equal(images, expected)
        for rate, clip in zip(fps, clips):
            matches = [np.array_equal(one[:, ::stride], clip.numpy()) for one in latents]
            assert sum(matches) == 1
            assert rate == pytest.approx(rates[matches.index(True)] / stride)
    state = load(tmp_path / "last.pt")["models"]
    assert len(seen) == 4 and differences(state["ema"], state["model"]) == []


# ------------------------------------------------------------------------------ what a run leaves


def test_the_run_folder_holds_what_the_documentation_says(finished):
    files = {p.relative_to(finished).as_posix() for p in finished.rglob("*") if p.is_file()}
    pictures = {f"samples/vae_00000{n}.png" for n in (2, 4)}
    pictures |= {f"samples/step_00000{n}.gif" for n in (2, 4)}
    checkpoints = {"vae.pt", "last.pt", "model.pt"}
    pictures |= {"samples/loss.png"}
    latents = {f"{name}.{end}" for name in ("latents", "held_out") for end in ("bin", "json")}
    assert files == checkpoints | latents | pictures | {"config.json", "log.jsonl"}
    config = json.loads((finished / "config.json").read_text())
    assert config["arguments"]["stage"] == "diffusion" and config["arguments"]["seed"] == 0
    assert config["preset"]["unet"]["widths"] == [32, 32]
    assert config["preset"]["diffusion_training"]["optimizer"] == "muon"
    for path in finished.glob("*.pt"):
        load(path)  # weights_only: raises for anything else
    assert set(load(finished / "model.pt")) == {
        "text_encoder", "unet", "vae", "tokenizer", "diffusion", "data"
    }


def test_the_log_has_every_step_of_both_stages(finished):
    lines = log(finished)
    assert [(x["stage"], x["step"]) for x in lines] == [
        (stage, step) for stage in ("vae", "diffusion") for step in (1, 2, 3, 4)
    ]
    common = {"stage", "step", "loss", "grad", "lr"}
    assert set(lines[0]) == common | {"l1", "mse", "kl", "psnr", "gan", "discriminator"}
    assert set(lines[-1]) == common | {f"loss_{i}" for i in (1, 2, 3, 4)}
    assert [x["lr"] for x in lines[:4]] == [learning_rate(step, TRAINING) for step in range(4)]
    lines = [json.loads(line) for line in (finished / "log.jsonl").open()]
    measured = [(x["stage"], x["step"]) for x in lines if "held_out_psnr" in x]
    assert measured == [("vae", 2), ("vae", 4)]


@pytest.mark.parametrize("clock", [
    time.monotonic, lambda: 7.0, itertools.count(0, -1).__next__
], ids=["runs", "stands", "goes back"])
def test_the_log_holds_means_over_the_steps_since_the_last_line(tmp_path, clock):
    run = Run(
        train.parse_args(["vae", "--out", str(tmp_path)]),
        tiny_preset(replace(TRAINING, steps=5, log_every=3)), None, {},
    )
    run.begin({}, {})
    with patched((time, "monotonic", clock)):
        for step in run.steps():
            run.log(step, {"loss": 10.0**step})
    assert [(x["step"], x["loss"]) for x in log(tmp_path)] == [(3, 37.0), (5, 5500.0)]


def test_the_last_line_is_a_command_that_works(finished, tmp_path, monkeypatch, capsys):
    lines = [(finished.parent / f"{s}.txt").read_text() for s in ("vae", "diffusion")]
    assert [line.count("\n") for line in lines] == [1, 1]  # all else goes to stderr
    _, script, *arguments = shlex.split(lines[0].split("next: ")[1])
    assert script == "train.py" and train.parse_args(arguments).stage == "diffusion"
    assert train.parse_args(arguments).out == str(finished)
    _, script, *arguments = shlex.split(lines[1])
    assert script == "sample.py"
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--steps", "1", "--out", str(tmp_path)])
    sample.main()
    assert Path(capsys.readouterr().out.strip()).is_file()


def test_model_pt_holds_the_averaged_weights(finished):
    pipeline, last = load_pipeline(finished / "model.pt"), load(finished / "last.pt")["models"]
    assert differences(last["model"], last["ema"])
    for part in ("text_encoder", "unet"):
        for name, value in getattr(pipeline, part).state_dict().items():
            assert torch.equal(value, last["ema"][f"{part}.{name}"].half().float()), name


@pytest.mark.parametrize("stage, start", [
    ("vae", "model.pt"), ("diffusion", "vae.pt"), ("diffusion", "model.pt")
])
def test_init_starts_from_trained_weights(preset, finished, tmp_path, stage, start):
    """With a learning rate of 0 the weights at the end are those at the start."""
    before = load(finished / start)
    run_train(preset, stage, "--out", tmp_path, "--init", finished / start, "--lr", 0, "--steps", 1)
    after = load(tmp_path / ("vae.pt" if stage == "vae" else "model.pt"))
    taken = {"vae"} if stage == "vae" else before.keys() & after.keys()
    assert taken == {"vae"} or start == "model.pt" and "unet" in taken and "tokenizer" in taken
    for part in taken:
        ours, theirs = before[part], after[part]
        if "state" in ours:
            assert ours["config"] == theirs["config"]
            ours, theirs = ({k: v.half() for k, v in p["state"].items()} for p in (ours, theirs))
            if stage == "vae":  # these are measured anew
                for name in ("latent_mean", "latent_std"):
                    assert torch.allclose(ours.pop(name), theirs.pop(name), rtol=0.01, atol=0.01)
        assert differences(ours, theirs) == [], part


# ------------------------------------------------------------------------------ latents


CPU = torch.device("cpu")


def cached(out, dataset):
    """Numbers of clips, rates and latents that a run has left in its folder."""
    model = sample.unpack(AutoencoderKL, vae.VAEConfig, load(out / "vae.pt")["vae"])
    with patched((AutoencoderKL, "encode_video", None)):  # nothing is left to encode
        return train.encode_dataset(model, dataset, CPU, out)


@contextlib.contextmanager
def encoder_calls(stop_at=None):
    """Counts calls of `encode_video`; call number `stop_at`, counted from 1, is interrupted."""
    encode_video, calls = AutoencoderKL.encode_video, []

    def counting(self, video):
        calls.append(video)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return encode_video(self, video)

    with patched((AutoencoderKL, "encode_video", counting)):
        yield calls


def test_latents_are_encoded_once_for_each_autoencoder(preset, tmp_path):
    model = AutoencoderKL(preset.vae)

    def encoded(dataset):
        with encoder_calls() as calls:
            return *train.encode_dataset(model, dataset, CPU, tmp_path), len(calls)

    dataset = MovingShapes(3, size=32)
    clips, fps, latents, count = encoded(dataset)
    assert count == 3 and clips.tolist() == [0, 1, 2]
    assert fps.tolist() == pytest.approx([dataset[i].fps for i in range(3)])
    with torch.no_grad(), autocast(CPU):
        expected = model.encode_video(to_model(dataset[1].video[None]))[0]
    assert torch.equal(latents[1], expected.half())
    latents = latents.clone()  # of a file that is about to change
    *_, again, count = encoded(dataset)
    assert count == 0 and torch.equal(again, latents)
    with torch.no_grad():
        model.encoder.conv_in.weight[0, 0, 0, 0] += 1
    *_, other, count = encoded(dataset)
    assert count == 3 and not torch.equal(other, latents)
    model.set_latent_statistics(torch.randn(1, 4, 2, 2, 2))
    assert encoded(dataset)[-1] == 3
    assert encoded(MovingShapes(3, seed=1, size=32))[-1] == 3
    assert encoded(MovingShapes(3, seed=1, size=32, frames=8))[-1] == 3
    dataset = MovingShapes(3, seed=1, size=64, frames=8)
    assert encoded(dataset)[-1] == 3 and encoded(dataset)[-1] == 0
    with patched((shapes, "PIXELS", shapes.PIXELS + 1)):  # the renderer draws something else
        assert encoded(dataset)[-1] == 3


def test_interrupted_encoding_goes_on_where_it_stopped(preset, tmp_path):
    model, dataset = AutoencoderKL(preset.vae), MovingShapes(130, size=16, frames=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    clips, fps, latents = train.encode_dataset(model, dataset, CPU, whole)
    with encoder_calls(stop_at=115) as calls, pytest.raises(KeyboardInterrupt):
        train.encode_dataset(model, dataset, CPU, parts)
    with (parts / "latents.bin").open("ab") as file:
        file.write(b"half a clip")
    with encoder_calls() as calls:
        again = train.encode_dataset(model, dataset, CPU, parts)
    assert len(calls) == 30  # 100 were on the disk
    assert differences(again, (clips, fps, latents)) == []
    assert latents.shape == (130, 4, 2, 2, 2) and len(latents.unique()) > 1000


def test_latents_are_never_written_to_and_encoded_again_where_damaged(preset, tmp_path):
    model, dataset = AutoencoderKL(preset.vae), MovingShapes(6, size=16, frames=2)
    mapped = train.encode_dataset(model, dataset, CPU, tmp_path)[2]
    before, latents = (tmp_path / "latents.bin").read_bytes(), mapped.clone()
    assert len(before) == 6 * 4 * 2 * 2 * 2 * 2
    mapped.zero_()
    assert (tmp_path / "latents.bin").read_bytes() == before
    for damage in ("latents.bin", "latents.json"):
        path = tmp_path / damage
        os.truncate(path, path.stat().st_size // 2)
        with encoder_calls() as calls:
            again = train.encode_dataset(model, dataset, CPU, tmp_path)[2]
        assert len(calls) == 6 and torch.equal(latents, again)


# ------------------------------------------------------------------------------ folders of videos


@pytest.fixture
def folder(videos, tmp_path):
    """22 short videos with captions, 2 of them unusable; a copy for each test."""
    return Path(shutil.copytree(videos, tmp_path / "my videos"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    path, lines = tmp_path_factory.mktemp("videos"), ["file,caption"]
    for i, shape in enumerate(MovingShapes(22, size=48, frames=20, fps=10.0)):
        write_video(path / f"{i}.mp4", shape.video, 10.0)
        lines.append(f'{i}.mp4,"{shape.caption}; it\'s number {i}"')
    for i in (0, 7):
        (path / f"{i}.mp4").write_text("not a video")
    (path / "captions.csv").write_text("\n".join(lines))
    return path


def test_both_stages_train_on_a_folder(preset, folder, tmp_path, capsys):
    """And go on when it has moved: what counts is the files and their contents; captions may be
    corrected, and the tokens stay the same."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    printed = run_train(preset, "vae", "--data", folder, "--out", out, "--flip", "--steps", 2)
    assert "22 videos, 22 different captions from captions.csv" in capsys.readouterr().err
    _, script, *arguments = shlex.split(printed.split("next: ")[1])
    assert script == "train.py" and "--flip" in arguments
    printed = run_train(preset, *arguments, "--steps", 1)
    assert (out / "skipped.txt").read_text().splitlines() == [
        f"{i}.mp4: Invalid data found when processing input" for i in (0, 7)
    ]
    assert "skipped 2 videos" in capsys.readouterr().err

    dataset, _ = VideoFolder(folder, size=32, flip=True).divide()  # without 0 and 20
    clips, rates, latents = cached(out, dataset)
    captions = [dataset.caption(i) for i in clips.tolist()]
    assert captions == [c for _, c in dataset.items if "number 7" not in c]
    assert latents.shape == (19, 4, 16, 4, 4)
    assert rates.tolist() == pytest.approx([15 / 1.9] * 19, rel=1e-3)
    _, script, prompt, *arguments = shlex.split(printed)
    assert prompt in captions and script == "sample.py"
    assert arguments == ["--fps", "7.9", "--checkpoint", str(out / "model.pt")]
    assert load_pipeline(out / "model.pt").tokenizer.unknown_words(prompt) == []

    before = load(out / "model.pt")["tokenizer"]
    shutil.copytree(folder, moved)
    text = (moved / "captions.csv").read_text().replace("it's number", "that is")
    (moved / "captions.csv").write_text(text)
    again = ("diffusion", "--data", moved, "--out", out, "--resume", "--steps", 2)
    with encoder_calls() as calls:
        run_train(preset, *again, "--flip")
    after = load(out / "model.pt")["tokenizer"]
    assert not calls and load(out / "last.pt")["step"] == 2
    assert after["merges"] == before["merges"] and set(after["words"]) > set(before["words"])
    with pytest.raises(UserError, match="was started with --flip True, not False: use"):
        run_train(preset, *again)
    shutil.copy(moved / "9.mp4", moved / "8.mp4")
    with pytest.raises(UserError, match="was started with data of digest"):
        run_train(preset, *again, "--flip")


def test_what_is_encoded_again(preset, folder, tmp_path):
    """Not for another caption or another place; all for another file of the same name, or for code
    that makes other pictures of it; and what could not be read before."""
    model = AutoencoderKL(preset.vae)

    def encode(path):
        with encoder_calls() as calls:
            clips, _, latents = train.encode_dataset(model, VideoFolder(path, size=16), CPU, out)
        return len(calls), clips.tolist(), latents.clone()

    out, moved, read = tmp_path, tmp_path / "moved", data.read_frames
    usable = [i for i in range(22) if i not in (0, 7)]

    def stalled(path, *arguments):
        if Path(path).name == "9.mp4":
            raise VideoError("Input/output error")
        return read(path, *arguments)

    with patched((data, "read_frames", stalled)):
        assert encode(folder)[:2] == (19, [i for i in usable if i != 9])
    count, clips, latents = encode(folder)
    assert count == 1 and sorted(clips) == usable and clips[-1] == 9
    shutil.copytree(folder, moved)
    text = (moved / "captions.csv").read_text().replace("it's number", "that is")
    (moved / "captions.csv").write_text(text)
    assert encode(moved)[0] == 0
    with patched((data, "PIXELS", data.PIXELS + 1)):
        assert encode(moved)[0] == 20
    shutil.copy(moved / "9.mp4", moved / "0.mp4")  # repaired
    count, clips, again = encode(moved)
    rows = [clips.index(i) for i in (0, 9)]
    assert count == 21 and torch.equal(again[rows[0]], again[rows[1]])


def test_frames_of_a_step_do_not_depend_on_what_failed_before(folder):
    """Where videos are partly broken, or too short for some windows."""
    read = data.read_frames

    def broken(path, pick, size, place):
        picked = []
        clip = read(path, lambda times: picked.append(pick(times)) or picked[0], size, place)
        if (picked[0] > 15).any():
            raise VideoError("a frame in it is damaged")
        return clip

    with patched((data, "read_frames", broken)):
        used = VideoFolder(folder, size=16, clip_seconds=1.6)
        several = [train.draw_frames(used, 3, 8, step) for step in range(6)]
        fresh = [train.draw_frames(VideoFolder(folder, size=16, clip_seconds=1.6), 3, 8, step)
                 for step in (5, 2)]
    assert used.skipped.keys() > {"0.mp4", "7.mp4"}
    assert np.array_equal(several[5], fresh[0]) and np.array_equal(several[2], fresh[1])


def test_the_context_grows_to_the_longest_caption(preset, folder, finished, tmp_path, capsys):
    """Of the training set, before anything is encoded, up to 256 tokens; what is longer is cut
    after a word, and counted. A text encoder that is trained already keeps its own."""
    text, names = (folder / "captions.csv").read_text(), [f"{7919 * n % 99991:05x}"
                                                          for n in range(400)]
    for i, (words, start, length) in enumerate((
        (40, "--vae", None), (199, "--vae", 256), (199, "--init", 100),
    )):
        whole = [" ".join([f"number {n}", *names[n - 3 :: 2][:words]]) for n in (3, 4)]
        changed = text.replace("number 3", whole[0]).replace("number 4", whole[1])
        (folder / "captions.csv").write_text(changed)
        command = ("diffusion", "--data", folder, "--out", tmp_path / str(i), "--steps", 1)
        run_train(preset, *command, start, finished / "model.pt")
        model, err = load(tmp_path / str(i) / "model.pt"), capsys.readouterr().err
        context = model["text_encoder"]["config"]["context_length"]
        assert context == length or length is None and 100 < context < 256
        captions = [c for c in model["data"]["captions"] if c.split()[-1] in names]
        assert len(captions) == 2  # cut after a word
        assert all(any(w in c for w in whole) for c in captions) == (words < 199)
        assert ("2 captions are cut" in err) == (words == 199)
        tokenizer = load_pipeline(tmp_path / str(i) / "model.pt").tokenizer
        assert all(len(tokenizer.encode(c)) <= context for c in captions)
        if length is None:
            run_train(preset, *command, "--resume", start, finished / "model.pt")
            after = load(tmp_path / str(i) / "model.pt")["text_encoder"]["config"]
            assert after == model["text_encoder"]["config"]


# ------------------------------------------------------------------------------ any setting

SETTINGS = {  # what --set is given: {where in the preset: value}

    "unet.widths=[64,160] unet.attention=true,False": {"unet.attention": (True, False)},
    "unet.widths=64 unet.blocks=2 unet.attention=true": {"unet.blocks": (2,), "unet.widths": (64,)},
    "diffusion.prediction=x_start": {"diffusion.prediction": "x_start"},
    "diffusion.prediction=eps diffusion.zero_terminal_snr=false": {
        "diffusion.zero_terminal_snr": False},

    "diffusion.min_snr_gamma=none": {"diffusion.min_snr_gamma": None},
    "vae.latent_channels=8": {"vae.latent_channels": 8, "unet.channels": 8},
    "vae.widths=32,64 unet.widths=64,160": {"vae.widths": (32, 64)},
    "text.width=64 text.heads=2": {"text.width": 64, "unet.text_width": 64},
    "training.save_every=100 training.save_every=7": {"diffusion_training.save_every": 7},
    "training.lr=1 training.steps=66": {
        "diffusion_training.lr": 1.0, "diffusion_training.easy_start": 11},
    "training.steps=66 training.easy_start=9": {"diffusion_training.easy_start": 9},
}


@pytest.mark.parametrize("line", SETTINGS)
def test_any_field_of_a_preset_can_be_set(line):
    args = train.parse_args(["diffusion", "--out", "x", "--set", *line.split()])
    preset = train.configure(args)
    for place, value in SETTINGS[line].items():
        part, field = place.split(".")
        found = getattr(getattr(preset, part), field)
        assert found == value and type(found) is type(value), place
    assert preset.vae_training == train.PRESETS["shapes"]().vae_training


def test_frames_of_another_size_and_number(preset, folder, tmp_path, monkeypatch, capsys):
    """From the command line into both stages, the checkpoint, and the commands that are printed."""
    out, options = tmp_path / "out", ("--size", "48x32", "--frames", 6)
    preset = tiny_preset(replace(TRAINING, steps=1))
    printed = run_train(preset, "vae", "--data", folder, "--out", out, *options,
                        "--set", "vae.latent_channels=5", "unet.widths=32,64", "training.warmup=9")
    _, script, *arguments = shlex.split(printed.split("next: ")[1])
    assert "training.warmup=9" not in arguments and "unet.widths=32,64" in arguments
    printed = run_train(preset, *arguments)
    model = load(out / "model.pt")
    assert model["unet"]["config"]["channels"] == 5
    assert model["unet"]["config"]["widths"] == (32, 64)
    assert model["data"]["size"] == (48, 32) and model["data"]["frames"] == 6
    _, script, *arguments = shlex.split(printed)
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--steps", "1", "--out", str(tmp_path)])
    sample.main()
    clip = iio.imread(capsys.readouterr().out.strip())
    assert clip.shape == (6, 4 * 32, 4 * 48, 3)
    run_train(preset, "diffusion", "--data", folder, "--out", out, "--resume", "--steps", 2,
              *options, "--set", "unet.widths=32,64")


def test_a_new_unet_on_a_trained_autoencoder(preset, finished, tmp_path):
    """Of a whole model too, of which nothing else is taken."""
    wider = replace(preset, unet=replace(preset.unet, widths=(32, 64)))
    run_train(wider, "diffusion", "--out", tmp_path, "--vae", finished / "model.pt", "--steps", 1)
    ours, theirs = load(tmp_path / "model.pt"), load(finished / "model.pt")
    assert differences(ours["vae"], theirs["vae"]) == []
    assert ours["unet"]["config"]["widths"] == (32, 64)
    assert differences(ours["text_encoder"]["state"], theirs["text_encoder"]["state"])


# ------------------------------------------------------------------------------ held-out clips


def test_losses_are_averaged_for_each_range_of_noise():
    sums, batches = {}, [
        ([1.0, 2.0, 3.0, 4.0], [0, 300, 999, 750]), ([5.0, 7.0], [200, 10]), ([9.0], [260]),
    ]
    for losses, t in batches:
        values = train.by_noise(torch.tensor(losses), torch.tensor(t), 1000)
        tools.accumulate(sums, 1, tools.read(values))
    means = train.averages(sums, 3)
    # Every step weighs the same, and so within it do its samples.
    assert means == {
        "loss": pytest.approx(17.5 / 3), "loss_1": pytest.approx((1 / 4 + 6) / (1 / 4 + 1)),
        "loss_2": pytest.approx((2 / 4 + 9) / (1 / 4 + 1)), "loss_4": pytest.approx(3.5),
    }


def test_held_out_losses_are_of_fixed_draws_from_other_clips(preset, folder, finished, tmp_path):
    """With a learning rate of 0 they are the same at every save; the clips are none of the training
    set, the draws as in training, all ranges of noise are among them."""
    seen, loss_of = [], train.text_to_video_loss

    def watch(model, schedule, tokens, token_mask, *part):
        if not torch.is_grad_enabled():
            seen.append(part)
        return loss_of(model, schedule, tokens, token_mask, *part)

    for name, data_options in (("shapes", ()), ("folder", ("--data", folder))):
        out, command = tmp_path / name, ("--vae", finished / "vae.pt", "--lr", 0)
        seen.clear()
        with patched((train, "text_to_video_loss", watch)):
            run_train(preset, "diffusion", "--out", out, *command, *data_options)
        lines = [json.loads(line) for line in (out / "log.jsonl").open()]
        measured = [line for line in lines if "held_out_loss" in line]
        assert [line["step"] for line in measured] == [2, 4]
        names = {"held_out_loss", *(f"held_out_loss_{i}" for i in (1, 2, 3, 4))}
        assert all(set(line) == names | {"stage", "step"} for line in measured)
        assert all(measured[0][name] == measured[1][name] > 0 for name in names)
        rows, _, clips, given, t, _, _ = (torch.cat(x) for x in zip(*seen[: len(seen) // 2]))
        trained = np.fromfile(out / "latents.bin", np.float16)
        trained = {clip.tobytes() for clip in trained.reshape(-1, *clips.shape[1:])}
        assert not any(clip.half().numpy().tobytes() in trained for clip in clips)
        assert sorted((8 * t // 1000).tolist()) == pytest.approx(range(8), abs=1)
        assert given.any() and rows.max() >= TRAINING.videos  # captions after those in training


def test_a_folder_whose_held_out_videos_cannot_be_used_trains(preset, folder, finished, tmp_path):
    (folder / "20.mp4").write_text("not a video")
    out = tmp_path / "out"
    run_train(preset, "diffusion", "--data", folder, "--out", out, "--vae", finished / "vae.pt",
              "--steps", 1)
    assert "held_out_loss" not in (out / "log.jsonl").read_text()
    assert (out / "samples" / "loss.png").is_file()


def test_samples_have_their_words_and_a_real_clip_beside_them(preset, finished, tmp_path):
    """Those of --prompts, or the most different captions of the training set."""
    dataset, grids = MovingShapes(TRAINING.videos, size=32), []
    captions = [dataset.caption(i) for i in range(len(dataset))]
    draw_grid = train.captioned_grid

    def grid(videos, words):
        grids.append((videos, words))
        return draw_grid(videos, words)

    (tmp_path / "prompts.txt").write_text(f"\ufeff{captions[3].upper()}\n\n  a cat swims  \n")
    for name, options in (("own", ()), ("file", ("--prompts", tmp_path / "prompts.txt"))):
        with patched((train, "captioned_grid", grid)):
            run_train(preset, "diffusion", "--out", tmp_path / name, "--steps", 1, *options,
                      "--vae", finished / "vae.pt", pictures=True)
    (own, words), (given, prompts) = grids
    assert len(set(words)) == 4 and set(words) <= set(captions)
    assert prompts == [captions[3].upper(), "a cat swims"]
    for videos, words in grids:
        assert videos.shape == (len(words), 16, 64, 128, 3)
        for video, text in zip(videos, words):
            real = video[:, ::2, 64::2]
            known = text.lower() in captions
            assert np.array_equal(real, dataset[captions.index(text.lower())].video) if known else (
                not real.any())
            assert video[:, :, :64].any()


# ------------------------------------------------------------------------------ losses of the VAE


@pytest.fixture
def vgg_file(tmp_path, monkeypatch):
    """A file like torchvision's, of a much narrower network."""
    stages = tuple((4, indices) for _, indices in vae.VGGFeatures.stages)
    monkeypatch.setattr(vae.VGGFeatures, "stages", stages)
    state = {f"features.{name.removeprefix('convolutions.')}": value
             for name, value in vae.VGGFeatures().state_dict().items() if "conv" in name}
    torch.save(state | {"classifier.0.weight": torch.zeros(3)}, tmp_path / "vgg.pth")
    return tmp_path / "vgg.pth"


def test_the_vgg_term_is_switched_on_by_its_weights(preset, finished, vgg_file, tmp_path):
    command = ("vae", "--out", tmp_path / "with", "--steps", 1)
    run_train(preset, *command, "--vgg", vgg_file)
    assert "vgg" not in log(finished)[0] and log(tmp_path / "with")[0]["vgg"] > 0
    with pytest.raises(UserError, match="was started with --vgg True, not False"):
        run_train(preset, *command, "--resume")


# ------------------------------------------------------------------------------ a step


@pytest.fixture(scope="module")
def drawn(preset, finished, tmp_path_factory):
    """What 20 steps with 128 clips each draw: a list of dicts. Nothing is trained."""
    out, steps = tmp_path_factory.mktemp("drawn"), []
    shutil.copy(finished / "vae.pt", out)
    encode_text = TextEncoder.forward

    def encoder(self, tokens, mask):
        steps.append({"tokens": tokens, "mask": mask})
        return encode_text(self, tokens, mask)

    def unet(self, x, t, context, context_mask, fps, given, given_mask, frames_are_images):
        steps[-1] |= {"fps": fps, "given": given, "given_mask": given_mask}
        assert frames_are_images.shape == t.shape and not frames_are_images.any()
        return x

    def loss(model, schedule, x_start, t, noise, keep):
        model(noise, t)
        steps[-1] |= {"x_start": x_start, "t": t, "noise": noise, "keep": keep}
        return torch.zeros(len(t), requires_grad=True)

    many = replace(TRAINING, steps=20, batch_size=128, save_every=100)
    with patched(
        (TextEncoder, "forward", encoder), (UNet3D, "forward", unet),
        (train, "diffusion_loss", loss), (train, "draw_samples", lambda *_: None),
        (train, "measure", lambda *_: None),
        (sys.modules[__name__], "check_preset", lambda *_: None),
    ):
        run_train(replace(preset, diffusion_training=many), "diffusion", "--out", out)
    return steps


def test_a_tenth_of_the_captions_is_the_empty_one(drawn, finished):
    assert load_pipeline(finished / "model.pt").tokenizer.encode("") == [START, END]
    null = torch.cat([(s["mask"].sum(1) == 2) for s in drawn])  # no caption is that short
    assert 0.07 < null.double().mean() < 0.13
    for s in drawn:
        words = s["tokens"][s["mask"].sum(1) == 2]
        assert (words[:, 0] == START).all() and (words[:, 1] == END).all()
        assert (words[:, 2:] == 0).all()
    assert len({s["mask"].shape[1] for s in drawn}) == 1  # compiled for one length


def test_clips_captions_and_rates_belong_together(drawn, finished):
    dataset = MovingShapes(TRAINING.videos, size=32)
    clips, rates, latents = cached(finished, dataset)
    assert clips.tolist() == list(range(TRAINING.videos))
    assert latents.shape == (TRAINING.videos, 4, 16, 4, 4) and latents.dtype == torch.float16
    channels = latents.double().movedim(1, 0).flatten(1)
    assert channels.mean(1).abs().max() < 1e-3 and (channels.std(1) - 1).abs().max() < 1e-3
    tokenizer = load_pipeline(finished / "model.pt").tokenizer
    for tokens, x_start, fps in zip(*(drawn[0][k] for k in ("tokens", "x_start", "fps"))):
        (index,) = [i for i, z in enumerate(latents) if torch.equal(z.float(), x_start)]
        assert fps == rates[index]
        assert tokenizer.decode(tokens.tolist()).strip() in ("", dataset.caption(index))


def test_given_frames_are_shown_clean_and_left_out_of_the_loss(drawn):
    for s in drawn:
        assert torch.equal(s["keep"], ~s["given_mask"])
        assert torch.equal(s["given"], s["x_start"])
        assert s["given_mask"].any() and s["keep"].any(1).all()


def test_timesteps_cover_every_interval_and_all_draws_are_new(drawn):
    for s in drawn:
        assert 0 <= s["t"].min() and s["t"].max() < 1000
        assert sorted((s["t"] * 128 // 1000).tolist()) == pytest.approx(range(128), abs=1)
    assert len({s["t"][0].item() for s in drawn}) > 15
    noise = torch.stack([s["noise"] for s in drawn]).flatten(1)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert torch.corrcoef(noise[:5]).triu(1).abs().max() < 0.02


def test_given_frames_of_all_five_tasks():
    mask = draw_given_frames(np.random.default_rng(0), 8000, 16, text_only=0.5).numpy()
    count = mask.sum(1)
    assert abs((count == 0).mean() - 0.5) < 0.02
    assert count.max() < 16
    given = mask[count > 0]
    count, share = given.sum(1), len(given) / 5  # the five tasks are equally likely
    prefix = (np.cumprod(given, axis=1).sum(1) == count)
    suffix = (np.cumprod(given[:, ::-1], axis=1).sum(1) == count)
    ends = given[:, 0] & given[:, -1] & (count == 2)
    assert (prefix & (count == 1)).sum() > 0.9 * share  # the first
    assert (prefix & (count > 1)).sum() > 0.7 * share  # the first few
    assert suffix.sum() > 0.9 * share  # the last few
    assert ends.sum() > 0.9 * share  # both ends
    assert (~prefix & ~suffix & ~ends).sum() > 0.7 * share  # any
    assert given.any(0).all()


def test_given_frames_of_short_clips():
    rng = np.random.default_rng(0)
    for frames in (1, 2, 3):
        mask = draw_given_frames(rng, 500, frames, text_only=0.0)
        assert (~mask).any(1).all()
        assert mask.any(1).all() == (frames > 1)  # of a single frame there is nothing to give
    assert not draw_given_frames(rng, 500, 16, text_only=1.0).any()


def test_the_first_step_sees_frames_of_several_videos_in_range():
    frames = train.draw_frames(MovingShapes(9, size=32), seed=0, count=7, step=0)
    frames = train.pictures(frames)
    assert frames.shape == (7, 3, 32, 32)
    assert frames.min() >= -1 and frames.max() <= 1 and frames.max() > 0.3
    assert len({frame.numpy().tobytes() for frame in frames}) > 4


def test_one_batch_overfits(preset, tiny_pipeline):
    """Text encoder, UNet, loss and optimizers together can learn four clips by heart, where nothing
    but the words says which is which: the noisy clips are the same pure noise."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"text": TextEncoder(preset.text), "unet": UNet3D(preset.unet)})
    schedule = NoiseSchedule(preset.diffusion)
    captions = ["a red circle moves right, then up", "a star spins", "a blue ring grows", ""]
    tokens, mask = tiny_pipeline.tokenizer.batch(captions, 100)
    x_start, noise = torch.randn(4, 4, 4, 4, 4), torch.randn(4, 4, 4, 4).expand(4, -1, -1, -1, -1)
    t, fps = torch.full((4,), 999), torch.full((4,), 8.0)
    config = replace(TRAINING, optimizer="muon", steps=60)
    optimizers = make_optimizers(model, config).values()
    losses = []
    for _ in range(config.steps):
        context = model["text"](tokens, mask)
        loss = diffusion_loss(
            lambda x_t, t: model["unet"](x_t, t, context, mask, fps), schedule, x_start, t, noise
        ).mean()
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 5e-3
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.5 and losses[-1] < losses[0] / 20, losses[::10]


def test_the_average_is_the_closed_form():
    """Weights w_n with decays d_n: the sum of (1 - d_n) w_n times all later decays."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    ema, weights = EMA(model, decay=0.3), [model.weight.detach().clone()]
    for step in range(6):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3))
        weights.append(model.weight.detach().clone())
        ema.update(model, step)
    decays = [1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3]  # (1 + n) / (10 + n), at most 0.3
    expected = math.prod(decays) * weights[0]
    for n in range(6):
        expected += (1 - decays[n]) * math.prod(decays[n + 1 :]) * weights[n + 1]
    assert torch.allclose(ema.model.weight, expected, atol=1e-12)
    assert not ema.model.training
    assert torch.equal(model.weight, weights[-1])  # and the model itself is left alone


# ------------------------------------------------------------------------------ optimizers


@pytest.mark.parametrize("dtype, error", [
    (torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)
])
@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (24, 24), (1, 9), (9, 1)])
def test_orthogonalize_makes_singular_values_one(shape, dtype, error):
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    for scale in (1e-4, 1.0, 1e4):
        g = scale * (u * torch.linspace(0.1, 1, len(s))) @ v
        q = orthogonalize(g[None], dtype)[0]
        assert q.dtype == torch.float32
        values = torch.linalg.svdvals(q)
        assert values.min() > 0.6 and values.max() < 1.3, values
        # The singular vectors stay: g^T q is symmetric and positive.
        product = g.T @ q / scale
        assert torch.allclose(product, product.T, atol=1e-2 + error)
        assert torch.linalg.eigvalsh(product).min() > -1e-2 - error
        assert torch.allclose(orthogonalize(g.T[None], dtype)[0], q.T, atol=1e-3 + error)


def test_orthogonalize_of_nothing_is_nothing():
    """Layers behind a zero-initialised one have a gradient of exactly 0 at first."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert not orthogonalize(torch.zeros(2, 4, 6), dtype).any()


def test_muon_moves_many_matrices_as_it_moves_one():
    """Stacked with those of the same shape, also transposed ones and those without a gradient."""
    torch.manual_seed(0)
    shapes = (32, 8), (8, 32), (8, 8), (8, 4, 3, 3), (36, 8), (8, 32), (8, 36), (5, 7)
    weights = [torch.randn(shape) for shape in shapes]
    weights[3] = weights[3].contiguous(memory_format=torch.channels_last)
    together, alone = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    optimizers = [Muon(together, 0.1, weight_decay=0.3)]
    optimizers += [Muon([p], 0.1, weight_decay=0.3) for p in alone]
    for step in range(2):
        for p, q in zip(together[:-1], alone):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(together[-1], weights[-1])
    for p, q, w in zip(together, alone, weights):
        torch.testing.assert_close(p, q)
        assert p.stride() == w.stride()


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_muon_multiplies_in_the_precision_of_the_run(preset, precision, dtype):
    model = nn.ModuleDict({"unet": UNet3D(preset.unet)})
    muon = make_optimizers(model, replace(TRAINING, optimizer="muon"), precision)["muon"]
    assert muon.dtype == dtype
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    muon.step()
    (group,) = muon.state_dict()["param_groups"]  # as in every run before, so that they resume
    assert set(group) == {"lr", "momentum", "weight_decay", "params"}
    assert {name for s in muon.state.values() for name in s} == {"momentum"}
    state = {value.dtype for s in muon.state.values() for value in s.values()}
    assert state == {p.dtype for p in model.parameters()} == {torch.float32}


def test_muon_moves_what_it_is_given_by_the_learning_rate():
    torch.manual_seed(0)
    matrix, kernel, other = (
        nn.Parameter(torch.randn(shape)) for shape in ((32, 8), (8, 4, 3, 3), (4, 4))
    )
    before = [p.detach().clone() for p in (matrix, kernel, other)]
    for p in (matrix, kernel, other):
        p.grad = torch.randn_like(p)
    optimizer = Muon([matrix, kernel], lr=0.01)
    optimizer.step()
    assert torch.equal(other, before[2])
    for p, old in zip((matrix, kernel), before):
        move = (p - old).flatten(1)
        # Orthogonal rows or columns, and about as long a step as AdamW's: 0.2 lr per weight.
        values = torch.linalg.svdvals(move) / (0.2 * 0.01 * max(move.shape) ** 0.5)
        assert values.min() > 0.6 and values.max() < 1.3
        assert (move * p.grad.flatten(1)).sum() < 0  # downhill


def test_muon_weight_decay_and_momentum_are_the_closed_forms():
    weight = nn.Parameter(torch.randn(6, 4))
    old, weight.grad = weight.detach().clone(), torch.zeros(6, 4)
    optimizer = Muon([weight], lr=0.1, weight_decay=0.3)
    for n in range(1, 4):
        optimizer.step()
        assert torch.allclose(weight, old * (1 - 0.1 * 0.3) ** n)
    gradients = torch.randn(3, 6, 4)
    for g in gradients:
        weight.grad = g.clone()
        optimizer.step()
        assert torch.equal(weight.grad, g)
    average = sum(0.05 * 0.95 ** (2 - n) * g for n, g in enumerate(gradients))
    assert torch.allclose(optimizer.state[weight]["momentum"], average, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer(preset, name):
    models = {"text_encoder": TextEncoder(preset.text), "unet": UNet3D(preset.unet)}
    for model in (nn.ModuleDict(models), AutoencoderKL(preset.vae)):
        optimizers = make_optimizers(model, replace(TRAINING, optimizer=name, weight_decay=0.5))
        groups = [g for optimizer in optimizers.values() for g in optimizer.param_groups]
        held = [id(p) for group in groups for p in group["params"]]
        names = {id(p): n for n, p in model.named_parameters()}
        assert len(held) == len(set(held)) and set(held) == set(names)
        for group in groups:
            for p in group["params"]:
                assert group["weight_decay"] == (0.5 if p.ndim > 1 else 0)
        assert set(optimizers) == {"adamw", name}
        if name == "muon":
            hidden = {names[id(p)] for p in optimizers["muon"].param_groups[0]["params"]}
            assert hidden and not any("embed" in n or "conv_in" in n for n in hidden)
            assert all(p.ndim > 1 for p in optimizers["muon"].param_groups[0]["params"])


def test_the_discriminator_and_the_autoencoder_do_not_move_each_other(preset, tmp_path):
    """Each loss has its own backward pass."""
    def trained(name, loss):
        run_train(replace(preset, vae_loss=loss), "vae", "--out", tmp_path / name, "--steps", 1)
        return load(tmp_path / name / "last.pt")["models"]

    both = trained("both", preset.vae_loss)
    no_opinion = trained("no opinion", replace(preset.vae_loss, gan_start=8))  # of 4 steps: 2 of 1
    judge = vae.VAELoss.discriminator_loss
    with patched((vae.VAELoss, "discriminator_loss", lambda *batch: 0 * judge(*batch))):
        no_lesson = trained("no lesson", preset.vae_loss)
    assert differences(both["vae"], no_lesson["vae"]) == []
    assert differences(both["discriminator"], no_opinion["discriminator"]) == []
    assert differences(both["vae"], no_opinion["vae"])
    assert differences(both["discriminator"], no_lesson["discriminator"])


@pytest.mark.parametrize("stage, owner, name, change", [
    ("diffusion", train, "diffusion_loss", lambda loss: loss * math.nan),
    ("diffusion", train, "diffusion_loss", lambda loss: loss * math.inf),
    # Finite itself, with a gradient that is not:
    ("diffusion", train, "diffusion_loss", lambda loss: loss + (0 * loss).sqrt()),
    ("vae", vae.VAELoss, "discriminator_loss", lambda loss: loss * math.nan),
])
def test_what_is_not_finite_moves_nothing(preset, finished, tmp_path, stage, owner, name, change):
    """The files stay as they were too, and the next start goes on from there."""
    out, function, moved = tmp_path / "out", getattr(owner, name), []
    shutil.copytree(finished, out)
    shutil.copy(finished.parent / f"{stage}.pt", out / "last.pt")
    before = {p: p.read_bytes() for p in out.glob("*.pt")}
    command = (stage, "--out", out, "--resume", "--steps", 5)
    with patched(
        (owner, name, lambda *args, **options: change(function(*args, **options))),
        (torch.optim.AdamW, "step", moved.append), (Muon, "step", moved.append),
    ), pytest.raises(UserError, match="not finite any more: .* --resume and a lower --lr"):
        run_train(preset, *command)
    assert not moved and {p: p.read_bytes() for p in out.glob("*.pt")} == before
    assert count_steps(preset, *command, "--lr", 1e-4) == 1


def test_long_gradients_are_clipped(finished, tmp_path):
    shutil.copy(finished / "vae.pt", tmp_path)
    norms, step = [], torch.optim.AdamW.step

    def record(self):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(math.sqrt(sum(g.square().sum() for g in gradients if g is not None)))
        step(self)

    with patched(
        (torch.optim.AdamW, "step", record),
        (train, "diffusion_loss", lambda *args, **options: 1e4 * diffusion_loss(*args, **options)),
    ):
        run_train(tiny_preset(optimizer="adamw"), "diffusion", "--out", tmp_path, "--steps", 2)
    assert norms == pytest.approx([TRAINING.grad_clip] * 2, rel=1e-3)
    assert all(line["grad"] > 10 for line in log(tmp_path))  # told as it was


def test_weights_that_are_not_finite_are_not_saved(preset, copied):
    """Where the last step before a checkpoint ruins them, the one before it stays."""
    before = {p: p.read_bytes() for p in copied.glob("*.pt")}

    def ruin(self, model, step):
        next(model.parameters()).data.fill_(math.inf)

    with patched((EMA, "update", ruin)), pytest.raises(UserError, match="--resume and a lower"):
        run_train(preset, "diffusion", "--out", copied, "--resume", "--steps", 5)
    assert {p: p.read_bytes() for p in copied.glob("*.pt")} == before


# ------------------------------------------------------------------------------ presets


def test_the_shipped_model_is_what_the_preset_makes():
    """Its parts, and in the log that was written on the way both stages to their ends."""
    preset = train.configure(train.parse_args(["diffusion", "--out", "x"]))
    folder = Path(train.__file__).parent / "pretrained"
    assert (folder / "shapes.pt").stat().st_size <= 16e6
    model = load_pipeline(folder / "shapes.pt")
    parts = (model.vae, model.text_encoder, model.unet, model.schedule)
    wanted = [preset.vae, preset.text, preset.unet, preset.diffusion]
    assert [part.config for part in parts] == wanted
    lines = [json.loads(line) for line in (folder / "shapes.jsonl").open()]
    for stage in ("vae", "diffusion"):
        config = getattr(preset, f"{stage}_training")
        steps = [line["step"] for line in lines if line["stage"] == stage and "lr" in line]
        assert steps == list(range(config.log_every, config.steps + 1, config.log_every))
        for line in lines:
            if line["stage"] == stage and "lr" in line:
                assert line["lr"] == pytest.approx(learning_rate(line["step"] - 1, config))


@pytest.mark.parametrize("name", train.PRESETS)
def test_the_parts_of_a_preset_fit_together(name):
    preset = train.configure(train.parse_args(["vae", "--out", "x", "--preset", name]))
    assert preset == train.PRESETS[name]()


def test_a_full_disk_is_told_in_one_line(preset, tmp_path):
    torch_save = torch.save
    with patched((torch, "save", lambda what, _: torch_save(what, "/dev/full"))):
        with pytest.raises(UserError, match="^cannot write "):
            run_train(preset, "vae", "--out", tmp_path, "--steps", 1)
    with pytest.raises(OSError, match="File name too long"):
        run_train(preset, "vae", "--out", tmp_path / ("x" * 300))


def test_the_command_line_replaces_the_preset_of_its_own_stage():
    arguments = "diffusion --out x --steps 7 --batch-size 3 --lr 0 --videos 5".split()
    arguments += ["--set", "training.ema=0.9", "training.image_fraction=0.2"]
    preset, changed = train.PRESETS["shapes"](), train.configure(train.parse_args(arguments))
    assert changed.vae_training == preset.vae_training
    expected = replace(preset.diffusion_training, steps=7, batch_size=3, lr=0.0, videos=5, ema=0.9,
                       image_fraction=0.2, easy_start=1,
                       strides=((3, 4), (5, 2)))  # their share of the steps
    assert changed.diffusion_training == expected
    fixed = train.configure(train.parse_args([*arguments, "--set", "training.easy_start=4"]))
    assert fixed.diffusion_training == replace(expected, easy_start=4)
    short = ["vae", "--preset", "ucf101", "--out", "x", "--steps", "500"]
    assert train.configure(train.parse_args(short)).vae_loss.gan_start == 100
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--help"])
    assert stop.value.code == 0


def test_every_wording_of_a_video_is_learned(tmp_path):
    for name, text in {"a": "a dog runs\nthe dog is running", "b": "a cat sleeps"}.items():
        write_video(tmp_path / f"{name}.gif", MovingShapes(1)[0].video, 8.0)
        (tmp_path / f"{name}.txt").write_text(text)
    captions, wordings = train.list_captions(VideoFolder(tmp_path))
    assert sorted(captions) == ["a cat sleeps", "a dog runs", "the dog is running"]
    assert {captions[i] for i in wordings[0]} == {"a dog runs", "the dog is running"}
    drawn = [train.reword(0, step, torch.tensor([0, 1, -1]), wordings) for step in range(20)]
    assert {row[0].item() for row in drawn} == set(wordings[0])
    assert all(row[1:].tolist() == [1, -1] for row in drawn)
    assert torch.equal(drawn[3], train.reword(0, 3, torch.tensor([0, 1, -1]), wordings))
