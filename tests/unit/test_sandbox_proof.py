"""The proof of a map: what an honest change leaves, what takes legibility away, and what it costs."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from cv_lightning.images import compose
from cv_lightning.sandbox.effect import _net_effect, _shows, net_effect, shows
from cv_lightning.sandbox.geometry import turn
from cv_lightning.types import IDENTITY, Affine

Change = Callable[[Image.Image], Image.Image]


def text_image(width: int = 480, height: int = 360, scale: int = 2) -> Image.Image:
    """Lines of text on a light ground, with a dark frame."""
    small = Image.new("RGB", (width // scale, height // scale), (235, 232, 225))
    draw = ImageDraw.Draw(small)
    for row in range(height // scale // 16):
        draw.text((6, 3 + 15 * row), "0123 quick brown 4567 fox 89", fill=(30, 30, 60))
    draw.rectangle((1, 1, small.width - 2, small.height - 2), outline=(60, 20, 20))
    return small.resize((width, height), Image.Resampling.BICUBIC)


TEXT = text_image()
HALF = turn("rotate_180", *TEXT.size)


def jpeg(image: Image.Image) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=60)
    return Image.open(data).convert("RGB")


def noisy(image: Image.Image, sigma: float) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, sigma, (image.height, image.width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def back(image: Image.Image, size: tuple[int, int], resample: int = Image.Resampling.BICUBIC) -> Image.Image:
    return image.resize(size).resize(image.size, resample)


def checkered(image: Image.Image, size: int) -> Image.Image:
    y, x = np.mgrid[: image.height, : image.width]
    mask = Image.fromarray(np.uint8(255 * ((y // size + x // size) % 2)))
    return Image.composite(image, image.transpose(Image.Transpose.ROTATE_180), mask)


HONEST: dict[str, Change] = {
    "nothing": lambda x: x,
    "contrast": lambda x: ImageEnhance.Contrast(x).enhance(1.8),
    "less contrast": lambda x: ImageEnhance.Contrast(x).enhance(0.5),
    "darker": lambda x: ImageEnhance.Brightness(x).enhance(0.5),
    "sharper": lambda x: ImageEnhance.Sharpness(x).enhance(3),
    "unsharp mask": lambda x: x.filter(ImageFilter.UnsharpMask(2, 150, 3)),
    "grey": lambda x: ImageOps.grayscale(x).convert("RGB"),
    "inverted": ImageOps.invert,
    "autocontrast": lambda x: ImageOps.autocontrast(x, cutoff=1),
    "gamma": lambda x: x.point(lambda v: round(255 * (v / 255) ** 2.2)),
    "threshold": lambda x: x.convert("L").point(lambda v: 255 * (v > 140)).convert("RGB"),
    "local contrast": lambda x: local_contrast(x),
    "compressed": jpeg,
    "a little noise": lambda x: noisy(x, 8),
    "enlarged": lambda x: x.resize((960, 720), Image.Resampling.LANCZOS),
    "enlarged without smoothing": lambda x: x.resize((1920, 1440), Image.Resampling.NEAREST),
    "reduced": lambda x: x.resize((360, 270)),
    "padded": lambda x: ImageOps.expand(x, 20, fill="black"),
    "a box drawn on it": lambda x: drawn(x),
}  # fmt: skip


def local_contrast(image: Image.Image) -> Image.Image:
    return Image.fromarray(cv2.createCLAHE(2, (8, 8)).apply(np.asarray(image.convert("L")))).convert("RGB")


def drawn(image: Image.Image) -> Image.Image:
    image = image.copy()
    ImageDraw.Draw(image).line((20, 210, 90, 210), fill="red", width=1)
    return image


DISHONEST: dict[str, Change] = {
    "blended": lambda x: Image.blend(x, x.transpose(Image.Transpose.ROTATE_180), 0.5),
    "pasted over": lambda x: pasted(x, 0.45),
    "a small image in it": lambda x: pasted(x, 0.3),
    "checkered, fine": lambda x: checkered(x, 1),
    "checkered, coarse": lambda x: checkered(x, 24),
    "noise": lambda x: noisy(x, 90),
    "6x8": lambda x: back(x, (6, 8)),
    "one pixel": lambda x: back(x, (1, 1)),
    "a seventh": lambda x: back(x, (68, 51)),
    "squares": lambda x: back(x, (60, 45), Image.Resampling.NEAREST),
    "flattened": lambda x: x.resize((480, 24)).resize((480, 360)),
    "black": lambda x: ImageEnhance.Brightness(x).enhance(0),
    "nearly black": lambda x: ImageEnhance.Brightness(x).enhance(0.02),
    "blurred": lambda x: x.filter(ImageFilter.GaussianBlur(6)),
    "text into ground": lambda x: x.point(lambda v: max(v, 225)),
    "edges": lambda x: x.filter(ImageFilter.FIND_EDGES),
    "scattered": lambda x: x.effect_spread(12),
    "shifted": lambda x: Image.fromarray(np.roll(np.asarray(x), 7, axis=1)),
    "mirrored": ImageOps.mirror,
    "one line painted over": lambda x: painted(x),
    "a sum that wraps around": lambda x: ImageChops.add_modulo(x, ImageEnhance.Brightness(TEXT).enhance(0.4)),
    "folded tones": lambda x: x.point(lambda v: 255 - abs(2 * v - 255)),
    "faint beside waves": lambda x: waved(x),
    "a photograph": lambda x: noisy(Image.new("RGB", x.size, "grey"), 60),
}


def waved(image: Image.Image) -> Image.Image:
    faint = 0.25 * (np.asarray(image, np.float64) - 128)
    wave = 100 * np.sin(np.arange(image.width) / 10)[:, None]
    return Image.fromarray(np.clip(128 + faint + wave, 0, 255).astype(np.uint8))


def pasted(image: Image.Image, share: float) -> Image.Image:
    made = image.copy()
    small = image.transpose(Image.Transpose.ROTATE_180).resize((int(480 * share), int(360 * share)))
    made.paste(small, (120, 100))
    return made


def painted(image: Image.Image) -> Image.Image:
    image = image.copy()
    ImageDraw.Draw(image).rectangle((0, 215, 200, 245), fill=(235, 232, 225))
    return image


def map_for(result: Image.Image, border: int = 0) -> Affine:
    scale = TEXT.width / (result.width - 2 * border), TEXT.height / (result.height - 2 * border)
    return compose(HALF, Affine(scale[0], 0, -border * scale[0], 0, scale[1], -border * scale[1]))


@pytest.mark.parametrize("change", HONEST)
def test_redteam_an_honest_change_keeps_the_map(change: str) -> None:
    result = HONEST[change](TEXT.transpose(Image.Transpose.ROTATE_180)).convert("RGB")
    claim = map_for(result, 20 if change == "padded" else 0)
    found = net_effect([claim], TEXT, result, direct=True)
    assert found.effect.to_input == claim and found.effect.core == ("rotate_180",)
    assert found.same_pixels is (change == "nothing")
    assert shows(claim, TEXT, result)


@pytest.mark.parametrize("change", DISHONEST)
def test_redteam_what_is_less_legible_proves_no_map(change: str) -> None:
    result = DISHONEST[change](TEXT.transpose(Image.Transpose.ROTATE_180)).convert("RGB")
    claim = map_for(result)
    found = net_effect([claim], TEXT, result, direct=True).effect
    assert found.to_input != claim
    assert change == "mirrored" or found.to_input is None
    assert not shows(claim, TEXT, result)


def test_redteam_enlarging_adds_no_freedom_between_the_pixels() -> None:
    part = TEXT.crop((40, 40, 160, 130)).resize((960, 720), Image.Resampling.BICUBIC)
    claim = Affine(1 / 8, 0, 40, 0, 1 / 8, 40)
    assert net_effect([claim], TEXT, part, direct=True).effect.to_input == claim
    y, x = np.mgrid[:720, :960]
    pattern = np.where((y // 2 + x // 2) % 2, 90, -90)[..., None]
    covered = Image.fromarray(np.clip(np.asarray(part).astype(int) // 2 + 64 + pattern, 0, 255).astype(np.uint8))
    assert net_effect([claim], TEXT, covered, direct=True).effect.to_input is None


def test_redteam_a_large_result_is_also_compared_in_its_own_pixels() -> None:
    large = Image.new("RGB", (2400, 1800))
    for left in range(0, 2400, 480):
        for top in range(0, 1800, 360):
            large.paste(text_image(scale=1), (left, top))
    claim = turn("rotate_180", *large.size)
    turned = large.transpose(Image.Transpose.ROTATE_180)
    assert net_effect([claim], large, turned, direct=True).same_pixels
    pixels = np.asarray(turned).reshape(450, 4, 600, 4, 3).transpose(0, 2, 1, 3, 4).reshape(450, 600, 16, 3)
    order = np.random.default_rng(0).permutation(16)
    mixed = pixels[:, :, order].reshape(450, 600, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(1800, 2400, 3)
    result = Image.fromarray(np.ascontiguousarray(mixed))
    assert net_effect([claim], large, result, direct=True).effect.to_input is None


def test_redteam_a_border_hides_what_is_under_it() -> None:
    part = TEXT.crop((100, 80, 220, 170))
    framed = ImageOps.expand(part, 30, fill="white")
    claim = Affine(1, 0, 70, 0, 1, 50)
    found = net_effect([claim], TEXT, framed, direct=True).effect
    assert found.to_input == claim and found.crop_box == (100, 80, 220, 170) and found.shown == (30, 30, 150, 120)


@pytest.mark.parametrize("slice_", ["copied", "copied and turned", "moved"])
def test_redteam_the_proof_of_a_mostly_white_page_is_bounded(slice_: str) -> None:
    """Such pages cost 33 s of processor time once."""
    page = Image.new("RGB", (4000, 4000), "white")
    page.paste(text_image(), (300, 500))
    part = page.crop((200, 300, 3900, 3800))
    if slice_ == "copied and turned":
        part = part.transpose(Image.Transpose.ROTATE_90)
    begun = time.thread_time()
    claims = [] if slice_ == "copied" else [IDENTITY, Affine(1, 0, 10, 0, 1, 10)]
    found = net_effect(claims, page, part, direct=slice_ == "moved")
    assert time.thread_time() - begun < 1.0
    if slice_ == "copied":
        assert found.effect.crop_box == (200, 300, 3900, 3800) and found.same_pixels


numbers = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, 1e-5, -1e-5, 9e6, -9e6]), st.floats(-1e7, 1e7, allow_nan=False)
)
sides = st.integers(1, 90)
SMALL = TEXT.crop((0, 0, 150, 110))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.builds(Affine, *[numbers] * 6), max_size=3), sides, sides, st.booleans(), st.integers(0, 3))
def test_redteam_no_claim_raises_in_the_parent(
    claims: list[Affine], width: int, height: int, direct: bool, kind: int
) -> None:
    """Nor does any need the net that catches what a library raises."""
    result = [
        SMALL.resize((width, height)),
        Image.new("RGB", (width, height), "white"),
        SMALL.crop((-width, -9, 40, height)),
        noisy(Image.new("RGB", (width, height)), 90),
    ][kind]
    _net_effect(claims, SMALL, result, direct=direct and bool(claims))
    for claim in claims:
        _shows(claim, SMALL, result)
