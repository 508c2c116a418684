"""The caption oracle is right on what the renderer draws, and wrong where a video is wrong."""

import dataclasses

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from data import BACKGROUND, COLOURS, FPS, MOTIONS, POLYGONS, REACH, MovingShapes, Thing, render
from metrics import Reading, caption_accuracy, read_things

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
