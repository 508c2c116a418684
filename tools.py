"""What every command of this project shares and no reader needs at first: one-line errors, types of
arguments, device and precision, files that appear whole or not at all, and checkpoints.
"""

import argparse
import contextlib
import json
import os
import sys
import warnings
from pathlib import Path

import torch

# ------------------------------------------------------------------------------ errors


class UserError(Exception):
    """A mistake of the user's: shown as one line, exit status 2."""


def run_command(command):
    """Call `command()` for a command line: a UserError, an unusable data set, or a disk that is
    full or cannot be written ends it with one line and exit status 2."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without argparse's summary of every option."""

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the options)\n")


def number(kind, low, high):
    """An argparse type: int or float from `low` to `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            name = {int: "a whole number", float: "a number"}[kind]
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low} to {high}")
        return value

    return parse


def print_row(**row):
    """A row of a table as one JSON line on stdout, numbers with four digits."""
    for name, value in row.items():
        if hasattr(value, "item") or isinstance(value, float):
            row[name] = float(f"{value:.4g}")
    print(json.dumps(row), flush=True)


# ------------------------------------------------------------------------------ device


DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(name: str, precision: str | None = None) -> torch.device:
    """One of DEVICES -> torch.device, and PyTorch's settings for it and for --precision.

    "auto" is a CUDA GPU where there is one, else the CPU. "mps", an Apple GPU, follows PyTorch's
    documentation and has never been tried. Raises UserError where PyTorch does not see the device.
    """
    kinds = {"cuda": ("CUDA", torch.cuda), "mps": ("Apple", torch.backends.mps)}
    if name in kinds and not kinds[name][1].is_available():
        raise UserError(f"--device {name}: PyTorch sees no {kinds[name][0]} GPU here; use "
                        "--device cpu")
    # cuDNN's attention would take about half a second to prepare for every new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if precision == "fp32":  # TF32 keeps 10 bits of each number, and convolutions use it by default
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def product_dtype(device: torch.device, precision: str | None = None) -> torch.dtype:
    """The number format of matrix products: bfloat16 where the hardware multiplies such matrices
    faster than float32 ones. Recent CUDA GPUs do, CPUs with AMX tiles, and AMD's from Zen 4 on.

    precision: "bf16" or "fp32" instead, whatever the hardware."""
    if precision is not None:
        fast = precision == "bf16"
    elif device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        fast = False
    else:
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of PyTorch: none
        amd = cpu.get("cpu_name", "").startswith("AMD")
        fast = cpu.get("amx_bf16", False) or amd and cpu.get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, precision: str | None = None) -> torch.autocast:
    """Matrix products in `product_dtype`, by a context manager."""
    fast = product_dtype(device, precision) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


# ------------------------------------------------------------------------------ files


@contextlib.contextmanager
def atomic_path(path):
    """Gives a temporary path beside `path`; renamed onto it on success, deleted on any error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the rename must not overtake the data
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path, kind):
    """What torch.save wrote: tensors and plain values; nothing in the file is imported or run.

    Raises UserError, which calls the file a `kind`, where it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a foreign pickle, one error says enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated archives and foreign files fail in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise UserError(f"{path} is not a readable {kind} ({reason})") from error


def save_atomically(checkpoint, path):
    """torch.save that leaves the old file or the new one, never half of one. Raises UserError."""
    with atomic_path(path) as temporary:
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as error:  # so PyTorch calls what went wrong with the disk
            raise UserError(f"cannot write {path}: is the disk full?") from error


def load_checkpoint(path, *parts):
    """Read a checkpoint that holds at least the named parts. Raises UserError otherwise."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: check the path, or train one with train.py")
    checkpoint = load_tensors(path, "checkpoint")
    missing = [p for p in parts if not isinstance(checkpoint, dict) or p not in checkpoint]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}: it is not a checkpoint of this kind")
    return checkpoint


def pack(model):
    """A model as plain values and tensors: its config and its weights."""
    return {"config": vars(model.config), "state": model.state_dict()}


def unpack(model_class, config_class, packed):
    """The inverse of `pack`: rebuild a model from a checkpoint alone, in float32."""
    try:
        model = model_class(config_class(**packed["config"]))
        model.load_state_dict(packed["state"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:80]
        name = model_class.__name__
        raise UserError(f"the checkpoint's {name} does not fit this program ({reason})") from error
    return model.float().eval()
