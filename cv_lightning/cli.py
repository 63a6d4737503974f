"""fit, validate, test and predict through LightningCLI."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

import cv_lightning.data.modules
import cv_lightning.modules  # noqa: F401  (bare class names in YAML resolve among imported subclasses)
from cv_lightning.callbacks.progress import RunProgress
from cv_lightning.callbacks.record import RunRecord
from cv_lightning.modules.base import PolicyModule
from cv_lightning.types import CVLightningError

DEFAULT_FOLDER = "runs/default"


class ShortErrorParser(LightningArgumentParser):
    """A parser whose errors are not buried under a usage text of a hundred lines, and that wants whole names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"allow_abbrev": False} | kwargs))

    def print_usage(self, file: Any = None) -> None:
        """One line."""
        (file or sys.stdout).write(f"usage: {self.prog.replace(' [options]', '')} [options]\n")


class CVLightningCLI(LightningCLI):
    """LightningCLI with our defaults: a run folder, a CSV logger in it, our progress bar, our run record."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Defaults that a research run wants."""
        parser.set_defaults(
            {
                "trainer.default_root_dir": DEFAULT_FOLDER,
                "trainer.use_distributed_sampler": False,
                "trainer.num_sanity_val_steps": 0,
                "trainer.log_every_n_steps": 1,
                "trainer.enable_model_summary": False,
            }
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the CSV logger and the progress bar where the config names none."""
        config = self._get(self.config_init, "trainer", default={})
        if config.get("logger") in (None, True):
            kwargs["logger"] = CSVLogger(config["default_root_dir"], name="", version="")
        callbacks = [*(config.get("callbacks") or [])]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, RunProgress) for c in callbacks):
            callbacks.append(RunProgress())
        kwargs["callbacks"] = callbacks
        return super().instantiate_trainer(**kwargs)

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; a value that one of them refuses is a message, not a traceback.

        Raises:
            CVLightningError: what the constructor said; JSONARGPARSE_DEBUG=true shows where.
        """
        try:
            super().instantiate_classes()
        except (ValueError, CVLightningError) as error:
            if os.environ.get("JSONARGPARSE_DEBUG"):
                raise
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise CVLightningError(str(cause)) from error

    def before_instantiate_classes(self) -> None:
        """Refuse a checkpoint path that does not exist before anything is built."""
        path = self._get(self.config, "ckpt_path")
        if isinstance(path, str) and path not in ("last", "best", "hpc", "registry") and not Path(path).exists():
            raise CVLightningError(
                f"--ckpt_path {path}: no such file or folder; give a checkpoint of this run, or leave it out"
            )


def main(args: ArgsType = None) -> CVLightningCLI:
    """Run one of fit, validate, test, predict.

    Args:
        args: the command line without the program's name; `sys.argv[1:]` by default.
    """
    _quiet_libraries()
    try:
        return CVLightningCLI(
            model_class=PolicyModule,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=RunRecord,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            seed_everything_default=0,
            parser_class=ShortErrorParser,
            parser_kwargs={"prog": "python -m cv_lightning"},
            args=args,
        )
    except CVLightningError as error:
        sys.exit(f"error: {error}")


UNHELPFUL = ("litlogger", "litmodels", "TPU available", "GPU available")
"""Parts of Lightning's messages that tell a user nothing; the run record names the devices."""


def _quiet_libraries() -> None:
    """Silence messages and warnings of libraries that a user can do nothing about."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "matplotlib", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(part in str(record.msg) for part in UNHELPFUL)
    )
    for pattern in (
        ".*does not have many workers.*",
        ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
        ".*logging directory .* exists and is not empty.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        "Total length of `list` across ranks is zero.*",  # no validation was asked for
        "`torch.distributed.reduce_op` is deprecated.*",
        "It is recommended to use `self.log.*",  # figures are summed over ranks before they are logged
        "Found .* module.s. in eval mode at the start of training.*",  # the reference policy
    ):
        warnings.filterwarnings("ignore", pattern)
