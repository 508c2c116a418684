"""Given frames, stories and frame rates: does one model do all of these tasks?

    python experiments/tasks.py

Prints three tables, a JSON line for each row.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import print_row, run_command

import itertools
import time

import numpy as np

from data import FPS, FRAMES
from experiments.order import drawing_parser, load_painter
from sample import CONDITIONINGS, Pipeline
from shapes import BACKGROUND, COLOURS, DIRECTIONS, FPS_RANGE, POLYGONS, SPEED, MovingShapes
from shapes import actions_shown, caption_accuracy


GIVEN = {"first frame": [0], "first four": [0, 1, 2, 3], "both ends": [0, FRAMES - 1]}


def changes(videos: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring frames: (n, f, ...) -> (n, f - 1)."""
    return np.abs(np.diff(videos.astype(np.float32), axis=1)).mean((2, 3, 4))


def tasks(checkpoint: str | Path, num: int) -> None:
    """Given frames, stories and frame rates, three tables."""
    pipeline = load_painter(checkpoint)
    given_frames(pipeline, num)
    stories(pipeline, num)
    speeds(pipeline, num)


def given_frames(pipeline: Pipeline, num: int) -> None:
    """Goes on from given frames, by each of CONDITIONINGS. The first frame, the caption and the
    frame rate determine a clip of MovingShapes, so there is a truth to compare with."""
    dataset = MovingShapes(num, seed=1, fps=FPS, objects=1)
    samples = [dataset[i] for i in range(num)]
    truth = np.stack([sample.video for sample in samples])
    for name, where in GIVEN.items():
        known = np.isin(np.arange(FRAMES), where)
        seams = known[1:] != known[:-1]
        for conditioning in CONDITIONINGS:
            start = time.perf_counter()
            videos = pipeline.generate(
                [sample.caption for sample in samples], pictures={i: truth[:, i] for i in where},
                conditioning=conditioning,
            )
            seconds = time.perf_counter() - start
            error = np.square(videos[:, ~known] - truth[:, ~known].astype(np.float32))
            read = caption_accuracy([sample.scene for sample in samples], videos, FPS)
            print_row(
                given=name, conditioning=conditioning,
                psnr=(10 * np.log10(255**2 / error.mean((1, 2, 3, 4)))).mean(),
                seam=changes(videos)[:, seams].mean() / changes(truth)[:, seams].mean(),
                order=read["order"], all=read["all"], seconds_a_clip=seconds / num,
            )


ROUND = ("left", "up", "right", "down")


def write_stories(kind: str, num: int, sentences: int) -> list[list[str]]:
    """`num` stories: an object goes round, one way or the other, or it spins all the time."""
    rng, told = np.random.default_rng(0), []
    for i in range(num):
        subject = f"a {rng.choice(list(COLOURS))} {rng.choice(list(POLYGONS))}"
        way = ROUND if i // 4 % 2 else ROUND[::-1]
        turns = [f"moves {way[(i + k) % 4]}" for k in range(sentences)]
        verbs = turns if kind == "round" else ["spins"] * sentences
        told.append([f"{subject} {verb}" for verb in verbs])
    return told


def seam_frames(sentences: int, overlap: int) -> list[int]:
    """The last frame before each sentence but the first."""
    return [k * (FRAMES - overlap) + overlap - 1 for k in range(1, sentences)]


def is_told(video: np.ndarray, story: list[str], overlap: int) -> list[bool]:
    """Can each sentence be read in the frames that it adds and the one before them?"""
    starts = [0, *seam_frames(len(story), overlap)]
    ends = [start + 1 for start in starts[1:]] + [len(video)]
    return [
        actions_shown(video[start:end]) == (sentence.split()[-1],)
        for start, end, sentence in zip(starts, ends, story)
    ]


def stories(pipeline: Pipeline, num: int) -> None:
    """Stories of two and of five sentences: how much frames change at the seams, relative to inside
    the chunks; how many of the stories are told, and how many of their sentences."""
    for kind, sentences, overlap in itertools.product(("round", "spins"), (2, 5), (1, 4)):
        told = write_stories(kind, num, sentences)
        videos = pipeline.generate(told, overlap=overlap)
        change, where = changes(videos), seam_frames(sentences, overlap)
        inside = np.delete(change, where, axis=1)
        right = np.array([is_told(*story, overlap) for story in zip(videos, told)])
        print_row(
            story=kind, sentences=sentences, overlap=overlap,
            seam=change[:, where].mean() / inside.mean(), told=int(right.all(1).sum()), of=num,
            sentences_told=right.mean(),
        )


def position(video: np.ndarray) -> np.ndarray:
    """Where the object is in each frame, (f, 2): the mean place of what is no background."""
    cover = np.abs(video - np.array(BACKGROUND, np.float32)).sum(-1).clip(60) - 60
    places = np.arange(video.shape[1])
    return np.stack([cover.sum(1) @ places, cover.sum(2) @ places], 1) / cover.sum((1, 2))[:, None]


def speeds(pipeline: Pipeline, num: int) -> None:
    """How fast things move, at each frame rate of training."""
    ways = [list(DIRECTIONS)[i % 4] for i in range(num)]
    for fps in range(round(FPS_RANGE[0]), round(FPS_RANGE[1]) + 1):
        videos = pipeline.generate([f"a red circle moves {way}" for way in ways], fps=fps)
        seconds = np.arange(FRAMES) / fps
        measured = [
            np.polyfit(seconds, position(video), 1)[0] @ DIRECTIONS[way]
            for video, way in zip(videos, ways)
        ]
        mean, deviation = np.mean(measured), np.std(measured)
        print_row(fps=fps, pixels_a_second=mean, deviation=deviation, true=SPEED)


def parse_args(argv=None):
    """The command line."""
    return drawing_parser(__doc__, 100, "clips of each kind").parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: tasks(**vars(parse_args())))
