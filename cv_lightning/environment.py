"""Defaults for the process environment that have to stand before torch, vLLM or DeepSpeed are imported."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from pathlib import Path

ALWAYS = {
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Weights reach the engine in this process, so it must run here; the rest keeps it quiet and offline."""
CPU_BUILD = {"DS_ACCELERATOR": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""GiB of key-value cache; no pinning, because trainer, engine and sandbox share the cores."""
LOCK_SETTLE_S = 5.0
"""A lock younger than this may belong to another host that shares the folder and just opens a finished build."""


def prepare_environment() -> None:
    """Set what is unset, and clear the way for DeepSpeed's compiled op. Imports nothing heavy; may be called again.

    Never overrides a variable that the user has set.
    """
    defaults = dict(ALWAYS)
    if has_vllm_cpu():
        defaults |= CPU_BUILD
    folder = extensions_folder()
    if folder is not None:
        defaults["TORCH_EXTENSIONS_DIR"] = str(folder)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # As if activated: the environment's ninja must come first, for another version of it builds everything anew.
    programs = str(Path(sys.prefix, "bin"))
    path = [entry for entry in os.environ.get("PATH", "").split(os.pathsep) if entry not in ("", programs)]
    os.environ["PATH"] = os.pathsep.join([programs, *path])
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        remove_stale_locks(Path(os.environ["TORCH_EXTENSIONS_DIR"]))


def has_vllm_cpu() -> bool:
    """True if vLLM's CPU build is installed."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def extensions_folder() -> Path | None:
    """Where torch keeps compiled extensions: inside the environment; None if that cannot be written."""
    folder = Path(sys.prefix, "torch_extensions")
    return folder if folder.is_dir() or os.access(sys.prefix, os.W_OK) else None


def remove_stale_locks(folder: Path) -> list[Path]:
    """Remove build locks whose owner is gone; every later start would wait on them for ever (torch's FileBaton).

    The builder keeps its lock open for as long as it lives, so a lock that no process has open has no owner.

    Args:
        folder: of torch's compiled extensions.

    Returns:
        The locks removed.
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
    """Targets of all file descriptors that this user may look at."""
    targets: set[str] = set()
    for process in Path("/proc").glob("[0-9]*/fd"):
        try:
            descriptors = list(process.iterdir())
        except OSError:  # gone meanwhile, or another user's
            continue
        for descriptor in descriptors:
            try:
                targets.add(os.readlink(descriptor))
            except OSError:  # closed meanwhile
                continue
    return targets
