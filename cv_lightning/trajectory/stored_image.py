"""Images of a store: handles that know size and content hash, and read their pixels when these are needed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from cv_lightning.images import content_hash, decode_image, remember_hash
from cv_lightning.types import DataError


class StoredImage(Image.Image):
    """An RGB image in a file; a Pillow image in all respects, decoded by the first operation that needs pixels.

    Args:
        path: The file, `<content hash>.png` or `.webp`.
        size: (width, height) of the image. A view has another size than the file.
        is_view: True for the image as the model saw it: the file's image, resized to `size`.
    """

    def __init__(self, path: Path, size: tuple[int, int], *, is_view: bool = False) -> None:
        super().__init__()
        self.path, self._is_view = path, is_view
        self._mode, self._size = "RGB", size
        if not is_view:
            remember_hash(self, path.stem)

    def read(self) -> Image.Image:
        """The pixels as an image of their own, which the handle does not keep.

        Raises:
            DataError: The file is missing or cannot be decoded.
        """
        if not self.path.is_file():
            raise DataError(f"{self.path}: missing; was the `images` folder moved away from `trajectories`?")
        pixels = decode_image(self.path)
        return pixels if pixels.size == self.size else pixels.resize(self.size)

    def load(self) -> Any:
        """Read the pixels unless they are there; Pillow calls this before it uses them."""
        if self._im is None:
            self.im = self.read().im
        return super().load()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle is another handle of the same file."""
        return partial(StoredImage, is_view=self._is_view), (self.path, self.size)

    def __eq__(self, other: object) -> bool:
        """True for an image of the same content, in a file or in memory."""
        return isinstance(other, Image.Image) and content_hash(self) == content_hash(other)

    __hash__ = None  # type: ignore[assignment]


def path_of(image: Image.Image) -> Path | None:
    """The file of a stored image; None for an image in memory."""
    return image.path if isinstance(image, StoredImage) else None


def pixels_of(image: Image.Image) -> Image.Image:
    """The pixels as an image of their own; a stored one stays unloaded.

    Raises:
        DataError: The file of a stored image is missing or cannot be decoded.
    """
    return image.read() if isinstance(image, StoredImage) else image.copy()
