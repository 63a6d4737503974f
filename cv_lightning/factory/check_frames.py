"""Which frame the boxes of a file are in: pixels of the image as given, or of the upright one before its transform.

Three kinds of evidence, the strongest first: a box that lies inside the picture in one frame only; the place of the two
with more edges in it (a box is drawn around something); and the shape of boxes on pictures turned by a quarter, which
are tall and thin in the given frame where boxes elsewhere are wide.
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
"""Above this the two frames put a box at about the same place, and its content tells nothing."""
CLEAR_RATIO = 10
"""So many times as many rows must speak for one frame as for the other where the picture's bounds decide."""
CLEAR_P = 0.01
"""Two-sided sign test below which the content decides."""
SHAPE_ROWS = 20
"""Boxes on turned and on other pictures, each, below which shapes are not compared."""
SHAPE_LOG_RATIO = 0.2
"""Median |log(width / height)| below which boxes are about square, and their shape tells nothing."""


@dataclass(frozen=True, slots=True)
class FrameEvidence:
    """What one row with a box says."""

    swapped: bool
    """Width and height of the picture were exchanged by its turns."""
    inside_given: bool
    inside_upright: bool
    log_ratio: float
    """log(width / height) of the box as written."""
    edges: int = 0
    """1: more edges where the given frame puts the box, -1: where the upright one does, 0: cannot be told."""
    fraction: bool = False
    """All of the box lies within 0..1."""


@dataclass(slots=True, kw_only=True)
class FrameVerdict:
    """Which frame fits a file."""

    fits: Frame
    reason: str
    counts: dict[str, int] = field(default_factory=dict)
    """Rows by what they say."""


def frame_evidence(
    box: Box, size: tuple[int, int], transforms: Sequence[str], pixels: Image.Image | None
) -> FrameEvidence | None:
    """What a row says; None where a box has no shape.

    Args:
        box: as written in the row.
        size: (width, height) of the given image.
        transforms: what was done to it.
        pixels: the given image, decoded; None: its content is not looked at.
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
    return FrameEvidence(swapped, *inside, log_ratio, edges, is_fraction(box, size))


def _edge_density(image: Image.Image, box: Box) -> float:
    """Mean absolute difference of neighbouring pixels in a box, in grey levels."""
    left, top = (max(0, math.floor(edge)) for edge in box[:2])
    right, bottom = min(image.width, math.ceil(box[2])), min(image.height, math.ceil(box[3]))
    if right - left < 2 or bottom - top < 2:
        return 0.0
    grey = np.asarray(image.crop((left, top, right, bottom)).convert("L"), dtype=np.float32)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())


def sign_test(for_one: int, for_other: int) -> float:
    """Two-sided p-value of a count against another under an even chance."""
    total, least = for_one + for_other, min(for_one, for_other)
    if total == 0:
        return 1.0
    if total > 1000:  # the normal approximation, with the continuity correction
        return math.erfc(max(0, abs(for_one - for_other) - 1) / math.sqrt(2 * total))
    tail: float = sum(math.comb(total, k) for k in range(least + 1)) / 2**total
    return min(1.0, 2 * tail)


def judge_frame(evidence: Sequence[FrameEvidence], num_turned_boxes: int) -> FrameVerdict:
    """The frame that a file's boxes are in.

    Args:
        evidence: of its rows with a box.
        num_turned_boxes: of these, on a picture that was turned or flipped.
    """
    given = sum(row.inside_given and not row.inside_upright for row in evidence)
    upright = sum(row.inside_upright and not row.inside_given for row in evidence)
    edges_given, edges_upright = (sum(row.edges == sign for row in evidence) for sign in (1, -1))
    counts = {
        "boxes": len(evidence),
        "on turned pictures": num_turned_boxes,
        "inside as given only": given,
        "inside as upright only": upright,
        "within 0..1": sum(row.fraction for row in evidence),
        "inside in neither": sum(not row.inside_given and not row.inside_upright for row in evidence),
        "more edges as given": edges_given,
        "more edges as upright": edges_upright,
    }
    fits, reason = _decide(evidence, num_turned_boxes, (given, upright), (edges_given, edges_upright))
    return FrameVerdict(fits=fits, reason=reason, counts=counts)


def _decide(
    evidence: Sequence[FrameEvidence], num_turned: int, bounds: tuple[int, int], edges: tuple[int, int]
) -> tuple[Frame, str]:
    if not evidence:
        return "unknown", "no row has a box"
    if fractions := sum(row.fraction for row in evidence):
        return "unknown", (
            f"{fractions} of {len(evidence)} boxes lie within 0..1: fractions of the image, where pixels are wanted. "
            "Multiply them by width and height; until then their rows are skipped"
        )
    if not num_turned:
        return "unknown", "no image with a box was turned or flipped: both frames are the same"
    if max(bounds) >= CLEAR_RATIO * max(1, min(bounds)) or (min(bounds) == 0 and max(bounds) >= 3):
        more, fewer = max(bounds), min(bounds)
        frame: Frame = "given" if bounds[0] > bounds[1] else "upright"
        return frame, f"{more} boxes lie inside their image only if {frame}, {fewer} only in the other frame"
    p = sign_test(*edges)
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
