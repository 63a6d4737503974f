"""The frame of a file's boxes: pixels of the image as given, or of the upright image before its transform.

There are three kinds of evidence, the strongest first: a box that lies inside the image in one frame only; the number
of edges at the two places (a box is drawn around something); and the shape of boxes on images turned by a quarter,
which are tall in the given frame if boxes on other images are wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

import numpy as np
from PIL import Image

from cv_lightning.data.boxes import is_fraction, is_inside
from cv_lightning.images import iou
from cv_lightning.orientations import QUARTER_TURNS, orientations_of, turn_box, turned_size
from cv_lightning.types import Box

Frame = Literal["given", "upright", "unknown"]

SAME_PLACE_IOU = 0.5
"""IoU above which the two frames give about the same place, so that its content is not evidence."""
CLEAR_RATIO = 10
"""Ratio of rows for one frame to rows for the other at which the image's bounds decide."""
CLEAR_P = 0.01
"""p-value of the two-sided sign test below which the content decides."""
SHAPE_ROWS = 20
"""Number of boxes on turned and on other images, each, that a comparison of shapes needs."""
SHAPE_LOG_RATIO = 0.2
"""Median |log(width / height)| below which boxes are about square, so that their shape is not evidence."""


@dataclass(frozen=True, slots=True)
class FrameEvidence:
    """Evidence of one row with a box."""

    turned: bool
    """The image was turned or flipped."""
    swapped: bool
    """The turns exchanged its width and height."""
    inside_given: bool
    inside_upright: bool
    log_ratio: float
    """log(width / height) of the box in the file."""
    edges: int = 0
    """1: more edges at the place in the given frame, -1: in the upright frame, 0: undecided."""
    fraction: bool = False
    """The whole box lies within 0..1."""


@dataclass(slots=True, kw_only=True)
class FrameVerdict:
    """The frame that fits a file's boxes."""

    fits: Frame
    reason: str
    counts: dict[str, int] = field(default_factory=dict)
    """Number of rows by evidence."""


def frame_evidence(
    box: Box, size: tuple[int, int], transforms: Sequence[str], pixels: Image.Image | None
) -> FrameEvidence | None:
    """Evidence of a row; None for a box without area.

    Args:
        box: The box in the file.
        size: (width, height) of the given image.
        transforms: Transforms that were applied to it.
        pixels: The given image, decoded; None: its content is not compared.
    """
    if box[2] <= box[0] or box[3] <= box[1]:
        return None
    log_ratio = math.log((box[2] - box[0]) / (box[3] - box[1]))
    turned = orientations_of(transforms)
    swapped = sum(name in QUARTER_TURNS for name in turned) % 2 == 1
    mapped = turn_box(box, turned, turned_size(size, turned))
    inside = is_inside(box, size), is_inside(mapped, size)
    edges = 0
    if all(inside) and turned and pixels is not None and iou(box, mapped) < SAME_PLACE_IOU:
        as_given, as_upright = _edge_density(pixels, box), _edge_density(pixels, mapped)
        edges = int(np.sign(round(as_given - as_upright, 3)))
    return FrameEvidence(bool(turned), swapped, *inside, log_ratio, edges, is_fraction(box, size))


def _edge_density(image: Image.Image, box: Box) -> float:
    """Mean absolute difference of adjacent pixels in a box, in grey levels."""
    left, top = (max(0, math.floor(edge)) for edge in box[:2])
    right, bottom = min(image.width, math.ceil(box[2])), min(image.height, math.ceil(box[3]))
    if right - left < 2 or bottom - top < 2:
        return 0.0
    grey = np.asarray(image.crop((left, top, right, bottom)).convert("L"), dtype=np.float32)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())


def judge_frame(evidence: Sequence[FrameEvidence]) -> FrameVerdict:
    """The frame of a file's boxes, from the evidence of its rows with a box."""
    given = sum(row.inside_given and not row.inside_upright for row in evidence)
    upright = sum(row.inside_upright and not row.inside_given for row in evidence)
    edges_given, edges_upright = (sum(row.edges == sign for row in evidence) for sign in (1, -1))
    counts = {
        "boxes": len(evidence),
        "on turned images": sum(row.turned for row in evidence),
        "inside as given only": given,
        "inside as upright only": upright,
        "within 0..1": sum(row.fraction for row in evidence),
        "inside in neither": sum(not row.inside_given and not row.inside_upright for row in evidence),
        "more edges as given": edges_given,
        "more edges as upright": edges_upright,
    }
    fits, reason = _decide(evidence, (given, upright), (edges_given, edges_upright))
    return FrameVerdict(fits=fits, reason=reason, counts=counts)


def _decide(evidence: Sequence[FrameEvidence], bounds: tuple[int, int], edges: tuple[int, int]) -> tuple[Frame, str]:
    if not evidence:
        return "unknown", "no row has a box"
    if fractions := sum(row.fraction for row in evidence):
        return "unknown", (
            f"{fractions} of {len(evidence)} boxes lie within 0..1: fractions of the image, where pixels are wanted. "
            "Multiply them by width and height; until then their rows are skipped"
        )
    if not any(row.turned for row in evidence):
        return "unknown", "no image with a box was turned or flipped: both frames are equal"
    if max(bounds) >= CLEAR_RATIO * max(1, min(bounds)) or (min(bounds) == 0 and max(bounds) >= 3):
        more, fewer = max(bounds), min(bounds)
        frame: Frame = "given" if bounds[0] > bounds[1] else "upright"
        return frame, f"{more} boxes lie inside their image only if {frame}, {fewer} only in the other frame"
    from scipy.stats import binomtest  # importing it takes half a second, which training never needs

    p = binomtest(edges[0], sum(edges)).pvalue if sum(edges) else 1.0
    if p < CLEAR_P:
        frame = "given" if edges[0] > edges[1] else "upright"
        return frame, (
            f"of {sum(edges)} boxes that the frames put at different places, {max(edges)} have more edges in them if "
            f"{frame} (sign test p = {p:.1e})"
        )
    turned = [row.log_ratio for row in evidence if row.swapped]
    others = [row.log_ratio for row in evidence if not row.swapped]
    if min(len(turned), len(others)) >= SHAPE_ROWS:
        a, b = median(turned), median(others)
        if min(abs(a), abs(b)) > SHAPE_LOG_RATIO:
            frame = "upright" if a * b > 0 else "given"
            shapes = f"{math.exp(a):.2f} on images turned by a quarter, {math.exp(b):.2f} on others"
            return frame, f"boxes' width over height (median): {shapes}"
    return "unknown", f"too little evidence: bounds {bounds[0]} to {bounds[1]}, edges {edges[0]} to {edges[1]}"
