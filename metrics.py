"""How good are generated videos? This file holds the caption oracle of `MovingShapes`.

The oracle inverts the renderer of `data.py`: from pixels alone, with no network, it reads the
colour and the shape of every object and what it does in each half of the clip. Generated videos can
therefore be checked against their captions, word by word, and so can their frame rate: the motions
are compared with the speeds per second that the training data has.

    python metrics.py --fake pretrained/shapes.pt --metrics captions --num 200
    python metrics.py --fake shapes --metrics captions          # the oracle on rendered clips

Prints one JSON object. Letters used here: `f` frames, `h w` height and width. Videos are uint8
arrays (f, h, w, 3).
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import BACKGROUND, COLOURS, FPS, GROWTH, MOTIONS, POLYGONS, REACH, SIZE, SPEED, SPIN
from data import MovingShapes, atomic_path, rates, render, shape_distance
from diffusion import SAMPLERS
from sample import GUIDANCE, SAMPLER, STEPS, Parser, UserError
from sample import load_pipeline, number, pick_device, run_command

# ------------------------------------------------------------------------------ caption oracle

# Colours as directions away from the background: an anti-aliased or blurred pixel is a mixture of
# the two, so it keeps the direction and only its length tells how much of the pixel is covered.
PALETTE = np.array(list(COLOURS.values()), np.float32) - np.array(BACKGROUND, np.float32)
LENGTHS = np.linalg.norm(PALETTE, axis=1)
HUES = PALETTE / LENGTHS[:, None]
FAINT = 40.0  # levels from the background below which a pixel has no hue of its own
MIN_PIXELS = 6.0  # of a 64-pixel frame, on average: less is a fringe or a speck, not an object
MIN_SHARE = 0.05  # likewise, relative to the clip's largest object
MIN_AREA = 0.15  # of the object's typical area: in frames with less it is missing

UNITS = np.array([SPEED, SPEED, GROWTH, SPIN])
TEMPLATES = np.array([rates(action) for action in MOTIONS]) / UNITS  # stays still: all zero


@dataclass(frozen=True)
class Reading:
    """What the oracle sees of one object; same words as `data.Thing`.

    actions: one or two of MOTIONS, in order. None stands for a half of the clip in which the object
    is missing from too many frames to say what it does.
    """

    colour: str
    shape: str
    actions: tuple


def read_things(video, fps):
    """What is seen in a clip like those of `MovingShapes`: list of `Reading`, the largest first.

    video: uint8 (f, h, w, 3), square frames of any size; fps: frames per second. At most one object
    per colour is found. Raises ValueError for arrays that are not such a clip.
    """
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or not video.size:
        raise ValueError(f"expected uint8 (f, h, w, 3), not {video.dtype} {video.shape}")
    scale = SIZE / video.shape[1]  # everything below is in pixels of a 64-pixel frame
    offset = video - np.array(BACKGROUND, np.float32)
    labels = np.full(video.shape[:3], -1)
    strong = np.square(offset).sum(-1) > FAINT**2
    along = offset[strong] @ HUES.T  # |offset| times the cosine with each colour
    nearest = along.argmax(1)
    labels[strong] = nearest
    # Fringes are thin: only pixels covered by half and more speak for a colour's presence.
    solid = labels.copy()
    solid[strong] = np.where(along.max(1) > 0.5 * LENGTHS[nearest], nearest, -1)
    pixels = np.array([(solid == c).sum() for c in range(len(COLOURS))]) * scale**2 / len(video)
    found = []
    for c, colour in enumerate(COLOURS):
        if pixels[c] >= max(MIN_PIXELS, MIN_SHARE * pixels.max()):
            found.append((pixels[c], _read(colour, c, offset, labels, solid == c, scale, fps)))
    return [reading for _, reading in sorted(found, key=lambda pair: -pair[0])]


def _read(colour, c, offset, labels, solid, scale, fps):
    """One object's `Reading`. offset: float (f, h, w, 3); labels, solid: (f, h, w)."""
    rows, columns = (_span(solid.any(axis=axes)) for axes in ((0, 2), (0, 1)))
    offset, labels, solid = (a[:, rows, columns] for a in (offset, labels, solid))
    # Faint pixels count with their sign, whatever their hue: noise then cancels out in every sum.
    mine = (labels == c) | (labels < 0)
    cover = np.where(mine, np.minimum(offset @ (HUES[c] / LENGTHS[c]), 1), 0)
    x = (np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5) * scale
    y = (np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5)[:, None] * scale
    area, u, v, cover = _locate(cover, solid, x, y, scale)
    # Weighted by itself, so that the mean ignores frames without the object, however many.
    typical = np.square(area).sum() / area.sum()
    kept = area > MIN_AREA * typical
    center = np.stack([x[0] - u[:, 0, 0], y[0, 0] - v[:, 0, 0]])
    shape, angle = _shape(cover[kept], u[kept], v[kept], area[kept], scale)
    state = np.vstack([center[:, kept], np.log(area[kept]) / 2, angle])  # x, y, log radius, angle
    frame, middle = np.flatnonzero(kept), -(-len(cover) // 2)  # the second action starts at f / 2
    halves = [_motion(frame, state, r, fps) for r in (range(middle), range(middle, len(cover)))]
    return Reading(colour, shape, tuple(halves[:1] if halves[0] == halves[1] else halves))


def _span(used, margin=3):
    """Slice around the true entries of a boolean vector."""
    where = np.flatnonzero(used)
    return slice(max(where[0] - margin, 0), min(where[-1] + margin + 1, len(used)))


def _locate(cover, solid, x, y, scale):
    """Area (f,), coordinates u, v (f, h, w) from the object's centroid, and its own coverage."""
    own = solid.astype(np.float32)
    for _ in range(3):  # the window about the object and its centroid depend on each other
        area = own.sum((1, 2)) * scale**2
        weight = own * scale**2 / np.maximum(area, 1e-3)[:, None, None]
        u = x - (weight * x).sum((1, 2))[:, None, None]
        v = y - (weight * y).sum((1, 2))[:, None, None]
        # The farthest corner of any shape is at 0.88 sqrt(area); the rest is for blur.
        reach = 1.05 * np.sqrt(np.maximum(area, 0)) + 3
        own = np.where(u * u + v * v < reach[:, None, None] ** 2, cover, 0)
    return area, u, v, own


def _area(shape):
    """Area of a shape of nominal radius 1, in closed form."""
    if shape in POLYGONS:
        corners, inner = POLYGONS[shape]
        return corners * inner * np.sin(np.pi / corners) * REACH[shape] ** 2
    return np.pi * REACH[shape] ** 2 * (0.75 if shape == "ring" else 1)


def _angle(corners, cover, u, v):
    """Unwrapped angle (f,) of an n-cornered object: 1/n the phase of sum cover rho^2 e^(i n phi).

    phi is 0 upwards and grows clockwise, as in `shape_distance`. The power of rho is low because
    noise far from the centre weighs the more the higher it is.
    """
    rho = np.hypot(u, v) + 1e-6
    turned = ((-v + 1j * u) / rho) ** corners
    return np.unwrap(np.angle((cover * rho**2 * turned).sum((1, 2)))) / corners


def _shape(cover, u, v, area, scale):
    """The shape that, drawn where the object is, looks most like it; and its angle (f,)."""
    best = None
    for shape in REACH:
        polygon = shape in POLYGONS
        angle = _angle(POLYGONS[shape][0], cover, u, v) if polygon else np.zeros(len(cover))
        radius = np.sqrt(area / _area(shape)).astype(np.float32)[:, None, None]
        turn = angle.astype(np.float32)[:, None, None]
        distance = shape_distance(shape, u / radius, v / radius, turn) * (radius / scale)
        # A plain sum over the clip: frames weigh as much as the object covers of them.
        error = np.abs(np.clip(0.5 - distance, 0, 1) - cover).sum()
        if best is None or error < best[0]:
            best = error, shape, angle
    return best[1:]


def _motion(frame, state, frames, fps):
    """The motion whose velocity is nearest to the object's in `frames`; None if that is unreadable.

    frame: indices of the frames where the object was seen (n,); state: x, y, log radius, angle
    (4, n); frames: range of the frames to look at.
    """
    here = (frame >= frames.start) & (frame < frames.stop)
    if here.sum() < max(2, len(frames) / 2):
        return None  # absent is not the same as still
    velocity = np.polyfit(frame[here] / fps, state[:, here].T, 1)[0]  # per second, by least squares
    return MOTIONS[np.square(TEMPLATES - velocity / UNITS).sum(1).argmin()]


def caption_accuracy(scenes, videos, fps):
    """Share of clips that show what their captions say.

    scenes: a list of `Thing`s for each clip; videos: uint8 arrays (f, h, w, 3); fps: one number for
    all clips, or one for each. Returns fractions of clips in which every object is right: "colour",
    "shape", "motion" (the set of actions), "order" (the actions in order) and "all" (everything,
    and no object too many); and "n", the number of clips. Two objects are told apart by colour, a
    single one is the largest seen; a missing one makes its clip wrong in everything. Raises
    ValueError where scenes and videos differ in number.
    """
    scenes = list(scenes)
    rights = []
    for scene, video, rate in zip(scenes, videos, np.broadcast_to(fps, len(scenes)), strict=True):
        readings = read_things(video, rate)
        by_colour = {reading.colour: reading for reading in readings}
        right = np.ones(5, bool)
        for thing in scene:
            single = len(scene) == 1 and readings
            reading = readings[0] if single else by_colour.get(thing.colour)
            right &= reading is not None and _compare(thing, reading)
        right[4] = right.all() and len(readings) == len(scene)
        rights.append(right)
    means = np.mean(rights, axis=0) if rights else np.zeros(5)
    names = ("colour", "shape", "motion", "order", "all")
    return {name: float(mean) for name, mean in zip(names, means)} | {"n": len(rights)}


def _compare(thing, reading):
    """Which of colour, shape, motion and order are right; the fifth, "all", is up to the caller."""
    actions = set(thing.actions) == set(reading.actions), thing.actions == reading.actions
    return np.array([thing.colour == reading.colour, thing.shape == reading.shape, *actions, True])


# ------------------------------------------------------------------------------ command line


def caption_sets(num):
    """Name -> `num` tuples (caption, frame rate, scene): of the training set, with one object and
    with two, and of single objects in combinations that training never had."""
    train, held_out = MovingShapes(), MovingShapes(split="heldout")
    samples = [train.describe(i) for i in range(len(train))]
    return {
        "seen": [sample for sample in samples if len(sample[2]) == 1][:num],
        "held_out": [held_out.describe(i) for i in range(num)],
        "two_objects": [sample for sample in samples if len(sample[2]) == 2][:num],
    }


def measure_captions(args):
    """`caption_accuracy` of each caption set: of clips generated at the default frame rate, or of
    clips rendered at their own."""
    pipeline = None if args.fake == "shapes" else load_pipeline(args.fake, pick_device(args.device))
    results = {}
    for name, samples in caption_sets(args.num).items():
        captions, rates, scenes = zip(*samples)
        videos = []
        for start in tqdm(range(0, args.num, args.batch_size), desc=f"captions, {name}"):
            part = slice(start, start + args.batch_size)
            if pipeline is None:
                videos += [render(s, fps=r) for s, r in zip(scenes[part], rates[part])]
                continue
            videos += list(pipeline.generate(
                captions[part], args.seed + start, steps=args.steps, sampler=args.sampler,
                guidance=args.guidance, batch_size=args.batch_size,
            ))
        results[name] = caption_accuracy(scenes, videos, FPS if pipeline else rates)
    return results


MEASURES = {"captions": measure_captions}


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fake", required=True, help="a checkpoint (model.pt), or shapes")
    parser.add_argument(
        "--metrics", nargs="+", choices=list(MEASURES), default=list(MEASURES), help="(all)"
    )
    parser.add_argument(
        "--num", type=number(int, 1, 1500), default=200, help="clips of each kind (%(default)s)"
    )
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="(%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    group = parser.add_argument_group("sampling, for a checkpoint")
    group.add_argument("--steps", type=number(int, 1, 1000), default=STEPS, help="(%(default)s)")
    group.add_argument("--sampler", choices=list(SAMPLERS), default=SAMPLER, help="(%(default)s)")
    group.add_argument(
        "--guidance", type=number(float, 0, 100), default=GUIDANCE, help="(%(default)s)"
    )
    group.add_argument("--batch-size", type=number(int, 1, 1000), default=20, help="(%(default)s)")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    names = ("fake", "num", "seed", "steps", "sampler", "guidance")
    result = {name: MEASURES[name](args) for name in args.metrics}
    result["protocol"] = {name: getattr(args, name) for name in names} | {"fps": FPS}
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        try:
            with atomic_path(args.json) as path:
                path.write_text(text + "\n")
        except OSError as error:
            raise UserError(f"cannot write {args.json}: {error.strerror}") from error


if __name__ == "__main__":
    run_command(main)
