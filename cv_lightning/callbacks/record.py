"""The run record: resolved config, command, commit and versions in the run's folder."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from cv_lightning.callbacks.signals import Stopped
from cv_lightning.distributed import check_agreement
from cv_lightning.environment import FILE_ONLY, log_to
from cv_lightning.files import write_text
from cv_lightning.versions import TIME_FORMAT, describe_run

LOG = logging.getLogger(__name__)
WANDB_ID = "wandb_id.txt"


class RunRecord(SaveConfigCallback):
    """Writes `<run>/<verb>_config.yaml` (re-runnable), `<verb>_run.json` and `<verb>_log.txt`; W&B gets the config.

    The JSON has the command, versions, the settings that differ from their defaults, and how the run ended; a run that
    was killed has no `status`.
    """

    log_file: logging.Handler | None = None
    """Log of the first rank, open from `setup` to the end."""
    record: Path | None = None
    """The first rank's `<verb>_run.json`, until the end of the run is written into it."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that all ranks run the same; the first one then writes the record."""
        if trainer.world_size > 1:
            run = describe_run()
            facts = {name: run[name] for name in ("python", "commit", "versions")}
            check_agreement(facts | {"config": yaml.safe_load(self.parser.dump(self.config, skip_none=False))})
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the record; Lightning calls this in `setup` on the first rank only."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        stage = trainer.state.fn.value if trainer.state.fn is not None else stage
        text = self.parser.dump(self.config, skip_none=False)
        write_text(folder / f"{stage}_config.yaml", text)
        changed = yaml.safe_load(self.parser.dump(self.config, skip_default=True))
        run = describe_run() | {"changed": changed, "settings": settings_in_force(pl_module, trainer)}
        self.record = folder / f"{stage}_run.json"
        write_text(self.record, json.dumps(run, indent=1, default=repr))
        self._close_log()
        self.log_file = log_to(folder / f"{stage}_log.txt")
        LOG.info("%s", shlex.join([sys.executable, *sys.argv]), extra={FILE_ONLY: True})
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                write_text(folder / WANDB_ID, logger.experiment.id)
                logger.experiment.config.update(yaml.safe_load(text) | {"run": run}, allow_val_change=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Log what stopped the run, then close the log."""
        if self.log_file is not None:
            trace = None if isinstance(exception, KeyboardInterrupt | SystemExit) else exception
            name = str(exception) if isinstance(exception, Stopped) else type(exception).__name__
            LOG.error("stopped by %s", name, exc_info=trace, extra={FILE_ONLY: True})
            self._write_end(f"stopped by {name}")
        self._close_log()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Record that the run finished, and close the log."""
        self._write_end("finished")
        self._close_log()

    def _write_end(self, status: str) -> None:
        """Add status and time of the end to the record, once."""
        path, self.record = self.record, None
        if path is not None:
            end = {"status": status, "ended": time.strftime(TIME_FORMAT)}
            with suppress(OSError, ValueError):  # a full disk must not hide why the run stops
                write_text(path, json.dumps(json.loads(path.read_text()) | end, indent=1))

    def _close_log(self) -> None:
        if self.log_file is not None:
            logging.getLogger().removeHandler(self.log_file)
            self.log_file.close()
            self.log_file = None


def continue_wandb_run(folder: Path) -> None:
    """Let a W&B logger continue the run whose id is stored in this folder, unless an id is given."""
    if (folder / WANDB_ID).is_file():
        os.environ.setdefault("WANDB_RUN_ID", (folder / WANDB_ID).read_text().strip())


def settings_in_force(module: pl.LightningModule, trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
    """Every setting of module, data and callbacks as JSON values, by class and attribute.

    Contains the defaults of parts for which the config says null.
    """
    parts = [module, getattr(trainer, "datamodule", None), *getattr(trainer, "callbacks", ())]
    found: dict[str, dict[str, Any]] = {}
    for part in filter(None, parts):
        configs = {
            name: dataclasses.asdict(value)
            for name, value in vars(part).items()
            if type(value).__name__.endswith("Config")
            if dataclasses.is_dataclass(value) and not isinstance(value, type)
        }
        if configs:
            found[type(part).__name__] = json.loads(json.dumps(configs, default=str))
    return found
