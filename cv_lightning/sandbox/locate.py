"""Finds a result in its input by pixels alone, for code that the tracer cannot follow.

Copied slices, loops and arithmetic on arrays end the trace. A part of the input at its own scale is still found, in any
of the eight symmetries: by equal pixels, else by the correlation of grey values, which changes of tone keep. The search
is bounded: equal pixels are looked for only in images of at most `MAX_EXACT` pixels, and the correlation is searched at
reduced size and refined level by level around one textured patch. The place found is a candidate that the caller has to
prove; if the best match is not unique, there is none.
"""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image, ImageStat

from cv_lightning.images import compose
from cv_lightning.sandbox.geometry import SWAPPING, SYMMETRIES, turn
from cv_lightning.sandbox.view import Array, Pyramid, grey_of
from cv_lightning.types import Affine

MAX_EXACT = 4_000_000
"""Pixels of an input up to which equal pixels are looked for."""
NUM_PROBES = 32
NUM_RARE = 3
"""Number of pixels of the result, the rarest of a sample, whose value is looked for in the whole input."""
MAX_PLACES = 4096
"""Most occurrences of such a value in the input; a more frequent one is skipped."""
SMALL_SIDE = 320
"""Longest side of the input at which the correlation is searched, if the result is then still large enough."""
LARGE_SIDE = 640
"""Longest side at which it is searched otherwise."""
MIN_SIDE = 8
PATCH = 96
"""Side of the patch by which a place is refined."""
MIN_CONTRAST = 2.0
"""Least standard deviation of the most varied channel; flatter results match everywhere."""
MIN_COARSE = 0.5
"""Least correlation at reduced size; low, because the pixels of the part lie between those of the whole there."""
MIN_MATCH = 0.9
MIN_LEAD = 0.02
"""Lead in correlation that the best symmetry needs."""
_BACKWARDS = {
    "identity": (False, False),
    "rotate_90": (True, False),
    "rotate_180": (True, True),
    "rotate_270": (False, True),
    "flip_horizontal": (True, False),
    "flip_vertical": (False, True),
    "transpose": (False, False),
    "transverse": (True, True),
}
"""To undo a symmetry, after its axes are swapped back: whether columns and rows are read from the other end."""
Place = tuple[str, int, int]
"""Symmetry, left and top."""


def located(image: Pyramid, result: Pyramid) -> Affine | None:
    """The map of a result that is a part of the input, turned or mirrored but not scaled; None if none is sure.

    Args:
        image: The input, RGB.
        result: The result, RGB.
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
    size = shown.size[::-1] if name in SWAPPING else shown.size
    return compose(Affine(1, 0, left, 0, 1, top), turn(name, *size))


def undone(part: Array, name: str) -> Array:
    """The part as it was before the symmetry `name` was applied to it."""
    if name in SWAPPING:
        part = part.swapaxes(0, 1)
    from_right, from_below = _BACKWARDS[name]
    return part[:: -1 if from_below else 1, :: -1 if from_right else 1]


def _moved(row: int, column: int, shape: tuple[int, ...], name: str) -> tuple[int, int]:
    """Row and column of a pixel of a part once the symmetry `name` is undone."""
    height, width = shape
    if name in SWAPPING:
        row, column, height, width = column, row, width, height
    from_right, from_below = _BACKWARDS[name]
    return height - 1 - row if from_below else row, width - 1 - column if from_right else column


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
    """Height x width of uint32: each pixel as one number."""
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


# ------------------------------------------------------------------------------------------------ grey values
def _by_correlation(image: Pyramid, result: Pyramid) -> Place | None:
    """The symmetry and place of the highest correlation, if it is high and ahead of the others."""
    number = _search_level(image.image.size, result.image.size)
    whole, part = grey_of(image.level(number)), grey_of(result.level(number))
    if min(part.shape) < MIN_SIDE:
        return None
    scored = []
    for name in SYMMETRIES:
        candidate = np.ascontiguousarray(undone(part, name))
        fits = candidate.shape[0] <= whole.shape[0] and candidate.shape[1] <= whole.shape[1]
        if fits and candidate.std() > 1.0:
            scores = cv2.matchTemplate(whole, candidate, cv2.TM_CCOEFF_NORMED)
            _, best, _, place = cv2.minMaxLoc(scores)
            scored.append((float(best), name, place[0], place[1]))
    scored.sort(reverse=True)
    if not scored or scored[0][0] < (MIN_COARSE if number else MIN_MATCH):
        return None
    if len(scored) > 1 and scored[0][0] - scored[1][0] < MIN_LEAD:
        return None
    _, name, left, top = scored[0]
    row, column = _most_varied(part)
    while number:
        # Two levels at once: making a level that is not needed otherwise costs more than a wider window.
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
    """Left and top at a finer level, by a patch of the result around a pixel, and the correlation there."""
    rows, columns = result.height, result.width
    y, x = (max(0, min(at - PATCH // 2, side - PATCH)) for at, side in zip(pixel, (rows, columns), strict=True))
    bottom, right = min(rows, y + PATCH), min(columns, x + PATCH)
    patch = np.ascontiguousarray(undone(grey_of(result.crop((x, y, right, bottom))), name))
    corners = [_moved(r, c, (rows, columns), name) for r in (y, bottom - 1) for c in (x, right - 1)]
    above, beside = min(r for r, _ in corners), min(c for _, c in corners)
    x0, y0 = max(0, place[0] + beside - room), max(0, place[1] + above - room)
    height, width = patch.shape
    x1, y1 = min(image.width, x0 + width + 2 * room), min(image.height, y0 + height + 2 * room)
    if x1 - x0 < width or y1 - y0 < height:
        return None
    scores = cv2.matchTemplate(grey_of(image.crop((x0, y0, x1, y1))), patch, cv2.TM_CCOEFF_NORMED)
    _, best, _, found = cv2.minMaxLoc(scores)
    return x0 + found[0] - beside, y0 + found[1] - above, float(best)


def _most_varied(grey: Array) -> tuple[int, int]:
    """Row and column where the grey values vary most."""
    variance = cv2.blur(grey * grey, (15, 15)) - cv2.blur(grey, (15, 15)) ** 2
    row, column = np.unravel_index(int(variance.argmax()), grey.shape)
    return int(row), int(column)
