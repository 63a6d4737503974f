"""Cache of processed images, so that every sequence that shows an image shares its model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from cv_lightning.models.adapters import ImageInputs, ModelAdapter


class VisionCache:
    """Model inputs of images by object identity.

    The trajectories of a group share their prompt image as one object, so it is processed and encoded once.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter
        self._known: dict[int, tuple[Image.Image, ImageInputs]] = {}

    def get(self, images: Sequence[Image.Image]) -> list[ImageInputs]:
        """Model inputs of images, the same object for the same image. New images are processed in one call."""
        new = list({id(image): image for image in images if id(image) not in self._known}.values())
        if new:
            for image, inputs in zip(new, self.adapter.process_images(new), strict=True):
                # Keeping the image alive prevents its id from being used again.
                self._known[id(image)] = image, inputs
        return [self._known[id(image)][1] for image in images]

    def clear(self) -> None:
        """Remove all images."""
        self._known.clear()
