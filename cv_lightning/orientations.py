"""The five orientation changes by right angles: their names and their effect on images, sizes and boxes.

Rotations are counter-clockwise and swap the canvas, as in `PIL.Image.transpose`. In a list of names, other transforms
(`crop`, a corruption) are ignored. All functions are pure.
"""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image

from cv_lightning.images import compose, dihedral_affine, invert, map_box
from cv_lightning.types import IDENTITY, Affine, Box

ORIENTATIONS = ("rotate_90", "rotate_180", "rotate_270", "flip_horizontal", "flip_vertical")
QUARTER_TURNS = ("rotate_90", "rotate_270")
"""The orientation changes that swap width and height."""
UPRIGHT = "identity"
"""The orientation that changes nothing."""
TRANSPOSES = dict(
    zip(
        ORIENTATIONS,
        (
            Image.Transpose.ROTATE_90,
            Image.Transpose.ROTATE_180,
            Image.Transpose.ROTATE_270,
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.FLIP_TOP_BOTTOM,
        ),
        strict=True,
    )
)


def orientations_of(names: Iterable[str]) -> list[str]:
    """The orientation changes among the names of transforms, in their order."""
    return [name for name in names if name in ORIENTATIONS]


def turned_size(size: tuple[int, int], names: Iterable[str]) -> tuple[int, int]:
    """(width, height) after the transforms; the same function gives the size before them from the size after."""
    return size[::-1] if sum(name in QUARTER_TURNS for name in names) % 2 else size


def turn_image(image: Image.Image, name: str) -> Image.Image:
    """The image turned or flipped; `identity` returns it as it is.

    Raises:
        KeyError: There is no such orientation.
    """
    return image if name == UPRIGHT else image.transpose(TRANSPOSES[name])


def turn_box(box: Box, names: Iterable[str], size: tuple[int, int]) -> Box:
    """The box in pixels of the turned image.

    Args:
        box: In pixels of the image before the transforms.
        names: Transforms in the order in which they are applied.
        size: (width, height) before the transforms.
    """
    for name in orientations_of(names):
        box = map_box(invert(dihedral_affine(name, *size)), box)
        size = turned_size(size, [name])
    return box


def to_upright(names: Iterable[str], size: tuple[int, int]) -> Affine:
    """Map from pixels of the image as given to pixels of the upright image that it was made from.

    Args:
        names: Transforms in the order in which they were applied.
        size: (width, height) of the image as given.
    """
    turns = orientations_of(names)
    size = turned_size(size, turns)
    total = IDENTITY
    for name in turns:
        total = compose(total, dihedral_affine(name, *size))
        size = turned_size(size, [name])
    return total
