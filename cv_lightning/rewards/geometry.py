"""Boxes of the reward: what a crop shows of the source image, and its score. Pure functions.

Boxes are (x1, y1, x2, y2) in pixels of the task's first image as given.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from cv_lightning.images import area, intersection, iou, map_box
from cv_lightning.types import Box, TrajectoryImage

CropCredit = Literal["iou", "coverage"]
MIN_COVERED = 0.9
"""Fraction of the ground-truth box that a crop must show for full credit by coverage."""
MAX_AREA_RATIO = 6.0
"""Largest area of a crop with full credit by coverage, in areas of the ground-truth box."""
MAX_LOOSE_CREDIT = 0.5
"""Most that a crop without full credit by coverage earns."""
WHOLE_FRAME = 0.98
"""An image that shows this fraction of its source image is not a crop."""
MAX_FRAME_FRACTION = 0.5
"""A crop of more than this fraction of its source image gets full credit by coverage only up to 1.5 boxes of area."""


class Frame(NamedTuple):
    """Size in pixels of the image that boxes refer to."""

    width: int
    height: int

    @property
    def area(self) -> float:
        """Square pixels."""
        return float(self.width * self.height)

    @property
    def box(self) -> Box:
        """The whole frame."""
        return 0.0, 0.0, float(self.width), float(self.height)

    def clip(self, box: Box) -> Box:
        """Part of a box inside the frame."""
        x1, y1, x2, y2 = box
        return max(0.0, x1), max(0.0, y1), min(float(self.width), x2), min(float(self.height), y2)

    def is_cropped_to(self, box: Box) -> bool:
        """True if a box shows a part of the frame, neither all of it nor nothing."""
        return 0 < area(box) < WHOLE_FRAME * self.area


def source_extent(image: TrajectoryImage, frame: Frame, part: Box | None = None) -> Box | None:
    """Part of the source image that an image shows; None where the map between them is unknown.

    An image turned by another angle than a right one counts as its bounding box.

    Args:
        image: Any image of a trajectory.
        frame: Size of its source image.
        part: Part of the image that shows the source, in its own pixels; None: all of it.
    """
    if image.to_source is None:
        return None
    width, height = image.original.size
    return frame.clip(map_box(image.to_source, part or (0.0, 0.0, float(width), float(height))))


def density(image: TrajectoryImage) -> float:
    """Pixels of an image, at its own size, for each pixel of the source that it shows; its map is known."""
    assert image.to_source is not None
    a, b, _, d, e, _ = image.to_source
    return 1.0 / abs(a * e - b * d) if a * e != b * d else math.inf


def shows(crop: Box, evidence: Box) -> bool:
    """True if a crop contains at least `MIN_COVERED` of the evidence's box; both in source pixels."""
    return intersection(crop, evidence) >= MIN_COVERED * area(evidence)


def crop_credit(box: Box, truth: Box, frame: Frame, kind: CropCredit) -> float:
    """Score of a crop, in [0, 1].

    Args:
        box: Part of the source image that is shown.
        truth: Ground-truth box.
        frame: Size of the source image.
        kind: `iou` (paper and released code); `coverage`: 1 for a crop that shows `MIN_COVERED` of the box within
            `MAX_AREA_RATIO` times its area, else at most `MAX_LOOSE_CREDIT`. Coverage suits policies that crop on a
            grid: reading needs the whole box, not a tight one.
    """
    overlap = iou(box, truth)
    if kind == "iou":
        return overlap
    shown, wanted = area(box), area(truth)
    small = shown <= MAX_AREA_RATIO * wanted and (shown <= MAX_FRAME_FRACTION * frame.area or shown <= 1.5 * wanted)
    return 1.0 if shows(box, truth) and small else min(MAX_LOOSE_CREDIT, overlap)
