"""The logger of `metrics.csv`: the file is whole after a kill, and a resumed run continues it."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from cv_lightning.files import sync_file, whole_file
from cv_lightning.renames import new_metric

STEP = "step"


class MetricsLogger(Logger):
    """Writes a CSV file one row at a time; a new column rewrites it, whole or not at all.

    Lightning's `CSVLogger` deletes the file of an earlier start, and empties it to add a column. Here the first row
    replaces a file of an earlier start unless `rewind` was called. The methods that read are for the first rank.
    """

    def __init__(self, folder: str | Path, file: str = "metrics.csv") -> None:
        super().__init__()
        self.path = Path(folder, file)
        self.columns: list[str] = []

    @property
    def name(self) -> str:
        """Empty: one run has one folder."""
        return ""

    @property
    def version(self) -> str:
        """Empty: one run has one folder."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write one row; `step` is the number of batches trained on before it."""
        row = {name: float(value) for name, value in metrics.items()} | {STEP: step or 0}
        if not row.keys() <= set(self.columns):
            self._replace([*(self._rows() if self.columns else []), row])
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write nothing: `RunRecord` stores the config."""

    def rewind(self, step: int, row: Mapping[str, float]) -> None:
        """Keep the rows up to a checkpoint's step; add the checkpoint's own row if a kill came before it."""
        rows = [kept for kept in self._rows() if float(kept[STEP]) <= step]
        if row and not any(float(kept[STEP]) == step for kept in rows):
            rows.append({new_metric(name): value for name, value in row.items()} | {STEP: step})
        if rows:
            self._replace(rows)

    def steps(self, before: int) -> list[int]:
        """The steps below a number that have a row, in the order of the rows."""
        return [step for row in self._rows() if (step := int(float(row[STEP]))) < before]

    def sync(self, before: int) -> int:
        """Wait until the rows are on disk; return how many of them are of steps below a number."""
        if not self.columns or not self.path.is_file():  # a file of an earlier start does not belong to this run
            return 0
        sync_file(self.path)
        return len(self.steps(before))

    def _rows(self) -> list[dict[str, Any]]:
        """The complete rows of the file; a row that was cut off by a kill has no end of line."""
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
