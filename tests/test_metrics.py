"""The distances have their closed forms, the command keeps to its protocol, and the caption oracle
is right on what the renderer draws and wrong where a video is wrong."""

import dataclasses
import hashlib
import json
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

import metrics
from data import BACKGROUND, COLOURS, FPS, MOTIONS, POLYGONS, REACH, MovingShapes, Thing, render
from data import write_video
from metrics import FeatureStatistics, Reading, caption_accuracy, frechet_distance
from metrics import inception_score, kernel_distance, read_things

THING = Thing("red", "star", "", ("right", "grows"), 20.0, 30.0, 0.4)
PAIR = [
    Thing("green", "square", "small", ("left",), 48.0, 14.0, 0.3),
    Thing("white", "ring", "", ("down",), 20.0, 26.0, 0.0),
]


@pytest.fixture(scope="module")
def samples():
    return list(MovingShapes(200, seed=123))


def accuracy(samples, change=lambda video: video):
    videos = [change(s.video) for s in samples]
    return caption_accuracy([s.scene for s in samples], videos, [s.fps for s in samples])


def test_reads_what_was_rendered(samples):
    result = accuracy(samples)
    assert result.pop("n") == 200
    assert set(result) == {"colour", "shape", "motion", "order", "all"}
    assert min(result.values()) >= 0.99, result


def test_reads_combinations_that_training_never_shows():
    assert accuracy(list(MovingShapes(100, "heldout", seed=5)))["all"] >= 0.99


def test_survives_blur_and_noise(samples):
    rng = np.random.default_rng(0)

    def degrade(video):
        video = gaussian_filter(video.astype(float), (0, 0.7, 0.7, 0))
        return (video + rng.normal(0, 8, video.shape)).round().clip(0, 255).astype(np.uint8)

    assert accuracy(samples[:100], degrade)["all"] >= 0.97


def test_survives_a_pale_picture(samples):
    def pale(video):
        return (BACKGROUND + (video.astype(float) - BACKGROUND) * 0.8).round().astype(np.uint8)

    assert accuracy(samples[:60], pale)["all"] >= 0.97


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", REACH)
def test_reads_every_word(colour, shape):
    for action in MOTIONS:
        if action != "spins" or shape in POLYGONS:
            thing = Thing(colour, shape, "", (action,), 32.0, 32.0, 0.2)
            assert read_things(render([thing]), FPS) == [Reading(colour, shape, (action,))]


@pytest.mark.parametrize("size", [24, 64, 128])
def test_reads_any_resolution(size):
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
    samples = samples[:60]
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
    right = Thing("blue", "square", "", ("left",), 54.0, 32.0, 0.1)
    video = render([left, right])  # the square ends two pixels from the circle
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


# ------------------------------------------------------------------------------ distances


def features(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def with_moments(mean, covariance, n=500):
    """Features whose mean and 1/(n - 1) covariance are these, up to rounding."""
    x = features(n, len(mean))
    x -= x.mean(0)
    whiten = np.linalg.inv(np.linalg.cholesky(np.cov(x.T).reshape(len(mean), -1)))
    return x @ whiten.T @ np.linalg.cholesky(covariance).T + mean


def test_statistics_of_batches_are_those_of_the_whole():
    x = features(100, 7) * 3 + 1e4
    statistics = FeatureStatistics()
    for part in np.split(x.astype(np.float32), [1, 30, 31, 70]):
        assert statistics.update(torch.from_numpy(part)) is statistics
    x = x.astype(np.float32).astype(float)
    assert statistics.n == 100 and statistics.mean.dtype == torch.float64
    assert np.allclose(statistics.mean, x.mean(0), rtol=1e-14)
    assert np.allclose(statistics.covariance, np.cov(x.T), rtol=1e-9)
    with pytest.raises(ValueError, match="two features"):
        FeatureStatistics().update(x[:1]).covariance


def test_frechet_distance_of_known_gaussians():
    # Commuting covariances: |mu1 - mu2|^2 + sum (sigma1 - sigma2)^2.
    x = with_moments([1, 2, 3], np.diag([1.0, 4.0, 9.0]))
    y = with_moments([1, 0, 3], np.diag([4.0, 4.0, 0.25]))
    assert frechet_distance(x, y) == pytest.approx(4 + 1 + 0 + 6.25)
    # Otherwise: the definition, with a matrix square root.
    x, y = features(50, 6, 1) @ features(6, 6, 2), features(60, 6, 3) @ features(6, 6, 4) + 1
    s1, s2 = np.cov(x.T), np.cov(y.T)
    trace = np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + trace
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [20, 200])  # fewer than features, and more
def test_frechet_distance_is_one(n):
    """Zero to itself, symmetric, the same in any order, and nothing is changed by measuring."""
    x, y = features(n, 50) * 30, features(n, 50, seed=1) * 20
    copies = x.copy(), y.copy()
    distance = frechet_distance(x, y)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(x, x + 0.5) == pytest.approx(50 / 4)
    assert frechet_distance(y, x) == pytest.approx(distance, rel=1e-10)
    shuffled = np.random.default_rng(2).permutation(x)
    assert frechet_distance(shuffled, y) == pytest.approx(distance, rel=1e-10)
    statistics = (FeatureStatistics().update(side) for side in (x, y))
    assert frechet_distance(*statistics) == pytest.approx(distance, rel=1e-12)
    kernel = kernel_distance(x, y)
    assert kernel_distance(y, shuffled) == pytest.approx(kernel)
    inception_score(x)
    assert (x == copies[0]).all() and (y == copies[1]).all()


def test_kernel_distance_is_its_definition():
    x, y = features(4, 3), features(5, 3, seed=1) + 0.5

    def mean_kernel(a, b, diagonal=True):
        pairs = [(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if diagonal or i != j]
        return np.mean([(p @ q / 3 + 1) ** 3 for p, q in pairs])

    expected = mean_kernel(x, x, False) + mean_kernel(y, y, False) - 2 * mean_kernel(x, y)
    assert kernel_distance(x, y) == pytest.approx(expected)
    # More than one block of the kernel matrix; and the mean over equal distributions is 0.
    x, y = features(1500, 3), features(1100, 3, seed=1)
    assert abs(kernel_distance(x, y)) < 0.02 < kernel_distance(x, y + 0.5)
    with pytest.raises(ValueError, match="two features"):
        kernel_distance(x[:1], y)


def test_inception_score_of_known_answers():
    classes = np.tile(np.eye(8), (20, 1))
    assert inception_score(1000 * classes) == pytest.approx((8, 0))  # sure, and all classes alike
    assert inception_score(classes * 0) == pytest.approx((1, 0))  # never sure
    assert inception_score(1000 * classes[:1].repeat(30, 0)) == pytest.approx((1, 0))  # one class
    # p(y|x) is (a, 1 - a) or (1 - a, a): exp(log 2 - H(a))
    logits = np.log([[0.9, 0.1], [0.1, 0.9]] * 10)
    entropy = -0.9 * np.log(0.9) - 0.1 * np.log(0.1)
    assert inception_score(logits) == pytest.approx((2 * np.exp(-entropy), 0))
    halves = np.concatenate([1000 * np.tile(np.eye(4), (5, 1)), np.zeros((20, 4))])
    assert inception_score(halves, splits=2) == pytest.approx((2.5, 1.5))
    assert inception_score(classes[:3] * 0, splits=10) == pytest.approx((1, 0))


# ------------------------------------------------------------------------------ command line


class Stub(torch.nn.Module):
    """A stand-in for I3D: 36 numbers that depend on where and when the light is."""

    def forward(self, videos):
        return F.adaptive_avg_pool3d(videos, (4, 3, 3)).mean(1).flatten(1)


class FrameStub(torch.nn.Module):
    """A stand-in for Inception-v3, with 12 features and 3 classes."""

    def forward(self, frames):
        x = F.adaptive_avg_pool2d(frames, 2).flatten(1)
        return x, x[:, :3]


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs `python metrics.py ...` with stubs for the networks: (exit status, result or error)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(metrics, "load_i3d", lambda path: Stub())
    monkeypatch.setattr(metrics, "load_inception", lambda path: FrameStub())
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")

    def run(*arguments):
        argv = ["metrics.py", "--i3d", weights, *arguments]
        monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
        status = 0
        try:
            metrics.run_command(metrics.main)
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        if status:
            assert not out and "Traceback" not in err
            return status, err.strip().splitlines()[-1]
        return status, json.loads(out)

    run.weights = weights
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six videos of 32x32 pixels: five of 12 frames, one of 5; and a file that is no video."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(6):
        video = MovingShapes(6, seed=9, frames=12, size=32, fps=FPS)[i].video
        video[range(12), range(12)] = 255  # a line moves: writers of GIFs leave out equal frames
        write_video(root / f"class {i % 2}" / f"{i}.gif", video[: 5 if i == 5 else None], FPS)
    (root / "notes.txt").write_text("not a video")
    return root


def test_a_folder_is_at_no_distance_from_itself(command, folder):
    arguments = ("--real", folder, "--fake", folder, "--num", 5, "--frames", 10)
    status, result = command(*arguments, "--inception", command.weights)
    assert status == 0
    assert result["fvd"] == 0 and result["fid"] == 0
    assert result["kvd"] < 0.05 and result["is_i3d"]["mean"] == 1
    assert result["is_inception"]["mean"] >= 1
    protocol = result["protocol"]
    assert protocol["num_real"] == protocol["num_fake"] == 5 and protocol["frames"] == 10
    assert protocol["fps"] == FPS and protocol["size"] == [32, 32] and protocol["seed"] == 0
    digest = hashlib.sha256(b"weights").hexdigest()
    assert protocol["weights"]["i3d"] == {"file": "weights", "sha256": digest}
    assert "5 clips are too few" in result["warnings"][0]
    assert "50 frames are too few" in result["warnings"][1]
    assert "steps" not in protocol


def test_clips_are_taken_alike_on_both_sides(folder):
    paths = metrics.find_videos(folder)
    assert [path.name for path in paths] == ["0.gif", "2.gif", "4.gif", "1.gif", "3.gif", "5.gif"]
    clips = list(metrics.read_clips(paths, frames=4, stride=3, seed=1))
    assert [clip.caption for clip in clips] == ["class 0"] * 3 + ["class 1"] * 2
    again = list(metrics.read_clips(paths, frames=4, stride=3, seed=1))
    other = list(metrics.read_clips(paths, frames=4, stride=3, seed=2))
    assert all((a.video == b.video).all() for a, b in zip(clips, again))
    assert not all((a.video == b.video).all() for a, b in zip(clips, other))
    whole = next(metrics.read_clips(paths, frames=12)).video
    assert clips[0].video.shape == (4, 32, 32, 3) and clips[0].fps == pytest.approx(FPS / 3)
    starts = [i for i in range(3) if (clips[0].video == whole[i : i + 10 : 3]).all()]
    assert len(starts) == 1


def test_fit_takes_the_centre_square():
    video = np.zeros((2, 8, 20, 3), np.uint8)
    video[:, :, 6:14] = 200
    assert (metrics.fit(video, 4) == 200).all() and metrics.fit(video, 4).shape == (2, 4, 4, 3)
    assert metrics.fit(video) is video
    assert metrics.fit(video[:, :, 6:14], 8).base is video


def test_shapes_are_drawn_apart_on_the_two_sides(command):
    status, result = command("--real", "shapes", "--fake", "shapes", "--num", 12)
    assert status == 0 and result["fvd"] > 0
    assert result["protocol"]["size"] == [64, 64]


def test_a_checkpoint_is_given_the_real_captions(command, tiny_checkpoint, folder, monkeypatch):
    seen = []
    generate = metrics.generate_clips

    def spy(pipeline, captions, args, fps=None, frames=None):
        seen.append((list(captions), fps))
        return generate(pipeline, captions, args, fps, frames)

    monkeypatch.setattr(metrics, "generate_clips", spy)
    arguments = ("--fake", tiny_checkpoint, "--num", 3, "--frames", 9, "--steps", 1)
    status, result = command("--real", "shapes", *arguments)
    assert status == 0 and result["fvd"] > 0
    dataset = MovingShapes(3, seed=0, frames=9, fps=FPS)
    assert seen[0] == ([dataset.describe(i)[0] for i in range(3)], FPS)
    assert result["protocol"]["size"] == [32, 32]  # shapes are drawn in the model's size
    assert result["protocol"]["steps"] == 1
    status, result = command("--real", folder, *arguments)
    assert status == 0 and set(seen[1][0]) <= {"class 0", "class 1"}
    status, result = command(*arguments, "--metrics", "is")  # alone
    assert status == 0 and result["is_i3d"]["mean"] >= 1


def test_the_cache_is_kept_by_protocol(command, folder, monkeypatch, tmp_path):
    titles = []
    extract = metrics.extract

    def spy(*arguments, **options):
        titles.append(arguments[4])
        return extract(*arguments, **options)

    monkeypatch.setattr(metrics, "extract", spy)
    base = ["--real", "shapes", "--fake", "shapes", "--cache", "--num", 3, "--frames", 9]
    first = command(*base)
    assert titles == ["real clips", "fake clips"]
    titles.clear()
    assert command(*base) == first
    assert titles == ["fake clips"]
    changes = (["--seed", 1], ["--frames", 10], ["--num", 4], ["--inception", command.weights])
    changes += (["--real", folder],)
    for change in changes:
        titles.clear()
        command(*base, *change)
        assert titles == ["real clips", "fake clips"], change
    for path in (tmp_path / "cache").rglob("*.pt"):
        path.write_bytes(path.read_bytes()[:100])  # damaged: measured again
    titles.clear()
    assert command(*base) == first
    assert titles == ["real clips", "fake clips"]
    titles.clear()
    command.weights.write_bytes(b"other weights")
    command(*base)
    assert titles == ["real clips", "fake clips"]


def test_captions_of_shapes(command):
    status, result = command("--fake", "shapes", "--metrics", "captions", "--num", 20)
    assert status == 0
    assert set(result["captions"]) == {"seen", "held_out", "two_objects"}
    for values in result["captions"].values():
        assert values["n"] == 20 and values["all"] >= 0.95
    assert result["warnings"] == []


@pytest.mark.parametrize("arguments, error", [
    ((), "--fake is missing"),
    (("--fake", "shapes", "--metrics", "fvd"), "--real is missing: fvd"),
    (("--real", "shapes", "--fake", "shapes", "--metrics", "fid"), "needs --inception"),
    (("--real", "shapes", "--fake", "shapes", "--frames", 8), "from 9 to"),
    (("--real", "shapes", "--fake", "shapes", "--num", 1), "two clips or more"),
    (("--real", "shapes", "--fake", "shapes", "--num", 2, "--frames", 40), "lower --frames"),
    (("--real", "shapes", "--fake", "shapes", "--num", 2, "--stride", 2), "--stride is for"),
    (("--real", "shapes", "--fake", "missing.pt", "--num", 2), "no checkpoint at missing.pt"),
    (("--real", "FOLDER", "--fake", "shapes", "--num", 7), "6 videos in"),
    (("--real", "FOLDER", "--fake", "shapes", "--num", 6, "--frames", 9), "only 5 of the real"),
    (("--real", "FOLDER", "--fake", "EMPTY", "--num", 5), "no videos in"),
    (("--real", "FOLDER", "--fake", "LARGER", "--num", 2, "--frames", 9), "pixels, others of"),
    (("--fake", "FOLDER", "--metrics", "captions"), "a folder has no scenes"),
], ids=lambda part: part if isinstance(part, str) else " ")
def test_mistakes_end_with_one_line(command, folder, tmp_path, arguments, error):
    (tmp_path / "empty").mkdir()
    if "LARGER" in arguments:
        for i in range(2):
            write_video(tmp_path / "larger" / f"{i}.gif", render([THING]), FPS)
    places = {"FOLDER": folder, "EMPTY": tmp_path / "empty", "LARGER": tmp_path / "larger"}
    status, line = command(*(places.get(a, a) for a in arguments))
    assert status == 2
    assert line.startswith("error: ") and error in line


def test_missing_weights_name_the_command(command, monkeypatch):
    monkeypatch.undo()  # no stubs
    monkeypatch.setattr(sys, "argv", "metrics.py --real shapes --fake shapes --i3d none".split())
    with pytest.raises(metrics.UserError, match="python metrics.py --fetch-i3d"):
        metrics.main()
