"""Moving shapes keep the promises of their captions; video files come out as they went in."""

from itertools import permutations

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (
    BACKGROUND, COLOURS, DIRECTIONS, FPS_RANGE, MOTIONS, POLYGONS, RADII, REACH, SIZE, SPEED,
    MovingShapes, Thing, contact_sheet, describe, held_out, render, to_model, to_uint8, write_video,
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
    scene = [thing("blue", "star", "big", ("up", "grows"))]
    captions = {describe(scene, rng) for _ in range(200)}
    assert describe(scene) in captions and len(captions) > 10
    firsts, seconds = ("up", "rises"), ("grows", "bigger")
    for words in map(str.split, (c.replace(",", " ,") for c in captions)):
        assert "blue" in words and "star" in words and ("big" in words or "large" in words)
        then = words.index("then")
        assert any(w in words[:then] for w in firsts), words
        assert any(w in words[then:] for w in seconds), words


# ------------------------------------------------------------------------------ the held-out rule


def test_the_splits_never_share_a_combination():
    seen = {
        split: {
            held_out(t.colour, t.shape, t.actions)
            for i in range(600)
            for t in MovingShapes(600, split, seed=1).describe(i)[2]
        }
        for split in ("train", "heldout")
    }
    assert seen == {"train": {False}, "heldout": {True}}
    pairs = MovingShapes(200, seed=2, objects=2)
    things = [t for i in range(200) for t in pairs.describe(i)[2]]
    assert len(things) == 400
    assert not any(held_out(t.colour, t.shape, t.actions) for t in things)


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


@pytest.mark.parametrize("settings", [{}, {"fps": FPS_RANGE[0]}, {"objects": 2}])
def test_objects_stay_in_the_frame_and_apart(settings):
    dataset = MovingShapes(300, seed=4, **settings)
    for i in range(300):
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


def test_nothing_is_drawn_at_the_border():
    for sample in MovingShapes(100, seed=6):
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
    np.testing.assert_allclose(np.diff(angle[8:]), data.SPIN / 8, rtol=1e-4)
    radius = thing(actions=("grows",)).path(17, 8.0)[2]
    assert radius[16] / radius[0] == pytest.approx(np.exp(2 * data.GROWTH))


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


def test_resolution_changes_nothing_but_sharpness():
    fine, coarse = (render([thing("white", "ring")], frames=2, size=size) for size in (128, 64))
    pooled = fine.reshape(2, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(pooled - coarse).max() < 24


# ------------------------------------------------------------------------------ value ranges


def test_ranges_round_trip_exactly():
    video = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3)).astype(np.uint8)
    video[0, 0, 0, 0], video[0, 0, 0, 1] = 0, 255
    before = video.copy()
    model = to_model(video)
    assert model.shape == (2, 3, 3, 8, 8) and model.dtype == torch.float32
    assert model.min() == -1 and model.max() == 1
    kept = model.clone()
    assert (to_uint8(model) == before).all() and to_uint8(model).dtype == np.uint8
    assert (video == before).all() and (model == kept).all()
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1).repeat(1, 1, 1, 1, 3)
    assert (to_uint8(to_model(every)) == every.numpy()).all()


def test_out_of_range_values_are_clipped():
    model = torch.tensor([-3.0, 3.0, 0.0]).reshape(1, 3, 1, 1, 1)
    assert to_uint8(model).ravel().tolist() == [0, 255, 128]
    assert model.ravel().tolist() == [-3, 3, 0]


# ------------------------------------------------------------------------------ video files


@pytest.fixture
def clip():
    return render([thing(), thing("white", "ring", "small", ("up",), 14, 50)], frames=10)


def test_png_sheet_is_exact(tmp_path, clip):
    before = clip.copy()
    write_video(tmp_path / "a.png", clip, upscale=2)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    large = clip.repeat(2, 1).repeat(2, 2)
    assert (sheet == contact_sheet(large)).all()
    side = 128 + 4
    for i in range(10):  # four in a row, with a border of two pixels
        top, left = i // 4 * side + 2, i % 4 * side + 2
        assert (sheet[top : top + 128, left : left + 128] == large[i]).all()
    assert sheet.shape == (3 * side, 4 * side, 3) and (clip == before).all()


@pytest.mark.parametrize("fps", [6.0, 7.3, 8.0, 12.0, 30.0])
def test_gif_keeps_its_frames_and_length(tmp_path, clip, fps):
    write_video(tmp_path / "a.gif", clip, fps)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 10 and gif.size == (64, 64) and gif.info["loop"] == 0
        total = 0
        for i in range(10):
            gif.seek(i)
            total += gif.info["duration"]
            error = np.asarray(gif.convert("RGB")).astype(int) - clip[i]
            assert np.abs(error).mean() < 1  # one palette for the clip: nearly exact
    assert abs(total - 1000 * 10 / fps) <= 5


def test_gif_keeps_still_frames(tmp_path):
    # Writers like to merge equal frames, and must not lose their time.
    still = render([thing(actions=("stays still",))], frames=8)
    write_video(tmp_path / "a.gif", still, 8.0)
    with Image.open(tmp_path / "a.gif") as gif:
        durations = []
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
    assert sum(durations) == 1000


@pytest.mark.parametrize("fps", [8.0, 7.3])
def test_mp4_is_readable(tmp_path, clip, fps):
    write_video(tmp_path / "a.mp4", clip[:, :63], fps, upscale=3)  # 189 rows: one has to go
    video = iio.imread(tmp_path / "a.mp4", plugin="pyav")
    assert video.shape == (10, 188, 192, 3)
    expected = clip[:, :63].repeat(3, 1).repeat(3, 2)[:, :188]
    assert np.abs(video.astype(int) - expected).mean() < 5
    assert iio.immeta(tmp_path / "a.mp4", plugin="pyav")["fps"] == pytest.approx(fps, rel=1e-3)


def test_unknown_suffix_is_refused(tmp_path, clip):
    with pytest.raises(ValueError, match="webm"):
        write_video(tmp_path / "a.webm", clip)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix, writer", [
    (".gif", "_write_gif"), (".mp4", "_write_mp4"), (".png", "_write_sheet"),
])  # fmt: skip
def test_a_failed_write_leaves_nothing_behind(tmp_path, clip, monkeypatch, suffix, writer):
    def fail(path, *_):
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(data, writer, fail)
    old = tmp_path / f"old{suffix}"
    old.write_bytes(b"precious")
    for path in (tmp_path / f"new{suffix}", old):
        with pytest.raises(OSError, match="no space"):
            write_video(path, clip)
    assert list(tmp_path.iterdir()) == [old] and old.read_bytes() == b"precious"


def test_folders_are_made_and_files_replaced(tmp_path, clip):
    path = tmp_path / "deep" / "er" / "a.png"
    write_video(path, clip)
    write_video(path, clip[:1])
    assert np.asarray(Image.open(path)).shape == (68, 68, 3)
    assert path.stat().st_mode & 0o777 == 0o644
