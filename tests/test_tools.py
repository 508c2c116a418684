"""Manners: what a command does with signals, streams, full memory and damaged values."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import tools
from tools import UserError, atomic_path, check_output, out_of_memory, printable, read_config
from tools import run_command

ROOT = Path(tools.__file__).parent
COMMAND = [sys.executable, ROOT / "sample.py", "a red circle spins"]


def run(command):
    """The exit status of a command."""
    with pytest.raises(SystemExit) as stop:
        run_command(command)
    return stop.value.code


def failing(error):
    def command():
        raise error
    return command


@pytest.mark.parametrize("error, status, line", [
    (UserError("so\nit is\x1b[2J\u202e"), 2, "error: so\\nit is\\x1b[2J\\u202e"),
    (FileNotFoundError(2, "No such file", "a\rb"), 2, "error: a\\rb: No such file"),
    (OSError("strange"), 2, "error: strange"),
    (MemoryError(), 2, "error: the memory is full"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 2, "error: the memory is"),
    (KeyboardInterrupt(), 130, "interrupted"),
])
def test_what_ends_a_command_is_one_line(capsys, error, status, line):
    assert run(failing(error)) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(line) and err.count("\n") == 1


@pytest.mark.parametrize("text, expected", [
    ("CUDA out of memory. Tried to allocate 2 GiB", True),
    ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate", True),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
    ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
    ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
    ("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED", True),
    ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
    ("GET was unable to find an engine to execute this computation", True),
    ("mat1 and mat2 shapes cannot be multiplied", False),
])
def test_a_full_memory_is_known_by_its_words(text, expected):
    assert out_of_memory(RuntimeError(text)) == expected and not out_of_memory(KeyError(text))


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="multiplied"):
        run_command(failing(RuntimeError("cannot be multiplied")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("swallowed", [False, True])
def test_an_interrupt_leaves_the_old_file(tmp_path, capsys, number, swallowed):
    path = tmp_path / "x.mp4"
    path.write_bytes(b"old")
    signal.signal(number, signal.SIG_DFL)  # a shell's background job ignores SIGINT

    def command():
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half of it")
            with contextlib.suppress(KeyboardInterrupt) if swallowed else contextlib.nullcontext():
                os.kill(os.getpid(), number)  # as a library does that calls back into Python
            temporary.write_bytes(b"damaged")

    assert run(command) == 128 + number
    assert capsys.readouterr().err == "interrupted\n"
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_outputs_that_cannot_be_written_or_are_inputs_are_refused(tmp_path):
    folder, file, circle = (tmp_path / name for name in ("folder", "file.png", "circle"))
    folder.mkdir()
    file.touch()
    circle.symlink_to(circle)
    link, inside = tmp_path / "link.png", folder / "inside.png"
    link.symlink_to(file)
    inside.touch()
    before = sorted(tmp_path.rglob("*"))
    for path, given in ((tmp_path / "new" / "a.png", file), (file, folder), (file, inside),
                        (inside, file), (folder / "new.png", folder), (file, "missing")):
        check_output(path, None, given)
    for path in (folder, file / "a.png", circle / "a.png", Path(os.devnull), "a" * 300):
        with pytest.raises(UserError, match="cannot write"):
            check_output(path)
    for path, given in ((file, file), (link, file), (file, link), (inside, folder)):
        with pytest.raises(UserError, match="would be overwritten"):
            check_output(path, None, given)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_ignored_hangup_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    run_command(lambda: os.kill(os.getpid(), signal.SIGHUP))


def test_a_reader_that_has_gone_stops_nothing(monkeypatch):
    done = []

    def command():
        for _ in range(3):
            print("a path")
            print("a message", file=sys.stderr)
            done.append(1)

    for name in ("stdout", "stderr"):
        read, write = os.pipe()
        os.close(read)
        monkeypatch.setattr(sys, name, open(write, "w"))
    run_command(command)
    assert len(done) == 3
    for stream in (sys.stdout, sys.stderr):
        stream.close()  # nothing is left in it that would fail now


def test_what_an_encoding_lacks_is_escaped(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        run_command(lambda: print("samples/\u5b57.gif"))
    assert (tmp_path / "out").read_text() == "samples/\\u5b57.gif\n"


def test_a_second_signal_of_any_kind_ends_the_program():
    for signum in tools.SIGNALS:
        signal.signal(signum, tools.interrupt)
    with tools.noted_signals() as noted:
        signal.raise_signal(signal.SIGTERM)
        assert noted == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    tools.interrupts.clear()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
def test_ctrl_c_during_the_imports_is_one_line():
    for pause in (0.1, 0.6):
        process = subprocess.Popen(
            COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not importing(process.pid):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
        assert process.returncode == 130 and out == "", err
        assert err.splitlines()[-1] == "interrupted" and "Traceback" not in err


def importing(pid):
    """Has a process begun to import PyTorch, which takes longest?"""
    return "/torch/" in Path(f"/proc/{pid}/maps").read_text()


@dataclass(frozen=True)
class Config:
    width: int = 8
    begin: int = 0
    rate: float = 0.5
    gamma: float | None = None
    name: str = "a"
    sides: tuple = (1, 2)
    flags: tuple = (True, False)


def test_configs_are_read():
    for values in ({}, {"width": 3, "begin": 0, "rate": 2, "gamma": 5.0, "name": "b"},
                   {"gamma": None}, {"sides": [4], "flags": (False,)}):
        expected = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        assert vars(read_config(Config, values)) == vars(Config()) | expected


@pytest.mark.parametrize("name, value", [
    ("width", 0), ("width", -1), ("width", 2.0), ("width", True), ("width", "8"), ("width", None),
    ("width", 2**21), ("begin", -1), ("rate", float("nan")), ("rate", "1"), ("gamma", False),
    ("name", 3), ("sides", ()), ("sides", 2), ("sides", (1, 0)), ("sides", (1,) * 17),
    ("sides", (1, (2,))), ("flags", (1, 0)), ("other", 1), ("width", torch.ones(2)),
])
def test_a_field_that_cannot_be_is_named(name, value):
    with pytest.raises(ValueError, match=name) as error:
        read_config(Config, {name: value})
    assert len(printable(error.value)) < 120


# ------------------------------------------------------------------------------ device


def test_a_device_that_is_not_there_is_refused():
    for name, kind in {"cuda": "CUDA", "mps": "Apple"}.items():
        with pytest.raises(UserError, match=f"--device {name}: PyTorch sees no {kind} GPU here"):
            tools.pick_device(name)


@pytest.mark.parametrize("name", tools.DEVICES)
@pytest.mark.parametrize("precision, wanted", [(None, None), ("bf16", True), ("fp32", False)])
def test_every_device_can_be_asked_for(monkeypatch, request, name, precision, wanted):
    for module in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    settings = matmul.allow_tf32, cudnn.allow_tf32
    request.addfinalizer(lambda: (setattr(matmul, "allow_tf32", settings[0]),
                                  setattr(cudnn, "allow_tf32", settings[1])))
    matmul.allow_tf32 = cudnn.allow_tf32 = True  # as PyTorch's advice for compiling has it
    device = tools.pick_device(name, precision)
    assert device.type == ("cuda" if name == "auto" else name)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert matmul.allow_tf32 == cudnn.allow_tf32 == (precision != "fp32")
    if device.type != "cuda":  # without CUDA there is no autocast for it
        with tools.autocast(device, precision):
            assert wanted in (None, torch.is_autocast_enabled(device.type))
