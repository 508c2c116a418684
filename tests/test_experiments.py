"""The measurements measure what they say, on videos whose truth is known."""

import html.parser
import json
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data import FPS, VideoFolder
from experiments import nearest, order, reference, slices, speed, steps, tasks, tour
from shapes import COLOURS, DIRECTIONS, SPEED, Thing, read_things, render


def rows(text):
    return [json.loads(line) for line in text.splitlines()]


def test_pairs_differ_in_the_order_alone():
    for one, other in zip(*order.ordered_pairs(50), strict=True):
        assert len(set(one.actions)) == 2 and one.actions == other.actions[::-1]
        assert asdict(one) | {"actions": other.actions} == asdict(other)


def test_a_model_deaf_to_the_order_gets_no_pair_right(monkeypatch, capsys):
    first, _ = order.ordered_pairs(10)
    pipeline = SimpleNamespace(generate=lambda _: [render([thing]) for thing in first])
    monkeypatch.setattr(order, "load_pipeline", lambda *_: pipeline)
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
    spoilt = {how: reference.spoil(video, how, np.random.default_rng(0))
              for how in ("nothing", "shuffled", "noise")}
    assert (spoilt["nothing"] == video).all()
    assert sorted(map(bytes, spoilt["shuffled"])) == sorted(map(bytes, video))
    assert (spoilt["shuffled"] != video).any()
    assert spoilt["noise"].dtype == np.uint8
    assert 10 < np.abs(spoilt["noise"].astype(float) - video).mean() < 25


def test_a_model_that_repeats_its_clips_is_found_out(
    monkeypatch, tiny_pipeline, tmp_path, capsys
):
    slices.write_circles(tmp_path, 5)
    dataset = VideoFolder(tmp_path, size=32)
    clips = {dataset[i].caption: dataset[i].video for i in range(len(dataset))}

    def repeat(prompts, fps, progress):
        assert np.allclose(fps, dataset[0].fps) and len(prompts) == 7
        return np.stack([clips[prompt] for prompt in prompts])

    pipeline = SimpleNamespace(generate=repeat, vae=tiny_pipeline.vae, size=32)
    networks = {"i3d": lambda videos: videos.mean((3, 4)).flatten(1)}
    monkeypatch.setattr(nearest, "load_pipeline", lambda *_: pipeline)
    monkeypatch.setattr(nearest.metrics, "load_networks", lambda *_: (networks, {}))
    nearest.nearest("", str(tmp_path), 7, tmp_path / "nearest.png")
    out, err = capsys.readouterr()
    real, copy, generated, one_rate = rows(out)
    assert "7 clips are too few" in err and (tmp_path / "nearest.png").exists()
    assert [row["num"] for row in (real, copy, generated, one_rate)] == [5, 5, 7, 7]
    assert real["fvd"] == 0 and real["distance"] > 1 and real["same_caption"] == 0  # another clip
    assert copy["fvd"] > 0 and copy["distance"] > 1
    assert generated["distance"] == 0 and generated["same_caption"] == 1
    assert one_rate == generated | {"clips": "generated, one rate"}


@pytest.mark.parametrize("sentence, exact", [
    ("a small red circle moves right, then up", True),
    ("a green star spins while a big white ring rises", True),
    ("<b>1</b> & 2 people swim in a very large and very blue lake", False),
])
def test_the_tour_is_one_page_that_names_true_places(
    sentence, exact, tiny_checkpoint, tmp_path, capsys
):
    clip, drawn = tour.draw_sentence(sentence, 64)
    assert drawn == exact
    if exact:
        assert all(thing.shape in sentence for thing in read_things(clip, FPS))
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


@pytest.mark.parametrize("module, words", [
    (order, "--num 0"), (slices, "--steps many"), (tasks, "nothing"), (steps, "--num"),
    (reference, "--num 1"), (nearest, ""), (speed, ""), (tour, ""), (tour, "words --out page.pdf"),
])
def test_mistakes_are_told_in_one_line(module, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        module.parse_args(words.split())
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
