"""Moving shapes keep the promises of their captions, and the caption oracle is right on what the
renderer draws and wrong where a video is wrong."""

import dataclasses
import importlib.util
import re
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, label

import shapes
from data import FPS
from shapes import (
    BACKGROUND, COLOURS, DIRECTIONS, FPS_RANGE, FREE, GROWTH, MOTIONS, PARAPHRASES, POLYGONS, RADII,
    REACH, SIZE, SPEED, SPIN, UNSEEN, MovingShapes, Reading, Thing, asked, caption_accuracy,
    describe, held_out, read_things, render,
)  # fmt: skip


def thing(colour="red", shape="circle", size="", actions=("right",), x=32.0, y=32.0, angle=0.3):
    return Thing(colour, shape, size, actions, x, y, angle)


# ------------------------------------------------------------------------------ determinism


def test_a_sample_depends_on_seed_and_index_alone():
    first, again = MovingShapes(10, seed=3), MovingShapes(500, seed=3)
    for i in (7, 2, 7):  # in any order, from any instance
        a, b = first[i], again[i]
        assert (a.caption, a.fps, a.scene) == (b.caption, b.fps, b.scene)
        assert a.video.dtype == np.uint8 and a.video.shape == (16, 64, 64, 3)
        assert (a.video == b.video).all()


def test_seeds_indices_and_splits_differ():
    def starts(dataset):
        return {dataset.describe(i)[2][0].x for i in range(20)}

    splits = starts(MovingShapes(20, seed=0)), starts(MovingShapes(20, "heldout", seed=0))
    seen = splits[0] | splits[1] | starts(MovingShapes(20, seed=1))
    assert len(seen) == 60


def test_settings_are_checked():
    with pytest.raises(ValueError, match="split"):
        MovingShapes(split="test")
    with pytest.raises(ValueError, match="single"):
        MovingShapes(split="heldout", objects=2)
    with pytest.raises(IndexError):
        MovingShapes(3)[3]
    assert len(list(MovingShapes(3))) == 3


def test_single_frames_are_crowded_in_training_alone():
    def objects(split):
        pairs = [MovingShapes(99, split).random_frames(i, np.random.default_rng(i), 2)
                 for i in range(20)]
        return [label(frame.max(-1) > 60)[1] for pair in pairs for frame in pair]

    assert max(objects("train")) > 3 and set(objects("heldout")) == {1}
    dataset = MovingShapes(9, "heldout")
    frames = dataset.random_frames(3, np.random.default_rng(0), 16)
    assert sorted(map(bytes, frames)) == sorted(map(bytes, dataset[3].video))


def test_settings_are_kept():
    dataset = MovingShapes(5, frames=5, size=32, fps=7.0, objects=2)
    for sample in dataset:
        assert sample.video.shape == (5, 32, 32, 3) and sample.fps == 7 and len(sample.scene) == 2
    rates = [MovingShapes(100).describe(i)[1] for i in range(100)]
    assert FPS_RANGE[0] <= min(rates) < FPS_RANGE[0] + 1 < FPS_RANGE[1] - 1 < max(rates)
    assert max(rates) <= FPS_RANGE[1]


# ------------------------------------------------------------------------------ captions


@pytest.mark.parametrize("scene, caption", [
    ([thing(actions=("right", "up"))], "a red circle moves right, then up"),
    ([thing("blue", "star", "small", ("grows", "spins"))], "a small blue star grows, then spins"),
    (
        [thing("green", "square", actions=("left",)), thing("white", "ring", actions=("down",))],
        "a green square moves left while a white ring moves down",
    ),
    ([thing("yellow", "ring", "big", ("stays still",))], "a big yellow ring stays still"),
    ([thing(actions=("shrinks", "left"))], "a red circle shrinks, then moves left"),
])  # fmt: skip
def test_canonical_captions(scene, caption):
    assert describe(scene) == caption


def test_varied_captions_keep_the_words_that_matter():
    rng = np.random.default_rng(0)
    scene = [thing("blue", "circle", "big", ("up", "grows"))]
    captions = [describe(scene, rng) for _ in range(500)]
    firsts, seconds = ("up", "rises", "upwards"), ("grows", "bigger", "larger", "growing")
    for words in (re.findall(r"\w+", caption) for caption in captions):
        assert "blue" in words and ("big" in words or "large" in words), words
        assert set(words) & {"circle", "ball", "disc"}, words
        then = words.index("then")
        assert any(w in words[:then] for w in firsts), words
        assert any(w in words[then:] for w in seconds), words
    assert len(set(captions)) > 100
    counts = Counter(captions)
    assert counts.most_common(1)[0][0] == describe(scene) and counts[describe(scene)] > 200


def test_captions_vary_as_those_of_people_do():
    rng = np.random.default_rng(0)
    scene = [thing("blue", "circle", "big", ("up", "left"))]
    captions = {describe(scene, rng) for _ in range(2000)}
    for part in ("^the ", "^big", "^blue big", "blue big circle", r"\.$", " and then ", " ball ",
                 "goes up, then left"):
        assert any(re.search(part, caption) for caption in captions), part


def test_paraphrases_are_never_shown(monkeypatch):
    assert len(PARAPHRASES) == 100 == len(UNSEEN)
    dataset = MovingShapes(1000)
    captions = {dataset.caption(i) for i in range(1000)}
    assert not UNSEEN & captions  # but every word of theirs is
    assert set(re.findall(r"\w+", " ".join(UNSEEN))) <= set(re.findall(r"\w+", " ".join(captions)))
    caption = dataset.caption(0)
    monkeypatch.setattr("shapes.UNSEEN", {caption})
    assert dataset.caption(0) != caption and dataset.caption(0) == dataset.caption(0)


def test_what_paraphrases_ask_for_can_be_seen():
    words = set()
    for prompt, meaning in PARAPHRASES.items():
        for thing in asked(meaning):
            assert thing.colour in COLOURS and thing.colour in prompt.lower(), prompt
            assert thing.shape in REACH and set(thing.actions) <= set(MOTIONS), prompt
            assert thing.shape in POLYGONS or "spins" not in thing.actions, prompt
            words |= {thing.colour, thing.shape, *thing.actions}
    assert words == {*COLOURS, *REACH, *MOTIONS}
    # The oracle finds it in a video, and finds that another one does not show it.
    scene, other = asked("red circle: right, up"), asked("red circle: up, right")
    assert caption_accuracy([scene], [render(scene)], FPS)["all"] == 1
    assert caption_accuracy([scene], [render(other)], FPS)["order"] == 0


# ------------------------------------------------------------------------------ the held-out rule


def test_the_splits_never_share_a_combination():
    def kinds(dataset):
        things = [t for i in range(len(dataset)) for t in dataset.describe(i)[2]]
        return len(things), {held_out(t.colour, t.shape, t.actions) for t in things}

    assert kinds(MovingShapes(300, "train", seed=1))[1] == {False}
    assert kinds(MovingShapes(300, "heldout", seed=1)) == (300, {True})
    assert kinds(MovingShapes(200, seed=2, objects=2)) == (400, {False})


def test_a_tenth_of_the_combinations_is_held_out():
    actions = [a for n in (1, 2) for a in permutations(MOTIONS, n)]
    combinations = [
        (c, s, a) for c in COLOURS for s in REACH for a in actions
        if "spins" not in a or s in POLYGONS
    ]  # fmt: skip
    count = sum(held_out(*combination) for combination in combinations)
    assert 0.08 < count / len(combinations) < 0.12
    assert held_out(*combinations[0]) == held_out(*combinations[0])
    # Every word is seen in training: only combinations are new.
    train = [c for c in combinations if not held_out(*c)]
    assert {c[:2] for c in train} == {c[:2] for c in combinations}
    assert {c[2] for c in train} == set(actions)


# ------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("frames", [2, 3, 5, 24, 512])
def test_more_frames_show_an_action_more_closely_not_for_longer(frames):
    rates = [MovingShapes(200, frames=frames).describe(i)[1] for i in range(200)]
    usual = [MovingShapes(200).describe(i)[1] for i in range(200)]
    assert rates == pytest.approx([rate * max(1, frames / 16) for rate in usual])


@pytest.mark.parametrize("settings", [{}, {"fps": FPS_RANGE[0]}, {"objects": 2}])
def test_objects_stay_in_the_frame_and_apart(settings):
    dataset = MovingShapes(150, seed=4, **settings)
    for i in range(150):
        _, fps, scene = dataset.describe(i)
        paths = [t.path(16, fps) for t in scene]
        reaches = [path[2] * REACH[t.shape] for t, path in zip(scene, paths)]
        for (x, y, _, _), reach in zip(paths, reaches):
            assert min((x - reach).min(), (y - reach).min()) >= 0
            assert max((x + reach).max(), (y + reach).max()) <= SIZE
        if len(scene) == 2:
            assert scene[0].colour != scene[1].colour
            apart = np.hypot(*(paths[0][:2] - paths[1][:2]))
            assert (apart > sum(reaches) + 1).all()


@pytest.mark.parametrize("motion", DIRECTIONS)
def test_the_edge_is_a_wall(motion):
    """Things stop at it, and set off from there when they turn back."""
    back = {"left": "right", "right": "left", "up": "down", "down": "up"}[motion]
    mover = thing("white", "square", actions=(motion, back))
    x, y, radius, _ = mover.path(64, 8.0)  # four seconds there, four back
    along = np.array([x, y]).T @ DIRECTIONS[motion]
    reach = RADII[""] * REACH["square"] + 1
    stop = (SIZE - reach) if sum(DIRECTIONS[motion]) > 0 else -reach
    assert along.max() == pytest.approx(stop) and (along[26:33] == along.max()).all()
    np.testing.assert_allclose(np.diff(along[32:]), -SPEED / 8, atol=1e-4)


def test_what_grows_is_pushed_from_the_wall():
    x, y, radius, _ = thing("white", "star", actions=("grows",), x=13.0, y=32.0).path(16, 8.0)
    assert (x >= radius * REACH["star"] + 1 - 1e-4).all() and x[-1] > x[0] + 4 and (y == 32).all()


def test_clips_begin_where_most_of_the_way_is_free():
    def begin(dataset):
        scenes = [dataset.describe(i)[1:] for i in range(300)]
        assert all(t.free(16, fps) > FREE for fps, scene in scenes for t in scene)
        reach = np.array([RADII[t.size] * REACH[t.shape] + 1 for _, scene in scenes for t in scene])
        places = np.array([(t.x, t.y) for _, scene in scenes for t in scene])
        return (places - reach[:, None]) / (SIZE - 2 * reach[:, None])

    one, two = (begin(MovingShapes(300, seed=2, objects=n)) for n in (1, 2))
    middle = (np.abs(one - 0.5) <= 0.1 + 1e-6).all(1).mean()
    assert 0.75 < middle < 0.9  # of these there is room to go on in every direction
    for places in (one, two):  # and some begin at each wall
        assert (places.min(0) < 1e-6).all() and (places.max(0) > 1 - 1e-6).all()


def test_a_world_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="400 frames, 8 a second"):
        [MovingShapes(20, frames=400, fps=8.0).describe(i) for i in range(20)]


def test_how_free_a_way_is():
    assert thing(actions=("stays still",), x=9.0).free(16, 8.0) == 1
    assert thing(actions=("right",)).free(17, 8.0) == pytest.approx(1, abs=1e-4)
    blocked = thing("white", "circle", "small", ("left", "right"), x=SIZE / 2)
    far = blocked.free(64, 8.0)  # 4 seconds, but 25.3 pixels to the wall
    assert far == pytest.approx((32 - 6 * 0.95 - 1) / (4 * SPEED), abs=1e-4)


def test_nothing_is_drawn_at_the_border():
    for sample in MovingShapes(60, seed=6):
        video = sample.video.astype(int) - BACKGROUND
        border = np.concatenate([video[:, [0, -1]], video[:, :, [0, -1]].swapaxes(1, 2)])
        # Smoothing draws a star's tips out by a pixel: a shade of them may touch the last row.
        assert np.abs(border).max() < 64, sample.caption


def coverage(video, colour="white"):
    """Fraction of each pixel that the object covers, from the pixels: (f, h, w)."""
    color = np.array(COLOURS[colour], float) - BACKGROUND
    return (video.astype(float) - BACKGROUND) @ color / (color @ color)


@pytest.mark.parametrize("fps", [6.0, 8.0, 12.0])
@pytest.mark.parametrize("motion", DIRECTIONS)
def test_distance_is_speed_times_seconds(motion, fps):
    video = render([thing("white", "circle", "small", (motion,))], frames=9, fps=fps)
    cover = coverage(video)
    grid = np.arange(SIZE) + 0.5
    center = np.array([(cover * grid).sum((1, 2)), (cover * grid[:, None]).sum((1, 2))])
    center /= cover.sum((1, 2))
    moved = center[:, -1] - center[:, 0]
    expected = np.array(DIRECTIONS[motion]) * SPEED * 8 / fps  # eight intervals between nine frames
    np.testing.assert_allclose(moved, expected, atol=0.05)


def test_each_action_has_its_half():
    x, y, radius, angle = thing(actions=("right", "spins")).path(16, 8.0)
    assert x[8] - x[0] == pytest.approx(SPEED) and (x[8:] == x[8]).all() and (y == y[0]).all()
    assert (angle[:9] == angle[0]).all() and angle[15] > angle[8]
    np.testing.assert_allclose(np.diff(angle[8:]), SPIN / 8, rtol=1e-4)
    radius = thing(actions=("grows",)).path(17, 8.0)[2]
    assert radius[16] / radius[0] == pytest.approx(np.exp(2 * GROWTH))


@pytest.mark.parametrize("size", RADII)
@pytest.mark.parametrize("shape", REACH)
def test_area_is_the_closed_form(shape, size):
    radius, reach = RADII[size], RADII[size] * REACH[shape]
    area = {
        "circle": np.pi * reach**2,
        "ring": np.pi * (reach**2 - (reach - 0.525 * radius) ** 2),
        "square": 2 * reach**2,  # diagonal 2 R
        "triangle": 3 * np.sqrt(3) / 4 * reach**2,
        "star": 5 * 0.45 * np.sin(np.pi / 5) * reach**2,  # ten triangles of sides R and 0.45 R
    }[shape]
    video = render([thing("white", shape, size, ("stays still",), 31.3, 32.6)], frames=1)
    # Sharp corners are rounded by less than a pixel; the star has ten.
    assert coverage(video).sum() == pytest.approx(area, rel=0.02 if shape == "star" else 0.01)


def test_objects_begin_upright():
    for sample in MovingShapes(120, objects=1):
        y, x = np.nonzero(coverage(sample.video[0], sample.scene[0].colour) > 0.5)
        if sample.scene[0].shape == "square":  # fills its bounding box; half of it on its corner
            assert len(y) > 0.7 * (np.ptp(y) + 1) * (np.ptp(x) + 1)
        if sample.scene[0].shape == "triangle":  # 3/4 of it are in the lower half: its tip is above
            assert (y > (y.min() + y.max()) / 2).mean() > 0.6


def test_resolution_changes_nothing_but_sharpness():
    fine, coarse = (render([thing("white", "ring")], frames=2, size=size) for size in (128, 64))
    pooled = fine.reshape(2, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(pooled - coarse).max() < 24


# ------------------------------------------------------------------------------ the oracle

THING = Thing("red", "star", "", ("right", "grows"), 20.0, 30.0, 0.4)
PAIR = [
    Thing("green", "square", "small", ("left",), 48.0, 14.0, 0.3),
    Thing("white", "ring", "", ("down",), 20.0, 26.0, 0.0),
]


@pytest.fixture(scope="module")
def samples():
    return list(MovingShapes(100, seed=123))


def accuracy(samples, change=lambda video: video):
    videos = [change(s.video) for s in samples]
    return caption_accuracy([s.scene for s in samples], videos, [s.fps for s in samples])


def test_reads_what_was_rendered(samples):
    result = accuracy(samples)
    assert result.pop("n") == 100
    assert set(result) == {"colour", "shape", "motion", "order", "all"}
    assert min(result.values()) >= 0.99, result


def test_reads_what_training_never_shows(samples):
    """Other combinations, blur and noise, a pale picture."""
    rng = np.random.default_rng(0)

    def degrade(video):
        video = gaussian_filter(video.astype(float), (0, 0.7, 0.7, 0))
        return (video + rng.normal(0, 8, video.shape)).round().clip(0, 255).astype(np.uint8)

    def pale(video):
        return (BACKGROUND + (video.astype(float) - BACKGROUND) * 0.8).round().astype(np.uint8)

    assert accuracy(list(MovingShapes(50, "heldout", seed=5)))["all"] >= 0.98
    assert accuracy(samples[:40], degrade)["all"] >= 0.97
    assert accuracy(samples[:40], pale)["all"] >= 0.97


@pytest.mark.parametrize("shape", REACH)
def test_reads_every_word(shape):
    actions = [action for action in MOTIONS if action != "spins" or shape in POLYGONS]
    for i in range(max(len(actions), len(COLOURS))):
        colour, action = list(COLOURS)[i % len(COLOURS)], actions[i % len(actions)]
        dx, dy = DIRECTIONS.get(action, (0, 0))
        thing = Thing(colour, shape, "", (action,), 32 - 15.0 * dx, 32 - 15.0 * dy, 0.2)
        assert read_things(render([thing]), FPS) == [Reading(colour, shape, (action,))]


def test_reads_any_resolution():
    for size in (24, 64, 128):
        video = render([THING], size=size)
        assert read_things(video, FPS) == [Reading("red", "star", ("right", "grows"))]


def test_speed_is_read_per_second():
    video = render([dataclasses.replace(THING, actions=("right",))], fps=12.0)
    assert read_things(video, 12.0)[0].actions == ("right",)
    # The same pixels played at a third of the rate move at a third of the speed: as good as not.
    assert read_things(video, 4.0)[0].actions == ("stays still",)


def test_swapped_halves_swap_the_order_read():
    video = render([THING])
    swapped = np.concatenate([video[8:], video[:8]])
    assert read_things(swapped, FPS)[0].actions == ("grows", "right")
    result = caption_accuracy([[THING]], [swapped], FPS)
    assert result == {"colour": 1, "shape": 1, "motion": 1, "order": 0, "all": 0, "n": 1}


def test_wrong_videos_are_read_as_wrong(samples):
    samples = samples[:30]
    recoloured = accuracy(samples, lambda video: np.roll(video, 1, axis=-1))
    assert recoloured["colour"] < 0.2 and recoloured["all"] < 0.2  # white stays white
    reversed_ = accuracy(samples, lambda video: video[::-1])
    assert reversed_["colour"] == 1 and reversed_["order"] < 0.2
    turned = accuracy(samples, lambda video: video[:, ::-1, ::-1])
    assert turned["colour"] == 1 and turned["motion"] < 0.6  # nothing else than moves is mirrored
    other = [s.video for s in samples[1:] + samples[:1]]
    wrong = caption_accuracy([s.scene for s in samples], other, [s.fps for s in samples])
    assert wrong["colour"] < 0.3 and wrong["all"] < 0.05


def test_input_is_not_mutated():
    video = render(PAIR)
    before = video.copy()
    video.flags.writeable = False
    caption_accuracy([PAIR], [video], FPS)
    assert (video == before).all()


def test_nothing_is_read_from_an_empty_video():
    video = render([])
    assert read_things(video, FPS) == []
    result = caption_accuracy([[THING]], [video], FPS)
    assert result == {"colour": 0, "shape": 0, "motion": 0, "order": 0, "all": 0, "n": 1}


def test_two_objects_are_matched_by_colour_and_sorted_by_size():
    readings = read_things(render(PAIR), FPS)
    assert readings == [
        Reading("white", "ring", ("down",)),
        Reading("green", "square", ("left",)),
    ]
    assert caption_accuracy([PAIR], [render(PAIR)], FPS)["all"] == 1


def test_a_missing_or_extra_object_is_wrong():
    missing = caption_accuracy([PAIR, PAIR], [render(PAIR), render(PAIR[1:])], FPS)
    assert missing.pop("n") == 2
    assert set(missing.values()) == {0.5}  # everything of that clip is wrong
    extra = caption_accuracy([PAIR[1:]], [render(PAIR)], FPS)
    assert extra["order"] == 1 and extra["all"] == 0


def test_a_coloured_fringe_is_not_an_object():
    red, white = np.array(COLOURS["red"]), np.array(COLOURS["white"])
    thing = Thing("white", "square", "big", ("left",), 44.0, 32.0, 0.0)
    video = render([thing])
    edge = (video != BACKGROUND).any(-1) & (video != white).any(-1)
    halo = edge | np.roll(edge, 1, axis=1) & (video == BACKGROUND).all(-1)
    video[halo] = (0.4 * red + 0.6 * np.array(BACKGROUND)).astype(np.uint8)
    assert read_things(video, FPS) == [Reading("white", "square", ("left",))]


def test_a_close_neighbour_does_not_disturb():
    left = Thing("yellow", "circle", "small", ("stays still",), 16.4, 32.0, 0.0)
    right = Thing("blue", "square", "", ("left",), 53.5, 32.0, 0.1)
    video = render([left, right], frames=12)  # the square ends two pixels from the circle
    assert caption_accuracy([[left, right]], [video], FPS)["all"] == 1


def test_a_speck_does_not_disturb():
    thing = Thing("green", "triangle", "small", ("grows", "spins"), 40.0, 40.0, 0.0)
    video = render([thing])
    video[5:, 2:5, 2:5] = COLOURS["green"]
    assert read_things(video, FPS) == [Reading("green", "triangle", ("grows", "spins"))]


def test_absence_is_not_standing_still():
    video = render([THING])
    video[[3, 6, 11]] = BACKGROUND  # a few frames may be missing
    assert read_things(video, FPS)[0].actions == ("right", "grows")
    video[9:] = BACKGROUND
    assert read_things(video, FPS)[0].actions == ("right", None)
    video = render([THING])
    video[4:] = BACKGROUND  # most are missing, and noise must not pass for the object
    noise = np.random.default_rng(0).normal(0, 8, video.shape)
    noisy = (video + noise).round().clip(0, 255).astype(np.uint8)
    assert read_things(noisy, FPS)[0].actions == ("right", None)


def test_unusable_arrays_are_refused():
    video = render([THING])
    for wrong in (video.astype(float), video[0], video[:0], video[..., :1]):
        with pytest.raises(ValueError, match="uint8"):
            read_things(wrong, FPS)
    with pytest.raises(ValueError):
        caption_accuracy([[THING], [THING]], [video], FPS)


def test_a_new_colour_and_a_new_shape_are_three_lines(tmp_path):
    """The first exercise of the README, as written there."""
    source = Path(shapes.__file__).read_text()
    for table, line in {
        "COLOURS": '"cyan": (40, 220, 230)', "REACH": '"hexagon": 1.05',
        "POLYGONS": '"hexagon": (6, np.cos(np.pi / 6))',
    }.items():
        assert f"{table} = {{" in source
        source = source.replace(f"{table} = {{", f"{table} = {{{line}, ")
    (tmp_path / "more_shapes.py").write_text(source)
    spec = importlib.util.spec_from_file_location("more_shapes", tmp_path / "more_shapes.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["more_shapes"] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["more_shapes"]
    clips = [clip for clip in module.MovingShapes(120, objects=1)
             if {"cyan", "hexagon"} & set(clip.caption.split())]
    assert len(clips) > 15
    read = module.caption_accuracy([c.scene for c in clips], [c.video for c in clips],
                                   [c.fps for c in clips])
    assert read["all"] >= 0.96
