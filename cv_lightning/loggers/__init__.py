"""Where metrics go: always to the run's `metrics.csv`, and to W&B or TensorBoard where the config says so."""

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
        """Keep TensorBoard's files in the run's folder; before the run starts."""
        self._root_dir = str(Path(folder, "tensorboard"))


def run_loggers(
    given: Iterable[Logger] | Logger | bool | None, folder: str | Path, verb: str = "fit"
) -> list[Logger] | bool:
    """The loggers of a run.

    Args:
        given: what the config names; None and True: only `metrics.csv`; False: none at all.
        folder: of the run.
        verb: what is run: the training curves in `metrics.csv` are `fit`'s alone, another's go to `<verb>_metrics.csv`.
    """
    if given is False:
        return False
    named = [] if given is None or given is True else [given] if isinstance(given, Logger) else list(given)
    for logger in named:
        if isinstance(logger, WandbRun | TensorBoardRun):
            logger.write_to(folder)
    if any(isinstance(logger, CSVLogger) for logger in named):
        return named
    return [MetricsLogger(str(folder), "metrics.csv" if verb == "fit" else f"{verb}_metrics.csv"), *named]
