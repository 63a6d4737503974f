"""Cache of processed images, so that every sequence that shows an image shares its model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cv_lightning.images import content_hash

if TYPE_CHECKING:
    from PIL import Image

    from cv_lightning.models.adapters import ImageInputs, ModelAdapter


class VisionCache:
    """Model inputs of images by content hash.

    The trajectories of a group show the same prompt image, which is processed and encoded once.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter
        self._known: dict[str, ImageInputs] = {}

    def get(self, images: Sequence[Image.Image]) -> list[ImageInputs]:
        """Model inputs of images, the same object for the same image. New images are processed in one call."""
        hashes = [content_hash(image) for image in images]
        new = {key: image for key, image in zip(hashes, images, strict=True) if key not in self._known}
        if new:
            self._known |= zip(new, self.adapter.process_images(list(new.values())), strict=True)
        return [self._known[key] for key in hashes]

    def clear(self) -> None:
        """Remove all images."""
        self._known.clear()
