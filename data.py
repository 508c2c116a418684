"""Captioned videos out of a folder: value ranges, video files, captions, `VideoFolder`.

`VideoFolder` finds videos and their captions in a folder, such as UCF-101, and decodes clips. The
built-in data set is in shapes.py.

Letters used here: `f` frames, `h w` height and width. Videos at this edge of the program are uint8
arrays of shape (f, h, w, 3); `to_model` and `to_uint8` convert to and from float (b, c, f, h, w) in
[-1, 1], which is what every network sees. No other range exists in the project.
"""

import contextlib
import copy
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import threading
import unicodedata
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from torch import Tensor

from tools import UserError, atomic_path, check_file, reason

FRAMES = 16  # of a clip
FPS = 8.0  # frames per second, where nothing else is said

# ------------------------------------------------------------------------------ value ranges


def to_model(video: np.ndarray | Tensor) -> Tensor:
    """uint8 (b, f, h, w, 3) array or tensor -> float32 tensor (b, c, f, h, w) in [-1, 1]."""
    video = torch.as_tensor(video)
    return rearrange(video, "b f h w c -> b c f h w").float() / 127.5 - 1


def to_uint8(video: Tensor) -> np.ndarray:
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


def sides(size: int | tuple) -> tuple[int, int]:
    """(width, height) of frames whose size is that, or the side of a square."""
    return (size, size) if isinstance(size, int) else tuple(size)


# ------------------------------------------------------------------------------ writing videos

FORMATS = (".gif", ".mp4", ".png")


def write_video(path: Path, video: np.ndarray, fps: float = FPS, upscale: int = 1) -> None:
    """Write uint8 (f, h, w, 3) as .gif, .mp4 or .png (a contact sheet of the frames, four in a
    row).

    The file appears whole or not at all. upscale: integer factor, nearest neighbour. Raises
    ValueError for an unknown suffix and OSError where the path cannot be written.
    """
    writers = {".gif": _write_gif, ".mp4": _write_mp4, ".png": _write_sheet}
    suffix = _suffix(path)
    if suffix not in FORMATS:
        raise ValueError(f"cannot write {path}: the formats are {', '.join(FORMATS)}")
    with atomic_path(path) as temporary:
        writers[suffix](temporary, np.asarray(video), fps, upscale)


def _enlarged(video, upscale):
    """Frame by frame: the enlarged clip as a whole may not fit into memory."""
    for frame in video:
        yield frame.repeat(upscale, axis=0).repeat(upscale, axis=1)


def _write_gif(path, video, fps, upscale):
    # GIF counts in hundredths of a second: round the frames' ends, not their durations, so that the
    # clip as a whole keeps its length.
    ends = np.round(np.arange(1, len(video) + 1) * 100 / fps).astype(int)
    durations = np.diff(ends, prepend=0).clip(2) * 10  # viewers slow down anything under 20 ms
    # One palette for the whole clip, or flat areas flicker from frame to frame.
    sheet = Image.fromarray(rearrange(video, "f h w c -> (f h) w c"))
    palette = sheet.quantize(256, method=Image.Quantize.MEDIANCUT)
    frames = (Image.fromarray(frame).quantize(palette=palette, dither=0)
              for frame in _enlarged(video, upscale))
    next(frames).save(
        path, "GIF", save_all=True, append_images=frames, duration=durations.tolist(), loop=0
    )


def _write_mp4(path, video, fps, upscale):
    import av  # takes a while to import, and most runs write GIFs

    height, width = (n * upscale - n * upscale % 2 for n in video.shape[1:3])  # as yuv420p needs
    try:
        # libav writes the file itself: through a Python file it would swallow a Ctrl-C.
        with av.open(os.path.abspath(path), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(round(fps * 1000), 1000))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": "18"}
            codec = stream.codec_context
            codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709
            codec.color_range = 1  # 16 to 235
            for frame in _enlarged(video, upscale):
                frame = np.ascontiguousarray(frame[:height, :width])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame).reformat(
                    format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
                )))
            container.mux(stream.encode())
    except av.error.FFmpegError as error:
        why = error.strerror if isinstance(error, OSError) else "is the disk full?"
        raise OSError(error.errno, why) from error


def _write_sheet(path, video, fps, upscale):
    sheet = contact_sheet(np.stack([*_enlarged(video, upscale)]), columns=min(4, len(video)))
    Image.fromarray(sheet).save(path, "PNG")


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write uint8 (h, w, 3) as an image file, whole or not at all. Raises OSError."""
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary)


def contact_sheet(video: np.ndarray, columns: int = 4, border: int = 2) -> np.ndarray:
    """Frames of uint8 (f, h, w, 3) side by side, row by row: uint8 (H, W, 3)."""
    pad = (-len(video)) % columns
    video = np.pad(video, ((0, pad), (border, border), (border, border), (0, 0)), constant_values=0)
    return rearrange(video, "(r q) h w c -> (r h) (q w) c", q=columns)


def chart(curves: dict, x_label: str, y_label: str) -> np.ndarray:
    """Lines through points (x, y), x above 0 on a logarithmic scale and y from 0 up, as a picture:
    uint8 (340, 560, 3). curves: {name: points}, at most three."""
    picture, font = Image.new("RGB", (560, 340), "white"), ImageFont.load_default(size=14)
    draw, left, right, top, bottom = ImageDraw.Draw(picture), 60, 470, 36, 290
    xs, ys = zip(*itertools.chain(*curves.values()))
    first, high, names = min(xs), max(ys) or 1, []
    ratio = math.log(max(xs) / first) or 1

    def place(x, y):
        share = math.log(x / first) / ratio
        return left + share * (right - left), bottom - y / high * (bottom - top)

    for y in (0, high / 4, high / 2, high * 3 / 4, high):
        draw.line([place(first, y), (right, place(first, y)[1])], (220, 220, 220))
        draw.text((left - 8, place(first, y)[1]), f"{y:.2g}", "black", font, anchor="rm")
    wanted = np.geomspace(first, max(xs), 5)
    for x in {min(xs, key=lambda x: abs(math.log(x / near))) for near in wanted}:
        draw.text((place(x, 0)[0], bottom + 8), str(x), "black", font, anchor="mt")
    draw.text(((left + right) / 2, bottom + 42), x_label, "black", font, anchor="mb")
    draw.text((left, 8), y_label, "black", font, anchor="lt")
    colours = (230, 75, 60), (70, 140, 240), (60, 180, 90)
    for (name, points), colour in zip(curves.items(), colours):
        points = [place(*point) for point in points]
        draw.line(points, colour, 3)
        for x, y in points if len(points) < 20 else ():
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], colour)
        names.append((points[-1][1], name, colour))  # at the ends of the lines
    lowest = -math.inf
    for y, name, colour in sorted(names):
        lowest = max(lowest + 16, y)  # none on top of another
        draw.text((right + 10, lowest), name, colour, font, anchor="lm")
    return np.asarray(picture)


# ------------------------------------------------------------------------------ reading videos

PIXELS = 2  # number of the code that makes frames of a file: goes up whenever it makes others
VIDEOS = tuple(
    ".3g2 .3gp .asf .avi .divx .dv .f4v .flv .gif .m2ts .m2v .m4v .mkv .mov .mp4 .mpe .mpeg .mpg "
    ".mts .mxf .ogv .qt .ts .vob .webm .wmv .y4m".split()
)
IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# What may be inside, whatever the name says: neither PostScript, which Pillow would run, nor lists
# of other files.
PICTURE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 2**27  # of a picture; of a frame of a video a quarter, which is 8K
FFMPEG = {"max_pixels": str(MAX_PIXELS // 4), "protocol_whitelist": "file", "format_whitelist":
          "asf,avi,dv,flv,gif,h264,hevc,m4v,matroska,mov,mpeg,mpegts,mpegvideo,mxf,ogg,"
          "yuv4mpegpipe"}  # fmt: skip
FOLDER_FPS = 25.0  # of a folder of frames, which does not say
warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged files: one error says enough


class VideoError(ValueError):
    """This video cannot be used; the message is the reason."""


class DataError(UserError):
    """This data set cannot be used; the message is one line that says what to do."""


@contextlib.contextmanager
def _reading():
    """What fails here is a VideoError: damaged files fail in many ways."""
    try:
        yield
    except (VideoError, MemoryError):
        raise
    except Exception as error:
        raise VideoError(reason(error)) from error


def read_frames(
    path: Path, pick: Callable, size: int | tuple | None, place: tuple = (0.5, 0.5)
) -> tuple[np.ndarray, np.ndarray]:
    """Some frames of a video file or of a folder of frames: uint8 (f, h, w, 3).

    Frame n is the n-th that decoding from the start gives, whatever its time stamp says.
    pick: called with the times of all frames, ascending, in seconds from the first one, float64
    (n,); returns the indices of the wanted frames, (f,), ascending. It is called again where the
    file turns out to hold other frames than it says. Only the wanted ones are converted: as small
    as they may be to cover `size`, (w, h) or the side of a square, and what is left over is cut
    off. place: where the part lies, as fractions of what is left over at the (top, left);
    (0.5, 0.5) is the centre. With a size of None the frames stay as they are.
    Returns the frames and their times (f,). Raises VideoError unless the file is a whole, readable
    video.
    """
    size = size and sides(size)
    read = _read_pictures if os.path.isdir(path) or _is_animation(path) else _read_file
    with _reading():
        frames, times = read(path, pick, size, place)
        return np.stack(frames), times


def _cover(width, height, size, count=1):
    """(width, height) scaled until they just cover `size`; only rounded if that is None. Raises
    VideoError where `count` frames of it are too many pixels."""
    if size is not None:
        scale = max(size[0] / width, size[1] / height)
        width, height = max(size[0], width * scale), max(size[1], height * scale)
    if count * width * height > 2 * MAX_PIXELS:
        raise VideoError(f"{count} times {width:.0f} x {height:.0f} pixels are too many")
    return max(round(width), 1), max(round(height), 1)


def _cut(frame, size, place):
    if size is None:
        return frame
    top, left = (round((n - s) * p) for n, s, p in zip(frame.shape, size[::-1], place))
    return frame[top : top + size[1], left : left + size[0]]


def _open_picture(path):
    """A `PIL.Image` that is no larger than MAX_PIXELS. Raises VideoError, OSError and others."""
    check_file(path)
    image = Image.open(path, formats=PICTURE_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise VideoError(f"{image.width} x {image.height} pixels are too many")
    return image


def _to_rgb(image):
    """A picture as it is to be seen: upright, with 8 bits for each colour."""
    image = ImageOps.exif_transpose(image)  # phones turn the label only
    if image.mode[0] in "IF":  # Pillow would cut these off at 255
        values, top = np.asarray(image, np.float64), 1 if image.mode == "F" else 65535
        if not (values >= 0).all() or not (values <= top).all():
            raise VideoError(f"its values do not lie between 0 and {top}")
        image = Image.fromarray((values * (255 / top)).round().astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGB", image.size, "white")
        for y in range(0, image.height, 64):  # in strips, for a copy of all is large
            strip = image.crop((0, y, image.width, min(y + 64, image.height))).convert("RGBA")
            white.paste(strip, (0, y), strip)
        return white
    return image.convert("RGB")


def _read_pictures(path, pick, size, place):
    """`read_frames` of a folder, or of an animated WebP, which ffmpeg does not read."""
    if os.path.isdir(path):
        names = _series(path)
        pictures = [(Path(path, name), 0) for name in names]
        times = np.arange(len(names)) / FOLDER_FPS
    else:
        ends = [0]
        with _open_picture(path) as image:
            for frame in ImageSequence.Iterator(image):
                frame.load()
                ends.append(ends[-1] + (frame.info["duration"] or 100) / 1000)  # as browsers do
        times = np.array(ends[:-1])
        pictures = [(path, i) for i in range(len(times))]
    frames, index = [], pick(times)
    for name, number in [pictures[i] for i in index]:
        with _open_picture(name) as image:
            image.seek(number)
            image = _to_rgb(image)
            image = image.resize(_cover(*image.size, size, len(index)))
            frames.append(_cut(np.asarray(image), size, place))
    return frames, times[index]


def _series(path):
    """The pictures in a folder whose names differ in their numbers alone, in order; other pictures,
    fewer than half as many, may lie there too. All where no two names are alike. Raises
    VideoError."""
    names = [name for name in os.listdir(path) if _suffix(name) in IMAGES and name[0] != "."]
    if not names:
        raise VideoError("a folder without pictures")
    # 2 before 10
    names.sort(key=lambda name: (re.sub("[0-9]+", lambda n: n[0].zfill(20), name), name))
    series = {}
    for name in names:
        series.setdefault(re.sub("[0-9]+", "0", name), []).append(name)
    longest, *rest = sorted(series.values(), key=len, reverse=True)
    if len(longest) == 1:
        return names
    if rest and 2 * len(rest[0]) >= len(longest):
        raise VideoError(f"two series of pictures, such as {longest[0]} and {rest[0][0]}: give "
                         "each its own folder")
    return longest


def _is_animation(path):
    """Whether a file is a WebP whose header says that it moves."""
    if _suffix(path) != ".webp" or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        head = file.read(21)
    return head[12:16] == b"VP8X" and len(head) == 21 and head[20] & 2 > 0


def _read_file(path, pick, size, place):
    import av
    from av.sidedata.sidedata import SideDataContainer  # frame.side_data would keep the frame
    from av.video.reformatter import Interpolation, VideoReformatter

    reformatter = VideoReformatter()  # keeps its tables from frame to frame
    # Without the last two flags some sizes come out 1.5 levels too dark.
    method = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

    def convert(frame):
        """A decoded frame as it is to be seen: uint8 (h, w, 3), scaled and cut."""
        # The display matrix, [[a, b, _], [c, d, _], ...], turns (x, y) into (ax + cy, bx + dy).
        matrix = SideDataContainer(frame).get("DISPLAYMATRIX")
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5] if matrix else (1, 0, 0, 0, 1)
        turned = abs(b) > abs(a)
        target = size[::-1] if turned and size else size
        width, height = _cover(frame.width * video.aspect, frame.height, target, len(index))
        # One step for size and colours, in C. Shrinking widens the kernel, so nothing aliases.
        see_through = any(part.is_alpha for part in frame.format.components)
        colours = "rgba" if see_through else "rgb24"
        image = reformatter.reformat(frame, width, height, colours, interpolation=method)
        image = image.to_ndarray().swapaxes(0, int(turned))
        if see_through:
            image = np.asarray(_to_rgb(Image.fromarray(image)))
        down, right = (b, c) if turned else (d, a)
        return _cut(image[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1], size, place)

    check_file(path)
    if _breaks_off(path):
        raise VideoError("truncated: the end of it is missing")
    video = _Video(path)
    while True:
        times = (video.times - video.times[0]) * video.unit
        index = pick(times)
        try:
            return [convert(frame) for frame in video.frames(index)], times[index]
        except (_Unexpected, av.error.InvalidDataError):
            if video.counted:
                raise
            video.count()


def _breaks_off(path):
    """Whether an AVI, MP4 or Matroska file ends before its pictures do, by the lengths of its
    outermost parts. What it says of its duration is no proof."""
    total, position = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while len(head := file.read(16)) == 16:
            before = 0  # bytes of the part that its length leaves out
            if head[:4] == b"RIFF":  # some programs count the first 8 bytes and some do not
                return int.from_bytes(head[4:8], "little") % (2**32 - 1) > total
            if head[:4] in (b"\x1aE\xdf\xa3", b"\x18S\x80g"):  # EBML header, Segment
                before = 13 - head[4].bit_length()
                unknown = 2 ** (7 * (before - 4)) - 1
                length = (int.from_bytes(head[4:before], "big") & unknown) % unknown
            elif head[4:8] in (b"ftyp", b"free", b"mdat", b"moof", b"moov", b"wide"):
                length = int.from_bytes(head[:4], "big")
                length = int.from_bytes(head[8:], "big") if length == 1 else length
            else:
                break
            position += before + length
            if length == 0 or position > total:  # 0: unknown, up to the end
                return length > 0
            file.seek(position)
    return False


class _Unexpected(ValueError):
    """Decoding gives other frames than the packets of the file promise."""


class _Video:
    """The best video stream of a file.

    times (n,): of its frames in the order of display, in units of `unit` seconds. They are those of
    the packets and of the decoded frames alike, or else all frames were `counted`. sizes: of the
    packets; keys: numbers of frames at which decoding may begin; aspect: how much wider than high a
    pixel is.
    """

    def __init__(self, path):
        self.path = os.path.abspath(path)  # or ffmpeg takes "a:b.mp4" for a protocol
        with self.open() as container:
            packets = {s.index: [] for s in container.streams.video if s.codec_context}
            for packet in container.demux([container.streams[i] for i in packets] or ()):
                if packet.is_corrupt:
                    raise VideoError("damaged or truncated")
                # An empty packet is a repeated frame of an AVI, or the end; those before the start
                # of an edited MP4 are not to be shown.
                if packet.size and not packet.is_discard and packet.stream.index in packets:
                    row = packet.pts, packet.size, packet.is_keyframe
                    packets[packet.stream.index].append(row)
            most = max(map(len, packets.values()), default=0)
            if not most:
                raise VideoError("there is no video in it")

            def rank(number):  # a thumbnail has few frames, a preview few pixels
                stream = container.streams[number]
                return 2 * len(packets[number]) >= most, stream.width * stream.height

            self.number = max(packets, key=rank)
            stream = container.streams[self.number]
            times, sizes, keys = np.array(packets[self.number], float).T  # NaN: it is not told
            self.unit = float(stream.time_base)
            self.interval = 1 / float(stream.average_rate or FOLDER_FPS) / self.unit
            aspect = float(stream.sample_aspect_ratio or 1)
            self.aspect = aspect if abs(aspect - 1) > 0.02 else 1  # nearly square is square
        order = np.argsort(times, kind="stable")
        self.times, self.counted = times[order], False
        self.sizes, self.keys = sizes[order], np.flatnonzero(keys[order])
        if not (np.diff(self.times, prepend=-np.inf) > 0).all():
            self.count()

    def open(self):
        """A container of PyAV. Raises VideoError where it is none, FFmpegError and OSError."""
        import av

        try:
            return av.open(self.path, options=FFMPEG)
        except av.error.ArgumentError as error:
            raise VideoError("there is no video of a known kind in it") from error

    def decode(self, key=None):
        """The frames in the order of display, from the start or from a key frame on."""
        import av

        with self.open() as container:
            stream, begun = container.streams[self.number], False
            stream.codec_context.options = {"max_pixels": FFMPEG["max_pixels"]}
            packets = container.demux(stream)
            if key is not None:
                container.seek(int(self.times[key]), stream=stream)
                # It may end anywhere, and in MPEG-PS packets have other times after it.
                wanted = self.times[key], self.sizes[key]
                packets = itertools.dropwhile(lambda p: (p.pts, p.size) != wanted, packets)
            for packet in packets:
                try:
                    # Empty ones in the middle would be taken for the end.
                    for frame in packet.decode() if packet.size or packet.dts is None else ():
                        begun = True
                        if key is None or frame.pts is None or frame.pts >= self.times[key]:
                            yield frame
                except av.error.InvalidDataError:
                    if begun:  # before, frames may lack those that they build on
                        raise

    def frames(self, index):
        """The wanted frames. Raises _Unexpected where decoding gives others than expected."""
        decoder, position = self.decode(), -1
        for i, wanted in enumerate([0, *index]):  # what was cut out may lack its first frames
            key = max(self.keys[self.keys <= wanted], default=0)
            if key > position + 1:
                ahead = self.decode(key)
                frame = next(ahead, None)
                if frame and frame.pts == self.times[key]:
                    decoder, position = itertools.chain([frame], ahead), key - 1
                else:  # it ended too late: decode all
                    self.keys = self.keys[:0]
            while position < wanted:
                frame, position = next(decoder, None), position + 1
                if frame is None or not self.counted and frame.pts != self.times[position]:
                    raise _Unexpected("its frames cannot be counted")
                if frame.is_corrupt:
                    raise _Unexpected("a frame in it is damaged")
            if i:
                yield frame
        if position == len(self.times) - 1 and next(decoder, None):
            raise _Unexpected("it holds more frames than it says")

    def count(self):
        """Correct `times` by decoding the whole file; frames are to be counted from now on."""
        self.counted, self.keys = True, self.keys[:0]
        times = np.array([frame.pts for frame in self.decode()], float)
        if not len(times):
            raise VideoError("nothing in it can be decoded")
        rising = (np.diff(times) > 0).all()
        self.times = times if rising else np.arange(len(times)) * self.interval


def read_image(path: Path, size: int | tuple) -> np.ndarray:
    """The middle of a picture file, as from `middle_part`. Raises VideoError."""
    with _reading(), _open_picture(path) as image:
        return middle_part(np.asarray(_to_rgb(image)), size)


def middle_part(picture: np.ndarray, size: int | tuple) -> np.ndarray:
    """The middle of a picture, as large as fits, scaled: uint8 (h, w, 3). size: see `sides`."""
    width, height = sides(size)
    # A frame that was enlarged for viewing becomes the very pixels that it was made of.
    whole = min(picture.shape[0] / height, picture.shape[1] / width) % 1 == 0
    method = Image.Resampling.BOX if whole else Image.Resampling.BICUBIC
    return np.asarray(ImageOps.fit(Image.fromarray(picture), (width, height), method))


# ------------------------------------------------------------------------------ captions

TABLES = (".csv", ".json", ".jsonl", ".ndjson", ".tsv")
FILE_COLUMNS = ("file file_name filename video video_path video_file video_name media_path path "
                "file_path filepath clip").split()  # fmt: skip
CAPTION_COLUMNS = "caption captions text prompt cap description sentence".split()
# Two lists whose lines belong together, as finetrainers and CogVideoX take them.
CAPTION_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
VIDEO_LISTS = ("videos.txt", "video.txt")
CAPTION_FOLDERS = ("labels", "captions")  # beside a folder `videos`
# Folders that are not named after what happens in them.
PLAIN_FOLDERS = ("clips data dataset dev eval frames media test testing train training val valid "
                 "validation video videos").split()  # fmt: skip
# What looks like captions: names and kinds of files.
CAPTION_NAMES = ("annotation annotations dataset description descriptions label labels meta "
                 "metadata sentences test text texts train val validation videos").split()
SPREADSHEETS = (".arrow", ".ods", ".parquet", ".xls", ".xlsx")
CAPTION_KINDS = (*TABLES, *SPREADSHEETS, *".caption .srt .txt .vtt .xml .yaml .yml".split())
MAX_TEXT = 2**28  # bytes of a table
# What is no caption: numbers, and what programs write where there is nothing.
SPACE = r"[\s\u200b-\u200d\ufeff]*"  # some of it has no width
NO_CAPTION = re.compile(rf"{SPACE}([\d\s.,+-]*|nan|n/?a|none|null){SPACE}", re.IGNORECASE)


def find_captions(folder: Path) -> tuple[list, str]:
    """The videos of a folder and their captions: ([(name, caption), ...], where they come from).

    Names are paths below `folder`, with "/"; a caption is a string, or a list of strings where a
    video has several. Captions come from all of these, in the folder and below it:
    1. tables of the kinds TABLES with one of FILE_COLUMNS and one of CAPTION_COLUMNS. A .json holds
       a list of rows, or maps names to captions. Paths start from the table or from `folder`;
    2. one of CAPTION_LISTS with one of VIDEO_LISTS beside it;
    3. a .txt file for each video, of the same name, beside it or in one of CAPTION_FOLDERS. Each
       line is a caption.
    Where there is none of them, they are
    4. the names of the folders; those of UCF-101, and the files that are named like its files,
       become whole sentences;
    5. the names of the files.
    Links are followed; hidden files are not looked at. Raises DataError where there is no video, a
    caption is missing or has two versions, or a file looks like captions but cannot be used.
    """
    return _find(Path(folder))[:2]


def _find(folder):
    """As `find_captions`, and {name: reason} of what a table names for nothing, the videos that no
    table names, and the files of other kinds."""
    if not os.path.isdir(folder):  # Path.is_dir raises an error for names that are too long
        raise DataError(f"{folder} is neither a folder of videos nor `shapes`, the built-in clips")
    videos, others = _walk(folder)
    if folder.absolute().name == "videos":  # their captions may lie beside it
        for name in CAPTION_FOLDERS:
            others += [f"../{name}/{other}" for other in _walk(folder.absolute().parent / name)[1]]
    texts, tables, unused = _texts(folder, videos, others), {}, {}
    for name in others:
        try:
            if not (rows := _rows(folder / name, texts.get(name))):
                raise ValueError("it is empty")
            tables[name] = rows
        except (OSError, ValueError, RecursionError) as error:
            unused[name] = reason(error)
    _check_unused(folder, videos, unused, bool(tables))
    captions, missing = _merge(folder, tables)
    without = [video for video in videos if video not in captions]
    if not videos and not tables:
        raise DataError(f"no videos in {folder}: it takes {', '.join(VIDEOS)} files, or folders of "
                        "frames")
    if not tables:
        items = [(video, _name_caption(video)) for video in videos]
        return items, "names of folders and files", {}, [], [*unused]
    if not captions:
        raise DataError(f"{folder}: none of the {len(missing)} files is there that {min(tables)} "
                        f"names, such as {min(missing)}; paths start from the table or the folder")
    source = ", ".join(sorted(set(tables) - set(texts))[:3])
    if without and not source:
        raise DataError(f"{len(without)} of {len(videos)} videos in {folder} have no .txt file with"
                        f" a caption beside them, such as {without[0]}")
    items = [(video, c[0] if len(c) == 1 else c) for video, c in captions.items()]
    return items, source or ".txt files", missing, without, [*unused]


def _walk(folder):
    """The names of the videos and of all other files in a folder and below it, sorted; without
    pictures that are frames."""
    def unreadable(error):
        if os.path.lexists(error.filename):
            raise DataError(f"{error.filename}: {reason(error)}") from error

    videos, others, seen = [], [], set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(root)
        if real in seen:  # a link that leads in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] not in ".@#")  # of programs
        below = Path(root).relative_to(folder)
        files = {(below / name).as_posix() for name in files if not name.startswith(".")}
        found = {n for n in files if _suffix(n) in VIDEOS or _is_animation(folder / n)}
        pictures = {name for name in files - found if _suffix(name) in IMAGES}
        if pictures and not found and root != str(folder):
            found = {below.as_posix()}  # pictures and no videos: the folder itself is a video
            files -= pictures
        videos += found
        others += files - found
    return sorted(videos), sorted(others)


def _suffix(name):
    return os.path.splitext(name)[1].lower()


def _stem(video):
    return video[: -len(_suffix(video))] if _suffix(video) in (*VIDEOS, ".webp") else video


def words(name: str) -> str:
    """A name as words: "ApplyEyeMakeup", "apply_eye-makeup" -> "apply eye makeup"."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return " ".join(re.split(r"[\s_-]+", name)).strip().lower()


def _name_caption(video):
    """The caption that the name of a video or of its folder gives."""
    *folders, name = _stem(video).split("/")
    named = [folder for folder in folders if folder.lower() not in PLAIN_FOLDERS]
    flat = re.fullmatch(r"v_([A-Za-z]+)_g\d+_c\d+", name)
    name = flat[1] if flat else [name, *named][-1]
    text = words(name).encode(errors="replace").decode() or name  # names need not be text
    return SENTENCES.get(name.lower(), text)


def _texts(folder, videos, others):
    """{name of a .txt file: videos whose captions it holds}."""
    def place(name):  # the same one for videos/a and labels/a
        name = os.path.normpath(f"{folder.absolute().name}/{name}")
        return re.sub(f"(^|/)({'|'.join(CAPTION_FOLDERS)})/", r"\1videos/", name)

    places = {}
    for video in videos:
        for name in {_stem(video), video}:
            places.setdefault(place(name), []).append(video)
    texts = {name: places.get(place(name[:-4])) for name in others if _suffix(name) == ".txt"}
    return {name: found for name, found in texts.items() if found}


def read_text(path: str | Path, most: int = MAX_TEXT) -> str:
    """The text of a file of at most so many bytes, in UTF-8 or UTF-16. Raises OSError and
    ValueError."""
    check_file(path)
    if os.path.getsize(path) > most:
        raise ValueError(f"larger than {most} bytes")
    content = Path(path).read_bytes()
    marked = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    return content.decode("utf-16" if marked else "utf-8-sig")


def _rows(path, videos):
    """[(where, files, caption), ...] of a file; `videos` are those that it lies beside. Raises
    ValueError where it does not hold captions."""
    pair = [next((p for p in map(path.with_name, names) if p.is_file()), None)
            for names in (VIDEO_LISTS, CAPTION_LISTS)]  # fmt: skip
    if videos:
        lines = enumerate(read_text(path).split("\n"), 1)
        return [(f"line {i}", [v], line) for i, line in lines if line.strip() for v in videos]
    if path in pair and all(pair):
        files, captions = (read_text(path).rstrip().split("\n") for path in pair)
        if len(files) != len(captions):
            raise ValueError(f"{len(captions)} lines, {pair[0].name} {len(files)}")
        return [(f"line {i}", [x], text) for i, (x, text) in enumerate(zip(files, captions), 1)]
    table, columns = [], set()  # a row may name its file in several columns
    for where, row in _read_table(path):
        if not isinstance(row, dict):
            raise ValueError(f'{where} is no {{"file": "...", "caption": "..."}}')
        if None in row:
            raise ValueError(f"{where} has too many columns; commas need quotation marks")
        row = {re.sub(r"[\s-]+", "_", key.strip().lower()): row[key] for key in row}
        columns |= row.keys()
        if any(value not in (None, "") for value in row.values()):  # spreadsheets leave empty rows
            caption = next((row[name] for name in CAPTION_COLUMNS if name in row), None)
            table.append((where, [row[name] for name in FILE_COLUMNS if name in row], caption))
    if table and (columns.isdisjoint(FILE_COLUMNS) or columns.isdisjoint(CAPTION_COLUMNS)):
        raise ValueError(f"its columns are {', '.join(sorted(columns)[:9])}")
    return table


def _read_table(path):
    """[(where, {column: value}), ...] of a table. Raises ValueError."""
    suffix, line, found = _suffix(path), 0, []
    if suffix not in TABLES:
        raise ValueError("it is of another kind")
    text = read_text(path)
    if suffix == ".json":
        rows = json.loads(text)
        if isinstance(rows, dict) and any(_suffix(key) in VIDEOS for key in rows):
            # {name: caption}, or {name: row}
            rows = [{"file": key, **(row if isinstance(row, dict) else {"caption": row})}
                    for key, row in rows.items()]  # fmt: skip
        rows = rows if isinstance(rows, list) else [rows]
    elif suffix in (".csv", ".tsv"):
        delimiter = max(",;\t", key=text.split("\n", 1)[0].count)
        line, rows = 1, csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter,
                                       strict=True, skipinitialspace=True)  # fmt: skip
    else:
        rows = (json.loads(line) if line.strip() else None for line in text.split("\n"))
    try:
        for i, row in enumerate(rows, 1):
            line = getattr(rows, "line_num", i)
            if row is not None:
                found.append((f"{'entry' if suffix == '.json' else 'line'} {line}", row))
    except (csv.Error, ValueError) as error:
        hint = "; a quotation mark is not closed?" if isinstance(error, csv.Error) else ""
        raise ValueError(f"line {line + 1}: {error}{hint}") from error
    return found


def _locate(folder, base, file):
    """The name below `folder` of what a table in its folder `base` calls `file`, or None."""
    paths = file.strip(), file.strip().replace("\\", "/")
    forms = ("NFC", "NFD")  # an accent is part of its letter, or follows it, as in names on a Mac
    paths = [*paths, *(unicodedata.normalize(form, path) for form in forms for path in paths)]
    # Each once: a table may name thousands of files on a slow disk.
    paths, starts = dict.fromkeys(filter(None, paths)), dict.fromkeys((base, ""))
    for path, start in itertools.product(paths, starts):
        name = os.path.normpath(os.path.join(start, path))
        # A path that leads out of the folder must begin like one.
        outside = name.startswith("..") and not path.startswith("..")
        if not outside and os.path.exists(folder / name):
            for root in (os.path.abspath, os.path.realpath) if os.path.isabs(name) else ():
                name = name.removeprefix(f"{root(folder)}/")
            return name
    return None


def _merge(folder, tables):
    """{video: captions} of all tables, and {file: reason} of what is not there. Raises DataError
    for captions that are not words or contradict each other."""
    merged, missing, origin = {}, {}, {}
    for table, rows in tables.items():
        placed, base = {}, os.path.dirname(table)
        for where, files, captions in rows:
            where = f"{folder / table}, {where}"
            files = [file.strip() for file in files if isinstance(file, str) and file.strip()]
            if not files:
                raise DataError(f"{where}: no name of a file")
            name = next(filter(None, (_locate(folder, base, file) for file in files)), None)
            if not name:
                missing[files[0]] = f"{table} names it, and it is not there"
            for text in captions if isinstance(captions, list) and captions else [captions]:
                if not isinstance(text, str) or NO_CAPTION.fullmatch(text):
                    raise DataError(f"{where}: no caption but {str(text)[:40]!r}")
                later = [re.split("[,;\t]", line)[0] for line in text.split("\n")[1:]]
                if any(_locate(folder, base, line) for line in later):
                    raise DataError(f"{where}: a quotation mark is not closed")
                text = " ".join(text.encode(errors="replace").decode().split())
                if name and text not in placed.setdefault(name, []):
                    placed[name].append(text)
        for name, captions in placed.items():
            if merged.setdefault(name, captions) != captions:
                raise DataError(f"{folder}: {origin[name]} and {table} give {name} different "
                                "captions; take one of them out of the folder")
            origin.setdefault(name, table)
    return merged, missing


def _check_unused(folder, videos, unused, explicit):
    """Raises DataError where one of the unused files, {name: reason}, looks like captions: with the
    wrong captions a training is lost. explicit: there are captions besides."""
    names = {os.path.basename(video) for video in videos}
    stems = {_stem(name).lower() for name in names}
    for name, why in unused.items():
        stem, suffix = os.path.splitext(os.path.basename(name).lower())
        named = (
            re.search("caption|prompt", stem)
            or stem in CAPTION_NAMES and suffix != ".txt" or stem + suffix in VIDEO_LISTS
            or stem in stems and (suffix == ".txt" or not explicit)
            or suffix in SPREADSHEETS and not explicit
        )
        if suffix in CAPTION_KINDS and (named or _mentions(folder / name, names, stems)):
            raise DataError(
                f"{folder / name} looks like captions and cannot be used ({why}): captions are "
                f"read from tables ({', '.join(TABLES)}) with the columns file and caption, or "
                "from a .txt file beside each video; or take it out of the folder"
            )


def _mentions(path, names, stems):
    """Whether a text names videos and says more about them than numbers: one by the name of its
    file, or in most lines one without its suffix."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        text = file.read(2**20).decode(errors="replace").replace("\0", "")
    lines, begun = [line for line in text.splitlines() if line.strip()], 0
    for line in lines:
        tokens = re.findall(r"""[^\s,;:"'|{}\[\]()]+""", line)
        parts = {*tokens, *re.split(r"""[,;\t|:"]""", line)}
        named = {part for part in parts if re.split(r"[\\/]", part.strip())[-1] in names
                 or _suffix(path) in TABLES and part.strip().lower() in stems
                 and not part.strip().isdigit()}  # fmt: skip
        for part in named:
            line = line.replace(part, "")
        if re.search(r"[^\W\d_]{2}", line):  # a word
            if named:
                return True
            begun += bool(tokens) and tokens[0].lower() in stems
    return 2 * begun > len(lines)


def read_split(folder: Path, split: str) -> set[str]:
    """File names in one of UCF-101's official lists, "train01" to "test03".

    The lists lie in the folder, or in `ucfTrainTestlist` inside or beside it. Raises DataError."""
    if not re.fullmatch(r"(train|test)0[123]", split):
        raise DataError(f"unknown split {split!r}: choose train01 to train03 or test01 to test03")
    name, folder = f"{split[:-2]}list{split[-2:]}.txt", Path(folder).absolute()
    inside, beside = folder / "ucfTrainTestlist", folder.parent / "ucfTrainTestlist"
    path = next((p / name for p in (folder, inside, beside) if (p / name).exists()), None)
    if path is None:
        raise DataError(f"no {name} for --split {split}: put it into {inside}")
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from error
    return {Path(line.split()[0]).name for line in lines if line.strip()}


def different(captions: list[str], count: int) -> list[str]:
    """So many captions, at most, that have as few words in common as can be."""
    parts = {caption: set(caption.split()) for caption in sorted(set(captions))}
    nearest, chosen = dict.fromkeys(parts, 1.0), []
    while nearest and len(chosen) < count:
        chosen.append(max(nearest, key=nearest.get))
        last = parts[chosen[-1]]
        del nearest[chosen[-1]]
        for caption, distance in nearest.items():
            common = len(parts[caption] & last) / max(len(parts[caption] | last), 1)
            nearest[caption] = min(distance, 1 - common)
    return chosen


def evenly(captions: list[str], count: int) -> list[str]:
    """So many different captions, at most, from all over the data set."""
    captions = sorted(set(captions))
    picked = np.linspace(0, len(captions) - 1, min(count, len(captions))).astype(int)
    return [captions[i] for i in picked]


# ------------------------------------------------------------------------------ VideoFolder


class VideoFolder:
    """Captioned clips of the videos in a folder; `dataset[i]` is a `Sample` of video i.

    Videos and captions: see `find_captions`; split: see `read_split`. A clip has `frames` frames,
    cut to `size`, (w, h) or the side of a square (None: left as they are), that cover the whole
    action: they lie evenly in time from the first to the last frame of the video, and the sample's
    `fps` is the rate that results.
    clip_seconds: only a window of this length, from a random place; stride: instead, every
    stride-th frame from a random one on. Random means drawn by (seed, i). flip: mirrors half of the
    clips; off, because left and right are words.

    `dataset[i]` raises VideoError where video i is unreadable or too short; its name and the reason
    go into the dict `skipped`, where those are too that a table names but that are not there.
    Raises DataError where no video can be used.
    """

    form = ""  # as in `MovingShapes`: their captions may look like anything

    def __init__(
        self, folder: Path, split: str | None = None, seed: int = 0, frames: int = FRAMES,
        size: int | tuple | None = 64, clip_seconds: float | None = None, stride: int | None = None,
        flip: bool = False,
    ):
        self.folder = Path(folder)
        self.items, self.source, self.skipped, self.left_out, self.others = _find(self.folder)
        if split is not None:
            names = read_split(folder, split)
            self.items = [item for item in self.items if Path(item[0]).name in names]
            if not self.items:
                raise DataError(f"--split {split} matches none of the videos in {folder}")
        self.seed, self.frames, self.size = seed, frames, size
        self.clip_seconds, self.stride, self.flip = clip_seconds, stride, flip

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
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

    def captions(self, index: int) -> list[str]:
        """All captions of video i."""
        captions = self.items[index][1]
        return [captions] if isinstance(captions, str) else captions

    def unusable(self) -> DataError:
        """The error that says that no video of the data set can be used."""
        name, why = min(self.skipped.items())
        return DataError(f"none of the {len(self.items)} videos in {self.folder} can be used; "
                         f"{name}: {why}")

    def caption(self, index: int) -> str:
        """One of them, drawn by (seed, i): that of `dataset[i]`."""
        captions = self.captions(index)
        return captions[np.random.default_rng((self.seed, index)).integers(len(captions))]

    def random_frames(self, index: int, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` different frames of a video, cut out at one random place: uint8 (count, h, w,
        3)."""

        def pick(times):
            self._pick(times, rng)  # the same videos are too short
            return np.sort(rng.choice(len(times), count, replace=False))

        return self._read(index, rng, pick, rng.random(2))[0]

    def identity(self) -> str:
        """All that the pictures depend on, wherever the folder is, as text."""
        files = [(name, _fingerprint(self.folder / name)) for name, _ in self.items]
        settings = (self.seed, self.frames, self.size, self.clip_seconds, self.stride, self.flip)
        return repr((PIXELS, settings, files))

    def summary(self) -> list[str]:
        """Lines that tell what will be learned, and warn of what cannot be."""
        captions = [self.captions(i) for i in range(len(self))]
        count = Counter(itertools.chain(*captions))
        spread = Counter(word for c in captions for word in set(" ".join(c).lower().split()))
        lines = [f"{len(self)} videos, {len(count)} different captions from {self.source}"]
        lines += [f'{n} x "{text}"' for text, n in count.most_common(3)]
        for names, what in ((self.left_out, "videos without a caption are left out"),
                            (self.skipped, "videos that captions name are not there"),
                            (self.others, "other files lie among them")):  # fmt: skip
            if names:
                lines.append(f"{len(names)} {what}, such as {min(names)}")
        if len(count) == 1 and len(self) > 1:
            lines.append("warning: all captions are the same, so that no text can be learned")
        elif 2 * list(spread.values()).count(1) >= spread.total():
            lines.append("warning: most words belong to one video only, so that what they mean "
                         "cannot be learned")
        return lines

    def divide(self) -> tuple["VideoFolder", "VideoFolder"]:
        """Two data sets: without every 20th video, and with nothing else. A single video is in
        both."""
        rest, part = copy.copy(self), copy.copy(self)
        part.items = self.items[::20]
        rest.items = [item for i, item in enumerate(self.items) if i % 20] or self.items
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


def _fingerprint(path):
    """Tells the contents of a file or folder of frames from others: sizes and three samples, since
    reading all would take minutes. None where it cannot be read."""
    with contextlib.suppress(OSError):
        if os.path.isdir(path):
            names = [name for name in sorted(os.listdir(path)) if _suffix(name) in IMAGES]
            return [(name, _fingerprint(path / name)) for name in names]
        if os.path.isfile(path):
            size, content = os.path.getsize(path), hashlib.sha256()
            with open(path, "rb") as file:
                for position in (0, size // 2, max(size - 4096, 0)):
                    file.seek(position)
                    content.update(file.read(4096))
            return size, content.hexdigest()


def prefetch(function: Callable, items: Iterable, workers: int | None = None) -> Iterator:
    """Yields function(item) for each item in order, computed ahead by threads.

    Threads are enough for videos: PyAV lets the others run while it decodes. workers: their number,
    the processor's cores by default. What `function` raises is raised here. A thread that hangs, in
    a read from a stalled disk, does not keep the program from ending.
    """
    workers = workers or min(os.cpu_count() or 1, 16)
    waiting, ahead = SimpleQueue(), deque()
    torch.get_num_threads()  # settles that of this thread, which is to keep its number

    def work():
        """What each thread does: one item after the other, until there is None."""
        # With more threads than cores OpenMP lets none of them spin, and a step takes far longer.
        torch.set_num_threads(1)
        for future, item in iter(waiting.get, None):
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(item))
                except BaseException as error:
                    future.set_exception(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for item in items:
            ahead.append(Future())
            waiting.put((ahead[-1], item))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()
        for _ in threads:
            waiting.put(None)
        for thread in threads:  # most are done soon: none is to run while the program ends
            thread.join(0.2)


def read_ahead(
    dataset: Sequence[Sample], indices: Iterable[int], workers: int | None = None
) -> Iterator[tuple[int, Sample | None]]:
    """Yields (index, `Sample`) for each index in order; the sample is None for a video that cannot
    be used, and `dataset.skipped` says why. Raises DataError where none is left."""

    def read(index):
        try:
            return index, dataset[index]
        except VideoError:
            return index, None

    return prefetch(read, indices, workers)


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
SENTENCES = {name.lower(): sentence for name, sentence in UCF101.items()}
