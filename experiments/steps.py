"""How many sampling steps does each sampler need?

    python experiments/steps.py      # also draws samples/steps.png

Prints a JSON line for each sampler and number of steps: the share of captions drawn right.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import Parser, number, pick_device, print_row, run_command

import argparse
import math
import time

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import FPS, write_picture
from diffusion import SAMPLERS
from metrics import caption_sets
from sample import CHECKPOINT, load_pipeline
from shapes import caption_accuracy


LINES = ((230, 75, 60), (70, 140, 240), (60, 180, 90))


def steps(checkpoint, num, picture):
    """Caption accuracy against the number of sampling steps, for each sampler; also as a chart."""
    pipeline = load_pipeline(checkpoint, pick_device("auto"))
    captions, _, scenes = zip(*caption_sets(num)["seen"])
    curves = {sampler: [] for sampler in SAMPLERS}
    for count in (3, 5, 8, 10, 20, 40):
        for sampler, curve in curves.items():
            start = time.perf_counter()
            videos = pipeline.generate(captions, steps=count, sampler=sampler)
            seconds = (time.perf_counter() - start) / num
            read = caption_accuracy(scenes, videos, FPS)
            curve.append((count, read["all"]))
            print_row(sampler=sampler, steps=count, seconds_a_clip=seconds, **read)
    write_picture(picture, chart(curves, "sampling steps", "clips with everything right"))


def chart(curves, x_label, y_label, width=560, height=340):
    """Lines through points (x, y), x on a logarithmic scale and y from 0 to 1, as a picture: uint8
    (height, width, 3). curves: {name: points}, at most three, over the same x."""
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14)
    left, right, top, bottom = 60, width - 70, 36, height - 50
    xs = [x for x, _ in next(iter(curves.values()))]

    def place(x, y):
        share = math.log(x / xs[0]) / math.log(xs[-1] / xs[0])
        return left + share * (right - left), bottom - y * (bottom - top)

    for y in (0, 0.25, 0.5, 0.75, 1):
        draw.line([place(xs[0], y), place(xs[-1], y)], (220, 220, 220))
        draw.text((left - 8, place(xs[0], y)[1]), f"{y:.0%}", "black", font, anchor="rm")
    for x in xs:
        draw.text((place(x, 0)[0], bottom + 8), str(x), "black", font, anchor="mt")
    draw.text(((left + right) / 2, height - 8), x_label, "black", font, anchor="mb")
    draw.text((left, 8), y_label, "black", font, anchor="lt")
    names = []  # at the ends of the lines
    for (name, points), colour in zip(curves.items(), LINES):
        points = [place(*point) for point in points]
        draw.line(points, colour, 3)
        for x, y in points:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], colour)
        names.append((points[-1][1], name, colour))
    lowest = -math.inf
    for y, name, colour in sorted(names):
        lowest = max(lowest + 16, y)  # none on top of another
        draw.text((right + 10, lowest), name, colour, font, anchor="lm")
    return np.asarray(picture)


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="(the shipped model)")
    parser.add_argument(
        "--num", type=number(int, 1, 10_000), default=100, help="clips at each point (%(default)s)"
    )
    parser.add_argument(
        "--picture", default="samples/steps.png", help="where to draw it (%(default)s)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: steps(**vars(parse_args())))
