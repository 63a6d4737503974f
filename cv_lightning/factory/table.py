"""Tables of visual question answering: Parquet, JSONL, CSV or TSV with image, question, answer and perhaps a box."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cv_lightning.data.boxes import clip_box, is_inside, parse_box
from cv_lightning.data.image_cells import image_source, load_image
from cv_lightning.data.rows import RowError, expand_files
from cv_lightning.data.tables import Table, open_table
from cv_lightning.types import Box, DataError

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
        optional = (config.question, config.answer, config.box, config.regions, config.source)
        self._parts = [_open(path, config.image, optional) for path in self.paths]
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
        return read_row(self._parts[file].row(number), self.paths[file], number, self.config)

    def place(self, position: int) -> tuple[Path, int]:
        """File and row number of a position."""
        file = bisect_right(self._starts, position) - 1
        return self.paths[file], position - self._starts[file]


def _open(path: Path, image: str, optional: Sequence[str]) -> Table:
    try:
        return open_table(path, [image], optional)
    except DataError as error:
        hint = f"; name the image's with --table.image (now {image!r})" if "no column" in str(error) else ""
        raise DataError(f"--files {error}{hint}") from error


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
    picture = image_source(
        cells.get(config.image), f"column {config.image!r}", Path(config.image_folder or path.parent)
    )
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


def read_box(value: Any, size: tuple[int, int], name: str) -> Box | None:
    """A box of four numbers, clipped to its image; None where there is none.

    Args:
        value: The cell, as `boxes.parse_box` reads it.
        size: (width, height) of the image.
        name: Of the column, for the message.

    Raises:
        RowError: It is no box, inverted, or outside the image.
    """
    box = parse_box(value, f"column {name!r}:")
    if box is None:
        return None
    if not is_inside(box, size):
        raise RowError("box", f"column {name!r}: {value} is inverted or outside its {size[0]}x{size[1]} image")
    return clip_box(box, size)


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
