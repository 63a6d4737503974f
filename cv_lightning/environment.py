"""Environment variables that must be set before torch, vLLM or DeepSpeed are imported; logging; launch checks."""

from __future__ import annotations

import codecs
import importlib.metadata
import locale
import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

ALWAYS = {
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""The engine must run in this process, where it gets its weights; the rest keeps libraries quiet and offline."""
CPU_BUILD = {"DS_ACCELERATOR": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""1 GiB of key-value cache; no pinning, because trainer, engine and sandbox share the cores."""
VERBOSITY = "CVL_VERBOSITY"
"""Environment variable: `quiet`, `verbose`, or unset."""
FILE_ONLY = "file_only"
"""`extra={FILE_ONLY: True}` keeps a message off the terminal."""
LOCK_SETTLE_S = 5.0
"""A younger lock may belong to another host that shares the folder and is loading a finished build."""


def use_utf8() -> None:
    """Restart Python in its UTF-8 mode where the locale has another encoding: configs and outputs are UTF-8."""
    if sys.flags.utf8_mode or codecs.lookup(locale.getencoding()).name == "utf-8":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def use_current_folder() -> None:
    """Let imports find modules of the current folder first, as `python -m` does.

    The installed command has its own folder there. Ranks that Lightning starts run the same command; processes that
    are spawned take over `sys.path`.
    """
    with suppress(OSError):  # the folder was deleted
        if not sys.flags.safe_path and sys.path[:1] not in ([here := os.getcwd()], [""]):
            sys.path.insert(0, here)


def prepare_environment() -> None:
    """Set variables that the user has not set, and remove stale locks of DeepSpeed's compiled op.

    Imports nothing heavy; may be called more than once.
    """
    defaults = dict(ALWAYS)
    if is_verbose():
        defaults |= {"VLLM_LOGGING_LEVEL": "INFO", "TORCH_CPP_LOG_LEVEL": "WARNING"}
    if is_quiet():
        defaults |= {"WANDB_SILENT": "true", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if has_vllm_cpu():
        defaults |= CPU_BUILD
    if folder := extensions_folder():
        defaults["TORCH_EXTENSIONS_DIR"] = str(folder)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # The environment's ninja must come first: another version of it would build everything again.
    programs = str(Path(sys.prefix, "bin"))
    path = [entry for entry in os.environ.get("PATH", "").split(os.pathsep) if entry not in ("", programs)]
    os.environ["PATH"] = os.pathsep.join([programs, *path])
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        remove_stale_locks(Path(os.environ["TORCH_EXTENSIONS_DIR"]))


# ------------------------------------------------------------------------------------------------ logging
def take_verbosity(arguments: list[str]) -> list[str]:
    """Store `--quiet` or `--verbose` for this process and its children; returns the other arguments."""
    flags = ("--quiet", "--verbose")
    for argument in arguments:
        if argument in flags:
            os.environ[VERBOSITY] = argument.removeprefix("--")
    return [argument for argument in arguments if argument not in flags]


def is_quiet() -> bool:
    """True if only warnings, errors and results are printed."""
    return os.environ.get(VERBOSITY) == "quiet"


def is_verbose() -> bool:
    """True if the messages of libraries are printed as well."""
    return os.environ.get(VERBOSITY) == "verbose"


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to the current `sys.stderr`, which a live progress bar replaces."""

    @property
    def stream(self) -> TextIO:
        """`sys.stderr`."""
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Ignore the stream that the base class sets."""


def _is_no_guess(record: logging.LogRecord) -> bool:
    """False for DeepSpeed's remark on the accelerator that it guesses at its import, which no user can act on."""
    return "Setting accelerator to" not in str(record.msg)


def set_up_logging() -> None:
    """Send this package's messages to stderr according to `--quiet` and `--verbose`; of libraries only warnings."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, StderrHandler)]:
        root.removeHandler(handler)
    handler = StderrHandler()
    handler.setLevel(logging.WARNING if is_quiet() else logging.DEBUG)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(lambda record: not getattr(record, FILE_ONLY, False))
    root.addHandler(handler)
    root.setLevel(logging.INFO if is_verbose() else logging.WARNING)
    if not is_verbose():  # of DeepSpeed's own handler, which it sets up with a level of its own
        logging.getLogger("DeepSpeed").addFilter(_is_no_guess)
    # a run's log file also has the messages that stderr does not show
    logging.getLogger("cv_lightning").setLevel(logging.DEBUG if is_verbose() else logging.INFO)


class LogFile(logging.FileHandler):
    """A run's log file. A full disk ends the log, not the run, which reports the error elsewhere."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore errors of the disk; report others as `logging` does."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """Close the file even if the rest of it cannot be written."""
        with suppress(OSError):
            super().close()


def log_to(path: Path) -> logging.Handler:
    """Append all messages to a run's log file, too; remove the handler to stop."""
    handler = LogFile(path)
    logging.getLogger().addHandler(handler)
    return handler


# ------------------------------------------------------------------------------------------------ parts
def has_vllm_cpu() -> bool:
    """True if vLLM's CPU build is installed."""
    return bool(list(importlib.metadata.distributions(name="vllm-cpu")))


def extensions_folder() -> Path | None:
    """Folder of torch's compiled extensions inside the environment; None if that cannot be written."""
    folder = Path(sys.prefix, "torch_extensions")
    return folder if folder.is_dir() or os.access(sys.prefix, os.W_OK) else None


def remove_stale_locks(folder: Path) -> list[Path]:
    """Remove build locks whose owner is dead; every later start would wait for them forever (torch's FileBaton).

    A builder keeps its lock open while it lives, so a lock that no process has open has no owner.

    Args:
        folder: Folder of torch's compiled extensions.

    Returns:
        The removed locks.
    """
    locks = [path for path in folder.glob("*/lock") if time.time() - path.stat().st_mtime > LOCK_SETTLE_S]
    if not locks or not Path("/proc/self/fd").is_dir():
        return []
    held = _open_files()
    stale = [path for path in locks if str(path.resolve()) not in held and path.stat().st_uid == os.geteuid()]
    for path in stale:
        path.unlink(missing_ok=True)
        sys.stderr.write(f"removed {path}, the lock of a build that was killed\n")
    return stale


def _open_files() -> set[str]:
    """Targets of all file descriptors that this user may read."""
    targets: set[str] = set()
    for process in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):  # the process has ended, or is another user's
            for descriptor in process.iterdir():
                with suppress(OSError):  # closed in the meantime
                    targets.add(os.readlink(descriptor))
    return targets


def check_launch(devices: int | list[int] | str, num_nodes: int, environment: Mapping[str, str] = os.environ) -> int:
    """Refuse an environment in which the ranks of a run would wait for each other forever.

    Args:
        devices: `trainer.devices`.
        num_nodes: `trainer.num_nodes`.
        environment: Environment variables, with those of torchrun, srun or the user.

    Returns:
        Number of ranks; 0 for `auto`.

    Raises:
        ValueError: Names the variables or flags that contradict each other.
    """
    count = num_devices(devices)
    ranks, launcher = count * num_nodes, _launcher(environment)
    numbers = {name: _number(name, environment) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    world, rank = numbers["WORLD_SIZE"], numbers["RANK"]
    if launcher == "torchrun" and (rank is None or world is None or numbers["LOCAL_RANK"] is None):
        raise ValueError("torchrun's RANK, LOCAL_RANK and WORLD_SIZE are not all set: start every rank with it")
    if rank is not None and world is not None and not 0 <= rank < world:
        raise ValueError(f"RANK {rank} is not below WORLD_SIZE {world}: unset both, or start with torchrun")
    if launcher == "srun":
        world = _number("SLURM_NTASKS", environment)
    if launcher and ranks and world is not None and world != ranks:
        sizes = {
            "torchrun": f"WORLD_SIZE is {world} (--nnodes x --nproc-per-node)",
            "srun": f"SLURM_NTASKS is {world} (--nodes x --ntasks-per-node)",
        }
        raise ValueError(
            f"{sizes[launcher]}, but trainer.devices {devices} x trainer.num_nodes {num_nodes} = {ranks}: the ranks "
            f"that {launcher} starts and those that the trainer expects must be as many"
        )
    address = environment.get("MASTER_ADDR", "")
    if num_nodes > 1 and launcher != "srun" and not address:
        raise ValueError(
            f"trainer.num_nodes is {num_nodes}, but nothing says where the ranks meet: start with torchrun "
            "(--rdzv-endpoint HOST:PORT) or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on every node"
        )
    if address:
        _resolve(address, numbers["MASTER_PORT"])
    return ranks


def _launcher(environment: Mapping[str, str]) -> str:
    """Program that started this process; empty: the user or Lightning."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")  # as Lightning tells them apart
    return "srun" if "SLURM_NTASKS" in environment and "SLURM_PROCID" in environment and not interactive else ""


def num_devices(devices: int | list[int] | str) -> int:
    """Number of devices in `trainer.devices`; 0 for `auto` and -1, which only torch can count."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    if "," in text:
        return len([part for part in text.strip("[]").split(",") if part.strip()])
    return max(0, int(text)) if text.lstrip("-").isdigit() else 0


def _number(name: str, environment: Mapping[str, str]) -> int | None:
    given = environment.get(name)
    if given is None:
        return None
    if not given.strip().isdigit():
        raise ValueError(f"{name} is {given!r}: a whole number, or unset it")
    return int(given)


def _resolve(address: str, port: int | None) -> None:
    if port is not None and not 0 <= port < 65536:
        raise ValueError(f"MASTER_PORT {port} is not a port")
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise ValueError(
            f"MASTER_ADDR {address} cannot be looked up on {socket.gethostname()} ({error.strerror or error}): give the"
            " first node's name as this node knows it, or its number"
        ) from error
