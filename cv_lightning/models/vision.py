"""Processed images: made once per image, shared by every sequence that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from cv_lightning.models.adapters import ImageInputs, ModelAdapter


class VisionCache:
    """Processed images by object identity.

    The trajectories of a group share their prompt image as one object: it is processed once, and the packed row
    encodes it once.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter
        self._known: dict[int, tuple[Image.Image, ImageInputs]] = {}

    def get(self, images: Sequence[Image.Image]) -> list[ImageInputs]:
        """One `ImageInputs` per image; the same object for the same image. New ones are processed in one call."""
        new = list({id(image): image for image in images if id(image) not in self._known}.values())
        if new:
            for image, inputs in zip(new, self.adapter.process_images(new), strict=True):
                # The image is kept alive with its features, so that its id cannot be reused.
                self._known[id(image)] = image, inputs
        return [self._known[id(image)][1] for image in images]

    def clear(self) -> None:
        """Forget all images."""
        self._known.clear()
