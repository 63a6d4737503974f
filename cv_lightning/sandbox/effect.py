"""The net effect of a snippet, from claims that are believed only where the pixels agree.

Model code shares its process with the tracer and can forge what it says. So every claimed map is tested here, in the
parent, by predicting the result from the input, and it must beat the seven other turns and flips of the same map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from cv_lightning.images import compose, map_box
from cv_lightning.sandbox.geometry import SYMMETRIES, turn
from cv_lightning.sandbox.locate import located
from cv_lightning.types import Affine, Effect

GRID = 48
"""Points a side at which a prediction is compared with the result."""
MIN_CORRELATION = 0.35
"""Below this a prediction explains nothing; filters and tone changes of the same frame lie far above."""
MARGIN = 0.02
"""By this much another turn or flip must be better before the claim is dropped."""
PROVEN = 1.0 - MARGIN
"""Above this no rival can be better by the margin."""
NEGATIVE = 0.97
"""What a negative of the prediction counts: on smooth pictures a half turn looks like one."""
_LINEAR = {
    (1, 0, 0, 1): (),
    (0, -1, 1, 0): ("rotate_90",),
    (-1, 0, 0, -1): ("rotate_180",),
    (0, 1, -1, 0): ("rotate_270",),
    (-1, 0, 0, 1): ("flip_horizontal",),
    (1, 0, 0, -1): ("flip_vertical",),
    (0, 1, 1, 0): ("flip_horizontal", "rotate_90"),
    (0, -1, -1, 0): ("flip_horizontal", "rotate_270"),
}
"""Core operations by the signs of the linear part of the map to the input."""


# ------------------------------------------------------------------------------------------------ labels
def effect_of(to_input: Affine | None, size: tuple[int, int], output: tuple[int, int]) -> Effect:
    """Core operations and crop box of a map.

    Args:
        to_input: from coordinates of the result to coordinates of the input, in pixels; None: unknown.
        size: width and height of the input.
        output: width and height of the result.
    """
    if to_input is None:
        return Effect(to_input=None)
    width, height = size
    scale = max(abs(v) for v in (to_input.a, to_input.b, to_input.d, to_input.e))
    a, b, d, e = (int(np.sign(v)) * (abs(v) > 1e-6 * scale) for v in (to_input[0], to_input[1], *to_input[3:5]))
    turned = _LINEAR.get((a, b, d, e))
    core = set(turned or ())
    box = map_box(to_input, (0.0, 0.0, float(output[0]), float(output[1])))
    seen = (max(0.0, box[0]), max(0.0, box[1]), min(float(width), box[2]), min(float(height), box[3]))
    whole = seen[0] < 0.5 and seen[1] < 0.5 and seen[2] > width - 0.5 and seen[3] > height - 0.5
    empty = seen[2] <= seen[0] or seen[3] <= seen[1]
    if whole or empty or _lost_by_canvas(to_input, size, output):
        return Effect(to_input=to_input, core=tuple(sorted(core)))
    return Effect(to_input=to_input, core=tuple(sorted(core | {"crop"})), crop_box=tuple(round(v, 3) for v in seen))  # type: ignore[arg-type]


def _lost_by_canvas(to_input: Affine, size: tuple[int, int], output: tuple[int, int]) -> bool:
    """A quarter turn that kept the canvas loses the ends of the picture; nobody cropped."""
    if output != size or abs(to_input.a) > 1e-6 or abs(to_input.e) > 1e-6 or abs(abs(to_input.b) - 1) > 1e-6:
        return False
    x = to_input.b * size[1] / 2 + to_input.c
    y = to_input.d * size[0] / 2 + to_input.f
    return abs(x - size[0] / 2) <= 1 and abs(y - size[1] / 2) <= 1


# ------------------------------------------------------------------------------------------------ pixels
class Comparison:
    """Input and result, ready to be compared under any map."""

    def __init__(self, image: Image.Image, result: Image.Image) -> None:
        self.image, self.result = image, result
        self.grid = min(GRID, result.width), min(GRID, result.height)
        self._actual: np.ndarray[Any, Any] | None = None
        self._levels: dict[int, Image.Image] = {0: image}
        # Single pixels, at whole steps so that each one's centre is known.
        step = result.width // self.grid[0], result.height // self.grid[1]
        self._points = Affine(
            step[0], 0, step[0] // 2 + 0.5 - step[0] / 2, 0, step[1], step[1] // 2 + 0.5 - step[1] / 2
        )
        moved = result.transform(self.grid, Image.Transform.AFFINE, self._points, Image.Resampling.NEAREST)
        self._pixels = np.asarray(moved, np.float32)

    def score(self, to_input: Affine) -> float:
        """Agreement in [0, 1] of the result with its prediction, pixel by pixel or in the mean of small areas."""
        pixels = self._pixel_score(to_input)
        # Means of areas touch every pixel; they are not needed where single pixels agree.
        return pixels if pixels > PROVEN else max(pixels, self._area_score(to_input))

    @property
    def actual(self) -> np.ndarray[Any, Any]:
        """Grey means of the cells of the result."""
        if self._actual is None:
            self._actual = _grey(self.result, self.grid)
        return self._actual

    def is_exact(self, to_input: Affine) -> bool:
        """True if every compared pixel lies in the input and is equal there."""
        data = compose(to_input, self._points)
        if not _inside(data, self.grid, self.image.size).all():
            return False
        moved = self.image.transform(self.grid, Image.Transform.AFFINE, data, Image.Resampling.NEAREST)
        return np.array_equal(np.asarray(moved, np.float32), self._pixels)

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
        """Correlation of area means; sign is ignored (a negative stays a picture)."""
        columns, rows = self.grid
        cell = self.result.width / columns, self.result.height / rows
        step = max(abs(to_input.a), abs(to_input.b), abs(to_input.d), abs(to_input.e)) * max(cell)
        level = max(0, int(np.log2(max(1.0, step))))
        while level and min(self.image.size) >> level < 1:
            level -= 1
        small = self._level(level)
        sx, sy = small.width / self.image.width, small.height / self.image.height
        full = compose(to_input, Affine(cell[0], 0, 0, 0, cell[1], 0))
        data = (full.a * sx, full.b * sx, full.c * sx, full.d * sy, full.e * sy, full.f * sy)
        inside = _inside(data, self.grid, small.size)
        if inside.sum() < 4:
            return 0.0
        moved = small.transform(self.grid, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
        predicted = np.asarray(moved.convert("L"), np.float32)
        return _correlation(predicted[inside], self.actual[inside])

    def _level(self, level: int) -> Image.Image:
        if level not in self._levels:
            factor = 1 << level
            self._levels[level] = self.image.reduce((min(factor, self.image.width), min(factor, self.image.height)))
        return self._levels[level]


def _grey(image: Image.Image, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    factor = max(1, image.width // size[0]), max(1, image.height // size[1])
    small = image.reduce(factor) if factor != (1, 1) else image
    return np.asarray(small.resize(size, Image.Resampling.BOX).convert("L"), np.float32)


def _inside(data: Sequence[float], grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray[Any, Any]:
    x, y = np.meshgrid(np.arange(grid[0]) + 0.5, np.arange(grid[1]) + 0.5)
    u, v = data[0] * x + data[1] * y + data[2], data[3] * x + data[4] * y + data[5]
    return np.asarray((u >= 0) & (v >= 0) & (u < size[0]) & (v < size[1]))


def _correlation(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Correlation over the points, of each channel about its own mean: a colour cast is no agreement."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    if norm < 1e-3 * a.size:
        # Nothing to see in one of them: agreement is neither shown nor refuted where both are flat.
        return 1.0 if float(np.abs(a).max()) < 2 and float(np.abs(b).max()) < 2 else 0.0
    value = float((a * b).sum()) / norm
    return value if value >= 0 else -NEGATIVE * value


def believed(
    claims: Sequence[Affine], image: Image.Image, result: Image.Image, *, direct: bool = True
) -> Affine | None:
    """The first claim that the pixels bear out, else a symmetry or a part of the frame that they prove, else None.

    Args:
        claims: maps from result to input, best first.
        image: the input, RGB.
        result: the result, RGB.
        direct: the first claim was followed from the input to the result; else it is a guess, and the pixels are asked
            first where the result lies.
    """
    comparison = Comparison(image, result)
    if not direct and not (claims and comparison.is_exact(claims[0])):
        place = located(image, result)
        if place is not None and comparison.score(place) > max(0.9, *map(comparison.score, claims[:1])):
            return place
    tried: list[tuple[float, Affine]] = []
    for claim in claims:
        if abs(claim.a * claim.e - claim.b * claim.d) < 1e-9:
            continue
        score = comparison.score(claim)
        if score < MIN_CORRELATION:
            continue
        if score > PROVEN:
            return claim
        best, other = score, claim
        for rival in _rivals(claim, result.size):
            value = comparison.score(rival)
            if value > best + MARGIN:
                best, other = value, rival
        if other is claim:
            if score > 0.9 or not tried:
                tried.append((score, claim))
            if score > 0.9:
                return claim
        elif best > 0.9:
            tried.append((best - 0.1, other))
    frame = [claim for claim in _frame_turns(image.size, result.size) if claim not in claims]
    tried += [(score - MARGIN, claim) for claim in frame if (score := comparison.score(claim)) > 0.9]
    best_score, best_claim = max(tried, key=lambda pair: pair[0], default=(0.0, None))
    if best_score <= 0.9:
        # Nothing, or something weak: perhaps the trace lost its way, and the result is a plain part of the input.
        place = located(image, result)
        if place is not None and comparison.score(place) > 0.9:
            return place
    return best_claim


def _rivals(claim: Affine, output: tuple[int, int]) -> list[Affine]:
    """The claim's box under the seven other symmetries (turns within the result's own frame)."""
    width, height = output
    rivals = []
    for name in SYMMETRIES[1:]:
        symmetry = turn(name, width, height)
        if name in ("rotate_90", "rotate_270", "transpose", "transverse"):
            # The turned frame is stretched back onto this one, so that it shows the same part of the input.
            symmetry = compose(symmetry, Affine(height / width, 0, 0, 0, width / height, 0))
        rivals.append(compose(claim, symmetry))
    return rivals


def _frame_turns(size: tuple[int, int], output: tuple[int, int]) -> list[Affine]:
    maps = []
    for name in SYMMETRIES:
        turned = size if name not in ("rotate_90", "rotate_270", "transpose", "transverse") else (size[1], size[0])
        back = Affine(turned[0] / output[0], 0, 0, 0, turned[1] / output[1], 0)
        maps.append(compose(turn(name, *size), back))
    return maps
