"""Does the order of the words decide the order of the actions?

    python experiments/order.py

Prints one JSON line: of pairs "X, then Y" and "Y, then X", each drawn from the same noise, how many
the oracle reads as they were asked for.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import Parser, UserError, number, pick_device, print_row, run_command

import itertools
from dataclasses import replace

import numpy as np

from data import FRAMES
from metrics import check_words
from sample import CHECKPOINT, Pipeline, load_pipeline
from shapes import COLOURS, MOTIONS, REACH, SIZE, MovingShapes, actions_shown, describe


def ordered_pairs(num: int) -> tuple[list, list]:
    """`num` objects with two actions, and the same ones with their actions the other way round."""
    dataset = MovingShapes(20 * num + 100, seed=1, objects=1)
    things = (dataset.describe(i)[2][0] for i in range(len(dataset)))
    first = list(itertools.islice((thing for thing in things if len(thing.actions) == 2), num))
    return first, [replace(thing, actions=thing.actions[::-1]) for thing in first]


def order(checkpoint: str | Path, num: int) -> None:
    """Of pairs "X, then Y" and "Y, then X", drawn from the same noise: how many are read right."""
    pipeline, right = load_painter(checkpoint), []
    for things in ordered_pairs(num):
        videos = pipeline.generate([describe([thing]) for thing in things])
        right.append([actions_shown(v) == thing.actions for v, thing in zip(videos, things)])
    first, second = np.array(right)
    both = int((first & second).sum())
    print_row(pairs=num, first=int(first.sum()), second=int(second.sum()), both=both)


def load_painter(checkpoint: str | Path) -> Pipeline:
    """A model of the built-in shapes as they are. Raises UserError for others."""
    pipeline = load_pipeline(checkpoint, pick_device("auto"))
    check_words(pipeline, [*COLOURS, *REACH, *MOTIONS])
    if (pipeline.frames, pipeline.size) != (FRAMES, SIZE):
        raise UserError(f"{checkpoint} was trained on clips of other than {FRAMES} frames of "
                        f"{SIZE} pixels, so they cannot be compared with the built-in ones")
    return pipeline


def drawing_parser(description: str, num: int, what: str, least: int = 1) -> Parser:
    """For a command that draws with a checkpoint; `what` says of what it draws `num`."""
    parser = Parser(description=description)
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="(the shipped model)")
    parser.add_argument("--num", type=number(int, least, 10_000), default=num,
                        help=f"{what} (%(default)s)")
    return parser


def parse_args(argv=None):
    """The command line."""
    return drawing_parser(__doc__, 50, "pairs").parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: order(**vars(parse_args())))
