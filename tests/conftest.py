"""Makes the flat modules importable from the tests, leaves room for others on the machine, and
builds one tiny model that several tests share.

All tests run on the CPU, on a machine with a GPU too: they compare bits and fork processes. With
T2V_GPU=1 only those run that are marked `gpu`."""

import os
import signal
import sys
from pathlib import Path

GPU = os.environ.get("T2V_GPU") == "1"
if not GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported, and for child processes

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it gives


def pytest_addoption(parser):
    parser.addoption("--inputs", type=int, default=60, help="of all kinds for test_fuzz.py")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; runs where T2V_GPU=1 is set")


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="T2V_GPU=1 runs it" if not GPU else "for the CPU")
    for item in items:
        if (item.get_closest_marker("gpu") is not None) != GPU:
            item.add_marker(skip)


def tiny_configs():
    """Configs of UNet, text encoder and autoencoder for 32x32 frames and 4x4 latents."""
    from text_encoder import TextEncoderConfig
    from unet3d import UNet3DConfig
    from vae import VAEConfig

    unet = UNet3DConfig(
        widths=(32, 32), blocks=(1, 1), attention=(False, True), head_width=16,
        text_width=32, embedding_width=32, groups=4,
    )
    text = TextEncoderConfig(context_length=100, width=32, depth=1, heads=2)
    return unet, text, VAEConfig(widths=(16, 32, 32), groups=4)


@pytest.fixture(autouse=True)
def signals_of_a_test():
    """What a command does about signals ends with its test."""
    import tools

    handlers = {number: signal.getsignal(number) for number in tools.SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    tools.interrupts.clear()


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Runs `python MODULE ARGUMENTS` in this process: (exit status, stdout, stderr)."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        status = 0
        try:
            module.run_command(module.main)
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture(scope="session")
def tiny_pipeline():
    """A whole Pipeline, small enough to run in no time: 32x32 frames, 4x4 latents, random weights.

    The layers that start at zero are random too, or they would hide what the others do.
    """
    from diffusion import DiffusionConfig, NoiseSchedule
    from sample import Pipeline
    from shapes import MovingShapes
    from text_encoder import TextEncoder, Tokenizer
    from unet3d import UNet3D
    from vae import AutoencoderKL

    unet, text, autoencoder = tiny_configs()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(autoencoder)
        models = TextEncoder(text), UNet3D(unet), vae
        for model in models:
            for p in model.eval().requires_grad_(False).parameters():
                if not p.any():
                    p.normal_(0, 0.1)
    dataset = MovingShapes(400)
    tokenizer = Tokenizer.train(dataset.describe(i)[0] for i in range(len(dataset)))
    return Pipeline(tokenizer, *models, NoiseSchedule(DiffusionConfig(shift=2.0)),
                    data={"size": 32})


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_pipeline, tmp_path_factory):
    """`tiny_pipeline` as a model.pt. Not to be changed: copy it first."""
    from train import save_pipeline

    path = tmp_path_factory.mktemp("tiny") / "model.pt"
    save_pipeline(tiny_pipeline, path)
    return path
