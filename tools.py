"""What every command shares and no reader needs at first: manners (errors, interrupts, closed
streams), types of arguments, device and precision, files that appear whole or not at all, and
checkpoints. Commands import it first: from then on Ctrl-C is one line, in other imports, too.
"""

import argparse
import ast
import contextlib
import hashlib
import json
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import TextIO

MAIN = Path(getattr(sys.modules["__main__"], "__file__", None) or "none")

COMMANDS = ("sample.py", "train.py", "metrics.py", "shapes.py")
if MAIN.name in COMMANDS or MAIN.parent.name == "experiments":
    # A command is starting. An exception would not do: what is imported next may swallow it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))
    for stream in ("stdin", "stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed: the next file to open would take its place
            setattr(sys, stream, open(os.devnull, "w"))

import torch  # takes a second or two
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

# ------------------------------------------------------------------------------ manners


class UserError(Exception):
    """A mistake of the user's: shown as one line, exit status 2."""


def printable(text: object) -> str:
    """The text on one line: control characters, of file names for example, are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    text = getattr(error, "strerror", None) or str(error)
    if isinstance(error, KeyError) or not text:
        text = f"{type(error).__name__} {text}"
    return text.splitlines()[0]


class Stream:
    """stdout or stderr. Where nobody reads it any more, what is written is lost and the work goes
    on; what its encoding does not have is escaped."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write and flush; as `print` expects, the number of characters."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]  # Windows has no SIGHUP
interrupts = []  # signals that asked this program to end


def interrupt(signum: int, frame: object) -> None:
    """A signal handler: Ctrl-C and its like as an exception."""
    interrupts.append(signum)
    raise KeyboardInterrupt


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """A list that grows by the numbers of signals, instead of their usual effect: of Ctrl-C; of
    SIGTERM, with which torchrun and job schedulers end a process; and of SIGHUP, of a terminal that
    was closed. A second one ends the program at once, but for torchrun's processes."""
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    handlers = {n: old for n, old in handlers.items() if old != signal.SIG_IGN}  # as by nohup
    noted = []

    def restore_handlers():
        for signum, handler in handlers.items():
            signal.signal(signum, handler)

    def note(signum, frame):
        noted.append(signum)
        if processes() == 1:  # torchrun passes signals on, so that each comes twice
            restore_handlers()

    for signum in handlers:
        signal.signal(signum, note)
    try:
        yield noted
    finally:
        restore_handlers()


def out_of_memory(error: Exception) -> bool:
    """Is it a full memory? PyTorch has no error of its own for that on a CPU, and cuBLAS and cuDNN
    say it in their own words."""
    words = ("out of memory|can't allocate memory|not enough memory|ALLOC_FAILED|ALLOCATION_FAILED"
             "|STATUS_NOT_INITIALIZED|unable to find an engine|valid cuDNN algorithm")
    full = isinstance(error, RuntimeError) and re.search(words, str(error)) is not None
    return full or isinstance(error, MemoryError)


def run_command(command: Callable) -> object:
    """Call `command()` for a command line. What the user can mend, such as a UserError or a full
    disk or memory, ends it with one line and exit status 2; Ctrl-C, SIGTERM and SIGHUP with status
    128 + the signal's number, after files that are not complete have been deleted."""
    interrupts.clear()
    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # as under nohup
            signal.signal(signum, interrupt)
    out, err = Stream(sys.stdout), Stream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            return command()
        except UserError as error:
            message = error
        except OSError as error:
            message = f"{error.filename}: {reason(error)}" if error.filename else reason(error)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            message = ("the memory is full: try a smaller batch, fewer frames or --device cpu; in "
                       "training --grad-accum N (the same result, in N parts), --grad-checkpoint "
                       "or --precision bf16")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(128 + (interrupts or [signal.SIGINT])[-1])
        print(f"error: {printable(message)}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without argparse's summary of every option; and shows a
    description as it is written."""

    def __init__(self, **options: object):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> None:
        self.exit(2, f"error: {printable(message)} (--help lists the options)\n")

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """argparse's own, which all its ways to parse call; "--OPTION=--" is an error."""
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("--") and word.endswith("=--"):  # argparse would make it a list
                self.error(f"{word}: -- is no value")
        return super().parse_known_args(args, namespace)


def number(kind: type, low: float, high: float) -> Callable:
    """An argparse type: int or float from `low` to `high`."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        name = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low} to {high}")

    return parse


def file_name(*endings: str) -> Callable:
    """The argparse type of a file to write, with one of these endings."""

    def parse(text):
        if Path(text).suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(f"{text} does not end in {' or '.join(endings)}")
        return Path(text)

    return parse


def frame_size(text: str) -> int | tuple:
    """An argparse type: the side of a square, or WIDTHxHEIGHT."""
    sides = text.lower().split("x")
    size = tuple(int(side) for side in sides if side.isdecimal())
    if not len(sides) == len(size) < 3 or not 8 <= min(size) <= max(size) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is not 64 or 96x64, from 8 to 4096 pixels")
    return size[0] if len(set(size)) == 1 else size


def print_row(**row: object) -> None:
    """A row of a table as one JSON line on stdout, numbers with four digits."""
    numbers = {k: v for k, v in row.items() if hasattr(v, "item") or isinstance(v, float)}
    print(json.dumps(row | {k: float(f"{v:.4g}") for k, v in numbers.items()}), flush=True)


# ------------------------------------------------------------------------------ messages

def progress(items: Iterable, title: str, done: int, total: int) -> tqdm:
    """A progress bar on stderr around the items that are left."""
    interval = 0.5 if sys.stderr.isatty() else 60  # seconds; few lines when stderr is a file
    return tqdm(items, title, initial=done, total=total, mininterval=interval,
                disable=process() > 0)


def say(text: str) -> None:
    """A line on stderr, above a progress bar if there is one."""
    if process() == 0:
        tqdm.write(text, file=sys.stderr)


def read_log(path: Path) -> list[dict]:
    """The lines of log.jsonl as dicts, those that are not damaged."""
    lines, known = path.read_bytes().splitlines() if path.is_file() else [], []
    for line in lines:
        with contextlib.suppress(AttributeError, KeyError, RecursionError, ValueError):
            values = json.loads(line)
            numbers = [value for name, value in values.items() if name != "stage"]
            if values["stage"] in ("vae", "diffusion") and type(values["step"]) is int and all(
                type(value) in (int, float) for value in numbers
            ):
                known.append(values)
    if len(known) < len(lines):
        say(f"{path}: {len(lines) - len(known)} damaged lines dropped")
    return known


# ------------------------------------------------------------------------------ several GPUs
# torchrun starts a process for each GPU. All do the same, each with its share of every batch, and
# the first one alone writes files and messages. Without torchrun there is only the first one.


def join_processes(device: torch.device) -> None:
    """Under torchrun: meet the other processes, and take one GPU each."""
    if "LOCAL_RANK" in os.environ:  # set by torchrun
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if device.type == "cuda" else "gloo"
        # The others wait for as long as the first one encodes the data set.
        dist.init_process_group(backend, timeout=timedelta(days=1))


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process() -> int:
    """The number of this one; 0 is the first."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The others do what is inside when the first one is through, with what it left on the disk."""
    if process() > 0:
        dist.barrier()
    yield
    if process() == 0 and processes() > 1:
        dist.barrier()


def parts(batch: Sequence[torch.Tensor], count: int, device: torch.device) -> Iterator[tuple]:
    """This process's parts of a batch of tensors (b, ...), which is the same in every process, as
    pairs: the share of the batch that a part is, and its tensors. `count` parts in each process go
    one after the other, for --grad-accum."""
    pieces = (x.tensor_split(count * processes())[process() :: processes()] for x in batch)
    for part in zip(*pieces):
        # Out of pinned memory the copy runs beside the computation.
        yield len(part[0]) / len(batch[0]), [x.to(device, non_blocking=True) for x in part]


def sum_over_processes(values: dict, parameters: Iterable[torch.Tensor] = ()) -> dict:
    """Sums over all processes: `values`, scalar tensors (returned), and the parameters' gradients
    (in place)."""
    if processes() == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensors = [torch.stack([value.float().to(device) for value in values.values()])]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # not in this one's share
        tensors.append(p.grad)
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat)
    for x, total in zip(tensors, flat.split([x.numel() for x in tensors])):
        x.copy_(total.view(x.shape))
    return dict(zip(values, tensors[0]))


def accumulate(sums: dict, share: float, values: dict) -> None:
    """Adds `share` times each of the values to the sum of the same name."""
    for name, value in values.items():
        value = value.detach() if isinstance(value, torch.Tensor) else value
        sums[name] = sums.get(name, 0.0) + share * value


def read(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """The numbers in scalar tensors: the device is waited for once."""
    return dict(zip(values, torch.stack([v.float() for v in values.values()]).tolist()))


# ------------------------------------------------------------------------------ device


DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(name: str, precision: str | None = None) -> torch.device:
    """One of DEVICES -> torch.device, and PyTorch's settings for it and for --precision. "auto" is
    CUDA where it is there, else the CPU; "mps", an Apple GPU, has never been tried. Raises
    UserError where PyTorch does not see the device."""
    kinds = {"cuda": ("CUDA", torch.cuda), "mps": ("Apple", torch.backends.mps)}
    if name in kinds and not kinds[name][1].is_available():
        raise UserError(
            f"--device {name}: PyTorch sees no {kinds[name][0]} GPU here; use --device cpu")
    # cuDNN's attention would take about half a second to prepare for every new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if precision == "fp32":  # TF32 keeps 10 bits of each number, and convolutions use it by default
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def product_dtype(device: torch.device, precision: str | None = None) -> torch.dtype:
    """The number format of matrix products: what --precision says, or bfloat16 where it is faster:
    on recent CUDA GPUs, on CPUs with AMX tiles, and on AMD's from Zen 4 on."""
    fast = precision == "bf16"
    if precision is None and device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif precision is None and device.type == "cpu":
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
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`: renamed onto it on success, deleted on any error. An
    interrupt that a library swallowed counts as an error, too."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the rename must not overtake the data
        if interrupts:
            raise KeyboardInterrupt
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
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


def check_file(path: str | Path) -> None:
    """Raises ValueError for what is no file; from a pipe, say, reading might never end."""
    if not os.path.isfile(path):
        raise ValueError("not a file" if os.path.exists(path) else "no such file")


def check_output(path: str | Path, *inputs: str | Path | None) -> None:
    """Fails now rather than after the work, and leaves nothing behind: where `path` cannot be
    written, or would replace one of the inputs or a file that lies in one. Raises UserError."""
    try:
        file = Path(path).absolute()
        folder = next(p for p in file.parents if os.path.lexists(p))
        writable = folder.is_dir() and os.access(folder, os.W_OK)
        if not writable or file.exists() and not file.is_file():
            raise UserError(f"cannot write {path}: it is not a file, or not in a folder that can "
                            "be written: choose another name")
        here = file.parent.resolve() / file.name
        places = [here, *here.parents, *here.resolve().parents]  # the file, and all it lies in
        given = [x for x in inputs if x is not None and os.path.exists(x)]
        if here.exists() and any(os.path.samefile(x, y) for x in places for y in given):
            raise UserError(f"{path} is an input and would be overwritten: choose another name")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error


def load_tensors(path: str | Path, kind: str) -> object:
    """What torch.save wrote: tensors and plain values; nothing in the file is imported or run.
    Raises UserError, which calls the file a `kind`, where it cannot be read."""
    try:
        check_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a foreign pickle, one error says enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    except Exception as error:  # truncated archives and foreign files fail in many ways
        raise UserError(f"{path} is not a readable {kind}: it is damaged, or holds other things "
                        "than tensors and plain values") from error


def save_atomically(checkpoint: dict, path: Path) -> None:
    """torch.save that leaves the old file or the new one. Raises UserError."""
    with atomic_path(path) as temporary:
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as error:  # so PyTorch calls what went wrong with the disk
            raise UserError(f"cannot write {path}: is the disk full?") from error


def load_checkpoint(path: Path, *names: str) -> dict:
    """Read a checkpoint that holds at least the named parts. Raises UserError otherwise."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: check the path, or train one with train.py")
    checkpoint = load_tensors(path, "checkpoint")
    missing = [x for x in names if not isinstance(checkpoint, dict) or x not in checkpoint]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}: it is not a checkpoint of this kind")
    return checkpoint


def pack(model: torch.nn.Module) -> dict:
    """A model as plain values and tensors: its config and its weights."""
    return {"config": vars(model.config), "state": model.state_dict()}


def fits(value: object, default: object, high: int) -> bool:
    """Is it a value for a config's field with this default? Whole numbers are at most `high`."""
    if isinstance(default, tuple):
        return type(value) in (tuple, list) and 0 < len(value) <= 16 and all(
            fits(part, default[0], high) for part in value if default)
    if type(default) is int:
        return type(value) is int and min(1, default) <= value <= high
    if default is None or type(default) is float:
        return value is default or type(value) in (int, float) and math.isfinite(value)
    return type(value) is type(default)


# Of whole numbers in configs, so that a damaged file takes neither time nor memory.
LIMITS = {"blocks": 64, "depth": 64,
          **dict.fromkeys(("steps", "easy_start", "gan_start", "strides"), 10**9)}


def read_config(config_class: type, values: dict) -> object:
    """The config that a checkpoint's plain values mean; fields that it lacks have their defaults.
    Raises ValueError, which names the field, for anything that is no config of this class."""
    defaults = {field.name: field.default for field in fields(config_class)}
    for name, value in values.items():
        if name not in defaults:
            raise ValueError(f"{name!r} is none of {', '.join(defaults)}")
        if not fits(value, defaults[name], LIMITS.get(name, 2**20)):
            raise ValueError(f"{name} cannot be {value!r:.40}")
    return config_class(**{k: tuple(v) if type(v) is list else v for k, v in values.items()})


def read_value(text: str) -> object:
    """The plain Python value that a text means, or where it means none the text itself."""
    words = re.sub(r"\b(true|false|none)\b", lambda match: match[0].title(), text)
    try:
        return ast.literal_eval(words)
    except (MemoryError, RecursionError, SyntaxError, ValueError):
        return text


def set_fields(configs: dict, assignments: list[str]) -> dict:
    """{part: config} with the values of assignments such as "unet.widths=96,192" in place of their
    own. Raises UserError, which names what exists."""
    changes = {part: {} for part in configs}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        part, _, name = name.partition(".")
        if part not in configs:
            raise UserError(f"--set {assignment}: write PART.FIELD=VALUE, with a PART of "
                            f"{', '.join(configs)}")
        own, value = getattr(configs[part], name, None), read_value(text)
        if isinstance(own, tuple) and not isinstance(value, (list, tuple)):
            value = (value,)
        is_float = type(own) is float and type(value) is int and abs(value) < 2**53
        changes[part][name] = float(value) if is_float else value
    for part, values in changes.items():
        try:
            values = vars(configs[part]) | values
            configs = configs | {part: read_config(type(configs[part]), values)}
        except (OverflowError, ValueError) as error:
            raise UserError(f"--set {part}: {error}") from error
    return configs


def check_weights(state: dict, expected: dict) -> None:
    """Raises ValueError unless `state` has the names and shapes of `expected`, both state dicts,
    and holds finite numbers that take no more memory than the file did."""
    def usable(x):
        floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        return isinstance(x, torch.Tensor) and x.dtype in floats and x.layout == torch.strided \
            and not x.is_nested and x.device.type == "cpu"

    def refuse(what, names):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{what} {', '.join(map(str, names[:3]))}{more}")

    refuse("the weights lack", [k for k in expected if k not in state])
    refuse("the config has no place for", [k for k in state if k not in expected])
    refuse("no tensor of numbers:", [k for k, x in state.items() if not usable(x)])
    refuse("the config asks for other shapes than", [
        f"{k} {tuple(x.shape)}" for k, x in state.items() if x.shape != expected[k].shape])
    stored = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in state.values()}
    if sum(x.nbytes for x in state.values()) > sum(stored.values()):
        raise ValueError("the tensors are larger than what the file holds of them")
    refuse("not finite:", [k for k, x in state.items() if not x.isfinite().all()])


@contextlib.contextmanager
def no_weights() -> Iterator[None]:
    """Modules built in this context know the shapes of their weights, and store nothing."""
    with Unfilled(), torch.device("meta"):
        yield


class Unfilled(TorchFunctionMode):
    """Leaves new weights as they are. On the device "meta" drawing them would take a second and a
    half, for imports alone."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def unpack(model_class: type, config_class: type, packed: dict) -> torch.nn.Module:
    """The inverse of `pack`: rebuild a model from a checkpoint alone, in float32. Raises UserError
    that names what does not fit."""
    try:
        if not isinstance(packed, dict):
            raise ValueError("it is no config with weights")
        config, state = read_config(config_class, packed["config"]), packed["state"]
        with no_weights():  # whatever sizes the config asks for
            expected = model_class(config).state_dict()
        check_weights(state, expected)
        model = model_class(config)
        model.load_state_dict(state)
    except Exception as error:  # damaged values fail in many ways
        raise UserError(f"the checkpoint's {model_class.__name__}: {reason(error)}") from error
    return model.float().eval()


def digest(text: str, model: torch.nn.Module | None = None) -> str:
    """SHA-256 of a text and, if given, of a model's weights, in hex."""
    total = hashlib.sha256(text.encode())
    for value in model.state_dict().values() if model else ():
        total.update(value.numpy(force=True).tobytes())
    return total.hexdigest()


def restore(state: dict, models: dict, optimizers: dict, path: Path) -> None:
    """Fills models and optimizers with those of a training state, which was read from `path`.
    Raises UserError."""
    try:
        for kind, own in {"models": models, "optimizers": optimizers}.items():
            if state[kind].keys() != own.keys():
                raise ValueError(f"{kind} {', '.join(map(str, state[kind]))}")
        for name, model in models.items():
            check_weights(state["models"][name], model.state_dict())
            model.load_state_dict(state["models"][name])
        for name, optimizer in optimizers.items():
            # Checked one by one, because a fused step reads whatever lies in memory.
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            keys = ["momentum"] if name == "muon" else ["step", "exp_avg", "exp_avg_sq"]
            for i, values in state["optimizers"][name].items():
                like = {key: torch.zeros(()) if key == "step" else parameters[i] for key in keys}
                check_weights(values, like)
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(
                {"state": state["optimizers"][name], "param_groups": groups}
            )
    except Exception as error:  # damaged values fail in many ways
        raise UserError(f"{path} does not fit the preset as it is now ({error}): restore its "
                        "settings, or choose another --out") from error
