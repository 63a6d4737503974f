"""One tool call on the background thread: run it, then make its image ready for the model."""

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
    """Knows at which size the model sees an image; the agent's dialogue encoder is one."""

    def model_image(self, image: Image.Image) -> Image.Image:
        """The image as the model sees it.

        Raises:
            ImageError: it cannot be shown.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOutcome:
    """What one call gave, with everything done that needs no engine."""

    result: ToolResult
    model_image: Image.Image | None = None
    """The result's image as the model is to see it; None where there is none, or it cannot be shown."""
    not_shown: str = ""
    """Why an image that the call made cannot be shown; for the model to read."""
    elapsed_s: float = 0.0
    """From the hand-over to here, queueing included."""


async def run_call(tool: Tool, call: ToolCall, context: ToolContext, encoder: ImageSizer) -> ToolOutcome:
    """Run a call, and resize and hash the image that it made, off the thread that owns the engine.

    Args:
        tool: The one that `call` names.
        call: Its arguments fit the tool's schema.
        context: The trajectory.
        encoder: Knows how the model sees images.

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


def lost(reason: BaseException | str) -> ToolOutcome:
    """The outcome of a call whose tool failed."""
    kind = "lost" if isinstance(reason, str) else type(reason).__name__
    text = str(reason) or kind
    return ToolOutcome(result=ToolResult(status=ToolStatus.INFRASTRUCTURE_ERROR, error=text, error_kind=kind))


def trajectory_image(images: list[TrajectoryImage], made: ToolImage, model_image: Image.Image) -> TrajectoryImage:
    """The image of a call as the trajectory keeps it.

    Args:
        images: Images of the trajectory before it.
        made: What the call made.
        model_image: The same as the model sees it.
    """
    return TrajectoryImage(
        original=made.image,
        model_image=model_image,
        source=images[made.parent].source,
        parent=made.parent,
        to_source=made.to_source,
    )
