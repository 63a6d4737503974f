"""Shared by tests of resuming: small runs in separate processes that can be killed, and readers of their files."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import yaml

from cv_lightning.checkpoints.folder import last_checkpoint
from cv_lightning.types import Trajectory

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["cv_lightning.cli", "cv_lightning.engines.hf"])
AGENT = {
    "max_turns": 2,
    "max_turn_tokens": 10,
    "max_images": 2,
    "deterministic": True,
    "prompt": {"system": "none", "state_size": False, "tool_ok": "<image>Look at the result."},
}
EVERY = 2
"""Iterations between two checkpoints."""


def variety(trajectory: Trajectory, score: float) -> float:
    """A reward for a random policy that differs within most groups, not in all."""
    return float(sum(trajectory.token_ids) % 4)


def write_grpo(path: Path, policy: Path, *, iterations: int, engine: str = "transformers") -> Path:
    """A GRPO run with every part that has a state (optimizer, schedule, reference, waiting tasks) and a validation."""
    rollout = {
        "num_samples": 2,
        "agent": AGENT,
        "engine": {"kind": engine, "max_model_len": 512, "max_num_seqs": 16, "max_images": 2},
        "reward": {"terms": [{"class_path": "cv_lightning.rewards.FunctionTerm", "init_args": TERM}]},
        "store": {"tokens": True},
    }
    module = {
        "policy": {"path": str(policy), "dtype": "float32"},
        "optimizer": {"lr": 1e-3, "schedule": "hold_linear", "warmup_steps": 3},
        "algorithm": {"kl": {"weight": 0.01}, "entropy_weight": 0.01, "dynamic_sampling": {"max_oversample": 2.0}},
    }
    data = {"num_iterations": iterations, "tasks_per_iteration": 2, "val_tasks": {"upright": 1}}
    return _write(
        path, {"rollout": rollout}, ("modules.grpo.GRPOModule", module), ("DigitTaskDataModule", data), validate_every=4
    )


TERM = {"name": "variety", "weight": 1.0, "function": "resume_samples.variety"}


def write_sft(path: Path, policy: Path, *, steps: int, every: int = EVERY) -> Path:
    """Supervised fine-tuning on digits, exported to `model`."""
    module = {
        "policy": {"path": str(policy), "dtype": "float32"},
        "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 3},
    }
    data = {"num_steps": steps, "conversations_per_step": 4, "warm_up_conversations_per_step": 4}
    return _write(
        path,
        {"export": {"folder": "model"}, "rollout": {"agent": {"prompt": AGENT["prompt"]}}},
        ("modules.sft.SFTModule", module),
        ("DigitSFTDataModule", data),
        every=every,
    )


def _write(
    path: Path,
    callbacks: dict[str, Any],
    module: tuple[str, Any],
    data: tuple[str, Any],
    validate_every: int | None = None,
    every: int = EVERY,
) -> Path:
    config = {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "enable_progress_bar": False,
            "val_check_interval": validate_every,
        },
        "model": {"class_path": f"cv_lightning.{module[0]}", "init_args": module[1]},
        "data": {"class_path": f"cv_lightning.digits.modules.{data[0]}", "init_args": data[1]},
        "checkpoint": {"every_iterations": every},
        **callbacks,
    }
    path.write_text(yaml.safe_dump(config))
    return path


# ---------------------------------------------------------------------------------------------- processes
def _enter(log: str, arguments: list[str]) -> None:
    from cv_lightning.cli import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv[1:] = arguments
    main()


class Run:
    """A `fit` in its own process; forked from one that has imported everything, or several ranks of their own.

    Args:
        config: YAML.
        folder: of the run.
        flags: further ones; with `--trainer.devices` Lightning starts the other ranks.
        verb: fit, validate or test.
    """

    def __init__(self, config: Path, folder: Path, *flags: str, verb: str = "fit") -> None:
        arguments = [verb, "--config", str(config), "--trainer.default_root_dir", str(folder), *flags]
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.process: ForkServerProcess | subprocess.Popen[bytes]
        if "--trainer.devices" not in flags:
            self.process = FORKS.Process(target=_enter, args=(str(self.log), arguments))
            self.process.start()
            return
        here = str(Path(__file__).parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cv_lightning", *arguments],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """Exit code; None while the run continues."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def finish(self, expect: int = 0) -> str:
        """Wait for the end of the run; returns its output."""
        deadline = time.monotonic() + 600
        while self.exit_code is None and time.monotonic() < deadline:
            time.sleep(0.05)
        output = self.log.read_text()
        if self.exit_code is None:
            self.kill()
        assert self.exit_code == expect, output[-4000:]
        return output

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, while the run continues."""
        begun = time.monotonic()
        while not condition():
            assert self.exit_code is None and time.monotonic() - begun < 600, self.log.read_text()[-4000:]
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        """Send a signal to its first rank."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Send SIGKILL to every rank, as if the machine went down."""
        assert self.process.pid is not None
        if isinstance(self.process, subprocess.Popen):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        else:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.join()

    def kill_at(self, moment: float) -> None:
        """Kill it at a moment of its training.

        Args:
            moment: in iterations: 2.3 is after the second is on record, and 0.3 of its duration later.
        """
        begun = time.monotonic()
        while len(rows(self.folder)) < int(moment):
            assert self.exit_code is None and time.monotonic() - begun < 600, self.log.read_text()[-4000:]
            time.sleep(0.01)
        time.sleep(moment % 1 * durations(self.folder))
        self.kill()


def random_moment(iterations: int) -> float:
    """Seed of a kill; printed, so that a failure can be repeated."""
    moment = random.SystemRandom().uniform(1, iterations - 0.5)
    print(f"killed at iteration {moment:.3f}")
    return moment


def durations(folder: Path) -> float:
    """Seconds of the last iteration on record."""
    last = rows(folder)[-1]
    return sum(float(last[name] or 0) for name in ("time/rollout_s", "time/update_s") if name in last)


# ---------------------------------------------------------------------------------------------- what a run leaves
def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of `metrics.csv`."""
    path = folder / "metrics.csv"
    return list(csv.DictReader(path.open())) if path.is_file() else []


def figures(folder: Path) -> list[dict[str, str]]:
    """The rows without metrics of time."""
    return [
        {k: v for k, v in row.items() if not k.startswith("time/") and not k.endswith("_per_s")} for row in rows(folder)
    ]


def trajectories(folder: Path) -> dict[str, list[Any]]:
    """The stored groups by file, without measured times."""
    return {
        path.name: [_timeless(json.loads(line)) for line in path.open()]
        for path in sorted((folder / "trajectories").glob("*.jsonl"))
    }


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if not key.endswith("_s")}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def state(folder: Path) -> dict[str, Any]:
    """The run's last checkpoint; every file of a DeepSpeed folder."""
    path = last_checkpoint(folder)
    assert path is not None
    if path.is_dir():
        shards = sorted(path.glob("checkpoint/*.pt"))
        return {shard.name: torch.load(shard, weights_only=False) for shard in shards}
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def assert_same_state(left: Any, right: Any, where: str = "checkpoint") -> None:
    """Assert that two states are equal bit for bit, except for times in the logged row."""
    if left is right:
        return
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        keys = [key for key in left if not str(key).startswith("time/") and not str(key).endswith("_per_s")]
        assert set(keys) <= set(right), where
        for key in keys:
            assert_same_state(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for number, pair in enumerate(zip(left, right, strict=True)):
            assert_same_state(*pair, f"{where}[{number}]")
    elif hasattr(left, "__dict__"):
        assert_same_state(vars(left), vars(right), where)
    else:
        assert repr(left) == repr(right), where  # NaN is itself


def assert_same_run(left: Path, right: Path) -> None:
    """Assert equal metrics, trajectories, weights, optimizer, loaders, queues and generators, bit for bit."""
    assert figures(left) == figures(right)
    assert trajectories(left) == trajectories(right)
    assert_same_state(state(left), state(right))
