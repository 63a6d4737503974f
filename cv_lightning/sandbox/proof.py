"""Proof that a result shows what a map claims: the parent's own view of the input, compared block by block.

The parent knows the input, the result and a map that a child claims. It draws the honest view itself, by that map and
at the result's size, and demands agreement in every block: where the honest view has structure (strokes, edges) the
result must have the same structure, and elsewhere it may have hardly any of its own. Contrast, brightness, tone
curves, sharpening, grey and inversion keep the correlation of a block; blends, pastes, masks, noise, blur and
resampling to fewer pixels do not. Nothing is sampled that a snippet could foresee: every pixel is part of a block, and
an image that is reduced before the comparison is also compared in its own pixels at places drawn at random.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageChops

from cv_lightning.images import compose, invert, map_box
from cv_lightning.types import Affine, Box

Array = np.ndarray[Any, Any]
Edges = tuple[int, int, int, int]
MAX_COMPARED = 1_200_000
"""Pixels of a result that are compared; a larger one is reduced by 2, 4, 8, .. first."""
CELL = 8
"""Side in pixels of a cell; a block is two by two cells, and blocks overlap by one cell."""
SURROUND = 17
"""Side of the box whose mean is subtracted: what changes more slowly than this is tone and not a stroke."""
WEAK, STRONG = 10.0, 20.0
"""Standard deviations in grey levels from which a block of the honest view has structure, and from which it may be
text: of strong blocks none may be lost, of weak ones `MAX_LOST`, because contrast clips highlights and shadows."""
MAX_LOST = 0.06
"""Largest share of the blocks with structure that may be lost."""
MIN_CORRELATION, MIN_COARSE_CORRELATION = 0.8, 0.5
"""Least correlation of a block with the honest view, at full size and for what is larger than a stroke."""
MIN_RAW_CORRELATION = 0.85
"""Least correlation of a strong block with its single pixels left in: a stroke must not be sprinkled with others."""
MIN_TONE_CORRELATION, MAX_LOST_BY_TONE = 0.7, 0.2
"""The same, and `MAX_LOST`, where one tone curve for all pixels explains the result: equalisation and contrast bend
strokes and clip highlights, and nothing was put in place of them."""
MIN_TONES = 24
"""Least number of grey levels of such a result."""
MAX_TONE_PIXELS = 300_000
"""Pixels by which such a curve is found; of more, every second, third, .. is taken."""
MAX_UNEXPLAINED = 0.01
"""Largest share of blocks that such a curve may leave unexplained."""
MIN_GAIN = 0.15
"""Least share of a block's contrast that must be left."""
MAX_OWN = 20.0
"""Standard deviation in grey levels of unexplained structure, from which a block counts as foreign."""
MAX_FOREIGN = 0.06
"""Largest share of foreign blocks: a line or a frame that was drawn, not another image."""
TILE = 256
"""Side in pixels of the pieces in which equal pixels are compared."""
WINDOW, NUM_WINDOWS = 120, 6
"""Side in pixels and number of the places at which a reduced result is also compared in its own pixels."""
_TRANSPOSES = {
    (1, 0, 0, 1): None,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""How a part of the input was turned, by the signs of the linear part of the map to the input."""


class View(NamedTuple):
    """What a map says that a result shows."""

    pixels: Image.Image
    box: Edges
    """Part of the result that this is; the rest lies outside the input."""
    inside: Array | None
    """Height x width of bool: pixels that lie in the input; None: all."""


@dataclass
class Pyramid:
    """An image and its reductions by powers of 2, each made once."""

    image: Image.Image
    views: dict[tuple[Affine, tuple[int, int]], View | None] = field(default_factory=dict)
    """Honest views of it that were drawn."""
    _levels: dict[int, Image.Image] = field(default_factory=dict)

    def level(self, number: int) -> Image.Image:
        """The image reduced by 2 ** number."""
        if number == 0:
            return self.image
        if number not in self._levels:
            above = 0 if number <= 2 else number - 1
            self._levels[number] = self.level(above).reduce(1 << (number - above))
        return self._levels[number]

    @cached_property
    def small(self) -> tuple[int, Image.Image]:
        """The first level of at most `MAX_COMPARED` pixels, and its number."""
        pixels = self.image.width * self.image.height
        number = max(0, math.ceil(math.log(pixels / MAX_COMPARED, 4))) if pixels > MAX_COMPARED else 0
        return number, self.level(number)


def is_equal(claim: Affine, image: Pyramid, result: Pyramid) -> bool:
    """True if a result is a part of the input in its own pixels, turned or mirrored, and nothing else.

    A result of more than `MAX_COMPARED` pixels is compared reduced, and at some places as it is.
    """
    size = result.image.size
    if signs_of(claim) not in _TRANSPOSES:
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
    # The view of a tile is used once; the reduced one of the whole is asked for again.
    view = honest_view(image, local, shown.size) if factor > 1 else _aligned_view(image, local, shown.size)
    if view is None or view.inside is not None or view.pixels.size != shown.size:
        return False
    return ImageChops.difference(view.pixels, shown).getbbox() is None


def _tiles(size: tuple[int, int]) -> list[Edges]:
    """All of an image in pieces that stay in the processor's cache."""
    return [
        (left, top, min(size[0], left + TILE), min(size[1], top + TILE))
        for top in range(0, size[1], TILE)
        for left in range(0, size[0], TILE)
    ]


def _whole(small: Image.Image, size: tuple[int, int], number: int) -> Image.Image:
    """A reduced image without what is left over where the factor does not divide a side."""
    return small.crop((0, 0, size[0] >> number, size[1] >> number))


def _windows(size: tuple[int, int]) -> list[Edges]:
    """Places that no snippet can foresee."""
    windows = []
    for _ in range(NUM_WINDOWS):
        left, top = (secrets.randbelow(max(1, side - WINDOW)) for side in size)
        windows.append((left, top, min(size[0], left + WINDOW), min(size[1], top + WINDOW)))
    return windows


def prove(claim: Affine, image: Pyramid, result: Pyramid) -> float:
    """Fidelity of a result to what a map claims that it shows; 0 where it does not show that.

    Args:
        claim: from coordinates of the result to coordinates of the input, in pixels; not singular.
        image: the input, RGB.
        result: the result, RGB.

    Returns:
        The least correlation with the honest view over the blocks that may hold text, in [0, 1].
    """
    number, small = result.small
    fidelity = _fidelity(claim, image, _whole(small, result.image.size, number), (0, 0), 1 << number)
    for place in _windows(result.image.size) if number and fidelity else ():
        fidelity = min(fidelity, _fidelity(claim, image, result.image.crop(place), place[:2]))
    return fidelity


def _fidelity(claim: Affine, image: Pyramid, shown: Image.Image, corner: tuple[int, int], factor: int = 1) -> float:
    """Fidelity of a part of a result, reduced by a factor."""
    local = compose(claim, Affine(factor, 0, corner[0], 0, factor, corner[1]))
    view = honest_view(image, local, shown.size)
    if view is None:
        return float(factor == 1 and corner != (0, 0))  # a window beside the input: nothing to compare
    if not _is_quiet_outside(shown, view):
        return 0.0
    part = shown.crop(view.box) if view.box != (0, 0, *shown.size) else shown
    return _agreement(view, part, _enlargement(local, part.size))


# ------------------------------------------------------------------------------------------------ the honest view
def signs_of(claim: Affine) -> tuple[int, int, int, int]:
    """Signs of the linear part of a map, with 0 for what is nothing beside the rest."""
    scale = max(abs(claim.a), abs(claim.b), abs(claim.d), abs(claim.e))
    a, b, d, e = (int(np.sign(v)) * (abs(v) > 1e-6 * scale) for v in (claim.a, claim.b, claim.d, claim.e))
    return a, b, d, e


def honest_view(image: Pyramid, claim: Affine, size: tuple[int, int]) -> View | None:
    """The parent's own view of the input by a map, without aliasing; None where it would show nothing of it."""
    key = claim, size
    if key not in image.views:
        draw = _aligned_view if signs_of(claim) in _TRANSPOSES else _warped_view
        image.views[key] = draw(image, claim, size)
    return image.views[key]


def _aligned_view(image: Pyramid, claim: Affine, size: tuple[int, int]) -> View | None:
    """View by a map that turns by right angles only: a part of the input, scaled, then turned."""
    whole = (0.0, 0.0, float(image.image.width), float(image.image.height))
    extent = map_box(invert(claim), whole)
    left, top = max(0, math.ceil(extent[0] - 1e-6)), max(0, math.ceil(extent[1] - 1e-6))
    right, bottom = min(size[0], math.floor(extent[2] + 1e-6)), min(size[1], math.floor(extent[3] + 1e-6))
    if right <= left or bottom <= top:
        return None
    source = map_box(claim, (float(left), float(top), float(right), float(bottom)))
    source = max(source[0], 0.0), max(source[1], 0.0), min(source[2], whole[2]), min(source[3], whole[3])
    wanted = (right - left, bottom - top) if signs_of(claim)[0] else (bottom - top, right - left)
    part = _scaled(image, source, wanted)
    transpose = _TRANSPOSES[signs_of(claim)]
    return View(part if transpose is None else part.transpose(transpose), (left, top, right, bottom), None)


def _scaled(image: Pyramid, source: Box, size: tuple[int, int]) -> Image.Image:
    """A part of the input at another size; exactly what a reduction by whole factors gives where it is one."""
    edges: Edges = (round(source[0]), round(source[1]), round(source[2]), round(source[3]))
    if max(abs(a - b) for a, b in zip(source, edges, strict=True)) < 1e-6:
        factor = (edges[2] - edges[0]) // size[0], (edges[3] - edges[1]) // size[1]
        if (factor[0] * size[0], factor[1] * size[1]) == (edges[2] - edges[0], edges[3] - edges[1]):
            if factor == (1, 1):
                return image.image if size == image.image.size else image.image.crop(edges)
            number = factor[0].bit_length() - 1
            if factor == (1 << number, 1 << number) and not any(edge % factor[0] for edge in edges):
                corner = edges[0] >> number, edges[1] >> number
                return image.level(number).crop((*corner, corner[0] + size[0], corner[1] + size[1]))
            return image.image.reduce(factor, edges)
    step = min((source[2] - source[0]) / size[0], (source[3] - source[1]) / size[1])
    number = max(0, int(math.log2(max(1.0, step))))
    level = image.level(number)
    sx, sy = 0.5**number, 0.5**number
    box = source[0] * sx, source[1] * sy, min(source[2] * sx, level.width), min(source[3] * sy, level.height)
    return level.resize(size, Image.Resampling.BILINEAR if step > 1 else Image.Resampling.BICUBIC, box=box)


def _warped_view(image: Pyramid, claim: Affine, size: tuple[int, int]) -> View | None:
    """View by any other map."""
    step = math.sqrt(abs(claim.a * claim.e - claim.b * claim.d))
    number = max(0, int(math.log2(max(1.0, step))))
    factor = float(1 << number)
    level = image.level(number)
    extent = map_box(claim, (0.0, 0.0, float(size[0]), float(size[1])))
    left, top = max(0, int(extent[0] / factor) - 2), max(0, int(extent[1] / factor) - 2)
    right, bottom = min(level.width, int(extent[2] / factor) + 3), min(level.height, int(extent[3] / factor) + 3)
    if right <= left or bottom <= top:
        return None
    part = np.asarray(level.crop((left, top, right, bottom)))
    a, b, d, e = (v / factor for v in (claim.a, claim.b, claim.d, claim.e))
    c, f = claim.c / factor - left, claim.f / factor - top
    # OpenCV counts from the centres of pixels.
    matrix = np.array([[a, b, c + 0.5 * (a + b) - 0.5], [d, e, f + 0.5 * (d + e) - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    pixels = cv2.warpAffine(part, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    full = np.full(part.shape[:2], 255, np.uint8)
    inside = cv2.warpAffine(full, matrix, size, flags=flags) >= 250
    return View(Image.fromarray(pixels), (0, 0, *size), inside) if inside.any() else None


def _enlargement(claim: Affine, size: tuple[int, int]) -> tuple[int, int]:
    """Whole factors by which a view is larger than the part of the input that it shows."""
    steps = math.hypot(claim.a, claim.d), math.hypot(claim.b, claim.e)
    x, y = (max(1, int(1.0 / max(step, 1e-9) + 1e-6)) for step in steps)
    return max(1, min(x, size[0] // CELL)), max(1, min(y, size[1] // CELL))


# ------------------------------------------------------------------------------------------------ agreement
def _agreement(view: View, shown: Image.Image, enlarged: tuple[int, int]) -> float:
    """Fidelity of a result to the honest view; 0 where they do not agree."""
    expected, actual = _grey(view.pixels), _grey(shown)
    inside = view.inside
    if inside is not None:
        expected = np.where(inside, expected, actual)
    if enlarged != (1, 1):
        # An enlargement invents what lies between two pixels of the input; it must not be too much, and is left out.
        small = max(1, shown.width // enlarged[0]), max(1, shown.height // enlarged[1])
        if _is_rough(expected, actual, small):
            return 0.0
        expected, actual = (cv2.resize(grey, small, interpolation=cv2.INTER_AREA) for grey in (expected, actual))
        inside = None if inside is None else cv2.resize(inside.astype(np.uint8), small) > 0
    fidelity, least = 1.0, MIN_CORRELATION
    by_tone = cache(lambda: _is_change_of_tone(view.pixels, shown))
    while fidelity:
        fidelity = min(fidelity, _compare(expected, actual, inside, least, by_tone))
        if min(expected.shape) < 16 * CELL:
            break
        size = expected.shape[1] // 4, expected.shape[0] // 4
        expected, actual = (cv2.resize(grey, size, interpolation=cv2.INTER_AREA) for grey in (expected, actual))
        inside, least = None, MIN_COARSE_CORRELATION
    return fidelity


def _compare(expected: Array, actual: Array, inside: Array | None, least: float, by_tone: Callable[[], bool]) -> float:
    """Least correlation over the strong blocks; 0 where structure is lost or too much of it is foreign."""
    (h, h_grain), (r, r_grain) = _structure(expected), _structure(actual)
    hh, rr, hr = _blocks(h * h), _blocks(r * r), np.abs(_blocks(h * r))
    # Sharpening and contrast make more of the grain that is there; what is beyond that was put in.
    contrast = np.maximum(1.0, rr / np.maximum(hh, 1.0))
    own_grain = _blocks(r_grain * r_grain) - 9.0 * contrast * _blocks(h_grain * h_grain)
    correlation = hr / np.sqrt(hh * rr + 1e-6)
    known = np.ones(hh.shape, bool) if inside is None else _blocks(inside.astype(np.float32)) > 0.999
    strong, weak = known & (hh >= STRONG**2), known & (hh >= WEAK**2)

    def is_lost(bound: float, most: float) -> bool:
        lost = weak & ((correlation < bound) | (hr < MIN_GAIN * hh))
        return bool((lost & strong).any() or lost.sum() > most * weak.sum())

    foreign = (rr * (1 - correlation**2) > MAX_OWN**2) & (correlation < least)
    foreign |= own_grain > MAX_OWN**2
    raw_h, raw_r = h + h_grain, r + r_grain
    raw = np.abs(_blocks(raw_h * raw_r)) / np.sqrt(_blocks(raw_h * raw_h) * _blocks(raw_r * raw_r) + 1e-6)
    speckled = least == MIN_CORRELATION and bool((strong & (raw < MIN_RAW_CORRELATION)).any())
    if speckled or is_lost(least, MAX_LOST) or foreign.mean() > MAX_FOREIGN:
        if is_lost(min(least, MIN_TONE_CORRELATION), MAX_LOST_BY_TONE) or not by_tone():
            return 0.0
        return max(MIN_CORRELATION, float(correlation[strong].min(initial=1.0)))
    return float(correlation[strong].min(initial=1.0)) if least == MIN_CORRELATION else 1.0


def _is_change_of_tone(expected: Image.Image, actual: Image.Image) -> bool:
    """True if a curve for each colour channel explains the result pixel by pixel, and keeps many tones.

    A result of few tones, as a threshold or a small palette gives, may have lost a stroke between two of them.
    """
    step = math.ceil(math.sqrt(expected.width * expected.height / MAX_TONE_PIXELS))
    if step > 1:
        size = max(1, expected.width // step), max(1, expected.height // step)
        expected, actual = (one.resize(size, Image.Resampling.NEAREST) for one in (expected, actual))
    if len(np.unique(_grey(actual))) < MIN_TONES:
        return False
    for tones, found in zip(expected.split(), actual.split(), strict=True):
        index, values = np.asarray(tones), np.asarray(found, np.float32)
        counts = np.maximum(np.bincount(index.ravel(), minlength=256), 1)
        curve = np.bincount(index.ravel(), values.ravel(), minlength=256) / counts
        rest = values - curve[index].astype(np.float32)
        unexplained = _blocks(rest * rest) > np.maximum(8.0**2, 0.1 * _blocks(_structure(values)[0] ** 2))
        if float(unexplained.mean()) > MAX_UNEXPLAINED:
            return False
    return True


def _structure(grey: Array) -> tuple[Array, Array]:
    """Strokes and edges, without slow changes of tone, and what changes from pixel to pixel, the grain."""
    smooth = cv2.blur(grey, (3, 3))
    return np.asarray(smooth - cv2.blur(smooth, (SURROUND, SURROUND))), np.asarray(grey - smooth)


def _blocks(values: Array) -> Array:
    """Means over overlapping blocks."""
    rows, columns = values.shape
    cells = max(1, round(columns / CELL)), max(1, round(rows / CELL))
    means = cv2.resize(values, cells, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.blur(means, (min(2, cells[0]), min(2, cells[1])), borderType=cv2.BORDER_REPLICATE))


def _grey(image: Image.Image) -> Array:
    return np.asarray(image.convert("L"), np.float32)


def _is_rough(expected: Array, actual: Array, small: tuple[int, int]) -> bool:
    """True if an enlarged result varies within single pixels of the input more than any interpolation does."""

    def within(grey: Array) -> Array:
        mean = cv2.resize(grey, small, interpolation=cv2.INTER_AREA)
        return np.asarray(cv2.resize(grey * grey, small, interpolation=cv2.INTER_AREA) - mean * mean)

    mean = cv2.resize(actual, small, interpolation=cv2.INTER_AREA)
    local = cv2.blur(mean * mean, (3, 3)) - cv2.blur(mean, (3, 3)) ** 2
    rough = within(actual) > np.maximum(MAX_OWN**2, 2.0 * np.maximum(local, within(expected)))
    return float(rough.mean()) > MAX_FOREIGN


def _is_quiet_outside(shown: Image.Image, view: View) -> bool:
    """True if what lies outside the input is a plain border and not another image."""
    grey = None
    left, top, right, bottom = view.box
    if view.box != (0, 0, *shown.size):
        grey = _grey(shown)
        outside = np.ones(grey.shape, np.float32)
        outside[top:bottom, left:right] = 0
    elif view.inside is not None:
        grey = _grey(shown)
        outside = 1.0 - view.inside.astype(np.float32)
    if grey is None:
        return True
    # Where the border meets the image there is an edge, which is neither's structure.
    border = cv2.erode(outside, np.ones((5, 5), np.uint8), borderType=cv2.BORDER_REPLICATE)
    own, _ = _structure(np.where(border > 0, grey, float(grey[border > 0].mean() if border.any() else 0.0)))
    foreign = (_blocks(own * own) > MAX_OWN**2) & (_blocks(border) > 0.5)
    return float(foreign.mean()) <= MAX_FOREIGN


def plain_border(image: Image.Image) -> Edges:
    """The part of an image inside a border of one colour; all of it where there is no border or nothing else."""
    if image.width * image.height > MAX_COMPARED:
        return (0, 0, *image.size)
    pixels = np.asarray(image)
    differs = (pixels != pixels[0, 0]).any(axis=2)
    rows, columns = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
    if not len(rows):
        return (0, 0, *image.size)
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
