"""Loggers: every run writes `metrics.csv`, and W&B or TensorBoard if its config names them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from cv_lightning.loggers.metrics_file import MetricsLogger
from cv_lightning.loggers.wandb import WandbRun


class TensorBoardRun(TensorBoardLogger):
    """Lightning's TensorBoard logger, in `<run>/tensorboard`."""

    def __init__(self) -> None:
        super().__init__(save_dir="tensorboard", name="", version="", default_hp_metric=False)

    def write_to(self, folder: str | Path) -> None:
        """Keep TensorBoard's files in the run's folder; call it before the run starts."""
        self._root_dir = str(Path(folder, "tensorboard"))


def run_loggers(
    given: Iterable[Logger] | Logger | bool | None, folder: str | Path, verb: str = "fit"
) -> list[Logger] | bool:
    """The loggers of a run.

    Args:
        given: Loggers of the config; None or True means `metrics.csv` alone, False no logger.
        folder: The run's folder.
        verb: The command: `fit` writes its curves to `metrics.csv`, another one to `<verb>_metrics.csv`.
    """
    if given is False:
        return False
    named = [] if given is None or given is True else [given] if isinstance(given, Logger) else list(given)
    for logger in named:
        if isinstance(logger, WandbRun | TensorBoardRun):
            logger.write_to(folder)
    if any(isinstance(logger, CSVLogger | MetricsLogger) for logger in named):
        return named
    return [MetricsLogger(str(folder), "metrics.csv" if verb == "fit" else f"{verb}_metrics.csv"), *named]
