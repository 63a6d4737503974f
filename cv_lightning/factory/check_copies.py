"""Pictures that come twice: the same pixels, or nearly the same (stored again, resized, turned).

Near copies are found by a 64-bit hash of a picture's low frequencies (pHash: Zauner 2010): pictures that share one of
its four 16-bit bands are compared on thumbnails, so that a shared layout alone does not count.
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
"""Largest difference of a thumbnail's pixel between near copies, in grey levels of 0 to 255. Measured: at most 40 for
photographs and pages stored again at half size and JPEG quality 70, at least 69 for digit scenes with the same layout
and another digit of a sixtieth of the picture."""
MEAN_DIFFERENCE = 5.0
MIN_DEVIATION = 3.0
"""Standard deviation of a thumbnail below which a picture is blank and no near copy of anything."""
MAX_CANDIDATES = 64
"""Pictures of a band that one picture is compared with."""

Thumbnails = npt.NDArray[np.uint8]
VARIANTS = ("same", *ORIENTATIONS)


@dataclass(frozen=True, slots=True)
class Copy:
    """A picture that is (nearly) another one."""

    first: int
    second: int
    variant: str
    """How the first must be turned to be the second."""


def thumbnail(image: Image.Image) -> bytes:
    """64x64 grey levels of a picture, its proportions squeezed."""
    return image.convert("L").resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX).tobytes()


def as_thumbnails(data: Sequence[bytes]) -> Thumbnails:
    """`[N, 64, 64]` grey levels."""
    side = THUMBNAIL_PX
    return np.frombuffer(b"".join(data), dtype=np.uint8).reshape(-1, side, side)


def turned(thumbnails: Thumbnails, variant: str) -> Thumbnails:
    """Thumbnails of the turned or flipped pictures, counter-clockwise as in PIL."""
    if variant.startswith("rotate_"):
        return np.rot90(thumbnails, int(variant.removeprefix("rotate_")) // 90, axes=(1, 2))
    axis = {"flip_horizontal": 2, "flip_vertical": 1}.get(variant)
    return thumbnails if axis is None else np.flip(thumbnails, axis=axis)


def perceptual_hashes(thumbnails: Thumbnails) -> npt.NDArray[np.uint16]:
    """`[N, 4]` bands of 16 bits: signs of the 8x8 lowest frequencies against their median."""
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
    """For each query the first picture of the base that it is a near copy of.

    Args:
        thumbnails: of all pictures.
        queries: pictures to look for.
        base: pictures to look among; of a picture that is in both, only those before it in `base` count.
        variants: how a query may be turned.
    """
    if not len(queries) or not len(base):
        return []
    telling = thumbnails.std(axis=(1, 2)) >= MIN_DEVIATION
    order = {picture: at for at, picture in enumerate(base)}
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    base_bands = perceptual_hashes(thumbnails[list(base)]).tolist()
    for picture, bands in zip(base, base_bands, strict=True):
        for band, value in enumerate(bands):
            if telling[picture]:
                buckets[band, value].append(picture)
    found: dict[int, Copy] = {}
    for variant in variants:
        views = turned(thumbnails[list(queries)], variant)
        for at, (query, bands) in enumerate(zip(queries, perceptual_hashes(views).tolist(), strict=True)):
            if query in found or not telling[query]:
                continue
            candidates = {p for band, value in enumerate(bands) for p in buckets[band, value][:MAX_CANDIDATES]}
            until = order.get(query, len(base))
            other = _nearest(thumbnails, views[at], [p for p in candidates if p != query and order[p] < until])
            if other is not None:
                found[query] = Copy(query, other, variant)
    return [found[query] for query in queries if query in found]


def _nearest(thumbnails: Thumbnails, view: Thumbnails, candidates: list[int]) -> int | None:
    """The candidate that is a near copy; the closest one."""
    if not candidates:
        return None
    differences = np.abs(thumbnails[candidates].astype(np.int16) - view.astype(np.int16))
    means = differences.mean(axis=(1, 2))
    best = int(means.argmin())
    is_copy = means[best] <= MEAN_DIFFERENCE and differences[best].max() <= MAX_DIFFERENCE
    return candidates[best] if is_copy else None
