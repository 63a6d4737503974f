"""Seeded scenes, and honest programs that make the view that their task wants.

A scene holds real handwritten digits at known places. A program is what a policy might send: one or several snippets.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from cv_lightning.images import compose, dihedral_affine, invert, map_box
from cv_lightning.orientations import ORIENTATIONS, turn_image
from cv_lightning.sandbox.geometry import turn
from cv_lightning.types import IDENTITY, Affine, Box, Task

TRAIN_DIGITS = 1200
"""Digits that the classifier learns from; scenes are made of the others."""
UNDO = {
    "rotate_90": "rotate_270",
    "rotate_180": "rotate_180",
    "rotate_270": "rotate_90",
    "flip_horizontal": "flip_horizontal",
    "flip_vertical": "flip_vertical",
}


@dataclass(frozen=True)
class Glyph:
    """A digit of a scene: its label, and its box in pixels of the image as given."""

    label: int
    box: Box


@dataclass(frozen=True)
class Scene:
    """An image with digits as a task gives it."""

    image: Image.Image
    glyphs: tuple[Glyph, ...]
    task: Task
    turn: str
    """The operation that puts the image upright; empty where it is upright."""
    crop: tuple[int, int, int, int] | None
    """The box that has to be cropped, in pixels of the image as given; None where no crop is wanted."""


@dataclass(frozen=True)
class Program:
    """What a policy sends about a scene."""

    kind: str
    scene: Scene
    snippets: tuple[str, ...]
    shown: tuple[int, int, int, int] | None = None
    """What an honest program shows of the image as given."""
    border: int = 0
    """Pixels of border that it adds."""

    @property
    def is_followed(self) -> bool:
        """False where a part was copied by code that nothing traces, and then changed: no map is found for those."""
        copied = any(mark in code for code in self.snippets for mark in (".copy())", "np.empty_like"))
        return not copied or (self.kind.startswith("plain") and "sized" not in self.kind)

    def to_source(self, size: tuple[int, int]) -> Affine:
        """The map from an honest program's last result, by its size, to the image as given."""
        left, top, right, bottom = self.shown or (0, 0, *self.scene.image.size)
        turned = turn(self.scene.turn, right - left, bottom - top) if self.scene.turn else IDENTITY
        swapped = self.scene.turn in ("rotate_90", "rotate_270")
        wide, high = (bottom - top, right - left) if swapped else (right - left, bottom - top)
        content = size[0] - 2 * self.border, size[1] - 2 * self.border
        scale = wide / content[0], high / content[1]
        back = Affine(scale[0], 0, -self.border * scale[0], 0, scale[1], -self.border * scale[1])
        return compose(compose(Affine(1, 0, left, 0, 1, top), turned), back)


# ------------------------------------------------------------------------------------------------ scenes
@functools.cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """Grey images of 8x8 pixels from 0 to 16, and their labels."""
    found = load_digits()
    return found.images, found.target


@functools.cache
def _photos() -> list[np.ndarray]:
    from skimage import data

    return [data.astronaut(), data.coffee(), data.chelsea(), np.stack([data.camera()] * 3, -1)]


def _background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    kind = rng.integers(0, 5)
    if kind <= 1:
        return Image.new("RGB", (width, height), tuple(int(v) for v in rng.integers(200, 256, 3)))
    if kind == 2:
        return Image.new("RGB", (width, height), tuple(int(v) for v in rng.integers(0, 60, 3)))
    if kind == 3:
        x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
        low, high = rng.integers(150, 200), rng.integers(215, 250)
        grey = low + (high - low) * (x + y) / 2
        return Image.fromarray(np.stack([grey] * 3, -1).astype(np.uint8))
    photo = Image.fromarray(_photos()[rng.integers(0, 4)])
    return photo.resize((width, height), Image.Resampling.BICUBIC)


def _paste_digit(image: Image.Image, index: int, box: tuple[int, int, int, int], ink: int, paper: int) -> None:
    side = box[2] - box[0]
    scan = Image.fromarray((scans()[0][index] / 16 * 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    grey = scan.point(lambda v: round(paper + (ink - paper) * v / 255))
    image.paste(grey.convert("RGB"), box[:2])


def make_scene(seed: tuple[int, ...], *, held_out: bool = True) -> Scene:
    """The scene of a seed: a card with digits on some background, perhaps turned, perhaps to be cropped."""
    rng = np.random.default_rng(seed)
    width, height = (int(v) for v in rng.integers(200, 900, 2))
    side = int(rng.integers(26, 60))
    kind = ("turned", "crop", "both")[rng.choice(3, p=[0.45, 0.4, 0.15])]
    columns, rows = (4, 3) if kind == "turned" else (2, 1)
    columns, rows = max(1, min(columns, width // side - 1)), max(1, min(rows, height // side - 1))
    image = _background(rng, width, height)
    card = columns * side + side // 2, rows * side + side // 2
    x0, y0 = int(rng.integers(0, max(1, width - card[0]))), int(rng.integers(0, max(1, height - card[1])))
    dark = bool(rng.integers(0, 2))
    ink, paper = (
        (int(rng.integers(0, 70)), int(rng.integers(190, 256))) if dark else (255 - int(rng.integers(0, 50)), 40)
    )
    draw = ImageDraw.Draw(image)
    draw.rectangle((x0, y0, x0 + card[0], y0 + card[1]), fill=(paper, paper, paper))
    draw.line((0, height - 3, width, height - 3), fill=(200, 30, 30), width=3)
    first, last = (TRAIN_DIGITS, len(scans()[1])) if held_out else (0, TRAIN_DIGITS)
    glyphs = []
    for row in range(rows):
        for column in range(columns):
            index = int(rng.integers(first, last))
            left, top = x0 + side // 4 + column * side, y0 + side // 4 + row * side
            _paste_digit(image, index, (left, top, left + side, top + side), ink, paper)
            glyphs.append((int(scans()[1][index]), (float(left), float(top), float(left + side), float(top + side))))
    card_box = (float(x0), float(y0), float(min(width, x0 + card[0])), float(min(height, y0 + card[1])))
    applied = str(rng.choice(list(ORIENTATIONS))) if kind != "crop" else ""
    if applied:
        back = invert(dihedral_affine(applied, width, height))
        image = turn_image(image, applied)
        glyphs = [(label, map_box(back, box)) for label, box in glyphs]
        card_box = map_box(back, card_box)
    required = ((applied,) if applied else ()) + (("crop",) if kind != "turned" else ())
    task = Task(
        id=str(seed), question="?", images=(image,), ground_truth="42", data_source="digits",
        required_transforms=required, box=card_box if kind != "turned" else None,
    )  # fmt: skip
    crop = None if kind == "turned" else tuple(round(v) for v in card_box)
    return Scene(image, tuple(Glyph(*glyph) for glyph in glyphs), task, UNDO.get(applied, ""), crop)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ honest programs
_TURNS = {
    "rotate_90": (
        "x = x.rotate(90, expand=True)",
        "x = x.transpose(Image.Transpose.ROTATE_90)",
        "x = Image.fromarray(np.rot90(np.array(x)))",
        "import cv2\nx = Image.fromarray(cv2.rotate(np.array(x), cv2.ROTATE_90_COUNTERCLOCKWISE))",
    ),
    "rotate_180": (
        "x = x.rotate(180)",
        "x = x.transpose(Image.Transpose.ROTATE_180)",
        "x = Image.fromarray(np.array(x)[::-1, ::-1].copy())",
        "x = ImageOps.flip(ImageOps.mirror(x))",
        "a = np.array(x)\nb = np.empty_like(a)\nb[:] = a[::-1, ::-1]\nx = Image.fromarray(b)",
    ),
    "rotate_270": (
        "x = x.rotate(-90, expand=True)",
        "x = x.transpose(Image.Transpose.ROTATE_270)",
        "x = Image.fromarray(np.rot90(np.array(x), k=-1).copy())",
        "x = x.rotate(270, expand=True, resample=Image.BICUBIC)",
    ),
    "flip_horizontal": (
        "x = ImageOps.mirror(x)",
        "x = x.transpose(Image.Transpose.FLIP_LEFT_RIGHT)",
        "x = Image.fromarray(np.fliplr(np.array(x)))",
        "import cv2\nx = Image.fromarray(cv2.flip(np.array(x), 1))",
    ),
    "flip_vertical": (
        "x = ImageOps.flip(x)",
        "x = x.transpose(Image.Transpose.FLIP_TOP_BOTTOM)",
        "x = Image.fromarray(np.array(x)[::-1].copy())",
    ),
}
_TONES = (
    *["x = ImageEnhance.Contrast(x).enhance({a:.2f})"] * 4,
    "x = ImageEnhance.Brightness(x).enhance({b:.2f})",
    *["x = ImageEnhance.Sharpness(x).enhance({c:.1f})"] * 4,
    "x = ImageEnhance.Color(x).enhance({a:.2f})",
    *["x = x.filter(ImageFilter.SHARPEN)"] * 2,
    "x = x.filter(ImageFilter.UnsharpMask(2, 150, 3))",
    "x = ImageOps.autocontrast(x)",
    "x = ImageOps.autocontrast(x, cutoff=1)",
    *["x = ImageOps.grayscale(x)", "x = x.convert('L')"] * 2,
    "x = ImageOps.invert(x)",
    "x = ImageOps.equalize(x)",
    "x = x.filter(ImageFilter.MedianFilter(3))",
    "x = Image.fromarray(np.clip(np.array(x) * 1.15 + 8, 0, 255).astype(np.uint8))",
    "import cv2\nx = Image.fromarray(cv2.createCLAHE(2.0, (8, 8)).apply(np.array(x.convert('L'))))",
)
_SIZES = (
    "x = x.resize((x.width * 2, x.height * 2), Image.LANCZOS)",
    "x = x.resize((x.width * 2, x.height * 2))",
    "x = x.resize((x.width * 3, x.height * 3), Image.BICUBIC)",
    "x = x.resize((x.width * 4, x.height * 4), Image.NEAREST)",
    "import cv2\nx = Image.fromarray(cv2.resize(np.array(x), None, fx=2.5, fy=2.5, interpolation=cv2.INTER_CUBIC))",
    "x = x.resize((int(x.width * 0.85), int(x.height * 0.85)), Image.LANCZOS)",
    "x = ImageOps.expand(x, 12, fill='white')",
    "x = x.resize((int(x.width * 1.4), int(x.height * 1.4)), Image.BILINEAR)",
)


def _crop_box(
    rng: np.random.Generator, box: tuple[int, int, int, int], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """The box with some room around it."""
    room = [int(v) for v in rng.integers(0, max(2, min(box[2] - box[0], box[3] - box[1]) // 5), 4)]
    left, top = max(0, box[0] - room[0]), max(0, box[1] - room[1])
    return left, top, min(size[0], box[2] + room[2]), min(size[1], box[3] + room[3])


def _crop_line(rng: np.random.Generator, box: tuple[int, int, int, int]) -> str:
    left, top, right, bottom = box
    return (
        f"x = x.crop(({left}, {top}, {right}, {bottom}))",
        f"x = Image.fromarray(np.array(x)[{top}:{bottom}, {left}:{right}])",
        f"x = Image.fromarray(np.array(x)[{top}:{bottom}, {left}:{right}].copy())",
        f"l, t = {left}, {top}\nx = x.crop((l, t, l + {right - left}, t + {bottom - top}))",
    )[rng.integers(0, 4)]


def _turn_line(rng: np.random.Generator, turn: str) -> str:
    return str(rng.choice(_TURNS[turn]))


def honest_program(seed: tuple[int, ...]) -> Program:
    """A program that does what its task wants, perhaps with a change of tone or size that helps to read."""
    rng = np.random.default_rng((*seed, 1))
    scene = make_scene(seed)
    shown = _crop_box(rng, scene.crop, scene.image.size) if scene.crop else None
    geometry = [_crop_line(rng, shown)] if shown else []
    geometry += [_turn_line(rng, scene.turn)] if scene.turn else []
    extra, kind = [], "plain"
    if rng.random() < 0.35:
        line = str(rng.choice(_TONES))
        extra.append(line.format(a=rng.uniform(1.1, 1.9), b=rng.uniform(0.6, 1.3), c=rng.uniform(1.2, 3)))
        kind = line.split("(")[0]
    if rng.random() < 0.25:
        extra.append(str(rng.choice(_SIZES)))
        kind += " sized"
    lines = [*geometry, *extra] if rng.random() < 0.8 else [*extra[:1], *geometry, *extra[1:]]
    border = 12 * any("expand(x, 12" in line for line in extra)
    if extra and "sized" in kind:
        lines = [*geometry, *extra]  # a crop in the pixels of the image as given comes first
    if len(geometry) == 2 and rng.random() < 0.4:
        first, second = [geometry[0]], [geometry[1], *extra]
        return Program(kind + " calls", scene, (_snippet(first), _snippet(second)), shown, border)
    return Program(kind, scene, (_snippet(lines),), shown, border)


def _snippet(lines: list[str]) -> str:
    return "\n".join(["x = image", *lines, "result = x"])
