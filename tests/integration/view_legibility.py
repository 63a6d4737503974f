"""How legible a view is: block by block beside the honest view, and to a classifier of digits.

Nothing here uses the sandbox's own proof: blocks, correlation and classifier are measured independently of it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image
from sklearn.svm import SVC
from view_programs import TRAIN_DIGITS, Scene, scans

from cv_lightning.images import ImageLimits, compose, invert, map_box, to_model_image
from cv_lightning.rewards.geometry import Frame
from cv_lightning.types import Affine, Box

LIMITS = ImageLimits(factor=28, min_pixels=56 * 56, max_pixels=1024 * 1024)
"""What the model may see."""
BLOCK = 16
MIN_TEXT = 0.3
"""Standard deviation of a block that bears text, in ranges of its digit's grey levels: at least a tenth is ink."""
LEGIBLE = 0.75
"""Least correlation of such a block with the honest view. Honest changes of contrast, brightness and sharpness stay
above 0.9; what is below, as equalisation of a scene with large flat parts, loses strokes, and then digits."""
SIDE = 20


@dataclass(frozen=True)
class Legibility:
    """What a view shows of the digits."""

    correlation: float
    """Least over the blocks that bear text; 1 where there is none."""
    read: int
    """Digits that the classifier reads in it."""
    read_honest: int
    """Digits that it reads in the honest view."""
    digits: int


# ------------------------------------------------------------------------------------------------ classifier
def _features(grey: np.ndarray) -> np.ndarray:
    small = cv2.resize(grey.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    small -= np.median(np.concatenate([small[0], small[-1], small[:, 0], small[:, -1]]))
    small *= np.sign(small.sum()) or 1.0  # ink is bright, whatever it was
    return (small / max(4.0, float(small.std()))).ravel()


@functools.cache
def classifier() -> SVC:
    """Reads a digit of any polarity; trained on scans that no scene shows, sharp and somewhat blurred."""
    rng = np.random.default_rng(0)
    images, labels = scans()
    rows, targets = [], []
    for index in range(TRAIN_DIGITS):
        big = cv2.resize(images[index].astype(np.float32) * 16, (40, 40), interpolation=cv2.INTER_CUBIC)
        for _ in range(2):
            shift = np.float32([[1, 0, rng.uniform(-2, 2)], [0, 1, rng.uniform(-2, 2)]])
            moved = cv2.warpAffine(big, shift, (40, 40))
            rows.append(_features(cv2.GaussianBlur(moved, (0, 0), rng.uniform(0.3, 2))))
            targets.append(labels[index])
    return SVC(C=10, gamma=0.002).fit(np.stack(rows), targets)


# ------------------------------------------------------------------------------------------------ views
def _drawn(scene: Scene, to_source: Affine, size: tuple[int, int]) -> Image.Image:
    """The honest view by a map at a size, drawn at twice the size and reduced."""
    fine = compose(to_source, Affine(0.5, 0, 0, 0, 0.5, 0))
    drawn = scene.image.transform((2 * size[0], 2 * size[1]), Image.Transform.AFFINE, fine, Image.Resampling.BICUBIC)
    return drawn.resize(size, Image.Resampling.BOX)


def legibility(scene: Scene, image: Image.Image, to_source: Affine, shown: Box | None = None) -> Legibility:
    """Legibility of a result as the model sees it.

    The honest view shows the same part of the source, turned the same way, in the source's own pixels as far as the
    model may see them.

    Args:
        scene: what was given.
        image: the result, at its own size.
        to_source: from its coordinates to those of the image as given.
        shown: part of the result that shows the source, in its pixels; None: all that lies inside.
    """
    seen = to_model_image(image, LIMITS)
    ratio = seen.width / image.width, seen.height / image.height
    whole = 0.0, 0.0, float(image.width), float(image.height)
    extent = map_box(invert(to_source), Frame(*scene.image.size).clip(map_box(to_source, shown or whole)))
    box = max(0.0, extent[0]), max(0.0, extent[1]), min(whole[2], extent[2]), min(whole[3], extent[3])
    scale = abs(to_source.a) + abs(to_source.d), abs(to_source.b) + abs(to_source.e)
    native = max(1, round((box[2] - box[0]) * scale[0])), max(1, round((box[3] - box[1]) * scale[1]))
    size = LIMITS.model_size(*native)
    part = seen.resize(size, Image.Resampling.BICUBIC, box=tuple(v * ratio[i % 2] for i, v in enumerate(box)))
    grey = np.asarray(part.convert("L"), np.float32)
    local = Affine((box[2] - box[0]) / size[0], 0, box[0], 0, (box[3] - box[1]) / size[1], box[1])
    local = compose(to_source, local)
    honest = np.asarray(_drawn(scene, local, size).convert("L"), np.float32)
    glyphs = [(glyph.label, _inside(map_box(invert(local), glyph.box), size)) for glyph in scene.glyphs]
    known = [(label, box) for label, box in glyphs if box is not None]
    worst = min((_worst_block(honest, grey, box) for _, box in known), default=1.0)
    return Legibility(worst, _read(grey, known), _read(honest, known), len(known))


def _inside(box: tuple[float, ...], size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """A digit's box in whole pixels, None where not all of it is shown."""
    left, top, right, bottom = (round(v) for v in box)
    if left < -1 or top < -1 or right > size[0] + 1 or bottom > size[1] + 1 or min(right - left, bottom - top) < 4:
        return None
    return max(0, left), max(0, top), min(size[0], right), min(size[1], bottom)


def _worst_block(honest: np.ndarray, shown: np.ndarray, box: tuple[int, int, int, int]) -> float:
    left, top, right, bottom = box
    worst, least = 1.0, MIN_TEXT * float(np.ptp(honest[top:bottom, left:right]))
    for y in range(top, max(top + 1, bottom - BLOCK + 1), BLOCK // 2):
        for x in range(left, max(left + 1, right - BLOCK + 1), BLOCK // 2):
            a, b = honest[y : y + BLOCK, x : x + BLOCK], shown[y : y + BLOCK, x : x + BLOCK]
            if a.std() >= max(1.0, least):
                covariance = float(((a - a.mean()) * (b - b.mean())).mean())
                worst = min(worst, abs(covariance) / float(a.std() * b.std() + 1e-3))
    return worst


def _read(grey: np.ndarray, glyphs: list[tuple[int, tuple[int, int, int, int]]]) -> int:
    if not glyphs:
        return 0
    rows = [_features(grey[top:bottom, left:right]) for _, (left, top, right, bottom) in glyphs]
    return int((classifier().predict(np.stack(rows)) == [label for label, _ in glyphs]).sum())
