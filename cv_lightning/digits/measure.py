"""Scenes whose answer is a number that code can print, and that is not written in the image.

One card, or two above each other, lies on a large white image: plain gray, with a real handwritten digit on it. The
model's view is a quarter of the side, so that a difference of 2 pixels is half a pixel there. Width, ink and shade are
asked about the same scenes: the image does not tell which number is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Pixels = npt.NDArray[np.uint8]

DARK = 64
"""Pixels below this gray value count as dark: strokes of the digits do, cards do not."""
SHADES = (96, 220)
"""Gray values of cards, both included."""
WIDTHS = (100, 299)
"""Widths of cards in pixels, both included."""
DIFFERENCES = (2, 60)
"""Difference of the widths of two cards in pixels, both included."""
HEIGHT = 120
MARGIN = 16
"""Least distance of a card from the edge of its part of the image."""
LEAST_SIDE = WIDTHS[1] + 2 * MARGIN
"""Least side of an image in pixels."""
SHOW_CODE = "result = image.crop(ImageChops.invert(image).getbbox())"
"""Snippet that shows the cards from near, for a tool that returns images only."""
READ = "a = np.array(image)[..., 0]\n"


@dataclass(frozen=True, slots=True)
class Measure:
    """What a kind of scene asks for."""

    question: str
    code: str
    """Snippet that prints the answer."""
    num_cards: int = 1


MEASURES = {
    "width": Measure("How many pixels wide is the card?", f"{READ}print((a.min(0) < 255).sum())"),
    "ink": Measure("How many pixels are dark?", f"{READ}print((a < {DARK}).sum())"),
    "shade": Measure("Which gray value has the card?", f"{READ}print(a[a < 255].max())"),
    "difference": Measure(
        "By how many pixels do the widths of the cards differ?",
        f"{READ}w = (a < 255).sum(1)\nprint(np.ptp(w[w > 0]))",
        num_cards=2,
    ),
}
"""By kind."""


def compose_cards(side: int, kind: str, glyphs: Sequence[Pixels], rng: random.Random) -> tuple[Pixels, int]:
    """A scene [side, side] of cards, and the number that its question asks for.

    Args:
        side: Side of the image, at least `LEAST_SIDE`.
        kind: A key of `MEASURES`.
        glyphs: One digit for each card, dark on white.
        rng: Draws sizes, places and shades.
    """
    pixels = np.full((side, side), 255, np.uint8)
    widths = [rng.randint(*WIDTHS)]
    if len(glyphs) > 1:
        difference = rng.randint(*DIFFERENCES)
        widths = [rng.randint(WIDTHS[0], WIDTHS[1] - difference)]
        widths.insert(rng.randrange(2), widths[0] + difference)
    part = side // len(glyphs)
    for index, (glyph, width) in enumerate(zip(glyphs, widths, strict=True)):
        shade = rng.randint(*SHADES)
        left = rng.randint(MARGIN, side - MARGIN - width)
        top = index * part + rng.randint(MARGIN, part - MARGIN - HEIGHT)
        card = pixels[top : top + HEIGHT, left : left + width]
        card[:] = shade
        x, y = (rng.randint(MARGIN, edge - MARGIN - len(glyph)) for edge in (width, HEIGHT))
        spot = card[y : y + len(glyph), x : x + len(glyph)]
        np.minimum(spot, glyph, out=spot)
    dark = sum(int((glyph < DARK).sum()) for glyph in glyphs)
    return pixels, {"width": widths[0], "ink": dark, "shade": shade, "difference": max(widths) - min(widths)}[kind]
