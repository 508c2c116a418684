"""Video files come out as they went in; a folder of videos gives the right frames with the right
captions, whatever lies in it."""

import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import UCF101, DataError, VideoError, VideoFolder, contact_sheet, find_captions
from data import middle_square, prefetch, read_ahead, read_frames, read_image, to_model, to_uint8
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


@pytest.mark.parametrize("fps", [8.0, 7.3])
def test_mp4_is_readable(tmp_path, clip, fps):
    write_video(tmp_path / "a.mp4", clip[:, :63], fps, upscale=3)  # 189 rows: one has to go
    video = iio.imread(tmp_path / "a.mp4", plugin="pyav")
    assert video.shape == (10, 188, 192, 3)
    expected = clip[:, :63].repeat(3, 1).repeat(3, 2)[:, :188]
    assert np.abs(video.astype(int) - expected).mean() < 5
    assert iio.immeta(tmp_path / "a.mp4", plugin="pyav")["fps"] == pytest.approx(fps, rel=1e-3)


def test_unknown_suffix_is_refused(tmp_path, clip):
    with pytest.raises(ValueError, match="webm"):
        write_video(tmp_path / "a.webm", clip)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix, writer", [
    (".gif", "_write_gif"), (".mp4", "_write_mp4"), (".png", "_write_sheet"),
])  # fmt: skip
def test_a_failed_write_leaves_nothing_behind(tmp_path, clip, monkeypatch, suffix, writer):
    def fail(path, *_):
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(data, writer, fail)
    old = tmp_path / f"old{suffix}"
    old.write_bytes(b"precious")
    for path in (tmp_path / f"new{suffix}", old):
        with pytest.raises(OSError, match="no space"):
            write_video(path, clip)
    assert list(tmp_path.iterdir()) == [old] and old.read_bytes() == b"precious"


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


def write(path, video, fps=25, gop=7, codec=None, b_frames=0):
    """A video file of any kind, or a folder of frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.suffix:
        path.mkdir()
        for i, frame in enumerate(video):
            Image.fromarray(frame).save(path / f"{i}.png")
        return
    if path.suffix == ".gif":
        return write_video(path, video, fps)
    with av.open(str(path), "w") as container:
        codec = codec or {".webm": "libvpx"}.get(path.suffix, "mpeg4")
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
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


@pytest.mark.parametrize("name, codec, gop, b_frames", [
    ("a.mp4", "libx264", 1, 0), ("a.mp4", "libx264", 6, 2), ("a.mkv", "libx264", 100, 3),
    ("a.avi", "mpeg4", 6, 0), ("a.mov", "mpeg4", 5, 2),
])  # fmt: skip
def test_any_frames_are_found_between_key_frames(tmp_path, name, codec, gop, b_frames):
    write(tmp_path / name, greys(), codec=codec, gop=gop, b_frames=b_frames)
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 31):
        picked = np.sort(rng.choice(31, count, replace=False))
        video, times = read_frames(tmp_path / name, lambda times: picked, 16)
        assert which(video) == picked.tolist()
        assert times == pytest.approx(picked / 25, abs=2e-3)


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


def test_a_4k_video_is_read(tmp_path):
    write(tmp_path / "a.mp4", greys(4, 2160, 3840), gop=4)
    sample = VideoFolder(tmp_path, frames=4, size=64)[0]
    assert sample.video.shape == (4, 64, 64, 3) and which(sample.video) == [0, 1, 2, 3]


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    write(tmp_path / "clip", greys(12))  # 0.png to 11.png
    video, times = read_frames(tmp_path / "clip", every, 16)
    assert which(video) == list(range(12)) and times[-1] == pytest.approx(11 / 25)


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
    "nowhere.mp4": (lambda path: path.symlink_to("gone.mp4"), "No such file"),
    "one.mp4": (lambda path: write(path, greys(1)), "too short: 1 frames, and a clip needs 4"),
    "one.gif": (lambda path: write(path, greys(1)), "too short: 1 "),
    "one": (lambda path: write(path, greys(1)), "too short: 1 "),
    "short.avi": (lambda path: write(path, greys(3)), "too short: 3 "),
    "picture/0.png": (lambda path: path.write_text("not a picture"), "too short|identify"),
}
for suffix in ("avi", "mkv", "mp4", "mov", "webm"):
    BAD[f"cut.{suffix}"] = (lambda path: (write(path, noise()), cut(path, 0.5)), "truncated|nvalid")
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
    with pytest.raises(VideoError, match=reason):
        dataset.random_frames(bad, np.random.default_rng(0), 2)


def test_frames_that_make_no_video(tmp_path, monkeypatch):
    """A folder without any, which only a caption file can name; some of another size, where no size
    is asked for; one too large for Pillow to open."""
    clip = tmp_path / "clip"
    clip.mkdir()
    (tmp_path / "captions.csv").write_text("file,caption\nclip,nothing\n")
    with pytest.raises(DataError, match="none of the 1 videos .* a folder without pictures"):
        VideoFolder(tmp_path, frames=4, size=16)[0]
    for i in range(4):
        Image.new("RGB", (16, 16 + 16 * (i == 3))).save(clip / f"{i}.png")
    assert read_frames(clip, every, 16)[0].shape == (4, 16, 16, 3)
    with pytest.raises(VideoError, match="same shape"):
        read_frames(clip, every, None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(VideoError, match="exceeds limit"):
        read_frames(clip, every, 16)


def test_nothing_left_is_an_error(tmp_path):
    for name in ("text.avi", "empty.mp4", "one.gif"):
        BAD[name][0](tmp_path / name)
    dataset = VideoFolder(tmp_path, frames=4)
    with pytest.raises(DataError, match="none of the 3 videos in .* can be used; empty.mp4: "):
        list(read_ahead(dataset, range(3)))
    assert set(dataset.skipped) == {"text.avi", "empty.mp4", "one.gif"}
    with pytest.raises(DataError):  # and stays one
        dataset.random_frames(1, np.random.default_rng(0), 2)


# ------------------------------------------------------------------------------ captions


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_class_folders_become_sentences(tmp_path):
    touch(tmp_path, "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "YoYo/b.avi", "YoYo/a.avi",
          "RidingAUnicycle/a.MP4", "wave_one-hand/deep/er/a.mov", "wave_one-hand/notes.pdf")
    items, source = find_captions(tmp_path)
    assert dict(items) == {
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi": "a person applies eye makeup",
        "YoYo/a.avi": "a person plays with a yo-yo",
        "YoYo/b.avi": "a person plays with a yo-yo",
        "RidingAUnicycle/a.MP4": "riding a unicycle",
        "wave_one-hand/deep/er/a.mov": "er",
    }
    assert items == sorted(items) and "folders" in source
    assert data.words("ApplyEyeMakeup") == "apply eye makeup"
    assert data.words("_wave  one-hand ") == "wave one hand"


def test_the_table_has_the_101_classes():
    assert len(UCF101) == len(set(UCF101.values())) == 101
    for name, sentence in UCF101.items():
        assert name.isalpha() and sentence == " ".join(sentence.lower().split())
        assert len(sentence.split()) > 1
    if REAL.is_dir():
        lines = (REAL / "ucfTrainTestlist/classInd.txt").read_text().split()
        assert set(UCF101) == set(lines[1::2])


def test_plain_files_are_captioned_by_their_names(tmp_path):
    touch(tmp_path, "a_dog runs-Fast.mp4", "ein Hund läuft.gif", "clip7/0.png", "notes.txt",
          ".hidden.mp4", ".cache/a.mp4", "._a_dog runs-Fast.mp4", "samples.zip")
    assert find_captions(tmp_path)[0] == [
        ("a_dog runs-Fast.mp4", "a dog runs fast"), ("clip7", "clip7"),
        ("ein Hund läuft.gif", "ein hund läuft"),
    ]


def test_text_files_beside_the_videos(tmp_path):
    touch(tmp_path, "Archery/a.b.mp4", "c.webm", "frames/1.jpg")
    for name, text in (("Archery/a.b", "one\ntwo\n"), ("c", "\ufeff drei "), ("frames", "four")):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    items, source = find_captions(tmp_path)
    assert items == [("Archery/a.b.mp4", "one two"), ("c.webm", "drei"), ("frames", "four")]
    assert source == ".txt files"


def test_caption_files_come_first_in_their_order(tmp_path):
    touch(tmp_path, "x/a.mp4", "b c.avi", "not named.mp4")
    for name in ("x/a", "b c", "not named"):
        (tmp_path / f"{name}.txt").write_text("from a text file")
    found = []
    files = {
        "metadata.jsonl": '{"file_name": "b c.avi", "text": "hi"}\n\n',
        "captions.jsonl": '{"file": "b c.avi", "caption": "hi"}\n{"file": "x/a.mp4", '
                          '"caption": "hä?", "more": 1}',
        "captions.csv": '\ufefffile,caption\nx/a.mp4,"one, two"\nb c.avi, three  four\n'
                        "b c.avi,five\n",
    }
    for name, text in files.items():  # the later ones are preferred
        (tmp_path / name).write_text(text, encoding="utf-8")
        found.append(find_captions(tmp_path))
    assert found == [
        ([("b c.avi", "hi")], "metadata.jsonl"),
        ([("b c.avi", "hi"), ("x/a.mp4", "hä?")], "captions.jsonl"),
        ([("x/a.mp4", "one, two"), ("b c.avi", "three four"), ("b c.avi", "five")],
         "captions.csv"),
    ]


@pytest.mark.parametrize("name, text, message", [
    ("captions.csv", "path,caption\na.mp4,hi\n", "the columns are path, caption"),
    ("captions.csv", "a.mp4,hi\nb.mp4,ho\n", "the columns are a.mp4, hi"),
    ("captions.csv", "file,caption\na.mp4\n", "clip 1: no file and caption"),
    ("captions.csv", "file,caption\na.mp4,  \n", "clip 1: no file and caption"),
    ("captions.csv", "file,caption\na.mp4,one, two\n", "quotation marks"),
    ("captions.csv", "file,caption\n", "names no videos"),
    ("captions.csv", "", "names no videos"),
    ("captions.csv", b"file,caption\na.mp4,\xff\xfe\n", "cannot be read"),
    ("captions.csv", "file,caption\na.mp4,hi\nb.mp4,ho\nc.mp4,hm\n", "2 of 3 .* such as b.mp4"),
    ("captions.jsonl", '{"file": "a.mp4", "caption": "hi"}\n{"file": \n', "after clip 1"),
    ("captions.jsonl", '["a.mp4", "hi"]', "not of the form"),
    ("metadata.jsonl", '{"file_name": "a.mp4", "caption": 3}', "no file and caption"),
    ("a.txt", "hi", "1 of 2 videos .* such as z.mp4"),
])  # fmt: skip
def test_captions_that_are_wrong_are_refused(tmp_path, name, text, message):
    touch(tmp_path, "a.mp4", "z.mp4")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as error:
        VideoFolder(tmp_path)
    assert "\n" not in str(error.value)


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


def test_ten_thousand_files(tmp_path):
    for i in range(100):
        (tmp_path / f"class{i}").mkdir()
        for j in range(100):
            (tmp_path / f"class{i}" / f"{j}.avi").touch()
    start = time.perf_counter()
    dataset = VideoFolder(tmp_path)
    assert len(dataset) == 10_000 and len(dataset.identity()) > 10_000
    assert time.perf_counter() - start < 10


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
    (tmp_path / "b.mp4").rename(tmp_path / "d.mp4")
    seen.add(VideoFolder(tmp_path).identity())
    assert len(seen) == 8
    assert MovingShapes(3).identity() != MovingShapes(3, seed=1).identity()


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


# ------------------------------------------------------------------------------ real videos


@needs_real
@pytest.mark.parametrize("degrees, turns", [(0, 0), (90, -1), (180, 2), (270, 1)])
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
    picture = middle_square(clip[0], 32)
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
