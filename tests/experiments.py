"""The measurements behind the README's tables, for which the tests have no time.

    python tests/experiments.py order       # "X, then Y" and "Y, then X" with the same seed
    python tests/experiments.py tasks       # given frames, stories and frame rates
    python tests/experiments.py slices      # trains on whole actions, and on slices of them
    python tests/experiments.py reference   # FVD, KVD, IS of real clips, reconstructed and spoilt
    python tests/experiments.py steps       # right captions for each sampler and number of steps
    python tests/experiments.py nearest --data FOLDER --checkpoint MODEL    # is it memorised?

Each prints JSON, a line for each row of its table. How fast things are: tests/benchmark.py.
"""

import argparse
import contextlib
import copy
import csv
import itertools
import json
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import metrics
import train
from data import BACKGROUND, COLOURS, DIRECTIONS, FPS, FPS_RANGE, FRAMES, POLYGONS, SPEED
from data import MovingShapes, Thing, VideoFolder, contact_sheet, describe, place_in_frame
from data import read_ahead, render, to_model, to_uint8, write_picture, write_video
from diffusion import SAMPLERS
from metrics import caption_accuracy, caption_sets, read_things
from sample import CHECKPOINT, CONDITIONINGS, Parser, autocast, load_checkpoint, load_pipeline
from sample import number, pick_device, run_command, save_atomically


def show(**row):
    """Prints a row of a table."""
    for name, value in row.items():
        if isinstance(value, float | np.floating):
            row[name] = float(f"{value:.4g}")
    print(json.dumps(row), flush=True)


def actions_shown(video, fps=FPS):
    """The motions that the oracle reads, in order; none where there is no object."""
    things = read_things(video, fps)
    return things[0].actions if things else ()


# ------------------------------------------------------------------------------ order


def ordered_pairs(num):
    """`num` objects with two actions, and the same ones with their actions the other way round."""
    dataset = MovingShapes(20 * num + 100, seed=1, objects=1)
    things = (dataset.describe(i)[2][0] for i in range(len(dataset)))
    first = list(itertools.islice((thing for thing in things if len(thing.actions) == 2), num))
    return first, [replace(thing, actions=thing.actions[::-1]) for thing in first]


def order(checkpoint, num):
    """Of pairs "X, then Y" and "Y, then X", drawn from the same noise: how many are read right."""
    pipeline, right = load_pipeline(checkpoint, pick_device("auto")), []
    for things in ordered_pairs(num):
        videos = pipeline.generate([describe([thing]) for thing in things])
        right.append([actions_shown(v) == thing.actions for v, thing in zip(videos, things)])
    first, second = np.array(right)
    show(pairs=num, first=int(first.sum()), second=int(second.sum()),
         both=int((first & second).sum()))


# ------------------------------------------------------------------------------ tasks

GIVEN = {"first frame": [0], "first four": [0, 1, 2, 3], "both ends": [0, FRAMES - 1]}


def changes(videos):
    """Mean absolute difference of neighbouring frames: (n, f, ...) -> (n, f - 1)."""
    return np.abs(np.diff(videos.astype(np.float32), axis=1)).mean((2, 3, 4))


def tasks(checkpoint, num):
    """Given frames, stories and frame rates, three tables."""
    pipeline = load_pipeline(checkpoint, pick_device("auto"))
    given_frames(pipeline, num)
    stories(pipeline, num)
    speeds(pipeline, num)


def given_frames(pipeline, num):
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
                [sample.caption for sample in samples], given={i: truth[:, i] for i in where},
                conditioning=conditioning,
            )
            seconds = time.perf_counter() - start
            error = np.square(videos[:, ~known] - truth[:, ~known].astype(np.float32))
            read = caption_accuracy([sample.scene for sample in samples], videos, FPS)
            show(
                given=name, conditioning=conditioning,
                psnr=(10 * np.log10(255**2 / error.mean((1, 2, 3, 4)))).mean(),
                seam=changes(videos)[:, seams].mean() / changes(truth)[:, seams].mean(),
                order=read["order"], all=read["all"], seconds_a_clip=seconds / num,
            )


def stories(pipeline, num):
    """Two chunks each: how much frames change at the seam, relative to inside the chunks, and how
    many of the stories are told."""
    rng = np.random.default_rng(0)
    subjects = [f"a {rng.choice(list(COLOURS))} {rng.choice(list(POLYGONS))}" for _ in range(num)]
    turns = [(x, y) for x in ("left", "right") for y in ("up", "down")]
    turns = list(itertools.islice(itertools.cycle(turns + [(y, x) for x, y in turns]), num))
    kinds = {
        "two sentences": [[f"{s} moves {x}" for x in turn] for s, turn in zip(subjects, turns)],
        "one sentence": [[f"{s} spins"] * 2 for s in subjects],
    }
    for (name, told), overlap in itertools.product(kinds.items(), (1, 4)):
        videos = pipeline.generate(told, overlap=overlap)
        change = changes(videos)
        seam, inside = change[:, FRAMES - 1], np.delete(change, FRAMES - 1, axis=1)
        right = [
            actions_shown(part) == (sentence.split()[-1],)
            for video, story in zip(videos, told)
            for part, sentence in zip((video[:FRAMES], video[FRAMES - 1 :]), story)
        ]
        show(story=name, overlap=overlap, seam=seam.mean() / inside.mean(),
             told=int(np.reshape(right, (num, 2)).all(1).sum()), of=num)


def position(video):
    """Where the object is in each frame, (f, 2): the mean place of what is no background."""
    cover = np.abs(video - np.array(BACKGROUND, np.float32)).sum(-1).clip(60) - 60
    places = np.arange(video.shape[1])
    return np.stack([cover.sum(1) @ places, cover.sum(2) @ places], 1) / cover.sum((1, 2))[:, None]


def speeds(pipeline, num):
    """How fast things move, at each frame rate of training."""
    ways = [list(DIRECTIONS)[i % 4] for i in range(num)]
    for fps in range(round(FPS_RANGE[0]), round(FPS_RANGE[1]) + 1):
        videos = pipeline.generate([f"a red circle moves {way}" for way in ways], fps=fps)
        seconds = np.arange(FRAMES) / fps
        measured = [
            np.polyfit(seconds, position(video), 1)[0] @ DIRECTIONS[way]
            for video, way in zip(videos, ways)
        ]
        show(fps=fps, pixels_a_second=np.mean(measured), deviation=np.std(measured), true=SPEED)


# ------------------------------------------------------------------------------ slices

WORLD = {"frames": 4 * FRAMES, "fps": 20.0}  # of the videos: they are as long as four clips
CIRCLES = list(itertools.product(COLOURS, itertools.permutations(DIRECTIONS, 2)))


def write_circles(folder, num):
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


def shares(videos, fps):
    """Of videos that should show CIRCLES: how many show both directions in order, and how many of
    their halves show either."""
    in_order = either = 0
    for video, (_, actions) in zip(videos, itertools.cycle(CIRCLES)):
        shown = actions_shown(video, fps)
        in_order += shown == actions
        either += sum(action in actions for action in (2 * shown)[:2]) / 2
    return {"in_order": in_order / len(videos), "either": either / len(videos)}


def train_small(checkpoint, steps, folder, out, clips):
    """A pipeline with a small UNet, trained on the videos of a folder. checkpoint: its autoencoder;
    out: run folder; clips: options of train.py."""
    shapes = train.PRESETS["shapes"]
    training = replace(  # so short a run is easy to its end, or the words would stay unread
        shapes.diffusion_training, steps=steps, easy_start=steps * 4 // 3, batch_size=8, ema=0.99,
        save_every=steps,
    )
    unet = replace(shapes.unet, widths=(32, 64), blocks=(1, 2))
    train.PRESETS["small"] = replace(shapes, unet=unet, diffusion_training=training)
    save_atomically({"vae": load_checkpoint(checkpoint, "vae")["vae"]}, out / "vae.pt")
    args = train.parse_args(
        ["diffusion", "--data", str(folder), "--preset", "small", "--out", str(out), *clips]
    )
    with contextlib.redirect_stdout(sys.stderr):
        train.train_diffusion(args, train.configure(args), pick_device("auto"))
    return load_pipeline(out / "model.pt", pick_device("auto"))


def slices(checkpoint, steps):
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
            show(trained_on=name, clips="in training", **shares([c.video for c in clips], fps))
            options = ["--stride", str(stride)] if stride else []
            pipeline = train_small(checkpoint, steps, folder, Path(temporary, name), options)
            ways = {"drawn": {"prompts": captions}}
            if stride:
                ways["drawn, 64 frames"] = {"prompts": captions, "frames": WORLD["frames"]}
                ways["drawn, four in a row"] = {"prompts": [[caption] * 4 for caption in captions]}
            for way, arguments in ways.items():
                videos = pipeline.generate(**arguments, fps=fps)
                show(trained_on=name, clips=way, **shares(videos, fps))


# ------------------------------------------------------------------------------ reference


def spoil(video, how, rng, vae=None):
    """uint8 (f, h, w, 3) -> the same clip with its frames in random order, or with noise of 25
    levels, or through an autoencoder and back; "nothing" leaves it as it is."""
    if how == "shuffled":
        return video[rng.permutation(len(video))]
    if how == "noise":
        noisy = video + rng.normal(0, 25, video.shape)
        return noisy.round().clip(0, 255).astype(np.uint8)
    if how == "reconstructed":
        device = next(vae.parameters()).device
        with torch.inference_mode(), autocast(device):
            return to_uint8(vae.decode_video(vae.encode_video(to_model(video[None]).to(device))))[0]
    return video


def reference(checkpoint, data, num, stride):
    """Spoils one half of the data in some ways, and measures it against the other half; and, in
    `fvd_of_same`, against itself unspoilt."""
    names, device = ["fvd", "kvd", "is"], pick_device("auto")
    if data != "shapes":  # as many as there are
        num = len(VideoFolder(data)) // 2
    options = ["--stride", str(stride)] if stride else []
    args = metrics.parse_args(["--real", data, "--fake", data, "--num", str(num), *options])
    networks, _ = metrics.load_networks(args, names, device)
    real = metrics.Source.open(data, 0, args, device)
    fake, ways, vae = replace(real, seed=1), ["nothing", "shuffled", "noise"], None
    if real.folder:
        fake.folder = copy.copy(real.folder)
        real.folder.items, fake.folder.items = real.folder.items[:num], real.folder.items[num:]
    else:
        ways.insert(1, "reconstructed")
        vae = load_pipeline(checkpoint, device).vae
    for warning in metrics.small_sample_warnings(names, num, FRAMES):
        print(f"warning: {warning}", file=sys.stderr)
    size = metrics.common_size([real])
    whole = metrics.extract(real.samples(args, size), num, networks, device, "real clips")
    for how in ways:
        rng = np.random.default_rng(0)
        spoilt = (
            replace(sample, video=spoil(sample.video, how, rng, vae))
            for sample in fake.samples(args, size)
        )
        side = metrics.extract(spoilt, num, networks, device, how, whole["size"])
        unspoilt = side if how == "nothing" else unspoilt
        same = metrics.compare(unspoilt, side, ["fvd"])["fvd"]
        show(spoilt=how, num=num, **metrics.compare(whole, side, names), fvd_of_same=same)


# ------------------------------------------------------------------------------ steps

LINES = ((230, 75, 60), (70, 140, 240), (60, 180, 90))


def steps(checkpoint, num, picture):
    """Caption accuracy against the number of sampling steps, for each sampler; also as a chart."""
    pipeline = load_pipeline(checkpoint, pick_device("auto"))
    captions, _, scenes = zip(*caption_sets(num)["seen"])
    curves = {sampler: [] for sampler in SAMPLERS}
    for count in (3, 5, 10, 20, 40):
        for sampler, curve in curves.items():
            start = time.perf_counter()
            videos = pipeline.generate(captions, steps=count, sampler=sampler)
            seconds = (time.perf_counter() - start) / num
            read = caption_accuracy(scenes, videos, FPS)
            curve.append((count, read["all"]))
            show(sampler=sampler, steps=count, seconds_a_clip=seconds, **read)
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


# ------------------------------------------------------------------------------ nearest


def root_mean_square(a, b):
    """Distances between clips, uint8 (..., f, h, w, 3), that broadcast: in levels of 0 to 255."""
    return np.sqrt(np.square(a - b.astype(np.float32)).mean((-4, -3, -2, -1)))


def nearest(checkpoint, data, num, picture):
    """Does a model repeat its training clips?

    For each clip the distance to the training clip that is nearest to it, a root mean square over
    all pixels in levels of 0 to 255, the median over clips; and how often that one has the same
    caption. "real": training clips, each among the others; "copy": what the autoencoder makes of
    them, as near as a memorised clip would be; "generated": for their captions, at the frame rates
    of their clips, or at one for all, which gives nothing away. FVD is that to the training clips.
    In the picture generated clips stand above the training clips nearest to them.
    """
    device = pick_device("auto")
    pipeline = load_pipeline(checkpoint, device)
    networks, _ = metrics.load_networks(metrics.parse_args(["--fake", data]), ["fvd"], device)
    dataset = VideoFolder(data, size=pipeline.size)
    real = [clip for _, clip in read_ahead(dataset, range(len(dataset))) if clip is not None]
    clips = np.stack([sample.video for sample in real])
    chosen = list(itertools.islice(itertools.cycle(real), num))
    asked, rates = [s.caption for s in chosen], [s.fps for s in chosen]
    videos = {
        "real": clips,
        "copy": np.stack([spoil(clip, "reconstructed", None, pipeline.vae) for clip in clips]),
        "generated": pipeline.generate(asked, fps=rates, progress=True),
        "generated, one rate": pipeline.generate(asked, fps=np.median(rates), progress=True),
    }
    sides, found = {}, {}
    for name, some in videos.items():
        samples = (replace(s, video=v) for s, v in zip(itertools.cycle(real), some))
        sides[name] = metrics.extract(samples, len(some), networks, device, name)
        distances = np.array([root_mean_square(video, clips) for video in some])
        if name == "real":
            np.fill_diagonal(distances, np.inf)
        found[name] = distances.argmin(1)
        same = [s.caption == real[i].caption for s, i in zip(itertools.cycle(real), found[name])]
        show(clips=name, num=len(some), distance=np.median(distances.min(1)),
             same_caption=np.mean(same), **metrics.compare(sides["real"], sides[name], ["fvd"]))
    for warning in metrics.small_sample_warnings(["fvd"], num, FRAMES):
        print(f"warning: {warning}", file=sys.stderr)
    frames = np.linspace(0, FRAMES - 1, 8).round().astype(int)
    rows = []
    for i in np.linspace(0, num - 1, min(num, 4)).round().astype(int):
        rows += [videos["generated"][i], clips[found["generated"][i]]]
    sheets = [contact_sheet(video[frames], columns=len(frames)) for video in rows]
    write_picture(picture, np.concatenate(sheets))


# ------------------------------------------------------------------------------ command line

EXPERIMENTS = {
    "order": order, "tasks": tasks, "slices": slices, "reference": reference, "steps": steps,
    "nearest": nearest,
}


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, experiment in EXPERIMENTS.items():
        command = commands.add_parser(name, description=experiment.__doc__)
        command.add_argument("--checkpoint", default=CHECKPOINT, help="(the shipped model)")
    options = commands.choices
    options["order"].add_argument(
        "--num", type=number(int, 1, 10_000), default=50, help="pairs (%(default)s)"
    )
    options["tasks"].add_argument(
        "--num", type=number(int, 1, 10_000), default=20, help="clips of each kind (%(default)s)"
    )
    options["slices"].add_argument(
        "--steps", type=number(int, 3, 10**6), default=1500, help="of training (%(default)s)"
    )
    options["reference"].add_argument(
        "--data", default="shapes", metavar="shapes|FOLDER", help="(%(default)s)"
    )
    options["reference"].add_argument(
        "--num", type=number(int, 2, 10**6), default=2048,
        help="shapes in a half; of a folder, all of it is taken (%(default)s)",
    )
    options["reference"].add_argument(
        "--stride", type=number(int, 1, 10**6), metavar="N",
        help="of a folder: every N-th frame from a random place (16 over the whole video)",
    )
    options["steps"].add_argument(
        "--num", type=number(int, 1, 10_000), default=100, help="clips at each point (%(default)s)"
    )
    options["nearest"].add_argument("--data", required=True, metavar="FOLDER")
    options["nearest"].add_argument(
        "--num", type=number(int, 1, 10_000), default=36, help="clips to draw (%(default)s)"
    )
    for name in ("steps", "nearest"):
        options[name].add_argument(
            "--picture", default=f"samples/{name}.png", help="where to draw it (%(default)s)"
        )
    return parser.parse_args(argv)


def main():
    options = vars(parse_args())
    EXPERIMENTS[options.pop("what")](**options)


if __name__ == "__main__":
    run_command(main)
