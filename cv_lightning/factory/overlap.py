"""Pictures that are there twice: by their pixels or nearly, however they are turned."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from cv_lightning.data.image_cells import image_source, load_image
from cv_lightning.data.rows import RowError, expand_files
from cv_lightning.data.tables import open_table
from cv_lightning.factory.table import TableConfig
from cv_lightning.images import content_hash, to_rgb
from cv_lightning.types import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

    Bits = npt.NDArray[np.uint8]
    """[..., 32]: 256 bits."""

PICTURES = ("images", "image", "image_1", "image_2")
"""Columns that hold pictures in the files that this project reads."""
Match = Literal["pixels", "near"]
ALL_TURNS = tuple(Image.Transpose)
HASH_SIDE = 16
"""A near hash has this number of bits, squared."""
MIN_RANGE = 12
"""A picture whose reduced grey values differ by less (of 255) has no near hash: it would match every empty page."""


class PictureSet:
    """Pictures by their pixels, however they are turned or flipped.

    A picture is hashed once. Only one with the grey values of another, which turning does not change, is turned to see
    whether it is the same.
    """

    def __init__(self) -> None:
        self._greys: set[bytes] = set()
        self._hashes: set[str] = set()

    def find(self, image: Image.Image) -> str | None:
        """The hash under which a picture, or a turned form of it, was added; None if neither was."""
        image = to_rgb(image)
        if _grey_values(image) not in self._greys:
            return None
        forms = (image, *(image.transpose(turn) for turn in ALL_TURNS))
        return next((found for found in map(content_hash, forms) if found in self._hashes), None)

    def add(self, image: Image.Image) -> str:
        """Take a picture in; the hash of the one that was there already, else its own."""
        image = to_rgb(image)
        found = self.find(image)
        if found is None:
            found = content_hash(image)
            self._greys.add(_grey_values(image))
            self._hashes.add(found)
        return found


def _grey_values(image: Image.Image) -> bytes:
    """Digest of how often each value comes in each channel; the same for all turned forms of a picture."""
    counts = np.asarray(image.histogram(), dtype=np.int64).tobytes()
    return hashlib.blake2b(counts, digest_size=16).digest()


def near_hash(image: Image.Image) -> Bits | None:
    """Signs of the horizontal differences of a reduced grey picture (dHash). Shape [32]; None where it is all one grey.

    Re-encoding, rescaling and mild changes of light flip few of its 256 bits.
    """
    size = (HASH_SIDE + 1, HASH_SIDE)
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.BOX), dtype=np.int16)
    if int(grey.max()) - int(grey.min()) < MIN_RANGE:
        return None
    return np.packbits(grey[:, 1:] > grey[:, :-1])


class KnownPictures:
    """The pictures of a test set, to be kept out of training.

    Args:
        match: `pixels` finds a picture, turned or not, whose pixels are the same; `near` re-encoded, rescaled and
            slightly changed ones as well.
        near_bits: most bits, of 256, in which near hashes of one picture differ.
    """

    def __init__(self, match: Match, near_bits: int) -> None:
        self.match, self.near_bits = match, near_bits
        self._pictures = PictureSet()
        self._near: list[Bits] = []
        self._table: Bits | None = None
        self.count = 0

    def add(self, image: Image.Image) -> None:
        """Take a picture into the set."""
        self.count += 1
        self._pictures.add(image)
        if self.match == "near":
            forms = [near_hash(image), *(near_hash(image.transpose(turn)) for turn in ALL_TURNS)]
            self._near += [form for form in forms if form is not None]
            self._table = None

    def __contains__(self, image: Image.Image) -> bool:
        if self._pictures.find(image) is not None:
            return True
        found = near_hash(image) if self._near else None
        if found is None:
            return False
        if self._table is None:
            self._table = np.stack(self._near)
        differing = np.bitwise_count(self._table ^ found).sum(axis=1)
        return bool(differing.min() <= self.near_bits)


def pictures_of(files: Sequence[str], table: TableConfig) -> Iterator[Image.Image]:
    """All pictures of RL and benchmark files and of tables, whatever else their columns are.

    Args:
        files: paths: .parquet, .json, .jsonl, .tsv or .csv.
        table: name of the column with the picture, where it is none of `PICTURES`; folder of pictures.

    Raises:
        DataError: a file cannot be read, or not one picture is found in it: nothing could be kept out then.
    """
    for path in expand_files(files, "--test_files"):
        found = 0
        for cell in _cells(path, table):
            with suppress(RowError, DataError):  # what cannot be read cannot leak
                image = load_image(image_source(cell, "image", Path(table.image_folder or path.parent)), "image", True)
                found += 1
                yield image
        if not found:
            raise DataError(
                f"--test_files {path}: no picture in it could be read, so none could be kept out of training; name its "
                f"column with --table.image (looked for: {', '.join(dict.fromkeys((table.image, *PICTURES)))})"
            )


def _cells(path: Path, table: TableConfig) -> Iterator[Any]:
    """What stands for each picture of a file."""
    rows = open_table(path)
    for number in range(len(rows)):
        row: Mapping[str, Any] = {}
        with suppress(RowError):
            row = rows.row(number)
        for name in dict.fromkeys((table.image, *PICTURES)):
            if value := row.get(name):
                yield from value if isinstance(value, list) else [value]
