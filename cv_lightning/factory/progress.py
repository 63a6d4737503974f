"""An append-only file of what is done, one JSON object a line, so that a killed build goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from cv_lightning.files import write_text
from cv_lightning.types import DataError


def write_report(out: Path, report: Mapping[str, Any]) -> Path:
    """Write a build's report beside its file, as `<stem>.report.json`; where it is."""
    path = out.with_name(f"{out.stem}.report.json")
    write_text(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return path


class ProgressFile:
    """Entries by number. The first line holds the settings; another build's file is refused.

    Args:
        path: made if absent; a line that was cut off by a kill is dropped.
        settings: JSON values that what is done depends on.

    Raises:
        DataError: the file was made with other settings, or is none of ours.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._places: dict[int, int] = {}
        """Byte offset of the last line of every number."""
        wanted = json.loads(json.dumps(settings, default=str))
        if path.exists() and path.stat().st_size:
            self._read(wanted)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"settings": wanted}) + "\n", encoding="utf-8")
        self._file = path.open("r+b")
        self._file.seek(0, os.SEEK_END)

    def _read(self, wanted: Mapping[str, Any]) -> None:
        with self.path.open("rb") as file:
            header, end = file.readline(), file.tell()
            try:
                given = json.loads(header)["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{self.path}: not the progress of a build; give another --out") from error
            if given != wanted:
                names = sorted(name for name in {*given, *wanted} if given.get(name) != wanted.get(name))
                raise DataError(
                    f"{self.path} was made with other settings ({', '.join(names)}); give the same ones to go on with "
                    "it, or another --out to begin anew"
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
        """Append an entry; it is in the hands of the operating system when this returns.

        Args:
            entry: JSON values with an int `number`; the last one of a number counts.
        """
        self._places[int(entry["number"])] = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._file.flush()

    def forget(self, number: int) -> None:
        """Take an entry for undone."""
        self._places.pop(number, None)

    def entries(self) -> Iterator[dict[str, Any]]:
        """All entries, by number, read from disk one by one."""
        with self.path.open("rb") as file:
            for number in sorted(self._places):
                file.seek(self._places[number])
                yield json.loads(file.readline())
