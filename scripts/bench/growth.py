"""How the cost of a GRPO update grows: with the length of packed rows, of sequences, and with their number.

    python scripts/bench/growth.py --json FILE

Tokens a second of the update, from trajectories to weights, on the tiny Qwen3-VL. `rows`: the same trajectories of
some 345 tokens in packed rows of 1,024, 4,096 and 16,384 tokens. `sequence`: single trajectories of those lengths with
one image. `iteration`: 8, 32 and 128 trajectories in rows of 1,024 tokens, no two with the same prompt; `grouped`: the
same numbers in groups of 8 that share theirs (tokens are counted as if they did not). Settings take turns, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from update import LENGTHS, ROW_TOKENS, trajectories  # noqa: I001 - it prepares the environment

import lightning.pytorch as pl
from cv_lightning.commands.tiny import TinyCheckpoint, write
from cv_lightning.data.modules import StepLoader
from cv_lightning.models.loading import PolicyConfig
from cv_lightning.modules.base import OptimizerConfig
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.rl.algorithm import AlgorithmConfig
from cv_lightning.types import Group, Iteration, Trajectory

ROWS = (1024, 4096, 16384)
TRAJECTORIES = (8, 32, 128)
GROUP = 8


@dataclass(frozen=True)
class Setting:
    """One point of a curve."""

    name: str
    row_tokens: int
    trajectories: list[Trajectory]


def settings(module: GRPOModule) -> list[Setting]:
    """All points; sequences share nothing except in groups."""
    mix = json.loads(LENGTHS.read_text())
    many = trajectories(module, [mix[n % len(mix)] for n in range(max(TRAJECTORIES))])
    found = [Setting(f"rows_{tokens}", tokens, many[:48]) for tokens in ROWS]
    for tokens in ROWS:
        sequences = trajectories(module, [{"tokens": tokens, "images": 1}] * max(1, 4096 // tokens))
        found.append(Setting(f"sequence_{tokens}", tokens, sequences))
    found += [Setting(f"iteration_{count}", ROW_TOKENS, many[:count]) for count in TRAJECTORIES]
    pad = module.encoder.image_pad_id
    grouped = [_with_prompt_of(many[n - n % GROUP], many[n], pad) for n in range(len(many))]
    return found + [Setting(f"grouped_{count}", ROW_TOKENS, grouped[:count]) for count in TRAJECTORIES]


def _with_prompt_of(first: Trajectory, own: Trajectory, pad: int) -> Trajectory:
    """A trajectory of the length of `own` that answers the first one's prompt: all up to its last image."""
    end = len(first.token_ids) - first.token_ids[::-1].index(pad)
    text = [token for token in own.token_ids if token != pad]
    rest = text[: max(len(own.token_ids) - end, 32)]
    return replace(
        first,
        token_ids=first.token_ids[:end] + rest,
        loss_mask=[False] * end + [True] * len(rest),
        logprobs=[0.0] * end + [-6.5] * len(rest),
        advantage=own.advantage,
    )


class Turns(pl.Callback):
    """Every step is another setting; keeps seconds."""

    def __init__(self, points: Sequence[Setting]) -> None:
        self.points = points
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.begun = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Iteration, index: int) -> None:
        """Put the setting in place."""
        point = self.points[index % len(self.points)]
        module.max_tokens_per_row = point.row_tokens
        batch.groups = [Group(task=t.task, trajectories=[t]) for t in point.trajectories]
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Note the time of the update."""
        self.seconds[self.points[index % len(self.points)].name].append(time.perf_counter() - self.begun)


def measure(repeats: int) -> dict[str, float]:
    """Tokens a second of every setting."""
    with tempfile.TemporaryDirectory() as name:
        write(TinyCheckpoint(out=Path(name)))
        policy = PolicyConfig(path=name, dtype="float32")
        module = GRPOModule(
            policy, OptimizerConfig(lr=1e-5, weight_decay=0.0), algorithm=AlgorithmConfig(num_minibatches=1)
        )
        points = settings(module)
        turns = Turns(points)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[turns],
        )
        steps = len(points) * (repeats + 1)
        trainer.fit(module, train_dataloaders=StepLoader(lambda n: Iteration(n, []), steps))
    tokens = {point.name: sum(len(t.token_ids) for t in point.trajectories) for point in points}
    medians = {name: statistics.median(seconds[1:]) for name, seconds in turns.seconds.items()}
    return {f"growth_{name}_tokens_per_s": tokens[name] / seconds for name, seconds in medians.items()}


def main() -> None:
    """Print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repeats", type=int, default=5, help="updates of each setting")
    options = parser.parse_args()
    figures = measure(options.repeats)
    for name, value in figures.items():
        print(f"{name:40} {value:10.0f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
