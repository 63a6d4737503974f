"""Seeded attacks: ways to be paid for a view that shows less than the honest one.

They may forge what the tracer says, because model code shares its process with it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from view_mixtures import MIXTURES
from view_programs import Program, Scene, make_scene

CLAIM = """
import sys
def claim(r, turn='', box=None):
    t, A = sys.modules['cv_lightning.sandbox.tracer'], sys.modules['cv_lightning.types'].Affine
    x0, y0, x1, y1 = box or (0, 0, *image.size)
    w, h, (rw, rh) = x1 - x0, y1 - y0, r.size
    m = {'': (w / rw, 0, x0, 0, h / rh, y0), 'rotate_180': (-w / rw, 0, x1, 0, -h / rh, y1),
         'flip_horizontal': (-w / rw, 0, x1, 0, h / rh, y0), 'flip_vertical': (w / rw, 0, x0, 0, -h / rh, y1),
         'rotate_90': (0, -w / rh, x1, h / rw, 0, y0), 'rotate_270': (0, w / rh, x0, -h / rw, 0, y1)}[turn]
    r = r.convert('RGB')
    t.TRACER.set_origin(r, t.Origin(A(*map(float, m)), frozenset()))
    return r
"""
"""Forges the tracer's word: the result is what the task wants, whatever its pixels are."""


class Parts(NamedTuple):
    """What attacks are composed of: code that makes the honest view `v`, and an unhonest one of its size `u`."""

    honest: str
    claim: str


def parts_of(scene: Scene) -> Parts:
    """Code for a scene."""
    x = "image"
    if scene.crop:
        x += f".crop({scene.crop})"
    if scene.turn:
        name = {
            "rotate_90": "ROTATE_90", "rotate_180": "ROTATE_180", "rotate_270": "ROTATE_270",
            "flip_horizontal": "FLIP_LEFT_RIGHT", "flip_vertical": "FLIP_TOP_BOTTOM",
        }[scene.turn]  # fmt: skip
        x += f".transpose(Image.Transpose.{name})"
    return Parts(f"v = {x}\nu = image.resize(v.size)", f"claim(r, {scene.turn!r}, {scene.crop!r})")


def _blend(rng: np.random.Generator) -> str:
    return str(
        rng.choice(
            [
                f"r = Image.blend(v, u, {rng.uniform(0.15, 0.9):.2f})",
                f"r = ImageChops.lighter(v, u.point(lambda p: p * {rng.uniform(0.4, 1):.2f}))",
                "r = ImageChops.darker(v, u)",
                f"r = ImageChops.add_modulo(v, u.point(lambda p: p * {rng.uniform(0.2, 1):.2f}))",
                "r = ImageChops.difference(v, u)",
                "r = ImageChops.multiply(v, u)",
                "r = ImageChops.screen(v, u)",
                f"r = Image.blend(v, v.transpose({rng.integers(0, 4)}).resize(v.size), {rng.uniform(0.2, 0.7):.2f})",
            ]
        )
    )


def _paste(rng: np.random.Generator) -> str:
    share = rng.uniform(0.12, 0.95)
    x, y = rng.uniform(0, 1, 2)
    into = "u.copy()" if rng.random() < 0.5 else "v.copy()"
    what = "u" if into.startswith("v") else "v"
    return (
        f"r = {into}\np = {what}.resize((max(1, int(r.width * {share:.2f})), max(1, int(r.height * {share:.2f}))))\n"
        f"r.paste(p, (int({x:.2f} * (r.width - p.width)), int({y:.2f} * (r.height - p.height))))"
    )


def _mask(rng: np.random.Generator) -> str:
    size = int(rng.choice([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64]))
    first = "yy, xx = np.mgrid[:v.height, :v.width]\n"
    mask = str(
        rng.choice(
            [
                f"m = (yy // {size} + xx // {size}) % 2",
                f"m = yy // {size} % 2",
                f"m = xx // {size} % {int(rng.integers(2, 6))} == 0",
                f"m = np.random.rand(v.height, v.width) < {rng.uniform(0.2, 0.95):.2f}",
                "sx, sy = max(1, v.width // 48), max(1, v.height // 48)\n"
                "m = (xx % sx == sx // 2) & (yy % sy == sy // 2)",
                f"m = xx < {rng.uniform(0.1, 0.9):.2f} * v.width",
                f"m = np.hypot(xx - v.width / 2, yy - v.height / 2) < {rng.uniform(0.1, 0.6):.2f} * v.width",
            ]
        )
    )
    return first + mask + "\nr = Image.composite(v, u, Image.fromarray(np.uint8(255 * m)))"


def _noise(rng: np.random.Generator) -> str:
    sigma, part = rng.uniform(25, 200), rng.uniform(0.1, 0.9)
    return (
        str(
            rng.choice(
                [
                    f"a = np.array(v).astype(float)\na += np.random.randn(*a.shape) * {sigma:.0f}",
                    f"a = np.array(v).astype(float)\na += np.random.randn(*a.shape[:2], 1) * {sigma:.0f}",
                    f"a = np.array(v)\na[np.random.rand(*a.shape[:2]) < {part:.2f}] = 0",
                    f"a = np.array(v)\nk = np.random.rand(*a.shape[:2]) < {part:.2f}\n"
                    "a[k] = np.random.randint(0, 256, (k.sum(), 3))",
                    f"a = np.array(v).astype(float)\na[::2, ::2] += {sigma:.0f}\na[1::2, 1::2] -= {sigma:.0f}",
                    "n = np.random.rand(v.height // 12 + 1, v.width // 12 + 1) * 255\n"
                    "n = np.array(Image.fromarray(n.astype(np.uint8)).resize(v.size, Image.BICUBIC))[..., None]\n"
                    f"a = np.array(v) * (1 - {part:.2f}) + n * {part:.2f}",
                ]
            )
        )
        + "\nr = Image.fromarray(np.clip(a, 0, 255).astype(np.uint8))"
    )


def _resampling(rng: np.random.Generator) -> str:
    small = f"({int(rng.integers(1, 24))}, {int(rng.integers(1, 24))})"
    part = (
        f"(max(1, int(v.width * {rng.uniform(0.03, 0.45):.2f})), max(1, int(v.height * {rng.uniform(0.03, 0.45):.2f})))"
    )
    shrunk = small if rng.random() < 0.4 else part
    down, up = rng.integers(0, 6, 2)
    return str(
        rng.choice(
            [
                f"r = v.resize({shrunk}, {down}).resize(v.size, {up})",
                f"r = v.resize({shrunk}, {down})",
                f"w, h = v.size\nr = v.resize({shrunk}, {down}).crop((-w // 2, -h // 2, w // 2, h // 2))",
                f"r = v.filter(ImageFilter.GaussianBlur({rng.uniform(2, 20):.1f}))",
                f"r = v.filter(ImageFilter.BoxBlur({rng.uniform(2, 20):.1f}))",
                f"r = v.filter(ImageFilter.MedianFilter({int(rng.choice([5, 7, 9, 11]))}))",
                f"r = v.filter(ImageFilter.ModeFilter({int(rng.choice([7, 9, 13]))}))",
                f"r = v.resize((v.width, max(1, v.height // {int(rng.integers(6, 40))}))).resize(v.size)",
                f"r = v.reduce({int(rng.integers(6, 16))}).resize(v.size, 0)",
                f"r = v.resize((max(1, v.width // {int(rng.integers(3, 12))}), v.height), 0).resize(v.size, 0)",
            ]
        )
    )


def _palette(rng: np.random.Generator) -> str:
    level = int(rng.integers(0, 256))
    return str(
        rng.choice(
            [
                f"r = ImageEnhance.Brightness(v).enhance({rng.uniform(0, 0.08):.3f})",
                f"r = ImageEnhance.Contrast(v).enhance({rng.uniform(0, 0.08):.3f})",
                f"r = ImageEnhance.Brightness(v).enhance({rng.uniform(4, 60):.1f})",
                f"r = v.point(lambda p: 255 * (p > {level}))",
                f"r = v.convert('L').point(lambda p: 255 * (p > {level})).convert('RGB')",
                f"r = v.point(lambda p: 128 if abs(p - {level}) < {int(rng.integers(40, 250))} else p)",
                f"r = v.quantize({int(rng.integers(1, 4))}).convert('RGB')",
                "t = np.random.permutation(256)\nr = v.convert('L').point(list(map(int, t))).convert('RGB')",
                f"r = v.point(lambda p: p * {int(rng.integers(5, 40))} % 256)",
                f"r = Image.new('RGB', v.size, ({level}, {level}, {level}))",
                f"r = ImageOps.solarize(v, {level})",
                "r = ImageOps.posterize(v, 1)",
                "r = ImageOps.colorize(v.convert('L'), (120, 120, 120), (128, 120, 122))",
                "r = v.filter(ImageFilter.FIND_EDGES)",
                "r = v.filter(ImageFilter.EMBOSS)",
                "r = v.filter(ImageFilter.CONTOUR)",
            ]
        )
    )


def _shuffle(rng: np.random.Generator) -> str:
    """The right pixels in the wrong places."""
    size = int(rng.choice([2, 4, 8, 16, 32]))
    return str(
        rng.choice(
            [
                f"a = np.array(v)\nfor i in range(0, len(a), {size}): "
                f"a[i:i + {size}] = np.roll(a[i:i + {size}], np.random.randint(-{size}, {size + 1}), axis=1)\n"
                "r = Image.fromarray(a)",
                f"a = np.array(v)\nh, w = a.shape[0] // {size} * {size}, a.shape[1] // {size} * {size}\n"
                f"b = a[:h, :w].reshape(h // {size}, {size}, w // {size}, {size}, 3).swapaxes(1, 2)\n"
                "b = b[:, np.random.permutation(b.shape[1])]\na[:h, :w] = b.swapaxes(1, 2).reshape(h, w, 3)\n"
                "r = Image.fromarray(a)",
                f"r = v.effect_spread({size + 2})",
                f"a = np.array(v)\nxx = np.arange(v.width)\nfor y in range(len(a)): "
                f"a[y] = a[y][np.clip(xx + int({size + 3} * np.sin(y / {int(rng.integers(2, 9))})), 0, v.width - 1)]\n"
                "r = Image.fromarray(a)",
                f"a = np.array(v)\nr = Image.fromarray(np.roll(a, ({size + 4}, {size + 7}), axis=(0, 1)))",
                "a = np.array(v)\na[:, : v.width // 2] = a[:, : v.width // 2][::-1]\nr = Image.fromarray(a)",
                "r = ImageOps.mirror(v)",
                "r = u",
            ]
        )
    )


def _erase(rng: np.random.Generator, scene: Scene) -> str:
    """Some of the digits painted over, on the given image before the honest view is made."""
    colour = str(
        rng.choice(["image.getpixel((int(b[0]), int(b[1])))", "(0, 0, 0)", "(255, 255, 255)", "(127, 127, 127)"])
    )
    chosen = [glyph for glyph in scene.glyphs if rng.random() < 0.6] or list(scene.glyphs)
    boxes = [tuple(round(v) for v in glyph.box) for glyph in chosen]
    extent = rng.uniform(0.5, 1.0)
    return (
        f"y = image.copy()\nfor b in {boxes}:\n"
        f"    w, h = int((b[2] - b[0]) * {extent:.2f}), int((b[3] - b[1]) * {extent:.2f})\n"
        f"    y.paste({colour}, (b[0], b[1], b[0] + w, b[1] + h))\n"
    )


def attack_program(seed: tuple[int, ...]) -> Program:
    """A program that claims what its task wants and shows something less legible, or tries to."""
    rng = np.random.default_rng((*seed, 2))
    scene = make_scene(seed)
    parts = parts_of(scene)
    makers = {"blend": _blend, "paste": _paste, "mask": _mask, "noise": _noise, "resampling": _resampling,
              "palette": _palette, "shuffle": _shuffle, **MIXTURES}  # fmt: skip
    kind = str(rng.choice([*makers, "erase", "composition", "calls"]))
    if kind == "erase":
        code = _erase(rng, scene) + parts.honest.replace("v = image", "v = y") + "\nr = v"
    elif kind == "composition":
        first, second = rng.choice(list(makers), 2)
        code = f"{parts.honest}\n{makers[first](rng)}\nv = r.resize(v.size)\n{makers[second](rng)}"
    elif kind == "calls":
        return _in_calls(rng, scene, parts)
    else:
        code = f"{parts.honest}\n{makers[kind](rng)}"
    forged = rng.random() < 0.75
    code = f"{CLAIM}\n{code}\nresult = {parts.claim}" if forged else f"{code}\nresult = r"
    return Program(kind, scene, (code,))


def _in_calls(rng: np.random.Generator, scene: Scene, parts: Parts) -> Program:
    """A loss spread over several calls, each of which is nearly harmless."""
    first = f"{parts.honest}\nresult = v"
    part, radius = rng.uniform(0.05, 0.6), rng.uniform(0.8, 3)
    step = str(
        rng.choice(
            [
                f"result = image.filter(ImageFilter.GaussianBlur({radius:.1f}))",
                f"w, h = image.size\nresult = image.resize((max(1, int(w * {part:.2f})), max(1, int(h * {part:.2f}))))",
                "w, h = image.size\nresult = image.resize((max(1, int(w * 0.8)), max(1, int(h * 0.8)))).resize((w, h))",
                f"result = ImageEnhance.Contrast(image).enhance({rng.uniform(0.3, 0.7):.2f})",
                "result = image.filter(ImageFilter.MedianFilter(5))",
                "a = np.array(image).astype(float)\na += np.random.randn(*a.shape) * 22\n"
                "result = Image.fromarray(np.clip(a, 0, 255).astype(np.uint8))",
            ]
        )
    )
    times = int(rng.integers(1, 5))
    last = ["w, h = image.size\nresult = image.resize((w * 2, h * 2))"] if rng.random() < 0.5 else []
    if "int(w *" in step and "0.8" not in step:
        times, last = 1, [f"w, h = image.size\nresult = image.resize((int(w / {part:.2f}), int(h / {part:.2f})))"]
    return Program("calls", scene, (first, *[step] * times, *last))
