"""One sentence on its way through the model, as a page to look at.

    python experiments/tour.py "a red circle moves right, then up"      # writes samples/tour.html

The page is one file: its pictures are inside, it has no scripts, and it needs no server. Each of
its eight stations shows what one part of the program makes of the sentence or of the video, the
shape of that tensor, and where the function stands that made it.

Letters used here: `b` batch, `c` channels, `f` frames, `h w` height and width, `l` text tokens.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import Parser, UserError, atomic_path, check_output, file_name, number, pick_device
from tools import run_command

import base64
import html
import inspect
import io
import shlex
import time

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from data import FPS, FRAMES, to_model, to_uint8
from diffusion import SAMPLERS, NoiseSchedule, guided
from sample import CHECKPOINT, GUIDANCE, SAMPLER, STEPS, Pipeline, load_pipeline
from sample import word_attention
from shapes import COLOURS, REACH, UPRIGHT, WORDINGS, MovingShapes, Thing, place_in_frame
from shapes import read_things, render
from text_encoder import TextEncoder, Tokenizer
from unet3d import CrossAttention, TemporalAttention, UNet3D, attention_weights, record_attention
from unet3d import rotary, rotary_table
from vae import AutoencoderKL

# ------------------------------------------------------------------------------ what is measured


def draw_sentence(sentence: str, size: int) -> tuple[np.ndarray, bool]:
    """A rendered clip of a sentence, uint8 (f, h, w, 3), and True. Where MovingShapes has no such
    sentence, a clip of another one, and False."""
    rng, things = np.random.default_rng(0), []
    # "right, then up" leaves out a word that WORDINGS has.
    for clause in sentence.lower().replace("then ", "then moves ").split(" while "):
        words = clause.replace(",", " ").split()
        colour = next((word for word in words if word in COLOURS), None)
        shape = next((word for word in words if word in REACH), None)
        phrases = [(clause.find(p), a) for a, ps in WORDINGS.items() for p in ps if p in clause]
        actions = tuple(dict.fromkeys(action for _, action in sorted(phrases)))[:2]
        if not (colour and shape and actions):
            return MovingShapes(1, fps=FPS, size=size)[0].video, False
        size_word = next((word for word in words if word in ("small", "big")), "")
        thing = Thing(colour, shape, size_word, actions, 0.0, 0.0, UPRIGHT.get(shape, 0.0))
        things.append(place_in_frame(thing, rng, FRAMES, FPS))
    return render(things, FRAMES, FPS, size), True


def word_similarity(tokenizer: Tokenizer, context: Tensor, sentence: str) -> tuple[list, Tensor]:
    """The words, and the cosine of each two of their encodings, means over tokens: (words, words).
    context: (1, l, d)."""
    words, lengths = zip(*tokenizer.words_and_lengths(sentence))
    parts = context[0, 1 : 1 + sum(lengths)].split(lengths)  # the first token is START
    means = torch.nn.functional.normalize(torch.stack([part.mean(0) for part in parts]), dim=1)
    return words, means @ means.T


def time_attention(layer: TemporalAttention, x: Tensor, place: int) -> Tensor:
    """How strongly each frame attends to each frame at one place, the mean over heads: (f, f).
    x: the layer's input (b, f, s, c)."""
    qkv = layer.qkv(layer.norm(x[:1, :, place].float()))
    q, k, _ = rearrange(qkv, "1 f (k n d) -> k n f d", k=3, n=layer.heads)
    table = rotary_table(torch.arange(x.shape[1], device=x.device), q.shape[-1])
    return attention_weights(rotary(q, table), rotary(k, table)).mean(0)


def busiest_place(video: np.ndarray, side: int) -> tuple[int, int]:
    """(row, column) of the cell of a side x side grid over the frames that changes the most."""
    cell = video.shape[1] // side
    cells = rearrange(video.astype(float), "f (y p) (x q) c -> f y x (p q c)", p=cell, q=cell)
    changes = cells.mean(-1).std(0)
    return tuple(int(i) for i in np.unravel_index(changes.argmax(), changes.shape))


@torch.no_grad()
def sample_and_watch(pipeline: Pipeline, sentence: str, seed: int, guidance: float) -> dict:
    """Draws the sentence. "video": uint8 (f, h, w, 3); "steps": [(t, x_t, x_start), ...], latents
    (1, c, f, h, w); "words": see `record_attention`; "times": the last input (b, f, s, c) of each
    TemporalAttention, by name."""
    steps, times, hooks = [], {}, []
    for name, layer in pipeline.unet.named_modules():
        if isinstance(layer, TemporalAttention):
            def note(layer, inputs, name=name):
                times[name] = inputs[0]
            hooks.append(layer.register_forward_pre_hook(note))
    with record_attention(pipeline.unet) as words:
        video = pipeline.generate(
            [sentence], seed=seed, guidance=guidance,
            watch=lambda step, t, x_t, x_start: steps.append((t, x_t, x_start)),
        )[0]
    for hook in hooks:
        hook.remove()
    return {"video": video, "steps": steps, "words": words, "times": times}


# ------------------------------------------------------------------------------ pieces of a page


def picture(frames: np.ndarray, alt: str, fps: float | None = None) -> str:
    """An <img> with its data inside. frames: uint8 (h, w, 3), or (f, h, w, 3) to be played."""
    images = [Image.fromarray(frame) for frame in (frames if frames.ndim == 4 else [frames])]
    more = {"save_all": True, "append_images": images[1:], "duration": 1000 / (fps or 1), "loop": 0}
    file = io.BytesIO()
    images[0].save(file, "PNG", **(more if len(images) > 1 else {}))
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">'


def latent_picture(latent: Tensor) -> np.ndarray:
    """A map (h, w) of about unit variance as grays: uint8 (h, w, 3)."""
    levels = ((latent.float().cpu() / 5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).numpy()
    return levels[..., None].repeat(3, axis=2)


def figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def strip(rows: dict[str, list], columns: list[str]) -> str:
    """Pictures in rows with a line of text above each, and the names of the columns on top."""
    head = "".join(f"<span>{name}</span>" for name in columns)
    body = "".join(
        f"<p>{name}</p>" * bool(name)
        + "".join(picture(image, f"{name} {column}") for image, column in zip(images, columns))
        for name, images in rows.items()
    )
    return f'<div class="strip" style="--n:{len(columns)}">{head}{body}</div>'


def heatmap(values: Tensor, rows: list[str], columns: list[str]) -> str:
    """A table (rows, columns), the stronger in colour the larger the value is."""
    highest = float(values.max()) or 1.0
    head = "".join(f'<th scope="col"><span>{html.escape(str(c))}</span></th>' for c in columns)
    body = ""
    for name, line in zip(rows, values.tolist()):
        cells = "".join(
            f'<td style="--w:{max(value, 0) / highest:.2f}" title="{value:.2f}"></td>'
            for value in line
        )
        body += f'<tr><th scope="row">{html.escape(str(name))}</th>{cells}</tr>'
    kind = "heat" if columns[0].isdigit() else "heat words" + " many" * (len(columns) > 9)
    return f'<table class="{kind}"><tr><td></td>{head}</tr>{body}</table>'


def frame_numbers(video: np.ndarray) -> list[str]:
    """Every third one, from 1."""
    return [str(i + 1) if i % 3 == 0 else "" for i in range(len(video))]


def curves(schedule: NoiseSchedule) -> str:
    """alpha and sigma over t, drawn as SVG."""
    a = schedule.alphas_cumprod.cpu()
    points = {}
    for name, values in {"alpha": a.sqrt(), "sigma": (1 - a).sqrt()}.items():
        picked = np.linspace(0, len(a) - 1, 60).astype(int)
        places = (f"{20 + 560 * i / len(a):.1f},{130 - 110 * float(values[i]):.1f}" for i in picked)
        points[name] = " ".join(places)
    return f"""<svg viewBox="0 0 600 160" role="img" aria-label="alpha falls and sigma rises">
<path d="M20 20V130H580" class="axis"/><polyline points="{points["alpha"]}" class="alpha"/>
<polyline points="{points["sigma"]}" class="sigma"/><text x="290" y="84" class="alpha">α, the share
of the video</text><text x="570" y="52" text-anchor="end" class="sigma">σ, the share of noise</text>
<text x="20" y="150">t = 0</text><text x="580" y="150" text-anchor="end">t = {len(a) - 1}</text>
</svg>"""


def source(function) -> str:
    """file:line and name of a function, as they are now."""
    function = inspect.unwrap(function)
    file = Path(inspect.getsourcefile(function)).name
    line = inspect.getsourcelines(function)[1]
    return f"<code>{file}:{line}</code> <code>{function.__qualname__}</code>"


def station(name: str, text: str, *figures: str, made: list[tuple]) -> str:
    """A section of the page. name: "Noun: what happens"; made: (what, tensor, its function), ..."""
    facts = "".join(
        f"<li><b>{what}</b> <code>{tuple(value.shape)}</code> {source(function)}</li>"
        for what, value, function in made
    )
    anchor = name.split(":")[0].lower().replace(" ", "-")
    return (f'<section id="{anchor}"><h2>{name}</h2>{text}{"".join(figures)}'
            f'<ul class="facts">{facts}</ul></section>')


# ------------------------------------------------------------------------------ the stations


def text_stations(pipeline: Pipeline, sentence: str) -> list[str]:
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    length = encoder.config.context_length
    tokens, mask = tokenizer.batch([sentence], length, pipeline.device)
    names = [tokenizer.decode([i]).replace(" ", "␣") for i in tokens[0].tolist()]
    names[0], names[-1] = "start", "end"
    chips = "".join(f"<li>{html.escape(n)}<small>{i}</small></li>"
                    for n, i in zip(names, tokens[0].tolist()))
    context = encoder(tokens, mask)
    words, cosines = word_similarity(tokenizer, context, sentence)
    return [
        station(
            "Tokens: words become numbers",
            "<p>A network reads numbers only. The tokenizer cuts the sentence into pieces that are "
            "frequent in the training captions, and each piece has a number. A word that was "
            "never seen is put together from smaller pieces, in the end from single bytes, so "
            "any text can be written.</p>",
            figure(f'<ol class="chips">{chips}</ol>', "The tokens and their ids. ␣ is a space."),
            made=[("tokens", tokens, Tokenizer.batch)],
        ),
        station(
            "Context: each word in the light of the others",
            "<p>A small transformer turns each token into a vector. In it every token looks at all "
            "others, so a vector says more than its word: also what stands around it, and whether "
            "that action comes first or second. These vectors are all that the video model knows "
            "of the sentence, and the two were trained together.</p>",
            figure(heatmap(cosines, words, words),
                   "How alike the encoded words are: the cosine of the vectors of each two. Strong "
                   "colour off the diagonal means two words that are much alike to the model."),
            made=[("context", context, TextEncoder.forward)],
        ),
    ]


def latent_stations(pipeline: Pipeline, sentence: str) -> list[str]:
    if isinstance(pipeline.size, tuple):
        raise UserError("the tour draws square frames, and those of this checkpoint are not")
    clip, exact = draw_sentence(sentence, pipeline.size)
    video = to_model(clip[None]).to(pipeline.device)
    latents = pipeline.vae.encode_video(video)
    decoded = to_uint8(pipeline.vae.decode_video(latents))[0]
    error = np.square(decoded.astype(float) - clip).mean()
    shown = np.linspace(0, len(clip) - 1, 8).astype(int)
    columns = [f"{i + 1}" for i in shown]
    rows = {"The clip": [clip[i] for i in shown]}
    for c in range(latents.shape[1]):
        rows[f"Latent channel {c + 1}"] = [latent_picture(latents[0, c, i]) for i in shown]
    rows["Decoded again"] = [decoded[i] for i in shown]
    whose = "this sentence" if exact else "another sentence: the renderer cannot draw this one"
    schedule, generator = pipeline.schedule, torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    frame, last = len(clip) // 2, schedule.config.timesteps - 1
    moments = [round(last * share) for share in (0, 0.1, 0.25, 0.5, 0.75, 1)]
    noisy = [schedule.q_sample(latents, torch.tensor([t], device=latents.device), noise)
             for t in moments]
    labels = []
    for t in moments:
        alpha, sigma = schedule.alpha_sigma(torch.tensor([t]), noise[:1].cpu())
        labels.append(f"t {t}<br>α {alpha.item():.2f}<br>σ {sigma.item():.2f}")
    one = torch.cat([x[:, :, frame : frame + 1] for x in noisy])
    pictures = to_uint8(pipeline.vae.decode_video(one))[:, 0]
    numbers = video[0].numel() // latents[0].numel()
    return [
        station(
            "Latents: frames become small",
            f"<p>The autoencoder turns each frame into a picture of {latents.shape[3]}×"
            f"{latents.shape[4]} with {latents.shape[1]} channels, and back. These are {numbers} "
            "times fewer numbers, and all that follows works on them. The clip below was not made "
            f"by the model: it is rendered, of {whose}.</p>",
            figure(strip(rows, columns),
                   "Frames of the clip, their latents as gray pictures, and the frames decoded "
                   f"from these, at a PSNR of {10 * np.log10(255**2 / error):.0f} dB."),
            made=[("latents", latents, AutoencoderKL.encode_video),
                  ("video", video, AutoencoderKL.decode_video)],
        ),
        station(
            "Noise: what the model learns from",
            "<p>The model learns by cleaning videos. In training, noise is added to a clip's "
            "latents: <code>x_t = α · x_start + σ · noise</code>. At small t it is a little noise, "
            "at the last t it is nothing else. The network gets <code>x_t</code>, t and the "
            "sentence, and has to say what the clean video was. With little noise it can see that. "
            "With nothing but noise, the sentence is all it has to go by.</p>",
            figure(strip({"": pictures, "Its first latent channel":
                          [latent_picture(x[0, 0, frame]) for x in noisy]}, labels),
                   f"Frame {frame + 1} of the clip above with more and more noise, decoded."),
            figure(curves(schedule), "How much of x_t is video and how much is noise."),
            made=[("x_t", noisy[0], NoiseSchedule.q_sample)],
        ),
    ]


WHERE = {  # the first word of a layer's name
    "read": "what each frame asks about its own moment, before anything is drawn",
    "down": "in the first half of the network",
    "middle": "at the bottom of the network, where the maps are smallest",
    "up": "in the second half of the network",
}


def sampling_stations(pipeline: Pipeline, sentence: str, run: dict, bare: dict) -> list[str]:
    steps = sorted({0, 1, 2, 4, STEPS // 3, STEPS // 2, 3 * STEPS // 4, STEPS - 1})
    labels = [f"step {i + 1}<br>t {run['steps'][i][0]}" for i in steps]
    count = len(run["video"])
    frames = [0, count // 3, 2 * count // 3, count - 1]

    def decoded(run, which):
        latents = torch.cat([run["steps"][i][which][:, :, frames] for i in steps])
        return to_uint8(pipeline.vae.decode_video(latents))

    def rows(run):
        belief = decoded(run, 2)
        return {f"What it believes of frame {f + 1}": belief[:, i] for i, f in enumerate(frames)}

    noisy = {f"What goes in: frame {count}": decoded(bare, 1)[:, -1]}
    words, layers = word_attention(run["words"], pipeline.tokenizer, sentence)[0], []
    numbers = frame_numbers(run["video"])
    for name, calls in run["words"].items():
        _, weights = word_attention({name: calls}, pipeline.tokenizer, sentence)
        where = WHERE[name.split(".")[0]]
        layers.append(figure(heatmap(torch.from_numpy(weights), words, numbers),
                             f"<code>{name}</code>, {where}."))
    x_t, x_start = run["steps"][0][1:]
    return [
        station(
            "Sampling: noise becomes a video",
            f"<p>To draw a video, start with pure noise and ask the network {STEPS} times. Each "
            "time it says what it believes the clean video to be, and the sampler takes a step "
            "towards that. At first the belief is faint and blurred: it is the mean of all videos "
            "that fit the sentence. With each step fewer of them fit the noise as well, until one "
            "is left.</p>",
            figure(strip(noisy | rows(bare), labels),
                   "What goes into the network, and what it makes of it, without guidance."),
            "<p>The finished video was drawn with guidance. While there is much noise, the network "
            "is asked twice, with the sentence and without it, and their difference is taken "
            f"{GUIDANCE:g} times. So the words count for more. On the way this goes too far, in "
            "colour and in shape, and with less noise, and without guidance, it comes back.</p>",
            figure(strip(rows(run), labels), "The same noise, with guidance."),
            made=[("x_t", x_t, SAMPLERS[SAMPLER]), ("x_start", x_start, NoiseSchedule.predict),
                  ("guided", x_start, guided)],
        ),
        station(
            "Word attention: frames read words",
            "<p>This is how the sentence gets into the video. In cross-attention every place of "
            "every frame asks a question, every word offers an answer, and the answers are mixed "
            "by how well they fit. If the order of the words is to be the order of the actions, "
            "early frames must read the first action and late frames the second.</p>",
            *layers,
            made=[("weights", calls[0], CrossAttention.word_weights),
                  ("output", x_start, UNet3D.forward)],
        ),
        time_station(pipeline, run),
    ]


def time_station(pipeline: Pipeline, run: dict) -> str:
    """Attention in time, at the highest and at the lowest resolution that has it."""
    layers = dict(pipeline.unet.named_modules())
    names = sorted(run["times"], key=lambda name: run["times"][name].shape[2])
    figures, numbers = [], frame_numbers(run["video"])
    for name in (names[-1], names[0]):
        x = run["times"][name]
        side = round(x.shape[2] ** 0.5)
        row, column = busiest_place(run["video"], side)
        weights = time_attention(layers[name], x, row * side + column)
        figures.append(figure(
            heatmap(weights, numbers, numbers),
            f"<code>{name}</code>, of {side}×{side} places: row {row + 1}, column {column + 1}, "
            "where the most happens. Each line is a frame, and shows which frames it looks at.",
        ))
    return station(
        "Time attention: frames look at frames",
        "<p>Attention in time makes one video out of many pictures. At each place, each frame "
        "looks at the same place in all frames, and takes over some of what it finds there. So an "
        "object keeps its colour, and moves on from where it was.</p>",
        *figures, made=[("weights", weights, TemporalAttention.forward)],
    )


def result_station(sentence: str, video: np.ndarray, fps: float) -> str:
    seen = [f"{r.colour} {r.shape}: {', then '.join(str(a or 'nothing clear') for a in r.actions)}"
            for r in read_things(video, fps)]
    text = html.escape("; ".join(seen) or "nothing at all")
    strips = strip({"": list(video[::2])}, [str(i + 1) for i in range(0, len(video), 2)])
    return station(
        "Result: does it show what was asked?",
        "<p>The program that renders the training clips has an inverse. It reads from the pixels, "
        "without any network, which objects there are and what they do. So thousands of videos can "
        "be checked against their sentences.</p>"
        f'<p class="verdict"><span>asked</span> {html.escape(sentence)}<br>'
        f"<span>read</span> {text}</p>",
        figure(strips, "Every second frame of the finished video."),
        made=[("video", video, Pipeline.generate), ("readings", np.empty(len(seen)), read_things)],
    )


# ------------------------------------------------------------------------------ the page

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf6; --ink: #20222a; --soft: #656a76; --line: #dcd8cc;
  --panel: #f1eee5; --alpha: #1f6f78; --sigma: #c2512f; --heat: #1f6f78 }
@media (prefers-color-scheme: dark) { :root { --page: #22211e; --ink: #e9e6df; --soft: #a5a39c;
  --line: #45433d; --panel: #2d2b27; --alpha: #6cc5cd; --sigma: #f28f6b; --heat: #6cc5cd } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); counter-reset: station;
  font: 1.06rem/1.6 Charter, "Iowan Old Style", "Source Serif 4", Georgia, serif }
main { max-width: 44rem; margin: 0 auto; padding: 3rem 1.25rem 5rem }
header { display: grid; grid-template-columns: 1fr 11rem; gap: 2rem; align-items: center }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 .8rem; font-weight: 600; text-wrap: balance }
h2 { font-size: 1.45rem; line-height: 1.25; margin: 0 0 .7rem; font-weight: 600;
  text-wrap: balance }
h2::before { content: counter(station); color: var(--sigma); margin-right: .6em }
p { margin: 0 0 1rem }
.soft, figcaption, .strip, .heat, .facts, nav { color: var(--soft);
  font: .82rem/1.45 system-ui, "Segoe UI", sans-serif }
nav ol { list-style: none; margin: 2rem 0 0; padding: .8rem 0; border-block: 1px solid var(--line);
  columns: 2; column-gap: 2rem }
nav li { break-inside: avoid; counter-increment: entry }
nav li::before { content: counter(entry); color: var(--sigma); margin-right: .7em }
a { color: inherit; text-decoration-color: var(--line); text-underline-offset: .25em }
a:hover { text-decoration-color: currentColor }
section { counter-increment: station; margin-top: 4rem; scroll-margin-top: 1.5rem }
figure { margin: 1.6rem 0 }
figcaption { margin-top: .6rem }
code { font: .86em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere }
img { display: block; width: 100%; image-rendering: pixelated }
.strip { display: grid; grid-template-columns: repeat(var(--n), 1fr); gap: 3px; line-height: 1.3 }
.strip span { text-align: center; font-size: .72rem; align-self: end }
.strip p { grid-column: 1 / -1; margin: .5rem 0 .1rem; color: var(--ink) }
.strip img, header img { outline: 1px solid var(--line); outline-offset: -1px; border-radius: 2px }
.heat { border-collapse: separate; border-spacing: 2px; width: 100%; table-layout: fixed }
.heat th { font-weight: 400; font-size: .76rem; padding: 0; overflow: visible; white-space: nowrap }
.heat th[scope=row] { text-align: right; padding-right: .5rem; color: var(--ink) }
.heat th[scope=col] { vertical-align: bottom }
.many th[scope=col] span { writing-mode: vertical-rl; transform: rotate(180deg) }
.heat td, .heat tr:first-child > td:first-child { height: 1.35rem; border-radius: 2px }
.heat tr:first-child > td:first-child { width: 5.2rem }
.heat td[style] { background: color-mix(in srgb, var(--heat) calc(var(--w) * 100%), var(--panel)) }
.chips { display: flex; flex-wrap: wrap; gap: .4rem; list-style: none; margin: 0; padding: 0 }
.chips li { background: var(--panel); border-radius: .35rem; padding: .25rem .55rem;
  text-align: center; font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .9rem }
.chips small { display: block; color: var(--soft) }
.facts { list-style: none; margin: 0; padding: .7rem .9rem; background: var(--panel);
  border-radius: .4rem }
.facts li { display: grid; grid-template-columns: 5rem 8.5rem 9.5rem 1fr; gap: .1rem .8rem;
  align-items: baseline }
.facts b { color: var(--ink); font-weight: 600 }
.verdict { background: var(--panel); border-left: 3px solid var(--sigma); padding: .7rem .9rem }
.verdict span { display: inline-block; width: 3.2rem; color: var(--soft) }
svg { width: 100%; font: 13px system-ui, sans-serif; fill: var(--soft) }
svg .axis, svg polyline { fill: none; stroke: var(--line); stroke-width: 1.5 }
svg polyline { stroke-width: 3 }
svg polyline.alpha { stroke: var(--alpha) } svg text.alpha { fill: var(--alpha) }
svg polyline.sigma { stroke: var(--sigma) } svg text.sigma { fill: var(--sigma) }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--line) }
@media (max-width: 34rem) { body { font-size: 1rem } main { padding-top: 1.5rem }
  header { grid-template-columns: 1fr; gap: 1.2rem } header img { width: 10rem }
  h1 { font-size: 1.6rem } h2 { font-size: 1.25rem } nav ol { columns: 1 }
  .heat tr:first-child > td:first-child { width: 3.6rem } .heat td { height: 1rem }
  svg { font-size: 21px }
  .words th[scope=col] span { writing-mode: vertical-rl; transform: rotate(180deg) }
  .strip span { font-size: .6rem } .facts li { display: flex; flex-wrap: wrap } }
"""


def page(sentence: str, film: str, stations: list[str], made_by: str) -> str:
    """The whole page: the head, the index of stations, and the stations."""
    names = [(s.split('id="')[1].split('"')[0], s.split("<h2>")[1].split("</h2>")[0])
             for s in stations]
    index = "".join(f'<li><a href="#{anchor}">{name}</a></li>' for anchor, name in names)
    title = html.escape(sentence)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><main><header><div><h1>“{title}”</h1><p>One sentence on its way through the model: from
letters to numbers, from noise to a video.</p></div>{film}</header>
<nav><ol>{index}</ol></nav>{"".join(stations)}<footer class="soft">{made_by}</footer></main></body>
</html>
"""


@torch.no_grad()
def tour(checkpoint: str, sentence: str, seed: int, out: Path) -> None:
    """Follows the sentence through the model and writes the page."""
    start = time.perf_counter()
    check_output(out, checkpoint)
    pipeline = load_pipeline(checkpoint, pick_device("auto"))
    try:
        run = sample_and_watch(pipeline, sentence, seed, GUIDANCE)
        bare = sample_and_watch(pipeline, sentence, seed, 1.0)
    except ValueError as error:
        raise UserError(error) from error
    stations = [
        *text_stations(pipeline, sentence),
        *latent_stations(pipeline, sentence),
        *sampling_stations(pipeline, sentence, run, bare),
        result_station(sentence, run["video"], pipeline.fps),
    ]
    command = f"python experiments/tour.py {shlex.quote(sentence)}" + f" --seed {seed}" * bool(seed)
    seconds = time.perf_counter() - start
    made_by = f"Made by <code>{html.escape(command)}</code> in {seconds:.0f} seconds."
    with atomic_path(out) as path:
        film = picture(run["video"], sentence, pipeline.fps)
        path.write_text(page(sentence, film, stations, made_by), encoding="utf-8")
    print(out)


def parse_args(argv=None):
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("sentence", help="what should happen, in words")
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="a model.pt (the shipped one)")
    parser.add_argument("--seed", type=number(int, 0, 2**62), default=0, help="(%(default)s)")
    parser.add_argument(
        "--out", type=file_name(".html", ".htm"), default="samples/tour.html",
        help="the page (%(default)s)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: tour(**vars(parse_args())))
