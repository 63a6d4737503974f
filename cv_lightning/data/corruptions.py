"""Turned and corrupted versions of any task: five orientations, thirteen corruptions; boxes are mapped.

The corruptions and their severities follow ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261). Lengths given there
in pixels of a 224-pixel image scale with the image here, so that a severity means the same on a page and on a
thumbnail. Results depend on the image, the names and a seed only.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
from PIL import Image, ImageFilter

from cv_lightning.data.sources import Rows
from cv_lightning.images import to_rgb
from cv_lightning.orientations import ORIENTATIONS, UPRIGHT, turn_box, turn_image
from cv_lightning.types import Task

if TYPE_CHECKING:
    import numpy.typing as npt

    Pixels = npt.NDArray[np.float32]
    """[height, width, 3] in [0, 1]."""

SEVERITIES = (1, 2, 3, 4, 5)
CLEAN = "none"
"""Name of the corruption that changes nothing."""
REFERENCE_SIDE = 224
"""Side in pixels of the images that the severities were chosen on."""


# ------------------------------------------------------------------------------------------------ corruptions
def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def _image(pixels: npt.NDArray[Any]) -> Image.Image:
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))


def _unit(image: Image.Image) -> float:
    """Pixels that correspond to one pixel of an image of side `REFERENCE_SIDE`; at least 0.25."""
    return max(0.25, math.sqrt(image.width * image.height) / REFERENCE_SIDE)


def _gaussian_noise(image: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    pixels = _pixels(image)
    return _image(pixels + sigma * rng.standard_normal(pixels.shape, dtype=np.float32))


def _shot_noise(image: Image.Image, photons: float, rng: np.random.Generator) -> Image.Image:
    return _image(np.asarray(rng.poisson(_pixels(image) * photons) / photons, dtype=np.float32))


def _impulse_noise(image: Image.Image, fraction: float, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image).copy()
    drawn = rng.random(pixels.shape, dtype=np.float32)
    pixels[drawn < fraction / 2] = 0
    pixels[drawn > 1 - fraction / 2] = 255
    return Image.fromarray(pixels)


def _speckle_noise(image: Image.Image, sigma: float, rng: np.random.Generator) -> Image.Image:
    pixels = _pixels(image)
    return _image(pixels + pixels * sigma * rng.standard_normal(pixels.shape, dtype=np.float32))


def _gaussian_blur(image: Image.Image, radius: float, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius * _unit(image)))


def _defocus_blur(image: Image.Image, radius: float, rng: np.random.Generator) -> Image.Image:
    """Convolution with a disk whose edge is smoothed over a pixel."""
    radius *= _unit(image)
    x, y = _grid(radius)
    return _convolve(image, np.clip(radius + 0.5 - np.hypot(x, y), 0, 1))


def _motion_blur(image: Image.Image, length: float, rng: np.random.Generator) -> Image.Image:
    """Convolution with a line of a random direction."""
    length, angle = length * _unit(image), rng.uniform(0, math.pi)
    x, y = _grid(length / 2)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    return _convolve(image, np.clip(1 - np.abs(across), 0, 1) * np.clip(length / 2 + 0.5 - np.abs(along), 0, 1))


def _grid(radius: float) -> tuple[Pixels, Pixels]:
    """Coordinates (x, y) around the middle of a kernel. Shape [2 n + 1, 2 n + 1] each."""
    reach = math.ceil(radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    return x, y


def _convolve(image: Image.Image, kernel: Pixels) -> Image.Image:
    """The image convolved with a kernel, which is scaled to a sum of 1."""
    kernel = np.asarray(kernel / kernel.sum(), dtype=np.float32)
    return Image.fromarray(cv2.filter2D(np.asarray(image), -1, kernel, borderType=cv2.BORDER_REFLECT_101))


def _fog(image: Image.Image, density: float, rng: np.random.Generator) -> Image.Image:
    """White mist of many octaves: at every pixel a fraction of the image's light is replaced by white."""
    cloud: Pixels = np.zeros((image.height, image.width), np.float32)
    for octave in range(7):
        grid = rng.random((2**octave + 1, 2**octave + 1), dtype=np.float32)
        cloud = cloud + cv2.resize(grid, image.size, interpolation=cv2.INTER_LINEAR) / np.float32(1.7**octave)
    cloud = (cloud - cloud.min()) / max(1e-6, float(cloud.max() - cloud.min()))
    pixels = _pixels(image)
    return _image(pixels + density * (0.5 + 0.5 * cloud[..., None]) * (1 - pixels))


def _brightness(image: Image.Image, offset: float, rng: np.random.Generator) -> Image.Image:
    return _image(_pixels(image) + offset)


def _darkness(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    return _image(_pixels(image) * factor)


def _contrast(image: Image.Image, factor: float, rng: np.random.Generator) -> Image.Image:
    pixels = _pixels(image)
    mean = pixels.mean(axis=(0, 1), keepdims=True)
    return _image((pixels - mean) * factor + mean)


def _jpeg(image: Image.Image, quality: float, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=int(quality))
    return to_rgb(Image.open(buffer))


def _pixelate(image: Image.Image, scale: float, rng: np.random.Generator) -> Image.Image:
    scale /= max(1.0, _unit(image))
    small = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


Corruption = Callable[[Image.Image, float, np.random.Generator], Image.Image]
CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": (_speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": (_gaussian_blur, (1, 2, 3, 4, 6)),
    "defocus_blur": (_defocus_blur, (3, 4, 6, 8, 10)),
    "motion_blur": (_motion_blur, (7, 10, 14, 18, 24)),
    "fog": (_fog, (0.35, 0.5, 0.62, 0.74, 0.85)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "darkness": (_darkness, (0.6, 0.45, 0.3, 0.2, 0.12)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "jpeg": (_jpeg, (25, 18, 15, 10, 7)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
}
"""Functions by name, each with its strength at severities 1 to 5."""


def corrupt_image(image: Image.Image, corruption: str, severity: int, seed: int | str = 0) -> Image.Image:
    """A corrupted copy of the same size, RGB; the same arguments always give the same pixels.

    Args:
        image: An image of any mode.
        corruption: Name in `CORRUPTIONS`, or `none`.
        severity: 1 to 5.
        seed: Seed of noise, fog and direction; these are the same for all severities, only the strength differs.

    Raises:
        ValueError: There is no such corruption or severity.
    """
    if corruption == CLEAN:
        return to_rgb(image)
    if corruption not in CORRUPTIONS:
        raise ValueError(f"--corruptions {corruption!r}: there are {CLEAN}, {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"--severities {severity}: 1 to {SEVERITIES[-1]}")
    digest = hashlib.sha256(f"{seed}/{corruption}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    corrupt, strengths = CORRUPTIONS[corruption]
    return corrupt(to_rgb(image), strengths[severity - 1], rng)


# ------------------------------------------------------------------------------------------------ tasks
@dataclass(frozen=True, slots=True)
class Variant:
    """One combination of orientation and corruption."""

    orientation: str = UPRIGHT
    corruption: str = CLEAN
    severity: int = 0
    """1 to 5; 0 for none."""

    @property
    def name(self) -> str:
        """`rotate_90/fog_3`, `identity/none`."""
        return f"{self.orientation}/{self.corruption}" + (f"_{self.severity}" if self.severity else "")


@dataclass(frozen=True, kw_only=True)
class CorruptionConfig:
    """Orientations and corruptions in which a benchmark is shown."""

    orientations: tuple[str, ...] = (UPRIGHT, *ORIENTATIONS)
    """Any of identity, rotate_90/180/270 (counter-clockwise), flip_horizontal, flip_vertical."""
    corruptions: tuple[str, ...] = (CLEAN,)
    """Any of `none` and the corruptions; `all` means none and every corruption."""
    severities: tuple[int, ...] = (3,)
    """Any of 1 to 5."""
    mode: Literal["grid", "one"] = "grid"
    """`grid`: every task in every combination; `one`: every task in one, each combination equally often."""
    seed: int = 0
    """Seed of noise, fog and directions, and with `mode: one` of each task's combination."""

    def __post_init__(self) -> None:
        for flag, given, known in (
            ("orientations", self.orientations, (UPRIGHT, *ORIENTATIONS)),
            ("corruptions", self.corruptions, ("all", CLEAN, *CORRUPTIONS)),
            ("severities", self.severities, SEVERITIES),
        ):
            unknown = [str(value) for value in given if value not in known]
            if unknown or not given:
                listed = ", ".join(map(str, known))
                raise ValueError(f"--{flag} {', '.join(unknown) or 'is empty'}: name at least one of {listed}")

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """All combinations; severities apply to corruptions only."""
        names = (CLEAN, *CORRUPTIONS) if "all" in self.corruptions else tuple(dict.fromkeys(self.corruptions))
        kinds = [(name, 0) for name in names if name == CLEAN]
        kinds += [(name, level) for name in names if name != CLEAN for level in sorted(set(self.severities))]
        orientations = dict.fromkeys(self.orientations)
        return tuple(Variant(orientation, *kind) for orientation in orientations for kind in kinds)

    def variants_at(self, position: int) -> tuple[Variant, ...]:
        """Combinations of the task at a position of the benchmark, from 0: all of them, or with `mode: one` one.

        With `mode: one`, each run of as many tasks as there are combinations has every combination once.
        """
        if self.mode == "grid":
            return self.variants
        stretch, within = divmod(position, len(self.variants))
        order = np.random.default_rng([self.seed, stretch]).permutation(len(self.variants))
        return (self.variants[int(order[within])],)


def apply_variant(task: Task, variant: Variant, seed: int = 0) -> Task:
    """The task with its images turned and corrupted.

    The turn is added to `required_transforms` (before `crop`), the box is mapped, and the variant's name is appended to
    id and data source, so that metrics are split by it. The corruption is applied after the turn.

    Args:
        task: A task whose images have pixels.
        variant: Orientation and corruption.
        seed: Seed of noise, fog and direction, together with the task's id.
    """
    if variant == Variant():
        return replace(task, metadata={**task.metadata, **_described(variant)})
    size = task.images[0].size
    images = tuple(
        corrupt_image(
            turn_image(image, variant.orientation), variant.corruption, variant.severity, f"{seed}/{task.id}/{number}"
        )
        for number, image in enumerate(task.images)
    )
    turned = variant.orientation != UPRIGHT
    required = [name for name in task.required_transforms if name != "crop"]
    required += [variant.orientation] if turned else []
    required += ["crop"] if "crop" in task.required_transforms else []
    return replace(
        task,
        id=f"{task.id}/{variant.name}",
        images=images,
        data_source=f"{task.data_source}/{variant.name}",
        required_transforms=tuple(required),
        box=turn_box(task.box, [variant.orientation], size) if task.box is not None and turned else task.box,
        metadata={**task.metadata, **_described(variant)},
    )


def _described(variant: Variant) -> dict[str, Any]:
    return {"orientation": variant.orientation, "corruption": variant.corruption, "severity": variant.severity}


class CorruptedRows:
    """The tasks of a benchmark, turned and corrupted when they are read.

    Args:
        rows: The tasks.
        config: Combinations; those of one task are adjacent.
    """

    def __init__(self, rows: Rows[Task], config: CorruptionConfig) -> None:
        self.rows = rows
        self.config = config
        self.per_task = len(config.variants_at(0))

    def __len__(self) -> int:
        return len(self.rows) * self.per_task

    def row(self, position: int) -> Task:
        """The task at a position, in its combination."""
        base, number = divmod(position, self.per_task)
        return apply_variant(self.rows.row(base), self.config.variants_at(base)[number], self.config.seed)
