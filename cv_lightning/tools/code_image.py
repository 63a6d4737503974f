"""The code tool: runs Python code of the policy in the sandbox, on one image of the trajectory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cv_lightning.images import compose
from cv_lightning.sandbox.effect import shows
from cv_lightning.tools.base import Tool, ToolContext
from cv_lightning.types import Affine, SandboxResult, ToolCall, ToolImage, ToolResult, TrajectoryImage

PARAMETERS = {
    "type": "object",
    "properties": {
        "code": {
            "type": "string",
            "contentMediaType": "text/x-python",
            "pattern": r"\S",
            "description": "Python. The chosen image is in scope as `image` (a Pillow image at full resolution); so "
            "are `Image`, `ImageOps`, `ImageEnhance`, `ImageFilter`, `ImageDraw`, `np`, `cv2` and `math`. Put the new "
            "image into `result`.",
            "examples": ["result = image.rotate(90, expand=True)"],
        },
        "image_index": {
            "type": "integer",
            "default": 0,
            "description": "which image the code works on. 0 is the first image; every image that the tool returns "
            "gets the next number.",
        },
        "description": {"type": "string", "default": "", "description": "what the code is for."},
    },
    "required": ["code", "image_index"],
}


class CodeTool(Tool):
    """Runs a snippet that edits an image and shows its `result`."""

    name = "code_image_tool"
    description = "runs Python on one of the images of this conversation and shows you the image it makes."
    opening = (
        "You may look closer: write Python that edits an image, run it with the tool below, and look at the result "
        "before you answer."
    )
    hints = (
        "If the image lies on its side, stands on its head or is mirrored, put it upright first. `rotate` turns "
        "counter-clockwise.",
        "If what matters is too small to read, crop to it. Use the tool only where it helps.",
    )
    parameters = PARAMETERS

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> ToolResult:
        """Run the snippet and locate its result in the source image; see `Tool.call`."""
        index = arguments["image_index"]
        result = await context.sandbox.run(context.images[index].original, arguments["code"], owner=context.owner)
        if result.image is None:
            return result
        to_source = await asyncio.to_thread(map_to_source, context.images, index, result)
        return replace(result, images=(ToolImage(image=result.image, parent=index, to_source=to_source),))


DEFAULT_TOOLS = (CodeTool(),)
"""The tools if the config names none."""


def code_call(code: str, image_index: int = 0, description: str = "") -> ToolCall:
    """A call of the code tool."""
    arguments = {"code": code, "image_index": image_index, "description": description}
    return ToolCall(name=CodeTool.name, arguments=arguments)


def map_to_source(images: Sequence[TrajectoryImage], index: int, result: SandboxResult) -> Affine | None:
    """Map from a result to the source image if the pixels of both prove it, else None.

    The sandbox compares the result of a call with the call's input. Small losses of several calls add up, so the result
    of a later call is compared with the source image too.

    Args:
        images: Images of the trajectory so far.
        index: Index of the call's input.
        result: The call's result; it has an image.
    """
    parent = images[index]
    to_input = result.effect.to_input if result.effect is not None else None
    if to_input is None or parent.to_source is None or result.image is None:
        return None
    to_source = compose(parent.to_source, to_input)
    if parent.parent is None:
        return to_source
    source = next(image for image in images if image.parent is None and image.source == parent.source)
    return to_source if shows(to_source, source.original, result.image) else None
