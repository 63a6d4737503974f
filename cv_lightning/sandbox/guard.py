"""Refuses images that are far too large before their memory is filled.

Filling a gigabyte before the limit is hit takes seconds on a busy machine and would look like a timeout. This helps
well-meant code and is not a layer of isolation: code that undoes it meets the memory and CPU limits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from PIL import Image

BYTES_A_PIXEL = 4
"""What Pillow takes for RGB."""


class TooLargeError(ValueError):
    """An image was requested that exceeds the memory limit."""


_limits = {"pixels": 0}
"""Most pixels of one image; 0: any number."""


def set_limit(memory_mb: int) -> None:
    """Set the largest image for a memory limit in MB; 0: no limit."""
    _limits["pixels"] = memory_mb * 2**20 // BYTES_A_PIXEL


def fitting_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """The largest size of about this aspect that has no more than `max_pixels` pixels."""
    scale = min(1.0, math.sqrt(max_pixels / (width * height)))
    return max(1, int(width * scale)), max(1, int(height * scale))


def install() -> None:
    """Check the sizes of new images in Pillow; call it once, before the tracer wraps the same functions."""
    Image.new = _checked(Image.new)
    Image.Image.resize = _checked(Image.Image.resize)  # type: ignore[method-assign]
    Image.Image.transform = _checked(Image.Image.transform)  # type: ignore[method-assign]


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of (mode or image, size, ...) with its size checked."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            width, height = (int(side) for side in (kwargs["size"] if "size" in kwargs else args[1]))
        except (IndexError, TypeError, ValueError):  # not a size: Pillow raises its own error
            return function(*args, **kwargs)
        if 0 < _limits["pixels"] < width * height:
            raise TooLargeError(
                f"an image of {width}x{height} is too large: at most {_limits['pixels']} pixels; crop or resize, for "
                f"example to {fitting_size(width, height, _limits['pixels'])}"
            )
        return function(*args, **kwargs)

    return checked
