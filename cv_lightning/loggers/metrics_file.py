"""`metrics.csv`: complete after a kill, and gone on with by a resumed run."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger

from cv_lightning.files import sync_file, whole_file
from cv_lightning.renames import new_metric

STEP = "step"


class MetricsFile:
    """A CSV file that gets one row at a time; a new column rewrites it, whole or not at all.

    A file from before is replaced by the first row, unless `rewind` has said what of it stands.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        self.metrics: list[dict[str, float]] = []
        """Rows not written yet, which Lightning counts: always none."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write one row.

        Args:
            metrics: name to number.
            step: batches trained on before this one.
        """
        row = {name: float(value) for name, value in metrics.items()} | {STEP: step}
        if not row.keys() <= set(self.columns):
            self._replace([*(self._rows() if self.columns else []), row])
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def rewind(self, step: int, row: Mapping[str, float]) -> None:
        """Keep the rows up to a checkpoint's and go on after them.

        Args:
            step: of the checkpoint.
            row: what the checkpoint knows of its own step, written if the run was killed before it wrote that.
        """
        rows = [kept for kept in self._rows() if float(kept[STEP]) <= step]
        if row and not any(float(kept[STEP]) == step for kept in rows):
            rows.append({new_metric(name): value for name, value in row.items()} | {STEP: step})
        if rows:
            self._replace(rows)

    def steps(self, before: int) -> list[int]:
        """The steps below a number that have a row, in the order of the rows."""
        found = [int(float(row[STEP])) for row in self._rows()]
        return [step for step in found if step < before]

    def sync(self, before: int) -> int:
        """Wait until the rows are on disk.

        Returns:
            How many of them are of steps below a number.
        """
        if not self.columns or not self.path.is_file():  # what another start has left is not of this run
            return 0
        sync_file(self.path)
        return len(self.steps(before))

    def save(self) -> None:
        """Nothing is held back."""

    def _rows(self) -> list[dict[str, Any]]:
        """The whole rows of the file; one that a kill has torn has no end of line."""
        if not self.path.is_file():
            return []
        whole, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
        rows = csv.DictReader(io.StringIO(whole))
        return [{new_metric(name): value for name, value in row.items()} for row in rows]

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        self.columns = sorted({name for row in rows for name in row})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


class MetricsLogger(CSVLogger):
    """Writes a CSV file of metrics in a run's folder.

    Lightning's own deletes the file that an earlier start has left, and empties it to add a column.

    Args:
        folder: of the run.
        file: its name there.
    """

    def __init__(self, folder: str, file: str = "metrics.csv") -> None:
        super().__init__(folder, name="", version="")
        self._file = file
        self._metrics_file: MetricsFile | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsFile:
        """The file."""
        if self._metrics_file is None:
            self._metrics_file = MetricsFile(Path(self.log_dir, self._file))
        return self._metrics_file

    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:
        """The run record holds the config."""
