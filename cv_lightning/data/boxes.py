"""The box of a row: what is accepted as a box, and where it may lie."""

from __future__ import annotations

import json
import math
from typing import Any

from cv_lightning.data.rows import RowError, is_missing
from cv_lightning.types import Box

BOX_SLACK_PX = 1.0
"""Boxes may reach this far outside the image (rounding in data sets); they are clipped."""


def parse_box(value: Any, key: str) -> Box | None:
    """Four finite numbers x1, y1, x2, y2 in any frame; None if there is no box.

    Args:
        value: A list of four numbers, a list of one such list, JSON text of either, or four numbers as text.
        key: Name of the cell in messages.

    Raises:
        RowError: The value is not four finite numbers.
    """
    edges = _numbers_of(value) if isinstance(value, str) else value
    if isinstance(edges, list) and len(edges) == 1 and isinstance(edges[0], list):
        edges = edges[0]
    if is_missing(edges) or (isinstance(edges, list) and all(edge is None for edge in edges)):
        return None
    try:
        x1, y1, x2, y2 = (float(edge) for edge in edges)
    except (TypeError, ValueError) as error:
        raise RowError("box", f"{key} {value} is not four numbers [x1, y1, x2, y2]") from error
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise RowError("box", f"{key} {value}: numbers must be finite")
    return x1, y1, x2, y2


def _numbers_of(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.strip().strip("[]()").replace(",", " ").split()


def is_fraction(box: Box, size: tuple[int, int]) -> bool:
    """True if a box covers less than a pixel of an image that has many: its numbers are fractions of the sides."""
    return max(box) <= 1 and min(box) >= 0 and min(size) > 2


def is_inside(box: Box, size: tuple[int, int]) -> bool:
    """True if a box has an area inside an image of this size; it may reach outside by `BOX_SLACK_PX`."""
    width, height = size
    inside = min(box[:2]) >= -BOX_SLACK_PX and box[2] <= width + BOX_SLACK_PX and box[3] <= height + BOX_SLACK_PX
    left, top, right, bottom = clip_box(box, size)
    return inside and left < right and top < bottom


def fit_box(box: Box, size: tuple[int, int], given: str, hint: str = "") -> Box:
    """The part of a box that lies inside its image.

    Args:
        box: A box in pixels of the image.
        size: (width, height) of the image.
        given: Key and value, for the message.
        hint: Advice at the end of the message.

    Raises:
        RowError: The box is inverted, or outside the image by more than `BOX_SLACK_PX`.
    """
    if not is_inside(box, size):
        raise RowError("box", f"{given} is inverted or outside its {size[0]}x{size[1]} image{hint}")
    return clip_box(box, size)


def clip_box(box: Box, size: tuple[int, int]) -> Box:
    """The part of a box that lies inside an image of this size (width, height)."""
    return max(0.0, box[0]), max(0.0, box[1]), min(float(size[0]), box[2]), min(float(size[1]), box[3])
