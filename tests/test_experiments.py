"""The measurements measure what they say, on videos whose truth is known."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import experiments
import numpy as np
import pytest
from data import COLOURS, DIRECTIONS, SPEED, Thing, VideoFolder, render


@pytest.fixture
def measure(run_script, monkeypatch):
    """The rows that an experiment prints where `generate` stands in for the trained model."""

    def run(generate, *arguments):
        pipeline = SimpleNamespace(generate=generate)
        monkeypatch.setattr(experiments, "load_pipeline", lambda *_: pipeline)
        status, out, _ = run_script(experiments, *arguments)
        assert status == 0
        return [json.loads(line) for line in out.splitlines()]

    return run


def test_pairs_differ_in_the_order_alone():
    for one, other in zip(*experiments.ordered_pairs(50), strict=True):
        assert len(set(one.actions)) == 2 and one.actions == other.actions[::-1]
        assert asdict(one) | {"actions": other.actions} == asdict(other)


def test_a_model_deaf_to_the_order_gets_no_pair_right(measure):
    first, _ = experiments.ordered_pairs(10)
    row, = measure(lambda _: [render([thing]) for thing in first], "order", "--num", 10)
    assert row == {"pairs": 10, "first": 10, "second": 0, "both": 0}


def test_speeds_are_those_of_the_renderer(capsys):
    def generate(prompts, fps):
        ways = [text.split()[-1] for text in prompts]
        starts = [32 - 16 * np.array(DIRECTIONS[way]) for way in ways]  # stays inside the frame
        things = [Thing("red", "circle", "", (w,), *xy, 0) for w, xy in zip(ways, starts)]
        return [render([thing], fps=fps) for thing in things]

    experiments.speeds(SimpleNamespace(generate=generate), 4)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["fps"] for row in rows] == [8, 9, 10, 11, 12]
    assert all(row["pixels_a_second"] == pytest.approx(SPEED, rel=0.02) for row in rows)


def test_slices_hide_the_order_that_whole_clips_show(tmp_path):
    experiments.write_circles(tmp_path, 12)
    whole, slices = (
        [VideoFolder(tmp_path, stride=stride)[i] for i in range(12)] for stride in (None, 1)
    )
    assert {clip.caption for clip in whole} == {
        f"a red circle moves {x}, then {y}" for x in DIRECTIONS for y in DIRECTIONS if x != y
    }
    assert next(iter(COLOURS)) == "red"
    read = [experiments.shares([c.video for c in cs], cs[0].fps) for cs in (whole, slices)]
    assert read[0] == {"in_order": 1, "either": 1}
    assert read[1]["in_order"] < 0.4 and read[1]["either"] > 0.9


def test_spoilt_clips():
    video = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    spoilt = {how: experiments.spoil(video, how, np.random.default_rng(0))
              for how in ("nothing", "shuffled", "noise")}
    assert (spoilt["nothing"] == video).all()
    assert sorted(map(bytes, spoilt["shuffled"])) == sorted(map(bytes, video))
    assert (spoilt["shuffled"] != video).any()
    assert spoilt["noise"].dtype == np.uint8
    assert 10 < np.abs(spoilt["noise"].astype(float) - video).mean() < 25


def test_a_model_that_repeats_its_clips_is_found_out(
    run_script, monkeypatch, tiny_pipeline, tmp_path
):
    experiments.write_circles(tmp_path, 5)
    dataset = VideoFolder(tmp_path, size=32)
    clips = {dataset[i].caption: dataset[i].video for i in range(len(dataset))}

    def repeat(prompts, fps, progress):
        assert np.allclose(fps, dataset[0].fps) and len(prompts) == 7
        return np.stack([clips[prompt] for prompt in prompts])

    pipeline = SimpleNamespace(generate=repeat, vae=tiny_pipeline.vae, size=32)
    networks = {"i3d": lambda videos: videos.mean((3, 4)).flatten(1)}
    monkeypatch.setattr(experiments, "load_pipeline", lambda *_: pipeline)
    monkeypatch.setattr(experiments.metrics, "load_networks", lambda *_: (networks, {}))
    options = ("--data", tmp_path, "--num", 7, "--picture", tmp_path / "nearest.png")
    status, out, err = run_script(experiments, "nearest", *options)
    real, copy, generated, one_rate = map(json.loads, out.splitlines())
    assert status == 0 and "7 clips are too few" in err and (tmp_path / "nearest.png").exists()
    assert [row["num"] for row in (real, copy, generated, one_rate)] == [5, 5, 7, 7]
    assert real["fvd"] == 0 and real["distance"] > 1 and real["same_caption"] == 0  # another clip
    assert copy["fvd"] > 0 and copy["distance"] > 1
    assert generated["distance"] == 0 and generated["same_caption"] == 1
    assert one_rate == generated | {"clips": "generated, one rate"}


@pytest.mark.parametrize("words", ["", "nothing", "order --num 0", "slices --steps many"])
def test_mistakes_are_told_in_one_line(run_script, words):
    status, out, err = run_script(experiments, *words.split())
    assert status == 2 and not out and err.startswith("error: ") and err.count("\n") == 1
