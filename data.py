"""Captioned videos: the built-in `MovingShapes`, and reading / writing of video files.

`MovingShapes` draws clips such as "a red circle moves right, then up". Every sample is a pure
function of (seed, index), so nothing is stored on disk and two people train on the same data.

    python data.py            # writes a contact sheet of examples: samples/shapes.png

Letters used here: `f` frames, `h w` height and width. Videos at this edge of the program are uint8
arrays of shape (f, h, w, 3); `to_model` and `to_uint8` convert to and from float (b, c, f, h, w) in
[-1, 1], which is what every network sees. No other range exists in the project.
"""

import contextlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image

# ------------------------------------------------------------------------------ value ranges


def to_model(video):
    """uint8 (b, f, h, w, 3) array or tensor -> float32 tensor (b, c, f, h, w) in [-1, 1]."""
    video = torch.as_tensor(video)
    return rearrange(video, "b f h w c -> b c f h w").float() / 127.5 - 1


def to_uint8(video):
    """Float tensor (b, c, f, h, w), clipped to [-1, 1] -> uint8 array (b, f, h, w, 3)."""
    video = (video.float().clamp(-1, 1) + 1) * 127.5
    return rearrange(video, "b c f h w -> b f h w c").round().to(torch.uint8).cpu().numpy()


# ------------------------------------------------------------------------------ MovingShapes

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
SPEED = 16.0  # pixels per second
GROWTH = 0.3  # change of log radius per second
SPIN = np.pi / 2  # radians per second, clockwise
FPS_RANGE = (8.0, 12.0)  # frames per second drawn in training; 8 is the default elsewhere
FPS = 8.0
FRAMES, SIZE = 16, 64

# (regular polygon's corners, inner radius / outer radius) of the folded half-plane below. A ratio
# of cos(pi / n) makes the edge straight: a triangle and a square are stars without notches.
POLYGONS = {
    "triangle": (3, np.cos(np.pi / 3)),
    "square": (4, np.cos(np.pi / 4)),
    "star": (5, 0.45),
}


def shape_distance(shape, x, y, angle):
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

    def path(self, frames, fps):
        """x, y, radius, angle of every frame: float32 arrays of shape (frames,).

        Each action lasts for its share of the clip (the whole, or one half), so the clip always
        covers all that the caption says; the rates are per second, so `fps` decides how far the
        object gets.
        """
        time = np.arange(frames) / fps
        share = frames / fps / len(self.actions)
        state = np.zeros((4, frames))  # x, y, log radius, angle
        for i, action in enumerate(self.actions):
            spent = np.clip(time - i * share, 0, share)  # seconds spent in this action so far
            state += np.outer(rates(action), spent)
        start = [self.x, self.y, np.log(RADII[self.size]), self.angle]
        state += np.array(start)[:, None]
        state[2] = np.exp(state[2])
        return state.astype(np.float32)


def rates(action):
    """Velocity (x, y, log radius, angle) per second of a motion word, shape (4,)."""
    dx, dy = DIRECTIONS.get(action, (0, 0))
    growth = {"grows": GROWTH, "shrinks": -GROWTH}.get(action, 0)
    return np.array([SPEED * dx, SPEED * dy, growth, SPIN if action == "spins" else 0])


def held_out(colour, shape, actions):
    """The fixed rule that keeps a tenth of the (colour, shape, actions) combinations from
    training."""
    return zlib.crc32(f"{colour} {shape} {', '.join(actions)}".encode()) % 10 == 0


def render(things, frames=FRAMES, fps=FPS, size=SIZE):
    """Draw a scene: uint8 (f, size, size, 3), anti-aliased; later objects lie over earlier ones."""
    scale = np.float32(SIZE / size)
    video = np.empty((frames, size, size, 3), np.uint8)
    video[:] = BACKGROUND
    for thing in things:
        x, y, radius, angle = thing.path(frames, fps)
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


# The first wording of each motion is the canonical one.
WORDINGS = {
    "left": ("moves left", "goes to the left", "slides left"),
    "right": ("moves right", "goes to the right", "slides right"),
    "up": ("moves up", "goes up", "rises"),
    "down": ("moves down", "goes down", "sinks"),
    "grows": ("grows", "gets bigger"),
    "shrinks": ("shrinks", "gets smaller"),
    "spins": ("spins", "turns around"),
    "stays still": ("stays still", "does not move"),
}


def describe(things, rng=None):
    """The caption of a scene; canonical wording, or varied by `rng` in half of the captions."""
    varied = rng is not None and rng.random() < 0.5

    def word(action):
        options = WORDINGS[action]
        return options[rng.integers(len(options))] if varied else options[0]

    clauses = []
    for thing in things:
        size = "large" if varied and thing.size == "big" and rng.random() < 0.5 else thing.size
        first = word(thing.actions[0])
        clause = " ".join(filter(None, ["a", size, thing.colour, thing.shape, first]))
        if len(thing.actions) == 2:
            second = word(thing.actions[1])
            if first.startswith("moves ") and second.startswith("moves "):
                second = second.removeprefix("moves ")  # "moves right, then up"
            clause += f"{' and' if varied and rng.random() < 0.3 else ','} then {second}"
        clauses.append(clause)
    return " while ".join(clauses)


@dataclass(frozen=True)
class Sample:
    """A captioned clip. video: uint8 (f, h, w, 3); fps: frames per second; scene: list of
    `Thing`."""

    caption: str
    video: np.ndarray
    fps: float
    scene: list


class MovingShapes:
    """Procedural captioned clips; `dataset[i]` is a `Sample`, a pure function of (seed, i).

    split "train" leaves out the combinations of `held_out`; "heldout" has nothing but these, always
    a single object. `objects` fixes the number of objects (1 or 2; None draws it). `fps` fixes the
    frame rate (None draws it from FPS_RANGE). Raises ValueError for unknown or contradictory
    settings.
    """

    two_objects = 0.2  # share of scenes with two objects
    two_actions = 0.65  # share of single-object scenes with two actions in order

    def __init__(
        self, length=10_000, split="train", seed=0, frames=FRAMES, size=SIZE, fps=None, objects=None
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

    def describe(self, index):
        """Caption, frame rate and scene of a sample without drawing it."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, index, self.split == "heldout"))
        fps = self.fps or rng.uniform(*FPS_RANGE)
        count = self.objects or 1 + int(rng.random() < self.two_objects)
        scene = None
        while scene is None:  # a scene whose objects would collide is drawn again
            scene = self._scene(rng, count, fps)
        return describe(scene, rng), fps, scene

    def _scene(self, rng, count, fps):
        colours = rng.permutation(list(COLOURS))  # distinct, so that words tell objects apart
        scene = [self._thing(rng, str(colours[i]), count, fps) for i in range(count)]
        if count == 2:
            (x0, y0, r0, _), (x1, y1, r1, _) = (thing.path(self.frames, fps) for thing in scene)
            reach = r0 * REACH[scene[0].shape] + r1 * REACH[scene[1].shape]
            if (np.hypot(x0 - x1, y0 - y1) < reach + 2).any():
                return None
        return scene

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
        # Where it may start: nothing of it leaves the frame on the way.
        thing = Thing(colour, shape, size, actions, 0.0, 0.0, rng.uniform(0, 2 * np.pi))
        x, y, radius, _ = thing.path(self.frames, fps)
        reach = radius * REACH[shape] + 1
        x = rng.uniform((reach - x).max(), (SIZE - reach - x).min())
        y = rng.uniform((reach - y).max(), (SIZE - reach - y).min())
        return Thing(colour, shape, size, actions, x, y, thing.angle)


# ------------------------------------------------------------------------------ video files

FORMATS = (".gif", ".mp4", ".png")


def write_video(path, video, fps=FPS, upscale=1):
    """Write uint8 (f, h, w, 3) as .gif, .mp4 or .png (a contact sheet of the frames, four in a
    row).

    The file appears whole or not at all. upscale: integer factor, nearest neighbour. Raises
    ValueError for an unknown suffix and OSError where the path cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"cannot write {path.name}: the formats are {', '.join(FORMATS)}")
    video = np.asarray(video).repeat(upscale, axis=1).repeat(upscale, axis=2)
    writer = {".gif": _write_gif, ".mp4": _write_mp4, ".png": _write_sheet}[path.suffix]
    with atomic_path(path) as temporary:
        writer(temporary, video, fps)


@contextlib.contextmanager
def atomic_path(path):
    """Gives a temporary path beside `path`; renamed onto it on success, deleted on any error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the rename must not overtake the data
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_gif(path, video, fps):
    # GIF counts in hundredths of a second: round the frames' ends, not their durations, so that the
    # clip as a whole keeps its length.
    ends = np.round(np.arange(1, len(video) + 1) * 100 / fps).astype(int)
    durations = np.diff(ends, prepend=0).clip(2) * 10  # viewers slow down anything under 20 ms
    # One palette for the whole clip, or flat areas flicker from frame to frame.
    sheet = Image.fromarray(rearrange(video, "f h w c -> (f h) w c"))
    palette = sheet.quantize(256, method=Image.Quantize.MEDIANCUT)
    frames = [Image.fromarray(f).quantize(palette=palette, dither=0) for f in video]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=durations.tolist(), loop=0
    )


def _write_mp4(path, video, fps):
    import imageio.v3 as iio  # PyAV takes a while to import and most runs write GIFs

    height, width = (n - n % 2 for n in video.shape[1:3])  # yuv420p needs even sides
    rate = round(fps * 1000) / 1000
    iio.imwrite(path, video[:, :height, :width], plugin="pyav", codec="libx264", fps=rate)


def contact_sheet(video, columns=4, border=2):
    """Frames of uint8 (f, h, w, 3) side by side, row by row: uint8 (H, W, 3)."""
    pad = (-len(video)) % columns
    video = np.pad(video, ((0, pad), (border, border), (border, border), (0, 0)), constant_values=0)
    return rearrange(video, "(r q) h w c -> (r h) (q w) c", q=columns)


def _write_sheet(path, video, fps):
    Image.fromarray(contact_sheet(video, columns=min(4, len(video)))).save(path)


if __name__ == "__main__":
    dataset = MovingShapes(length=8)
    for sample in dataset:
        print(f"{sample.fps:5.1f} fps  {sample.caption}")
    rows = [contact_sheet(sample.video, columns=FRAMES) for sample in dataset]
    with atomic_path(Path("samples/shapes.png")) as path:
        Image.fromarray(np.concatenate(rows)).save(path)
    print("samples/shapes.png")
