"""Finds a result in its input by pixels alone, where code bypassed every name that could have told.

Slices that were copied, loops, arithmetic on arrays: the trace ends there. A part of the input at its own scale is
still found, in any of the eight symmetries: first by equal pixels, then by the correlation of grey values, which a
change of tone does not hide. A place that is not the only one is no place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageStat

from cv_lightning.images import compose
from cv_lightning.sandbox.geometry import SYMMETRIES, turn
from cv_lightning.types import Affine

NUM_PROBES = 16
MAX_CANDIDATES = 64
SMALL_SIDE = 320
"""Longest side at which the correlation is searched; it is refined at full size."""
MIN_SIDE = 8
MIN_CONTRAST = 2.0
"""Standard deviation of the liveliest channel; flatter results are everywhere and nowhere."""
MIN_COARSE = 0.5
"""Correlation that is worth refining: at reduced size a part lies between the pixels of the whole."""
MIN_MATCH = 0.9
MIN_LEAD = 0.02
"""By this much the best symmetry must be ahead of the others."""
_SWAPS = ("rotate_90", "rotate_270", "transpose", "transverse")
Array = np.ndarray[Any, Any]


def located(image: Image.Image, result: Image.Image) -> Affine | None:
    """The map of a result that is a part of the input, turned or mirrored but not scaled; None where none is sure.

    Args:
        image: the input, RGB.
        result: the result, RGB; with at least `MIN_SIDE` pixels a side.
    """
    if min(result.size) < MIN_SIDE:
        return None
    if max(ImageStat.Stat(result).stddev) < MIN_CONTRAST:
        return None
    found = _by_equality(image, result) or _by_correlation(image, result)
    if found is None:
        return None
    name, left, top = found
    size = result.size if name not in _SWAPS else (result.height, result.width)
    return compose(Affine(1, 0, left, 0, 1, top), turn(name, *size))


def undone(part: Array, name: str) -> Array:
    """The part as it was before the symmetry `name` was applied to it."""
    undo: dict[str, Callable[[Array], Array]] = {
        "identity": lambda a: a,
        "rotate_90": lambda a: np.rot90(a, -1),
        "rotate_180": lambda a: a[::-1, ::-1],
        "rotate_270": lambda a: np.rot90(a, 1),
        "flip_horizontal": lambda a: a[:, ::-1],
        "flip_vertical": lambda a: a[::-1],
        "transpose": lambda a: a.swapaxes(0, 1),
        "transverse": lambda a: a[::-1, ::-1].swapaxes(0, 1),
    }
    return np.asarray(undo[name](part))


def _fits(part: Array, whole: Array) -> bool:
    return bool(part.shape[0] <= whole.shape[0] and part.shape[1] <= whole.shape[1])


# ------------------------------------------------------------------------------------------------ equal pixels
def _by_equality(image: Image.Image, result: Image.Image) -> tuple[str, int, int] | None:
    """The one symmetry and place at which all pixels are equal."""
    packed, part = _packed(image), _packed(result)
    found = []
    for name in SYMMETRIES:
        candidate = undone(part, name)
        if _fits(candidate, packed):
            found += [(name, left, top) for left, top in _places(packed, candidate)]
        if len(found) > 1:
            return None
    return found[0] if found else None


def _packed(image: Image.Image) -> Array:
    """One whole number a pixel."""
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), "<u4").reshape(image.height, image.width)
    return np.asarray(pixels & 0xFFFFFF)


def _places(whole: Array, part: Array) -> list[tuple[int, int]]:
    rows, columns = part.shape
    rng = np.random.default_rng(0)
    ys, xs = rng.integers(0, rows, NUM_PROBES), rng.integers(0, columns, NUM_PROBES)
    room = whole[ys[0] : ys[0] + whole.shape[0] - rows + 1, xs[0] : xs[0] + whole.shape[1] - columns + 1]
    tops, lefts = np.nonzero(room == part[ys[0], xs[0]])
    for y, x in zip(ys[1:], xs[1:], strict=True):
        same = whole[tops + y, lefts + x] == part[y, x]
        tops, lefts = tops[same], lefts[same]
    if len(tops) > MAX_CANDIDATES:
        return []
    return [
        (int(left), int(top))
        for top, left in zip(tops, lefts, strict=True)
        if np.array_equal(whole[top : top + rows, left : left + columns], part)
    ]


# ------------------------------------------------------------------------------------------------ grey values
def _by_correlation(image: Image.Image, result: Image.Image) -> tuple[str, int, int] | None:
    """The symmetry and place of the highest correlation, if it is high and ahead of the others."""
    grey, small = _grey(image), _grey(result)
    factor = max(1, -(-max(grey.shape) // SMALL_SIDE))
    if min(small.shape) // factor < MIN_SIDE:
        return None
    low = _reduced(grey, factor)
    scored = []
    for name in SYMMETRIES:
        candidate = _reduced(undone(small, name), factor)
        if _fits(candidate, low) and candidate.std() > 1.0:
            scores = cv2.matchTemplate(low, candidate, cv2.TM_CCOEFF_NORMED)
            _, best, _, place = cv2.minMaxLoc(scores)
            scored.append((float(best), name, place[0] * factor, place[1] * factor))
    scored.sort(reverse=True)
    if not scored or scored[0][0] < MIN_COARSE:
        return None
    if len(scored) > 1 and scored[0][0] - scored[1][0] < MIN_LEAD:
        return None
    _, name, left, top = scored[0]
    return _refined(grey, np.ascontiguousarray(undone(small, name)), name, left, top, factor)


def _refined(whole: Array, part: Array, name: str, left: int, top: int, factor: int) -> tuple[str, int, int] | None:
    """The place at full size, looked for near the one that was found at reduced size."""
    rows, columns = part.shape
    x0, y0 = max(0, left - 2 * factor), max(0, top - 2 * factor)
    window = whole[y0 : top + rows + 2 * factor, x0 : left + columns + 2 * factor]
    if not _fits(part, window):
        return None
    scores = cv2.matchTemplate(window, part, cv2.TM_CCOEFF_NORMED)
    _, best, _, place = cv2.minMaxLoc(scores)
    return (name, x0 + place[0], y0 + place[1]) if best >= MIN_MATCH else None


def _grey(image: Image.Image) -> Array:
    return np.asarray(image.convert("L"), np.float32)


def _reduced(grey: Array, factor: int) -> Array:
    if factor == 1:
        return np.ascontiguousarray(grey)
    size = grey.shape[1] // factor, grey.shape[0] // factor
    kept = np.ascontiguousarray(grey[: size[1] * factor, : size[0] * factor])
    return np.asarray(cv2.resize(kept, size, interpolation=cv2.INTER_AREA))
