"""Callback that logs trajectories, checkpoints and evaluations to W&B."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from cv_lightning.checkpoints.folder import last_checkpoint
from cv_lightning.loggers.wandb import WandbRun, rows_of, stratified
from cv_lightning.modules.base import PolicyModule
from cv_lightning.trajectory import read_groups
from cv_lightning.types import Iteration


class WandbTrajectories(pl.Callback):
    """Logs trajectories and, on request, artifacts to W&B. The command line adds it where W&B is the logger.

    Tables of training show the first rank's groups, tables of evaluations those of all ranks.
    """

    def __init__(self, logger: WandbRun) -> None:
        self.logger = logger
        self._begun = time.time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a table every `table_every` iterations."""
        if not isinstance(batch, Iteration) or not isinstance(pl_module, PolicyModule) or not self.logger.table_every:
            return
        number = pl_module.iteration
        if trainer.is_global_zero and (number - 1) % self.logger.table_every == 0 and not self.logger.has(number):
            self.logger.iteration = number
            groups = [replace(group, iteration=number) for group in batch.groups]
            rows = stratified(rows_of(groups), self.logger.table_rows)
            self.logger.log_rows("train/trajectories", rows)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the time, by which new results are told from old ones."""
        self._begun = time.time()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log a table and, on request, an artifact of each evaluation."""
        if not trainer.is_global_zero:
            return
        for metrics in sorted(Path(trainer.default_root_dir).glob("eval/*/metrics.json")):
            if metrics.stat().st_mtime < self._begun:
                continue
            folder = metrics.parent
            key = re.sub(r"iteration\d+_", "", folder.name)  # one key for the validations of all iterations
            self.logger.log_rows(f"eval/{key}", stratified(rows_of(read_groups(folder)), self.logger.table_rows))
            if self.logger.log_evaluations:
                self.logger.log_folder(folder, f"eval-{key}", "evaluation")

    on_validation_start = on_test_start
    on_validation_end = on_test_end

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Upload the last checkpoint and the exported model on request."""
        if not self.logger.log_checkpoints or not trainer.is_global_zero:
            return
        run = Path(trainer.default_root_dir)
        if (checkpoint := last_checkpoint(run)) is not None:
            self.logger.log_folder(checkpoint, "checkpoint", "model")
        if (run / "model" / "config.json").is_file():
            self.logger.log_folder(run / "model", "exported", "model")
