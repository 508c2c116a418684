"""Sampling: what a seed means, what the command prints and writes, and how it says no.

The command runs in this process (`command` below), as `python sample.py ...` would.
"""

import io
import os
import pickle
import shlex
import subprocess
import sys
import wave
from collections import Counter
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import data
import sample
import shapes
from data import FPS
from sample import CONDITIONINGS, SAMPLERS, load_pipeline
from shapes import BACKGROUND, SPEED, MovingShapes, read_things
from tools import UserError
from unet3d import record_attention
from vae import AutoencoderKL, VAEConfig

PROMPT = "a red circle moves right, then up"
SLUG = "a-red-circle-moves-right-then-up"
PRETRAINED = Path(sample.__file__).parent / "pretrained" / "shapes.pt"


@pytest.fixture
def float32(monkeypatch):
    """No autocast: in bfloat16 the sums of another batch size round visibly differently."""
    monkeypatch.setattr(sample.Pipeline, "precision", "fp32")


def distance(a, b):
    """The largest difference between two uint8 arrays, in levels."""
    return np.abs(a.astype(int) - b.astype(int)).max()


# ------------------------------------------------------------------------------ Pipeline.generate


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_sample_i_has_the_seed_plus_i(tiny_pipeline, float32, sampler, batch_size):
    prompts, rates = [PROMPT, PROMPT, "a star spins"], (8, 12, 8)

    def draw(prompts, seed, **options):
        return tiny_pipeline.generate(prompts, seed, steps=3, frames=4, sampler=sampler, **options)

    together = draw(prompts, 5, fps=rates, batch_size=batch_size)
    assert together.dtype == np.uint8 and together.shape == (3, 4, 32, 32, 3)
    for i in range(3):
        assert distance(draw(prompts[i : i + 1], 5 + i, fps=rates[i])[0], together[i]) <= 1
    assert distance(draw([PROMPT], 6, fps=8)[0], together[1]) > 1
    assert distance(together[0], together[1]) > 8


def test_words_matter_and_their_case_and_spaces_do_not(tiny_pipeline):
    def draw(prompt):
        return tiny_pipeline.generate([prompt], steps=2)

    assert distance(draw(PROMPT), draw(f"  {PROMPT.upper()} ".replace(" ", "  "))) == 0
    assert distance(draw(PROMPT), draw("a red circle moves up, then right")) > 0


@pytest.mark.parametrize("frames", [1, 5, 24])
def test_any_number_of_frames(tiny_pipeline, frames):
    videos = tiny_pipeline.generate([PROMPT], frames=frames, steps=2)
    assert videos.shape == (1, frames, 32, 32, 3)


@pytest.mark.parametrize("guidance", [1, 0, 3])
def test_the_null_caption_is_asked_for_guidance_alone(tiny_pipeline, float32, guidance):
    """That is where there is noise enough. With guidance 0 the words do not count there."""
    sizes, beliefs = [], []
    hook = tiny_pipeline.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    try:
        for prompt in (PROMPT, "a star spins"):
            tiny_pipeline.generate(
                [prompt] * 2, steps=4, frames=4, guidance=guidance,
                watch=lambda step, t, x_t, x_start: step or beliefs.append(x_start))
    finally:
        hook.remove()
    schedule = tiny_pipeline.schedule
    sigmas = (1 - schedule.alphas_cumprod[schedule.timesteps(4)]).sqrt()
    wanted = [4 if guidance != 1 and sigma > 0.8 else 2 for sigma in sigmas]
    assert min(sigmas) < 0.8 and sizes == 2 * wanted
    assert torch.allclose(*beliefs, atol=1e-4) == (guidance == 0)


def test_weights_are_rounded_once_for_all_steps(tiny_checkpoint):
    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                found.append(args[0].data_ptr())
            return function(*args, **(kwargs or {}))

    pipeline = load_pipeline(tiny_checkpoint)
    pipeline.precision = "bf16"
    found, weights = [], {p.data_ptr() for p in pipeline.unet.parameters()}
    with Casts():
        pipeline.generate(["a red circle"], steps=3, frames=4)
    rounded = Counter(address for address in found if address in weights)
    assert len(rounded) > 20 and set(rounded.values()) == {1}


def test_a_checkpoint_rebuilds_the_pipeline(tiny_pipeline, tiny_checkpoint, float32):
    loaded = load_pipeline(tiny_checkpoint)
    for name in ("text_encoder", "unet", "vae"):
        ours, theirs = getattr(tiny_pipeline, name), getattr(loaded, name)
        assert ours.config == theirs.config and not theirs.training
        for key, value in ours.state_dict().items():
            assert torch.equal(value.half().float(), theirs.state_dict()[key]), key
    assert loaded.tokenizer.state_dict() == tiny_pipeline.tokenizer.state_dict()
    assert loaded.schedule.config == tiny_pipeline.schedule.config
    a, b = (p.generate([PROMPT], steps=2) for p in (tiny_pipeline, loaded))
    assert distance(a, b) <= 4  # half precision on disk is not visible


# ------------------------------------------------------------------------------ given frames

CLIP = MovingShapes(2, size=32)  # 16 frames of the tiny model's size


def given_frames(*frames):
    return {frame: CLIP[0].video[frame] for frame in frames}


@pytest.mark.parametrize("frames", [[0, 15], [0, 1, 2, 3], [9]])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_given_frames_come_back_unchanged(tiny_pipeline, frames, conditioning):
    video = tiny_pipeline.generate(
        [PROMPT], steps=2, pictures=given_frames(*frames), conditioning=conditioning
    )[0]
    for i in range(16):
        assert np.array_equal(video[i], CLIP[0].video[i]) == (i in frames)


def test_the_other_frames_depend_on_the_given_ones_and_on_the_conditioning(tiny_pipeline):
    black, videos = {0: np.zeros((32, 32, 3), np.uint8)}, []
    for name in CONDITIONINGS:
        given, other, none = (
            tiny_pipeline.generate([PROMPT], steps=2, pictures=pictures, conditioning=name)[:, 1:]
            for pictures in (given_frames(0), black, {})
        )
        assert distance(given, other) > 0 and distance(given, none) > 0
        assert all(distance(given, video) > 0 for video in videos)
        videos.append(given)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_only_mask_shows_the_given_frames_to_the_network(tiny_pipeline, float32, conditioning):
    shown = []
    hook = tiny_pipeline.unet.register_forward_pre_hook(lambda _, args: shown.append(args[5:]))
    try:
        options = {"steps": 1, "guidance": 3, "conditioning": conditioning}
        tiny_pipeline.generate([PROMPT], pictures=given_frames(0, 5), **options)
    finally:
        hook.remove()
    if conditioning != "mask":
        assert shown == [()]
    else:  # to the unconditional half as well: in training the captions are dropped, not the frames
        (given, mask), = shown
        assert mask.nonzero().tolist() == [[i, frame] for i in (0, 1) for frame in (0, 5)]
        assert torch.equal(given[0], given[1])
        pictures = data.to_model(CLIP[0].video[None, [0, 5]])
        torch.testing.assert_close(given[:1, :, [0, 5]], tiny_pipeline.vae.encode_video(pictures))


def test_every_prompt_may_have_its_own_pictures(tiny_pipeline, float32):
    firsts = np.stack([CLIP[0].video[0], CLIP[1].video[0], CLIP[0].video[9]])

    def draw(prompts, seed, **options):
        return tiny_pipeline.generate(prompts, seed, steps=2, **options)

    together = draw([PROMPT] * 3, 0, pictures={0: firsts}, batch_size=2)
    assert np.array_equal(together[:, 0], firsts)
    for i, first in enumerate(firsts):
        assert distance(draw([PROMPT], i, pictures={0: first})[0], together[i]) <= 1


@pytest.mark.parametrize("given, words", [
    ({16: np.zeros((32, 32, 3), np.uint8)}, "16"),
    ({-1: np.zeros((32, 32, 3), np.uint8)}, "-1"),
    ({0: np.zeros((64, 64, 3), np.uint8)}, "64"),
    ({0: np.zeros((32, 32, 3), np.float32)}, "float32"),
    ({0: np.zeros((5, 32, 32, 3), np.uint8)}, "5"),
    (given_frames(*range(16)), "none is left"),
])
def test_given_frames_that_do_not_fit_are_refused(tiny_pipeline, given, words):
    with pytest.raises(ValueError, match=words):
        tiny_pipeline.generate([PROMPT], steps=1, pictures=given)


# ------------------------------------------------------------------------------ stories

STORY = [PROMPT, "a red circle spins", "a red circle grows"]


def test_a_story_begins_like_its_first_sentence(tiny_pipeline, float32):
    options = {"seed": 3, "frames": 8, "steps": 2, "pictures": given_frames(0)}
    story = tiny_pipeline.generate([STORY], overlap=3, **options)
    assert story.shape == (1, 8 + 5 + 5, 32, 32, 3)
    first = tiny_pipeline.generate([PROMPT], **options)
    assert distance(story[:, :8], first) <= 1
    other_end = tiny_pipeline.generate([STORY[:2] + ["a star spins"]], overlap=3, **options)
    assert distance(story[:, :13], other_end[:, :13]) <= 1
    assert distance(story[:, 13:], other_end[:, 13:]) > 0


@pytest.mark.parametrize("overlap", [1, 3, 7])
def test_no_frame_is_lost_or_repeated_at_a_seam(tiny_pipeline, monkeypatch, overlap):
    """With a model that counts up from the last frame it is given."""
    seen = []

    def denoiser(self, sentences, fps, guidance, rescale, given, known, conditioning):
        seen.append((sentences, given[0, 0, known, 0, 0].tolist()))
        return given, known

    def count_up(model, schedule, x, steps, **_):
        given, known = model
        last = given[:, :, known[-1:]] if known else torch.full_like(x[:, :, :1], -1)
        rest = last + torch.arange(1, 9 - len(known))[:, None, None]
        return torch.cat([given[:, :, known], rest], dim=2)

    monkeypatch.setattr(sample.Pipeline, "denoiser", denoiser)
    monkeypatch.setitem(SAMPLERS, sample.SAMPLER, count_up)
    monkeypatch.setattr(tiny_pipeline.vae, "decode_video", lambda x: data.to_model(
        x[:, :3].permute(0, 2, 3, 4, 1).repeat(1, 1, 8, 8, 1).byte().numpy()))
    videos = tiny_pipeline.generate([["a", "b", "c"], ["d", "e", "f"]], frames=8, overlap=overlap)
    frames = 8 + 2 * (8 - overlap)
    assert videos[:, :, 0, 0, 0].tolist() == [list(range(frames))] * 2
    assert [sentences for sentences, _ in seen] == [("a", "d"), ("b", "e"), ("c", "f")]
    assert [given for _, given in seen] == [
        [], list(range(8 - overlap, 8)), list(range(16 - 2 * overlap, 16 - overlap))
    ]


@pytest.mark.parametrize("stories, overlap, words", [
    ([STORY, STORY[:2]], 4, "same number"), ([[PROMPT, " "]], 4, "empty"), ([[]], 4, "empty"),
    ([STORY], 0, "overlap"), ([STORY], 16, "overlap"),
])
def test_stories_that_cannot_be_told_are_refused(tiny_pipeline, stories, overlap, words):
    with pytest.raises(ValueError, match=words):
        tiny_pipeline.generate(stories, steps=1, overlap=overlap)


def test_every_step_of_every_chunk_can_be_watched(tiny_pipeline):
    seen = []

    def watch(step, t, x_t, x_start):
        seen.append((step, x_t.shape, x_start.shape))

    tiny_pipeline.generate([STORY], steps=2, frames=3, watch=watch)
    assert seen == [(step, (1, 4, 3, 4, 4), (1, 4, 3, 4, 4)) for step in (0, 1)] * 3


@pytest.mark.parametrize("frames, sentences, length, at_once", [
    (16, 1, 16, 64), (16, 3, 46, 22), (512, 1, 512, 2), (512, 3, 1534, 1),
])
def test_how_many_are_drawn_at_once_depends_on_their_size(
    tiny_pipeline, frames, sentences, length, at_once
):
    assert tiny_pipeline.check([STORY[:sentences]], frames, 1) == (length, at_once)


# ------------------------------------------------------------------------------ word attention


def test_word_attention_sums_to_one_with_start_and_end(tiny_pipeline):
    prompt = "a red zebra moves right, then up"  # the unknown word takes several tokens
    with record_attention(tiny_pipeline.unet) as record:
        tiny_pipeline.generate([prompt], steps=3)
    words, weights = sample.word_attention(record, tiny_pipeline.tokenizer, prompt)
    assert words == ("a", "red", "zebra", "moves", "right", ",", "then", "up")
    assert weights.shape == (8, 16)
    tokens = torch.stack([call[0] for calls in record.values() for call in calls]).mean(0)
    assert tokens.shape[1] > 8 + 2
    ends = tokens[:, 0] + tokens[:, -1]
    torch.testing.assert_close(torch.from_numpy(weights).sum(0) + ends, torch.ones(16))
    torch.testing.assert_close(torch.from_numpy(weights[[0, 1, 7]]), tokens.T[[1, 2, -2]])


def test_attention_picture_has_a_bright_cell_where_the_weight_is():
    weights = np.zeros((3, 4))
    weights[1, 2], weights[2, 0] = 0.4, 0.1
    picture = sample.attention_picture(("a", "red", "circle"), weights, CLIP[0].video[:4], cell=40)
    height, width = 40 + 3 * 20, picture.shape[1]
    assert picture.shape == (height, width, 3) and 4 * 40 + 20 < width < 4 * 40 + 150
    cells = picture[40:, width - 160 :, 0].reshape(3, 20, 4, 40)[:, 10, :, 20]
    assert cells.tolist() == [[0, 0, 0, 0], [0, 0, 255, 0], [64, 0, 0, 0]]
    assert picture[40:60, : width - 160].any() and picture[60:80, : width - 160].any()  # the words


# ------------------------------------------------------------------------------ the command


@pytest.fixture
def command(monkeypatch, tmp_path, tiny_checkpoint, run_script):
    """Runs `python sample.py ...` inside tmp_path: (exit status, lines of stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, prompt=PROMPT, checkpoint=tiny_checkpoint):
        arguments = ("--checkpoint", checkpoint, "--steps", 2, *arguments)
        prompts = () if prompt is None else (prompt,)
        status, out, err = run_script(sample, *prompts, *arguments)
        return status, out.splitlines(), err

    return run


def tree(folder):
    """Every file with its bytes, and every folder, below `folder`."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))}


def test_stdout_is_the_path(command, tmp_path):
    status, out, err = command("--steps", 5)
    assert (status, out) == (0, [f"samples/{SLUG}-0.gif"])
    assert "warning" not in err and "Traceback" not in err
    with Image.open(out[0]) as gif:
        assert gif.n_frames == 16 and gif.size == (128, 128)
    assert set(tree(tmp_path)) == {tmp_path / "samples", tmp_path / out[0]}


def test_num_writes_one_file_for_each_seed(command, tiny_checkpoint):
    status, out, _ = command("--num", 3, "--seed", 7, "--out", "a/b", "--format", "png")
    assert (status, out) == (0, [f"a/b/{SLUG}-{seed}.png" for seed in (7, 8, 9)])
    videos = load_pipeline(tiny_checkpoint).generate([PROMPT] * 3, seed=7, steps=2)
    for path, video in zip(out, videos):  # the file of seed s holds the video of seed s
        sheet = data.contact_sheet(video.repeat(4, 1).repeat(4, 2))
        assert distance(np.asarray(Image.open(path)), sheet) <= 1


def test_same_command_same_file(command):
    first = tree(Path(command("--out", "a")[1][0]).parent)
    second = tree(Path(command("--out", "b")[1][0]).parent)
    assert list(first.values()) == list(second.values())


@pytest.mark.parametrize("prompt", ["字" * 300, "a" * 300, "?!", "../../x", "a/b\0c"])
def test_any_prompt_gives_a_file_name(prompt):
    arguments = [prompt, "--seed", str(2**62), "--num", "2", "--out", "folder"]
    args = sample.parse_args(arguments)
    first, second = sample.output_paths(args, sample.read_stories(args, ()))
    assert first.parent == second.parent == Path("folder") and first != second
    assert 0 < len(first.name.encode()) <= 230  # systems allow 255, some go to a temporary name
    assert "/" not in first.name and "\0" not in first.name


@pytest.mark.parametrize("arguments, path, frames, side, fps", [
    ("--upscale 1 --out new/folder", f"new/folder/{SLUG}-0.gif", 16, 32, None),
    ("--out x.gif --upscale 3 --frames 3 --fps 4", "x.gif", 3, 96, 4),

    ("--format mp4 --frames 5 --fps 10", f"samples/{SLUG}-0.mp4", 5, 128, 10),
])
def test_options_decide_what_is_written(command, arguments, path, frames, side, fps):
    assert command(*arguments.split())[:2] == (0, [path])
    plugin = "pyav" if path.endswith("mp4") else "pillow"
    assert iio.imread(path, plugin=plugin).shape == (frames, side, side, 3)
    if fps:
        about = iio.immeta(path, plugin=plugin)
        assert (about["fps"] if plugin == "pyav" else 1000 / about["duration"]) == fps


# ------------------------------------------------------------------------------ its given frames


def write_clip(path, video=CLIP[0].video, fps=FPS, upscale=3):
    data.write_video(path, video, fps, upscale)
    return path


def write_image(path, frame=0, upscale=3):
    picture = CLIP[0].video[frame].repeat(upscale, 0).repeat(upscale, 1)
    Image.fromarray(picture).save(path)
    return path


def drawn_frames(path, columns=4):
    """The frames of a contact sheet that was written with --upscale 1."""
    sheet = np.asarray(Image.open(path))
    cells = sheet.reshape(-1, 36, columns, 36, 3).swapaxes(1, 2)[:, :, 2:-2, 2:-2]
    return cells.reshape(-1, 32, 32, 3)


SHEET = ("--out", "x.png", "--upscale", 1)


def test_first_and_last_image(command):
    images = ("--image", write_image("a.png"), "--last-image", write_image("b.bmp", 15, upscale=1))
    assert command(*images, *SHEET)[:2] == (0, ["x.png"])
    frames = drawn_frames("x.png")
    assert np.array_equal(frames[0], CLIP[0].video[0])
    assert np.array_equal(frames[15], CLIP[0].video[15])
    assert distance(frames[1:15], CLIP[0].video[1:15]) > 8


@pytest.mark.parametrize("overlap, length, taken", [(1, 16, 1), (5, 16, 5), (5, 3, 3)])
def test_a_clip_goes_on_from_its_last_frames(command, overlap, length, taken):
    clip = CLIP[0].video[:length]
    path = write_clip("clip.gif", clip)
    assert command("--video", path, "--overlap", overlap, *SHEET)[0] == 0
    frames = drawn_frames("x.png")
    assert distance(frames[:taken], clip[-taken:]) <= 8  # a GIF has 256 colours
    assert distance(frames[taken], clip[-1]) > 8


def test_a_clip_of_another_frame_rate_is_read_at_ours(command):
    video = np.repeat(np.arange(0, 240, 8, dtype=np.uint8), 32 * 32 * 3).reshape(30, 32, 32, 3)
    path = write_clip("clip.mp4", video, fps=24, upscale=2)
    assert command("--video", path, "--fps", 8, "--overlap", 3, *SHEET)[0] == 0
    assert np.abs(drawn_frames("x.png")[:3].mean((1, 2, 3)) - 8 * np.array([23, 26, 29])).max() < 4


@pytest.mark.parametrize("rate, fps, count, wanted", [
    (8, 8, 4, [16, 17, 18, 19]), (24, 8, 3, [13, 16, 19]), (25, 8, 3, [13, 16, 19]),
    (8, 8, 30, list(range(20))), (30, 12, 2, [17, 19]),
])
def test_last_frames(rate, fps, count, wanted):
    index = sample.last_frames(np.arange(20) / rate, count, fps)
    assert np.abs(index - wanted).max() <= (0 if rate % fps == 0 else 1) and index[-1] == 19


def test_extend_tells_a_story(command, tiny_checkpoint):
    options = ("--extend", 3, "--overlap", 2, "--frames", 6, "--conditioning", "replacement")
    arguments = ("--image", write_image("a.png"), *options, STORY[0], *SHEET)
    assert command(*arguments, prompt=STORY[1])[0] == 0
    expected = load_pipeline(tiny_checkpoint).generate(
        [[STORY[1], STORY[0], STORY[0], STORY[0]]], frames=6, steps=2, overlap=2,
        pictures=given_frames(0), conditioning="replacement",
    )[0]
    frames = drawn_frames("x.png")
    assert len(expected) == 18 and distance(frames[:18], expected) <= 1


def test_attention_is_written_beside_the_video(command):
    status, out, _ = command("--attention", "new/words.png", "--out", "x.gif", "--frames", 3)
    assert (status, out) == (0, ["x.gif", "new/words.png"])
    with Image.open(out[1]) as picture:
        assert picture.height == 48 + 8 * 24 and 3 * 48 < picture.width < 3 * 48 + 120


def test_denoising_shows_every_step(command):
    for name, size in (("d.gif", (2 * 72, 2 * 36)), ("d.png", (2 * 2 * 32, 2 * 3 * 32))):
        options = ("--denoising", name, "--out", "x.gif", "--frames", 2, "--steps", 3)
        assert command(*options)[:2] == (0, ["x.gif", name])
        with Image.open(name) as picture:
            assert picture.size == size and getattr(picture, "n_frames", 1) in (1, 3)


def test_prompts_of_a_file(command, tiny_checkpoint):
    Path("p.txt").write_text("\ufeffa red star spins\n\n  a blue ring grows \n", "utf-8")
    options = ("--prompts", "p.txt", "--num", 2, "--seed", 4, "--batch-size", 3, "--format", "png")
    status, out, _ = command(*options, "--upscale", 1, prompt=None)
    names = ["a-red-star-spins-4", "a-red-star-spins-5", "a-blue-ring-grows-6"]
    assert (status, out[:3]) == (0, [f"samples/{name}.png" for name in names]) and len(out) == 4
    expected = load_pipeline(tiny_checkpoint).generate(["a blue ring grows"], seed=7, steps=2)[0]
    assert distance(drawn_frames(out[3]), expected) <= 4  # bfloat16 in a batch of another size
    # All in one: two columns, two rows, and room for the captions.
    (path,) = command(*options, "--grid", "--out", "all.gif", "--format", "gif", prompt=None)[1]
    with Image.open(path) as gif:
        assert gif.n_frames == 16 and gif.width == 2 * 128 and gif.height > 2 * (128 + 17)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_as_any_editor_saves_them(encoding, tmp_path):
    text = "a red star\r\n\r\nein gr\xfcner Stern\r\n"
    (tmp_path / "p.txt").write_text(text, encoding, newline="")
    assert sample.read_prompts(tmp_path / "p.txt") == ["a red star", "ein gr\xfcner Stern"]


def test_in_a_terminal_the_path_has_a_line_of_its_own(command, monkeypatch):
    """There stdout and stderr are one, and a return goes back to the beginning of the line."""
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    status, out, _ = command("--num", 2, "--batch-size", 1)
    lines = [line.rstrip().rsplit("\r")[-1] for line in "\n".join(out).split("\n")]
    assert status == 0 and {f"samples/{SLUG}-{i}.gif" for i in (0, 1)} <= set(lines)


def test_a_class_is_known_by_its_name(command):
    assert command(prompt="Archery")[1] == ["samples/a-person-shoots-an-arrow-with-a-bow-0.gif"]
    args = sample.parse_args(["Archery", "a man"])
    assert sample.read_stories(args, ()) == [[data.UCF101["Archery"], "a man"]]


@pytest.mark.parametrize("told, read", [
    ("a-red_circle “moves” right 🎬.", "a red circle  moves  right  ."), ("x, y; z", "x, y  z"),
    ("cafe\u0301", "cafe\u0301"), ("नमस्ते", "नमस्ते"), ("?!", "?!"),
    ("a dog's tail", "a dog's tail"),
])
def test_marks_that_were_never_trained_are_spaces(told, read):
    args = sample.parse_args([told])
    assert sample.read_stories(args, ["a dog's tail, or a", "cat."]) == [[read]]
    assert sample.read_stories(args, ()) == [[told]]  # nothing is known of its training


CAPTIONS = ["a red circle spins", "a blue ring moves up", "a red ring moves up, then left"]


@pytest.fixture
def trained(tiny_checkpoint):
    """A checkpoint that says what it was trained on."""
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    known = {"frames": 5, "size": 32, "fps": [2.0, 4.0], "captions": CAPTIONS}
    torch.save(checkpoint | {"data": known}, "trained.pt")
    return "trained.pt"


def test_defaults_and_captions_come_from_the_checkpoint(command, trained):
    _, (path,), err = command("--steps", 5, checkpoint=trained, prompt=CAPTIONS[2])
    assert "warning" not in err
    with Image.open(path) as gif:
        assert gif.n_frames == 5 and gif.info["duration"] == 250  # FPS is 8, the nearest is 4
    words, many, *captions = command("--words", checkpoint=trained, prompt=None)[1]
    assert captions == sorted(CAPTIONS) and "circle" in words.split() and "captions" in many
    out = command("--prompts", "captions", checkpoint=trained, prompt=None)[1]
    assert [Path(path).stem.rsplit("-", 1)[0] for path in out] == [
        caption.replace(",", "").replace(" ", "-") for caption in CAPTIONS]
    pipeline = load_pipeline(trained)
    assert pipeline.pack()["data"] == pipeline.data
    assert pipeline.generate([CAPTIONS[0]], steps=1).shape[1] == 5


def test_a_sentence_of_a_new_form_is_known():
    """And one that was never trained, in a form that was, is none."""
    captions = load_pipeline(sample.CHECKPOINT).data["captions"]
    counts = Counter(gram for caption in captions for gram in sample.grams(caption))

    def is_new(prompt):
        return any(sample.is_new(gram, counts) for gram in sample.grams(prompt))

    for prompt in ("a red circle moves left while a red star spins", "two red circles", "a circle",
                   "a red circle moves left, then up, then right", "red moves circle",
                   "a red and blue circle moves up", "a red circle grows and shrinks",
                   "a red circle left right up down", "a green triangle moves up and right",
                   "a red circle and a blue square move up"):
        assert is_new(prompt), prompt
    others = [MovingShapes(300, "heldout").caption(i) for i in range(300)]
    others += ["a red circle moves left while a blue circle moves left", "the red ball goes right",
               "A Red Circle Moves Right!"]
    assert sum(map(is_new, others)) <= 3


@pytest.mark.parametrize("prompt, options, words", [
    ("a red Cirlce spins", "", "'cirlce' (did you mean 'circle'?)"),
    ("a red circle moves Quickly", "", "'quickly' in"),
    ("a red circle spins", "--fps 8", "--fps 8: in training 2 to 4"),
    ("a red circle spins", "--frames 16", "--frames 16: in training 5"),
    ("a red circle spins", "--guidance 9", "--guidance 9"),
    ("a red circle spins", "--steps 2", "--steps 2"),
    ("a red circle spins", "--image @", "unlike"),
])
def test_what_was_not_trained_is_warned_about(command, trained, prompt, options, words):
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(picture).save("noise.png")
    options = options.replace("@", "noise.png").split()
    status, _, err = command("--steps", 5, *options, prompt=prompt, checkpoint=trained)
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert status == 0 and len(warnings) in (1, 2) and words in " ".join(warnings), err


def test_help_is_complete():
    with pytest.raises(SystemExit) as stop:
        sample.parse_args(["--help"])  # a stray % in a help text would raise here
    assert stop.value.code == 0


# ------------------------------------------------------------------------------ mistakes


class Malicious:
    """Pickled, this is a program."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def changed(good, change):
    """The bytes of a good checkpoint after change(checkpoint)."""
    checkpoint, file = torch.load(good, weights_only=True), io.BytesIO()
    change(checkpoint)
    torch.save(checkpoint, file)
    return file.getvalue()


def config(part, **values):
    return lambda checkpoint: checkpoint[part]["config"].update(values)


def weights(name, change):
    """Changes the UNet's weight of this name."""
    def edit(checkpoint):
        state = checkpoint["unet"]["state"]
        state[name] = change(state[name])
    return edit


def known(**values):
    data = {"frames": 5, "size": 32, "fps": [2.0, 4.0], "captions": []} | values
    return lambda checkpoint: checkpoint.update(data=data)


BIAS = "conv_out.bias"
FILES = {
    "truncated": lambda good: good[: len(good) // 2],
    "almost complete": lambda good: good[:-30],
    "empty": lambda good: b"",
    "text": lambda good: b"hello world\n",
    "program": lambda good: pickle.dumps(Malicious()),
}
CHECKPOINTS = {  # what is changed, and what is said about it
    "program in an archive": (lambda c: c.update(unet=Malicious()), "not a readable"),
    "no tokenizer": (lambda c: c.update(tokenizer={}), "merges"),
    "a larger tokenizer": (
        lambda c: c["tokenizer"]["merges"].extend([[3, 4]] * 512), "more tokens than"),
    "tokens that double": (lambda c: c["tokenizer"].update(
        merges=[[3, 3], *([i, i] for i in range(259, 299))]), "16 MiB of tokens"),
    "a part is missing": (lambda c: c.pop("vae"), "vae"),
    "a part is a number": (lambda c: c.update(vae=3), "AutoencoderKL"),
    "a part is a tensor": (lambda c: c.update(vae=torch.zeros(3)), "no config with weights"),
    "a tensor as boolean": (
        lambda c: c["tokenizer"].update(first_space=torch.zeros(3)), "first_space cannot be"),
    "unknown field": (config("unet", colour="red"), "'colour'"),
    "other widths": (config("unet", widths=(32, 64)), "UNet3D: the config asks for other shapes"),
    "a width of zero": (config("unet", widths=(0, 32)), "widths cannot be (0, 32)"),
    "a width as text": (config("unet", text_width="32"), "text_width cannot be '32'"),
    "a boolean as number": (config("text_encoder", depth=True), "depth cannot be True"),
    "no widths": (config("vae", widths=()), "widths"),
    "huge": (config("text_encoder", vocab_size=2**40), "vocab_size"),
    "large": (config("text_encoder", vocab_size=2**20), "other shapes"),
    "deep": (config("unet", blocks=(10**9, 1)), "blocks"),
    "groups": (config("unet", groups=7), "divisible"),
    "unknown schedule": (config("diffusion", schedule="round"), "'round'"),
    "infinite shift": (config("diffusion", shift=float("inf")), "shift cannot be inf"),
    "no noise left": (config("diffusion", shift=1e-200), "no schedule"),
    "a shift beyond numbers": (config("diffusion", shift=10**400), ""),
    "parts of two models": (lambda c: c.update(vae=sample.pack(
        AutoencoderKL(VAEConfig(latent_channels=3, widths=(8,), groups=4)))), "channels"),
    "a weight is missing": (lambda c: c["unet"]["state"].pop(BIAS), f"lack {BIAS}"),
    "a weight of another kind": (weights(BIAS, lambda x: x > 0), BIAS),
    "a weight in other words": (weights(BIAS, lambda x: x.tolist()), BIAS),
    "a weight that is not there": (weights(BIAS, lambda x: x.to("meta")), BIAS),
    "a weight without memory": (weights(BIAS, lambda x: x[:1].clone().expand(4)), "larger"),
    "not a number": (weights(BIAS, lambda x: x * float("nan")), f"not finite: {BIAS}"),
    "infinite": (weights(BIAS, lambda x: x + float("inf")), f"not finite: {BIAS}"),
    "frames": (known(frames=0), "training data"), "half": (known(frames=5.0), "training data"),
    "fps": (known(fps=[4, 2]), "training data"), "no fps": (known(fps=None), ""),
    "captions": (known(captions=[1]), "training data"),
}


def assert_refused(result, before, words=""):
    """Exit status 2, one line on stderr that holds `words`, and not a file changed."""
    status, out, err = result
    assert (status, out) == (2, [])
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert words in err, err
    assert tree(".") == before


def test_bad_checkpoints_are_refused(command, tiny_checkpoint):
    good = tiny_checkpoint.read_bytes()
    for kind in (*FILES, *CHECKPOINTS):
        change, words = CHECKPOINTS.get(kind, (None, "not a readable checkpoint"))
        content = FILES[kind](good) if change is None else changed(tiny_checkpoint, change)
        Path("bad.pt").write_bytes(content)
        with pytest.raises(UserError) as error:
            load_pipeline("bad.pt")
        assert words in str(error.value) and "\n" not in str(error.value), (kind, error.value)
        assert list(tree(".")) == [Path("bad.pt")]
    assert_refused(command("--out", "new", checkpoint="bad.pt"), tree("."), words)


@pytest.mark.parametrize("prompt, words", [("", "empty"), (" \t ", "empty"), ("red " * 99, "long")])
def test_prompts_that_cannot_be_drawn_are_refused(command, prompt, words):
    assert_refused(command(prompt=prompt), {}, words)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of files to give: some are fine, others are not."""
    folder = tmp_path_factory.mktemp("files")
    content = write_image(folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("not a picture")
    (folder / "folder.png").mkdir()
    (folder / "frames").mkdir()
    write_image(folder / "frames" / "1.png")
    os.mkfifo(folder / "pipe")
    write_clip(folder / "clip.gif")
    write_clip(folder / "clip.mp4")
    (folder / "link.gif").symlink_to("clip.gif")
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    return folder


@pytest.mark.parametrize("arguments, words", [
    ("--num 0", "--num"),
    ("--frames 0", "--frames"),
    ("--steps 0", "--steps"),
    ("--fps nan", "--fps"),
    ("--sampler euler", "euler"),
    ("--format avi", "avi"),
    ("--out x.gif --num 2", "--grid"),
    ("--out x.gif --format mp4", ".mp4"),
    ("--out x.webm", ".gif, .mp4, .png"),
    ("--frames=--", "--"),
    ("--words", "--prompts"),
    ("--upscale 64 --frames 512", "too large"),
    ("--extend 1000 --frames 512 --upscale 1", "too large"),
    ("--denoising d.mp4", ".gif or .png"),
    ("--denoising d.gif --num 2", "--num"),
    ("--denoising x.gif --out ./x.gif", "same file"),
    ("--checkpoint nowhere/model.pt --out a/b", "no checkpoint at nowhere/model.pt"),
    ("--image @/a.png --video @/clip.gif", "--image and --video"),
    ("--image @/a.png --frames 1", "all 1 frames are given"),
    ("--video @/clip.gif --overlap 9 --frames 9", "all 9 frames are given"),
    ("--last-image @/a.png --extend 1", "--extend"),
    ("--extend 1 --overlap 16", "overlap by 16"),
    ("another", "--extend 1"),
    ("another third --extend 1", "--extend 2"),
    ("--conditioning none", "none"),
    ("--attention w.png --num 2", "--num"),
    ("--attention w.png --extend 1", "--extend"),
    ("--attention w.jpg", ".png"),
    ("--attention w.png --out w.png", "both"),
    ("--attention @/folder.png", "folder.png"),
    ("--attention @/a.png/w.png", "a.png"),
    ("--image @/none.png", "none.png': no such file"),
    ("--image=", "'': no such file"),
    ("--video=", "'': no such file"),
    ("--image @/pipe", "pipe': not a file"),
    ("--video @/pipe", "pipe': not a file"),
    ("--checkpoint @/pipe", "pipe"),
    ("--prompts @/text.png", "--prompts"),
    ("--image @/a.png --out @/a.png", "overwritten"),
    ("--last-image @/a.png --out @/a.png --frames 3", "overwritten"),
    ("--image @/a.png --attention @/a.png", "overwritten"),
    ("--video @/clip.gif --out @/clip.gif", "overwritten"),
    ("--video @/clip.gif --out @/link.gif", "overwritten"),
    ("--video @/frames --out @/frames/1.png", "overwritten"),
    ("--last-image @/text.png", "text.png"),
    ("--image @/cut.png", "cut.png"),
    ("--image @/folder.png", "folder.png"),
    ("--image @/clip.mp4", "clip.mp4"),
    ("--video @/none.mp4", "none.mp4': no such file"),
    ("--video @/text.png", "text.png"),
    ("--video @/folder.png", "folder.png"),
    ("--video @/sound.wav", "sound.wav: "),
    ("--video @/clip.gif --overlap 2 --fps 60", "8.0 frames a second"),
])
def test_settings_that_do_not_fit_are_refused(command, files, arguments, words):
    before = {path: content for path, content in tree(files).items() if path.name != "pipe"}
    assert_refused(command(*arguments.replace("@", str(files)).split()), {}, words)
    assert {p: p.read_bytes() if p.is_file() else None for p in before} == before


@pytest.mark.parametrize("content, words", [
    (b"", "0 sentences"), (b" \n\t\n", "0 sentences"), (b"a ring\n\xff\xfe", "codec"),
    (b"a ring\n" * 10_001, "10001 sentences"), (b"a ring spins\n" + b"red " * 99, "'red red"),
])
def test_prompts_that_cannot_be_read_are_refused(command, content, words):
    Path("p.txt").write_bytes(content)
    assert_refused(command("--prompts", "p.txt", prompt=None), tree("."), words)
    assert_refused(command("--prompts", "captions", prompt=None), tree("."), "0 sentences")


@pytest.mark.parametrize("out", ["file/new", "file/new/x.gif", "folder.gif"])
def test_an_unwritable_out_is_refused_before_the_work(command, monkeypatch, out):
    Path("file").write_text("not a folder")
    Path("folder.gif").mkdir()
    monkeypatch.setattr(sample, "load_pipeline", None)  # would fail if it were called
    before = tree(".")
    assert_refused(command("--out", out), before, out)


@pytest.mark.parametrize("suffix", ["gif", "mp4", "png"])
def test_an_existing_file_survives_a_failure(command, monkeypatch, suffix):
    path = Path(f"x.{suffix}")
    path.write_bytes(b"precious")
    before = tree(".")
    assert_refused(command("--out", path, checkpoint="none.pt"), before, "none.pt")

    def fill_the_disk(path, *_):
        path.write_bytes(b"half of a vid")
        raise OSError(28, "No space left on device")

    for name in ("_write_gif", "_write_mp4", "_write_sheet"):
        monkeypatch.setattr(data, name, fill_the_disk)
    status, out, err = command("--out", path)
    assert (status, out) == (2, []) and "No space left" in err.splitlines()[-1]
    assert tree(".") == before


def test_without_stderr_and_with_nobody_at_stdout_all_videos_are_written(tmp_path, tiny_checkpoint):
    """A new process, whose standard error is closed and whose output nobody reads."""
    options = ["--checkpoint", tiny_checkpoint, "--steps", 1, "--num", 3, "--format", "mp4",
               "--frames", 2]
    words = map(str, [sys.executable, sample.__file__, PROMPT, *options])
    script = f"{{ {shlex.join(words)} 2>&-; echo $? > status; }} | true"
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True, timeout=600)
    assert Path(tmp_path, "status").read_text() == "0\n"
    videos = sorted(Path(tmp_path, "samples").iterdir())
    assert [path.name for path in videos] == [f"{SLUG}-{i}.mp4" for i in range(3)]
    assert all(iio.imread(path, plugin="pyav").shape == (2, 128, 128, 3) for path in videos)


# ------------------------------------------------------------------------------ the shipped model

shipped = pytest.mark.skipif(not PRETRAINED.is_file(), reason=f"there is no {PRETRAINED.name} yet")


@shipped
def test_the_shipped_model_is_small():
    assert PRETRAINED.stat().st_size <= 16 * 2**20
    checkpoint = torch.load(PRETRAINED, weights_only=True)
    for part in ("text_encoder", "unet", "vae"):
        kinds = {v.dtype for v in checkpoint[part]["state"].values() if v.is_floating_point()}
        assert kinds == {torch.float16}, part


def circle(x, y):
    """A frame with a red circle at (x, y)."""
    return shapes.render([shapes.Thing("red", "circle", "", ("stays still",), x, y, 0.0)], 1)[0]


def center(video):
    """(x, y) of what is not background in each frame: (f, 2)."""
    cover = np.abs(video - np.array(BACKGROUND, float)).sum(-1).clip(30) - 30
    rows, columns = cover.sum(2), cover.sum(1)
    places = np.arange(cover.shape[1]) + 0.5
    return np.stack([columns @ places, rows @ places], 1) / cover.sum((1, 2))[:, None]


@shipped
def test_the_shipped_model_fills_in_between_two_pictures():
    end = 20 + SPEED * 15 / FPS
    ends = {0: circle(20, 30), 15: circle(end, 30)}
    video = load_pipeline().generate(["a red circle moves right"], pictures=ends)[0]
    on_the_way = np.stack([np.linspace(20, end, 16), np.full(16, 30)], 1)
    assert np.abs(center(video) - on_the_way).max() < 4


@shipped
def test_from_one_picture_the_shipped_model_tells_stories_without_a_jump():
    told = [("right", "up"), ("down", "left")]
    stories = [[f"a red circle moves {direction}" for direction in story] for story in told]
    pictures = np.stack([circle(15, 50), circle(50, 15)])
    videos = load_pipeline().generate(stories, pictures={0: pictures})
    assert np.array_equal(videos[:, 0], pictures)
    for video, (first, second) in zip(videos, told):
        assert read_things(video[:16], FPS)[0].actions == (first,)
        assert read_things(video[15:], FPS)[0].actions == (second,)
    steps = np.abs(np.diff(videos.astype(float), axis=1)).mean((0, 2, 3, 4))
    assert steps[15] < 1.5 * np.delete(steps, 15).mean()  # from frame 15, the last of chunk 1


@shipped
def test_the_frame_rate_sets_the_speed():
    prompts, rates = ["a red circle moves right", "a blue square moves down"], (8, 12)
    videos = load_pipeline().generate(prompts, fps=rates)
    for axis, (video, fps) in enumerate(zip(videos, rates)):
        per_frame = np.polyfit(np.arange(16), center(video)[:, axis], 1)[0]
        assert per_frame * fps == pytest.approx(SPEED, rel=0.2)


@shipped
def test_the_first_command_of_the_readme(tmp_path):
    """As a person would type it: a new process, the shipped model, default settings; it draws what
    it is told, and imports no compiler, which takes longer than all else before the first step."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "sample.py", PROMPT, "--out", tmp_path],
        cwd=PRETRAINED.parent.parent, capture_output=True, text=True, timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / SLUG}-0.gif\n"
    assert "torch.nn" in done.stderr and "torch._dynamo" not in done.stderr
    video = iio.imread(done.stdout.strip())[:, 2::4, 2::4]
    assert video.shape == (16, 64, 64, 3)
    seen = read_things(video, FPS)[0]
    assert (seen.colour, seen.shape, seen.actions) == ("red", "circle", ("right", "up"))


def test_older_checkpoints_have_the_size_of_latents(tiny_checkpoint, tmp_path):
    """And nothing of what they were trained on; what cannot be is told."""
    packed = torch.load(tiny_checkpoint, weights_only=True)
    del packed["data"]
    for size, pixels in ((4, 32), (6, 48), (0, None), (1e9, None), ("4", None)):
        packed["unet"]["config"]["latent_size"] = size
        torch.save(packed, tmp_path / "old.pt")
        if pixels is None:
            with pytest.raises(UserError, match="is not a checkpoint of this program"):
                load_pipeline(tmp_path / "old.pt")
        else:
            pipeline = load_pipeline(tmp_path / "old.pt")
            assert pipeline.generate(["a"], steps=1, frames=2).shape == (1, 2, pixels, pixels, 3)
            assert pipeline.pack()["data"] == {"size": pixels}


def test_frames_need_not_be_square(command, tiny_checkpoint, tmp_path):
    packed = torch.load(tiny_checkpoint, weights_only=True)
    for size in ([48], (48, 33), (48, 0), (48, 32, 3), "48"):
        torch.save(packed | {"data": {"size": size}}, tmp_path / "wide.pt")
        with pytest.raises(UserError):
            load_pipeline(tmp_path / "wide.pt")
    torch.save(packed | {"data": {"size": (48, 32)}}, tmp_path / "wide.pt")
    picture = np.full((128, 96, 3), 90, np.uint8)
    Image.fromarray(picture).save(tmp_path / "first.png")
    _, (path,), _ = command("--image", tmp_path / "first.png", "--frames", 3, "--format", "png",
                            "--upscale", 1, checkpoint=tmp_path / "wide.pt")
    with Image.open(path) as sheet:  # with a border of two
        assert sheet.size == (3 * 52, 36) and sheet.getpixel((2, 2)) == (90, 90, 90)
