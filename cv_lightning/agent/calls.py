"""One tool call on the background thread: run it, then resize its image for the model."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from cv_lightning.images import content_hash
from cv_lightning.tools import Tool, ToolContext
from cv_lightning.types import ImageError, ToolCall, ToolImage, ToolResult, ToolStatus, TrajectoryImage


class ImageSizer(Protocol):
    """Resizes images for the model, as the agent's `DialogueEncoder` does."""

    def model_image(self, image: Image.Image) -> Image.Image:
        """The image as the model sees it.

        Raises:
            ImageError: The model cannot see such an image.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOutcome:
    """Result of one call, prepared for the dialogue."""

    result: ToolResult
    model_image: Image.Image | None = None
    """The result's image at model size; None if there is no image, or it cannot be shown."""
    not_shown: str = ""
    """Why the result's image cannot be shown; the model reads it."""
    elapsed_s: float = 0.0
    """Time of the call in seconds."""


async def run_call(tool: Tool, call: ToolCall, context: ToolContext, encoder: ImageSizer) -> ToolOutcome:
    """Run a call, and resize and hash its image, off the thread that owns the engine.

    Args:
        tool: The tool that `call` names.
        call: The call; its arguments fit the tool's schema.
        context: The trajectory.
        encoder: Resizes images for the model.

    Raises:
        ValueError: The tool returned more than one image, or one of no trajectory image.
    """
    begun = time.perf_counter()
    result = await tool.call(call.arguments, context)
    if len(result.images) > 1 or any(not 0 <= made.parent < len(context.images) for made in result.images):
        parents = [made.parent for made in result.images]
        raise ValueError(
            f"tool {tool.name!r} returned {len(parents)} images, made from {parents}; the agent shows one image per "
            f"call, made from one of the {len(context.images)} before it"
        )
    seen, not_shown = None, ""
    for made in result.images:
        try:
            seen = await asyncio.to_thread(_prepare, encoder, made.image)
        except ImageError as error:
            not_shown = str(error)
    elapsed = time.perf_counter() - begun
    return ToolOutcome(result=result, model_image=seen, not_shown=not_shown, elapsed_s=elapsed)


def _prepare(encoder: ImageSizer, image: Image.Image) -> Image.Image:
    seen = encoder.model_image(image)
    content_hash(seen)  # computed here, known to the thread that owns the engine
    return seen


def failed_call(reason: BaseException | str) -> ToolOutcome:
    """The outcome of a call whose tool failed."""
    kind = "lost" if isinstance(reason, str) else type(reason).__name__
    text = str(reason) or kind
    return ToolOutcome(result=ToolResult(status=ToolStatus.INFRASTRUCTURE_ERROR, error=text, error_kind=kind))


def trajectory_image(images: list[TrajectoryImage], made: ToolImage, model_image: Image.Image) -> TrajectoryImage:
    """The trajectory's record of an image that a call made.

    Args:
        images: Earlier images of the trajectory.
        made: The call's image.
        model_image: The same image at model size.
    """
    return TrajectoryImage(
        original=made.image,
        model_image=model_image,
        source=images[made.parent].source,
        parent=made.parent,
        to_source=made.to_source,
    )
