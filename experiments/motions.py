"""Is every shape drawn right, whatever it does?

    python experiments/motions.py

Prints two JSON lines for each motion: the share of the clips of each shape whose shape the oracle
reads as asked for, and the share whose motion it does.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import print_row, run_command

import itertools

import numpy as np

from data import FPS
from experiments.order import drawing_parser, load_painter
from shapes import COLOURS, MOTIONS, POLYGONS, REACH, Thing, caption_accuracy, describe


def motions(checkpoint: str | Path, num: int) -> None:
    """For each motion and shape `num` clips, in the colours by turns."""
    pipeline = load_painter(checkpoint)
    for motion in MOTIONS:
        rows = {"shape": {}, "motion": {}}
        for shape in REACH if motion != "spins" else POLYGONS:  # nobody could see a circle spin
            colours = itertools.islice(itertools.cycle(COLOURS), num)
            scenes = [[Thing(colour, shape, "", (motion,), 0.0, 0.0, 0.0)] for colour in colours]
            videos = pipeline.generate([describe(scene) for scene in scenes])
            read = caption_accuracy(scenes, videos, FPS)
            for right, row in rows.items():
                row[shape] = read[right]
        for right, row in rows.items():
            print_row(motion=motion, right=right, **row, mean=np.mean(list(row.values())))


def parse_args(argv=None):
    """The command line."""
    return drawing_parser(__doc__, 24, "clips of each shape and motion").parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: motions(**vars(parse_args())))
