"""Images that occur twice: with equal or nearly equal pixels, in any of the eight orientations."""

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

IMAGE_COLUMNS = ("images", "image", "image_1", "image_2")
"""Columns that hold images in the files that this project reads."""
Match = Literal["pixels", "near"]
HASH_SIDE = 16
"""Square root of the number of bits of a near hash."""
MIN_RANGE = 12
"""Range of reduced grey values (of 255) below which an image has no near hash: it would match every empty page."""


def _orientations(image: Image.Image) -> Iterator[Image.Image]:
    yield image
    yield from map(image.transpose, Image.Transpose)


class OrientedImages:
    """A set of images by their pixels, which an image belongs to in any orientation.

    An image is hashed in all orientations only if its histogram, which turning does not change, is known.
    """

    def __init__(self) -> None:
        self._histograms: set[bytes] = set()
        self._hashes: set[str] = set()

    def find(self, image: Image.Image) -> str | None:
        """The hash under which an image was added, in any orientation; None if it was not."""
        image = to_rgb(image)
        if _histogram_hash(image) not in self._histograms:
            return None
        return next((found for found in map(content_hash, _orientations(image)) if found in self._hashes), None)

    def add(self, image: Image.Image) -> str:
        """Add an image; the hash of the one that was there already, else its own."""
        image = to_rgb(image)
        found = self.find(image)
        if found is None:
            found = content_hash(image)
            self._histograms.add(_histogram_hash(image))
            self._hashes.add(found)
        return found


def _histogram_hash(image: Image.Image) -> bytes:
    """Hash of the histogram of each channel; equal for all orientations of an image."""
    counts = np.asarray(image.histogram(), dtype=np.int64).tobytes()
    return hashlib.blake2b(counts, digest_size=16).digest()


def near_hash(image: Image.Image) -> Bits | None:
    """Signs of the horizontal differences of a reduced grey image (dHash). Shape [32]; None for a uniform image.

    Re-encoding, rescaling and mild changes of light flip few of its 256 bits.
    """
    size = (HASH_SIDE + 1, HASH_SIDE)
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.BOX), dtype=np.int16)
    if np.ptp(grey) < MIN_RANGE:
        return None
    return np.packbits(grey[:, 1:] > grey[:, :-1])


class KnownImages:
    """The images of a test set, which must be kept out of training.

    Args:
        match: `pixels` finds images with equal pixels in any orientation; `near` also re-encoded, rescaled and slightly
            changed ones.
        near_bits: Largest number of different bits, of 256, between near hashes of one image.
    """

    def __init__(self, match: Match, near_bits: int) -> None:
        self.match, self.near_bits = match, near_bits
        self._images = OrientedImages()
        self._near: list[Bits] = []
        self.count = 0

    def add(self, image: Image.Image) -> None:
        """Add an image to the set."""
        self.count += 1
        self._images.add(image)
        if self.match == "near":
            self._near += [found for found in map(near_hash, _orientations(image)) if found is not None]

    def __contains__(self, image: Image.Image) -> bool:
        if self._images.find(image) is not None:
            return True
        found = near_hash(image) if self._near else None
        if found is None:
            return False
        if len(self._near) > 1:
            self._near = [np.vstack(self._near)]  # one array, until the next image is added
        return bool(np.bitwise_count(self._near[0] ^ found).sum(axis=-1).min() <= self.near_bits)


def images_of(files: Sequence[str], table: TableConfig) -> Iterator[Image.Image]:
    """All images of RL and benchmark files and of tables; other columns do not matter.

    Args:
        files: Paths: .parquet, .json, .jsonl, .tsv or .csv.
        table: Name of the column with the image, besides `IMAGE_COLUMNS`, and folder of images.

    Raises:
        DataError: A file cannot be read or has no readable image, so that none could be kept out of training.
    """
    for path in expand_files(files, "--test_files"):
        found = 0
        for cell in _cells(path, table):
            with suppress(RowError, DataError):  # an unreadable image cannot leak
                image = load_image(image_source(cell, "image", Path(table.image_folder or path.parent)), "image", True)
                found += 1
                yield image
        if not found:
            raise DataError(
                f"--test_files {path}: no image in it could be read, so none could be kept out of training; name its "
                f"column with --table.image (looked for: {', '.join(dict.fromkeys((table.image, *IMAGE_COLUMNS)))})"
            )


def _cells(path: Path, table: TableConfig) -> Iterator[Any]:
    """The image cells of a file."""
    rows = open_table(path)
    for number in range(len(rows)):
        row: Mapping[str, Any] = {}
        with suppress(RowError):
            row = rows.row(number)
        for name in dict.fromkeys((table.image, *IMAGE_COLUMNS)):
            if value := row.get(name):
                yield from value if isinstance(value, list) else [value]
