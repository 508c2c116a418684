"""Captioned videos out of a folder: value ranges, video files, captions, `VideoFolder`.

`VideoFolder` finds videos and their captions in a folder, such as UCF-101, and decodes clips. The
built-in data set is in shapes.py.

Letters used here: `f` frames, `h w` height and width. Videos at this edge of the program are uint8
arrays of shape (f, h, w, 3); `to_model` and `to_uint8` convert to and from float (b, c, f, h, w) in
[-1, 1], which is what every network sees. No other range exists in the project.
"""

import copy
import csv
import json
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps

from tools import UserError, atomic_path

FRAMES = 16  # of a clip
FPS = 8.0  # frames per second, where nothing else is said

# ------------------------------------------------------------------------------ value ranges


def to_model(video):
    """uint8 (b, f, h, w, 3) array or tensor -> float32 tensor (b, c, f, h, w) in [-1, 1]."""
    video = torch.as_tensor(video)
    return rearrange(video, "b f h w c -> b c f h w").float() / 127.5 - 1


def to_uint8(video):
    """Float tensor (b, c, f, h, w), clipped to [-1, 1] -> uint8 array (b, f, h, w, 3)."""
    video = (video.float().clamp(-1, 1) + 1) * 127.5
    return rearrange(video, "b c f h w -> b f h w c").round().to(torch.uint8).cpu().numpy()


@dataclass(frozen=True)
class Sample:
    """A captioned clip. video: uint8 (f, h, w, 3); fps: frames per second; scene: list of `Thing`,
    None for a real video."""

    caption: str
    video: np.ndarray
    fps: float
    scene: list = None


# ------------------------------------------------------------------------------ writing videos

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


def write_picture(path, picture):
    """Write uint8 (h, w, 3) as an image file, whole or not at all. Raises OSError."""
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary)


def contact_sheet(video, columns=4, border=2):
    """Frames of uint8 (f, h, w, 3) side by side, row by row: uint8 (H, W, 3)."""
    pad = (-len(video)) % columns
    video = np.pad(video, ((0, pad), (border, border), (border, border), (0, 0)), constant_values=0)
    return rearrange(video, "(r q) h w c -> (r h) (q w) c", q=columns)


def _write_sheet(path, video, fps):
    Image.fromarray(contact_sheet(video, columns=min(4, len(video)))).save(path)


# ------------------------------------------------------------------------------ reading videos

PIXELS = 1  # number of the code that makes frames of a file: goes up whenever it makes others
VIDEOS = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
FOLDER_FPS = 25.0  # of a folder of frames, which does not say


class VideoError(ValueError):
    """This video cannot be used; the message is the reason."""


class DataError(UserError):
    """This data set cannot be used; the message is one line that says what to do."""


def read_frames(path, pick, size, place=(0.5, 0.5)):
    """Some frames of a video file or of a folder of frames, square: uint8 (f, size, size, 3).

    pick: called with the times of all frames, ascending, in seconds from the first one, float64
    (n,); returns the indices of the wanted frames, (f,), ascending. Only these are converted: their
    short side becomes `size` pixels, and of the long side a part is cut out. place: where it lies,
    as fractions of what is left over at the (top, left); (0.5, 0.5) is the centre. With a size of
    None the frames stay as they are.
    Returns the frames and their times (f,). Raises VideoError unless the file is a whole, readable
    video; what `pick` raises passes through.
    """
    import av  # takes a while to import, and the built-in data does without

    broken = (av.error.FFmpegError, Image.DecompressionBombError, OSError, ValueError, EOFError,
              SyntaxError)
    try:
        read = _read_folder if os.path.isdir(path) else _read_file
        frames, times = read(path, pick, size)
        if size is None:
            return np.stack(frames), times
    except VideoError:
        raise
    except broken as error:
        raise VideoError(_reason(error)) from error
    cut = []
    for frame in frames:
        top, left = (round((n - size) * p) for n, p in zip(frame.shape, place))
        cut.append(frame[top : top + size, left : left + size])
    return np.stack(cut), times


def _reason(error):
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return reason.splitlines()[0][:80]


def short_side(width, height, size):
    """(width, height) scaled so that the shorter one is `size`; unchanged if that is None."""
    if size is None:
        return width, height
    scale = size / min(width, height)
    return max(size, round(width * scale)), max(size, round(height * scale))


def _read_folder(path, pick, size):
    def number_order(name):  # 2 before 10
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    names = [name for name in os.listdir(path) if _suffix(name) in IMAGES and name[0] != "."]
    if not names:
        raise VideoError("a folder without pictures")
    names.sort(key=number_order)
    times, frames = np.arange(len(names)) / FOLDER_FPS, []
    index = pick(times)
    for i in index:
        with Image.open(Path(path, names[i])) as image:
            image = image.convert("RGB")
            frames.append(np.asarray(image.resize(short_side(*image.size, size))))
    return frames, times[index]


def _read_file(path, pick, size):
    import av
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()  # keeps its tables from frame to frame

    def convert(frame):
        width, height = short_side(frame.width, frame.height, size)
        # One step for size and colours, in C. Shrinking widens the kernel, so nothing aliases.
        image = reformatter.reformat(frame, width, height, "rgb24", interpolation="BICUBIC")
        return np.rot90(image.to_ndarray(), frame.rotation // 90)  # phones turn the frame only

    # ffmpeg would take the start of a relative path such as "a:b.mp4" for a protocol.
    with av.open(os.path.abspath(path)) as container:
        if not container.streams.video:
            raise VideoError("there is no video in it")
        stream = container.streams.video[0]
        pts, keys = _timestamps(container, stream)
        times = (pts - pts[0]) * float(stream.time_base)
        index = pick(times)
        frames, frame, position = [], None, pts[0] - 1
        for target in pts[index]:
            key = keys[np.searchsorted(keys, target, side="right") - 1]
            if key > position:  # a key frame lies between: nothing before it needs to be decoded
                container.seek(int(key), stream=stream)
                decoder = container.decode(stream)
            while position < target:
                following = next(decoder, None)
                if following is None:  # some codecs never deliver the last frame or two
                    if frame is None or position < pts[0] + 0.9 * (pts[-1] - pts[0]):
                        raise VideoError("not all of it can be decoded")
                    position = pts[-1]
                elif following.is_corrupt:
                    raise VideoError("a frame in it is damaged")
                else:
                    frame, position = following, _pts(following)
            frames.append(convert(frame))
    return frames, times[index]


def _pts(part):
    """Presentation time of a packet or frame. Old AVI files tell the decoding time alone."""
    return part.dts if part.pts is None else part.pts


def _timestamps(container, stream):
    """When all frames and when the key frames are shown: two ascending int64 arrays in units of
    stream.time_base, taken from the packets without decoding any. Raises VideoError for a file
    that is shorter than its header says."""
    pts, keys, last = [], [], 0
    for packet in container.demux(stream):
        # The last packet is empty; those before the start of an edited MP4 are not to be shown.
        if packet.size and _pts(packet) is not None and not packet.is_discard:
            pts.append(_pts(packet))
            last = packet.duration or 0
            if packet.is_keyframe:
                keys.append(pts[-1])
    if not pts:
        raise VideoError("there are no frames in it")
    # Of a cut AVI file only the number of frames in the header tells the truth, of others the
    # duration. The last frame is shown as long as its packet says, or as the others on average.
    if container.format.name == "avi" and len(pts) < 0.9 * stream.frames:
        raise VideoError(f"truncated: {len(pts)} of {stream.frames} frames")
    pts = np.unique(pts)
    unit = float(stream.time_base)
    length = stream.duration * unit if stream.duration else (container.duration or 0) / 1e6
    end = (pts[-1] - pts[0] + max(last, (pts[-1] - pts[0]) / max(len(pts) - 1, 1))) * unit
    if len(pts) > 1 and end < 0.9 * length:
        raise VideoError(f"truncated: it ends after {end:.1f} of {length:.1f} s")
    return pts, np.unique([pts[0], *keys])


def read_image(path, size):
    """The middle of a picture file: uint8 (size, size, 3). Raises VideoError."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")  # phones turn the label only
    except Exception as error:  # damaged files fail in many ways
        raise VideoError(_reason(error)) from error
    return middle_square(np.asarray(image), size)


def middle_square(picture, size):
    """The middle of a picture, as large as fits: uint8 (h, w, 3) -> (size, size, 3)."""
    # A frame that was enlarged for viewing becomes the very pixels that it was made of.
    whole = min(picture.shape[:2]) % size == 0
    method = Image.Resampling.BOX if whole else Image.Resampling.BICUBIC
    return np.asarray(ImageOps.fit(Image.fromarray(picture), (size, size), method))


def prefetch(function, items, workers=None):
    """Yields function(item) for each item in order, computed ahead by threads.

    Threads are enough for videos: PyAV lets the others run while it decodes. workers: their number,
    the processor's cores by default. What `function` raises is raised here.
    """
    workers = workers or min(os.cpu_count() or 1, 16)
    pool, ahead = ThreadPoolExecutor(workers), deque()
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def read_ahead(dataset, indices, workers=None):
    """Yields (index, `Sample`) for each index in order; the sample is None for a video that cannot
    be used, and `dataset.skipped` says why. Raises DataError where none is left."""

    def read(index):
        try:
            return index, dataset[index]
        except VideoError:
            return index, None

    return prefetch(read, indices, workers)


# ------------------------------------------------------------------------------ captions

CAPTION_FILES = ("captions.csv", "captions.jsonl", "metadata.jsonl")


def find_captions(folder):
    """The videos of a folder and their captions: ([(name, caption), ...], where they come from).

    Names are paths below `folder`, with "/". The first of these that fits:
    1. one of CAPTION_FILES, with the columns or keys `file` (or `file_name`) and `caption` (or
       `text`);
    2. a `.txt` file beside each video, of the same name;
    3. folders, named after what happens in them; those of UCF-101 become whole sentences;
    4. the name of the file itself.
    Links are followed; hidden files are not looked at. Raises DataError where there is no video, or
    a caption is missing.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):  # Path.is_dir raises an error for names that are too long
        raise DataError(f"{folder} is neither a folder of videos nor `shapes`, the built-in clips")
    for name in CAPTION_FILES:
        if (folder / name).is_file():
            return _read_captions(folder, name), name
    videos, texts = _find_videos(folder)
    if not videos:
        raise DataError(f"no videos in {folder}: it takes {', '.join(VIDEOS)} files, or folders of "
                        "frames")
    stems = {video: video[: -len(_suffix(video))] if _suffix(video) in VIDEOS else video
             for video in videos}
    without = [video for video in videos if f"{stems[video]}.txt" not in texts]
    if not without:
        return [(v, _read_text(folder / f"{stems[v]}.txt")) for v in videos], ".txt files"
    if len(without) < len(videos):
        raise DataError(f"{len(without)} of {len(videos)} videos in {folder} have no .txt file with"
                        f" a caption beside them, such as {without[0]}")
    captions = []
    for video in videos:
        *folders, name = stems[video].split("/")
        captions.append(UCF101.get(folders[-1], words(folders[-1])) if folders else words(name))
    return list(zip(videos, captions)), "names of folders and files"


def words(name):
    """A name as words: "ApplyEyeMakeup", "apply_eye-makeup" -> "apply eye makeup"."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return " ".join(re.split(r"[\s_-]+", name)).strip().lower()


def _suffix(name):
    return os.path.splitext(name)[1].lower()


def _find_videos(folder):
    """Names of the videos, sorted, and of the .txt files, a set, in a folder and all below it."""
    videos, texts, seen = [], set(), set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link that leads in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(root).relative_to(folder)
        files = [(below / name).as_posix() for name in files if not name.startswith(".")]
        found = [name for name in files if _suffix(name) in VIDEOS]
        if not found and root != str(folder) and any(_suffix(name) in IMAGES for name in files):
            found = [below.as_posix()]  # pictures and no videos: the folder itself is a video
        videos += found
        texts.update(name for name in files if _suffix(name) == ".txt")
    return sorted(videos), texts


def _read_text(path):
    try:
        text = path.read_text(encoding="utf-8-sig").split()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text") from error
    if not text:
        raise DataError(f"{path} is empty: it must hold the caption of the video beside it")
    return " ".join(text)


def _read_captions(folder, name):
    """[(name, caption), ...] of a .csv or .jsonl file."""
    path, items = folder / name, []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file) if name.endswith(".csv") else file
            for row in rows:
                if not isinstance(row, dict):  # a line of a .jsonl file
                    if not row.strip():
                        continue
                    row = json.loads(row)
                items.append(_read_row(row, f"{path}, clip {len(items) + 1}"))
    except DataError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read after clip {len(items)}: {error}") from error
    if not items:
        raise DataError(f"{path} names no videos")
    missing = [video for video, _ in items if not os.path.exists(folder / video)]
    if missing:
        raise DataError(f"{path}: {len(missing)} of {len(items)} files do not exist, such as "
                        f"{missing[0]}")
    return items


def _read_row(row, where):
    """(name, caption) of one row of a caption file."""
    if not isinstance(row, dict):
        raise DataError(f'{where}: not of the form {{"file": "...", "caption": "..."}}')
    video, caption = row.get("file", row.get("file_name")), row.get("caption", row.get("text"))
    if not (isinstance(video, str) and isinstance(caption, str) and video and caption.strip()):
        keys = ", ".join(str(key) for key in row if key is not None)
        raise DataError(f"{where}: no file and caption; the columns are {keys}, and must be file, "
                        "caption")
    if None in row:
        raise DataError(f"{where}: more columns than names of columns; a caption with a comma "
                        "needs quotation marks around it")
    return video, " ".join(caption.split())


def read_split(folder, split):
    """File names in one of UCF-101's official lists, "train01" to "test03": a set.

    The lists lie in the folder, or in `ucfTrainTestlist` inside or beside it. Raises DataError."""
    if not re.fullmatch(r"(train|test)0[123]", split):
        raise DataError(f"unknown split {split!r}: choose train01 to train03 or test01 to test03")
    name = f"{split[:-2]}list{split[-2:]}.txt"
    lists = "ucfTrainTestlist"
    folder = Path(folder).absolute()
    for place in (folder, folder / lists, folder.parent / lists):
        if (place / name).is_file():
            lines = (place / name).read_text(encoding="utf-8").splitlines()
            return {Path(line.split()[0]).name for line in lines if line.strip()}
    raise DataError(f"no {name} for --split {split}: put it into {folder / lists}")


# ------------------------------------------------------------------------------ VideoFolder


class VideoFolder:
    """Captioned clips of the videos in a folder; `dataset[i]` is a `Sample` of video i.

    Videos and captions: see `find_captions`; split: see `read_split`. A clip has `frames` frames,
    cut to `size` x `size` pixels (None: left as they are), that cover the whole action: they lie
    evenly in time from the first to the last frame of the video, and the sample's `fps` is the rate
    that results.
    clip_seconds: only a window of this length, from a random place; stride: instead, every
    stride-th frame from a random one on. Random means drawn by (seed, i). flip: mirrors half of the
    clips; off, because left and right are words.

    `dataset[i]` raises VideoError where video i is unreadable or too short; its name and the reason
    go into the dict `skipped`. Raises DataError where no video can be used.
    """

    def __init__(
        self, folder, split=None, seed=0, frames=FRAMES, size=64, clip_seconds=None, stride=None,
        flip=False,
    ):
        self.folder, self.skipped = Path(folder), {}
        self.items, self.source = find_captions(folder)
        if split is not None:
            names = read_split(folder, split)
            self.items = [item for item in self.items if Path(item[0]).name in names]
            if not self.items:
                raise DataError(f"--split {split} matches none of the videos in {folder}")
        self.seed, self.frames, self.size = seed, frames, size
        self.clip_seconds, self.stride, self.flip = clip_seconds, stride, flip

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if not 0 <= index < len(self.items):
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, index))
        try:
            video, times = self._read(index, rng, lambda times: self._pick(times, rng))
        except VideoError as error:
            if all(name in self.skipped for name, _ in self.items):
                raise self.unusable() from error
            raise
        return Sample(self.caption(index), video, (self.frames - 1) / (times[-1] - times[0]))

    def unusable(self):
        """The error that says that no video of the data set can be used."""
        name, why = min(self.skipped.items())
        return DataError(f"none of the {len(self.items)} videos in {self.folder} can be used; "
                         f"{name}: {why}")

    def caption(self, index):
        return self.items[index][1]

    def random_frames(self, index, rng, count):
        """`count` different frames of a video, cut out at one random place: uint8 (count, h, w,
        3)."""

        def pick(times):
            self._pick(times, rng)  # the same videos are too short
            return np.sort(rng.choice(len(times), count, replace=False))

        return self._read(index, rng, pick, rng.random(2))[0]

    def identity(self):
        """All that the pictures depend on, as text."""
        files = []
        for name, _ in self.items:
            try:
                stat = os.stat(self.folder / name)
                files.append((name, stat.st_size, stat.st_mtime_ns))
            except OSError:  # a link to nowhere
                files.append((name, None, None))
        settings = (self.seed, self.frames, self.size, self.clip_seconds, self.stride, self.flip)
        return repr((PIXELS, settings, files))

    def divide(self, every=20):
        """Two data sets: without every 20th video, and with nothing else. A single video is in
        both."""
        rest, part = copy.copy(self), copy.copy(self)
        part.items = self.items[::every]
        rest.items = [item for i, item in enumerate(self.items) if i % every] or self.items
        return rest, part

    def _pick(self, times, rng):
        """Which frames make a clip, (frames,), given the times of all."""
        steps = (self.frames - 1) * (self.stride or 1)
        start, end = 0.0, times[-1]
        if self.clip_seconds and self.clip_seconds < end:
            start = rng.uniform(0, end - self.clip_seconds)
            end = start + self.clip_seconds
        count = np.count_nonzero((times >= start) & (times <= end))
        if count <= steps:
            raise VideoError(f"too short: {count} frames, and a clip needs {steps + 1}")
        if self.stride:
            return rng.integers(len(times) - steps) + self.stride * np.arange(self.frames)
        # The frame that is on show at that moment; times are not exact to the last digit.
        moments = np.linspace(start, end, self.frames) + 1e-6
        return np.searchsorted(times, moments, side="right") - 1

    def _read(self, index, rng, pick, place=(0.5, 0.5)):
        name = self.items[index][0]
        try:
            video, times = read_frames(self.folder / name, pick, self.size, place)
        except VideoError as error:
            self.skipped[name] = str(error)
            raise
        if self.flip and rng.random() < 0.5:
            video = np.ascontiguousarray(video[:, :, ::-1])
        return video, times


# ---------------------------------------------------------------------- the classes of UCF-101

# Each class of UCF-101 (Soomro 2012) as a sentence.
UCF101 = {
    "ApplyEyeMakeup": "a person applies eye makeup",
    "ApplyLipstick": "a person applies lipstick",
    "Archery": "a person shoots an arrow with a bow",
    "BabyCrawling": "a baby crawls on the floor",
    "BalanceBeam": "a gymnast performs on a balance beam",
    "BandMarching": "a marching band walks down the street",
    "BaseballPitch": "a pitcher throws a baseball",
    "Basketball": "a person throws a basketball at the basket",
    "BasketballDunk": "a player dunks a basketball",
    "BenchPress": "a person lifts a barbell on a bench",
    "Biking": "a person rides a bicycle",
    "Billiards": "a person plays billiards",
    "BlowDryHair": "a person dries hair with a hair dryer",
    "BlowingCandles": "a person blows out candles",
    "BodyWeightSquats": "a person does squats",
    "Bowling": "a person rolls a bowling ball",
    "BoxingPunchingBag": "a person boxes a punching bag",
    "BoxingSpeedBag": "a person boxes a speed bag",
    "BreastStroke": "a person swims breaststroke",
    "BrushingTeeth": "a person brushes their teeth",
    "CleanAndJerk": "a weightlifter lifts a barbell over the head",
    "CliffDiving": "a person dives from a cliff",
    "CricketBowling": "a player bowls a cricket ball",
    "CricketShot": "a player hits a cricket ball with a bat",
    "CuttingInKitchen": "a person cuts food in the kitchen",
    "Diving": "a person dives into a pool",
    "Drumming": "a person plays the drums",
    "Fencing": "two people fence",
    "FieldHockeyPenalty": "a player shoots a field hockey penalty",
    "FloorGymnastics": "a gymnast tumbles across the floor",
    "FrisbeeCatch": "a person catches a frisbee",
    "FrontCrawl": "a person swims front crawl",
    "GolfSwing": "a person swings a golf club",
    "Haircut": "a person gets a haircut",
    "Hammering": "a person hammers a nail",
    "HammerThrow": "an athlete throws the hammer",
    "HandstandPushups": "a person does push-ups in a handstand",
    "HandstandWalking": "a person walks on their hands",
    "HeadMassage": "a person gives a head massage",
    "HighJump": "an athlete jumps over a high bar",
    "HorseRace": "horses race along a track",
    "HorseRiding": "a person rides a horse",
    "HulaHoop": "a person spins a hula hoop",
    "IceDancing": "a couple dances on ice",
    "JavelinThrow": "an athlete throws a javelin",
    "JugglingBalls": "a person juggles balls",
    "JumpingJack": "a person does jumping jacks",
    "JumpRope": "a person jumps rope",
    "Kayaking": "a person paddles a kayak",
    "Knitting": "a person knits",
    "LongJump": "an athlete does a long jump",
    "Lunges": "a person does lunges",
    "MilitaryParade": "soldiers march in a parade",
    "Mixing": "a person mixes batter in a bowl",
    "MoppingFloor": "a person mops the floor",
    "Nunchucks": "a person swings nunchucks",
    "ParallelBars": "a gymnast swings on the parallel bars",
    "PizzaTossing": "a person tosses pizza dough",
    "PlayingCello": "a person plays the cello",
    "PlayingDaf": "a person plays the daf",
    "PlayingDhol": "a person plays the dhol",
    "PlayingFlute": "a person plays the flute",
    "PlayingGuitar": "a person plays the guitar",
    "PlayingPiano": "a person plays the piano",
    "PlayingSitar": "a person plays the sitar",
    "PlayingTabla": "a person plays the tabla",
    "PlayingViolin": "a person plays the violin",
    "PoleVault": "an athlete does a pole vault",
    "PommelHorse": "a gymnast swings on the pommel horse",
    "PullUps": "a person does pull-ups",
    "Punch": "a boxer punches another boxer",
    "PushUps": "a person does push-ups",
    "Rafting": "people raft down a wild river",
    "RockClimbingIndoor": "a person climbs an indoor wall",
    "RopeClimbing": "a person climbs a rope",
    "Rowing": "people row a boat",
    "SalsaSpin": "a couple dances salsa and spins",
    "ShavingBeard": "a person shaves their beard",
    "Shotput": "an athlete puts the shot",
    "SkateBoarding": "a person rides a skateboard",
    "Skiing": "a person skis down a slope",
    "Skijet": "a person rides a jet ski",
    "SkyDiving": "people fall through the sky",
    "SoccerJuggling": "a person juggles a soccer ball with the feet",
    "SoccerPenalty": "a player shoots a soccer penalty",
    "StillRings": "a gymnast performs on the still rings",
    "SumoWrestling": "two sumo wrestlers fight",
    "Surfing": "a person surfs on a wave",
    "Swing": "a child sits on a swing",
    "TableTennisShot": "a person plays table tennis",
    "TaiChi": "a person does tai chi",
    "TennisSwing": "a person swings a tennis racket",
    "ThrowDiscus": "an athlete throws the discus",
    "TrampolineJumping": "people jump on a trampoline",
    "Typing": "a person types on a keyboard",
    "UnevenBars": "a gymnast swings on the uneven bars",
    "VolleyballSpiking": "a player spikes a volleyball",
    "WalkingWithDog": "a person walks a dog",
    "WallPushups": "a person does push-ups against a wall",
    "WritingOnBoard": "a person writes on a board",
    "YoYo": "a person plays with a yo-yo",
}
