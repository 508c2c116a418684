"""How many sampling steps does each sampler need?

    python experiments/steps.py      # also draws samples/steps.png

Prints a JSON line for each sampler and number of steps: the share of captions drawn right,
of those with one object and of those with two. The chart shows the mean of both.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import check_output, file_name, print_row, run_command

import time

from data import FPS, IMAGES, chart, write_picture
from diffusion import SAMPLERS
from experiments.order import drawing_parser, load_painter
from metrics import caption_sets
from shapes import caption_accuracy


def steps(checkpoint: str | Path, num: int, picture: Path) -> None:
    """Caption accuracy against the number of sampling steps, for each sampler; also as a chart."""
    check_output(picture)
    pipeline = load_painter(checkpoint)
    sets = caption_sets(num)
    captions, _, scenes = zip(*sets["seen"], *sets["two_objects"])
    halves = {"one_object": slice(num), "two_objects": slice(num, None)}
    curves = {sampler: [] for sampler in SAMPLERS}
    for count in (3, 5, 8, 10, 20):
        for sampler, curve in curves.items():
            start = time.perf_counter()
            videos = pipeline.generate(captions, steps=count, sampler=sampler)
            seconds = (time.perf_counter() - start) / len(captions)
            right = {name: caption_accuracy(scenes[half], videos[half], FPS)["all"]
                     for name, half in halves.items()}
            curve.append((count, sum(right.values()) / 2))
            print_row(sampler=sampler, steps=count, seconds_a_clip=seconds, **right)
    write_picture(picture, chart(curves, "sampling steps", "clips with everything right"))


def parse_args(argv=None):
    """The command line."""
    parser = drawing_parser(__doc__, 50, "clips of each kind at each point")
    parser.add_argument("--picture", type=file_name(*IMAGES), default="samples/steps.png",
                        help="(%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: steps(**vars(parse_args())))
