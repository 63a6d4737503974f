"""Tables of visual question answering: Parquet, JSONL, CSV or TSV with image, question, answer and perhaps a box."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cv_lightning.data.boxes import fit_box, parse_box
from cv_lightning.data.image_cells import image_source, load_image
from cv_lightning.data.rows import RowError, RowIndex, RowProblems, expand_files, is_missing
from cv_lightning.data.tables import open_table
from cv_lightning.images import area
from cv_lightning.types import Box, DataError

MAX_REGIONS = 4096
"""Regions of an image that are read."""


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Names of the columns. Images are taken to be upright."""

    image: str = "image"
    """Column of the image: bytes, base64 text, a path, or a mapping with `bytes` or `path`."""
    question: str = "question"
    """Column of the question."""
    answer: str = "answer"
    """Column of the answer: a text or number; of a list, the most frequent entry is taken."""
    box: str = "bbox"
    """Column of the box with the evidence: [x1, y1, x2, y2] in pixels, as a list or text; optional."""
    regions: str = "regions"
    """Column of annotated text: a list of {text, bbox}; optional. `build-rl` asks questions about small ones."""
    source: str = "data_source"
    """Column of the data set's name; if absent, the file's name is used."""
    image_folder: str = ""
    """Folder that relative image paths start from; empty: the folder of the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A piece of text in an image."""

    text: str
    box: Box
    """Place in pixels of the image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VqaRow:
    """One question about one upright image."""

    id: str
    """File stem and row number."""
    question: str
    answer: str
    data_source: str
    box: Box | None
    """Evidence in pixels of the image, clipped to it."""
    size: tuple[int, int]
    """(width, height) of the image."""
    source: bytes | Path
    """The encoded image, or its path."""
    regions: tuple[Region, ...] = ()

    @property
    def box_fraction(self) -> float | None:
        """Area of the box as a fraction of the image's; None without a box."""
        return None if self.box is None else area(self.box) / (self.size[0] * self.size[1])

    def image(self) -> Image.Image:
        """The image's pixels, RGB.

        Raises:
            RowError: They cannot be decoded.
        """
        return load_image(self.source, "image", decode=True)


class VqaTable:
    """Rows of one or several files by position.

    Args:
        files: Paths ending in .parquet, .jsonl, .csv or .tsv.
        config: Names of columns.
        with_regions: Read annotated text; a row that has some needs neither question nor answer.

    Raises:
        DataError: A file does not exist, cannot be read or lacks a column, or there are no rows.
    """

    def __init__(self, files: Sequence[str], config: TableConfig, with_regions: bool = False) -> None:
        self.config, self.with_regions = config, with_regions
        self.paths = expand_files(files, "--files")
        self.problems = RowProblems()
        optional = (config.question, config.answer, config.box, config.regions, config.source)
        try:
            self._parts = [open_table(path, [config.image], optional) for path in self.paths]
        except DataError as error:
            hint = f"; name the image's with --table.image (now {config.image!r})" if "no column" in str(error) else ""
            raise DataError(f"--files {error}{hint}") from error
        self._index = RowIndex(map(len, self._parts))
        if len(self) == 0:
            raise DataError(f"{', '.join(map(str, self.paths))}: no rows")

    def __len__(self) -> int:
        return len(self._index)

    def row(self, position: int) -> VqaRow:
        """The row at a position, 0 to `len`; only the header of its image is read.

        Raises:
            RowError: It cannot be used; `problems` lists it.
        """
        file, number = self._index.locate(position)
        try:
            return self._read(self._parts[file].row(number), self.paths[file], number)
        except RowError as error:
            self.problems.add(self.paths[file], number, error)
            raise

    def usable(self) -> Iterator[tuple[int, VqaRow, Image.Image]]:
        """Position, row and image of every row that can be used; `problems` lists the others."""
        for position in range(len(self)):
            try:
                row = self.row(position)
                yield position, row, row.image()
            except RowError as error:
                file, number = self._index.locate(position)
                self.problems.add(self.paths[file], number, error)

    def _read(self, cells: Mapping[str, Any], path: Path, number: int) -> VqaRow:
        names = self.config
        folder = Path(names.image_folder or path.parent)
        source = image_source(cells.get(names.image), f"column {names.image!r}", folder)
        size = load_image(source, names.image, decode=False).size
        regions = _regions(cells.get(names.regions), size, names.regions) if self.with_regions else ()
        question, answer = _text(cells.get(names.question)), _text(cells.get(names.answer))
        for kind, name, text in (("question", names.question, question), ("answer", names.answer, answer)):
            if not text and not regions:
                raise RowError(f"no {kind}", f"column {name!r} is empty")
        return VqaRow(
            id=f"{path.stem}:{number}",
            question=question.replace("<image>", "").strip(),
            answer=answer,
            data_source=_text(cells.get(names.source)) or path.stem,
            box=read_box(cells.get(names.box), size, names.box),
            size=size,
            source=source,
            regions=regions,
        )


def _text(value: Any) -> str:
    """A cell as text; for a list, its most frequent entry, the first of equally frequent ones."""
    if isinstance(value, list | tuple):
        counted = Counter(str(entry) for entry in value if entry not in (None, ""))
        return counted.most_common(1)[0][0].strip() if counted else ""
    return "" if is_missing(value) else str(value).strip()


def read_box(value: Any, size: tuple[int, int], name: str) -> Box | None:
    """A box of four numbers, clipped to its image; None if the cell is empty.

    Args:
        value: The cell, in a form that `boxes.parse_box` reads.
        size: (width, height) of the image.
        name: Column, for the message.

    Raises:
        RowError: It is not a box, inverted, or outside the image.
    """
    box = parse_box(value, f"column {name!r}:")
    return None if box is None else fit_box(box, size, f"column {name!r}: {value}")


def _regions(value: Any, size: tuple[int, int], name: str) -> tuple[Region, ...]:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError("regions", f"column {name!r} is not JSON ({error})") from error
    if is_missing(value) or value == "":
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(entry, Mapping) for entry in value):
        raise RowError("regions", f"column {name!r}: {str(value)[:200]} is not a list of objects with text and bbox")
    found = []
    for entry in value[:MAX_REGIONS]:
        with suppress(RowError):  # a bad box excludes its region, not the row
            box, text = read_box(entry.get("bbox") or entry.get("box"), size, name), _text(entry.get("text"))
            if box is not None and text:
                found.append(Region(text=text, box=box))
    return tuple(found)
