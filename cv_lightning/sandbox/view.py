"""Renders the parent's own view of an input by a map, without aliasing; images with their reductions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from PIL import Image

from cv_lightning.images import invert, map_box
from cv_lightning.sandbox.geometry import SIGNS, TRANSPOSES
from cv_lightning.types import Affine, Box

Array = np.ndarray[Any, Any]
Edges = tuple[int, int, int, int]
MAX_COMPARED = 1_200_000
"""Pixels of a result that are compared; a larger one is reduced by 2, 4, 8, .. first."""
MAX_COORDINATE = 1e6
"""Farthest that a corner of the input may lie from a result, in pixels of the result."""


@dataclass
class View:
    """The view of the input that a map claims for a result."""

    draw: Callable[[str], Image.Image]
    """Gives the pixels in a mode, L or RGB."""
    box: Edges
    """Part of the result that the view covers; the rest lies outside the input."""
    inside: Array | None
    """Height x width of bool: pixels that lie in the input; None: all."""

    @cached_property
    def grey(self) -> Array:
        """Height x width of float32: grey levels."""
        return grey_of(self.draw("L"))

    @cached_property
    def colours(self) -> Image.Image:
        """The pixels in RGB."""
        return self.draw("RGB")


@dataclass
class Pyramid:
    """An image and its reductions by powers of 2, each made once."""

    image: Image.Image
    views: dict[tuple[Affine, tuple[int, int]], View | None] = field(default_factory=dict)
    """Honest views of it that were rendered."""
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


def signs_of(claim: Affine) -> tuple[int, int, int, int]:
    """Signs of the linear part of a map (a, b, d, e); 0 for values that are negligible beside the others."""
    scale = max(abs(claim.a), abs(claim.b), abs(claim.d), abs(claim.e))
    a, b, d, e = (int(np.sign(v)) * (abs(v) > 1e-6 * scale) for v in (claim.a, claim.b, claim.d, claim.e))
    return a, b, d, e


def honest_view(image: Pyramid, claim: Affine, size: tuple[int, int]) -> View | None:
    """The parent's own view of the input by a map, without aliasing; None if it shows no part of the input."""
    key = claim, size
    if key not in image.views:
        draw = aligned_view if signs_of(claim) in SIGNS else _warped_view
        image.views[key] = draw(image, claim, size)
    return image.views[key]


def aligned_view(image: Pyramid, claim: Affine, size: tuple[int, int]) -> View | None:
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
    symmetry = SIGNS[signs_of(claim)]
    pixels = part if symmetry == "identity" else part.transpose(Image.Transpose(TRANSPOSES.index(symmetry)))
    return View(lambda mode: pixels if mode == "RGB" else pixels.convert(mode), (left, top, right, bottom), None)


def _scaled(image: Pyramid, source: Box, size: tuple[int, int]) -> Image.Image:
    """A part of the input at another size; reductions by whole factors are exact."""
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
    left, top, right, bottom = (edge * 0.5**number for edge in source)
    box = left, top, min(right, level.width), min(bottom, level.height)
    return level.resize(size, Image.Resampling.BILINEAR if step > 1 else Image.Resampling.BICUBIC, box=box)


def _warped_view(image: Pyramid, claim: Affine, size: tuple[int, int]) -> View | None:
    """View by any other map."""
    step = math.sqrt(abs(claim.a * claim.e - claim.b * claim.d))
    number = max(0, int(math.log2(max(1.0, step))))
    factor = float(1 << number)
    level = image.level(number)
    extent = map_box(claim, (0.0, 0.0, float(size[0]), float(size[1])))
    left, top = max(0, int(extent[0] / factor) - 2), max(0, int(extent[1] / factor) - 2)
    right = min(level.width, int(extent[2] / factor) + 3)
    bottom = min(level.height, int(extent[3] / factor) + 3)
    if right <= left or bottom <= top:
        return None
    box = left, top, right, bottom
    part = level if box == (0, 0, *level.size) else level.crop(box)
    a, b, d, e = (v / factor for v in (claim.a, claim.b, claim.d, claim.e))
    c, f = claim.c / factor - left, claim.f / factor - top
    # OpenCV counts from the centres of pixels.
    matrix = np.array([[a, b, c + 0.5 * (a + b) - 0.5], [d, e, f + 0.5 * (d + e) - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP

    def draw(mode: str) -> Image.Image:
        pixels = np.asarray(part if mode == "RGB" else part.convert(mode))
        return Image.fromarray(cv2.warpAffine(pixels, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE))

    inside = _drawn_extent(invert(claim), image.image.size, size)
    return View(draw, (0, 0, *size), inside) if inside.any() else None


def _drawn_extent(to_result: Affine, size: tuple[int, int], shown: tuple[int, int]) -> Array:
    """Height x width of bool: pixels of a result that lie in the input, without those that its edge crosses.

    All False where the input would be enlarged beyond `MAX_COORDINATE`.
    """
    width, height = size
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float64)
    linear = np.array([[to_result.a, to_result.b], [to_result.d, to_result.e]])
    points = corners @ linear.T + (to_result.c - 0.5, to_result.f - 0.5)
    if np.abs(points).max() > MAX_COORDINATE:
        return np.zeros((shown[1], shown[0]), bool)
    mask = np.zeros((shown[1] + 2, shown[0] + 2), np.uint8)
    # OpenCV also fills pixels that the edge touches; a frame of one pixel keeps the edge of the image itself.
    cv2.fillConvexPoly(mask, np.round((points + 1) * 256).astype(np.int32), 1, cv2.LINE_8, 8)
    return np.asarray(cv2.erode(mask, np.ones((3, 3), np.uint8))[1:-1, 1:-1] > 0)


def grey_of(image: Image.Image) -> Array:
    """Height x width of float32: grey levels of an image."""
    return np.asarray(image.convert("L"), np.float32)
