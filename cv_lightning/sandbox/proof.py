"""Proves that a result shows what a map claims: compares it block by block with the parent's own view of the input.

The parent knows the input, the result and a map that a child claims. It renders the honest view by that map at the
result's size and requires agreement in every block: where the honest view has structure (strokes, edges) the result
must have the same structure, and elsewhere it may have hardly any of its own. Contrast, brightness, tone curves,
sharpening, grey and inversion keep the correlation of a block; blends, pastes, masks, noise, blur and resampling to
fewer pixels do not. A snippet cannot predict what is compared: every pixel is part of a block, and an image that is
reduced before the comparison is also compared in its own pixels at random places.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator
from functools import cache

import cv2
import numpy as np
from PIL import Image, ImageChops

from cv_lightning.images import compose, map_box
from cv_lightning.sandbox.geometry import SIGNS
from cv_lightning.sandbox.view import (
    MAX_COMPARED,
    Array,
    Edges,
    Pyramid,
    View,
    aligned_view,
    grey_of,
    honest_view,
    signs_of,
)
from cv_lightning.types import Affine

CELL = 8
"""Side in pixels of a cell; a block is two by two cells, and blocks overlap by one cell."""
SURROUND = 17
"""Side of the box whose mean is subtracted: slower changes are tone and not strokes."""
WEAK, STRONG = 10.0, 20.0
"""Standard deviations in grey levels from which a block of the honest view has structure, and from which it may be
text. No strong block may be lost; of weak ones `MAX_LOST` may, because contrast clips highlights and shadows."""
MAX_LOST = 0.06
"""Largest fraction of the blocks with structure that may be lost."""
MIN_CORRELATION, MIN_COARSE_CORRELATION = 0.8, 0.5
"""Least correlation of a block with the honest view, at full size and at reduced sizes."""
MIN_RAW_CORRELATION = 0.85
"""Least correlation of a strong block that includes its grain: a stroke must not be sprinkled with other pixels."""
MIN_PLAIN_CORRELATION, PLAIN = 0.8, 30.0
"""Least correlation, slow changes included, of a block with at least this standard deviation in grey levels: text that
is faint beside a shade or a wave laid over it cannot be read."""
MIN_TONE_CORRELATION, MAX_LOST_BY_TONE = 0.7, 0.5
"""Instead of `MIN_CORRELATION` and `MAX_LOST` if one rising or falling tone curve for all pixels explains the result:
equalisation and contrast bend strokes and clip highlights, and put nothing in their place."""
MIN_TEXT_CORRELATION, TEXT, TEXT_CONTRAST = 0.78, 0.3, 36.0
"""Then, instead of `MIN_PLAIN_CORRELATION`: least correlation of a block that may be text, whose standard deviation is
this fraction of the range of grey levels around it and at least so many levels. Of 185 generated curves that took the
least correlation over blocks of digits below 0.75 none passes."""
MIN_TONES = 16
"""Least number of grey levels of such a result."""
MAX_TONE_PIXELS = 300_000
"""Most pixels from which such a curve is estimated; of more, every second, third, .. is used."""
MAX_UNEXPLAINED = 0.03
"""Largest fraction of blocks that such a curve may leave unexplained."""
STRIP, HALO = 120, 16
"""Rows that are compared at a time, so that they stay in the processor's cache, and rows around them that are read too:
multiples of `CELL`, the latter more than half of `SURROUND`."""
MIN_GAIN = 0.15
"""Least fraction of a block's contrast that must be left."""
MAX_OWN = 20.0
"""Standard deviation in grey levels of unexplained structure, from which a block counts as foreign."""
MAX_FOREIGN = 0.06
"""Largest fraction of foreign blocks: enough for a line or a frame, not for another image."""
TILE = 256
"""Side in pixels of the pieces in which equal pixels are compared."""
WINDOW, NUM_WINDOWS = 120, 6
"""Side in pixels and number of the places at which a reduced result is also compared in its own pixels."""


def is_equal(claim: Affine, image: Pyramid, result: Pyramid) -> bool:
    """True if a result is a part of the input in its own pixels, turned or mirrored, and nothing else.

    A result of more than `MAX_COMPARED` pixels is compared reduced, and at some places as it is.
    """
    size = result.image.size
    if signs_of(claim) not in SIGNS:
        return False
    if any(abs(abs(v) - 1) > 1e-9 and abs(v) > 1e-9 for v in (claim.a, claim.b, claim.d, claim.e)):
        return False
    box = map_box(claim, (0.0, 0.0, float(size[0]), float(size[1])))
    if min(box[:2]) < -1e-6 or box[2] > image.image.width + 1e-6 or box[3] > image.image.height + 1e-6:
        return False
    places = _tiles(size) if not result.small[0] else _windows(size)
    if not all(_is_equal_at(claim, image, result.image.crop(place), place[:2]) for place in places):
        return False
    number, small = result.small
    return not number or _is_equal_at(claim, image, _whole(small, size, number), (0, 0), 1 << number)


def _is_equal_at(claim: Affine, image: Pyramid, shown: Image.Image, corner: tuple[int, int], factor: int = 1) -> bool:
    local = compose(claim, Affine(factor, 0, corner[0], 0, factor, corner[1]))
    # The view of a tile is used once; that of the reduced whole is needed again, so `honest_view` keeps it.
    view = honest_view(image, local, shown.size) if factor > 1 else aligned_view(image, local, shown.size)
    if view is None or view.inside is not None or view.colours.size != shown.size:
        return False
    return ImageChops.difference(view.colours, shown).getbbox() is None


def _tiles(size: tuple[int, int]) -> list[Edges]:
    """All of an image in pieces that stay in the processor's cache."""
    return [
        (left, top, min(size[0], left + TILE), min(size[1], top + TILE))
        for top in range(0, size[1], TILE)
        for left in range(0, size[0], TILE)
    ]


def _whole(small: Image.Image, size: tuple[int, int], number: int) -> Image.Image:
    """A reduced image without the last row and column where the factor does not divide a side."""
    kept = size[0] >> number, size[1] >> number
    return small if small.size == kept else small.crop((0, 0, *kept))


def _windows(size: tuple[int, int]) -> list[Edges]:
    """Random places, which a snippet cannot predict."""
    windows = []
    for _ in range(NUM_WINDOWS):
        left, top = (secrets.randbelow(max(1, side - WINDOW)) for side in size)
        windows.append((left, top, min(size[0], left + WINDOW), min(size[1], top + WINDOW)))
    return windows


def prove(claim: Affine, image: Pyramid, result: Pyramid) -> float:
    """Fidelity of a result to the view that a map claims; 0 if it does not show that view.

    Args:
        claim: From coordinates of the result to coordinates of the input, in pixels; not singular.
        image: The input, RGB.
        result: The result, RGB.

    Returns:
        The least correlation with the honest view over the blocks that may hold text, in [0, 1].
    """
    fidelity, size = 1.0, result.image.size
    # The random places come first: they cost little, and most results that do not agree fail there.
    for place in _windows(size) if size[0] * size[1] > MAX_COMPARED else ():
        fidelity = min(fidelity, _fidelity(claim, image, result.image.crop(place), place[:2]))
        if not fidelity:
            return 0.0
    number, small = result.small
    return min(fidelity, _fidelity(claim, image, _whole(small, size, number), (0, 0), 1 << number))


def _fidelity(claim: Affine, image: Pyramid, shown: Image.Image, corner: tuple[int, int], factor: int = 1) -> float:
    """Fidelity of a part of a result, reduced by a factor."""
    local = compose(claim, Affine(factor, 0, corner[0], 0, factor, corner[1]))
    view = honest_view(image, local, shown.size)
    if view is None:
        return float(factor == 1 and corner != (0, 0))  # a window beside the input: nothing to compare
    grey = grey_of(shown)
    if not _is_quiet_outside(grey, view):
        return 0.0
    left, top, right, bottom = view.box
    part = shown.crop(view.box) if view.box != (0, 0, *shown.size) else shown
    return _agreement(view, part, grey[top:bottom, left:right], _enlargement(local, part.size))


def _enlargement(claim: Affine, size: tuple[int, int]) -> tuple[int, int]:
    """Whole factors by which a view is larger than the part of the input that it shows."""
    steps = math.hypot(claim.a, claim.d), math.hypot(claim.b, claim.e)
    x, y = (max(1, int(1.0 / max(step, 1e-9) + 1e-6)) for step in steps)
    return max(1, min(x, size[0] // CELL)), max(1, min(y, size[1] // CELL))


# ------------------------------------------------------------------------------------------------ agreement
def _agreement(view: View, shown: Image.Image, actual: Array, enlarged: tuple[int, int]) -> float:
    """Fidelity of a result, given in colours and in grey, to the honest view; 0 where they do not agree."""
    expected, inside = view.grey, view.inside
    if inside is not None:
        expected = np.where(inside, expected, actual)
    if enlarged != (1, 1):
        # An enlargement invents values between two pixels of the input: they must vary little, and are averaged out.
        small = max(1, shown.width // enlarged[0]), max(1, shown.height // enlarged[1])
        if _is_rough(expected, actual, small):
            return 0.0
        expected, actual = _area_means(expected, small), _area_means(actual, small)
        inside = None if inside is None else cv2.resize(inside.astype(np.uint8), small) > 0
    by_tone = cache(lambda: _is_change_of_tone(view.colours, shown))
    # The coarsest level comes first: it costs least.
    for coarse in _reduced(expected, actual):
        if not _compare(*coarse, None, MIN_COARSE_CORRELATION, by_tone):
            return 0.0
    return _compare(expected, actual, inside, MIN_CORRELATION, by_tone)


def _reduced(expected: Array, actual: Array) -> list[tuple[Array, Array]]:
    """Both images reduced by 4, 16, .. as long as that leaves a few blocks, the smallest first."""
    levels: list[tuple[Array, Array]] = []
    while min(expected.shape) >= 16 * CELL:
        size = expected.shape[1] // 4, expected.shape[0] // 4
        expected, actual = _area_means(expected, size), _area_means(actual, size)
        levels.insert(0, (expected, actual))
    return levels


def _compare(expected: Array, actual: Array, inside: Array | None, least: float, by_tone: Callable[[], bool]) -> float:
    """Least correlation over the strong blocks; 0 where structure is lost or too much of it is foreign."""
    hh, rr, hr, h_grain, r_grain, raw_hh, raw_rr, raw_hr = _statistics(expected, actual)
    hr = np.abs(hr)
    correlation = hr / np.sqrt(hh * rr + 1e-6)
    known = np.ones(hh.shape, bool) if inside is None else _blocks(inside.astype(np.float32)) > 0.999
    strong, weak = known & (hh >= STRONG**2), known & (hh >= WEAK**2)

    def lost(bound: float) -> Array:
        return np.asarray(weak & ((correlation < bound) | (hr < MIN_GAIN * hh)))

    if lost(min(least, MIN_TONE_CORRELATION)).sum() > MAX_LOST_BY_TONE * weak.sum():
        return 0.0  # too much even for a change of tone
    # Sharpening and contrast amplify existing grain; grain beyond that was added.
    contrast = np.maximum(1.0, rr / np.maximum(hh, 1.0))
    own_grain = r_grain - 9.0 * contrast * h_grain
    foreign = (rr * (1 - correlation**2) > MAX_OWN**2) & (correlation < least)
    foreign |= own_grain > MAX_OWN**2
    gone = lost(least)
    failed = bool((gone & strong).any() or gone.sum() > MAX_LOST * weak.sum() or foreign.mean() > MAX_FOREIGN)
    if not failed and least == MIN_CORRELATION:
        raw = np.abs(raw_hr) / np.sqrt(raw_hh * raw_rr + 1e-6)
        failed = bool((strong & (raw < MIN_RAW_CORRELATION)).any())
    if failed and not by_tone():
        return 0.0
    if least != MIN_CORRELATION:
        return 1.0
    if _is_faint(expected, actual, known, by_tone=failed):
        return 0.0
    fidelity = float(correlation[strong].min(initial=1.0))
    return max(MIN_CORRELATION, fidelity) if failed else fidelity


def _is_faint(expected: Array, actual: Array, known: Array, *, by_tone: bool) -> bool:
    """True if a block that may be text does not vary as it does in the honest view.

    Args:
        expected: Height x width of float32: the honest view.
        actual: The same of the result.
        known: Blocks that are compared.
        by_tone: A tone curve explains the result; only blocks that vary like text count then.
    """
    expected, actual = _padded(expected), _padded(actual)
    width = expected.shape[1]
    cells = np.zeros((5, expected.shape[0] // CELL, width // CELL), np.float32)
    for top in range(0, len(expected), STRIP):
        e, a = (grey[top : top + STRIP].reshape(-1, CELL, width) - np.float32(128) for grey in (expected, actual))
        sums = [e.sum(axis=1), a.sum(axis=1), *(np.einsum("ijk,ijk->ik", *pair) for pair in ((e, e), (a, a), (e, a)))]
        _put_means(cells, top // CELL, sums)
    e_mean, a_mean, ee, aa, ea = (_joined(found) for found in cells)
    ee, aa, ea = ee - e_mean * e_mean, aa - a_mean * a_mean, np.abs(ea - e_mean * a_mean)
    counts, least = known & (ee >= PLAIN**2), MIN_PLAIN_CORRELATION
    if by_tone:
        bound = np.maximum(TEXT_CONTRAST, TEXT * _range_around(expected))
        counts, least = known & (ee >= bound**2), MIN_TEXT_CORRELATION
    faint = (ea < least * np.sqrt(np.maximum(ee * aa, 0) + 1e-3)) | (ea < MIN_GAIN * ee)
    return bool((counts & faint).any())


def _range_around(grey: Array) -> Array:
    """Range of the grey levels in each block and the cells next to it."""
    cells = grey.reshape(len(grey) // CELL, CELL, -1)
    lightest, darkest = (
        best(best(cells, axis=1).reshape(len(cells), -1, CELL), axis=2) for best in (np.max, np.min)
    )  # fmt: skip
    # A block is a cell and those before it in both directions.
    around = np.ones((4, 4), np.uint8)
    return np.asarray(cv2.dilate(lightest, around, anchor=(2, 2)) - cv2.erode(darkest, around, anchor=(2, 2)))


def _is_change_of_tone(expected: Image.Image, actual: Image.Image) -> bool:
    """True if a rising or falling curve for each colour channel explains the result, and keeps many tones.

    A result of few tones (a threshold, a small palette) may have lost a stroke between two of them. A curve that turns
    back (sums that wrap around) shows two tones as one.
    """
    step = math.ceil(math.sqrt(expected.width * expected.height / MAX_TONE_PIXELS))
    if step > 1:
        size = max(1, expected.width // step), max(1, expected.height // step)
        expected, actual = (one.resize(size, Image.Resampling.NEAREST) for one in (expected, actual))
    if len(np.unique(grey_of(actual))) < MIN_TONES:
        return False
    for tones, found in zip(expected.split(), actual.split(), strict=True):
        index, values = np.asarray(tones), np.asarray(found)
        pairs = cv2.calcHist([index, values], [0, 1], None, [256, 256], [0, 256, 0, 256])
        counts = pairs.sum(axis=1)
        curve = _monotone(pairs @ np.arange(256, dtype=np.float32) / np.maximum(counts, 1), counts)
        values = values.astype(np.float32)
        rest = values - cv2.LUT(index, curve.astype(np.float32))
        unexplained = _blocks(rest * rest) > np.maximum(8.0**2, 0.1 * _blocks(_structure(values)[0] ** 2))
        if float(unexplained.mean()) > MAX_UNEXPLAINED:
            return False
    return True


def _monotone(curve: Array, counts: Array) -> Array:
    """The rising or falling curve nearest to 256 means; `counts` are their weights (pool adjacent violators)."""
    used = np.flatnonzero(counts)
    means, weights = curve[used], counts[used]
    around = means - np.average(means, weights=weights)
    falls = float(np.sum(weights * around * used)) < 0
    pools: list[list[float]] = []
    for mean, weight in zip(-means if falls else means, weights, strict=True):
        pools.append([float(mean), float(weight), 1])
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            last, one = pools.pop(), pools[-1]
            total = one[1] + last[1]
            pools[-1] = [(one[0] * one[1] + last[0] * last[1]) / total, total, one[2] + last[2]]
    nearest = np.zeros(256, np.float32)
    nearest[used] = np.concatenate([np.full(int(number), mean) for mean, _, number in pools])
    return -nearest if falls else nearest


def _statistics(expected: Array, actual: Array) -> list[Array]:
    """Means over overlapping blocks of products of two images' parts (`_structure`).

    Returns:
        The square of the strokes of the first and of the second image and their product, the squares of the grain of
        both, and the squares of strokes and grain together and their product.
    """
    expected, actual = _padded(expected), _padded(actual)
    width = expected.shape[1]
    cells = np.zeros((8, expected.shape[0] // CELL, width // CELL), np.float32)
    # Reused memory: fresh pages cost as much as the sums.
    room = np.empty((2, 4, STRIP + 2 * HALO, width), np.float32)
    for rows, kept in _strips(len(expected)):
        if max(_range(expected[rows]), _range(actual[rows])) < WEAK:
            continue  # no block there reaches any bound
        parts = [_structure(grey[rows], place) for grey, place in zip((expected, actual), room, strict=True)]
        (h, h_grain, h_raw), (r, r_grain, r_raw) = ([one[kept].reshape(-1, CELL, width) for one in p] for p in parts)
        pairs = (h, h), (r, r), (h, r), (h_grain, h_grain), (r_grain, r_grain), (h_raw, h_raw), (r_raw, r_raw)
        sums = [np.einsum("ijk,ijk->ik", *pair) for pair in (*pairs, (h_raw, r_raw))]
        _put_means(cells, (rows.start + kept.start) // CELL, sums)
    return [_joined(found) for found in cells]


def _put_means(cells: Array, top: int, sums: list[Array]) -> None:
    """Write means over cells, from sums over the rows of each cell, into the rows of cells from `top` on."""
    for found, one in zip(cells, sums, strict=True):
        found[top : top + len(one)] = one.reshape(len(one), -1, CELL).mean(axis=2) / CELL


def _range(grey: Array) -> float:
    darkest, lightest, _, _ = cv2.minMaxLoc(grey)
    return float(lightest - darkest)


def _strips(height: int) -> Iterator[tuple[slice, slice]]:
    """Rows that are read at a time, and which of these are kept."""
    for top in range(0, height, STRIP):
        above = max(0, top - HALO)
        yield slice(above, top + STRIP + HALO), slice(top - above, min(height, top + STRIP) - above)


def _padded(grey: Array) -> Array:
    """The image extended by reflection to multiples of `CELL`: whole cells are summed several times faster."""
    below, beside = -grey.shape[0] % CELL, -grey.shape[1] % CELL
    if not below and not beside:
        return grey
    return np.asarray(cv2.copyMakeBorder(grey, 0, below, 0, beside, cv2.BORDER_REFLECT))


def _structure(grey: Array, room: Array | None = None) -> tuple[Array, Array, Array]:
    """Strokes and edges without slow changes of tone, the grain (changes from pixel to pixel), and their sum.

    Args:
        grey: Height x width of float32.
        room: Memory for four images of at least as many rows.
    """
    room = np.empty((4, *grey.shape), np.float32) if room is None else room[:, : len(grey)]
    smooth = cv2.blur(grey, (3, 3), room[0])
    slow = cv2.blur(smooth, (SURROUND, SURROUND), room[1])
    strokes, grain = cv2.subtract(smooth, slow, room[2]), cv2.subtract(grey, smooth, room[3])
    return strokes, grain, cv2.subtract(grey, slow, room[1])


def _blocks(values: Array) -> Array:
    """Means over overlapping blocks."""
    return _joined(_cells(_padded(values)))


def _cells(values: Array) -> Array:
    """Means over cells of an image with whole ones."""
    return _area_means(values, (values.shape[1] // CELL, values.shape[0] // CELL))


def _area_means(values: Array, size: tuple[int, int]) -> Array:
    """Means over areas: an image reduced to `size` (width, height)."""
    return np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_AREA))


def _joined(cells: Array) -> Array:
    """Means over blocks of two by two cells."""
    side = min(2, cells.shape[1]), min(2, cells.shape[0])
    return np.asarray(cv2.blur(cells, side, borderType=cv2.BORDER_REPLICATE))


def _is_rough(expected: Array, actual: Array, small: tuple[int, int]) -> bool:
    """True if an enlarged result varies within single pixels of the input more than any interpolation does."""

    def within(grey: Array) -> Array:
        mean = _area_means(grey, small)
        return np.asarray(_area_means(grey * grey, small) - mean * mean)

    mean = _area_means(actual, small)
    local = cv2.blur(mean * mean, (3, 3)) - cv2.blur(mean, (3, 3)) ** 2
    rough = within(actual) > np.maximum(MAX_OWN**2, 2.0 * np.maximum(local, within(expected)))
    return float(rough.mean()) > MAX_FOREIGN


def _is_quiet_outside(grey: Array, view: View) -> bool:
    """True if the part outside the input is a plain border and not another image.

    Args:
        grey: Height x width of float32: the result.
        view: The honest view.
    """
    left, top, right, bottom = view.box
    if view.inside is not None:
        outside = 1 - view.inside.astype(np.uint8)
    elif view.box != (0, 0, grey.shape[1], grey.shape[0]):
        outside = np.ones(grey.shape, np.uint8)
        outside[top:bottom, left:right] = 0
    else:
        return True
    # The edge where the border meets the image belongs to neither.
    side = 5 if view.inside is None else 7  # where the edge is oblique, the view stays a pixel inside it
    border = cv2.erode(outside, np.ones((side, side), np.uint8), borderType=cv2.BORDER_REPLICATE)
    if not border.any():
        return True
    darkest, lightest, _, _ = cv2.minMaxLoc(grey, border)
    if lightest - darkest <= MAX_OWN:
        return True  # no structure can then reach the bound
    mean = cv2.mean(grey, border)[0]
    grey, border = _padded(grey), _padded(border)
    cells = []
    for rows, kept in _strips(len(grey)):
        filled = np.where(border[rows] > 0, grey[rows], np.float32(mean))
        smooth = cv2.blur(filled, (3, 3))
        own = cv2.subtract(smooth, cv2.blur(smooth, (SURROUND, SURROUND)))[kept]
        cells.append(_cells(cv2.multiply(own, own)))
    foreign = (_joined(np.concatenate(cells)) > MAX_OWN**2) & (_blocks(border.astype(np.float32)) > 0.5)
    return float(foreign.mean()) <= MAX_FOREIGN


def plain_border(image: Image.Image) -> Edges:
    """The part of an image inside a border of one colour; all of it if there is no border, or nothing inside."""
    if image.width * image.height > MAX_COMPARED:
        return (0, 0, *image.size)
    pixels = np.asarray(image)
    differs = (pixels != pixels[0, 0]).any(axis=2)
    rows, columns = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
    if not len(rows):
        return (0, 0, *image.size)
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
