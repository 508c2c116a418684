"""The measurements measure what they say, on videos whose truth is known."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tools
from conftest import tiny_configs
from data import VideoFolder
from experiments import nearest, order, reference, slices, speed, steps, tasks
from shapes import COLOURS, DIRECTIONS, SPEED, Thing, render


def rows(text):
    return [json.loads(line) for line in text.splitlines()]


def test_pairs_differ_in_the_order_alone():
    for one, other in zip(*order.ordered_pairs(50), strict=True):
        assert len(set(one.actions)) == 2 and one.actions == other.actions[::-1]
        assert asdict(one) | {"actions": other.actions} == asdict(other)


def test_a_model_deaf_to_the_order_gets_no_pair_right(monkeypatch, capsys):
    first, _ = order.ordered_pairs(10)
    pipeline = SimpleNamespace(generate=lambda _: [render([thing]) for thing in first])
    monkeypatch.setattr(order, "load_pipeline", lambda *_: pipeline)
    order.order("", 10)
    row, = rows(capsys.readouterr().out)
    assert row == {"pairs": 10, "first": 10, "second": 0, "both": 0}


def test_speeds_are_those_of_the_renderer(capsys):
    def generate(prompts, fps):
        ways = [text.split()[-1] for text in prompts]
        starts = [32 - 16 * np.array(DIRECTIONS[way]) for way in ways]  # stays inside the frame
        things = [Thing("red", "circle", "", (w,), *xy, 0) for w, xy in zip(ways, starts)]
        return [render([thing], fps=fps) for thing in things]

    tasks.speeds(SimpleNamespace(generate=generate), 4)
    found = rows(capsys.readouterr().out)
    assert [row["fps"] for row in found] == [8, 9, 10, 11, 12]
    assert all(row["pixels_a_second"] == pytest.approx(SPEED, rel=0.02) for row in found)


def test_slices_hide_the_order_that_whole_clips_show(tmp_path):
    slices.write_circles(tmp_path, 12)
    whole, parts = (
        [VideoFolder(tmp_path, stride=stride)[i] for i in range(12)] for stride in (None, 1)
    )
    assert {clip.caption for clip in whole} == {
        f"a red circle moves {x}, then {y}" for x in DIRECTIONS for y in DIRECTIONS if x != y
    }
    assert next(iter(COLOURS)) == "red"
    read = [slices.shares([c.video for c in cs], cs[0].fps) for cs in (whole, parts)]
    assert read[0] == {"in_order": 1, "either": 1}
    assert read[1]["in_order"] < 0.4 and read[1]["either"] > 0.9


def test_spoilt_clips():
    video = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    spoilt = {how: reference.spoil(video, how, np.random.default_rng(0))
              for how in ("nothing", "shuffled", "noise")}
    assert (spoilt["nothing"] == video).all()
    assert sorted(map(bytes, spoilt["shuffled"])) == sorted(map(bytes, video))
    assert (spoilt["shuffled"] != video).any()
    assert spoilt["noise"].dtype == np.uint8
    assert 10 < np.abs(spoilt["noise"].astype(float) - video).mean() < 25


def test_a_model_that_repeats_its_clips_is_found_out(
    monkeypatch, tiny_pipeline, tmp_path, capsys
):
    slices.write_circles(tmp_path, 5)
    dataset = VideoFolder(tmp_path, size=32)
    clips = {dataset[i].caption: dataset[i].video for i in range(len(dataset))}

    def repeat(prompts, fps):
        assert np.allclose(fps, dataset[0].fps) and len(prompts) == 7
        return np.stack([clips[prompt] for prompt in prompts])

    pipeline = SimpleNamespace(generate=repeat, vae=tiny_pipeline.vae, size=32)
    networks = {"i3d": lambda videos: videos.mean((3, 4)).flatten(1)}
    monkeypatch.setattr(nearest, "load_pipeline", lambda *_: pipeline)
    monkeypatch.setattr(nearest.metrics, "load_networks", lambda *_: (networks, {}))
    nearest.nearest("", str(tmp_path), 7, tmp_path / "nearest.png")
    out, err = capsys.readouterr()
    real, copy, generated, one_rate = rows(out)
    assert "7 clips are too few" in err and (tmp_path / "nearest.png").exists()
    assert [row["num"] for row in (real, copy, generated, one_rate)] == [5, 5, 7, 7]
    assert real["fvd"] == 0 and real["distance"] > 1 and real["same_caption"] == 0  # another clip
    assert copy["fvd"] > 0 and copy["distance"] > 1
    assert generated["distance"] == 0 and generated["same_caption"] == 1
    assert one_rate == generated | {"clips": "generated, one rate"}


def one_second(action):
    action()
    return 1.0


@pytest.mark.parametrize("what", sorted(set(speed.SPEEDS) - {"data", "i3d"}))  # need files
def test_every_speed_is_a_row_of_numbers(monkeypatch, capsys, what):
    unet, text, vae = tiny_configs()
    preset = replace(speed.train.PRESETS["shapes"], unet=unet, text=text, vae=vae)
    monkeypatch.setitem(speed.train.PRESETS, "shapes", preset)
    monkeypatch.setattr(speed, "matrix_peak", lambda *_: 1e12)
    monkeypatch.setattr(speed, "seconds", lambda *actions, **_: [one_second(a) for a in actions])
    more = {"step": "--batch-size 4 --grad-accum 2", "sample": "--num 2"}
    more |= {"kernels": "--batch-size 1", "peers": "--batch-size 2 --grad-checkpoint"}
    args = speed.parse_args([what, *more.get(what, "").split()])
    speed.SPEEDS[what](args)
    found = rows(capsys.readouterr().out)
    numbers = [v for row in found for v in row.values() if not isinstance(v, str)]
    assert found and numbers and min(numbers) > 0
    if what == "step":  # a step of one second
        assert found[0]["step_ms"] == 1000 and found[0]["clips_per_second"] == 4
        assert found[0]["of_peak"] == pytest.approx(found[0]["gflop"] / 1000, rel=1e-3)
        phases = {"draw", "forward", "backward", "clip", "muon", "adamw", "average"}
        assert {f"{phase}_ms" for phase in phases} < set(found[0])


@pytest.mark.parametrize("name, kind", [("cuda", "CUDA"), ("mps", "Apple")])
def test_a_device_that_is_not_there_is_refused(name, kind):
    with pytest.raises(tools.UserError, match=f"--device {name}: PyTorch sees no {kind} GPU here"):
        tools.pick_device(name)


@pytest.mark.parametrize("name", tools.DEVICES)
@pytest.mark.parametrize("precision, wanted", [(None, None), ("bf16", True), ("fp32", False)])
def test_every_device_can_be_asked_for(monkeypatch, request, name, precision, wanted):
    for module in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    settings = matmul.allow_tf32, cudnn.allow_tf32
    request.addfinalizer(lambda: (setattr(matmul, "allow_tf32", settings[0]),
                                  setattr(cudnn, "allow_tf32", settings[1])))
    matmul.allow_tf32 = cudnn.allow_tf32 = True  # as PyTorch's advice for compiling has it
    device = tools.pick_device(name, precision)
    assert device.type == ("cuda" if name == "auto" else name)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert matmul.allow_tf32 == cudnn.allow_tf32 == (precision != "fp32")
    if device.type != "cuda":  # without CUDA there is no autocast for it
        with tools.autocast(device, precision):
            assert wanted in (None, torch.is_autocast_enabled(device.type))


@pytest.mark.parametrize("module, words", [
    (order, "--num 0"), (slices, "--steps many"), (tasks, "nothing"), (steps, "--num"),
    (reference, "--num 1"), (nearest, ""), (speed, ""),
])
def test_mistakes_are_told_in_one_line(module, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        module.parse_args(words.split())
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
