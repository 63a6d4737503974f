"""One tool call on the background thread: run it, then resize its image for the model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    views: Sequence[Image.Image] = ()
    """The result's images at model size, in their order."""
    not_shown: str = ""
    """Why an image of the call cannot be shown; the model reads it. The result no longer has that image."""
    elapsed_s: float = 0.0
    """Time of the call in seconds."""


async def run_call(tool: Tool, call: ToolCall, context: ToolContext, encoder: ImageSizer) -> ToolOutcome:
    """Run a call, and resize and hash its images, off the thread that owns the engine.

    Args:
        tool: The tool that `call` names.
        call: The call; its arguments fit the tool's schema.
        context: The trajectory.
        encoder: Resizes images for the model.

    Raises:
        ValueError: The tool returned more images than it may, or one of no trajectory image.
    """
    begun = time.perf_counter()
    result = await tool.call(call.arguments, context)
    parents = [made.parent for made in result.images]
    if len(parents) > tool.max_images or any(not 0 <= parent < len(context.images) for parent in parents):
        raise ValueError(
            f"tool {tool.name!r} returned {len(parents)} images, made from {parents}; it may return {tool.max_images} "
            f"(Tool.max_images), made from the {len(context.images)} before them"
        )
    views, kept, not_shown = [], [], ""
    for number, made in enumerate(result.images):
        try:
            views.append(await asyncio.to_thread(_prepare, encoder, made.image))
            kept.append(number)
        except ImageError as error:
            not_shown = str(error)
    elapsed = time.perf_counter() - begun
    return ToolOutcome(result=_with_images(result, kept), views=views, not_shown=not_shown, elapsed_s=elapsed)


def _with_images(result: ToolResult, kept: Sequence[int]) -> ToolResult:
    """The result with only some of its images."""
    if len(kept) == len(result.images):
        return result
    images = tuple(result.images[number] for number in kept)
    traces = tuple(result.traces[number] for number in kept if result.traces)  # tools may give none
    effect = traces[-1].effect if traces else result.effect if images else None
    return replace(result, images=images, effect=effect, traces=traces)


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
