"""The code tool: runs Python code of the policy in the sandbox, on one image of the trajectory.

It has two forms. With text, what the code prints and several images reach the policy; without, one image alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from PIL import Image

from cv_lightning.images import compose
from cv_lightning.ranges import Range, check_ranges
from cv_lightning.sandbox.effect import shows
from cv_lightning.sandbox.wire import MAX_SHOWN
from cv_lightning.tools.base import Tool, ToolContext
from cv_lightning.types import Affine, Effect, SandboxResult, ToolCall, ToolImage, ToolResult, TrajectoryImage

CODE = (
    "Python. The chosen image is in scope as `image` (a Pillow image at full resolution); so are `Image`, `ImageOps`, "
    "`ImageEnhance`, `ImageFilter`, `ImageDraw`, `np`, `cv2` and `math`. "
)
IMAGE_ONLY = "Put the new image into `result`."
WITH_TEXT = (
    "You read what the code prints and the value of its last expression. Put the new image into `result`, or call "
    "`show(image)` for each image that you want to see, {} at most."
)


def parameters(how: str) -> dict[str, Any]:
    """The schema of the arguments.

    Args:
        how: The end of the description of `code`: how images and text are returned.
    """
    return {
        "type": "object",
        "properties": {
            "code": {
                "type": "string",
                "contentMediaType": "text/x-python",
                "pattern": r"\S",
                "description": CODE + how,
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
    """Runs a snippet that edits or measures an image, and shows what it prints and the images that it makes."""

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

    def __init__(
        self,
        text: bool = True,
        max_text_tokens: Annotated[int, Range(at_least=64)] = 1024,
        max_images: Annotated[int, Range(at_least=1, at_most=MAX_SHOWN)] = 4,
    ) -> None:
        """Choose the form.

        Args:
            text: Return what the code prints, the value of its last expression and several images. False: one image,
                and what is printed is thrown away.
            max_text_tokens: Tokens of printed text that the policy reads; the middle of a longer text is cut out.
            max_images: Images that one call may show, with text.

        Raises:
            ValueError: A limit is not possible.
        """
        check_ranges(CodeTool.__init__, "rollout.agent.tools", locals())
        self.text, self.max_text_tokens, self.max_images = text, max_text_tokens, max_images if text else 1
        self.parameters = PARAMETERS
        if text:
            self.description = (
                "runs Python on one of the images of this conversation and shows you what it prints and makes."
            )
            self.parameters = parameters(WITH_TEXT.format(max_images))

    def __repr__(self) -> str:
        """Class and settings; see `Tool`."""
        settings = f"text=True, max_text_tokens={self.max_text_tokens}, max_images={self.max_images}"
        return f"{type(self).__module__}.{type(self).__qualname__}({settings if self.text else ''})"

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> ToolResult:
        """Run the snippet and locate its images in the source image; see `Tool.call`."""
        index, code = arguments["image_index"], arguments["code"]
        image, more = context.images[index].original, {"max_shown": self.max_images} if self.text else {}
        result = await context.sandbox.run(image, code, owner=context.owner, **more)
        if not result.made:
            return result
        maps = await asyncio.to_thread(_maps_to_source, context.images, index, result)
        pairs = zip(result.made, maps, strict=True)
        return replace(
            result, images=tuple(ToolImage(image=made, parent=index, to_source=map_) for made, map_ in pairs)
        )


PARAMETERS = parameters(IMAGE_ONLY)
"""Arguments of the tool without text."""
DEFAULT_TOOLS = (CodeTool(),)
"""The tools if the config names none."""


def code_call(code: str, image_index: int = 0, description: str = "") -> ToolCall:
    """A call of the code tool."""
    arguments = {"code": code, "image_index": image_index, "description": description}
    return ToolCall(name=CodeTool.name, arguments=arguments)


def _maps_to_source(images: Sequence[TrajectoryImage], index: int, result: SandboxResult) -> list[Affine | None]:
    pairs = zip(result.made, result.effects, strict=True)
    return [map_to_source(images, index, effect, made) for made, effect in pairs]


def map_to_source(
    images: Sequence[TrajectoryImage], index: int, effect: Effect | None, made: Image.Image
) -> Affine | None:
    """Map from an image that a call made to the source image if the pixels of both prove it, else None.

    The sandbox compares the result of a call with the call's input. Small losses of several calls add up, so the result
    of a later call is compared with the source image too.

    Args:
        images: Images of the trajectory so far.
        index: Index of the call's input.
        effect: Net effect of the call on the image.
        made: The image.
    """
    parent = images[index]
    to_input = effect.to_input if effect is not None else None
    if to_input is None or parent.to_source is None:
        return None
    to_source = compose(parent.to_source, to_input)
    if parent.parent is None:
        return to_source
    source = next(image for image in images if image.parent is None and image.source == parent.source)
    return to_source if shows(to_source, source.original, made) else None
