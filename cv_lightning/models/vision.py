"""Processed images by content: the engine and the trainer of a process share one pass of the image processor."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cv_lightning.images import content_hash

if TYPE_CHECKING:
    from PIL import Image

    from cv_lightning.models.adapters import ImageInputs, ModelAdapter


class VisionCache:
    """Processed images by content hash. Its methods may be called from several threads.

    Images that are equal have one `ImageInputs` object, which a packed sequence encodes once. An image of P patches
    takes 4 P x (numbers in a patch) bytes: 154 MB for 6.4 megapixels of a Qwen-VL, 24 MB for one megapixel.

    Args:
        adapter: The model's adapter, bound to its processor.
        max_bytes: Size above which an engine's requests remove the least recently used images.
    """

    def __init__(self, adapter: ModelAdapter, max_bytes: float = math.inf) -> None:
        self.adapter, self.max_bytes = adapter, max_bytes
        self.num_passes = 0
        """Number of images that were processed since the last `clear`."""
        self._known: dict[str, ImageInputs] = {}
        """Model inputs by content hash, the least recently used first."""
        self._seen: set[str] = set()
        self._held: set[str] = set()
        """Content hashes of the update's images, which stay until `clear`."""
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_images(self) -> int:
        """Number of different images that were requested since the last `clear`; at most `num_passes`."""
        return len(self._seen)

    def of(self, image: Image.Image) -> ImageInputs:
        """Model inputs of one image for an engine. Afterwards only images of the update exceed `max_bytes`."""
        with self._lock:
            (inputs,) = self._get([image])
            while self._num_bytes > self.max_bytes:
                oldest = next((name for name in self._known if name not in self._held), None)
                if oldest is None:
                    break
                self._num_bytes -= self._known.pop(oldest).num_bytes
            return inputs

    def get(self, images: Sequence[Image.Image]) -> list[ImageInputs]:
        """Model inputs of images for the update, which stay until `clear`. New images are processed in one call."""
        with self._lock:
            self._held.update(map(content_hash, images))
            return self._get(images)

    def _get(self, images: Sequence[Image.Image]) -> list[ImageInputs]:
        names = [content_hash(image) for image in images]
        new = {name: image for name, image in zip(names, images, strict=True) if name not in self._known}
        if new:
            processed = self.adapter.process_images(list(new.values()))
            self._known |= zip(new, processed, strict=True)
            self._num_bytes += sum(inputs.num_bytes for inputs in processed)
            self.num_passes += len(new)
        self._seen.update(names)
        found = {name: self._known.pop(name) for name in dict.fromkeys(names)}
        self._known |= found  # now the most recently used
        return [found[name] for name in names]

    def clear(self) -> None:
        """Remove all images and reset the counts."""
        with self._lock:
            self._known.clear()
            self._seen.clear()
            self._held.clear()
            self._num_bytes = self.num_passes = 0
