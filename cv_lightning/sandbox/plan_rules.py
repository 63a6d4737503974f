"""The calls of the plan executor: the checks of their arguments, the sizes of their results and their costs.

A snippet with an argument that is not known to be harmless is not a plan (`NotPlannable`); it runs in a child.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image, ImageFilter

from cv_lightning.sandbox.geometry import ENHANCERS, Size

MAX_PIXELS = 16_000_000
MAX_RADIUS = 32.0
MAX_KERNEL = 15
MAX_NUMBER = 1e6
MAX_FACTOR = 100.0
COST_MS_PER_MP = {
    "crop": 0.5, "transpose": 2.0, "rotate": 12.0, "resize": 12.0, "convert": 1.5, "copy": 0.5, "filter": 25.0,
    "mirror": 2.0, "flip": 1.0, "autocontrast": 5.0, "equalize": 5.0, "grayscale": 1.5, "invert": 2.0, "enhance": 4.0,
    "posterize": 2.0, "solarize": 2.0, "expand": 2.0, "fit": 12.0, "pad": 12.0,
}  # fmt: skip
"""Estimated milliseconds per megapixel of the larger of input and output."""
SMOOTH_ROTATION = 4.0
"""A rotation with interpolation costs this many times one without."""

Number = int | float
MODULES = ("Image", "ImageOps", "ImageEnhance", "ImageFilter", "math")
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "int": int, "float": float, "round": round, "min": min, "max": max, "abs": abs,
    **{f"math.{name}": getattr(math, name) for name in ("floor", "ceil", "sqrt", "degrees", "radians", "sin", "cos")},
}  # fmt: skip
FILTERS = ("SHARPEN", "DETAIL", "SMOOTH", "SMOOTH_MORE", "BLUR", "EDGE_ENHANCE", "EDGE_ENHANCE_MORE", "FIND_EDGES")
CONSTANTS: dict[str, Any] = {
    **{f"Image.{m.name}": m for m in (*Image.Transpose, *Image.Resampling)},
    **{f"Image.Transpose.{m.name}": m for m in Image.Transpose},
    **{f"Image.Resampling.{m.name}": m for m in Image.Resampling},
    **{f"ImageFilter.{name}": getattr(ImageFilter, name) for name in FILTERS},
    "math.pi": math.pi,
}
FILTER_CLASSES = {
    "GaussianBlur": ("radius",),
    "BoxBlur": ("radius",),
    "MedianFilter": ("size",),
    "UnsharpMask": ("radius", "percent", "threshold"),
}
OPERATIONS: dict[str, tuple[str, ...]] = {
    "Image.crop": ("box",),
    "Image.rotate": ("angle", "resample", "expand", "center", "translate", "fillcolor"),
    "Image.transpose": ("method",),
    "Image.resize": ("size", "resample", "box"),
    "Image.convert": ("mode",),
    "Image.copy": (),
    "Image.filter": ("filter",),
    **{f"ImageOps.{name}": () for name in ("mirror", "flip", "equalize", "grayscale", "invert")},
    "ImageOps.autocontrast": ("cutoff",),
    "ImageOps.posterize": ("bits",),
    "ImageOps.solarize": ("threshold",),
    "ImageOps.expand": ("border", "fill"),
    "ImageOps.crop": ("border",),
    "ImageOps.fit": ("size", "method"),
    "ImageOps.pad": ("size", "method", "color"),
    **{f"ImageEnhance.{name}": ("factor",) for name in ENHANCERS},
}
"""Names of the arguments of each operation, after the image."""
OPTIONAL = ("ImageOps.autocontrast", "ImageOps.solarize", "ImageOps.expand", "ImageOps.crop")
"""Operations that can be called without their first argument."""
IMPORTABLE: dict[str, frozenset[str]] = {
    "Image": frozenset({"Transpose", "Resampling"}),
    "ImageOps": frozenset(call.removeprefix("ImageOps.") for call in OPERATIONS if call.startswith("ImageOps.")),
    "ImageEnhance": frozenset(ENHANCERS),
    "ImageFilter": frozenset({*FILTERS, *FILTER_CLASSES}),
}
"""What `from PIL.X import Y` may name."""


class NotPlannable(Exception):
    """The snippet is not a plan; a child has to run it."""


# ------------------------------------------------------------------------------------------------ checks
def in_range(value: object) -> Any:
    """The value itself if it is a number of modest size.

    Raises:
        NotPlannable: It is not.
    """
    if type(value) in (int, float) and abs(value) < MAX_NUMBER:  # type: ignore[arg-type]
        return value
    raise NotPlannable("a number out of range")


def _is_number(value: object, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high  # type: ignore[operator]


def _is_colour(value: object) -> bool:
    """A colour as a name or as whole numbers; Pillow checks the name."""
    if isinstance(value, tuple):
        return len(value) in (3, 4) and all(type(v) is int and 0 <= v <= 255 for v in value)
    return value is None or isinstance(value, str) or (type(value) is int and 0 <= value <= 255)


def _is_size(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(v) is int and v > 0 for v in value)


def _is_choice(value: object, high: int) -> bool:
    """True for a constant of Pillow, or its number."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= high


def make_filter(name: str, arguments: dict[str, Any]) -> ImageFilter.Filter:
    """A filter object with capped radius or kernel."""
    high = {"size": MAX_KERNEL, "percent": 1000, "threshold": 255}
    if not all(_is_number(value, 0, high.get(key, MAX_RADIUS)) for key, value in arguments.items()):
        raise NotPlannable("radius")
    if name == "MedianFilter" and (type(arguments.get("size", 3)) is not int or arguments.get("size", 3) % 2 == 0):
        raise NotPlannable("size")
    made: ImageFilter.Filter = getattr(ImageFilter, name)(**arguments)
    return made


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "angle": lambda v: _is_number(v, -MAX_NUMBER, MAX_NUMBER),
    "resample": lambda v: v is None or _is_choice(v, 5),
    "method": lambda v: v is None or _is_choice(v, 5),
    "expand": lambda v: isinstance(v, bool) or _is_number(v, 0, 1),
    "center": lambda v: v is None,
    "translate": lambda v: v is None,
    "fillcolor": _is_colour,
    "fill": _is_colour,
    "color": _is_colour,
    "border": lambda v: type(v) is int and 0 <= v <= 4096,
    "cutoff": lambda v: _is_number(v, 0, 49),
    "bits": lambda v: type(v) is int and 1 <= v <= 8,
    "threshold": lambda v: _is_number(v, 0, 255),
    "factor": lambda v: _is_number(v, -MAX_FACTOR, MAX_FACTOR),
    "mode": lambda v: v in ("L", "RGB"),
    "filter": lambda v: (
        isinstance(v, ImageFilter.Filter)
        or (isinstance(v, type) and issubclass(v, ImageFilter.Filter) and v.__name__ in {*FILTERS, *FILTER_CLASSES})
    ),
    "size": _is_size,
    "box": lambda v: isinstance(v, tuple) and len(v) == 4 and v[0] < v[2] and v[1] < v[3],
}


def output_size(call: str, size: Size, arguments: Mapping[str, Any]) -> Size:
    """Size of an operation's result.

    Raises:
        NotPlannable: An argument is missing, of the wrong kind or too large, or the result exceeds `MAX_PIXELS`.
    """
    for key, value in arguments.items():
        if not (_is_choice(value, 6) if call == "Image.transpose" else _CHECKS[key](value)):
            raise NotPlannable(key)
    if call not in OPTIONAL and not set(OPERATIONS[call][:1]) <= set(arguments):
        raise NotPlannable("a missing argument")
    width, height = _size_after(call, size, arguments)
    if not (width > 0 and height > 0 and width * height <= MAX_PIXELS):
        raise NotPlannable("size")
    return width, height


def _size_after(call: str, size: Size, arguments: Mapping[str, Any]) -> Size:
    if call == "Image.crop":
        x0, y0, x1, y1 = map(round, arguments["box"])
        return x1 - x0, y1 - y0
    if call in ("Image.resize", "ImageOps.fit", "ImageOps.pad"):
        width, height = arguments["size"]
        return width, height
    if call == "Image.transpose":
        swaps = int(arguments["method"]) in (2, 4, 5, 6)
        return (size[1], size[0]) if swaps else size
    if call == "Image.rotate" and arguments.get("expand"):
        return _expanded(float(arguments["angle"]) % 360.0, size)
    if call in ("ImageOps.expand", "ImageOps.crop"):
        grow = 2 * arguments.get("border", 0) * (1 if call == "ImageOps.expand" else -1)
        return size[0] + grow, size[1] + grow
    return size


def _expanded(angle: float, size: Size) -> Size:
    """Size of a rotation with `expand`; the arithmetic of Pillow 13 `Image.rotate`."""
    width, height = size
    if angle in (0.0, 180.0):
        return size
    if angle in (90.0, 270.0):
        return height, width
    turn = -math.radians(angle)
    a, b, d, e = (round(v, 15) for v in (math.cos(turn), math.sin(turn), -math.sin(turn), math.cos(turn)))
    c = a * (-width / 2) + b * (-height / 2) + width / 2
    f = d * (-width / 2) + e * (-height / 2) + height / 2
    corners = ((0, 0), (width, 0), (width, height), (0, height))
    xs = [a * x + b * y + c for x, y in corners]
    ys = [d * x + e * y + f for x, y in corners]
    return math.ceil(max(xs)) - math.floor(min(xs)), math.ceil(max(ys)) - math.floor(min(ys))


# ------------------------------------------------------------------------------------------------ cost
def cost_ms(call: str, size: Size, made: Size, arguments: Mapping[str, Any]) -> float:
    """Estimated milliseconds of one operation on one core."""
    name = "enhance" if call.startswith("ImageEnhance.") else call.split(".")[1]
    pixels = made[0] * made[1]
    if name != "crop":
        pixels = max(size[0] * size[1], pixels)
    per_pixel = COST_MS_PER_MP[name]
    if name == "rotate":
        quarter = arguments["angle"] % 90 == 0 and (arguments.get("expand") or size[0] == size[1])
        if arguments["angle"] % 180 == 0 or quarter:
            per_pixel = COST_MS_PER_MP["transpose"]
        elif arguments.get("resample"):
            per_pixel *= SMOOTH_ROTATION
    elif name == "filter" and isinstance(arguments["filter"], ImageFilter.MedianFilter):
        per_pixel *= arguments["filter"].size ** 2
    return per_pixel * pixels / 1e6
