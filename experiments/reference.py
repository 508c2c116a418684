"""What is a good FVD? One half of the data against the other, as it is and spoilt in some ways.

    python experiments/reference.py --num 256
    python experiments/reference.py --data UCF-101 --stride 1

Prints a JSON line for each way to spoil it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import Parser, autocast, number, pick_device, print_row, run_command

import copy
from dataclasses import replace

import numpy as np
import torch

import metrics
from data import FRAMES, VideoFolder, to_model, to_uint8
from sample import CHECKPOINT, load_autoencoder


def spoil(video: np.ndarray, how: str, rng: np.random.Generator, vae=None) -> np.ndarray:
    """uint8 (f, h, w, 3) -> the same clip with its frames in random order, or with noise of 25
    levels, or through an autoencoder and back; "nothing" leaves it as it is."""
    if how == "shuffled":
        return video[rng.permutation(len(video))]
    if how == "noise":
        noisy = video + rng.normal(0, 25, video.shape)
        return noisy.round().clip(0, 255).astype(np.uint8)
    if how == "reconstructed":
        device = next(vae.parameters()).device
        with torch.inference_mode(), autocast(device):
            return to_uint8(vae.decode_video(vae.encode_video(to_model(video[None]).to(device))))[0]
    return video


def reference(checkpoint: str | Path, data: str, num: int, stride: int | None) -> None:
    """Spoils one half of the data in some ways, and measures it against the other half; and, in
    `fvd_of_same`, against itself unspoilt."""
    names, device = ["fvd", "kvd", "is"], pick_device("auto")
    if data != "shapes":  # as many as there are
        num = len(VideoFolder(data)) // 2
    options = ["--stride", str(stride)] if stride else []
    args = metrics.parse_args(["--real", data, "--fake", data, "--num", str(num), *options])
    networks, _ = metrics.load_networks(args, names, device)
    real, ways = metrics.open_side(data, 0, args, device), ["nothing", "shuffled", "noise"]
    metrics.agree_on_clips(args, [real])
    fake, unspoilt, vae = copy.copy(real), None, None
    if data == "shapes":
        fake.seed = 1
        ways.insert(1, "reconstructed")
        vae = load_autoencoder(checkpoint).to(device)
    else:
        real.items, fake.items = real.items[:num], real.items[num:]
    for warning in metrics.small_sample_warnings(names, num, FRAMES):
        print(f"warning: {warning}", file=sys.stderr)
    clips = metrics.take_clips(real, 0, args)
    whole = metrics.extract(clips, num, networks, device, title="real clips")
    for how in ways:
        rng = np.random.default_rng(0)
        spoilt = (
            replace(sample, video=spoil(sample.video, how, rng, vae))
            for sample in metrics.take_clips(fake, 1, args)
        )
        side = metrics.extract(spoilt, num, networks, device, title=how, size=whole["size"])
        unspoilt = side if how == "nothing" else unspoilt
        same = metrics.compare(unspoilt, side, ["fvd"])["fvd"]
        print_row(spoilt=how, num=num, **metrics.compare(whole, side, names), fvd_of_same=same)


def parse_args(argv=None):
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="(the shipped model)")
    parser.add_argument(
        "--data", default="shapes", metavar="shapes|FOLDER", help="(%(default)s)"
    )
    parser.add_argument(
        "--num", type=number(int, 2, 10**6), default=2048,
        help="shapes in a half; of a folder, all of it is taken (%(default)s)",
    )
    parser.add_argument(
        "--stride", type=number(int, 1, 10**6), metavar="N",
        help="of a folder: every N-th frame from a random place (16 over the whole video)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: reference(**vars(parse_args())))
