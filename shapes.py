"""The built-in captioned videos, and the oracle that reads them back.

`MovingShapes` draws clips such as "a red circle moves right, then up". Every sample is a pure
function of (seed, index), so nothing is stored on disk and two people train on the same data.
`read_things` is its inverse: from pixels alone, with no network, it reads the colour and the shape
of every object and what it does in each half of the clip, so that generated videos can be checked
against their captions, word by word. Both share the constants below.

    python shapes.py          # writes a contact sheet of examples: samples/shapes.png

Letters used here: `f` frames, `h w` height and width. Videos are uint8 arrays of shape (f, h, w,
3).
"""

from tools import run_command

import zlib
from collections.abc import Sequence
from itertools import combinations
from dataclasses import dataclass, replace

import numpy as np

from data import FPS, FRAMES, Sample, contact_sheet, write_picture

# ------------------------------------------------------------------------------ MovingShapes

PIXELS = 2  # number of the code that draws the clips: goes up whenever it draws others
BACKGROUND = (18, 20, 28)
COLOURS = {
    "red": (230, 45, 45),
    "green": (40, 195, 80),
    "blue": (60, 110, 250),
    "yellow": (245, 210, 50),
    "purple": (170, 70, 220),
    "white": (245, 245, 245),
}
# Circumscribed radius relative to the object's nominal one: a triangle needs a longer reach than a
# circle to look equally large.
REACH = {"circle": 0.95, "square": 1.2, "triangle": 1.35, "star": 1.4, "ring": 1.05}
RADII = {"small": 6.0, "": 8.0, "big": 10.0}  # pixels, of a 64-pixel frame
MOTIONS = ("left", "right", "up", "down", "grows", "shrinks", "spins", "stays still")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEED = 10.0  # pixels per second
FREE = 0.8  # share of each way, at least, that no wall cuts off: less would read as standing still
GROWTH = 0.3  # change of log radius per second
SPIN = np.pi / 2  # radians per second, clockwise
# Objects begin nearly upright. Captions say nothing of an angle; where any was equally likely, a
# model drew squares as discs, about the mean of all angles, while it had circles all right.
TILT = 0.1  # radians, either way
UPRIGHT = {"square": np.pi / 4}  # angle at which a shape stands upright; 0 has a corner on top
FPS_RANGE = (8.0, 12.0)  # frames per second drawn in training; FPS is the default elsewhere
SIZE = 64

# (regular polygon's corners, inner radius / outer radius) of the folded half-plane below. A ratio
# of cos(pi / n) makes the edge straight: a triangle and a square are stars without notches.
POLYGONS = {
    "triangle": (3, np.cos(np.pi / 3)),
    "square": (4, np.cos(np.pi / 4)),
    "star": (5, 0.45),
}


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Signed distance to a shape of nominal radius 1 at the origin; negative inside.

    x, y: arrays of coordinates; angle: radians, clockwise on the screen (y points down). For
    polygons this is the distance to the nearest edge's line (exact inside, a lower bound beyond a
    corner).
    """
    rho = np.sqrt(x * x + y * y)
    if shape == "circle":
        return rho - REACH["circle"]
    if shape == "ring":
        return np.abs(rho - 0.75 * REACH["ring"]) - 0.25 * REACH["ring"]
    corners, inner = POLYGONS[shape]
    # All edges are images of one under rotation and reflection: fold the angle onto it.
    sector = np.float32(2 * np.pi / corners)
    phi = np.arctan2(x, -y) - angle  # 0 points up, growing clockwise
    phi = np.abs(phi - sector * np.round(phi / sector))
    # The edge runs from the corner (1, 0) to the notch at half a sector; n is its outward normal.
    notch = inner * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    n = np.array([notch[1], 1 - notch[0]]) / np.hypot(notch[1], 1 - notch[0])
    n_x, n_y = np.float32(n)
    return n_x * rho * np.cos(phi) + n_y * rho * np.sin(phi) - n_x * np.float32(REACH[shape])


@dataclass(frozen=True)
class Thing:
    """One object of a scene. x, y, radius in pixels of a 64-pixel frame; angle in radians."""

    colour: str
    shape: str
    size: str  # "small", "" or "big"
    actions: tuple  # one or two of MOTIONS; the second starts at half of the clip
    x: float
    y: float
    angle: float

    def path(self, frames: int, fps: float) -> np.ndarray:
        """x, y, radius, angle of every frame: float32 arrays of shape (frames,).

        Each action lasts for its share of the clip (the whole, or one half), so the clip always
        covers all that the caption says; the rates are per second, so `fps` decides how far the
        object gets. The edge of the picture is a wall: an object stops there, or is pushed back by
        it as it grows, so that whatever is asked next can begin wherever this ends.
        """
        seconds = np.arange(frames) / fps
        share = frames / fps / len(self.actions)
        path = np.empty((4, frames))  # x, y, log radius, angle
        start = np.array([[self.x, self.y, np.log(RADII[self.size]), self.angle]]).T
        for i, action in enumerate(self.actions):
            spent = np.append(seconds - i * share, share)  # in this action; the last is its end
            states = start + np.outer(rates(action), spent)
            reach = np.exp(states[2]) * REACH[self.shape] + 1
            states[:2] = states[:2].clip(reach, SIZE - reach)
            begun = spent[:-1] >= 0
            path[:, begun], start = states[:, :-1][:, begun], states[:, -1:]
        path[2] = np.exp(path[2])
        return path.astype(np.float32)

    def free(self, frames: int, fps: float) -> float:
        """The share of its way that an object gets before a wall stops it, in the action where that
        is least; 1 for what does not move."""
        x, y, _, _ = self.path(frames, fps)
        shares, parts = [1.0], len(self.actions)
        for i, action in enumerate(self.actions):
            first, last = -(-frames * i // parts), min(frames * (i + 1) // parts, frames - 1)
            if action in DIRECTIONS and last > first:
                way = np.array([x[last] - x[first], y[last] - y[first]]) @ DIRECTIONS[action]
                shares.append(way / (SPEED * (last - first) / fps))
        return min(shares)


def rates(action: str) -> np.ndarray:
    """Velocity (x, y, log radius, angle) per second of a motion word, shape (4,)."""
    dx, dy = DIRECTIONS.get(action, (0, 0))
    growth = {"grows": GROWTH, "shrinks": -GROWTH}.get(action, 0)
    return np.array([SPEED * dx, SPEED * dy, growth, SPIN if action == "spins" else 0])


def place_in_frame(
    thing: Thing, rng: np.random.Generator, frames: int, fps: float, middle: bool = False
) -> Thing:
    """The same thing somewhere from where most of its way is free.

    middle: it begins in the middle of the picture, where there is room for whatever comes after the
    clip. Otherwise anywhere, now and then at a wall, as after another action. Raises ValueError
    where the walls are too near.
    """
    reach = RADII[thing.size] * REACH[thing.shape] + 1
    for _ in range(1000):
        place = rng.uniform(0.4, 0.6, 2) if middle else rng.uniform(-0.1, 1.1, 2).clip(0, 1)
        x, y = (float(v) for v in reach + place * (SIZE - 2 * reach))
        placed = replace(thing, x=x, y=y)
        if placed.free(frames, fps) > FREE:
            return placed
    raise ValueError(f"in {frames} frames, {fps:g} a second, things would run into the walls")


def collide(scene: list[Thing], frames: int, fps: float) -> bool:
    """Do two objects of a scene come too close to be told apart?"""
    paths = [(thing.path(frames, fps), REACH[thing.shape]) for thing in scene]
    return any(
        (np.hypot(x0 - x1, y0 - y1) < r0 * reach0 + r1 * reach1 + 2).any()
        for ((x0, y0, r0, _), reach0), ((x1, y1, r1, _), reach1) in combinations(paths, 2)
    )


def held_out(colour: str, shape: str, actions: tuple) -> bool:
    """The fixed rule that keeps a tenth of the (colour, shape, actions) combinations from
    training."""
    return zlib.crc32(f"{colour} {shape} {', '.join(actions)}".encode()) % 10 == 0


def render(
    things: list[Thing], frames: int = FRAMES, fps: float = FPS, size: int = SIZE,
    where: slice | np.ndarray = slice(None),
) -> np.ndarray:
    """Draw a scene: uint8 (f, size, size, 3), anti-aliased; later objects lie over earlier ones.

    where: the indices of the frames to draw, all by default."""
    scale = np.float32(SIZE / size)
    video = np.empty((len(np.arange(frames)[where]), size, size, 3), np.uint8)
    video[:] = BACKGROUND
    for thing in things:
        x, y, radius, angle = thing.path(frames, fps)[:, where]
        # Only the square that the object can touch is drawn: most of a frame is background.
        reach = (radius * REACH[thing.shape]).max() + 2
        low_x, high_x = int((x.min() - reach) / scale), int((x.max() + reach) / scale) + 1
        low_y, high_y = int((y.min() - reach) / scale), int((y.max() + reach) / scale) + 1
        columns = slice(max(low_x, 0), min(high_x, size))
        rows = slice(max(low_y, 0), min(high_y, size))
        grid = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale
        radius = radius[:, None, None]
        u = (grid[None, None, columns] - x[:, None, None]) / radius
        v = (grid[None, rows, None] - y[:, None, None]) / radius
        distance = shape_distance(thing.shape, u, v, angle[:, None, None]) * (radius / scale)
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]  # of a pixel: one pixel wide edges
        region = video[:, rows, columns]
        colour = np.array(COLOURS[thing.colour], np.float32)
        region[:] = region + coverage * (colour - region) + np.float32(0.5)
    return video


# What people call things, and how they say what these do; the first wording is the canonical one.
NAMES = {"circle": ("circle", "ball", "disc"), "square": ("square", "box")}
WORDINGS = {
    "left": (
        "moves left", "goes left", "moves to the left", "slides to the left", "is moving left",
        "moving left", "left",
    ),
    "right": (
        "moves right", "goes right", "moves to the right", "slides to the right", "is moving right",
        "moving right", "right",
    ),
    "up": ("moves up", "goes up", "rises", "slides upwards", "is moving up", "moving up", "up"),
    "down": (
        "moves down", "goes down", "sinks", "falls", "slides downwards", "is moving down",
        "moving down", "down",
    ),
    "grows": ("grows", "gets bigger", "becomes larger", "is growing", "growing"),
    "shrinks": ("shrinks", "gets smaller", "becomes smaller", "is shrinking", "shrinking"),
    "spins": ("spins", "rotates", "turns around", "spins around", "is spinning", "rotating"),
    "stays still": ("stays still", "does not move", "stands still", "stays where it is"),
}
THEN = (", then ", " and then ", " then ", ", and then ")
WHILE = (" while ", " and ", ", ", " as ")


def describe(things: list[Thing], rng: np.random.Generator | None = None) -> str:
    """The caption of a scene: the canonical one, or in half of the cases, if `rng` is given, one as
    people might type it."""
    varied = rng is not None and rng.random() < 0.5

    def choose(options):
        return str(rng.choice(options)) if varied else options[0]

    article, then, clauses = choose(("a", "the", "")), choose(THEN), []
    for thing in things:
        adjectives = [choose(("big", "large")) if thing.size == "big" else thing.size, thing.colour]
        if varied and rng.random() < 0.25:
            adjectives.reverse()  # "a blue small star"
        name = choose(NAMES.get(thing.shape, (thing.shape,)))
        actions = [choose(WORDINGS[action]) for action in thing.actions]
        verb = actions[0].split()[0] + " "
        if verb in ("moves ", "goes "):  # "moves right, then up"
            actions[1:] = [action.removeprefix(verb) for action in actions[1:]]
        clauses.append(" ".join(filter(None, [article, *adjectives, name, then.join(actions)])))
    return choose(WHILE).join(clauses) + choose(("", "", "."))


class MovingShapes:
    """Procedural captioned clips; `dataset[i]` is a `Sample`, a pure function of (seed, i).

    split "train" leaves out the combinations of `held_out`; "heldout" has nothing but these, always
    a single object. `objects` fixes the number of objects (1 or 2; None draws it). `fps` fixes the
    frame rate (None draws it from FPS_RANGE, for more frames from a higher one). Raises ValueError
    for unknown or contradictory settings.
    """

    two_objects = 0.5  # share of scenes with two objects
    two_actions = 0.65  # share of single-object scenes with two actions in order
    from_middle = 0.8  # share of single objects that begin in the middle of the picture
    crowd = 4  # clips whose objects share a frame when single frames are learnt, at most
    skipped = {}  # as in `VideoFolder`: nothing here can be unreadable
    form = "a [small|big] COLOUR SHAPE MOTION[, then MOTION]; two objects with `while`"

    def __init__(
        self, length: int = 10_000, split: str = "train", seed: int = 0, frames: int = FRAMES,
        size: int = SIZE, fps: float | None = None, objects: int | None = None,
    ):
        if split not in ("train", "heldout"):
            raise ValueError(f"unknown split {split!r}: choose train or heldout")
        if split == "heldout" and objects == 2:
            raise ValueError("the held-out split has single objects only")
        self.length, self.split, self.seed = length, split, seed
        self.frames, self.size, self.fps = frames, size, fps
        self.objects = 1 if split == "heldout" else objects

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        caption, fps, scene = self.describe(index)
        return Sample(caption, render(scene, self.frames, fps, self.size), fps, scene)

    def caption(self, index: int) -> str:
        """The caption of a sample."""
        return self.describe(index)[0]

    def captions(self, index: int) -> list[str]:
        """All captions of a sample, as in `VideoFolder`: one."""
        return [self.caption(index)]

    def random_frames(self, index: int, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` different frames of a clip: uint8 (count, h, w, 3).

        In training the objects of some other clips are drawn over them, because background, most of
        a frame, is soon learnt."""
        _, fps, scene = self.describe(index)
        if self.split == "train":
            others = rng.integers(self.length, size=rng.integers(self.crowd))
            scene = scene + [thing for i in others for thing in self.describe(i)[2]]
        where = rng.choice(self.frames, count, replace=False)
        return render(scene, self.frames, fps, self.size, where)

    def identity(self) -> str:
        """All that the pictures depend on, as text."""
        return repr((PIXELS, COLOURS, REACH, POLYGONS, sorted(vars(self).items())))

    def describe(self, index: int) -> tuple[str, float, list[Thing]]:
        """Caption, frame rate and scene of a sample without drawing it."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, index, self.split == "heldout"))
        # More frames of the same action: in a longer one, things would run into the walls.
        fps = self.fps or rng.uniform(*FPS_RANGE) * max(1, self.frames / FRAMES)
        count = self.objects or 1 + int(rng.random() < self.two_objects)
        while True:
            colours = rng.permutation(list(COLOURS))  # distinct, so that words tell objects apart
            scene = [self._thing(rng, str(colours[i]), count, fps) for i in range(count)]
            caption = describe(scene, rng)
            if caption not in UNSEEN and not collide(scene, self.frames, fps):
                return caption, fps, scene

    def _thing(self, rng, colour, count, fps):
        while True:
            shape = str(rng.choice(list(REACH)))
            steps = 1 + (count == 1 and rng.random() < self.two_actions)
            actions = tuple(str(a) for a in rng.permutation(MOTIONS)[:steps])
            if "spins" in actions and shape not in POLYGONS:
                continue  # nobody could see a circle spin
            if held_out(colour, shape, actions) == (self.split == "heldout"):
                break
        size = str(rng.choice(["small", "", "", "big"] if count == 1 else ["small", "small", ""]))
        angle = UPRIGHT.get(shape, 0.0) + rng.uniform(-TILT, TILT)
        thing = Thing(colour, shape, size, actions, 0.0, 0.0, angle)
        middle = count == 1 and rng.random() < self.from_middle
        return place_in_frame(thing, rng, self.frames, fps, middle)


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
    """What the oracle sees of one object; same words as `Thing`.

    actions: one or two of MOTIONS, in order. None stands for a half of the clip in which the object
    is missing from too many frames to say what it does.
    """

    colour: str
    shape: str
    actions: tuple


def read_things(video: np.ndarray, fps: float) -> list[Reading]:
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


def actions_shown(video: np.ndarray, fps: float = FPS) -> tuple:
    """The actions of the largest object in a clip, in order; none where there is no object."""
    things = read_things(video, fps)
    return things[0].actions if things else ()


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


def caption_accuracy(
    scenes: Sequence[list[Thing]], videos: Sequence[np.ndarray], fps: float | Sequence[float]
) -> dict:
    """Share of clips that show what their captions say.

    scenes: a list of `Thing`s for each clip; videos: uint8 arrays (f, h, w, 3); fps: one number for
    all clips, or one for each. Returns fractions of clips in which every object is right: "colour",
    "shape", "motion" (the set of actions), "order" (the actions in order) and "all" (everything,
    and no object too many); and "n", the number of clips. Two objects are told apart by colour, a
    single one is the largest seen; a missing one makes its clip wrong in everything. Raises
    ValueError where scenes and videos differ in number.
    """
    scenes, names = list(scenes), ("colour", "shape", "motion", "order", "all")
    rights = []
    for scene, video, rate in zip(scenes, videos, np.broadcast_to(fps, len(scenes)), strict=True):
        readings = read_things(video, rate)
        by_colour = {reading.colour: reading for reading in readings}
        right = np.ones(len(names), bool)
        for thing in scene:
            single = len(scene) == 1 and readings
            reading = readings[0] if single else by_colour.get(thing.colour)
            right &= reading is not None and np.array([
                thing.colour == reading.colour, thing.shape == reading.shape,
                set(thing.actions) == set(reading.actions), thing.actions == reading.actions, True])
        right[-1] = right.all() and len(readings) == len(scene)
        rights.append(right)
    means = np.mean(rights, axis=0) if rights else np.zeros(len(names))
    return {name: float(mean) for name, mean in zip(names, means)} | {"n": len(rights)}


# ------------------------------------------------------------------------------ paraphrases

# Captions as people type them, and what should be seen: "colour shape: actions", one for each
# object. `MovingShapes` never shows them: a model has to read them, not to recognise them.
PARAPHRASES = {
    "red circle right": "red circle: right",
    "Red circle moves right.": "red circle: right",
    "Blue star spins": "blue star: spins",
    "Blue ring moves left": "blue ring: left",
    "the green square rises": "green square: up",
    "yellow triangle, moving down": "yellow triangle: down",
    "A purple ball goes up": "purple circle: up",
    "white box grows": "white square: grows",
    "The white ring shrinks.": "white ring: shrinks",
    "a red star, rotating": "red star: spins",
    "green ball rises": "green circle: up",
    "a blue box is moving left": "blue square: left",
    "the yellow star gets smaller": "yellow star: shrinks",
    "purple triangle rotating": "purple triangle: spins",
    "A white disc falls.": "white circle: down",
    "red box, turns around": "red square: spins",
    "Green triangle gets bigger": "green triangle: grows",
    "blue ball stands still": "blue circle: stays still",
    "the yellow ring slides to the right": "yellow ring: right",
    "purple square sinks": "purple square: down",
    "white star moving up.": "white star: up",
    "the red ring does not move": "red ring: stays still",
    "Green star goes left": "green star: left",
    "a blue triangle falls": "blue triangle: down",
    "yellow disc becomes larger": "yellow circle: grows",
    "The purple ring is growing": "purple ring: grows",
    "white triangle moves to the right": "white triangle: right",
    "RED SQUARE MOVES UP": "red square: up",
    "green ring is shrinking.": "green ring: shrinks",
    "the blue square spins around": "blue square: spins",
    "yellow ball left": "yellow circle: left",
    "A purple star sinks.": "purple star: down",
    "white square stays where it is": "white square: stays still",
    "the red triangle is spinning": "red triangle: spins",
    "green disc moving right": "green circle: right",
    "a blue star becomes smaller": "blue star: shrinks",
    "Yellow box goes down": "yellow square: down",
    "purple ball gets smaller": "purple circle: shrinks",
    "white ring up": "white ring: up",
    "a red disc, growing": "red circle: grows",
    "small red ball moves left": "red circle: left",
    "the big blue square rises.": "blue square: up",
    "a green small star spins": "green star: spins",
    "Large yellow triangle moves down": "yellow triangle: down",
    "a purple big ring goes to the right": "purple ring: right",
    "small white box rotates": "white square: spins",
    "the small red star falls": "red star: down",
    "big green ball shrinks": "green circle: shrinks",
    "A blue large triangle rotates.": "blue triangle: spins",
    "yellow small ring slides to the left": "yellow ring: left",
    "the large purple box grows": "purple square: grows",
    "big white star stands still": "white star: stays still",
    "Small red square gets bigger.": "red square: grows",
    "a green large disc goes left": "green circle: left",
    "the blue small ring sinks": "blue ring: down",
    "small yellow star moving right": "yellow star: right",
    "big purple triangle up": "purple triangle: up",
    "the white large ball rises": "white circle: up",
    "a small red ring is moving up": "red ring: up",
    "Big green box slides to the right": "green square: right",
    "red circle right, then up": "red circle: right, up",
    "The red ball moves right and then up.": "red circle: right, up",
    "blue star grows and then spins": "blue star: grows, spins",
    "a yellow triangle rotates, then sinks": "yellow triangle: spins, down",
    "green box goes left, then down": "green square: left, down",
    "The purple ring rises and then shrinks": "purple ring: up, shrinks",
    "white star gets smaller and then rotates.": "white star: shrinks, spins",
    "red square falls then stands still": "red square: down, stays still",
    "a blue disc goes up then goes down": "blue circle: up, down",
    "Yellow ring left then right": "yellow ring: left, right",
    "the green star spins, and then moves left": "green star: spins, left",
    "purple triangle gets bigger, then rises": "purple triangle: grows, up",
    "white ball sinks, then is growing": "white circle: down, grows",
    "red star stays still and then spins": "red star: stays still, spins",
    "a small blue box down and then right": "blue square: down, right",
    "The big yellow disc shrinks, then falls.": "yellow circle: shrinks, down",
    "green triangle turns around, then grows": "green triangle: spins, grows",
    "purple box moving up, then moving left": "purple square: up, left",
    "white ring does not move, then rises": "white ring: stays still, up",
    "Red triangle goes right and then rotates": "red triangle: right, spins",
    "the blue ring becomes larger, then moves down": "blue ring: grows, down",
    "yellow square spins and then gets smaller": "yellow square: spins, shrinks",
    "a green ball moves to the left, then rises.": "green circle: left, up",
    "purple star moves down, then stands still": "purple star: down, stays still",
    "white triangle rises, then goes to the right": "white triangle: up, right",
    "red ball left, blue box right": "red circle: left; blue square: right",
    "A green square rises and a white ring falls.": "green square: up; white ring: down",
    "the yellow star spins while the purple ball grows": "yellow star: spins; purple circle: grows",
    "white triangle down, red ring up": "white triangle: down; red ring: up",
    "blue disc stands still and green star rotates": "blue circle: stays still; green star: spins",
    "a purple box shrinks as a yellow ring rises": "purple square: shrinks; yellow ring: up",
    "Red star left and white ball left": "red star: left; white circle: left",
    "the blue triangle sinks while the red square grows": "blue triangle: down; red square: grows",
    "green ring moving right while yellow box spins": "green ring: right; yellow square: spins",
    "a small white star falls, a small purple disc rises": "white star: down; purple circle: up",
    "Yellow ball moves up, green triangle moves down": "yellow circle: up; green triangle: down",
    "the red box gets smaller, the blue star gets bigger": "red square: shrinks; blue star: grows",
    "purple ring goes left, white box stays still": "purple ring: left; white square: stays still",
    "a blue ball rises while a red triangle rotates": "blue circle: up; red triangle: spins",
    "green disc is growing, yellow star is moving left.": "green circle: grows; yellow star: left",
}
UNSEEN = {prompt.lower() for prompt in PARAPHRASES}


def asked(meaning: str) -> list[Thing]:
    """The scene that a line of PARAPHRASES asks for, to be compared with `caption_accuracy`."""
    scene = []
    for part in meaning.split("; "):
        name, actions = part.split(": ")
        scene.append(Thing(*name.split(), "", tuple(actions.split(", ")), 32.0, 32.0, 0.0))
    return scene


def main() -> None:
    """The command: draws examples."""
    dataset = MovingShapes(length=8)
    for sample in dataset:
        print(f"{sample.fps:5.1f} fps  {sample.caption}")
    rows = [contact_sheet(sample.video, columns=FRAMES) for sample in dataset]
    write_picture("samples/shapes.png", np.concatenate(rows))
    print("samples/shapes.png")


if __name__ == "__main__":
    run_command(main)
