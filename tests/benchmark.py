"""How fast is it? Not a test: timings depend on the machine and on what else it does.

    python tests/benchmark.py shapes      # captioned clips rendered per second, on one core
    python tests/benchmark.py data --data FOLDER         # clips of a folder decoded per second
    python tests/benchmark.py train       # UNet steps of the shapes preset, clips per second
    python tests/benchmark.py start       # seconds from starting sample.py to the finished GIF
    python tests/benchmark.py i3d         # clips through I3D per second

How good it is: tests/experiments.py.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def shapes(clips=1000):
    from data import MovingShapes

    dataset = MovingShapes(clips)
    start = time.perf_counter()
    for i in range(clips):
        dataset[i]
    return {"clips per second": clips / (time.perf_counter() - start)}


def data(folder, videos=8, rounds=4):
    """Clips of 16 frames at 128 pixels, beside reading the same files whole with imageio."""
    import imageio.v3 as iio
    from data import VideoFolder, read_ahead

    dataset, results = VideoFolder(folder, size=128), {}
    picked = np.linspace(0, len(dataset) - 1, min(videos, len(dataset))).astype(int).tolist()
    for workers in (1, 2):
        start = time.perf_counter()
        clips = sum(clip is not None for _, clip in read_ahead(dataset, picked * rounds, workers))
        seconds = time.perf_counter() - start
        results[f"clips per second, {workers} worker{'s' * (workers > 1)}"] = clips / seconds
    start = time.perf_counter()
    frames = [len(iio.imread(Path(folder) / dataset.items[i][0], plugin="pyav")) for i in picked]
    seconds = time.perf_counter() - start
    results["files per second, whole, with imageio"] = len(frames) / seconds
    return results | {"frames in a file, on average": sum(frames) / len(frames)}


def train(steps=10, warmup=3):
    from sample import autocast, pick_device
    from train import PRESETS, make_optimizers
    from unet3d import UNet3D

    preset, device = PRESETS["shapes"], pick_device("auto")
    config, batch = preset.diffusion_training, preset.diffusion_training.batch_size
    unet = UNet3D(preset.unet).to(device)
    optimizers = make_optimizers(unet, config)
    x = torch.randn(batch, 4, 16, 8, 8, device=device)
    context = torch.randn(batch, 16, preset.unet.text_width, device=device)
    mask = torch.ones(batch, 16, dtype=torch.bool, device=device)
    t, fps = torch.arange(batch, device=device), torch.full((batch,), 8.0, device=device)
    for step in range(warmup + steps):
        if step == warmup:
            start = time.perf_counter()
        with autocast(device):
            loss = (unet(x, t, context, mask, fps).float() - x).square().mean()
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        loss.item()  # waits for the GPU
    return {"clips per second": batch * steps / (time.perf_counter() - start)}


def start():
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        prompt = "a red circle moves right, then up"
        command = [sys.executable, "sample.py", prompt, "--out", folder]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return {"seconds": time.perf_counter() - begin}


def i3d(batch=4, repeats=3):
    import metrics
    from sample import pick_device

    args, device = metrics.parse_args(["--fake", "shapes"]), pick_device("auto")
    network = metrics.load_networks(args, ["fvd"], device)[0]["i3d"]
    video = torch.rand(batch, 3, 16, 64, 64, device=device) * 2 - 1
    with torch.inference_mode():
        network(video)
        start = time.perf_counter()
        for _ in range(repeats):
            network(video).sum().item()  # waits for the GPU
    return {"clips per second": batch * repeats / (time.perf_counter() - start)}


SPEEDS = {"shapes": shapes, "data": data, "train": train, "start": start, "i3d": i3d}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=SPEEDS)
    parser.add_argument("--data", help="of data: a folder of videos")
    args = parser.parse_args()
    if (args.what == "data") != (args.data is not None):
        parser.error("--data FOLDER goes with data, and data with it")
    for name, value in SPEEDS[args.what](*filter(None, [args.data])).items():
        print(f"{args.what}: {value:.3g} {name}")
