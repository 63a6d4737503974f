"""Files beside a build: the resumable progress, one JSON object per line, and the report with its reasons."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from cv_lightning.data.rows import RowProblems
from cv_lightning.files import write_text
from cv_lightning.types import DataError

LISTED = 20
"""Rows that a report lists for a reason; the count is always complete."""

Show = Callable[[int, int | None, str], None]
"""Progress display, called with the number done, the total (None: unknown) and a note."""


def write_report(out: Path, report: Mapping[str, Any]) -> None:
    """Write a build's report beside its file, as `<stem>.report.json`."""
    write_text(out.with_name(f"{out.stem}.report.json"), json.dumps(report, indent=1, ensure_ascii=False) + "\n")


class Rejections:
    """Rejected rows by reason: their count, the first names, and the detail of the first."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Any]] = {}

    @classmethod
    def of_problems(cls, problems: RowProblems) -> Rejections:
        """The unusable rows of tables, by kind of problem."""
        made = cls()
        for problem in problems.problems:
            made.add(problem.kind, problem.row, problem.message)
        return made

    def add(self, reason: str, name: str | int, detail: str) -> None:
        """Count a rejected row."""
        entry = self._found.setdefault(reason, {"count": 0, "rows": [], "first": detail})
        entry["count"] += 1
        if entry["count"] <= LISTED:
            entry["rows"].append(name)

    def counts(self) -> dict[str, int]:
        """Number of rows by reason, the most frequent first."""
        return {reason: entry["count"] for reason, entry in self.to_json().items()}

    def to_json(self) -> dict[str, dict[str, Any]]:
        """`{reason: {count, rows, first}}`, the most frequent first."""
        return dict(sorted(self._found.items(), key=lambda pair: -pair[1]["count"]))


class ProgressFile:
    """Entries by number in an append-only file, so that a killed build continues where it stopped.

    The first line holds the settings. A line cut off by a kill is dropped.

    Args:
        path: The file; created if absent.
        settings: JSON values on which the entries depend. Stored settings that no longer exist are ignored.

    Raises:
        DataError: The file was written with other settings, or is not a progress file.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._places: dict[int, int] = {}
        """Byte offset of the last line of every number."""
        settings = json.loads(json.dumps(settings, default=str))
        if path.exists() and path.stat().st_size:
            self._read(settings)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        self._file = path.open("r+b")
        self._file.seek(0, os.SEEK_END)

    def _read(self, settings: Mapping[str, Any]) -> None:
        with self.path.open("rb") as file:
            header, end = file.readline(), file.tell()
            try:
                stored = json.loads(header)["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{self.path}: not the progress of a build; give another --out") from error
            if names := sorted(name for name, value in settings.items() if stored.get(name) != value):
                raise DataError(
                    f"{self.path} was written with other settings ({', '.join(names)}); give the same ones to continue "
                    "it, or another --out to start from scratch"
                )
            for line in file:
                try:
                    entry = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                self._places[int(entry["number"])] = end
                end += len(line)
        os.truncate(self.path, end)

    def __enter__(self) -> ProgressFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append an entry; the operating system has it when this returns.

        Args:
            entry: JSON values with an int `number`; the last entry of a number counts.
        """
        self._places[int(entry["number"])] = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._file.flush()

    def forget(self, number: int) -> None:
        """Treat an entry as not done."""
        self._places.pop(number, None)

    def entries(self) -> Iterator[dict[str, Any]]:
        """All entries, by number, read from disk one by one."""
        with self.path.open("rb") as file:
            for number in sorted(self._places):
                file.seek(self._places[number])
                yield json.loads(file.readline())
