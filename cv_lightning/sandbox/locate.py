"""Finds a result in its input by pixels alone, where code bypassed every name that could have told.

Slices that were copied, loops, arithmetic on arrays: the trace ends there. A part of the input at its own scale is
still found, in any of the eight symmetries: by equal pixels, else by the correlation of grey values, which a change of
tone does not hide. The search is bounded: pixels are compared whole only in images of `MAX_EXACT` pixels, and the
correlation is searched at reduced size and refined level by level around one textured patch. What is found is a
candidate; the caller proves it. If the best match is not unique there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageStat

from cv_lightning.images import compose
from cv_lightning.sandbox.geometry import SYMMETRIES, turn
from cv_lightning.sandbox.view import Pyramid
from cv_lightning.types import Affine

MAX_EXACT = 4_000_000
"""Pixels of an input up to which equal pixels are looked for."""
NUM_PROBES = 32
NUM_RARE = 3
"""Pixels of the result, the rarest of a sample, whose value is looked for in the whole input."""
MAX_PLACES = 4096
"""A value that occurs more often in the input tells nothing."""
SMALL_SIDE = 320
"""Longest side of the input at which the correlation is searched, if the result is then still large enough."""
LARGE_SIDE = 640
"""Longest side at which it is searched otherwise."""
MIN_SIDE = 8
PATCH = 96
"""Side of the patch by which a place is refined."""
MIN_CONTRAST = 2.0
"""Standard deviation of the liveliest channel; flatter results are everywhere and nowhere."""
MIN_COARSE = 0.5
"""Correlation that is worth refining: at reduced size a part lies between the pixels of the whole."""
MIN_MATCH = 0.9
MIN_LEAD = 0.02
"""By this much the best symmetry must be ahead of the others."""
_SWAPS = ("rotate_90", "rotate_270", "transpose", "transverse")
Array = np.ndarray[Any, Any]
Place = tuple[str, int, int]
"""Symmetry, left and top."""


def located(image: Pyramid, result: Pyramid) -> Affine | None:
    """The map of a result that is a part of the input, turned or mirrored but not scaled; None where none is sure.

    Args:
        image: the input, RGB.
        result: the result, RGB; with at least `MIN_SIDE` pixels a side.
    """
    shown = result.image
    if min(shown.size) < MIN_SIDE or max(ImageStat.Stat(result.small[1]).stddev) < MIN_CONTRAST:
        return None
    found = None
    if image.image.width * image.image.height <= MAX_EXACT >= shown.width * shown.height:
        found = _by_equality(image.image, shown)
    found = found or _by_correlation(image, result)
    if found is None:
        return None
    name, left, top = found
    size = shown.size if name not in _SWAPS else (shown.height, shown.width)
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
def _by_equality(image: Image.Image, result: Image.Image) -> Place | None:
    """The one symmetry and place at which all probed pixels are equal."""
    whole, part = _packed(image), _packed(result)
    rng = np.random.default_rng(0)
    probes = np.stack([rng.integers(0, side, NUM_PROBES) for side in part.shape])
    for row, column in _rare_pixels(part, rng):
        rows, columns = np.nonzero(whole == part[row, column])
        if not 0 < len(rows) <= MAX_PLACES:
            continue
        found = [
            place for name in SYMMETRIES for place in _places(whole, part, name, (row, column), probes, rows, columns)
        ]
        return found[0] if len(found) == 1 else None
    return None


def _packed(image: Image.Image) -> Array:
    """One whole number a pixel."""
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), "<u4").reshape(image.height, image.width)
    return np.asarray(pixels & 0xFFFFFF)


def _rare_pixels(part: Array, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Rows and columns of the pixels whose value is the rarest in a sample of the result."""
    rows, columns = (rng.integers(0, side, 4096) for side in part.shape)
    _, first, counts = np.unique(part[rows, columns], return_index=True, return_counts=True)
    rarest = first[np.argsort(counts, kind="stable")[:NUM_RARE]]
    return [(int(rows[i]), int(columns[i])) for i in rarest]


def _places(
    whole: Array, part: Array, name: str, pixel: tuple[int, int], probes: Array, rows: Array, columns: Array
) -> list[Place]:
    """Places of the turned part at which one pixel of it lies at the given rows and columns and all probes agree."""
    height, width = undone(part, name).shape
    y, x = _moved(pixel[0], pixel[1], part.shape, name)
    tops, lefts = rows - y, columns - x
    inside = (tops >= 0) & (lefts >= 0) & (tops + height <= whole.shape[0])
    inside &= lefts + width <= whole.shape[1]
    tops, lefts = tops[inside], lefts[inside]
    for row, column in probes.T:
        v, u = _moved(int(row), int(column), part.shape, name)
        same = whole[tops + v, lefts + u] == part[row, column]
        tops, lefts = tops[same], lefts[same]
    return [(name, int(left), int(top)) for left, top in zip(lefts, tops, strict=True)]


def _moved(row: int, column: int, shape: tuple[int, ...], name: str) -> tuple[int, int]:
    """Row and column of a pixel of a part once the symmetry is undone."""
    bottom, right = shape[0] - 1 - row, shape[1] - 1 - column
    return {
        "identity": (row, column),
        "rotate_90": (column, bottom),
        "rotate_180": (bottom, right),
        "rotate_270": (right, row),
        "flip_horizontal": (row, right),
        "flip_vertical": (bottom, column),
        "transpose": (column, row),
        "transverse": (right, bottom),
    }[name]


# ------------------------------------------------------------------------------------------------ grey values
def _by_correlation(image: Pyramid, result: Pyramid) -> Place | None:
    """The symmetry and place of the highest correlation, if it is high and ahead of the others."""
    number = _search_level(image.image.size, result.image.size)
    whole, part = _grey(image.level(number)), _grey(result.level(number))
    if min(part.shape) < MIN_SIDE:
        return None
    scored = []
    for name in SYMMETRIES:
        candidate = np.ascontiguousarray(undone(part, name))
        if _fits(candidate, whole) and candidate.std() > 1.0:
            scores = cv2.matchTemplate(whole, candidate, cv2.TM_CCOEFF_NORMED)
            _, best, _, place = cv2.minMaxLoc(scores)
            scored.append((float(best), name, place[0], place[1]))
    scored.sort(reverse=True)
    if not scored or scored[0][0] < (MIN_COARSE if number else MIN_MATCH):
        return None
    if len(scored) > 1 and scored[0][0] - scored[1][0] < MIN_LEAD:
        return None
    _, name, left, top = scored[0]
    row, column = _liveliest(part)
    while number:
        # Two levels at once: a level that nothing else needs costs more than a wider window.
        step = min(2, number)
        number -= step
        row, column, left, top = (value << step for value in (row, column, left, top))
        room = 3 << (step - 1)
        refined = _refined(image.level(number), result.level(number), name, (row, column), (left, top), room)
        if refined is None or (number == 0 and refined[2] < MIN_MATCH):
            return None
        left, top, _ = refined
    return name, left, top


def _search_level(image: tuple[int, int], result: tuple[int, int]) -> int:
    number = 0
    while max(image) >> number > LARGE_SIDE or (
        max(image) >> number > SMALL_SIDE and min(result) >> (number + 1) >= 2 * MIN_SIDE
    ):
        number += 1
    return number


def _refined(
    image: Image.Image, result: Image.Image, name: str, pixel: tuple[int, int], place: tuple[int, int], room: int
) -> tuple[int, int, float] | None:
    """Left and top at a finer level by the patch of the result around a pixel, and the correlation there."""
    rows, columns = result.height, result.width
    y, x = (max(0, min(at - PATCH // 2, side - PATCH)) for at, side in zip(pixel, (rows, columns), strict=True))
    bottom, right = min(rows, y + PATCH), min(columns, x + PATCH)
    patch = np.ascontiguousarray(undone(_grey(result.crop((x, y, right, bottom))), name))
    corners = [_moved(r, c, (rows, columns), name) for r in (y, bottom - 1) for c in (x, right - 1)]
    above, beside = min(r for r, _ in corners), min(c for _, c in corners)
    x0, y0 = max(0, place[0] + beside - room), max(0, place[1] + above - room)
    box = x0, y0, min(image.width, x0 + patch.shape[1] + 2 * room), min(image.height, y0 + patch.shape[0] + 2 * room)
    if box[2] - x0 < patch.shape[1] or box[3] - y0 < patch.shape[0]:
        return None
    scores = cv2.matchTemplate(_grey(image.crop(box)), patch, cv2.TM_CCOEFF_NORMED)
    _, best, _, found = cv2.minMaxLoc(scores)
    return x0 + found[0] - beside, y0 + found[1] - above, float(best)


def _liveliest(grey: Array) -> tuple[int, int]:
    """Row and column where the grey values vary most."""
    variance = cv2.blur(grey * grey, (15, 15)) - cv2.blur(grey, (15, 15)) ** 2
    row, column = np.unravel_index(int(variance.argmax()), grey.shape)
    return int(row), int(column)


def _grey(image: Image.Image) -> Array:
    return np.asarray(image.convert("L"), np.float32)
