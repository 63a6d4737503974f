"""Images and their geometry: decoding, the resize for the model, affine maps, boxes.

Images are not changed, apart from the hash that one keeps. No other module resizes an image for the model.
"""

from __future__ import annotations

import hashlib
import io
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from cv_lightning.types import IDENTITY, Affine, Box, ImageError, TrajectoryImage

if TYPE_CHECKING:
    import numpy.typing as npt

MAX_ASPECT = 200.0
"""Longest over shortest side that the models' processors accept."""
MAX_DECODED_PIXELS = 120_000_000
"""Larger images are rejected as decompression bombs."""
CONTENT_HASH = "_content_hash"
"""Attribute in which an image keeps its content hash."""


class ImageRule(ABC):
    """The size at which a model sees an image, and its number of tokens."""

    __slots__ = ()
    factor: int
    """Side in pixels of the square that one token covers."""
    min_pixels: int
    """Pixels of the smallest image that the model sees."""
    max_pixels: int
    """Pixels of the largest image that the model sees."""

    @abstractmethod
    def model_size(self, width: int, height: int) -> tuple[int, int]:
        """Size at which the model sees an image of `width` x `height` pixels; a size that it returns stays the same.

        Raises:
            ImageError: The model cannot see such an image.
        """

    @abstractmethod
    def num_tokens(self, size: tuple[int, int]) -> int:
        """Image tokens of an image of (width, height), a size that `model_size` returns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits(ImageRule):
    """Rule with sides that are multiples of a factor and a limited number of pixels; one token per factor squared."""

    factor: int
    """Sides are multiples of this: patch size times merge size."""
    min_pixels: int
    max_pixels: int

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels or self.max_pixels < self.factor**2:
            raise ValueError(
                f"image limits: 0 < min_pixels ({self.min_pixels}) <= max_pixels ({self.max_pixels}) and "
                f"max_pixels >= factor^2 ({self.factor**2}) must hold; change --model.init_args.policy.min_pixels "
                "or max_pixels"
            )

    def model_size(self, width: int, height: int) -> tuple[int, int]:
        """Size at which the model sees an image: multiples of `factor` within the pixel limits.

        The arithmetic of transformers' `smart_resize`, made idempotent: a size that already fits is returned unchanged,
        and the result fits for every aspect ratio, so that the processor's own resize does nothing.

        Raises:
            ImageError: Zero size, or an aspect ratio above `MAX_ASPECT`, also where only the rounding makes it
                `MAX_ASPECT` or more: the processor would refuse that view when the update encodes it.
        """
        if width < 1 or height < 1:
            raise ImageError(f"an image of {width}x{height} pixels has nothing to see")
        if max(width, height) / min(width, height) > MAX_ASPECT:
            raise ImageError(f"{width}x{height}: longer than {MAX_ASPECT:.0f} times its width; crop it first")
        factor = self.factor
        w, h = (max(factor, round(side / factor) * factor) for side in (width, height))
        if w * h > self.max_pixels:
            scale = math.sqrt(width * height / self.max_pixels)
            w, h = (max(factor, math.floor(side / scale / factor) * factor) for side in (width, height))
        elif w * h < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (width * height))
            w, h = (math.ceil(side * scale / factor) * factor for side in (width, height))
        # A side cannot shrink below one factor, so a long strip may still have too many pixels: the long side shrinks.
        longest = self.max_pixels // min(w, h) // factor * factor
        w, h = min(w, max(longest, min(w, h))), min(h, max(longest, min(w, h)))
        if max(w, h) >= MAX_ASPECT * min(w, h):
            raise ImageError(
                f"{width}x{height}: in whole patches it is {w}x{h}, {MAX_ASPECT:.0f} times as long as wide or more; "
                "crop it first"
            )
        return w, h

    def num_tokens(self, size: tuple[int, int]) -> int:
        """One token for each square of `factor` pixels."""
        return (size[0] // self.factor) * (size[1] // self.factor)


# ------------------------------------------------------------------------------------------------ decoding
def decode_image(source: bytes | str | Path) -> Image.Image:
    """Decode bytes or a file to RGB at full resolution, EXIF orientation applied, first frame only.

    Transparent pixels become white; 16-bit and float images are scaled to 8 bits.

    Raises:
        ImageError: Not an image, empty, or more than `MAX_DECODED_PIXELS`.
    """
    name = str(source) if not isinstance(source, bytes) else f"{len(source)} bytes"
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        if image.width * image.height > MAX_DECODED_PIXELS:
            raise ImageError(f"{name}: {image.width}x{image.height} is more than {MAX_DECODED_PIXELS} pixels")
        image.load()
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: cannot be decoded as an image ({error})") from error
    ImageOps.exif_transpose(image, in_place=True)  # without, Pillow copies every image that is not turned
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB version of an image of any mode; transparent pixels become white."""
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        return _wide_to_rgb(np.nan_to_num(np.asarray(image.convert("F"))), is_float=image.mode == "F")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _wide_to_rgb(values: npt.NDArray[np.float32], *, is_float: bool) -> Image.Image:
    """RGB image of 16-bit values divided by 257, float values in [0, 1] times 255, or others clipped to [0, 255]."""
    highest = values.max(initial=0.0)
    scale = 255 / 65535 if highest > 255 else 255.0 if is_float and highest <= 1 else 1.0
    return Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8)).convert("RGB")


def content_hash(image: Image.Image) -> str:
    """First 32 hex digits of the SHA-256 of size, mode and pixels.

    Computed once and kept on the image until it is changed in place; a copy has none.
    """
    known: str | None = vars(image).get(CONTENT_HASH)
    if known is None or not image.readonly:
        digest = hashlib.sha256(f"{image.mode}{image.size}".encode())
        digest.update(image.tobytes())
        known = digest.hexdigest()[:32]
        remember_hash(image, known)
    return known


def remember_hash(image: Image.Image, content_hash: str) -> None:
    """Set what `content_hash` returns of an image, which is known without its pixels."""
    vars(image)[CONTENT_HASH] = content_hash
    image.readonly = 1  # which Pillow resets when it changes the image in place


# ------------------------------------------------------------------------------------------------ the one resize
def to_model_image(image: Image.Image, rule: ImageRule) -> Image.Image:
    """The image as the model sees it: RGB, resized; the function is idempotent."""
    image = to_rgb(image)
    size = rule.model_size(*image.size)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def is_usable_size(width: int, height: int) -> bool:
    """True if an image has pixels and an aspect ratio below `MAX_ASPECT` (the check of CodeVision's code)."""
    return width > 0 and height > 0 and max(width, height) < MAX_ASPECT * min(width, height)


def fit_to_pixels(width: int, height: int, *, min_pixels: int, max_pixels: int) -> tuple[int, int] | None:
    """Size of an image fitted to a number of pixels as CodeVision's code does; None for an image without pixels.

    Enlarging comes first and rounds each side up; shrinking truncates each side to at least 1, so that a long strip may
    still exceed the limits. `ImageLimits` keeps the limits exactly.
    """
    if width < 1 or height < 1:
        return None
    if width * height < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        width, height = math.ceil(width * scale), math.ceil(height * scale)
    if width * height > max_pixels:
        scale = math.sqrt(max_pixels / (width * height))
        width, height = max(1, int(width * scale)), max(1, int(height * scale))
    return width, height


# ------------------------------------------------------------------------------------------------ affine maps
def compose(outer: Affine, inner: Affine) -> Affine:
    """The map that applies `inner` first, then `outer`."""
    return Affine(
        outer.a * inner.a + outer.b * inner.d,
        outer.a * inner.b + outer.b * inner.e,
        outer.a * inner.c + outer.b * inner.f + outer.c,
        outer.d * inner.a + outer.e * inner.d,
        outer.d * inner.b + outer.e * inner.e,
        outer.d * inner.c + outer.e * inner.f + outer.f,
    )


def invert(affine: Affine) -> Affine:
    """The inverse map.

    Raises:
        ValueError: The map is singular.
    """
    det = affine.a * affine.e - affine.b * affine.d
    if det == 0:
        raise ValueError(f"{affine} has no inverse")
    a, b, d, e = affine.e / det, -affine.b / det, -affine.d / det, affine.a / det
    return Affine(a, b, -(a * affine.c + b * affine.f), d, e, -(d * affine.c + e * affine.f))


def map_box(affine: Affine, box: Box) -> Box:
    """Bounding box of the mapped corners of `box`."""
    corners = [(x, y) for x in (box[0], box[2]) for y in (box[1], box[3])]
    xs = [affine.a * x + affine.b * y + affine.c for x, y in corners]
    ys = [affine.d * x + affine.e * y + affine.f for x, y in corners]
    return (min(xs), min(ys), max(xs), max(ys))


def source_box(image: TrajectoryImage) -> Box | None:
    """Bounding box of what an image shows, in pixels of its source image; None: not an affine image of it."""
    if image.to_source is None:
        return None
    width, height = image.original.size
    return map_box(image.to_source, (0.0, 0.0, float(width), float(height)))


def dihedral_affine(name: str, width: int, height: int) -> Affine:
    """Map from the coordinates of a turned or flipped image back to those of the given one.

    `width` and `height` are those of the image *before* the operation. Turns are counter-clockwise
    and swap the canvas, as in `PIL.Image.transpose`.

    Raises:
        KeyError: `name` is not one of identity, rotate_90/180/270, flip_horizontal/vertical.
    """
    w, h = float(width), float(height)
    return {
        "identity": IDENTITY,
        "rotate_90": Affine(0, -1, w, 1, 0, 0),
        "rotate_180": Affine(-1, 0, w, 0, -1, h),
        "rotate_270": Affine(0, 1, 0, -1, 0, h),
        "flip_horizontal": Affine(-1, 0, w, 0, 1, 0),
        "flip_vertical": Affine(1, 0, 0, 0, -1, h),
    }[name]


def is_upright(to_source: Affine | None, expected_inverse: Affine | None = None) -> bool:
    """True if the linear part, after `expected_inverse`, neither turns nor mirrors (scaling allowed)."""
    if to_source is None:
        return False
    total = to_source if expected_inverse is None else compose(expected_inverse, to_source)
    return total.a > 0 and total.e > 0 and abs(total.b) < 1e-6 and abs(total.d) < 1e-6


# ------------------------------------------------------------------------------------------------ boxes
def area(box: Box) -> float:
    """Area in square pixels; 0 for an inverted box."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def intersection(a: Box, b: Box) -> float:
    """Area of the intersection of two boxes."""
    return area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))


def iou(a: Box, b: Box) -> float:
    """Intersection over union in [0, 1]; 0 if both are empty."""
    shared = intersection(a, b)
    union = area(a) + area(b) - shared
    return shared / union if union > 0 else 0.0
