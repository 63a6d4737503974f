"""Tables of visual question answering: Parquet, JSONL, CSV or TSV with image, question, answer and perhaps a box."""

from __future__ import annotations

import base64
import binascii
import csv
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cv_lightning.data.readers import BOX_SLACK_PX, load_image
from cv_lightning.data.rows import RowError, expand_files
from cv_lightning.data.sft_json import read_items
from cv_lightning.types import Box, DataError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
MAX_BOXES = 4096
"""Regions of one picture; more are not looked at."""


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Which columns hold what. Pictures are taken to be upright."""

    image: str = "image"
    """Column of the picture: bytes, base64 text, a path, or a mapping with `bytes` or `path`."""
    question: str = "question"
    """Column of the question."""
    answer: str = "answer"
    """Column of the answer: a text or number; of a list the most frequent entry counts."""
    box: str = "bbox"
    """Column of the box that the answer is read from: [x1, y1, x2, y2] in pixels, as a list or text; may be absent."""
    regions: str = "regions"
    """Column of annotated text: a list of {text, bbox}; may be absent. `build-rl` asks questions about small ones."""
    source: str = "data_source"
    """Column of the data set's name; absent: the file's name."""
    image_folder: str = ""
    """Folder that relative image paths start from; empty: the folder of the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A piece of text in a picture."""

    text: str
    box: Box
    """In pixels of the picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VqaRow:
    """One question about one upright picture."""

    id: str
    """File stem and row number."""
    question: str
    answer: str
    data_source: str
    box: Box | None
    """In pixels of the picture, clipped to it."""
    size: tuple[int, int]
    """(width, height) of the picture."""
    picture: bytes | Path
    """Encoded, or where it is."""
    regions: tuple[Region, ...] = ()

    @property
    def box_share(self) -> float | None:
        """Area of the box as a share of the picture's; None without a box."""
        if self.box is None:
            return None
        x1, y1, x2, y2 = self.box
        return (x2 - x1) * (y2 - y1) / (self.size[0] * self.size[1])

    def image(self) -> Image.Image:
        """The picture's pixels, RGB.

        Raises:
            RowError: they cannot be decoded.
        """
        return load_image(self.picture, "image", decode=True)


class VqaTable:
    """Rows of one or several files by position; texts in memory, of Parquet only one row group.

    Args:
        files: paths ending in .parquet, .jsonl, .csv or .tsv.
        config: names of columns.

    Raises:
        DataError: a file is missing, cannot be read or lacks a column, or there are no rows.
    """

    def __init__(self, files: Sequence[str], config: TableConfig) -> None:
        self.config = config
        self.paths = expand_files(files, "--files")
        self._parts = [_open(path, config) for path in self.paths]
        self._starts = [0]
        for part in self._parts:
            self._starts.append(self._starts[-1] + len(part))
        if len(self) == 0:
            raise DataError(f"{', '.join(map(str, self.paths))}: no rows")

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, position: int) -> VqaRow:
        """The row at a position, 0 to `len`.

        Raises:
            RowError: it cannot be used.
        """
        file = bisect_right(self._starts, position) - 1
        number = position - self._starts[file]
        return read_row(self._parts[file].cells(number), self.paths[file], number, self.config)

    def place(self, position: int) -> tuple[Path, int]:
        """File and row number of a position."""
        file = bisect_right(self._starts, position) - 1
        return self.paths[file], position - self._starts[file]


# ------------------------------------------------------------------------------------------------ files
class _Lines:
    """Rows of a text file, parsed when they are asked for."""

    def __init__(self, lines: list[str] | list[dict[str, str]]) -> None:
        self.lines = lines

    def __len__(self) -> int:
        return len(self.lines)

    def cells(self, number: int) -> Mapping[str, Any]:
        line = self.lines[number]
        if isinstance(line, dict):
            return line
        try:
            cells = json.loads(line)
        except ValueError as error:
            raise RowError("not JSON", f"the line is no JSON ({error})") from error
        if not isinstance(cells, dict):
            raise RowError("not JSON", f"the line holds a {type(cells).__name__}; an object is wanted")
        return cells


class _RowGroups:
    """Rows of a Parquet file, one row group in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = pq.ParquetFile(path)
        counts = [self.file.metadata.row_group(group).num_rows for group in range(self.file.num_row_groups)]
        self.starts: list[int] = [0, *accumulate(counts)]
        self._group = lru_cache(maxsize=2)(self._read)

    def __len__(self) -> int:
        return self.starts[-1]

    def cells(self, number: int) -> Mapping[str, Any]:
        group = bisect_right(self.starts, number) - 1
        return self._group(group)[number - self.starts[group]]

    def _read(self, group: int) -> list[dict[str, Any]]:
        try:
            rows: list[dict[str, Any]] = self.file.read_row_group(group).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path}, row group {group}: cannot be read ({error}); is it cut off?") from error
        return rows


def _open(path: Path, config: TableConfig) -> _Lines | _RowGroups:
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            groups = _RowGroups(path)
            _check_columns(path, groups.file.schema_arrow.names, config)
            return groups
        if kind in SEPARATORS:
            csv.field_size_limit(1 << 30)  # pictures may stand in cells as base64
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, delimiter=SEPARATORS[kind])
                _check_columns(path, list(reader.fieldnames or ()), config)
                return _Lines(list(reader))
        if kind == ".jsonl":
            return _Lines([line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()])
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as {kind[1:]} ({error})") from error
    raise DataError(f"--files {path}: a table ends in .parquet, .jsonl, .csv or .tsv")


def all_cells(path: Path) -> Iterator[Any]:
    """The rows of any file that this project reads, column to value; what is no object is given as it is.

    Raises:
        DataError: it cannot be read.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            groups = _RowGroups(path)
            yield from (groups.cells(number) for number in range(len(groups)))
        elif kind in SEPARATORS:
            csv.field_size_limit(1 << 30)
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield from csv.DictReader(file, delimiter=SEPARATORS[kind])
        else:
            yield from read_items(path, under="data")
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as {kind[1:]} ({error})") from error


def _check_columns(path: Path, columns: Sequence[str], config: TableConfig) -> None:
    if config.image not in columns:
        raise DataError(
            f"{path}: no column {config.image!r}; it has {', '.join(columns)}. Name the picture's with --table.image"
        )


# ------------------------------------------------------------------------------------------------ one row
def read_row(cells: Mapping[str, Any], path: Path, number: int, config: TableConfig) -> VqaRow:
    """A row of a table; of the picture no more than the header is read.

    Args:
        cells: column to value.
        path: file, for the id and relative image paths.
        number: row in the file, from 0.
        config: names of columns.

    Raises:
        RowError: question, answer or picture is missing, or the box cannot be.
    """
    picture = picture_source(cells.get(config.image), Path(config.image_folder or path.parent), config.image)
    size = load_image(picture, config.image, decode=False).size
    regions = _regions(cells.get(config.regions), size, config)
    question, answer = _text(cells.get(config.question)), _text(cells.get(config.answer))
    if not regions:
        for name, text in ((config.question, question), (config.answer, answer)):
            if not text:
                raise RowError("no question" if name == config.question else "no answer", f"column {name!r} is empty")
    return VqaRow(
        id=f"{path.stem}:{number}",
        question=question.replace("<image>", "").strip(),
        answer=answer,
        data_source=_text(cells.get(config.source)) or path.stem,
        box=read_box(cells.get(config.box), size, config.box),
        size=size,
        picture=picture,
        regions=regions,
    )


def _text(value: Any) -> str:
    """A cell as text; of a list its most frequent entry, the first of several."""
    if isinstance(value, list | tuple):
        counted = Counter(str(entry) for entry in value if entry not in (None, ""))
        return counted.most_common(1)[0][0].strip() if counted else ""
    return "" if value is None or value != value else str(value).strip()


def picture_source(cell: Any, folder: Path, name: str) -> bytes | Path:
    """Bytes or path of a picture's cell: bytes, a path, base64 text, or a mapping with either.

    Raises:
        RowError: it is empty, or a text that is neither.
    """
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if not cell:
        raise RowError("no image", f"column {name!r} is empty")
    if isinstance(cell, bytes):
        return cell
    text = str(cell)
    if len(text) > 1024 or text.startswith("data:"):  # longer than any path
        try:
            return base64.b64decode(text.rpartition(",")[2], validate=True)
        except (binascii.Error, ValueError) as error:
            raise RowError("unreadable image", f"column {name!r} holds a text that is no base64 ({error})") from error
    return folder / text


def read_box(value: Any, size: tuple[int, int], name: str) -> Box | None:
    """A box of a list or a text of four numbers, clipped to its picture; None where there is none.

    Args:
        value: the cell.
        size: (width, height) of the picture.
        name: of the column, for the message.

    Raises:
        RowError: it is no box, inverted, or outside the picture.
    """
    if isinstance(value, str):
        value = value.strip().strip("[]()").replace(",", " ").split()
    if value is None or value != value:  # NaN, as pandas writes what is missing
        return None
    if not isinstance(value, list | tuple):
        raise RowError("box", f"column {name!r}: {value!r} is not four numbers x1, y1, x2, y2")
    if all(edge is None for edge in value):
        return None
    try:
        x1, y1, x2, y2 = (float(edge) for edge in value)
    except (TypeError, ValueError) as error:
        raise RowError("box", f"column {name!r}: {value} is not four numbers x1, y1, x2, y2") from error
    width, height = size
    inside = min(x1, y1) >= -BOX_SLACK_PX and x2 <= width + BOX_SLACK_PX and y2 <= height + BOX_SLACK_PX
    box = (max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2))
    if not inside or not (box[0] < box[2] and box[1] < box[3]):
        raise RowError("box", f"column {name!r}: {value} is inverted or outside its {width}x{height} picture")
    return box


def _regions(value: Any, size: tuple[int, int], config: TableConfig) -> tuple[Region, ...]:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError("regions", f"column {config.regions!r} is no JSON ({error})") from error
    if value is None or value == "" or value != value:
        return ()
    if not isinstance(value, list | tuple):
        raise RowError("regions", f"column {config.regions!r}: {value!r} is no list of objects with text and bbox")
    found = []
    for entry in value[:MAX_BOXES]:
        if not isinstance(entry, Mapping):
            raise RowError("regions", f"column {config.regions!r}: {entry!r} is no object with text and bbox")
        try:
            box = read_box(entry.get("bbox") or entry.get("box"), size, config.regions)
        except RowError:
            continue  # one bad box of hundreds costs itself only
        if box is not None and _text(entry.get("text")):
            found.append(Region(text=_text(entry.get("text")), box=box))
    return tuple(found)
