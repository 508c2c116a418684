"""What every command of this project shares and no reader needs at first: one-line errors, types of
arguments, device and precision, files that appear whole or not at all, and checkpoints.
"""

import argparse
import contextlib
import json
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

# ------------------------------------------------------------------------------ errors


class UserError(Exception):
    """A mistake of the user's: shown as one line, exit status 2."""


def out_of_memory(error):
    """Is it a full memory? PyTorch has no error of its own for that on a CPU, and cuBLAS and cuDNN
    say it in their own words."""
    texts = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED",
             "ALLOCATION_FAILED", "STATUS_NOT_INITIALIZED", "unable to find an engine",
             "valid cuDNN algorithm")
    full = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return full or isinstance(error, MemoryError)


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


# ------------------------------------------------------------------------------ messages

def progress(items, title, done, total):
    """A progress bar on stderr around the items that are left."""
    interval = 0.5 if sys.stderr.isatty() else 60  # seconds; few lines when stderr is a file
    return tqdm(
        items, title, initial=done, total=total, mininterval=interval, disable=process() > 0
    )


def say(text):
    """A line on stderr, above a progress bar if there is one."""
    if process() == 0:
        tqdm.write(text, file=sys.stderr)


def memory_gib():
    """Peak memory so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, else kiB


# ------------------------------------------------------------------------------ several GPUs
# torchrun starts a process for each GPU. All do the same, each with its share of every batch, and
# the first one alone writes files and messages. Without torchrun there is only the first one.


def join_processes(device):
    """Under torchrun: meet the other processes, and take one GPU each."""
    if "LOCAL_RANK" in os.environ:  # set by torchrun
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The others wait for as long as the first one encodes the data set.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))


def processes():
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process():
    """The number of this one; 0 is the first."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def first_process_first():
    """The others do what is inside when the first one is through, with what it left on the disk."""
    if process() > 0:
        dist.barrier()
    yield
    if process() == 0 and processes() > 1:
        dist.barrier()


def parts(batch, count, device):
    """This process's parts of a batch of tensors (b, ...), which is the same in every process, as
    pairs: the share of the batch that a part is, and its tensors. `count` parts in each process go
    one after the other, for --grad-accum."""
    pieces = (x.tensor_split(count * processes())[process() :: processes()] for x in batch)
    for part in zip(*pieces):
        yield len(part[0]) / len(batch[0]), [x.to(device) for x in part]


def sum_over_processes(values, parameters=()):
    """Adds up what the processes found, each in its share of the batch: a dict of floats, which is
    returned, and the gradients of the parameters, where they are."""
    if processes() == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensors = [torch.tensor(list(values.values()), device=device)]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # not in this one's share
        tensors.append(p.grad)
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat)
    for x, total in zip(tensors, flat.split([x.numel() for x in tensors])):
        x.copy_(total.view(x.shape))
    return dict(zip(values, tensors[0].tolist()))


# ------------------------------------------------------------------------------ device


def pick_device(name):
    """"auto", "cpu" or "cuda" -> torch.device. Raises UserError where there is no CUDA GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(device, precision=None):
    """bfloat16 autocast where the hardware multiplies bfloat16 matrices faster than float32 ones:
    recent GPUs, CPUs with AMX tiles, and AMD's from Zen 4 on. On 2 cores of the latter it did 396
    against 135 GFLOP/s, on 2 of an Intel Xeon with AVX-512 and no AMX 137 against 282.

    precision: "bf16" or "fp32" instead, whatever the hardware."""
    if precision is not None:
        fast = precision == "bf16"
    elif device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of PyTorch: none
        amd = cpu.get("cpu_name", "").startswith("AMD")
        fast = cpu.get("amx_bf16", False) or amd and cpu.get("avx512_bf16", False)
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


@contextlib.contextmanager
def locked(folder):
    """Makes a folder if need be, and keeps other runs out of it until the context ends or this
    process does. Raises UserError where another one is in it."""
    folder, handle = Path(folder), None
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.suppress(ImportError):  # Windows has none: there nothing is locked
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(f"another run writes into {folder}: choose another --out") from error
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)
        for path in made:
            with contextlib.suppress(OSError):  # not if anything lies in it
                path.rmdir()


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


def check_weights(state, expected):
    """Raises ValueError unless `state` has the names and shapes of `expected`, both state dicts,
    and holds finite numbers that take no more memory than the file did."""
    def complain(what, names):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{what} {', '.join(map(str, names[:3]))}{more}")

    def usable(x):
        floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        return isinstance(x, torch.Tensor) and x.dtype in floats and x.layout == torch.strided \
            and not x.is_nested and x.device.type == "cpu"

    complain("the weights lack", [k for k in expected if k not in state])
    complain("the config has no place for", [k for k in state if k not in expected])
    complain("no tensor of numbers:", [k for k, x in state.items() if not usable(x)])
    shapes = {k: f"{k} {tuple(x.shape)}" for k, x in state.items() if x.shape != expected[k].shape}
    complain("the config asks for other shapes than", list(shapes.values()))
    stored = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in state.values()}
    if sum(x.numel() * x.element_size() for x in state.values()) > sum(stored.values()):
        raise ValueError("the tensors are larger than what the file holds of them")
    complain("not finite:", [k for k, x in state.items() if not x.isfinite().all()])


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
