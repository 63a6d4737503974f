"""Pictures that are there twice: by their pixels or nearly, however they are turned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from cv_lightning.data.builders.table import TableConfig, VqaTable
from cv_lightning.data.readers import TaskFiles
from cv_lightning.data.rows import ReaderConfig, RowError, expand_files
from cv_lightning.images import content_hash, to_rgb

if TYPE_CHECKING:
    import numpy.typing as npt

    Bits = npt.NDArray[np.uint8]
    """[..., 32]: 256 bits."""

Match = Literal["pixels", "near"]
ALL_TURNS = tuple(Image.Transpose)
HASH_SIDE = 16
"""A near hash has this number of bits, squared."""
MIN_RANGE = 12
"""A picture whose reduced grey values differ by less (of 255) has no near hash: it would match every empty page."""


def canonical_hash(image: Image.Image) -> str:
    """The same for a picture and all its turned and flipped forms, and for no other: the least of their hashes."""
    image = to_rgb(image)
    return min(content_hash(image), *(content_hash(image.transpose(turn)) for turn in ALL_TURNS))


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
        self._hashes: set[str] = set()
        self._near: list[Bits] = []
        self._table: Bits | None = None
        self.count = 0

    def add(self, image: Image.Image) -> None:
        """Take a picture into the set."""
        self.count += 1
        self._hashes.add(canonical_hash(image))
        if self.match == "near":
            forms = [near_hash(image), *(near_hash(image.transpose(turn)) for turn in ALL_TURNS)]
            self._near += [form for form in forms if form is not None]
            self._table = None

    def __contains__(self, image: Image.Image) -> bool:
        if canonical_hash(image) in self._hashes:
            return True
        found = near_hash(image) if self._near else None
        if found is None:
            return False
        if self._table is None:
            self._table = np.stack(self._near)
        differing = np.bitwise_count(self._table ^ found).sum(axis=1)
        return bool(differing.min() <= self.near_bits)


def pictures_of(files: Sequence[str], table: TableConfig) -> Iterator[Image.Image]:
    """All pictures of RL or benchmark files (Parquet with `images`) and of tables.

    Args:
        files: paths.
        table: columns of tables.

    Raises:
        DataError: a file cannot be read.
    """
    for path in expand_files(files, "--test_files"):
        if path.suffix == ".parquet" and "images" in pq.read_schema(path).names:
            tasks: Any = TaskFiles([str(path)], ReaderConfig())
            for position in range(len(tasks)):
                yield from tasks.row(position).images
            continue
        rows = VqaTable([str(path)], table)
        for position in range(len(rows)):
            try:
                yield rows.row(position).image()
            except RowError:
                continue  # what cannot be read cannot leak
