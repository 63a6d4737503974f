"""The embedded task: read a two-digit number of real handwritten digits that may be rotated, tiny, or both.

The digits are scikit-learn's `load_digits` (1797 real 8x8 scans), split into training and held-out digits before any
scene is composed. A scene is a framed card with two digits, and a bar and a block at the bottom that show which way is
up. For the small kinds the card lies in one cell of a large image; in the model's view of it a digit is a few pixels
wide (five by default, half of that with `card_share` 0.5), so that the model has to crop the original.

Glyphs and crop cells are aligned with the model's vision tokens up to a jitter of a pixel; without that a model
of two million parameters does not learn to read within minutes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from PIL import Image

from cv_lightning.digits.measure import LEAST_SIDE, MEASURES, compose_cards
from cv_lightning.orientations import ORIENTATIONS, turn_box, turn_image
from cv_lightning.ranges import NonNegativeInt, PositiveInt, Range, check_ranges
from cv_lightning.tools.base import Coordinates
from cv_lightning.types import Box, Task

if TYPE_CHECKING:
    import numpy.typing as npt

    Pixels = npt.NDArray[np.uint8]

Kind = Literal["upright", "turned", "small", "turned_and_small", "width", "ink", "shade", "difference"]
Split = Literal["train", "held_out"]

KINDS: tuple[Kind, ...] = ("upright", "turned", "small", "turned_and_small")
"""Kinds of scenes with a number to read."""
MEASURE_KINDS: tuple[Kind, ...] = ("width", "ink", "shade", "difference")
"""Kinds of scenes with something to measure."""
ALL_KINDS = KINDS + MEASURE_KINDS
NUM_DIGITS = 1797
LAYOUT = 96
"""Side of the layout, in which the coordinates below are given."""
CARD = (1, 29, 66, 67)
"""Frame around the two digits: left, top, right, bottom in layout pixels, inclusive."""
GLYPHS = ((4, 34), (35, 34))
"""Top left corners of the digits; each digit lies within one 32-pixel vision token."""
GLYPH_SIDE = 28
BAR = (6, 88, 90, 93)
BLOCK = (4, 74, 15, 85)
"""Bar along the bottom and block at its left, which make the eight orientations of a scene distinct."""


def _equal_shares() -> dict[str, float]:
    return dict.fromkeys(KINDS, 1.0)


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """Look of the scenes, and frequency of each kind."""

    seed: int = 0
    """Seed of the scenes; a scene depends only on it, the split, the kind and the index."""
    model_side: PositiveInt = 96
    """Side in pixels of scenes that are not small, and of the model's view of the others."""
    original_side: PositiveInt = 384
    """Side in pixels of the large original of the small kinds."""
    cell: PositiveInt = 64
    """Grid step of the cards on a large original."""
    card_share: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Fraction of its cell's side that a card with its margin takes up, in the middle; a crop of that part shows
    exactly the card. At 1 a trained reader could guess the digits without a crop, at 0.5 hardly."""
    jitter_px: NonNegativeInt = 1
    """Most pixels by which a card is moved in each direction."""
    augment: bool = True
    """Rotate, shear, scale and move training scans a little at random, so that new handwriting is read better. Held-out
    scans are not changed."""
    train_digits: PositiveInt = 1400
    """Number of digits for training scenes, the first of the 1797; the others are held out."""
    kind_shares: dict[str, float] = field(default_factory=_equal_shares)
    """Relative frequency of upright, turned, small and turned_and_small, and of width, ink, shade and difference, whose
    answer has to be measured; a kind that is not named never occurs."""
    coordinates: Coordinates = "original_px"
    """Frame of the crop coordinates in demonstrations; their code converts them where necessary."""
    question: str = "What number is written?"
    """The question of every scene with a number to read."""

    def __post_init__(self) -> None:
        check_ranges(self, "data.init_args.digits")
        if not self.train_digits < NUM_DIGITS:
            raise ValueError(f"--train_digits {self.train_digits} must leave held-out digits: 1 to {NUM_DIGITS - 1}")
        if self.original_side % self.cell or self.original_side < 2 * self.model_side:
            raise ValueError(
                f"--original_side {self.original_side} must be a multiple of --cell {self.cell} and at least twice "
                f"--model_side {self.model_side}, or the number would stay legible without a crop"
            )
        if self.model_side < LAYOUT // 2 or self.crop_side < LAYOUT // 3:
            raise ValueError(
                f"--model_side {self.model_side} must be at least {LAYOUT // 2}, and --card_share {self.card_share}, "
                f"at most 1, of --cell {self.cell} at least {LAYOUT // 3} pixels, or the digits lose their strokes"
            )
        if self.cell > BLOCK[1] * self.original_side // LAYOUT:
            raise ValueError(f"--cell {self.cell} leaves no room above the bar of an original of {self.original_side}")
        room = self.crop_side // LAYOUT + 1
        if self.jitter_px > room:
            raise ValueError(f"--jitter_px {self.jitter_px} must be 0 to {room}: a card fills its cell")
        check_kind_shares("kind_shares", self.kind_shares)
        if self.original_side < LEAST_SIDE and any(self.kind_shares.get(kind, 0) > 0 for kind in MEASURE_KINDS):
            raise ValueError(
                f"--original_side {self.original_side} must be at least {LEAST_SIDE} with the kinds "
                f"{', '.join(MEASURE_KINDS)} in --kind_shares, or the widest card has no room"
            )

    @property
    def crop_side(self) -> int:
        """Side in pixels of the crop that shows one card."""
        return round(self.cell * self.card_share)

    def crop_box(self, column: int, row: int) -> tuple[int, int, int, int]:
        """The crop that shows the card of a cell of the grid: left, top, right, bottom."""
        margin = (self.cell - self.crop_side) // 2
        left, top = column * self.cell + margin, row * self.cell + margin
        return left, top, left + self.crop_side, top + self.crop_side

    @property
    def grid(self) -> tuple[int, int]:
        """(columns, rows) of cells on a large original that do not overlap the bar and block."""
        return self.original_side // self.cell, BLOCK[1] * self.original_side // LAYOUT // self.cell


def check_kind_shares(name: str, shares: Mapping[str, float]) -> None:
    """Refuse shares from which no kind can be drawn.

    Raises:
        ValueError: A kind that does not exist, a negative share, or none above 0; names the flag.
    """
    if set(shares) - set(ALL_KINDS) or min(shares.values(), default=0) < 0 or not 0 < sum(shares.values()) < math.inf:
        raise ValueError(f"--{name} {dict(shares)}: not negative, not all 0, and only of {', '.join(ALL_KINDS)}")


def digit_task(config: DigitsConfig, split: Split, index: int, kind: Kind | None = None) -> Task:
    """The scene with the given index, always the same for the same arguments.

    Args:
        config: Look and frequencies.
        split: Digits that it is composed of.
        index: Any number from 0.
        kind: None draws one by `kind_shares`.

    Returns:
        A task whose one image has the transform applied already. `box` is the card in that image's pixels.
        `metadata`: `kind`, `applied` (transform or None), `digits` (indices in `load_digits`), `upright_box`,
        `box_area` (square pixels), and `cell`, the crop that shows the card on the upright original (None where
        no crop is needed).
    """
    if kind is None:
        kinds = list(config.kind_shares)
        shares = [config.kind_shares[name] for name in kinds]
        kind = random.Random(f"{config.seed}/{split}/{index}").choices(kinds, shares)[0]  # type: ignore[assignment]
    assert kind is not None
    rng = random.Random(f"{config.seed}/{split}/{kind}/{index}")
    first, last = (0, config.train_digits) if split == "train" else (config.train_digits, NUM_DIGITS)
    digits = (rng.randrange(first, last), rng.randrange(first, last))
    if kind in MEASURES:
        return _measure_task(config, split, index, kind, digits[: MEASURES[kind].num_cards], rng)
    pixels, upright_box, cell = _compose(config, is_small(kind), digits, rng, config.augment and split == "train")
    image, box, transform = Image.fromarray(pixels), upright_box, None
    if is_turned(kind):
        transform = rng.choice(ORIENTATIONS)
        box = turn_box(box, [transform], image.size)
        image = turn_image(image, transform)
    required = ((transform,) if transform else ()) + (("crop",) if cell else ())
    metadata: dict[str, Any] = {
        "kind": kind,
        "applied": transform,
        "digits": list(digits),
        "upright_box": list(upright_box),
        "box_area": (upright_box[2] - upright_box[0]) * (upright_box[3] - upright_box[1]),
        "cell": list(cell) if cell else None,
    }
    labels = _scans()[1]
    return Task(
        id=f"digits-{config.seed}-{split}-{kind}-{index}",
        question=config.question,
        images=(image.convert("RGB"),),
        ground_truth=f"{labels[digits[0]]}{labels[digits[1]]}",
        data_source=f"digits/{kind}",
        required_transforms=required,
        box=box,
        metadata=metadata,
    )


def _measure_task(
    config: DigitsConfig, split: Split, index: int, kind: Kind, digits: Sequence[int], rng: random.Random
) -> Task:
    """A scene with something to measure: its answer is not written in the image, so a call has to print it."""
    glyphs = [_glyph(digit, GLYPH_SIDE) for digit in digits]
    if config.augment and split == "train":
        glyphs = [_distorted(glyph, rng) for glyph in glyphs]
    pixels, answer = compose_cards(config.original_side, kind, glyphs, rng)
    return Task(
        id=f"digits-{config.seed}-{split}-{kind}-{index}",
        question=MEASURES[kind].question,
        images=(Image.fromarray(pixels).convert("RGB"),),
        ground_truth=str(answer),
        data_source=f"digits/{kind}",
        metadata={"kind": kind, "digits": list(digits), "needs_text": True},
    )


def is_small(kind: str) -> bool:
    """True if scenes of this kind have to be cropped."""
    return kind in ("small", "turned_and_small")


def is_turned(kind: str) -> bool:
    """True if scenes of this kind have to be rotated or flipped upright."""
    return kind in ("turned", "turned_and_small")


def _compose(
    config: DigitsConfig, small: bool, digits: tuple[int, int], rng: random.Random, augment: bool
) -> tuple[Pixels, Box, tuple[int, int, int, int] | None]:
    """Upright scene [side, side], box of its card, and the cell to crop (None if the card is large)."""
    pixels = _background(config.original_side if small else config.model_side).copy()
    left = top = 0
    cell = None
    side = config.model_side
    if small:
        columns, rows = config.grid
        cell = config.crop_box(rng.randrange(columns), rng.randrange(rows))
        left, top, side = cell[0], cell[1], config.crop_side
    left += rng.randint(-config.jitter_px, config.jitter_px)
    top += rng.randint(-config.jitter_px, config.jitter_px)
    scale = side / LAYOUT
    x1, y1 = max(0, round(left + CARD[0] * scale)), max(0, round(top + CARD[1] * scale))
    x2, y2 = round(left + CARD[2] * scale) + 1, round(top + CARD[3] * scale) + 1
    line = max(2, round(2 * scale))
    pixels[y1:y2, x1:x2] = 0
    pixels[y1 + line : y2 - line, x1 + line : x2 - line] = 255
    width = round(GLYPH_SIDE * scale)
    for digit, (glyph_x, glyph_y) in zip(digits, GLYPHS, strict=True):
        x, y = round(left + glyph_x * scale), round(top + glyph_y * scale)
        glyph = _glyph(digit, width)
        pixels[y : y + width, x : x + width] = _distorted(glyph, rng) if augment else glyph
    return pixels, (float(x1), float(y1), float(x2), float(y2)), cell


@lru_cache(maxsize=4)
def _background(side: int) -> Pixels:
    """White square with the bar and block that show which way is up."""
    pixels = np.full((side, side), 255, np.uint8)
    for x1, y1, x2, y2 in (BAR, BLOCK):
        scale = side / LAYOUT
        pixels[round(y1 * scale) : round(y2 * scale) + 1, round(x1 * scale) : round(x2 * scale) + 1] = 0
    return pixels


@lru_cache(maxsize=2 * NUM_DIGITS)
def _glyph(digit: int, side: int) -> Pixels:
    """Scan enlarged to `side` pixels, dark on white."""
    return np.asarray(Image.fromarray(_scans()[0][digit]).resize((side, side), Image.Resampling.BICUBIC))


def _distorted(glyph: Pixels, rng: random.Random) -> Pixels:
    """The glyph rotated by up to 10 degrees, sheared and scaled by up to 12 %, and moved by up to 6 % of its side."""
    side = glyph.shape[0]
    angle, shear = math.radians(rng.uniform(-10, 10)), rng.uniform(-0.12, 0.12)
    across, down = rng.uniform(0.9, 1.12), rng.uniform(0.9, 1.12)
    a, b = math.cos(angle) * across, (shear - math.sin(angle)) * across
    d, e = math.sin(angle) * down, (math.cos(angle) + shear * math.sin(angle)) * down
    middle = side / 2
    c = middle - a * middle - b * middle + rng.uniform(-0.06, 0.06) * side
    f = middle - d * middle - e * middle + rng.uniform(-0.06, 0.06) * side
    moved = Image.fromarray(glyph).transform(
        (side, side), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR, fillcolor=255
    )
    return np.asarray(moved)


@lru_cache(maxsize=1)
def _scans() -> tuple[Pixels, list[int]]:
    """The scans [1797, 8, 8], dark on white, and their labels."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    return (255 - scans.images * 255 / 16).astype(np.uint8), scans.target.tolist()
