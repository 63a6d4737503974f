"""Near copies of images: stored again, resized or turned.

Candidates share one of the four 16-bit bands of a 64-bit hash of an image's low frequencies (pHash: Zauner 2010). They
are then compared on thumbnails, because images of the same layout have similar hashes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

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

Thumbnails = npt.NDArray[np.uint8]
VARIANTS = ("same", *ORIENTATIONS)


@dataclass(frozen=True, slots=True)
class Copy:
    """An image and another one of which it is a near copy."""

    first: int
    second: int
    variant: str
    """Orientation change that maps the first to the second."""


def thumbnail(image: Image.Image) -> bytes:
    """64x64 grey levels of an image; its aspect ratio is not kept."""
    return image.convert("L").resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX).tobytes()


def as_thumbnails(data: Sequence[bytes]) -> Thumbnails:
    """`[N, 64, 64]` grey levels."""
    side = THUMBNAIL_PX
    return np.frombuffer(b"".join(data), dtype=np.uint8).reshape(-1, side, side)


def turned(thumbnails: Thumbnails, variant: str) -> Thumbnails:
    """Thumbnails of the turned or flipped images, counter-clockwise as in PIL."""
    if variant.startswith("rotate_"):
        return np.rot90(thumbnails, int(variant.removeprefix("rotate_")) // 90, axes=(1, 2))
    axis = {"flip_horizontal": 2, "flip_vertical": 1}.get(variant)
    return thumbnails if axis is None else np.flip(thumbnails, axis=axis)


def perceptual_hashes(thumbnails: Thumbnails) -> npt.NDArray[np.uint16]:
    """`[N, 4]` bands of 16 bits: whether each of the 8x8 lowest frequencies exceeds their median."""
    n = np.arange(THUMBNAIL_PX)
    basis = np.cos(np.pi * (2 * n[None, :] + 1) * np.arange(8)[:, None] / (2 * THUMBNAIL_PX)).astype(np.float32)
    frequencies = np.empty((len(thumbnails), 64), np.float32)
    for start in range(0, len(thumbnails), 4096):
        part = thumbnails[start : start + 4096].astype(np.float32)
        frequencies[start : start + 4096] = (basis @ part @ basis.T).reshape(-1, 64)
    frequencies[:, 0] = 0  # the mean brightness
    bits = frequencies > np.median(frequencies, axis=1, keepdims=True)
    packed = np.packbits(bits, axis=1)
    return packed.view(np.uint16).reshape(-1, 4)


def near_copies(
    thumbnails: Thumbnails, queries: Sequence[int], base: Sequence[int], variants: Sequence[str] = ("same",)
) -> list[Copy]:
    """The closest near copy of each query among the base images, for queries that have one.

    Args:
        thumbnails: Thumbnails of all images.
        queries: Numbers of the images to look for.
        base: Numbers of the images to search; a query that is one of them is compared with those before it only.
        variants: Orientation changes of a query, in the order in which they are tried.
    """
    if not len(queries) or not len(base):
        return []
    has_content = thumbnails.std(axis=(1, 2)) >= MIN_DEVIATION
    order = {image: at for at, image in enumerate(base)}
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for image, bands in zip(base, perceptual_hashes(thumbnails[list(base)]).tolist(), strict=True):
        for key in enumerate(bands) if has_content[image] else ():
            buckets[key].append(image)
    found: dict[int, Copy] = {}
    for variant in variants:
        views = turned(thumbnails[list(queries)], variant)
        for at, (query, bands) in enumerate(zip(queries, perceptual_hashes(views).tolist(), strict=True)):
            if query in found or not has_content[query]:
                continue
            candidates = {image for key in enumerate(bands) for image in buckets[key][:MAX_CANDIDATES]}
            until = order.get(query, len(base))
            other = _nearest(thumbnails, views[at], [p for p in candidates if p != query and order[p] < until])
            if other is not None:
                found[query] = Copy(query, other, variant)
    return [found[query] for query in queries if query in found]


def _nearest(thumbnails: Thumbnails, view: Thumbnails, candidates: list[int]) -> int | None:
    """The candidate with the smallest difference, if it is a near copy."""
    if not candidates:
        return None
    differences = np.abs(thumbnails[candidates].astype(np.int16) - view.astype(np.int16))
    means = differences.mean(axis=(1, 2))
    best = int(means.argmin())
    is_copy = means[best] <= MEAN_DIFFERENCE and differences[best].max() <= MAX_DIFFERENCE
    return candidates[best] if is_copy else None
