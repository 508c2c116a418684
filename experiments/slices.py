"""Does a clip have to cover the whole action?

    python experiments/slices.py      # trains two small models: 12 minutes on 2 CPU cores

Writes captioned videos of circles that move in one direction and then in another, trains the same
small model on clips of the whole action and on slices of it, and lets both draw every caption of
that world. Prints a JSON line for each row of the table.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import Parser, load_checkpoint, number, pick_device, print_row, run_command
from tools import save_atomically

import contextlib
import csv
import itertools
import tempfile
from dataclasses import replace

import numpy as np

import train
from data import FRAMES, VideoFolder, write_video
from sample import CHECKPOINT, Pipeline, load_pipeline
from shapes import COLOURS, DIRECTIONS, Thing, actions_shown, describe, place_in_frame, render


WORLD = {"frames": 4 * FRAMES, "fps": 20.0}  # of the videos: they are as long as four clips
CIRCLES = list(itertools.product(COLOURS, itertools.permutations(DIRECTIONS, 2)))


def write_circles(folder: Path, num: int) -> None:
    """A folder of `num` captioned videos of circles that move in one direction and then in another:
    video i has the colour and the directions of CIRCLES[i], which begins again at its end."""
    rng, rows = np.random.default_rng(0), [("file", "caption")]
    for i in range(num):
        colour, actions = CIRCLES[i % len(CIRCLES)]
        thing = place_in_frame(Thing(colour, "circle", "", actions, 0.0, 0.0, 0.0), rng, **WORLD)
        write_video(folder / f"{i}.gif", render([thing], **WORLD), WORLD["fps"])
        rows.append((f"{i}.gif", describe([thing])))
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def shares(videos: list, fps: float) -> dict[str, float]:
    """Of videos that should show CIRCLES: how many show both directions in order, and how many of
    their halves show either."""
    in_order = either = 0
    for video, (_, actions) in zip(videos, itertools.cycle(CIRCLES)):
        shown = actions_shown(video, fps)
        in_order += shown == actions
        either += sum(action in actions for action in (2 * shown)[:2]) / 2
    return {"in_order": in_order / len(videos), "either": either / len(videos)}


def train_small(
    checkpoint: str | Path, steps: int, folder: Path, out: Path, clips: list[str]
) -> Pipeline:
    """A pipeline with a small UNet, trained on the videos of a folder. checkpoint: its autoencoder;
    out: run folder; clips: options of train.py."""
    shapes = train.PRESETS["shapes"]()
    training = replace(  # so short a run is easy to its end, or the words would stay unread
        shapes.diffusion_training, steps=steps, easy_start=steps * 4 // 3, batch_size=8, ema=0.99,
        save_every=steps,
    )
    unet = replace(shapes.unet, widths=(32, 64), blocks=(1, 2))
    small = replace(shapes, unet=unet, diffusion_training=training)
    train.PRESETS["small"] = lambda: small
    save_atomically({"vae": load_checkpoint(checkpoint, "vae")["vae"]}, out / "vae.pt")
    args = train.parse_args(
        ["diffusion", "--data", str(folder), "--preset", "small", "--out", str(out), *clips]
    )
    with contextlib.redirect_stdout(sys.stderr):
        train.train_diffusion(args, train.configure(args), pick_device("auto"))
    return load_pipeline(out / "model.pt", pick_device("auto"))


def slices(checkpoint: str | Path, steps: int) -> None:
    """The same small model trained on clips of the whole action, and on slices of it that share its
    caption. Each draws clips like those it learned from; the latter also draws as long as the
    action takes, at once and slice by slice."""
    captions = [f"a {colour} circle moves {x}, then {y}" for colour, (x, y) in CIRCLES]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "videos")
        write_circles(folder, 15 * len(CIRCLES))
        for name, stride in {"whole actions": None, "slices": 1}.items():
            dataset = VideoFolder(folder, stride=stride)
            clips = [dataset[i] for i in range(2 * len(CIRCLES))]
            fps = clips[0].fps
            print_row(trained_on=name, clips="in training", **shares([c.video for c in clips], fps))
            options = ["--stride", str(stride)] if stride else []
            pipeline = train_small(checkpoint, steps, folder, Path(temporary, name), options)
            ways = {"drawn": {"prompts": captions}}
            if stride:
                ways["drawn, 64 frames"] = {"prompts": captions, "frames": WORLD["frames"]}
                ways["drawn, four in a row"] = {"prompts": [[caption] * 4 for caption in captions]}
            for way, arguments in ways.items():
                videos = pipeline.generate(**arguments, fps=fps)
                print_row(trained_on=name, clips=way, **shares(videos, fps))


def parse_args(argv=None):
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="(the shipped model)")
    parser.add_argument(
        "--steps", type=number(int, 3, 10**6), default=1500, help="of training (%(default)s)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: slices(**vars(parse_args())))
