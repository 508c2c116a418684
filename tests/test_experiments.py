"""The measurements measure what they say, on videos whose truth is known."""

import functools
import html.parser
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from conftest import tiny_configs
from data import FPS, VideoFolder
from diffusion import DiffusionConfig, SAMPLERS
from experiments import ablate, motions, nearest, order, reference, slices, speed, steps
from experiments import tasks, tour
from shapes import COLOURS, DIRECTIONS, MOTIONS, POLYGONS, REACH, SPEED, WORDINGS, Thing
from shapes import read_things, render
from tools import UserError


def rows(text):
    return [json.loads(line) for line in text.splitlines()]


def test_pairs_differ_in_the_order_alone():
    for one, other in zip(*order.ordered_pairs(50), strict=True):
        assert len(set(one.actions)) == 2 and one.actions == other.actions[::-1]
        assert asdict(one) | {"actions": other.actions} == asdict(other)


def test_a_model_deaf_to_the_order_gets_no_pair_right(monkeypatch, capsys):
    first, _ = order.ordered_pairs(10)
    pipeline = SimpleNamespace(generate=lambda _: [render([thing]) for thing in first])
    monkeypatch.setattr(order, "load_painter", lambda *_: pipeline)
    order.order("", 10)
    row, = rows(capsys.readouterr().out)
    assert row == {"pairs": 10, "first": 10, "second": 0, "both": 0}


def test_speeds_are_those_of_the_renderer(capsys):
    def generate(prompts, fps):
        ways = [text.split()[-1] for text in prompts]
        starts = [32 - 16 * np.array(DIRECTIONS[way]) for way in ways]  # stays inside the frame
        things = [Thing("red", "circle", "", (w,), *xy, 0) for w, xy in zip(ways, starts)]
        return [render([thing], fps=fps) for thing in things]

    tasks.speeds(SimpleNamespace(generate=generate), 4)
    found = rows(capsys.readouterr().out)
    assert [row["fps"] for row in found] == [8, 9, 10, 11, 12]
    assert all(row["pixels_a_second"] == pytest.approx(SPEED, rel=0.02) for row in found)


def film(story, x=32.0, y=32.0):
    """What the renderer makes of a story: each sentence begins where the one before has ended."""
    parts, angle = [], 0.0
    for sentence in story:
        _, colour, shape, *_, action = sentence.split()
        one = Thing(colour, shape, "", (action,), x, y, angle)
        parts.append(render([one])[bool(parts) :])
        x, y, _, angle = map(float, one.path(16, 8.0)[:, -1])
    return np.concatenate(parts)


def test_stories_of_the_renderer_are_told(capsys):
    def generate(stories, overlap):
        frames = 16 + (len(stories[0]) - 1) * (16 - overlap)
        return np.stack([film(story)[:frames] for story in stories])

    tasks.stories(SimpleNamespace(generate=generate), 3)
    found = [row for row in rows(capsys.readouterr().out) if row["overlap"] == 1]
    assert [(row["story"], row["sentences"]) for row in found] == [
        ("round", 2), ("round", 5), ("spins", 2), ("spins", 5)
    ]  # fmt: skip
    assert all(row["told"] == row["of"] == 3 and row["sentences_told"] == 1 for row in found)
    assert all(0.8 < row["seam"] < 1.2 for row in found)


def test_stories_that_take_another_turn_are_not_told():
    story = tasks.write_stories("round", 1, 2)[0]
    assert tasks.is_told(film(story), story, 1) == [True, True]
    assert tasks.is_told(film(story), [story[0]] * 2, 1) == [True, False]


def test_from_the_middle_every_story_can_go_round():
    assert len({tuple(s.split()[-1] for s in x) for x in tasks.write_stories("round", 8, 2)}) == 8
    for i, story in enumerate(tasks.write_stories("round", 8, 5)):
        place = (28.0, 36.0)[i % 2], (28.0, 36.0)[i // 2 % 2]
        assert all(tasks.is_told(film(story, *place), story, 1)), (story, place)


def test_every_shape_is_asked_for_in_every_motion(monkeypatch, capsys):
    """A model whose stars are squares, and that never spins."""
    def generate(captions):
        asked = (caption.replace("star", "square").split(maxsplit=3) for caption in captions)
        return [render([Thing(c, s, "", (ACTIONS[words],), 32.0, 32.0, 0.1)])
                for _, c, s, words in asked]

    wordings = {WORDINGS[action][0]: action for action in MOTIONS}
    ACTIONS = wordings | {WORDINGS["spins"][0]: "stays still"}
    pipeline = SimpleNamespace(generate=generate)
    monkeypatch.setattr(motions, "load_painter", lambda *_: pipeline)
    motions.motions("", 2)
    found = {(row["motion"], row["right"]): row for row in rows(capsys.readouterr().out)}
    assert {motion for motion, _ in found} == set(MOTIONS)
    for (motion, right), row in found.items():
        shapes = set(POLYGONS if motion == "spins" else REACH)
        assert set(row) == {"motion", "right", "mean", *shapes}
        wrong = {"star"} if right == "shape" else shapes if motion == "spins" else set()
        assert {shape for shape in shapes if row[shape] != 1} == wrong
        assert row["mean"] == pytest.approx(1 - len(wrong) / len(shapes), abs=1e-3)


def test_slices_hide_the_order_that_whole_clips_show(tmp_path):
    slices.write_circles(tmp_path, 12)
    whole, parts = (
        [VideoFolder(tmp_path, stride=stride)[i] for i in range(12)] for stride in (None, 1)
    )
    assert {clip.caption for clip in whole} == {
        f"a red circle moves {x}, then {y}" for x in DIRECTIONS for y in DIRECTIONS if x != y
    }
    assert next(iter(COLOURS)) == "red"
    read = [slices.shares([c.video for c in cs], cs[0].fps) for cs in (whole, parts)]
    assert read[0] == {"in_order": 1, "either": 1}
    assert read[1]["in_order"] < 0.4 and read[1]["either"] > 0.9


def test_spoilt_clips():
    video = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    nothing, shuffled, noise = (reference.spoil(video, how, np.random.default_rng(0))
                                for how in ("nothing", "shuffled", "noise"))
    assert (nothing == video).all() and (shuffled != video).any()
    assert sorted(map(bytes, shuffled)) == sorted(map(bytes, video))
    assert noise.dtype == np.uint8 and 10 < np.abs(noise.astype(float) - video).mean() < 25


def test_a_model_that_repeats_its_clips_is_found_out(
    monkeypatch, tiny_pipeline, tmp_path, capsys
):
    slices.write_circles(tmp_path, 5)
    dataset = VideoFolder(tmp_path, size=32)
    clips = {dataset[i].caption: dataset[i].video for i in range(len(dataset))}

    def repeat(prompts, fps):
        assert np.allclose(fps, dataset[0].fps) and len(prompts) == 4
        return np.stack([clips[prompt] for prompt in prompts])

    pipeline = SimpleNamespace(generate=repeat, vae=tiny_pipeline.vae, size=32, frames=16)
    networks = {"i3d": lambda videos: videos.mean((3, 4)).flatten(1)}
    monkeypatch.setattr(nearest, "load_pipeline", lambda *_: pipeline)
    monkeypatch.setattr(nearest.metrics, "load_networks", lambda *_: (networks, {}))
    nearest.nearest("", str(tmp_path), 0, 4, tmp_path / "nearest.png")
    out, err = capsys.readouterr()
    real, copy, generated, one_rate = rows(out)
    assert "4 clips are too few" in err and (tmp_path / "nearest.png").exists()
    assert {row["num"] for row in (real, copy, generated, one_rate)} == {4}
    assert real["distance"] > 1 and real["same_caption"] == 0  # another clip
    assert copy["fvd"] > 0 and copy["distance"] > 1
    assert generated["distance"] == 0 and generated["same_caption"] == 1
    assert generated["fvd"] == real["fvd"]
    assert one_rate == generated | {"clips": "generated, one rate"}


def one_second(action):
    action()
    return 1.0


@pytest.mark.parametrize("what", sorted(set(speed.SPEEDS) - {"data", "i3d"}))  # need files
def test_every_speed_is_a_row_of_numbers(monkeypatch, capsys, what):
    unet, text, vae = tiny_configs()
    preset = replace(speed.train.PRESETS["shapes"](), unet=unet, text=text, vae=vae, size=16)
    monkeypatch.setitem(speed.train.PRESETS, "shapes", lambda: preset)
    generate = functools.partialmethod(speed.Pipeline.generate, steps=1)
    monkeypatch.setattr(speed.Pipeline, "generate", generate)
    monkeypatch.setattr(speed.shapes, "__defaults__", (20,))  # clips
    monkeypatch.setattr(speed, "matrix_peak", lambda *_: 1e12)
    monkeypatch.setattr(speed, "seconds", lambda *actions, **_: [one_second(a) for a in actions])
    more = {"step": "--batch-size 4 --grad-accum 2", "sample": "--num 2"}
    more |= {"kernels": "--batch-size 1", "peers": "--batch-size 2 --grad-checkpoint"}
    args = speed.parse_args([what, *more.get(what, "").split()])
    speed.SPEEDS[what](args)
    found = rows(capsys.readouterr().out)
    numbers = [v for row in found for v in row.values() if not isinstance(v, str)]
    assert found and numbers and min(numbers) > 0
    if what == "step":  # a step of one second
        assert found[0]["step_ms"] == 1000 and found[0]["clips_per_second"] == 4
        assert found[0]["of_peak"] == pytest.approx(found[0]["gflop"] / 1000, rel=1e-3)
        phases = {"draw", "forward", "backward", "clip", "muon", "adamw", "average"}
        assert {f"{phase}_ms" for phase in phases} < set(found[0])


@pytest.mark.parametrize("name", ablate.ARMS)
def test_every_arm_trains_and_draws(name, tiny_pipeline, monkeypatch):
    torch.manual_seed(0)
    arm, latents = ablate.ARMS[name], torch.randn(4, 4, 4, 4, 4)
    captions = ["a red circle moves right", "a blue circle moves up, then left"] * 2
    device = torch.device("cpu")
    pipeline = ablate.train_arm(arm, 1, 0, captions, latents, tiny_pipeline.vae, device)
    text = pipeline.tokenizer.batch(captions, 64)
    context, x = pipeline.text_encoder(*text), torch.randn(1, 4, 4, 4, 4)
    vectors = context[0, text[1][0]]
    assert (vectors == vectors[0]).all() == (name == "pooled-text")
    for p in pipeline.unet.parameters():
        p.data.normal_(0, 0.1)
    t, fps = torch.tensor([500]), torch.tensor([8.0])
    frames = pipeline.unet.embedding(t, fps, 4, context[:1], text[1][:1])
    assert (frames == frames[0]).all() == (name == "no-frame-position")

    def predict():
        return pipeline.unet(x, t, context[:1], text[1][:1], fps)

    before = predict()
    monkeypatch.setattr("unet3d.places", lambda h, w, device: torch.rand(64, h, w))
    assert torch.equal(predict(), before) == (name == "no-places")
    video = pipeline.generate(["a red circle moves right"], steps=1, frames=2)
    assert video.shape == (1, 2, 64, 64, 3)


def test_the_small_run_spends_its_steps_as_the_recipe_does(tiny_pipeline, monkeypatch):
    config = train.PRESETS["shapes"]().diffusion_training
    strides, draw_batch = [], train.draw_batch

    def record(seed, step, small, *data):
        strides.append(train.frame_stride(step, small))
        return draw_batch(seed, step, small, *data)

    monkeypatch.setattr(train, "draw_batch", record)
    captions, latents = ["a red circle moves right"] * 4, torch.randn(4, 4, 4, 4, 4)
    ablate.train_arm({}, 20, 0, captions, latents, tiny_pipeline.vae, torch.device("cpu"))
    assert strides == [train.frame_stride(step, config) for step in range(0, config.steps, 600)]


def test_flow_says_what_it_means():
    schedule = ablate.Flow(DiffusionConfig(shift=3.0))
    assert schedule.alphas_cumprod[-1] == 0 and (schedule.alphas_cumprod.diff() < 0).all()
    torch.manual_seed(0)
    x_start, noise, t = torch.randn(3, 4, 2, 5, 5), torch.randn(3, 4, 2, 5, 5), torch.tensor(
        [0, 500, 999])
    x_t, target = schedule.q_sample(x_start, t, noise), schedule.target(x_start, t, noise)
    for found, wanted in zip(schedule.predict(target, x_t, t), (x_start, noise)):
        assert torch.allclose(found, wanted, atol=1e-4)
    # On the straight line: x_t is s = 0.75 of the way at s / (1 - s) = 3, the shift, for u = 1/2.
    a = schedule.alphas_cumprod[499]
    assert torch.isclose((1 - a).sqrt() / a.sqrt(), torch.tensor(3.0).double())
    drawn = SAMPLERS["dpm"](lambda x, t: schedule.output(x_start, x, t), schedule, noise, 5)
    assert torch.allclose(drawn, x_start, atol=1e-4)


def test_arms_are_compared_with_their_errors(tiny_checkpoint, monkeypatch, capsys, tmp_path):
    packed = torch.load(tiny_checkpoint, weights_only=True)
    packed["vae"]["state"]["latent_std"] *= 2
    packed["unet"]["state"].popitem()  # a reader's UNet may differ: only the autoencoder is used
    torch.save(packed, tmp_path / "model.pt")
    monkeypatch.setattr(ablate, "CIRCLES", ablate.CIRCLES[:3])
    _, scenes, clips = ablate.make_world(3)
    runs = []

    def train_arm(arm, steps, seed, captions, latents, vae, device):
        runs.append((steps, seed, latents.std().item()))
        wrong = np.concatenate([clips[:1]] * 6)
        right = np.concatenate([clips] * 2)
        return SimpleNamespace(generate=lambda prompts: wrong if seed == 1 else right)

    monkeypatch.setattr(ablate, "train_arm", train_arm)
    # Three seconds to begin, and half a second a step.
    monkeypatch.setattr(ablate, "clock", lambda device: sum(3 + run[0] / 2 for run in runs))
    ablate.ablate(tmp_path / "model.pt", ["baseline", "no-normalisation"], 2.0, 2, 3)
    found = rows(capsys.readouterr().out)
    assert [row.get("seed") for row in found] == [0, 1, None] * 2
    assert [row["all"] for row in found[:3]] == pytest.approx([1, 1 / 3, 2 / 3], rel=1e-3)
    assert found[2]["all_error"] == pytest.approx(1 / 3, rel=1e-3)
    assert [run[:2] for run in runs[:5]] == [(20, 0), (20, 0), (80, 0), (240, 0), (240, 1)]
    assert runs[5][2] == pytest.approx(2 * runs[0][2], rel=1e-2)


@pytest.mark.parametrize("sentence, things", [
    ("a small red circle moves right, then up", [("red", "circle", ("right", "up"))]),
    ("A big white ring rises", [("white", "ring", ("up",))]),
    ("a green star spins, then gets bigger", [("green", "star", ("spins", "grows"))]),
    ("two people swim", None),
    ("a red circle", None),
])
def test_the_tour_draws_sentences_as_the_oracle_reads_them(sentence, things):
    clip, exact = tour.draw_sentence(sentence, 64)
    assert clip.shape == (16, 64, 64, 3) and exact == (things is not None)
    read = [(thing.colour, thing.shape, thing.actions) for thing in read_things(clip, FPS)]
    assert things in (None, read)


def test_the_tour_is_one_page_that_names_true_places(tiny_checkpoint, tmp_path, capsys):
    sentence = "<b>1</b> & 2 red circles in a very large and very blue lake move right, then up"
    tour.tour(tiny_checkpoint, sentence, 3, tmp_path / "tour.html")
    assert capsys.readouterr().out == f"{tmp_path / 'tour.html'}\n"
    text = (tmp_path / "tour.html").read_text(encoding="utf-8")
    open_tags, void = [], {"img", "meta", "br", "path", "polyline"}

    class Check(html.parser.HTMLParser):
        """Every tag is closed, and nothing is fetched from anywhere."""

        def handle_starttag(self, tag, attributes):
            attributes = dict(attributes)
            assert tag not in ("script", "link", "iframe")
            assert attributes.get("src", "data:").startswith("data:")
            assert attributes.get("href", "#").startswith("#")
            open_tags.extend([tag] if tag not in void else [])

        def handle_endtag(self, tag):
            assert tag in void or open_tags.pop() == tag

    Check().feed(text)
    assert not open_tags and "url(" not in text and "<b>1</b>" not in text
    anchors = re.findall(r'<section id="([\w-]+)"', text)
    assert len(anchors) == 8 and re.findall(r'<a href="#([\w-]+)"', text) == anchors
    places = re.findall(r"<code>(\w+\.py):(\d+)</code> <code>([\w.]+)</code>", text)
    assert len(places) > 10
    for file, line, name in places:
        lines = (Path(tour.__file__).parent.parent / file).read_text().splitlines()
        here = "".join(lines[int(line) - 1 : int(line) + 2])  # the decorators are above the name
        assert re.search(rf"def {name.split('.')[-1]}\b", here), (file, line, name)


def test_models_of_other_videos_are_refused(tiny_pipeline, tmp_path, monkeypatch):
    def checkpoint(**data):
        torch.save(tiny_pipeline.pack() | {"data": data}, tmp_path / "model.pt")
        return tmp_path / "model.pt"

    monkeypatch.setattr(nearest.metrics, "load_networks", lambda *_: ({}, {}))
    monkeypatch.setattr(tiny_pipeline.tokenizer, "words", {"a", "person", "waves"})
    for command in (order.order, motions.motions, tasks.tasks):
        with pytest.raises(UserError, match="the model never saw 'red'"):
            command(checkpoint(size=64), 1)
    tiny_pipeline.tokenizer.words = {*COLOURS, *REACH, *MOTIONS, "stays", "still"}  # of shapes
    for data in ({"size": 32}, {"size": (96, 64)}, {"size": 64, "frames": 8}):
        with pytest.raises(UserError, match="16 frames of 64 pixels"):
            order.order(checkpoint(**data), 1)
    picture = tmp_path / "nearest.png"
    for data, message in (({"frames": 8}, "8 frames, and FVD"), ({"size": (96, 64)}, "no squares")):
        with pytest.raises(UserError, match=message):
            nearest.nearest(checkpoint(**data), "shapes", 4, 4, picture)
    slices.write_circles(tmp_path / "one", 1)
    with pytest.raises(UserError, match="two clips or more"):
        nearest.nearest(checkpoint(size=32), str(tmp_path / "one"), 0, 4, picture)


@pytest.mark.parametrize("command", [
    lambda path: steps.steps("", 1, path), lambda path: nearest.nearest("", "shapes", 1, 1, path),
    lambda path: tour.tour("", "words", 0, path),
])
def test_a_place_that_cannot_be_written_is_told_before_the_work(command, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        command(tmp_path / "file" / "below")


@pytest.mark.parametrize("module, words", [
    (order, "--num 0"), (motions, "--num 0"), (slices, "--steps many"), (tasks, "nothing"),
    (steps, "--num"), (reference, "--num 1"), (nearest, ""), (speed, ""), (tour, ""),
    (tour, "words --out page.pdf"), (steps, "--picture model.pt"),
    (nearest, "--data shapes --picture model.pt"), (ablate, "--arm other"), (ablate, "--minutes 0"),
])
def test_mistakes_are_told_in_one_line(module, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        module.parse_args(words.split())
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
