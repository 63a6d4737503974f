"""Evaluation by rollouts: every configured setting over the same tasks, all trajectories written, all ranks counted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from cv_lightning.callbacks.progress import RunProgress
from cv_lightning.engine import SamplingConfig
from cv_lightning.evaluation.metrics import Outcome, outcomes, summarise_outcomes
from cv_lightning.modules.base import PolicyModule
from cv_lightning.rl.collector import Collector
from cv_lightning.trajectory.store import StoreConfig, TrajectoryWriter
from cv_lightning.types import Iteration

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """One way to evaluate; `test` runs each over the same tasks."""

    name: str = "greedy"
    """Folder under `<run>/eval/` (after `eval_prefix`) and prefix of its metrics."""
    temperature: float = 0.0
    """0: greedy."""
    tool: bool = True
    """False: the tool is neither offered nor callable."""
    num_samples: int = 1
    """Trajectories per task."""


class Evaluator:
    """Runs the settings of an evaluation and sums them up.

    Args:
        settings: what is run over each task.
        prefix: put before the names of the folders.
        store: how trajectories are kept on disk; all of them, whatever its share in training.
        seed: of sampling.
    """

    def __init__(self, settings: Sequence[EvaluationConfig], prefix: str, store: StoreConfig, seed: int) -> None:
        self.settings = list(settings)
        self.prefix = prefix
        self.store = replace(store, share=1.0)
        self.seed = seed
        self.outcomes: dict[str, list[Outcome]] = {}

    def start(self, trainer: pl.Trainer, module: PolicyModule) -> None:
        """Clear what an earlier run of the same evaluation left in its folders."""
        self.outcomes = {setting.name: [] for setting in self.settings}
        for setting in self.settings:
            if trainer.is_global_zero:
                shutil.rmtree(self._folder(trainer, module, setting), ignore_errors=True)
        trainer.strategy.barrier("evaluation")

    def run(
        self,
        trainer: pl.Trainer,
        module: PolicyModule,
        batch: Iteration,
        collector_of: Callable[[EvaluationConfig], Collector],
    ) -> None:
        """Run every setting over the batch's tasks."""
        for setting in self.settings:
            sampling = SamplingConfig(temperature=setting.temperature, seed=self.seed)
            with RunProgress.rollout_of(trainer, f"evaluate {setting.name}") as show:
                groups = collector_of(setting).collect(batch.tasks, setting.num_samples, sampling, 0, show)
            # From an evaluation anybody must be able to recount its table.
            folder = self._folder(trainer, module, setting)
            with TrajectoryWriter(folder, self.store, rank=trainer.global_rank) as writer:
                for group in groups:
                    writer.write_group(group, module.iteration)
            self.outcomes[setting.name] += outcomes(groups)

    def finish(self, trainer: pl.Trainer, module: PolicyModule) -> None:
        """Summarise, log and write `metrics.json` per setting."""
        for setting in self.settings:
            summary = summarise_outcomes(gather_lists(self.outcomes[setting.name]))
            values = {f"{setting.name}/{key}": value for key, value in summary.scalars().items()}
            module.log_dict(values, sync_dist=True)  # the same on all ranks
            if trainer.is_global_zero:
                write_json(self._folder(trainer, module, setting) / "metrics.json", summary.to_json())

    def _folder(self, trainer: pl.Trainer, module: PolicyModule, setting: EvaluationConfig) -> Path:
        """`eval/<prefix><name>`; a validation in the midst of training names its iteration, too."""
        when = f"iteration{module.iteration:06d}_" if trainer.state.fn is TrainerFn.FITTING else ""
        return Path(trainer.default_root_dir) / "eval" / f"{self.prefix}{when}{setting.name}"


def gather_lists(items: list[T]) -> list[T]:
    """The lists of all ranks, one after another."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return items
    everything: list[list[T]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everything, items)
    return [item for part in everything for item in part]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)
