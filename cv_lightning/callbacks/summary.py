"""What a training run says about itself: while it runs, that it does not learn; at its end, what it made."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from cv_lightning.callbacks.export import ExportCallback
from cv_lightning.callbacks.progress import duration
from cv_lightning.checkpoints.folder import FOLDER, checkpoints
from cv_lightning.data.modules import EvaluationDataModule
from cv_lightning.evaluation.health import Row, Settings, find
from cv_lightning.evaluation.runs import METRICS, read_rows, read_settings
from cv_lightning.modules.base import PolicyModule
from cv_lightning.trajectory.store import LINES

LOG = logging.getLogger(__name__)
CONFIG = "fit_config.yaml"
SHOWN = {"sft/loss": "loss", "reward/total": "reward", "reward/answer_accuracy": "accuracy"}
"""Metrics of the last lines, with their short names."""


class RunSummary(pl.Callback):
    """Warns once about each finding of `evaluation.health`, and ends `fit` with its results and the next command."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        """Metrics of the iterations of this run, those before a resumed checkpoint included."""
        self.told: set[str] = set()
        """Names of the findings that were shown."""
        self.settings: Settings = {}
        self.started: float | None = None
        """None until training starts: a resumed run that is complete does not train."""
        self.first = 0
        """Iterations before this start."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the run's settings and, of a resumed run, the metrics of its earlier iterations."""
        folder, self.started = Path(trainer.default_root_dir), time.perf_counter()
        self.first = getattr(pl_module, "iteration", 0)
        if not trainer.is_global_zero:
            return
        config, metrics = folder / CONFIG, folder / METRICS
        self.settings = read_settings(config.read_text(encoding="utf-8")) if config.is_file() else {}
        stored = read_rows(metrics) if self.first and metrics.is_file() else []
        self.rows = [row for row in stored if row.get("iteration", math.inf) <= self.first]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the iteration's metrics, and warn of findings that were not shown yet."""
        if not trainer.is_global_zero or not isinstance(pl_module, PolicyModule):
            return
        self.rows.append(dict(pl_module.batch_metrics))
        for finding in find(self.rows, self.settings, ended=False):
            if finding.name not in self.told:
                self.told.add(finding.name)
                LOG.warning("%s", finding.warning())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show what the run made and what to do next; then, if it did not learn, the reason."""
        if not trainer.is_global_zero or not isinstance(pl_module, PolicyModule):
            return
        for line in self._made(trainer, pl_module):
            LOG.info("%s", line)
        if found := find(self.rows, self.settings):
            others = f". The report has {len(found) - 1} more" if len(found) > 1 else ""
            LOG.warning("%s%s", found[0].verdict(), others)

    def _made(self, trainer: pl.Trainer, module: PolicyModule) -> Iterator[str]:
        """The lines of the summary, at most seven."""
        run = Path(trainer.default_root_dir)
        changes = [text for name, short in SHOWN.items() if (text := self._change(name, short))]
        unit = "iteration" if module.trains_on_rollouts else "step"
        if self.started is None:
            yield f"nothing left to train after {unit} {module.iteration}"
        else:
            done, seconds = module.iteration - self.first, time.perf_counter() - self.started
            yield ", ".join([f"trained {done} {unit}{'s' * (done != 1)} in {duration(seconds)}", *changes])
        export = next((each for each in trainer.callbacks if isinstance(each, ExportCallback)), None)  # type: ignore[attr-defined]
        model = run / export.folder if export is not None and export.folder else None
        last = checkpoints(run / FOLDER)[-1:]
        if model is not None:
            yield f"  model         {model}"
        elif last:
            yield f"  model         not written; `cv-lightning export --ckpt {run} --out FOLDER` writes it"
        if last:
            yield f"  checkpoint    {last[0][1]} (--ckpt_path last resumes from it)"
        if (run / METRICS).is_file():
            yield f"  metrics       {run / METRICS}"
            yield f"  report        `cv-lightning report {run}` writes {run / 'report.html'}"
        if (run / LINES).is_dir():
            yield f"  trajectories  {run / LINES}"
        if model is not None:
            yield f"  next          `{_next_command(trainer, run, model)}`"

    def _change(self, name: str, short: str) -> str:
        """First and last value of a metric; empty if it was not logged."""
        values = [value for row in self.rows if math.isfinite(value := row.get(name, math.nan))]
        return f"{short} {values[0]:.3g} to {values[-1]:.3g}" if values else ""


def _next_command(trainer: pl.Trainer, run: Path, model: Path) -> str:
    """A test of the model on the run's held-out tasks, if it has some; else a conversation with it."""
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, EvaluationDataModule) and data.has_tasks("test") and (run / CONFIG).is_file():
        return f"cv-lightning test --config {run / CONFIG} --model.init_args.policy.path {model} --ckpt_path null"
    return f"cv-lightning chat --model {model} --image FILE"
