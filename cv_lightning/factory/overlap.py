"""Images that occur twice: with equal or nearly equal pixels, in any of the eight orientations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from cv_lightning.data.image_cells import image_source, load_image
from cv_lightning.data.rows import RowError, expand_files
from cv_lightning.data.tables import open_table
from cv_lightning.factory.near_images import VARIANTS, NearImages, thumbnail
from cv_lightning.factory.vqa_table import TableConfig
from cv_lightning.images import content_hash, to_rgb
from cv_lightning.types import DataError

IMAGE_COLUMNS = ("images", "image", "image_1", "image_2")
"""Columns that hold images in the files that this project reads."""
Match = Literal["pixels", "near"]


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


class KnownImages:
    """The images of a test set, which must be kept out of training.

    Args:
        match: `pixels` finds images with equal pixels in any orientation; `near` also re-encoded, rescaled and slightly
            changed ones, by the rule of `data check`.
    """

    def __init__(self, match: Match) -> None:
        self._images = OrientedImages()
        self._near = NearImages() if match == "near" else None
        self.count = 0

    def add(self, image: Image.Image) -> None:
        """Add an image to the set."""
        self.count += 1
        self._images.add(image)
        if self._near is not None:
            self._near.add(thumbnail(image))

    def __contains__(self, image: Image.Image) -> bool:
        is_same = self._images.find(image) is not None
        return is_same or (self._near is not None and self._near.find(thumbnail(image), VARIANTS) is not None)


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
