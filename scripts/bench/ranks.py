"""Measures an RL iteration on two ranks with a thread each against one rank with one thread.

    python scripts/bench/ranks.py --policy runs/quickstart-seed0/sft/model --json FILE

The quickstart's GRPO, 16 tasks x 8 trajectories, trained by two runs that take turns, iteration by iteration: one with
one rank, one with two ranks under ZeRO-3 (`configs/hardware/cpu2.yaml`), an engine in each. An iteration holds
everything from tasks to weights: sync, rollout, scoring, update. Medians of wall-clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
from cv_lightning.environment import prepare_environment  # noqa: E402

prepare_environment()

import lightning.pytorch as pl  # noqa: E402

MARK = "ITERATION "
"""Starts the line that a run prints after each of its turns."""
PARTS = ("time/sync_s", "time/rollout_s", "time/update_s")
BAR = 1.6


class TakeTurns(pl.Callback):
    """Starts every iteration but the first when it is told to, and says how long it took."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Say what the turn took, then wait for the next one."""
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
            if hasattr(self, "begun"):
                figures["seconds"] = time.perf_counter() - self.begun
            print(MARK + json.dumps(figures), flush=True)
            sys.stdin.readline()
        trainer.strategy.barrier()
        self.begun = time.perf_counter()


class Turns:
    """A run in processes of its own.

    Args:
        name: of its folder and its log.
        arguments: of `fit`.
        folder: for both.
    """

    def __init__(self, name: str, arguments: list[str], folder: Path) -> None:
        self.log = folder / f"{name}.log"
        command = [sys.executable, __file__, "--worker", *arguments, f"--trainer.default_root_dir={folder / name}"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True, cwd=ROOT
        )

    def wait(self) -> dict[str, float]:
        """What the turn under way took."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                figures: dict[str, float] = json.loads(line.removeprefix(MARK))
                return figures
        raise RuntimeError(f"the run has ended:\n{self.log.read_text()[-3000:]}")

    def go(self) -> None:
        """Start the next turn."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """Wait for the end of the run after its last turn."""
        self.go()
        self.process.communicate(timeout=120)


def measure(policy: Path, hardware: Path, repeats: int) -> dict[str, float]:
    """Medians of both runs, and their ratio."""
    if not policy.is_dir():
        sys.exit(f"error: --policy {policy}: no such folder; `bash scripts/quickstart.sh` trains one")
    iterations = repeats + 2  # the first two warm the engine up
    shared = ["fit", "--config=configs/quickstart/grpo.yaml", f"--model.init_args.policy.path={policy.resolve()}"]
    flags = [
        f"--data.init_args.num_iterations={iterations}",
        "--trainer.callbacks+=ranks.TakeTurns",
    ]
    turns: dict[str, list[dict[str, float]]] = {"one": [], "two": []}
    with tempfile.TemporaryDirectory() as name:
        runs = {
            "one": Turns("one", [*shared, "--trainer.accelerator=cpu", *flags], Path(name)),
            "two": Turns("two", [*shared, f"--config={hardware.resolve()}", *flags], Path(name)),
        }
        try:
            for run in runs.values():
                run.wait()
            for _ in range(1, iterations):
                for key, run in runs.items():
                    run.go()
                    turns[key].append(run.wait())
            for run in runs.values():
                run.close()
        finally:
            for run in runs.values():
                run.process.terminate()
    measured = {key: found[1:] for key, found in turns.items()}

    def median(key: str, figure: str) -> float:
        return statistics.median(turn[figure] for turn in measured[key])

    figures = {"two_rank_speed": median("one", "seconds") / median("two", "seconds")}
    for key in measured:
        figures[f"iteration_s_{key}"] = median(key, "seconds")
        for part in PARTS:
            figures[f"{part.split('/')[1]}_{key}"] = median(key, part)
        figures[f"mismatch_max_{key}"] = max(turn["policy/mismatch_max"] for turn in measured[key])
    return figures


def main() -> int:
    """Print and write the figures; with --check the exit code says whether the bar is met."""
    if sys.argv[1:2] == ["--worker"]:
        from cv_lightning.cli import main as fit

        fit(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", type=Path, default=Path("runs/quickstart-seed0/sft/model"), help="SFT checkpoint")
    parser.add_argument("--hardware", type=Path, default=ROOT / "configs/hardware/cpu2.yaml", help="of the two ranks")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repeats", type=int, default=7, help="measured iterations of each run")
    parser.add_argument("--check", action="store_true", help="exit code 1 where the bar is missed")
    options = parser.parse_args()
    figures = measure(options.policy, options.hardware, options.repeats)
    for name, value in figures.items():
        print(f"{name:20} {value:12.4g}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return int(options.check and figures["two_rank_speed"] < BAR)


if __name__ == "__main__":
    sys.exit(main())
