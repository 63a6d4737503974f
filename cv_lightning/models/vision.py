"""Images as the vision tower takes them: made once per image, shared by every row that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image

if TYPE_CHECKING:
    from transformers import ProcessorMixin


@dataclass(frozen=True, slots=True, eq=False)
class VisionInputs:
    """Some images, flattened over patches (trap T11)."""

    pixel_values: torch.Tensor
    """[patches, channels * temporal * patch * patch], float32"""
    grid_thw: torch.Tensor
    """[images, 3]: temporal, vertical and horizontal number of patches of each image"""


def process_images(processor: ProcessorMixin, images: Sequence[Image.Image]) -> VisionInputs:
    """Normalise and cut model-sized images into patches, by the model's own processor.

    Args:
        processor: of the model.
        images: as `images.to_model_image` makes them, so that the processor's resize does nothing.
    """
    features = processor.image_processor(images=list(images), return_tensors="pt")
    return VisionInputs(features["pixel_values"].float(), features["image_grid_thw"])


class VisionCache:
    """Processed images by object identity.

    The trajectories of a group share their prompt image as one object: it is processed once, and the packed row
    encodes it once.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self._known: dict[int, tuple[Image.Image, VisionInputs]] = {}

    def get(self, images: Sequence[Image.Image]) -> list[VisionInputs]:
        """One `VisionInputs` per image; the same object for the same image."""
        return [self._known[id(image)][1] for image in images] if self._fill(images) else []

    def _fill(self, images: Sequence[Image.Image]) -> bool:
        """Process what is new in one call of the processor."""
        new = list({id(image): image for image in images if id(image) not in self._known}.values())
        if new:
            made = process_images(self.processor, new)
            sizes = made.grid_thw.prod(-1).tolist()
            pieces = made.pixel_values.split(sizes)
            for index, (image, pixels) in enumerate(zip(new, pieces, strict=True)):
                # The image is kept alive with its features, so that its id cannot be reused.
                self._known[id(image)] = image, VisionInputs(pixels, made.grid_thw[index : index + 1])
        return bool(images)

    def clear(self) -> None:
        """Forget all images."""
        self._known.clear()
