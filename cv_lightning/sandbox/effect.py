"""Net geometric effect of a snippet, derived from the pixels of input and result.

Model code shares its process with the tracer and can forge its claims. A claimed map is therefore only a candidate: it
must explain the result better than its seven other turns and flips (`PixelMatch`), and the result must agree with the
parent's own view of the input in every block (`proof.prove`). The plan executor and the one that runs model code use
the same function, so that both give the same effect.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import cv2
import numpy as np
from PIL import Image

from cv_lightning.images import compose, map_box
from cv_lightning.sandbox.geometry import SIGNS, SWAPPING, SYMMETRIES, turn
from cv_lightning.sandbox.locate import located
from cv_lightning.sandbox.proof import is_equal, plain_border, prove
from cv_lightning.sandbox.view import Array, Edges, Pyramid, grey_of, signs_of
from cv_lightning.types import Affine, Box, Effect, Operation

log = logging.getLogger(__name__)

GRID = 48
"""Points a side at which a prediction is compared with the result."""
MIN_CORRELATION = 0.35
"""Least score of a prediction that explains anything; filters and tone changes of the same frame score far higher."""
MARGIN = 0.02
"""Lead in score that another turn or flip needs to replace the claim."""
PROVEN = 1.0 - MARGIN
"""Score above which no rival can lead by the margin."""
NEGATIVE = 0.97
"""Factor for a negative correlation (an inverted image): on smooth images a half turn looks like an inversion."""
GOOD = 0.9
"""Score from which a map is a candidate although it was not claimed."""
MIN_SUGGESTED = 0.6
"""Score from which a turn or flip that is not proven still counts for penalties."""
MIN_INNER = 8
"""Least side in pixels of the part inside a plain border."""
GEOMETRIC = ("rotate", "flip", "transpose", "transverse", "reverse", "crop", "pad", "translate", "warp", "copy")
"""Prefixes of the names of operations that move pixels without changing them."""
MAX_SEARCHED = 4_000_000
"""Pixels of input or result above which only one claim is tried, and no other candidate after it."""
MAX_CPU_S = 0.2
"""Processor time after which no further candidate is tried; there is no map then. The work is bounded by pixels, so
this happens only on a machine in trouble."""
_COMPOSED = {
    "identity": (),
    "transpose": ("flip_horizontal", "rotate_90"),
    "transverse": ("flip_horizontal", "rotate_270"),
}
"""Core operations of symmetries that are not core operations themselves."""


# ------------------------------------------------------------------------------------------------ labels
def effect_of(to_input: Affine | None, size: tuple[int, int], output: tuple[int, int]) -> Effect:
    """Core operations and crop box of a map.

    Args:
        to_input: From coordinates of the result to coordinates of the input, in pixels; None: unknown.
        size: Width and height of the input.
        output: Width and height of the result.
    """
    if to_input is None:
        return Effect(to_input=None)
    width, height = size
    core = core_of(to_input)
    box = map_box(to_input, (0.0, 0.0, float(output[0]), float(output[1])))
    seen = (max(0.0, box[0]), max(0.0, box[1]), min(float(width), box[2]), min(float(height), box[3]))
    whole = seen[0] < 0.5 and seen[1] < 0.5 and seen[2] > width - 0.5 and seen[3] > height - 0.5
    empty = seen[2] <= seen[0] or seen[3] <= seen[1]
    if whole or empty or _lost_by_canvas(to_input, size, output):
        return Effect(to_input=to_input, core=core)
    left, top, right, bottom = (round(edge, 3) for edge in seen)
    return Effect(to_input=to_input, core=("crop", *core), crop_box=(left, top, right, bottom))


def core_of(to_input: Affine) -> tuple[str, ...]:
    """Core operations of the linear part of a map, sorted; none for other angles."""
    symmetry = SIGNS.get(signs_of(to_input), "identity")
    return _COMPOSED.get(symmetry, (symmetry,))


def _lost_by_canvas(to_input: Affine, size: tuple[int, int], output: tuple[int, int]) -> bool:
    """True for a quarter turn that kept the canvas: the ends of the image that it loses are not a crop."""
    if output != size or abs(to_input.a) > 1e-6 or abs(to_input.e) > 1e-6 or abs(abs(to_input.b) - 1) > 1e-6:
        return False
    x = to_input.b * size[1] / 2 + to_input.c
    y = to_input.d * size[0] / 2 + to_input.f
    return abs(x - size[0] / 2) <= 1 and abs(y - size[1] / 2) <= 1


# ------------------------------------------------------------------------------------------------ the net effect
@dataclass(frozen=True, slots=True)
class Found:
    """What the pixels of a result prove."""

    effect: Effect
    same_pixels: bool = False
    """True if nothing but the geometry changed."""


UNPROVABLE = (ArithmeticError, ValueError, TypeError, OSError, LookupError, MemoryError, SystemError, cv2.error)
"""What an absurd map may raise in Pillow, NumPy or OpenCV; there is no map then."""


def net_effect(claims: Sequence[Affine], image: Image.Image, result: Image.Image, *, direct: bool) -> Found:
    """Effect of a snippet by its pixels. Nothing that a snippet wrote raises here.

    Args:
        claims: Candidate maps from result to input, best first.
        image: The input, RGB.
        result: The result, RGB.
        direct: The first claim was followed from the input to the result without a gap; other claims are ignored.
    """
    try:
        return _net_effect(claims, image, result, direct=direct)
    except UNPROVABLE as error:
        log.warning("no map for a result of %dx%d: %s: %s", *result.size, type(error).__name__, error)
        return Found(Effect(to_input=None))


def _net_effect(claims: Sequence[Affine], image: Image.Image, result: Image.Image, *, direct: bool) -> Found:
    claims = [claim for claim in claims if not _is_singular(claim)][: 1 if direct else None]
    end = time.thread_time() + MAX_CPU_S
    before, after = Pyramid(image), Pyramid(result)
    comparison = PixelMatch(before, after)
    found = _proven(claims, comparison, direct, end)
    if found is not None:
        return found
    inner = inside_border(result)
    if inner is not None and time.thread_time() < end:
        moved = [compose(claim, Affine(1, 0, inner[0], 0, 1, inner[1])) for claim in claims]
        found = _proven(moved, PixelMatch(before, Pyramid(result.crop(inner))), direct, end)
    if inner is None or found is None or found.effect.to_input is None:
        return Found(Effect(to_input=None, turned=_suggested(claims, comparison)))
    left, top, right, bottom = map(float, inner)
    to_input = compose(found.effect.to_input, Affine(1, 0, -left, 0, 1, -top))
    return Found(replace(found.effect, to_input=to_input, shown=(left, top, right, bottom)))


def _is_singular(claim: Affine) -> bool:
    return abs(claim.a * claim.e - claim.b * claim.d) <= 1e-9


def _proven(claims: Sequence[Affine], comparison: PixelMatch, direct: bool, end: float) -> Found | None:
    """The effect of the first candidate that the pixels prove."""
    before, after = comparison.before, comparison.after
    sizes = before.image.size, after.image.size
    if claims and is_equal(claims[0], before, after):
        return Found(effect_of(claims[0], *sizes), same_pixels=True)
    for candidate in _candidates(claims, comparison, direct):
        if candidate not in claims[:1] and is_equal(candidate, before, after):
            return Found(effect_of(candidate, *sizes), same_pixels=True)
        fidelity = prove(candidate, before, after)
        if fidelity:
            return Found(replace(effect_of(candidate, *sizes), fidelity=round(fidelity, 4)))
        if time.thread_time() > end:
            log.warning("no map for a result of %dx%d: its proof took too long", *sizes[1])
            break
    return None


def shows(claim: Affine, image: Image.Image, result: Image.Image) -> bool:
    """True if a result shows what a map claims of an image, perhaps inside a plain border.

    Args:
        claim: From coordinates of the result to coordinates of the image, in pixels.
        image: RGB.
        result: RGB.
    """
    try:
        return _shows(claim, image, result)
    except UNPROVABLE as error:
        log.warning("no map for a result of %dx%d: %s: %s", *result.size, type(error).__name__, error)
        return False


def _shows(claim: Affine, image: Image.Image, result: Image.Image) -> bool:
    if _is_singular(claim):
        return False
    before, after = Pyramid(image), Pyramid(result)
    if is_equal(claim, before, after) or prove(claim, before, after):
        return True
    inner = inside_border(result)
    if inner is None:
        return False
    moved = compose(claim, Affine(1, 0, inner[0], 0, 1, inner[1]))
    return prove(moved, before, Pyramid(result.crop(inner))) > 0


def inside_border(image: Image.Image) -> Edges | None:
    """The part of an image inside a border of one colour; None where there is none of at least `MIN_INNER` a side."""
    left, top, right, bottom = inner = plain_border(image)
    return inner if inner != (0, 0, *image.size) and min(right - left, bottom - top) >= MIN_INNER else None


def checked_operations(operations: Sequence[Operation], found: Found) -> tuple[Operation, ...]:
    """Operations, with `used` cleared for those that left no trace in the pixels.

    If a result equals the honest view pixel by pixel, no filter and no change of tone or size reached it.
    """
    if not found.same_pixels:
        return tuple(operations)
    return tuple(replace(op, used=op.used and op.name.startswith(GEOMETRIC)) for op in operations)


def _candidates(claims: Sequence[Affine], comparison: PixelMatch, direct: bool) -> Iterator[Affine]:
    """Maps to be proven, the likeliest first: claims that no other symmetry beats, and what the pixels suggest."""
    tried: set[Affine] = set()
    place = None if direct else located(comparison.before, comparison.after)
    if place is not None and comparison.score(place) > max([GOOD, *map(comparison.score, claims[:1])]):
        tried.add(place)
        yield place
    for claim in claims[:1] if max(comparison.pixels) > MAX_SEARCHED else claims:
        best = _best_of_symmetries(claim, comparison)
        if best is not None and best not in tried:
            tried.add(best)
            yield best
    if max(comparison.pixels) > MAX_SEARCHED and tried:
        return
    score, frame = max((comparison.score(claim), claim) for claim in _frame_turns(*comparison.sizes))
    if score > GOOD and frame not in tried:
        yield frame
    place = located(comparison.before, comparison.after) if direct else place
    if place is not None and place not in tried and comparison.score(place) > GOOD:
        yield place


def _best_of_symmetries(claim: Affine, comparison: PixelMatch) -> Affine | None:
    """The claim, or a symmetry of it that explains the result clearly better; None if neither explains it."""
    score = comparison.score(claim)
    if score > PROVEN:
        return claim
    best, other = score, claim
    for rival in _rivals(claim, comparison.sizes[1]):
        value = comparison.score(rival)
        if value > best + MARGIN:
            best, other = value, rival
    if other is claim:
        return claim if score >= MIN_CORRELATION else None
    return other if best > GOOD else None


def _suggested(claims: Sequence[Affine], comparison: PixelMatch) -> tuple[str, ...]:
    """Turns and flips that the pixels suggest without proving a map; they count for penalties, never for credit."""
    maps = [*_frame_turns(*comparison.sizes), *claims[:1]]
    scored = [(comparison.score(claim), claim) for claim in maps]
    upright = max(score for score, claim in scored if not core_of(claim))
    score, claim = max(scored)
    if score < MIN_SUGGESTED or score < upright + MARGIN:
        return ()
    return core_of(claim)


# ------------------------------------------------------------------------------------------------ coarse agreement
class PixelMatch:
    """Compares input and result under any map, by a grid of pixels and of area means."""

    def __init__(self, before: Pyramid, after: Pyramid) -> None:
        self.before, self.after = before, after
        self.image, self.result = before.image, after.image
        result = self.result
        self.sizes = self.image.size, result.size
        self.pixels = self.image.width * self.image.height, result.width * result.height
        self.grid = min(GRID, result.width), min(GRID, result.height)
        self._scores: dict[Affine, float] = {}
        self._parts: dict[tuple[int, tuple[int, int, int, int]], Image.Image] = {}
        # Single pixels, at whole steps so that each one's centre is known.
        step = result.width // self.grid[0], result.height // self.grid[1]
        self._points = Affine(
            step[0], 0, step[0] // 2 + 0.5 - step[0] / 2, 0, step[1], step[1] // 2 + 0.5 - step[1] / 2
        )
        moved = result.transform(self.grid, Image.Transform.AFFINE, self._points, Image.Resampling.NEAREST)
        self._pixels = np.asarray(moved, np.float32)

    def score(self, to_input: Affine) -> float:
        """Agreement in [0, 1] of the result with its prediction, pixel by pixel or in the mean of small areas."""
        if to_input not in self._scores:
            pixels = self._pixel_score(to_input)
            # Means of areas touch every pixel; they are not needed where single pixels agree.
            self._scores[to_input] = pixels if pixels > PROVEN else max(pixels, self._area_score(to_input))
        return self._scores[to_input]

    @cached_property
    def actual(self) -> Array:
        """Grey means of the cells of the result."""
        image = self.after.small[1]
        factor = max(1, image.width // self.grid[0]), max(1, image.height // self.grid[1])
        small = image.reduce(factor) if factor != (1, 1) else image
        return grey_of(small.resize(self.grid, Image.Resampling.BOX))

    def _pixel_score(self, to_input: Affine) -> float:
        data = compose(to_input, self._points)
        inside = _inside(data, self.grid, self.image.size)
        if inside.sum() < 4:
            return 0.0
        moved = self.image.transform(self.grid, Image.Transform.AFFINE, data, Image.Resampling.NEAREST)
        predicted = np.asarray(moved, np.float32)[inside]
        actual = self._pixels[inside]
        return max(_correlation(predicted, actual), _correlation(predicted.mean(-1), actual.mean(-1)))

    def _area_score(self, to_input: Affine) -> float:
        """Correlation of area means; its sign is ignored, because an inverted image is still the same image."""
        columns, rows = self.grid
        cell = self.result.width / columns, self.result.height / rows
        step = max(abs(to_input.a), abs(to_input.b), abs(to_input.d), abs(to_input.e)) * max(cell)
        level = max(0, int(np.log2(max(1.0, step))))
        while level and min(self.image.size) >> level < 1:
            level -= 1
        full = compose(to_input, Affine(cell[0], 0, 0, 0, cell[1], 0))
        small, box = self._reduced(level, map_box(full, (0.0, 0.0, float(columns), float(rows))))
        sx, sy = small.width / (box[2] - box[0]), small.height / (box[3] - box[1])
        full = compose(Affine(sx, 0, -box[0] * sx, 0, sy, -box[1] * sy), full)
        inside = _inside(full, self.grid, small.size)
        if inside.sum() < 4:
            return 0.0
        moved = small.transform(self.grid, Image.Transform.AFFINE, full, Image.Resampling.BILINEAR)
        return _correlation(grey_of(moved)[inside], self.actual[inside])

    def _reduced(self, level: int, shown: Box) -> tuple[Image.Image, tuple[int, int, int, int]]:
        """The input reduced by 2 ** level (of a large one only the part that is shown), and its box in the input."""
        width, height = self.image.size
        side = 1 << level
        left, top = (max(0, int(v) // side - 1) * side for v in shown[:2])
        right = min(width, (int(shown[2]) // side + 2) * side)
        bottom = min(height, (int(shown[3]) // side + 2) * side)
        is_small = level <= self.before.small[0] or 2 * (right - left) * (bottom - top) > width * height
        if is_small or right <= left or bottom <= top:
            return self.before.level(level), (0, 0, width, height)
        box = left, top, right, bottom
        if (side, box) not in self._parts:
            self._parts[side, box] = self.image.reduce(side, box)
        return self._parts[side, box], box


def _inside(data: Sequence[float], grid: tuple[int, int], size: tuple[int, int]) -> Array:
    x, y = np.meshgrid(np.arange(grid[0]) + 0.5, np.arange(grid[1]) + 0.5)
    u, v = data[0] * x + data[1] * y + data[2], data[3] * x + data[4] * y + data[5]
    return np.asarray((u >= 0) & (v >= 0) & (u < size[0]) & (v < size[1]))


def _correlation(a: Array, b: Array) -> float:
    """Correlation over the points, of each channel about its own mean, so that a colour cast does not count."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    norm = math.sqrt(float(np.vdot(a, a)) * float(np.vdot(b, b)))
    if norm < 1e-3 * a.size:
        # At least one is flat; if both are, they agree as far as can be seen.
        return 1.0 if float(np.abs(a).max()) < 2 and float(np.abs(b).max()) < 2 else 0.0
    value = float(np.vdot(a, b)) / norm
    return value if value >= 0 else -NEGATIVE * value


def _rivals(claim: Affine, output: tuple[int, int]) -> list[Affine]:
    """The claim's box under the seven other symmetries (turns within the result's own frame)."""
    width, height = output
    rivals = []
    for name in SYMMETRIES[1:]:
        symmetry = turn(name, width, height)
        if name in SWAPPING:
            # The turned frame is stretched back onto this one, so that it shows the same part of the input.
            symmetry = compose(symmetry, Affine(height / width, 0, 0, 0, width / height, 0))
        rivals.append(compose(claim, symmetry))
    return rivals


def _frame_turns(size: tuple[int, int], output: tuple[int, int]) -> list[Affine]:
    """The whole input in each symmetry, scaled to the size of the result."""
    maps = []
    for name in SYMMETRIES:
        width, height = size[::-1] if name in SWAPPING else size
        maps.append(compose(turn(name, *size), Affine(width / output[0], 0, 0, 0, height / output[1], 0)))
    return maps
