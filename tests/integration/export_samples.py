"""Shared by tests of exports: finished runs of a tiny model with checkpoints, and comparisons of folders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
ZERO = ["--config", str(ROOT / "configs" / "hardware" / "cpu2.yaml")]


def fit_arguments(model: Path, run: Path, *more: str) -> list[str]:
    """Two SFT steps on digits; a checkpoint and an exported model at their end."""
    return [
        "fit",
        "--config",
        str(ROOT / "configs" / "quickstart" / "sft.yaml"),
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={run}",
        f"--model.init_args.policy.path={model}",
        "--data.init_args.num_steps=2",
        "--data.init_args.conversations_per_step=4",
        "--data.init_args.warm_up_share=0",
        *more,
    ]


def fit_in_process(model: Path, run: Path, *more: str) -> Path:
    from cv_lightning.cli import main

    main(fit_arguments(model, run, *more))
    return run


def fit_two_ranks(model: Path, run: Path, *more: str) -> Path:
    """A run under ZeRO-3, in separate processes because it leaves a process group behind."""
    command = [sys.executable, "-m", "cv_lightning", *fit_arguments(model, run, *ZERO, *more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder by their published names."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_same_weights(one: Path, other: Path) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
