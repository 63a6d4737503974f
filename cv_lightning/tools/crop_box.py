"""The crop tool: cuts a box out of one image of the trajectory, for policies that crop without writing code."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from cv_lightning.tools.base import Tool, ToolContext
from cv_lightning.types import Affine, Box, Effect, Operation, ToolResult, ToolStatus, TrajectoryImage

MAX_OUTSIDE = 0.1
"""Fraction of a side by which a box may stick out of the image; it is cut to the image."""
PARAMETERS = {
    "type": "object",
    "properties": {
        "box": {
            "type": "array",
            "items": {"type": "number"},
            "minItems": 4,
            "maxItems": 4,
            "description": "[x1, y1, x2, y2]: left, top, right and bottom edge, in the size or range of "
            "coordinates that is stated for the image.",
            "examples": [[10, 20, 110, 90]],
        },
        "image_index": {"type": "integer", "default": 0, "description": "which image to crop; 0 is the first."},
        "label": {"type": "string", "default": "", "maxLength": 200, "description": "what is in the box."},
    },
    "required": ["box", "image_index"],
}


class CropBoxTool(Tool):
    """Cuts a box out of an image and shows it at full resolution."""

    name = "crop_box"
    description = "cuts a box out of one of the images of this conversation and shows it to you at full resolution."
    hints = ("If what matters is too small to read, crop to it.",)
    parameters = PARAMETERS

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> ToolResult:
        """Crop to whole pixels, outwards; see `Tool.call`."""
        index = arguments["image_index"]
        parent = context.images[index]
        frame = _frame(parent, context)
        try:
            given = _inside([float(number) for number in arguments["box"]], frame)
        except (OverflowError, ValueError) as error:
            return ToolResult(status=ToolStatus.ERROR, error=str(error), error_kind="box")
        box = _pixels(given, frame, parent.original.size)
        x1, y1, x2, y2 = box
        crop, size = await asyncio.to_thread(parent.original.crop, box), parent.original.size
        moved = Affine(1.0, 0.0, float(x1), 0.0, 1.0, float(y1))
        is_crop = crop.size != size
        seen: Box | None = (float(x1), float(y1), float(x2), float(y2)) if is_crop else None
        effect = Effect(to_input=moved, core=("crop",) if is_crop else (), crop_box=seen)
        operation = Operation(
            name="crop", call=self.name, arguments={"box": list(box)}, input_size=size, output_size=crop.size
        )
        cut = "" if given == tuple(arguments["box"]) else f"The box was cut to the image: {_text(given)}."
        return ToolResult(
            text=cut,
            images=(context.derived(crop, index, moved),),
            operations=(operation,),
            effect=effect,
        )


def _frame(image: TrajectoryImage, context: ToolContext) -> tuple[float, float]:
    """Width and height of an image in the frame of the policy's coordinates."""
    if context.coordinates == "relative_1000":
        return 1000.0, 1000.0
    seen = image.model_image if context.coordinates == "model_px" else image.original
    return float(seen.width), float(seen.height)


def _inside(box: list[float], frame: tuple[float, float]) -> Box:
    """The part of a box inside the image, in the frame of the policy's coordinates.

    Raises:
        ValueError: The box is not one, or lies too far outside; the policy reads the message.
    """
    (x1, y1, x2, y2), (width, height) = box, frame
    if not all(map(math.isfinite, box)):
        raise ValueError("box: all four numbers must be finite")
    if not (x1 < x2 and y1 < y2):
        raise ValueError(f"box {_text(box)} is empty: it is [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
    far_x, far_y = MAX_OUTSIDE * width, MAX_OUTSIDE * height
    inside = max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)
    is_near = min(x1 + far_x, y1 + far_y, width + far_x - x2, height + far_y - y2) >= 0
    if not is_near or inside[0] >= inside[2] or inside[1] >= inside[3]:
        limits = f"x from 0 to {width:.0f} and y from 0 to {height:.0f}"
        raise ValueError(f"box {_text(box)} is outside the image, in which coordinates run {limits}")
    return inside


def _pixels(box: Box, frame: tuple[float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The whole pixels that a box touches."""
    scale_x, scale_y = size[0] / frame[0], size[1] / frame[1]
    x1, y1 = math.floor(box[0] * scale_x + 1e-6), math.floor(box[1] * scale_y + 1e-6)
    x2, y2 = math.ceil(box[2] * scale_x - 1e-6), math.ceil(box[3] * scale_y - 1e-6)
    x1, y1 = min(x1, size[0] - 1), min(y1, size[1] - 1)
    return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)


def _text(box: list[float] | Box) -> str:
    return f"[{', '.join(f'{number:.6g}' for number in box)}]"
