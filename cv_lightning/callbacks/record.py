"""What a run folder says about the run: its resolved config, command, commit and versions."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from cv_lightning.callbacks.signals import Stopped
from cv_lightning.distributed import check_agreement
from cv_lightning.environment import FILE_ONLY, log_to
from cv_lightning.files import write_text
from cv_lightning.versions import describe_run

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LOG = logging.getLogger(__name__)


WANDB_ID = "wandb_id.txt"


class RunRecord(SaveConfigCallback):
    """Writes `<run>/<verb>_config.yaml` (re-runnable), `<verb>_run.json` and `<verb>_log.txt`; tells W&B the config."""

    log_file: logging.Handler | None = None
    """On the first rank, from `setup` to the end."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Several ranks have to run the same; the first of them then writes."""
        if trainer.world_size > 1:
            run = describe_run()
            facts = {name: run[name] for name in ("python", "commit", "versions")}
            check_agreement(facts | {"config": yaml.safe_load(self.parser.dump(self.config, skip_none=False))})
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Runs on the first rank only, in `setup`."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        stage = trainer.state.fn.value if trainer.state.fn is not None else stage
        text = self.parser.dump(self.config, skip_none=False)
        write_text(folder / f"{stage}_config.yaml", text)
        about = describe_run() | {"settings": settings_in_force(pl_module, trainer)}
        write_text(folder / f"{stage}_run.json", json.dumps(about, indent=1, default=repr))
        self._close_log()
        self.log_file = log_to(folder / f"{stage}_log.txt")
        LOG.info("%s", shlex.join([sys.executable, *sys.argv]), extra={FILE_ONLY: True})
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and logger.experiment.id:
                write_text(folder / WANDB_ID, logger.experiment.id)
            update = getattr(getattr(getattr(logger, "experiment", None), "config", None), "update", None)
            if update is not None:
                update(yaml.safe_load(text) | {"run": about}, allow_val_change=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """What stopped the run is the last thing in its log."""
        if self.log_file is not None:
            told = None if isinstance(exception, KeyboardInterrupt | SystemExit) else exception
            name = str(exception) if isinstance(exception, Stopped) else type(exception).__name__
            LOG.error("stopped by %s", name, exc_info=told, extra={FILE_ONLY: True})
        self._close_log()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the log."""
        self._close_log()

    def _close_log(self) -> None:
        if self.log_file is not None:
            logging.getLogger().removeHandler(self.log_file)
            self.log_file.close()
            self.log_file = None


def continue_wandb_run(folder: Path) -> None:
    """Let the W&B logger, if there is one, go on under the id of the run in this folder, unless an id is given."""
    if (folder / WANDB_ID).is_file():
        os.environ.setdefault("WANDB_RUN_ID", (folder / WANDB_ID).read_text().strip())


def settings_in_force(module: pl.LightningModule, trainer: pl.Trainer) -> dict[str, dict[str, Any]]:
    """Every setting of module, data and callbacks as JSON values, by class and attribute.

    The config says null where a part was left at its defaults; here they stand.
    """
    parts = [module, getattr(trainer, "datamodule", None), *getattr(trainer, "callbacks", ())]
    found: dict[str, dict[str, Any]] = {}
    for part in filter(None, parts):
        configs = {name: value for name, value in vars(part).items() if type(value).__name__.endswith("Config")}
        if plain := {name: dataclasses.asdict(value) for name, value in configs.items() if _is_settings(value)}:
            found[type(part).__name__] = json.loads(json.dumps(plain, default=str))
    return found


def _is_settings(value: object) -> TypeGuard[DataclassInstance]:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
