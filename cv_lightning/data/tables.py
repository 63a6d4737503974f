"""Rows of one file as mappings: Parquet, CSV, TSV, JSON or JSON Lines.

Of Parquet, CSV and TSV only the requested row is in memory, because their images may take gigabytes.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cv_lightning.data.chunks import ParquetRows
from cv_lightning.data.rows import RowError, is_missing
from cv_lightning.types import DataError


class Table(Protocol):
    """Rows by number."""

    def __len__(self) -> int:
        """Number of rows."""

    def row(self, index: int) -> Mapping[str, Any]:
        """One row, column to value.

        Raises:
            RowError: It cannot be read.
        """


SEPARATORS = {".csv": ",", ".tsv": "\t"}


def open_table(path: Path, needed: Sequence[str] = (), optional: Sequence[str] | None = None) -> Table:
    """Open a file by its ending.

    Args:
        path: .parquet, .csv, .tsv, .json or .jsonl.
        needed: Columns that must exist (for JSON, each row is checked when it is read).
        optional: Further columns that are read from Parquet if they exist; None: all.

    Raises:
        DataError: Another ending, or a file that lacks a column.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        return ParquetRows([path], [[name] for name in needed], optional)
    if kind in SEPARATORS:
        return TextRows(path, needed, SEPARATORS[kind])
    if kind in (".json", ".jsonl"):
        return ItemRows(read_items(path, under="data"), needed)
    raise DataError(f"{path}: a table is read from .parquet, .csv, .tsv, .json or .jsonl, not from {path.suffix!r}")


class ItemRows:
    """Rows in memory, such as the items of a JSON list.

    Args:
        items: The rows.
        needed: Keys of every row.
    """

    def __init__(self, items: Sequence[Any], needed: Sequence[str]) -> None:
        self.needed = needed
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def row(self, index: int) -> Mapping[str, Any]:
        """One item."""
        item = self._items[index]
        if not isinstance(item, Mapping):
            raise RowError("no object", f"item {index} is {str(item)[:80]!r}; an object is wanted")
        if missing := [name for name in self.needed if is_missing(item.get(name))]:
            raise RowError("missing key", f"no key {', '.join(missing)}; it has {', '.join(map(str, item))}")
        return item


class TextRows:
    """Rows of a CSV or TSV file with a header, indexed by their position in the file.

    Args:
        path: The file, UTF-8; fields may be quoted.
        needed: Columns that must exist.
        separator: Separator of the fields.

    Raises:
        DataError: A column is missing, or the file cannot be read.
    """

    def __init__(self, path: Path, needed: Sequence[str], separator: str) -> None:
        self.path, self.separator = path, separator
        csv.field_size_limit(sys.maxsize)  # an image may be one field
        self._starts: list[int] = []
        try:
            with path.open("rb") as file:
                lines = _Lines(file)
                reader = csv.reader(lines, delimiter=self.separator)
                self.columns = next(reader, [])
                start = lines.position
                for _ in reader:
                    self._starts.append(start)
                    start = lines.position
        except (OSError, csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as {path.suffix[1:].upper()} ({error}); is it cut off?") from error
        if missing := [name for name in needed if name not in self.columns]:
            raise DataError(f"{path}: no column {', '.join(missing)}; it has {', '.join(self.columns)}")

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, index: int) -> Mapping[str, Any]:
        """One row; an empty field is None."""
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            cells = next(csv.reader(_Lines(file), delimiter=self.separator))
        if len(cells) != len(self.columns):
            raise RowError("torn row", f"{len(cells)} fields, the header has {len(self.columns)}")
        return {name: cell or None for name, cell in zip(self.columns, cells, strict=True)}


class _Lines(Iterator[str]):
    """Decoded lines of a binary file; `position` is where the next one starts."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.position = int(file.tell())

    def __next__(self) -> str:
        start, line = self.position, bytes(self.file.readline())
        if not line:
            raise StopIteration
        self.position += len(line)
        return line.decode("utf-8-sig" if start == 0 else "utf-8")  # some editors write a byte-order mark


def read_items(path: Path, under: str = "") -> list[Any]:
    """The items of a file; a line of JSON Lines that is not JSON becomes an unusable item.

    Args:
        path: .json or .jsonl.
        under: Key of the list if the file holds an object.

    Raises:
        DataError: The file is not JSON, or not a list.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte-order mark, as some editors write it, is not content
        if path.suffix.lower() == ".jsonl":
            return [_line(line) for line in text.split("\n") if line.strip()]
        items = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); is it cut off?") from error
    if under and isinstance(items, dict):
        items = items.get(under)
    if not isinstance(items, list):
        wanted = "a list" if under else "a list of conversations"
        raise DataError(f"{path}: holds a {type(items).__name__}; {wanted} is wanted")
    return items


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"a line that is not JSON ({error})"
