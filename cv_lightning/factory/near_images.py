"""Near copies of images: stored again, resized or turned.

Candidates share one of the four 16-bit bands of a 64-bit hash of an image's low frequencies (pHash: Zauner 2010). They
are then compared on thumbnails, because images of the same layout have similar hashes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from cv_lightning.orientations import ORIENTATIONS

THUMBNAIL_PX = 64
MAX_DIFFERENCE = 50
"""Largest difference of a pixel between thumbnails of near copies, in grey levels of 0 to 255. Measured: at most 40 for
photographs and pages stored again at half size and JPEG quality 70; at least 69 for digit scenes of the same layout
with another digit that covers a sixtieth of the image."""
MEAN_DIFFERENCE = 5.0
MIN_DEVIATION = 3.0
"""Standard deviation of a thumbnail below which an image counts as blank, with no near copies."""
MAX_CANDIDATES = 64
"""Images of a band with which one image is compared."""

Thumbnail = npt.NDArray[np.uint8]
"""Grey levels `[64, 64]`."""
SAME = "same"
VARIANTS = (SAME, *ORIENTATIONS)
_N = np.arange(THUMBNAIL_PX)
_BASIS = np.cos(np.pi * (2 * _N[None, :] + 1) * np.arange(8)[:, None] / (2 * THUMBNAIL_PX)).astype(np.float32)
"""The eight lowest frequencies of the cosine transform, `[8, 64]`."""


def thumbnail(image: Image.Image) -> bytes:
    """64x64 grey levels of an image; its aspect ratio is not kept."""
    return image.convert("L").resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX).tobytes()


def turned(view: Thumbnail, variant: str) -> Thumbnail:
    """Thumbnail of the turned or flipped image, counter-clockwise as in PIL."""
    if variant.startswith("rotate_"):
        return np.rot90(view, int(variant.removeprefix("rotate_")) // 90)
    axis = {"flip_horizontal": 1, "flip_vertical": 0}.get(variant)
    return view if axis is None else np.flip(view, axis=axis)


def hash_bands(view: Thumbnail) -> list[int]:
    """Four bands of 16 bits: whether each of the 8x8 lowest frequencies exceeds their median."""
    frequencies = (_BASIS @ view.astype(np.float32) @ _BASIS.T).ravel()
    frequencies[0] = 0  # the mean brightness
    bands: list[int] = np.packbits(frequencies > np.median(frequencies)).view(np.uint16).tolist()
    return bands


class NearImages:
    """A set of images, numbered in the order of their addition, that is searched for near copies."""

    def __init__(self) -> None:
        self._views: list[Thumbnail] = []
        self._buckets: dict[tuple[int, int], list[int]] = defaultdict(list)

    def add(self, data: bytes) -> None:
        """Add an image by its thumbnail."""
        view = _view(data)
        for key in enumerate(hash_bands(view)) if _has_content(view) else ():
            self._buckets[key].append(len(self._views))
        self._views.append(view)

    def find(self, data: bytes, variants: Sequence[str] = (SAME,)) -> tuple[int, str] | None:
        """Number of the closest near copy, and the orientation change that maps the given image to it; None: none.

        Args:
            data: Thumbnail of the image to look for.
            variants: Orientation changes of it, in the order in which they are tried.
        """
        view = _view(data)
        for variant in variants if _has_content(view) else ():
            found = self._nearest(turned(view, variant))
            if found is not None:
                return found, variant
        return None

    def _nearest(self, view: Thumbnail) -> int | None:
        """The candidate with the smallest difference, if it is a near copy."""
        candidates = list({at for key in enumerate(hash_bands(view)) for at in self._buckets[key][:MAX_CANDIDATES]})
        if not candidates:
            return None
        others = np.stack([self._views[at] for at in candidates]).astype(np.int16)
        differences = np.abs(others - view.astype(np.int16))
        means = differences.mean(axis=(1, 2))
        best = int(means.argmin())
        is_copy = means[best] <= MEAN_DIFFERENCE and differences[best].max() <= MAX_DIFFERENCE
        return candidates[best] if is_copy else None


def _view(data: bytes) -> Thumbnail:
    return np.frombuffer(data, dtype=np.uint8).reshape(THUMBNAIL_PX, THUMBNAIL_PX)


def _has_content(view: Thumbnail) -> bool:
    return bool(view.std() >= MIN_DEVIATION)
