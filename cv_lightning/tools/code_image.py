"""One tool call on the background thread: run the snippet, then make its image ready for the model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from cv_lightning.images import compose, content_hash
from cv_lightning.sandbox.effect import shows
from cv_lightning.types import Affine, ImageError, SandboxResult, ToolCall, ToolStatus, TrajectoryImage


class CodeRunner(Protocol):
    """What the loop asks of a sandbox."""

    async def run(self, image: Image.Image, code: str, *, owner: str = "") -> SandboxResult:
        """Run a snippet on an image; cancelling the coroutine ends the snippet."""


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

    result: SandboxResult
    model_image: Image.Image | None = None
    """`result.image` as the model is to see it; None where there is none, or it cannot be shown."""
    image_hash: str = ""
    """Content hash of `model_image`."""
    to_source: Affine | None = None
    """Map from `result.image` to the source image of what the call worked on; None where the pixels do not prove it."""
    not_shown: str = ""
    """Why an image that the snippet made cannot be shown; for the model to read."""
    elapsed_s: float = 0.0
    """From the hand-over to here, queueing included."""


async def run_tool(
    sandbox: CodeRunner, encoder: ImageSizer, images: Sequence[TrajectoryImage], index: int, code: str, owner: str
) -> ToolOutcome:
    """Run a snippet, and resize, hash and locate what it made, off the thread that owns the engine.

    Args:
        sandbox: runs the snippet.
        encoder: knows how the model sees images.
        images: of the trajectory so far.
        index: which of them the snippet works on, at full resolution.
        code: the snippet.
        owner: id of the trajectory.
    """
    begun = time.perf_counter()
    result = await sandbox.run(images[index].original, code, owner=owner)
    if result.image is None:
        return ToolOutcome(result=result, elapsed_s=time.perf_counter() - begun)
    try:
        seen, image_hash = await asyncio.to_thread(_prepare, encoder, result.image)
    except ImageError as error:
        return ToolOutcome(result=result, not_shown=str(error), elapsed_s=time.perf_counter() - begun)
    to_source = await asyncio.to_thread(map_to_source, images, index, result)
    elapsed = time.perf_counter() - begun
    return ToolOutcome(result=result, model_image=seen, image_hash=image_hash, to_source=to_source, elapsed_s=elapsed)


def _prepare(encoder: ImageSizer, image: Image.Image) -> tuple[Image.Image, str]:
    seen = encoder.model_image(image)
    return seen, content_hash(seen)


def map_to_source(images: Sequence[TrajectoryImage], index: int, result: SandboxResult) -> Affine | None:
    """Map from a result to the source image, where the pixels of both prove it; None where they do not.

    The sandbox proves each call against what the call worked on. Small losses of several calls add up, so that a
    result of a later call is compared with the source image itself.

    Args:
        images: of the trajectory so far.
        index: which of them the call worked on.
        result: of the call; it has an image.
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


def lost(reason: BaseException | str) -> ToolOutcome:
    """The outcome of a call whose sandbox failed."""
    kind = "lost" if isinstance(reason, str) else type(reason).__name__
    text = str(reason) or kind
    return ToolOutcome(result=SandboxResult(status=ToolStatus.LOST, error=text, error_kind=kind))


def no_such_image(call: ToolCall, num_images: int) -> ToolOutcome:
    """The outcome of a call on an image that does not exist; nothing runs."""
    error = f"image_index {call.image_index} does not exist; there are {num_images} images, numbered from 0"
    return ToolOutcome(result=SandboxResult(status=ToolStatus.REFUSED, error=error, error_kind="image_index"))


def derived_image(images: list[TrajectoryImage], parent_index: int, outcome: ToolOutcome) -> TrajectoryImage:
    """The image of a call with its provenance: what it was made from, and the map to its source where it is proven.

    Args:
        images: of the trajectory so far.
        parent_index: which of them the call worked on.
        outcome: of the call; it has an image.
    """
    result, parent = outcome.result, images[parent_index]
    assert result.image is not None and outcome.model_image is not None
    return TrajectoryImage(
        original=result.image,
        model_image=outcome.model_image,
        source=parent.source,
        parent=parent_index,
        to_source=outcome.to_source,
    )
