"""Video files come out as they went in; a folder of videos gives the right frames with the right
captions, whatever lies in it."""

import errno
import gc
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from av.video.reformatter import Interpolation
from PIL import Image

import data
from data import UCF101, DataError, VideoError, VideoFolder, contact_sheet, find_captions
from data import middle_part, prefetch, read_ahead, read_frames, read_image, to_model, to_uint8
from data import write_video
from shapes import MovingShapes, Thing, render

# ------------------------------------------------------------------------------ value ranges


def test_ranges_round_trip_exactly():
    video = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3)).astype(np.uint8)
    video[0, 0, 0, 0], video[0, 0, 0, 1] = 0, 255
    before = video.copy()
    model = to_model(video)
    assert model.shape == (2, 3, 3, 8, 8) and model.dtype == torch.float32
    assert model.min() == -1 and model.max() == 1
    kept = model.clone()
    assert (to_uint8(model) == before).all() and to_uint8(model).dtype == np.uint8
    assert (video == before).all() and (model == kept).all()
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1).repeat(1, 1, 1, 1, 3)
    assert (to_uint8(to_model(every)) == every.numpy()).all()


def test_out_of_range_values_are_clipped():
    model = torch.tensor([-3.0, 3.0, 0.0]).reshape(1, 3, 1, 1, 1)
    assert to_uint8(model).ravel().tolist() == [0, 255, 128]
    assert model.ravel().tolist() == [-3, 3, 0]


# ------------------------------------------------------------------------------ video files


@pytest.fixture
def clip():
    return render(MovingShapes(1, objects=2).describe(0)[2], frames=10)


def test_png_sheet_is_exact(tmp_path, clip):
    before = clip.copy()
    write_video(tmp_path / "a.png", clip, upscale=2)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    large = clip.repeat(2, 1).repeat(2, 2)
    assert (sheet == contact_sheet(large)).all()
    side = 128 + 4
    for i in range(10):  # four in a row, with a border of two pixels
        top, left = i // 4 * side + 2, i % 4 * side + 2
        assert (sheet[top : top + 128, left : left + 128] == large[i]).all()
    assert sheet.shape == (3 * side, 4 * side, 3) and (clip == before).all()


@pytest.mark.parametrize("fps", [6.0, 7.3, 8.0, 12.0, 30.0])
def test_gif_keeps_its_frames_and_length(tmp_path, clip, fps):
    write_video(tmp_path / "a.gif", clip, fps)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 10 and gif.size == (64, 64) and gif.info["loop"] == 0
        total = 0
        for i in range(10):
            gif.seek(i)
            total += gif.info["duration"]
            error = np.asarray(gif.convert("RGB")).astype(int) - clip[i]
            assert np.abs(error).mean() < 1  # one palette for the clip: nearly exact
    assert abs(total - 1000 * 10 / fps) <= 5


def test_gif_keeps_still_frames(tmp_path):
    # Writers like to merge equal frames, and must not lose their time.
    still = render([Thing("red", "circle", "", ("stays still",), 32.0, 32.0, 0.0)], frames=8)
    write_video(tmp_path / "a.gif", still, 8.0)
    with Image.open(tmp_path / "a.gif") as gif:
        durations = []
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
    assert sum(durations) == 1000


@pytest.mark.parametrize("name, fps", [("a.mp4", 8.0), ("a.MP4", 7.3)])
def test_mp4_is_readable_and_says_which_colours_it_has(tmp_path, clip, name, fps):
    write_video(tmp_path / name, clip[:, :63], fps, upscale=3)  # 189 rows: one has to go
    with av.open(str(tmp_path / name)) as container:
        frames = list(container.decode(video=0))
        assert container.streams.video[0].average_rate == pytest.approx(fps, rel=1e-3)
    assert {(f.colorspace, f.color_primaries, f.color_trc, f.color_range) for f in frames} == {
        (1, 1, 1, 1)  # BT.709, from 16 to 235
    }
    video = np.stack([f.to_ndarray(format="rgb24", src_colorspace="ITU709") for f in frames])
    expected = clip[:, :63].repeat(3, 1).repeat(3, 2)[:, :188].astype(int)
    assert video.shape == expected.shape == (10, 188, 192, 3)
    assert np.abs(video - expected).mean() < 3
    video, _ = read_frames(tmp_path / name, every, None)
    assert np.abs((video - expected).mean((0, 1, 2))).max() < 1  # compression takes a part of it


def test_unknown_suffix_is_refused(tmp_path, clip):
    with pytest.raises(ValueError, match="webm"):
        write_video(tmp_path / "a.webm", clip)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".gif", ".mp4", ".png"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, suffix):
    """At any size: also where only the last few bytes find no place."""
    video = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    old, new = tmp_path / f"old{suffix}", tmp_path / f"new{suffix}"
    write_video(new, video)
    size = new.stat().st_size
    new.unlink()
    old.write_bytes(b"precious")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (10, size // 2, size - 500, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            for path in (new, old):
                with pytest.raises(OSError) as error:
                    write_video(path, video)
                assert error.value.strerror
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [old] and old.read_bytes() == b"precious"


def test_an_interrupt_leaves_a_whole_file_or_none(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8)
    start = time.perf_counter()
    write_video(tmp_path / "a.mp4", video)
    seconds = time.perf_counter() - start
    for share in np.linspace(0.02, 0.9, 10):
        (tmp_path / "a.mp4").unlink(missing_ok=True)
        signal.setitimer(signal.ITIMER_REAL, seconds * share)
        old = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            write_video(tmp_path / "a.mp4", video)
            signal.pause()  # the clock was slow: nothing has been lost
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGALRM, old)
        assert [path.name for path in tmp_path.iterdir()] in ([], ["a.mp4"])
        if (tmp_path / "a.mp4").exists():
            assert len(read_frames(tmp_path / "a.mp4", every, None)[0]) == 20


def test_folders_are_made_and_files_replaced(tmp_path, clip):
    path = tmp_path / "deep" / "er" / "a.png"
    write_video(path, clip)
    write_video(path, clip[:1])
    assert np.asarray(Image.open(path)).shape == (68, 68, 3)
    assert path.stat().st_mode & 0o777 == 0o644


# ------------------------------------------------------------------------------ reading videos

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"  # beside the repository
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real videos in {REAL}")
STEP = 8  # frame i of `greys` is a flat grey of value STEP * i, so that a frame says which it is


def greys(count=31, height=32, width=48):
    video = np.arange(count, dtype=np.uint8)[:, None, None, None] * STEP
    return np.broadcast_to(video, (count, height, width, 3))


def which(video):
    """The numbers of the frames of `greys`."""
    means = video.reshape(len(video), -1).mean(1) / STEP
    assert np.abs(means - means.round()).max() < 0.4
    return means.round().astype(int).tolist()


def write(path, video, fps=25, gop=7, codec=None, b_frames=0, pixels=None, options=None, **rest):
    """A video file of any kind, or a folder of frames. pixels: their width by their height; rest:
    options of the container."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.suffix:
        path.mkdir()
        for i, frame in enumerate(video):
            Image.fromarray(frame).save(path / f"{i}.png")
        return
    if path.suffix == ".gif":
        return write_video(path, video, fps)
    if path.suffix == ".webp":
        pictures = [Image.fromarray(frame) for frame in video]
        return pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40)
    with av.open(str(path), "w", options=rest) as container:
        codec = codec or {".webm": "libvpx", ".wmv": "wmv2"}.get(path.suffix, "mpeg4")
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        stream.options = options or {}
        if pixels:
            stream.codec_context.sample_aspect_ratio = pixels
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))))
        container.mux(stream.encode())


def every(times):
    return np.arange(len(times))


@pytest.mark.parametrize("name", ["a.avi", "a.mp4", "a.mov", "a.mkv", "a.webm", "a.gif", "a"])
def test_a_clip_covers_the_whole_action_in_every_format(tmp_path, name):
    write(tmp_path / name, greys())
    dataset = VideoFolder(tmp_path, frames=4, size=32)
    sample = dataset[0]
    assert which(sample.video) == [0, 10, 20, 30]
    assert sample.fps == pytest.approx(2.5, rel=1e-3)  # 3 steps in 30 / 25 seconds
    assert sample.video.shape == (4, 32, 32, 3) and sample.video.dtype == np.uint8
    assert sample.caption == "a" and sample.scene is None and len(dataset) == 1
    with pytest.raises(IndexError):
        dataset[1]


def numbered(count=40, height=32, width=64):
    """Frames that show their number as eight bars, black or white, above a pattern that moves."""
    y, x = np.mgrid[:height, :width]
    video = np.stack([np.sin((x + 3 * i) / 5) + np.cos((y - 2 * i) / 7) for i in range(count)])
    video = np.repeat((video * 50 + 128).astype(np.uint8)[..., None], 3, -1)
    for i in range(count):
        for bit in range(8):
            video[i, :12, bit * 8 : bit * 8 + 8] = 235 if i >> bit & 1 else 20
    return video


def numbers(video):
    """The inverse of `numbered`."""
    bars = video[:, 2:10, :64].mean((1, 3)).reshape(len(video), 8, 8).mean(-1) > 128
    return (bars << np.arange(8)).sum(1).tolist()


def whole(path):
    """All frames of a file, decoded from the start to the end: a list of av.VideoFrame."""
    with av.open(str(path)) as container:
        found = []
        for packet in container.demux(container.streams.video[0]):
            if packet.size or packet.dts is None:
                found += packet.decode()
        return found


def check_frames(path, picks, frames=None):
    """`read_frames` gives just the frames of a decode of the whole file, for many picks."""
    frames = frames or whole(path)
    method = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    pictures = {}
    for index in picks:
        index = [i for i in index if i < len(frames)] or [0]
        video, times = read_frames(path, lambda times: index, None)
        assert len(times) == len(index) and (np.diff(times) > 0).all()
        for i, frame in zip(index, video):
            if i not in pictures:
                picture = frames[i].reformat(format="rgb24", interpolation=method)
                pictures[i] = picture.to_ndarray()
            assert np.array_equal(frame, pictures[i]), (path.name, index, i)


PICKS = [range(40), range(1, 40, 2), range(4, 40, 5), range(9, 40, 11), [17, 18], [30, 39], [39]]


@pytest.mark.parametrize("b_frames", [0, 1, 2, 3])
@pytest.mark.parametrize("suffix", ["avi", "mp4", "mkv", "ts", "mpg"])
def test_frame_n_is_the_nth_of_a_decode_from_the_start(tmp_path, suffix, b_frames):
    for codec in ("libx264", "mpeg4", "mpeg2video"):
        path = tmp_path / f"{codec}.{suffix}"
        write(path, numbered(), codec=codec, gop=9, b_frames=b_frames)
        video, times = read_frames(path, every, None)
        assert numbers(video) == list(range(40))
        assert times == pytest.approx(np.arange(40) / 25, abs=2e-3)
        check_frames(path, PICKS)


def remux(source, target, start):
    """Copies a video from a key frame on, without encoding it again."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        old.seek(int(start / stream.time_base), stream=stream)
        for packet in old.demux(stream):
            if packet.dts is not None or packet.pts is not None:
                packet.stream = copy
                new.mux(packet)


def mjpeg_avi(path, chunks):
    """An AVI of JPEG pictures at 10 frames a second; None is an empty chunk, as webcams write it
    where nothing has changed."""
    def chunk(name, content):
        return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    height, width = next(c for c in chunks if c is not None).shape[:2]
    movie = index = b""
    for picture in chunks:
        content = io.BytesIO()
        if picture is not None:
            Image.fromarray(picture).save(content, "JPEG", quality=95)
        content = content.getvalue()
        index += b"00dc" + struct.pack("<3I", 16 * bool(content), len(movie) + 4, len(content))
        movie += chunk(b"00dc", content)
    count = len(chunks)
    stream = b"vidsMJPG" + struct.pack("<I2H8I4h", 0, 0, 0, 0, 1, 10, 0, count, 0, 2**32 - 1, 0, 0,
                                       0, width, height)  # fmt: skip
    picture = struct.pack("<Iii2H6I", 40, width, height, 1, 24, 0x47504A4D, 0, 0, 0, 0, 0)
    head = struct.pack("<14I", 100_000, 0, 0, 16, count, 0, 1, 0, width, height, 0, 0, 0, 0)
    streams = chunk(b"LIST", b"strl" + chunk(b"strh", stream) + chunk(b"strf", picture))
    body = chunk(b"LIST", b"hdrl" + chunk(b"avih", head) + streams)
    body += chunk(b"LIST", b"movi" + movie) + chunk(b"idx1", index)
    path.write_bytes(chunk(b"RIFF", b"AVI " + body))


def late(path, suffix):
    write(path.with_suffix(".mkv"), numbered(), codec="libx264", b_frames=3, options={
        "x264-params": "open-gop=1:keyint=10:min-keyint=10:scenecut=0"
    })
    remux(path.with_suffix(".mkv"), path.with_suffix(suffix), 0.9)


def headless(path, suffix):
    write(path.with_suffix(suffix), numbered(), codec="mpeg2video", gop=9, b_frames=2)
    content = path.with_suffix(suffix).read_bytes()
    start = len(content) // 3
    path.with_suffix(suffix).write_bytes(content[start - start % 188 :])


def longer_sound(path, suffix):
    with av.open(str(path.with_suffix(suffix)), "w") as container:
        video, audio = container.add_stream("mpeg4", rate=25), container.add_stream("aac", 16000)
        video.width, video.height, video.pix_fmt = 64, 32, "yuv420p"
        for frame in numbered():
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(video.encode())
        for _ in range(120):  # 7.7 seconds
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            sound.sample_rate = 16000
            container.mux(audio.encode(sound))
        container.mux(audio.encode())


ODD = {
    "intra refresh": (".mp4", lambda path, suffix: write(
        path.with_suffix(suffix), numbered(), codec="libx264",
        options={"x264-params": "intra-refresh=1:keyint=12"})),
    "hidden frames": (".webm", lambda path, suffix: write(
        path.with_suffix(suffix), numbered(), gop=20,
        options={"auto-alt-ref": "1", "lag-in-frames": "16"})),
    "fragments": (".mp4", lambda path, suffix: write(
        path.with_suffix(suffix), numbered(), codec="libx264", b_frames=2,
        movflags="frag_keyframe+empty_moov")),
    "empty chunks": (".avi", lambda path, suffix: mjpeg_avi(
        path.with_suffix(suffix), [f if i % 3 == 0 else None for i, f in enumerate(numbered(60))]
        + [None] * 40)),
    "empty at first": (".avi", lambda path, suffix: mjpeg_avi(
        path.with_suffix(suffix), [None, None, *numbered(20)])),
    "late mkv": (".mkv", lambda path, suffix: late(path.with_name("late"), ".mkv") or late(
        path.with_name("other"), ".mp4")),
    "late mp4": (".mp4", late),
    "headless ts": (".ts", headless),
    "headless mpg": (".mpg", headless),
    "longer sound": (".mkv", longer_sound),
    "longer sound too": (".avi", longer_sound),
    "wmv": (".wmv", lambda path, suffix: write(path.with_suffix(suffix), numbered())),
    "flv": (".flv", lambda path, suffix: write(
        path.with_suffix(suffix), numbered(), codec="libx264", b_frames=2)),
    "ts that is named mp4": (".mp4", lambda path, suffix: write(
        path.with_suffix(".ts"), numbered(), codec="libx264", gop=10, b_frames=2
    ) or path.with_suffix(".ts").rename(path.with_suffix(suffix))),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_odd_files_are_read_whole(tmp_path, kind):
    suffix, make = ODD[kind]
    make(tmp_path / "odd", suffix)
    paths = [path for path in tmp_path.iterdir() if path.suffix == suffix]
    assert paths
    for path in paths:
        seen, frames = [], whole(path)
        read_frames(path, lambda times: seen.append(len(times)) or [0, len(times) - 1], None)
        assert seen[-1] == len(frames) >= 12
        check_frames(path, PICKS, frames)


def test_empty_chunks_of_an_avi_take_time(tmp_path):
    mjpeg_avi(tmp_path / "a.avi", [f if i % 3 == 0 else None for i, f in enumerate(numbered(30))])
    video, times = read_frames(tmp_path / "a.avi", every, None)
    assert numbers(video) == list(range(0, 30, 3)) and times == pytest.approx(np.arange(10) * 0.3)


def test_changed_parts_of_a_gif_or_webp_are_put_together(tmp_path):
    rng, frames = np.random.default_rng(0), [np.zeros((40, 60, 3), np.uint8)]
    for _ in range(19):
        y, x = rng.integers(0, 32), rng.integers(0, 52)
        frames.append(frames[-1].copy())
        frames[-1][y : y + 8, x : x + 8] = rng.integers(0, 256, 3)
    pictures = [Image.fromarray(frame) for frame in frames]
    for name, options in (("a.gif", {}), ("a.webp", {"lossless": True})):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=100,
                         **options)
        for index in (range(20), [3, 11, 19], [19]):
            video, times = read_frames(tmp_path / name, lambda times: index, None)
            assert times == pytest.approx(np.array(index) / 10)
            error = np.abs(video.astype(int) - np.stack(frames)[index])
            assert error.max() < 9  # a GIF has few colours
    assert {name for name, _ in VideoFolder(tmp_path).items} == {"a.gif", "a.webp"}


@pytest.mark.parametrize("size", [24, 32, 64, 96, 100, 128, 200])
def test_scaled_frames_are_as_bright_as_they_were(tmp_path, size):
    y, x = np.mgrid[:120, :160]
    video = np.stack([128 + 60 * np.sin(x / 9 + k) * np.cos(y / 7 - k) for k in range(3)], -1)
    write(tmp_path / "a.mp4", video[None].round().astype(np.uint8), codec="libx264",
          options={"crf": "1"})
    full = read_frames(tmp_path / "a.mp4", every, None)[0][0]
    small = read_frames(tmp_path / "a.mp4", every, size)[0][0]
    width = round(160 * size / 120)
    scaled = np.stack([np.asarray(Image.fromarray(full[..., k].astype(np.float32)).resize(
        (width, size), Image.Resampling.BICUBIC)) for k in range(3)], -1)  # fmt: skip
    left = round((width - size) / 2)
    assert np.abs((small - scaled[:, left : left + size]).mean((0, 1))).max() < 0.2


def corners(frame):
    """Which colour each corner has, row by row."""
    height, width = frame.shape[:2]
    names = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white"}
    points = [frame[y, x] for y in (4, height - 5) for x in (4, width - 5)]
    return " ".join(names[tuple((point > 128).astype(int))] for point in points)


def colourful(height=32, width=48):
    frame = np.zeros((height, width, 3), np.uint8)
    frame[: height // 2, : width // 2, 0] = 255
    frame[: height // 2, width // 2 :, 1] = 255
    frame[height // 2 :, : width // 2, 2] = 255
    frame[height // 2 :, width // 2 :] = 255
    return frame


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_matrix"), reason="needs PyAV 18")
@pytest.mark.parametrize("matrix, expected", [
    ((1, 0, 0, 1), "red green blue white"), ((-1, 0, 0, 1), "green red white blue"),
    ((1, 0, 0, -1), "blue white red green"), ((-1, 0, 0, -1), "white blue green red"),
    ((0, 1, -1, 0), "blue red white green"), ((0, -1, 1, 0), "green white red blue"),
    ((0, 1, 1, 0), "red blue green white"), ((0, -1, -1, 0), "white green blue red"),
])  # fmt: skip
def test_the_display_matrix_turns_and_mirrors(tmp_path, matrix, expected):
    a, b, c, d = (65536 * n for n in matrix)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(colourful())))
        container.mux(stream.encode())
    frame = read_frames(tmp_path / "a.mp4", lambda times: [0], None)[0][0]
    assert frame.shape[:2] == ((32, 48) if a else (48, 32)) and corners(frame) == expected
    assert corners(read_frames(tmp_path / "a.mp4", lambda times: [0], (20, 36))[0][0]) == expected


@pytest.mark.parametrize("pixels", [Fraction(1, 2), Fraction(2), Fraction(64, 45)])
def test_pixels_need_not_be_square(tmp_path, pixels):
    y, x = np.mgrid[:96, : round(96 / pixels)]
    disc = ((x * float(pixels) - 48) ** 2 + (y - 48) ** 2 < 1600) * np.uint8(255)
    disc = disc[:, : disc.shape[1] // 2 * 2]
    write(tmp_path / "a.mp4", np.repeat(disc[None, ..., None], 3, -1), pixels=pixels)
    for size in (None, 64):
        frame = read_frames(tmp_path / "a.mp4", lambda times: [0], size)[0][0]
        wide, high = ((frame[..., 0] > 128).any(axis).sum() for axis in (0, 1))
        assert abs(wide - high) <= 2 and abs(high - 80 * len(frame) / 96) <= 2


def test_the_best_video_stream_is_read(tmp_path):
    """Not a thumbnail, be it the first and the larger one, nor a small preview."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        streams = []
        for codec, width, height in (("mjpeg", 96, 96), ("mpeg4", 32, 16), ("mpeg4", 64, 32)):
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height = width, height
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            streams.append(stream)
        for i, frame in enumerate(numbered(12)):
            for stream in streams[i > 0 :]:
                picture = np.asarray(Image.fromarray(frame).resize((stream.width, stream.height)))
                picture = av.VideoFrame.from_ndarray(picture)
                picture.pts = i
                container.mux(stream.encode(picture))
        for stream in streams:
            container.mux(stream.encode())
    assert numbers(read_frames(tmp_path / "a.mkv", every, None)[0]) == list(range(12))


def test_clips_of_any_shape_are_cut_out(tmp_path):
    write(tmp_path / "a.mp4", striped())
    for size in ((96, 32), (20, 60), (40, 40)):
        clip = VideoFolder(tmp_path, frames=3, size=size)[0].video
        assert clip.shape == (3, size[1], size[0], 3)
        middle = clip[:, :, size[0] // 2 - 2 : size[0] // 2 + 2].mean((0, 1, 2))
        assert middle[1] > 230 and middle[0] < 25 and middle[2] < 25


def test_a_size_that_changes_on_the_way(tmp_path):
    for name, (height, width) in (("1.ts", (32, 64)), ("2.ts", (64, 128))):
        write(tmp_path / name, np.repeat(greys(16, height, width), 1, 0), codec="mpeg2video")
    both = (tmp_path / "1.ts").read_bytes() + (tmp_path / "2.ts").read_bytes()
    (tmp_path / "1.ts").write_bytes(both)
    frames = whole(tmp_path / "1.ts")
    assert {frame.height for frame in frames} == {32, 64}
    video, _ = read_frames(tmp_path / "1.ts", every, 16)
    assert video.shape == (len(frames), 16, 16, 3) and len(frames) > 28
    grey = [frame.to_ndarray(format="rgb24").mean() for frame in frames]
    assert np.abs(video.mean((1, 2, 3)) - grey).max() < 3


def test_only_the_wanted_frames_are_converted(tmp_path, monkeypatch):
    converted, reformatter = [], av.video.reformatter.VideoReformatter()

    class Counting:
        def reformat(self, *args, **kwargs):
            converted.append(args)
            return reformatter.reformat(*args, **kwargs)

    monkeypatch.setattr(av.video.reformatter, "VideoReformatter", Counting)
    write(tmp_path / "a.mp4", greys())
    VideoFolder(tmp_path, frames=4, size=16)[0]
    assert len(converted) == 4


def test_frames_lie_evenly_in_time_not_in_number(tmp_path):
    """A GIF whose second half is shown at a tenth of the rate."""
    frames = [Image.fromarray(frame) for frame in greys(20)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:],
                   duration=[100] * 10 + [1000] * 10, loop=0)
    sample = VideoFolder(tmp_path, frames=6, size=16)[0]  # at 0, 2, 4, 6, 8 and 10 seconds
    assert which(sample.video) == [0, 11, 13, 15, 17, 19] and sample.fps == pytest.approx(0.5)


def test_strides_and_windows_start_anywhere(tmp_path):
    for i in range(12):
        write(tmp_path / f"{i:02d}.mp4", greys())

    def clips(**options):
        dataset = VideoFolder(tmp_path, frames=5, size=16, **options)
        return dataset, [dataset[i] for i in range(12)]

    dataset, samples = clips(stride=3)
    for i, sample in enumerate(samples):
        assert set(np.diff(which(sample.video))) == {3} and sample.fps == pytest.approx(25 / 3)
        assert (dataset[i].video == sample.video).all()  # the same every time
    starts = [which(s.video)[0] for s in samples]
    assert len(set(starts)) > 5 and max(starts) > 12 and max(starts) <= 18
    assert starts != [which(s.video)[0] for s in clips(stride=3, seed=1)[1]]

    samples = clips(clip_seconds=0.48)[1]  # 12 frame intervals, 3 for each step
    for sample in samples:
        assert sample.fps == pytest.approx(25 / 3, rel=0.1)
        assert set(np.diff(which(sample.video))) <= {2, 3, 4}
    assert len({which(s.video)[0] for s in samples}) > 5
    sample = clips(clip_seconds=60)[1][0]  # longer than the video: all of it
    assert which(sample.video)[0] == 0 and which(sample.video)[-1] == 30


def striped(count=20, height=40, width=120):
    """Red on the left, green in the middle, blue on the right, each a third."""
    video = np.zeros((count, height, width, 3), np.uint8)
    for i in range(3):
        video[:, :, i * width // 3 : (i + 1) * width // 3, i] = 255
    video[:, 0, 0, 0] = np.arange(count)  # GIF writers merge equal frames
    return video


@pytest.mark.parametrize("name", ["a.avi", "a.gif", "a"])
@pytest.mark.parametrize("tall", [False, True])
def test_the_centre_is_cut_out(tmp_path, name, tall):
    video = striped().swapaxes(1, 2) if tall else striped()
    write(tmp_path / name, video)
    for size in (20, 80):  # smaller and larger than the 40 pixels of the file
        clip = VideoFolder(tmp_path, frames=3, size=size)[0].video
        assert clip.shape == (3, size, size, 3)
        margin = size // 8  # compression smears the edges
        inner = clip[:, margin:-margin, margin:-margin].reshape(-1, 3).mean(0)
        assert inner[1] > 230 and inner[0] < 25 and inner[2] < 25, inner


def test_the_autoencoder_sees_all_places_and_times(tmp_path):
    write(tmp_path / "a.avi", striped())
    write(tmp_path / "b.avi", greys())
    dataset, rng = VideoFolder(tmp_path, frames=4, size=16), np.random.default_rng(0)
    colours = set()
    for _ in range(30):
        frames = dataset.random_frames(0, rng, 2)
        assert frames.shape == (2, 16, 16, 3)
        assert np.abs(frames[0].astype(int) - frames[1]).mean() < 5  # one place for both
        colours.add(int(frames.mean((0, 1, 2)).argmax()))
    assert colours == {0, 1, 2}
    times = {i for _ in range(30) for i in which(dataset.random_frames(1, rng, 2))}
    assert len(times) > 18 and max(times) > 26


def test_clips_are_mirrored_only_on_demand(tmp_path):
    for i in range(16):
        write(tmp_path / f"{i}.avi", striped(width=42))

    def left_is_red(**options):
        dataset = VideoFolder(tmp_path, frames=2, size=40, **options)
        return [bool(sample.video[:, :, :8].mean((0, 1, 2)).argmax() == 0) for sample in dataset]

    assert all(left_is_red())
    assert 3 < sum(left_is_red(flip=True)) < 13


def test_frames_are_not_kept_once_they_are_converted(tmp_path):
    write(tmp_path / "a.mp4", greys(20))
    gc.collect()
    gc.disable()  # or it would hide what refers to itself
    try:
        read_frames(tmp_path / "a.mp4", every, 16)
        assert sum(type(each) is av.VideoFrame for each in gc.get_objects()) < 4
    finally:
        gc.enable()


def test_a_4k_video_is_read(tmp_path):
    write(tmp_path / "a.mp4", greys(4, 2160, 3840), gop=4)
    sample = VideoFolder(tmp_path, frames=4, size=64)[0]
    assert sample.video.shape == (4, 64, 64, 3) and which(sample.video) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------ unusable videos


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def damage(path):
    """Overwrite the third quarter of a file with noise."""
    content = bytearray(path.read_bytes())
    middle = slice(len(content) // 2, len(content) * 3 // 4)
    content[middle] = np.random.default_rng(0).bytes(len(content[middle]))
    path.write_bytes(content)


BAD = {
    "text.avi": (lambda path: path.write_text("this is not a video\n" * 99), "nvalid data"),
    "empty.mp4": (lambda path: path.write_bytes(b""), "nvalid data"),
    "nowhere.mp4": (lambda path: path.symlink_to("gone.mp4"), "no such file"),
    "one.mp4": (lambda path: write(path, greys(1)), "too short: 1 frames, and a clip needs 4"),
    "one.gif": (lambda path: write(path, greys(1)), "too short: 1 "),
    "one": (lambda path: write(path, greys(1)), "too short: 1 "),
    "short.avi": (lambda path: write(path, greys(3)), "too short: 3 "),
    "picture/0.png": (lambda path: path.write_text("not a picture"), "too short|identify"),
}
for suffix in ("avi", "mkv", "mp4", "mov", "webm", "webp"):
    for share in (0.05, 0.5, 0.99):
        BAD[f"cut {share}.{suffix}"] = (
            lambda path, share=share: (write(path, noise()), cut(path, share)),
            "truncated|nvalid|decoder|identify",
        )
BAD["front.mp4"] = (lambda path: (write(path, noise(), movflags="faststart"), cut(path, 0.9)),
                    "truncated")  # fmt: skip
BAD["damaged.avi"] = (lambda path: (write(path, noise()), damage(path)), "truncated|damaged|nvalid")


def noise(count=31):
    return np.random.default_rng(0).integers(0, 255, (count, 32, 48, 3), np.uint8)


@pytest.mark.parametrize("name", BAD)
def test_an_unusable_video_is_skipped_with_the_reason(tmp_path, name):
    make, reason = BAD[name]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    make(tmp_path / name)
    write(tmp_path / "good.avi", greys())
    dataset = VideoFolder(tmp_path, frames=4, size=16)
    samples = dict(read_ahead(dataset, range(2), workers=2))
    (bad,) = [i for i in range(2) if samples[i] is None]
    assert which(samples[1 - bad].video) == [0, 10, 20, 30]
    ((skipped, why),) = dataset.skipped.items()
    assert skipped == name.split("/")[0] and len(why.splitlines()) == 1
    with pytest.raises(VideoError, match=reason):
        dataset[bad]
    if not name.startswith("damaged"):  # of which some frames are whole
        with pytest.raises(VideoError, match=reason):
            dataset.random_frames(bad, np.random.default_rng(0), 2)


def test_frames_that_make_no_video(tmp_path, monkeypatch):
    """A folder without any, which only a caption file can name; some of another size, where no size
    is asked for; one that is too large."""
    clip = tmp_path / "clip"
    clip.mkdir()
    (tmp_path / "captions.csv").write_text("file,caption\nclip,nothing\n")
    with pytest.raises(VideoError, match="a folder without pictures"):
        VideoFolder(tmp_path, frames=4, size=16).random_frames(0, np.random.default_rng(0), 2)
    for i in range(4):
        Image.new("RGB", (16, 16 + 16 * (i == 3))).save(clip / f"{i}.png")
    assert read_frames(clip, every, 16)[0].shape == (4, 16, 16, 3)
    with pytest.raises(VideoError, match="same shape"):
        read_frames(clip, every, None)
    monkeypatch.setattr(data, "MAX_PIXELS", 300)
    with pytest.raises(VideoError, match="16 x 32 pixels are too many"):
        read_frames(clip, every, 4)


def test_a_folder_of_frames_is_one_series(tmp_path):
    def lengths(*names):
        clip = tmp_path / str(len(list(tmp_path.iterdir())))
        clip.mkdir()
        for i, name in enumerate(names):
            Image.new("L", (8, 8), 10 * i).save(clip / name)
        return (read_frames(clip, every, None)[0][:, 0, 0, 0] // 10).tolist()

    assert lengths("cover.jpg", "f_10.png", "f_9.png", "f_11.png") == [2, 1, 3]
    assert lengths("c.png", "a.png", "b.png") == [1, 2, 0]
    with pytest.raises(VideoError, match="two series .*flow_x_1.jpg and img_1.jpg"):
        lengths("img_1.jpg", "flow_x_1.jpg", "img_2.jpg", "flow_x_2.jpg")


def bomb_gif(path):
    """A canvas of 60,000 x 60,000 pixels in a few bytes."""
    write_video(path, np.zeros((2, 8, 8, 3), np.uint8))
    content = bytearray(path.read_bytes())
    content[6:10] = struct.pack("<2H", 60_000, 60_000)
    path.write_bytes(content)


def postscript(path):
    trace = path.with_name("trace")
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"
                    f"({trace}) (w) file closefile\nshowpage\n%%EOF\n")


def concatenation(path):
    write(path.with_name(".good.mp4"), greys())
    path.write_text("ffconcat version 1.0\nfile .good.mp4\n")


def playlist(path):
    write(path.with_name(".good.ts"), greys())
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\n.good.ts\n#EXT-X-ENDLIST\n")


UNSAFE = {
    "narrow.png": (lambda path: Image.new("1", (1, 2 * 10**6)).save(path), "too many"),
    "large.png": (lambda path: Image.new("1", (12_000, 12_000)).save(path), "too many"),
    "bomb.gif": (bomb_gif, "nvalid|too many"),
    "script.png": (postscript, "cannot identify"),
    "list.mp4": (concatenation, "no video of a known kind|nvalid"),
    "concat.avi": (concatenation, "no video of a known kind|nvalid"),
    "hls.mkv": (playlist, "no video of a known kind|nvalid"),
    "pipe.png": (os.mkfifo, "not a file"),
    "pipe.mp4": (os.mkfifo, "not a file"),
    "pipe.webp": (os.mkfifo, "not a file"),
    "device.mp4": (lambda path: path.symlink_to("/dev/zero"), "not a file"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", UNSAFE)
def test_what_a_file_holds_is_neither_run_nor_followed_nor_blown_up(tmp_path, name):
    make, reason = UNSAFE[name]
    make(tmp_path / name)
    before = sorted(tmp_path.iterdir())
    readers = [lambda: read_frames(tmp_path / name, every, 16),
               lambda: read_frames(tmp_path / name, every, None)]  # fmt: skip
    if Path(name).suffix in data.IMAGES:
        (tmp_path / "clip").mkdir()
        (tmp_path / name).rename(tmp_path / "clip" / name)
        readers = [lambda: read_frames(tmp_path / "clip", every, 16),
                   lambda: read_image(tmp_path / "clip" / name, 16)]  # fmt: skip
        before = [tmp_path / "clip"]
        if name == "narrow.png":
            readers.pop()  # its middle is one pixel
    for reader in readers:
        with pytest.raises(VideoError, match=reason) as error:
            reader()
        assert len(str(error.value).splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_an_error_of_the_disk_may_pass(tmp_path, monkeypatch):
    for name in "ab":
        write(tmp_path / f"{name}.mp4", greys())
    (tmp_path / "c.mp4").write_text("broken")
    dataset, is_open = VideoFolder(tmp_path, frames=4, size=16), av.open

    def failing(path, *args, **kwargs):
        if path.endswith("a.mp4"):
            raise OSError(errno.EIO, "Input/output error")
        return is_open(path, *args, **kwargs)

    monkeypatch.setattr(av, "open", failing)
    samples = dict(read_ahead(dataset, range(3)))
    assert samples[0] is samples[2] is None and samples[1] is not None
    assert set(dataset.skipped) == {"a.mp4", "c.mp4"}
    monkeypatch.undo()
    assert which(dataset[0].video) == [0, 10, 20, 30]


def test_nothing_left_is_an_error(tmp_path):
    for name in ("text.avi", "empty.mp4", "one.gif"):
        BAD[name][0](tmp_path / name)
    dataset = VideoFolder(tmp_path, frames=4)
    with pytest.raises(DataError, match="none of the 3 videos in .* can be used; empty.mp4: "):
        list(read_ahead(dataset, range(3)))
    assert set(dataset.skipped) == {"text.avi", "empty.mp4", "one.gif"}
    with pytest.raises(DataError):  # and stays one
        dataset[1]


# ------------------------------------------------------------------------------ captions


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def fill(folder, files):
    """Makes files: {name: what is in them}, empty ones for None."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = content if isinstance(content, bytes) else (content or "").encode()
        (folder / name).write_bytes(content)


DOG, CAT = "a dog runs", "a cat sleeps"
PAIR = {"a.mp4": DOG, "b.mp4": CAT}
BELOW = {f"train/{name}": caption for name, caption in PAIR.items()}
VIDEO_PAIR = {f"videos/{name}": caption for name, caption in PAIR.items()}
CSV = f"file,caption\na.mp4,{DOG}\nb.mp4,{CAT}\n"
JSON = [{"path": "a.mp4", "cap": [DOG]}, {"path": "b.mp4", "cap": [CAT]}]
LAYOUTS = {
    "captions.csv": (PAIR, {"captions.csv": "\ufeff" + CSV}),
    "any name, any capitals": (PAIR, {"My Clips.CSV": CSV.replace("file,cap", "File Name,Cap")}),
    "semicolons": (PAIR, {"metadata.csv": CSV.replace(",", ";")}),
    "tabs": (PAIR, {"train.tsv": CSV.replace(",", "\t")}),
    "tabs in a csv": (PAIR, {"train.csv": CSV.replace(",", "\t")}),
    "UTF-16": (PAIR, {"captions.csv": CSV.encode("utf-16")}),
    "Windows": (PAIR, {"dataset.csv": CSV.replace("\n", "\r\n").encode()}),
    "quotes": (PAIR | {"a.mp4": "one, two"}, {
        "captions.csv": f'file,caption\na.mp4, "one, two"\n\nb.mp4,"{CAT}"\n'}),
    "a caption in two lines": (PAIR, {
        "captions.csv": f'file,caption\na.mp4,"a dog\nruns"\nb.mp4,{CAT}\n'}),
    "more columns": (PAIR, {"metadata.csv": "id,text,fps,video_path\n" + "".join(
        f"{i},{c},25,{v}\n" for i, (v, c) in enumerate(PAIR.items()))}),
    "Hugging Face": (BELOW, {"train/metadata.csv": CSV.replace("file,caption", "file_name,text")}),
    "Hugging Face, jsonl": (BELOW, {"train/metadata.jsonl": "".join(
        json.dumps({"file_name": v, "text": c}) + "\n\n" for v, c in PAIR.items())}),
    "two tables": (PAIR | {"train/c.mp4": DOG}, {
        "captions.csv": CSV, "train/captions.csv": f"file,caption\nc.mp4,{DOG}\n"}),
    "twice the same": (PAIR, {"captions.csv": CSV, "a.txt": DOG + "\n", "b.TXT": CAT}),
    "paths from the folder": (BELOW, {"train/captions.csv": CSV.replace("\n", "\ntrain/", 2)}),
    "paths of Windows": (BELOW, {"captions.csv": CSV.replace("\n", "\ntrain\\", 2)}),
    "paths to elsewhere": ({"../far.mp4": DOG}, {"captions.csv": f"file,text\n../far.mp4,{DOG}\n"}),
    "json, rows": (PAIR, {"videos2caption.json": json.dumps(JSON)}),
    "json, names": (PAIR, {"captions.json": json.dumps(PAIR)}),
    "json, rows by name": (PAIR, {
        "x.json": json.dumps({v: {"prompt": c} for v, c in PAIR.items()})}),
    "several in a list": ({"a.mp4": [DOG, "it barks"]}, {
        "a.jsonl": json.dumps({"media_path": "a.mp4", "caption": [DOG, "it barks", DOG]})}),
    "several rows": ({"a.mp4": [DOG, "it barks"]}, {
        "captions.csv": f"file,caption\na.mp4,{DOG}\na.mp4,it barks\n"}),
    "finetrainers": (VIDEO_PAIR, {
        "prompts.txt": f"{DOG}\n{CAT}\n", "videos.txt": "videos/a.mp4\nvideos/b.mp4\n"}),
    "CogVideoX": (VIDEO_PAIR, {"labels/a.txt": DOG, "labels/b.txt": CAT}),
    "captions beside videos": (
        {f"x/videos/1/{name}": caption for name, caption in PAIR.items()},
        {"x/captions/1/a.txt": DOG, "x/captions/1/b.txt": CAT}),
    "a .txt for each": ({"Archery/a.b.mp4": ["one", "two"], "c.webm": "drei", "frames": "four"}, {
        "Archery/a.b.txt": "one\n\n two\n", "c.TXT": "\ufeff drei ", "frames.txt": "four",
        "frames/1.jpg": None}),
    "one .txt for two videos": ({"a.avi": "one", "a.mp4": "one"}, {"a.txt": "one"}),
    "name.mp4.txt": (PAIR, {"a.mp4.txt": DOG, "b.mp4.txt": CAT}),
    "classes": ({
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi": "a person applies eye makeup",
        "YoYo/a.avi": "a person plays with a yo-yo", "RidingAUnicycle/a.MP4": "riding a unicycle",
        "wave_one-hand/deep/er/a.mov": "er", "train/running/1.mp4": "running",
        "sleeping/test/2.mpg": "sleeping"}, {"wave_one-hand/notes.pdf": None}),
    "flat UCF-101": ({"v_YoYo_g01_c02.avi": "a person plays with a yo-yo",
                      "x/v_HandStandPushups_g01_c02.avi":
                      "a person does push-ups in a handstand"}, {}),
    "empty rows": (PAIR, {"captions.csv": CSV.replace("\nb", "\n,\nb") + ",\n,\n"}),
    "a number and a path": (PAIR, {"captions.csv": "video,path,caption\n" + "".join(
        f"{i},{v},{c}\n" for i, (v, c) in enumerate(PAIR.items()))}),
    "accents of a Mac": ({"cafe\u0301.mp4": DOG, "\u00e9.mp4": CAT}, {
        "captions.csv": f"file,caption\ncaf\u00e9.mp4,{DOG}\ne\u0301.mp4,{CAT}\n"}),
    "numbers that are no names": ({"run/1.mp4": "run", "sit/2.mp4": "sit"}, {
        "stats.json": '{"mean": 1,\n"unit": "pixels"}'}),
    "folders of programs": ({"a dog.mp4": "a dog"}, {
        "@eaDir/a dog.mp4": None, "#recycle/b.mp4": None}),
    "names of files": ({
        "a_dog runs-Fast.mp4": "a dog runs fast", "clip7": "clip7", "ein Hund läuft.gif":
        "ein hund läuft", "videos/ride.ts": "ride"}, {
        "clip7/0.png": None, "notes.txt": "Nothing.", ".hidden.mp4": None, ".cache/a.mp4": None,
        "._a_dog runs-Fast.mp4": None, "samples.zip": None, "README.md": "a_dog runs-Fast.mp4: hm",
        "durations.csv": "file,seconds\nclip7,3.5\n", "state.json": "{}"}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captions_are_found_in_every_layout(tmp_path, layout):
    expected, files = LAYOUTS[layout]
    folder = tmp_path / "data"
    touch(folder, *(name for name in expected if Path(name).suffix))
    fill(folder, files)
    items, source = find_captions(folder)
    assert dict(items) == expected and len(items) == len(expected) and source
    if not files or not any(Path(f).suffix.lower() in data.CAPTION_KINDS for f in files):
        assert items == sorted(items)


def test_captions_beside_the_folder_of_videos_are_found_from_there(tmp_path):
    touch(tmp_path, "videos/a.mp4", "videos/deep/b.mp4")
    fill(tmp_path, {"labels/a.txt": DOG, "labels/deep/b.txt": CAT})
    assert find_captions(tmp_path / "videos")[0] == [("a.mp4", DOG), ("deep/b.mp4", CAT)]


WRONG = {
    "other columns": ({"captions.csv": "clip_id,words\na.mp4,hi\n"},
        "captions.csv .* clip_id, words"),
    "no header": ({"captions.csv": "a.mp4,hi\nb.mp4,ho\n"}, "its columns are a.mp4, hi"),
    "no header, any name": ({"list.csv": "a.mp4,he runs\nb.mp4,ho\n"}, "list.csv looks like"),
    "no caption": ({"captions.csv": "file,caption\na.mp4\n"}, "captions.csv, line 2: no caption"),
    "empty": ({"captions.csv": "file,caption\na.mp4,hi\nz.mp4,  \n"}, "line 3: no caption"),
    "number": ({"captions.csv": "file,caption\na.mp4,hi\nz.mp4,3.5\n"}, "line 3: no caption"),
    "nan": ({"captions.csv": "file,caption\na.mp4,nan\n"}, "line 2: no caption"),
    "n/a": ({"captions.csv": "file,caption\na.mp4,N/A\n"}, "line 2: no caption"),
    "no width": ({"captions.csv": "file,caption\na.mp4,\u200b \ufeff\n"}, "line 2: no caption"),
    "no file": ({"captions.csv": "file,caption\n,hi\n"}, "line 2: no name"),
    "comma": ({"captions.csv": "file,caption\na.mp4,one, two\n"}, "line 2 .*quotation marks"),
    "only columns": ({"captions.csv": "file,caption\n"}, "captions.csv .* empty"),
    "nothing": ({"captions.csv": ""}, "captions.csv .* empty"),
    "not text": ({"captions.csv": b"file,caption\na.mp4,\xff\xfe\n"}, "captions.csv .*utf-8"),
    "none there": ({"captions.csv": "file,caption\nb.mp4,hi\nc.mp4,ho\n"},
        "none of the 2 .* b.mp4"),
    "open quote": ({"captions.csv": 'file,caption\na.mp4,"hi\nz.mp4,ho\n'}, "line 2: .* quotation"),
    "open quotes": ({"captions.csv": 'file,caption\na.mp4,"hi\nz.mp4,"ho\n'},
        "line 2: .* quotation"),
    "two open quotes": ({"captions.csv": 'file,caption\na.mp4,"hi\nz.mp4,"\n'}, "quotation"),
    "broken line": ({"a.jsonl": '{"file": "a.mp4", "caption": "hi"}\n{"file": \n'}, "line 2: "),
    "no names": ({"a.json": '{"about": "he runs", "seconds": 3}'}, "a.json looks like captions"),
    "a list": ({"captions.jsonl": '["a.mp4", "hi"]'}, "line 1 is no"),
    "a number in json": ({"metadata.jsonl": '{"file_name": "a.mp4", "caption": 3}'},
        "line 1: no cap"),
    "no list": ({"captions.json": '[{"file": "a.mp4", "caption": []}]'}, "entry 1: no caption"),
    "null": ({"captions.json": '[{"file": "a.mp4", "caption": null}]'}, "entry 1: no caption"),
    "too deep": ({"captions.json": "[" * 100_000}, "recursion"),
    "wrapped": ({"x.json": '{"database": {"a": {"subset": "x", "about": "he runs"}}}'},
        "x.json looks"),
    "unequal lists": ({"prompts.txt": "hi\n", "videos.txt": "a.mp4\nz.mp4\n"}, "1 lines, .* 2"),
    "an empty line": ({"prompts.txt": "hi\n\nho\n", "videos.txt": "a.mp4\nz.mp4\na.mp4"}, "line 2"),
    "one list": ({"prompts.txt": "hi\nho\n"}, "prompts.txt looks like captions"),
    "one text": ({"a.txt": "hi"}, "1 of 2 videos .* such as z.mp4"),
    "an empty text": ({"a.txt": "", "z.txt": "hi"}, "a.txt looks like captions .* empty"),
    "a label": ({"a.txt": "hi", "z.txt": "hi\n0 0.5 0.25\n"}, "z.txt, line 2: no caption"),
    "texts elsewhere": ({"texts/a.txt": "hi", "texts/z.txt": "ho"}, "texts/a.txt looks like"),
    "json beside": ({"a.json": '{"duration": 3}', "z.json": "{}"}, "a.json looks like captions"),
    "subtitles": ({"a.srt": "hi"}, "a.srt looks like captions"),
    "parquet": ({"x.parquet": b"PAR1\0\xff"}, "x.parquet looks like captions"),
    "spreadsheet": ({"clips.xlsx": b"PK\3\4"}, "clips.xlsx looks like captions"),
    "a list of both": ({"list.txt": "a.mp4 a dog runs\nz.mp4 a cat\n"}, "list.txt looks like"),
    "by stem": ({"list.txt": "a: a dog runs\nz: a cat\n"}, "list.txt looks like captions"),
    "two versions": ({"captions.csv": "file,caption\na.mp4,hi\n", "a.txt": "ho"},
        "different captions"),
    "one unused": ({"captions.csv": "file,caption\na.mp4,hi\n", "annotations.json": "{}"},
                   "annotations.json looks like"),
    "hidden way out": ({"captions.csv": "file,caption\nx/../../far.mp4,hi\n"},
        "none of the 1 files"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_captions_that_are_wrong_or_unused_are_refused(tmp_path, kind):
    """In one line that names the file, and the line in it."""
    files, message = WRONG[kind]
    touch(tmp_path, "far.mp4", "data/a.mp4", "data/z.mp4", "data/x/readme.md")
    fill(tmp_path / "data", files)
    with pytest.raises(DataError, match=message) as error:
        VideoFolder(tmp_path / "data")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_captions_named_by_numbers_are_not_overlooked(tmp_path):
    fill(tmp_path, {"run/1.mp4": None, "run/2.mp4": None, "run/3.mp4": None,
                    "list.json": '{"1": "a dog",\n"2": "a cat",\n"3": "a bird"}'})
    with pytest.raises(DataError, match="list.json looks like captions"):
        find_captions(tmp_path)


def test_whole_paths_are_found_from_anywhere(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    fill(folder, {"x/a.mp4": None, "captions.csv": f"file,caption\n{folder}/x/a.mp4,{DOG}\n"})
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder / "x")
    for path in (folder, Path(".."), tmp_path / "data/../data", tmp_path / "link"):
        dataset = VideoFolder(path)
        assert dataset.items == [("x/a.mp4", DOG)] and not dataset.left_out


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "run/1.mp4", "sit/2.mp4")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("run"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match="run: Permission denied"):
        find_captions(tmp_path)


def test_pipes_that_are_named_like_captions_are_not_opened(tmp_path):
    touch(tmp_path, "a.mp4")
    for name in ("captions.csv", "a.txt"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match=f"{name} looks like captions .*not a file"):
            find_captions(tmp_path)
        (tmp_path / name).unlink()


def test_a_partial_download_gives_what_is_there(tmp_path):
    touch(tmp_path, "a.mp4", "unnamed.mp4")
    rows = "".join(f"{name}.mp4,number {name} moves\n" for name in "abcd")
    fill(tmp_path, {"captions.csv": f"file,caption\n{rows}"})
    dataset = VideoFolder(tmp_path)
    assert dataset.items == [("a.mp4", "number a moves")]
    assert set(dataset.skipped) == {"b.mp4", "c.mp4", "d.mp4"}
    assert "captions.csv" in dataset.skipped["b.mp4"]
    text = "\n".join(dataset.summary())
    assert "1 videos without a caption are left out, such as unnamed.mp4" in text
    assert "3 videos that captions name are not there, such as b.mp4" in text


def test_one_of_several_captions_is_drawn_for_each_clip(tmp_path):
    for name in "abcdefgh":
        write(tmp_path / f"{name}.mp4", greys())
        (tmp_path / f"{name}.txt").write_text(f"{name} one\n{name} two\n{name} three\n")
    dataset = VideoFolder(tmp_path, frames=4, size=16)
    assert dataset.captions(1) == ["b one", "b two", "b three"]
    drawn, other = ([VideoFolder(tmp_path, seed=seed).caption(i) for i in range(8)]
                    for seed in (0, 1))
    assert all(caption in dataset.captions(i) for i, caption in enumerate(drawn))
    assert len({caption[2:] for caption in drawn}) > 1 and drawn != other
    assert drawn == [dataset[i].caption for i in range(8)]


@pytest.mark.parametrize("names, lines, warning", [
    (["x/run/1.mp4", "x/run/2.mp4", "x/sleep/3.mp4", "notes.pdf", "b.zip"],
     ["3 videos, 2 different captions", '2 x "run"', '1 x "sleep"', "2 other files .* b.zip"],
     None),
    (["videos/run/1.mp4", "videos/run/2.mp4"], ["2 videos, 1 different"],
     "all captions are the same"),
    (["clip_0001.mp4", "clip_0002.mp4", "clip_0003.mp4"], ["3 videos, 3 diff"],
     "cannot be learned"),
])  # fmt: skip
def test_the_summary_tells_what_will_be_learned(tmp_path, names, lines, warning):
    touch(tmp_path, *names)
    text = VideoFolder(tmp_path).summary()
    for line in lines:
        assert any(re.match(line, found) for found in text), (line, text)
    assert [re.search(warning or "-", t) is not None for t in text if t.startswith("warning")] == (
        [True] if warning else []
    )


def test_the_table_has_the_101_classes():
    assert len(UCF101) == len(set(UCF101.values())) == 101
    for name, sentence in UCF101.items():
        assert name.isalpha() and sentence == " ".join(sentence.lower().split())
        assert len(sentence.split()) > 1
    if REAL.is_dir():
        lines = (REAL / "ucfTrainTestlist/classInd.txt").read_text().split()
        assert set(UCF101) == set(lines[1::2])


def test_folders_without_videos_are_refused(tmp_path):
    touch(tmp_path, "notes.txt", "sub/readme.md")
    with pytest.raises(DataError, match="no videos in"):
        VideoFolder(tmp_path)
    for wrong in (tmp_path / "gone", tmp_path / "notes.txt"):
        with pytest.raises(DataError, match="neither a folder of videos nor"):
            VideoFolder(wrong)


def test_links_circles_and_odd_names_work(tmp_path, monkeypatch):
    root = tmp_path / "root"
    write(tmp_path / "elsewhere" / "far" / "a.mp4", greys())
    names = {"a:b.mp4", "100% 走る 🎬.mp4", "--steps.mp4", "deep er/x.avi"}
    for name in names:
        write(root / name, greys())
    (root / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "deep er" / "circle").symlink_to(root, target_is_directory=True)
    (root / "file.mp4").symlink_to(tmp_path / "elsewhere" / "far" / "a.mp4")
    dataset = VideoFolder(root, frames=4, size=16)
    assert {name for name, _ in dataset.items} == names | {"linked/far/a.mp4", "file.mp4"}
    for sample in dataset:
        assert which(sample.video) == [0, 10, 20, 30]
    monkeypatch.chdir(root)  # a relative path must not be taken for a protocol
    assert len(list(VideoFolder(".", frames=4, size=16))) == 6


# ------------------------------------------------------------------------------ the data set


def test_splits_are_the_official_lists(tmp_path):
    root = tmp_path / "UCF-101"
    names = [f"YoYo/v_YoYo_g{i:02d}_c01.avi" for i in range(4)]
    touch(root, *names)
    with pytest.raises(DataError, match="no trainlist01.txt"):
        VideoFolder(root, split="train01")
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist01.txt").write_text(f"{names[2]} 101\r\nYoYo/v_YoYo_g09_c01.avi 101\r\n")
    (lists / "testlist01.txt").write_text(f"{names[0]}\n{names[3]}\n")
    (lists / "testlist02.txt").write_text("YoYo/v_YoYo_g09_c01.avi\n")
    for split, expected in (("train01", names[2:3]), ("test01", [names[0], names[3]])):
        for folder in (root, tmp_path):  # the lists lie beside the folder, or in it
            found = [name for name, _ in VideoFolder(folder, split=split).items]
            assert [name.removeprefix("UCF-101/") for name in found] == expected
    with pytest.raises(DataError, match="--split test02 matches none"):
        VideoFolder(root, split="test02")
    for wrong in ("train", "train04", "../train01", "val01"):
        with pytest.raises(DataError, match="unknown split"):
            VideoFolder(root, split=wrong)


def test_some_videos_are_held_out(tmp_path):
    touch(tmp_path, *(f"{i:02d}.mp4" for i in range(45)))
    dataset = VideoFolder(tmp_path)
    rest, held = dataset.divide()
    assert [name for name, _ in held.items] == ["00.mp4", "20.mp4", "40.mp4"]
    assert sorted(rest.items + held.items) == dataset.items and len(rest) == 42
    assert rest.skipped is held.skipped
    touch(tmp_path / "single", "a.mp4")
    rest, held = VideoFolder(tmp_path / "single").divide()
    assert rest.items == held.items == [("a.mp4", "a")]


def test_the_identity_tells_files_and_settings_apart(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "c.mp4").symlink_to("nowhere")
    seen = {VideoFolder(tmp_path).identity()}
    assert VideoFolder(tmp_path).identity() in seen
    others = [{"size": 32}, {"frames": 8}, {"stride": 2}, {"clip_seconds": 1.0}, {"flip": True}]
    seen |= {VideoFolder(tmp_path, **other).identity() for other in others}
    (tmp_path / "a.mp4").write_text("changed")
    seen.add(VideoFolder(tmp_path).identity())
    moved = tmp_path.with_name("moved")
    shutil.copytree(tmp_path, moved, symlinks=True, copy_function=shutil.copyfile)
    assert VideoFolder(moved).identity() in seen  # what counts is what is in it
    (tmp_path / "b.mp4").rename(tmp_path / "d.mp4")
    seen.add(VideoFolder(tmp_path).identity())
    assert len(seen) == 8
    assert MovingShapes(3).identity() != MovingShapes(3, seed=1).identity()


def test_threads_that_work_ahead_leave_the_cores_to_the_step():
    before = torch.get_num_threads()
    assert set(prefetch(lambda item: torch.get_num_threads(), range(9), workers=3)) == {1}
    assert torch.get_num_threads() == before


def test_prefetch_keeps_the_order_and_works_ahead():
    started, all_started = [], threading.Event()

    def slow(i):
        started.append(i)
        if len(started) >= 4:
            all_started.set()
        time.sleep(0.002 * (i % 3))
        return i * i

    results = prefetch(slow, range(20), workers=2)
    assert next(results) == 0
    assert all_started.wait(5)  # although nobody has asked for them yet
    assert list(results) == [i * i for i in range(1, 20)]

    def failing(i):
        if i == 3:
            raise VideoError("three")
        return i

    results = prefetch(failing, range(6), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(VideoError, match="three"):
        next(results)


def test_a_read_that_hangs_does_not_keep_the_program(tmp_path):
    script = tmp_path / "hang.py"
    script.write_text("import sys, threading\nsys.path.insert(0, sys.argv[1])\n"
                      "from data import prefetch\n"
                      "def hang(i):\n    print(i, flush=True)\n    threading.Event().wait()\n"
                      "next(prefetch(hang, range(9), 1))\n")
    process = subprocess.Popen([sys.executable, script, Path(data.__file__).parent], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.stdout.readline() == "0\n"
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
        process.stdout.close()


# ------------------------------------------------------------------------------ real videos


@needs_real
@pytest.mark.parametrize("degrees, turns", [(90, -1), (180, 2)])
def test_the_rotation_of_phones_is_respected(degrees, turns):
    """turns: counter-clockwise quarters that put these films upright, found by looking at them."""
    path = REAL / "containers" / f"decord_rot_video_{degrees}.mov"
    video, _ = read_frames(path, every, 64)
    raw = iio.imread(path, plugin="pyav")
    upright = np.rot90(raw, turns, (1, 2))[..., :3]
    height, width = upright.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    for frame, expected in zip(video, upright[:, top : top + side, left : left + side]):
        expected = np.asarray(Image.fromarray(np.ascontiguousarray(expected)).resize((64, 64)))
        assert np.abs(frame.astype(int) - expected).mean() < 6


@needs_real
@pytest.mark.parametrize("folder", ["containers", "weizmann", "UCF-101"])
def test_real_frames_are_those_of_a_decode_of_the_whole_file(folder):
    """Of six files of each folder, always the same."""
    rng = np.random.default_rng(0)
    paths = [path for path in sorted(REAL.glob(f"{folder}/**/*.*"))
             if path.suffix in data.VIDEOS and "_rot_" not in path.name]
    for path in rng.permutation(paths)[:6]:
        frames = whole(path)
        count = len(frames)
        start = rng.integers(max(count - 16, 1))
        run = range(start, min(start + 6, count))
        spread = np.linspace(0, count - 1, 5).astype(int).tolist()
        check_frames(path, [sorted({*spread, *run})], frames)


@needs_real
def test_real_files_of_every_kind_are_read():
    dataset = VideoFolder(REAL / "containers", frames=3, size=32)
    assert len(dataset) == 7 and len(list(dataset)) == 7 and not dataset.skipped
    dataset = VideoFolder(REAL / "weizmann", size=64)
    assert len(dataset) == 36 and dataset.source == "captions.csv"
    assert dataset.items[0][1] == "a person waving one hand"
    video = iio.imread(REAL / "weizmann" / dataset.items[0][0], plugin="pyav")
    sample = dataset[0]
    error = sample.video[[0, -1]].astype(int) - video[[0, -1]]
    assert np.abs(error).mean() < 3
    assert sample.fps == pytest.approx(25 * 15 / (len(video) - 1))


@needs_real
def test_ucf101_is_read_as_it_is():
    dataset = VideoFolder(REAL / "UCF-101")
    assert len(dataset) == 87
    assert {caption for _, caption in dataset.items} <= set(UCF101.values())
    sample = dataset[0]
    assert sample.caption == "a person shoots an arrow with a bow"
    assert sample.video.shape == (16, 64, 64, 3) and sample.video.std() > 20
    parts = [VideoFolder(REAL / "UCF-101", split=split) for split in ("train01", "test01")]
    assert sorted(parts[0].items + parts[1].items) == dataset.items


# ------------------------------------------------------------------------------ reading pictures


def write_png(video, path="x.png", **options):
    Image.fromarray(video[0]).save(path, **options)
    return path


@pytest.mark.parametrize("upscale", [1, 3])
def test_a_picture_enlarged_for_viewing_is_read_as_it_was(tmp_path, upscale):
    frame = MovingShapes(1, size=32)[0].video[:1]
    path = write_png(frame.repeat(upscale, 1).repeat(upscale, 2), tmp_path / "x.png")
    assert np.array_equal(read_image(path, 32), frame[0])
    write_video(tmp_path / "x.gif", frame, upscale=upscale)
    clip, _ = read_frames(tmp_path / "x.gif", lambda times: [0], None)
    picture = middle_part(clip[0], 32)
    assert np.abs(picture.astype(int) - frame).max() <= 8  # a GIF has 256 colours


def test_the_middle_of_a_picture_is_taken(tmp_path):
    wide = np.zeros((1, 40, 100, 3), np.uint8)
    wide[:, :, 30:70] = 200
    assert (read_image(write_png(wide, tmp_path / "x.png"), 20) == 200).all()
    turned = Image.Exif()
    turned[0x0112] = 6  # a phone's label: to be shown with a quarter turn
    wide[:, :20, 30:70] = 100
    picture = read_image(write_png(wide, tmp_path / "x.png", exif=turned), 20)
    assert (picture[:, :10] == 200).all() and (picture[:, 10:] == 100).all()


def test_pictures_keep_their_brightness_and_stand_upright(tmp_path):
    """Also in a folder of frames, whatever kind they are of and whatever their names."""
    values = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    grey = np.repeat(values[..., None], 3, -1)
    turned = Image.Exif()
    turned[0x0112] = 6
    clip = tmp_path / "clip"
    clip.mkdir()
    Image.fromarray(grey).save(clip / "1.tif")
    Image.fromarray(values.astype(np.uint16) * 257).save(clip / "2².png")
    Image.fromarray(values.astype(np.uint16) * 257).save(clip / "3.TIFF")
    Image.fromarray(values / np.float32(255)).save(clip / "10.tiff")
    Image.fromarray(np.rot90(grey).copy()).save(clip / "11.png", exif=turned)
    Image.fromarray(values).save(clip / "12.bmp")
    video, _ = read_frames(clip, every, None)
    assert video.shape == (6, 8, 8, 3)
    for frame in video:
        assert np.array_equal(frame, grey)
    assert np.array_equal(read_image(clip / "2².png", 8), grey)
    for name, low, high in (("high.tiff", 0, 255), ("low.tiff", -1, 1), ("nan.tiff", np.nan, 1)):
        values = np.linspace(low, high, 64, dtype=np.float32).reshape(8, 8)
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(VideoError, match="do not lie between 0 and 1"):
            read_image(tmp_path / name, 8)


def test_what_is_transparent_is_white_whatever_its_colour(tmp_path):
    """In pictures, with and without a palette, in folders of them, in animations and in videos."""
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[..., 1] = 200  # a hidden green
    clear[2:6, 2:6] = 230, 45, 45, 255
    seen = np.full((8, 8, 3), 255, np.uint8)
    seen[2:6, 2:6] = 230, 45, 45
    picture, clip = Image.fromarray(clear), tmp_path / "clip"
    clip.mkdir()
    picture.save(clip / "0.png")
    picture.quantize(4).save(clip / "1.png")
    picture.save(clip / "2.webp", lossless=True, exact=True)
    for name in ("0.png", "1.png", "2.webp"):
        assert np.array_equal(read_image(clip / name, 8), seen), name
    more = [Image.fromarray(np.roll(clear, 1, 1))]
    picture.save(tmp_path / "a.webp", save_all=True, append_images=more, lossless=True, exact=True)
    (clip / "1.png").unlink()
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 8, 8, "rgba"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(clear, "rgba")))
        container.mux(stream.encode())
    for path in (clip, tmp_path / "a.webp", tmp_path / "a.mov"):
        video, _ = read_frames(path, every, None)
        assert len(video) == 2 and np.array_equal(video[0], seen), path


@pytest.mark.parametrize("curves", [
    {"one": [(1, 0.0)]}, {"one": [(50, 0.7), (100, 0.3)], "another": [(100, 2e6)]},
    {"many": [(x, 1 / x) for x in range(1, 1000)], "few": [(500, 3.0), (999, 0.1)]},
])
def test_a_chart_has_a_line_of_its_own_colour_for_every_curve(curves):
    picture = data.chart(curves, "steps", "loss")
    assert picture.shape == (340, 560, 3)
    for colour in ((230, 75, 60), (70, 140, 240))[: len(curves)]:
        assert (picture[:, :470] == colour).all(-1).any()


def test_captions_with_few_words_in_common():
    captions = ["a cat runs", "a cat walks", "a dog barks loudly", "a cat runs", "the sun"]
    chosen = data.different(captions, 3)
    assert set(chosen) == {"a cat runs", "a dog barks loudly", "the sun"}
    assert sorted(data.different(captions, 9)) == sorted(set(captions))
    assert data.different(["up, right", "right, up", ""], 3)[0] == ""
