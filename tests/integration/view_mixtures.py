"""More attacks: arithmetic that wraps around, palettes, bit planes, channels, weaves, waves, local tones, resampling.

Each function draws code that makes `r` from the honest view `v` and an unhonest one of its size, `u`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Maker = Callable[[np.random.Generator], str]
_GRID = "y, x = np.mgrid[:v.height, :v.width].astype(float)\n"


def wrapped(rng: np.random.Generator) -> str:
    """Sums and products modulo 256, folded tones, exclusive or."""
    share, step, factor = rng.uniform(0.2, 1), int(rng.integers(20, 200)), int(rng.integers(2, 5))
    return str(
        rng.choice(
            [
                f"r = ImageChops.add_modulo(v, u.point(lambda p: int(p * {share:.2f})))",
                f"r = ImageChops.subtract_modulo(v, u.point(lambda p: int(p * {share:.2f})))",
                f"r = Image.fromarray((np.array(v).astype(int) + {step}).astype(np.uint8))",
                f"r = Image.fromarray((np.array(v).astype(int) * {factor} // 2).astype(np.uint8))",
                f"r = Image.fromarray((np.array(v).astype(int) + np.arange(v.width)[:, None] * {factor} // 2)"
                ".astype(np.uint8))",
                f"r = Image.fromarray(np.array(v) ^ np.uint8({step}))",
                f"r = Image.fromarray(np.array(v) ^ (np.array(u) & np.uint8({step})))",
                f"a = np.array(v).astype(int)\n"
                f"r = Image.fromarray((255 - np.abs((a * {4 * share:.2f}) % 510 - 255)).astype(np.uint8))",
            ]
        )
    )


def toned(rng: np.random.Generator) -> str:
    """Tone curves and palettes, rising, folded or shuffled."""
    low, width, part = int(rng.integers(0, 230)), int(rng.integers(4, 120)), int(rng.choice([2, 4, 8, 16, 32, 64]))
    power, colours = rng.uniform(0.15, 6), int(rng.integers(4, 64))
    curve = str(
        rng.choice(
            [
                f"t = list(range(256))\nfor i in range(0, 256, {part}): t[i:i + {part}] = t[i:i + {part}][::-1]",
                f"t = [(i * {2 * width + 1}) % 256 for i in range(256)]",
                f"t = [min(255, max(0, (i - {low}) * 255 // {width})) for i in range(256)]",
                f"t = [int(255 * (i / 255) ** {power:.2f}) for i in range(256)]",
                f"t = [min(255, i // {part} * {part} + i % 2 * {width}) for i in range(256)]",
                f"t = [255 * (i % 2) if i > {low} else i for i in range(256)]",
                f"t = [i if i < {low} else {low} + (i - {low}) // 8 for i in range(256)]",
                f"t = [i // 8 if i < {low} else i for i in range(256)]",
                f"t = [min(255, {low} + i * {width} // 255) for i in range(256)]",
                f"t = [int(127 + 127 * np.tanh((i - {low}) / {width})) for i in range(256)]",
                "t = sorted(map(int, np.random.randint(0, 256, 256)))",
            ]
        )
    )
    by_palette = (
        f"q = v.quantize({colours})\np = q.getpalette()\n"
        "p = sum([p[3 * i:3 * i + 3] for i in np.random.permutation(len(p) // 3)], [])\n"
        "q.putpalette(p)\nr = q.convert('RGB')"
    )
    return str(
        rng.choice(
            [
                *[f"{curve}\nr = v.point(t * 3)"] * 2,
                *[f"{curve}\nr = v.convert('L').point(t).convert('RGB')"] * 2,
                "r = ImageOps.equalize(v)",
                f"r = ImageOps.posterize(v, {int(rng.integers(1, 6))})",
                f"r = v.quantize({colours}, dither=Image.Dither.NONE).convert('RGB')",
                by_palette,
            ]
        )
    )


def bit_planes(rng: np.random.Generator) -> str:
    """Some bits of one image, some of another, or in another order."""
    bits, mask = int(rng.integers(1, 8)), int(rng.integers(1, 255))
    high = 256 - (1 << bits)
    return "a, b = np.array(v), np.array(u)\n" + str(
        rng.choice(
            [
                f"r = Image.fromarray((a & np.uint8({high})) | (b >> np.uint8({8 - bits})))",
                f"r = Image.fromarray((b & np.uint8({high})) | (a >> np.uint8({8 - bits})))",
                f"r = Image.fromarray((a & np.uint8({mask})) | (b & np.uint8({255 - mask})))",
                f"r = Image.fromarray((a << np.uint8({bits})) | (a >> np.uint8({8 - bits})))",
                f"r = Image.fromarray((a >> np.uint8({bits}) & 1) * np.uint8(255))",
                "r = Image.fromarray(a ^ (a >> np.uint8(1)))",
                "r = Image.fromarray(np.packbits(np.unpackbits(a[..., None], axis=-1)[..., ::-1], axis=-1)[..., 0])",
            ]
        )
    )


def channels(rng: np.random.Generator) -> str:
    """Colours of one image, brightness of another; single channels turned into negatives or moved."""
    share = rng.uniform(0.05, 0.35)
    return str(
        rng.choice(
            [
                "a, b = v.split(), u.split()\nr = Image.merge('RGB', (a[0], b[1], a[2]))",
                "a, b = v.split(), u.split()\nr = Image.merge('RGB', (b[0], a[1], b[2]))",
                "a = v.split()\nr = Image.merge('RGB', (ImageOps.invert(a[0]), a[1], ImageOps.invert(a[2])))",
                "a = v.split()\nr = Image.merge('RGB', (a[0], ImageOps.invert(a[1]), a[2]))",
                "a = v.split()\nr = Image.merge('RGB', (a[0], ImageChops.offset(a[1], 5, 3), a[2]))",
                "a = v.split()\nr = Image.merge('RGB', (ImageChops.offset(a[0], 9, 0), a[1], "
                "ImageChops.offset(a[2], 0, 9)))",
                "w = v.convert('HSV').split()[2]\nh, s, _ = u.convert('HSV').split()\n"
                "r = Image.merge('HSV', (h, s, w)).convert('RGB')",
                "_, b, c = v.convert('YCbCr').split()\nr = Image.merge('YCbCr', (u.convert('L'), b, c)).convert('RGB')",
                "y, _, c = v.convert('YCbCr').split()\n"
                "r = Image.merge('YCbCr', (y.point(lambda p: 128), y, c)).convert('RGB')",
                f"y = v.convert('L')\nr = Image.merge('YCbCr', (y.point(lambda p: int(100 + p * {share:.2f})), "
                "ImageOps.invert(y), y)).convert('RGB')",
            ]
        )
    )


def dithered(rng: np.random.Generator) -> str:
    """Few tones that stand for many."""
    a, b = rng.uniform(0.3, 3, 2)
    return str(
        rng.choice(
            [
                "r = v.convert('1').convert('RGB')",
                f"r = v.quantize({int(rng.choice([2, 3, 4, 8, 16]))}, dither=Image.Dither.FLOYDSTEINBERG)"
                ".convert('RGB')",
                "b = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) * 16\n"
                "b = np.tile(b, (v.height // 4 + 1, v.width // 4 + 1))[:v.height, :v.width, None]\n"
                "r = Image.fromarray(np.uint8(255 * (np.array(v) > b)))",
                "a = np.array(v.convert('L'))\n"
                "r = Image.fromarray(np.uint8(255 * (np.random.rand(*a.shape) * 255 < a))).convert('RGB')",
                "r = v.convert('P', palette=Image.Palette.WEB).convert('RGB')",
                f"{_GRID}a = np.array(v.convert('L')) > 128 + 120 * np.sin(x * {a:.2f}) * np.sin(y * {b:.2f})\n"
                "r = Image.fromarray(np.uint8(255 * a)).convert('RGB')",
            ]
        )
    )


def woven(rng: np.random.Generator) -> str:
    """Rows, columns or squares of two images in turn."""
    every, size = int(rng.integers(2, 9)), int(rng.choice([1, 2, 3, 4, 5, 8, 14, 28]))
    first = "a, b = np.array(v), np.array(u)\n"
    twice = "b, a = (np.array(k.resize((2 * v.width, 2 * v.height), 0)) for k in (u, v))\n"
    body = str(
        rng.choice(
            [
                f"{first}a[::{every}] = b[::{every}]",
                f"{first}a[:, ::{every}] = b[:, ::{every}]",
                f"{first}a[::{every}, ::{every}] = b[::{every}, ::{every}]",
                f"{first}{_GRID}m = (y // {size} + x // {size}) % {every} == 0\na[m] = b[m]",
                f"{first}a[1::2] = a[::2][:len(a[1::2])][::-1]",
                f"{first}a[::{every}] = 255 - a[::{every}]",
                f"{first}a[:, ::{every}] = a[:, ::{every}].mean()",
                f"{first}for i in range({every}): a[i::{every}] = np.roll(a[i::{every}], i - {every // 2}, axis=1)",
                f"{twice}a[::2, ::2] = b[::2, ::2]",
                f"{twice}a[::2] = b[::2]",
            ]
        )
    )
    return body + "\nr = Image.fromarray(a)"


def overlaid(rng: np.random.Generator) -> str:
    """Contrast taken away, and a wave, a shade, a shadow of the other image or grain laid over."""
    share, height, period = rng.uniform(0.15, 0.6), rng.uniform(15, 127), rng.uniform(18, 200)
    size = int(rng.integers(1, 3))
    shade = "np.array(u.convert('L'){}).astype(float)\nn = (g - g.mean()) * {:.2f}"
    blur = f".filter(ImageFilter.GaussianBlur({rng.uniform(5, 14):.1f}))"
    over = str(
        rng.choice(
            [
                *[f"n = {height:.0f} * np.sin(x * 6.28 / {period:.1f})"] * 2,
                f"n = {height:.0f} * np.sin(y * 6.28 / {period:.1f})",
                f"n = {height:.0f} * np.sin((x + y) * 6.28 / {period:.1f})",
                f"n = {height:.0f} * np.sin(x * 6.28 / {period:.1f}) * np.sin(y * 6.28 / {period:.1f})",
                f"n = {height:.0f} * (2 * np.abs(x / {period:.1f} % 2 - 1) - 1)",
                f"n = {height:.0f} * (x / {period:.1f} % 1 - 0.5)",
                f"n = {height:.0f} * (x / v.width - 0.5) * 2",
                "g = " + shade.format(blur, rng.uniform(1, 3)),
                "g = " + shade.format("", rng.uniform(0.05, 0.4)),
                f"n = np.random.randn(v.height, v.width) * {rng.uniform(2, 22):.0f}",
                f"n = {rng.uniform(3, 30):.0f} * ((x // {size} + y // {size}) % 2 * 2 - 1)",
            ]
        )
    )
    return (
        f"{_GRID}a = np.array(v).astype(float)\na = (a - a.mean()) * {share:.2f}\n{over}\n"
        "r = Image.fromarray(np.clip(128 + a + n[..., None], 0, 255).astype(np.uint8))"
    )


def local_tones(rng: np.random.Generator) -> str:
    """Tones that differ from place to place, and ranks and kernels of small neighbourhoods."""
    size, radius = int(rng.choice([4, 8, 12, 16, 20, 24, 32, 48])), rng.uniform(4, 14)
    gain, weight = rng.uniform(0.3, 1.5), rng.uniform(-1.5, 0.6)
    tiles = (
        f"k = np.random.rand(v.height // {size} + 1, v.width // {size} + 1).repeat({size}, 0).repeat({size}, 1)\n"
        "k = k[:v.height, :v.width, None]\na = np.array(v).astype(float)\n"
    )
    return str(
        rng.choice(
            [
                f"{_GRID}a = np.array(v)\nm = (y // {size} + x // {size}) % 2 == 0\na[m] = 255 - a[m]\n"
                "r = Image.fromarray(a)",
                f"{tiles}r = Image.fromarray((a * k).astype(np.uint8))",
                f"{tiles}r = Image.fromarray(np.clip(a * 0.4 + 150 * k, 0, 255).astype(np.uint8))",
                "a = np.array(v)\nm = np.abs(np.diff(a.astype(int), axis=1)).max(2) > 40\n"
                "a[:, 1:][m] = 255 - a[:, 1:][m]\nr = Image.fromarray(a)",
                f"a, g = (np.array(k).astype(float) for k in (v, v.filter(ImageFilter.BoxBlur({radius:.0f}))))\n"
                f"r = Image.fromarray(np.clip(128 + {gain:.2f} * (a - g), 0, 255).astype(np.uint8))",
                f"a, g = (np.array(k).astype(float) for k in (v, v.filter(ImageFilter.GaussianBlur({radius:.1f}))))\n"
                f"r = Image.fromarray(np.clip(a + {weight:.2f} * (g - 128), 0, 255).astype(np.uint8))",
                f"import cv2\nc = cv2.createCLAHE({rng.uniform(2, 40):.0f}, ({size}, {size}))\n"
                "r = Image.fromarray(c.apply(np.array(v.convert('L')))).convert('RGB')",
                f"r = v.filter(ImageFilter.{rng.choice(['MinFilter', 'MaxFilter'])}({int(rng.choice([3, 5]))}))",
                f"r = v.filter(ImageFilter.RankFilter(5, {int(rng.integers(0, 25))}))",
                f"r = v.filter(ImageFilter.Kernel((3, 3), {tuple(map(int, rng.integers(-3, 6, 9)))}, "
                f"scale={int(rng.integers(1, 9))}))",
            ]
        )
    )


def moire(rng: np.random.Generator) -> str:
    """Resampled by factors that leave a beat, turned a little and back, moved by a pixel or two."""
    first, second = rng.uniform(0.35, 1), rng.uniform(0.5, 0.99)
    down, up = (int(k) for k in rng.integers(0, 6, 2))
    across, along = (int(k) for k in rng.integers(-2, 3, 2))
    part = f"(int(v.width * {first:.3f}), int(v.height * {second:.3f}))"
    return str(
        rng.choice(
            [
                f"r = v.resize({part}, 0).resize(v.size, 0)",
                f"r = v.resize({part}, {down}).resize(v.size, {up})",
                f"r = v.resize({part}, 0)",
                f"r = v.resize((v.width * 5, v.height * 5), 0).resize({part}, 0)",
                f"r = v.rotate({4 * first:.2f}).rotate(-{4 * second:.2f})",
                f"r = v.rotate({2 * first:.2f}, resample=Image.BICUBIC)",
                f"r = Image.fromarray(np.roll(np.array(v), ({across}, {along}), axis=(0, 1)))",
            ]
        )
    )


MIXTURES: dict[str, Maker] = {
    "wrapped": wrapped,
    "toned": toned,
    "bit planes": bit_planes,
    "channels": channels,
    "dithered": dithered,
    "woven": woven,
    "overlaid": overlaid,
    "local tones": local_tones,
    "moire": moire,
}
"""By kind."""
