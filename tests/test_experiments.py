"""The measurements measure what they say, on videos whose truth is known."""

import itertools
import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from data import VideoFolder
from experiments import motions, nearest, order, reference, slices, speed, steps, tasks
from shapes import COLOURS, DIRECTIONS, MOTIONS, POLYGONS, REACH, SPEED, WORDINGS, Thing, render


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


def film(story, x=32.0, y=32.0):
    """What the renderer makes of a story: each sentence begins where the one before has ended."""
    parts, angle = [], 0.0
    for sentence in story:
        _, colour, shape, *_, action = sentence.split()
        one = Thing(colour, shape, "", (action,), x, y, angle)
        parts.append(render([one])[bool(parts) :])
        x, y, _, angle = map(float, one.path(16, 8.0)[:, -1])
    return np.concatenate(parts)


def test_stories_of_the_renderer_are_told(capsys):
    def generate(stories, overlap):
        frames = 16 + (len(stories[0]) - 1) * (16 - overlap)
        return np.stack([film(story)[:frames] for story in stories])

    tasks.stories(SimpleNamespace(generate=generate), 8)
    found = [row for row in rows(capsys.readouterr().out) if row["overlap"] == 1]
    assert [(row["story"], row["sentences"]) for row in found] == [
        ("round", 2), ("round", 5), ("spins", 2), ("spins", 5)
    ]  # fmt: skip
    assert all(row["told"] == row["of"] == 8 and row["sentences_told"] == 1 for row in found)
    assert all(0.8 < row["seam"] < 1.2 for row in found)


def test_stories_that_take_another_turn_are_not_told():
    story = tasks.write_stories("round", 1, 2)[0]
    assert tasks.is_told(film(story), story, 1) == [True, True]
    assert tasks.is_told(film(story), [story[0]] * 2, 1) == [True, False]


def test_from_the_middle_every_story_can_go_round():
    assert len({tuple(s.split()[-1] for s in x) for x in tasks.write_stories("round", 8, 2)}) == 8
    for story, *place in itertools.product(tasks.write_stories("round", 8, 5), *[(28.0, 36.0)] * 2):
        assert all(tasks.is_told(film(story, *place), story, 1)), (story, place)


def test_every_shape_is_asked_for_in_every_motion(monkeypatch, capsys):
    """A model whose stars are squares, and that never spins."""
    def generate(captions):
        asked = (caption.replace("star", "square").split(maxsplit=3) for caption in captions)
        return [render([Thing(c, s, "", (ACTIONS[words],), 32.0, 32.0, 0.1)])
                for _, c, s, words in asked]

    wordings = {WORDINGS[action][0]: action for action in MOTIONS}
    ACTIONS = wordings | {WORDINGS["spins"][0]: "stays still"}
    pipeline = SimpleNamespace(generate=generate)
    monkeypatch.setattr(motions, "load_pipeline", lambda *_: pipeline)
    motions.motions("", 2)
    found = {(row["motion"], row["right"]): row for row in rows(capsys.readouterr().out)}
    assert {motion for motion, _ in found} == set(MOTIONS)
    for (motion, right), row in found.items():
        shapes = set(POLYGONS if motion == "spins" else REACH)
        assert set(row) == {"motion", "right", "mean", *shapes}
        wrong = {"star"} if right == "shape" else shapes if motion == "spins" else set()
        assert {shape for shape in shapes if row[shape] != 1} == wrong
        assert row["mean"] == pytest.approx(1 - len(wrong) / len(shapes), abs=1e-3)


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

    def repeat(prompts, fps, progress):
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


@pytest.mark.parametrize("module, words", [
    (order, "--num 0"), (motions, "--num 0"), (slices, "--steps many"), (tasks, "nothing"),
    (steps, "--num"), (reference, "--num 1"), (nearest, ""), (speed, ""),
])
def test_mistakes_are_told_in_one_line(module, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        module.parse_args(words.split())
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
