"""A user's tool, in a file outside the package: labelled grid lines over an image, to name places by."""

from __future__ import annotations

from typing import Any

from PIL import ImageDraw

from cv_lightning.tools import Tool, ToolContext
from cv_lightning.types import IDENTITY, Operation, ToolResult


class Grid(Tool):
    """Draws labelled grid lines over an image."""

    name = "grid"
    description = "draws labelled grid lines over an image and shows it to you."
    hints = ("To say where something is, put a grid over the image first.",)

    def __init__(self, color: str = "red") -> None:
        self.color = color
        columns = {"type": "integer", "minimum": 1, "maximum": 26, "description": "cells from left to right."}
        rows = {
            "type": "integer",
            "minimum": 1,
            "maximum": 26,
            "default": 4,
            "description": "cells from top down.",
        }
        image_index = {"type": "integer", "default": 0, "description": "which image to draw on; 0 is the first."}
        self.parameters = {
            "type": "object",
            "properties": {"columns": columns | {"examples": [4]}, "rows": rows, "image_index": image_index},
            "required": ["columns", "image_index"],
        }

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> ToolResult:
        """Draw on a copy; the place of every pixel stays the same, so that the map to the parent is the identity."""
        columns, rows, index = arguments["columns"], arguments["rows"], arguments["image_index"]
        image = context.images[index].original.copy()
        draw, (width, height) = ImageDraw.Draw(image), image.size
        for column in range(1, columns):
            draw.line([(column * width // columns, 0), (column * width // columns, height)], fill=self.color)
        for row in range(1, rows):
            draw.line([(0, row * height // rows), (width, row * height // rows)], fill=self.color)
        for cell in range(columns * rows):
            row, column = divmod(cell, columns)
            place = (column * width // columns + 2, row * height // rows + 1)
            draw.text(place, f"{chr(ord('A') + column)}{row + 1}", fill=self.color)
        return ToolResult(
            text=f"{columns} x {rows} cells, A1 at the top left.",
            images=(context.derived(image, index, IDENTITY),),
            operations=(Operation(name="grid", call="grid", arguments=arguments),),
        )
