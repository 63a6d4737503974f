"""Rows of one file as mappings, whatever its format: Parquet, TSV with images as base64, JSON, JSON Lines.

Of Parquet and TSV only what is asked for is in memory: their pictures make gigabytes.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cv_lightning.data.chunks import ParquetRows
from cv_lightning.data.rows import RowError, is_missing
from cv_lightning.data.sft_json import read_items
from cv_lightning.types import DataError


class Table(Protocol):
    """Rows by number."""

    def __len__(self) -> int:
        """Number of rows."""

    def row(self, index: int) -> Mapping[str, Any]:
        """One row, column to value.

        Raises:
            RowError: it cannot be read.
        """


def open_table(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """Open a file by its ending.

    Args:
        path: .parquet, .tsv, .json or .jsonl.
        needed: columns that must be there (of JSON each row is asked when it is read).
        optional: columns that are read where they are there.

    Raises:
        DataError: another ending, or a file that lacks a column.
    """
    match path.suffix.lower():
        case ".parquet":
            return ParquetRows([path], [[name] for name in needed], optional)
        case ".tsv":
            return TsvRows(path, needed)
        case ".json" | ".jsonl":
            return JsonRows(path, needed)
    raise DataError(f"{path}: a benchmark is read from .parquet, .tsv, .json or .jsonl, not from {path.suffix!r}")


class JsonRows:
    """Items of a JSON list (or of the list under its key `data`), or lines of JSON.

    Args:
        path: .json or .jsonl.
        needed: keys of every item.
    """

    def __init__(self, path: Path, needed: Sequence[str]) -> None:
        self.needed = needed
        self._items = read_items(path, under="data")

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


class TsvRows:
    """Rows of a TSV file with a header, found by their place in the file.

    Args:
        path: the file, UTF-8; fields may be quoted.
        needed: columns that must be there.

    Raises:
        DataError: a column is missing, or the file cannot be read.
    """

    def __init__(self, path: Path, needed: Sequence[str]) -> None:
        self.path = path
        csv.field_size_limit(sys.maxsize)  # a picture is one field
        self._starts: list[int] = []
        try:
            with path.open("rb") as file:
                lines = _Lines(file)
                reader = csv.reader(lines, delimiter="\t")
                self.columns = next(reader, [])
                start = lines.position
                for _ in reader:
                    self._starts.append(start)
                    start = lines.position
        except (OSError, csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as TSV ({error}); is it cut off?") from error
        if missing := [name for name in needed if name not in self.columns]:
            raise DataError(f"{path}: no column {', '.join(missing)}; it has {', '.join(self.columns)}")

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, index: int) -> Mapping[str, Any]:
        """One row; an empty field is None."""
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            cells = next(csv.reader(_Lines(file), delimiter="\t"))
        if len(cells) != len(self.columns):
            raise RowError("torn row", f"{len(cells)} fields, the header has {len(self.columns)}")
        return {name: cell or None for name, cell in zip(self.columns, cells, strict=True)}


class _Lines(Iterator[str]):
    """Decoded lines of a binary file that know where the next one starts."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.position = int(file.tell())

    def __next__(self) -> str:
        start, line = self.position, bytes(self.file.readline())
        if not line:
            raise StopIteration
        self.position += len(line)
        return line.decode("utf-8-sig" if start == 0 else "utf-8")  # some editors write a byte-order mark
