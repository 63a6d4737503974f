"""Names of operations and maps of their pixels: pure functions of evaluated arguments.

The tracer in the child and the plan executor both use them, so that both report the same. Sizes are (width, height);
maps go from coordinates of the output to coordinates of the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from cv_lightning.images import dihedral_affine
from cv_lightning.types import IDENTITY, Affine

Size = tuple[int, int]
Described = tuple[str, Affine | None]
"""Name in the reward's vocabulary, and the map to the input (None: not affine, or unknown)."""

TRANSPOSES = ("flip_horizontal", "flip_vertical", "rotate_90", "rotate_180", "rotate_270", "transpose", "transverse")
"""Names of the values of `PIL.Image.Transpose`, in their order."""
SYMMETRIES = ("identity", *TRANSPOSES)
"""The eight symmetries of a frame."""
SWAPPING = ("rotate_90", "rotate_270", "transpose", "transverse")
"""Symmetries that exchange width and height."""
SIGNS = {
    (1, 0, 0, 1): "identity",
    (0, -1, 1, 0): "rotate_90",
    (-1, 0, 0, -1): "rotate_180",
    (0, 1, -1, 0): "rotate_270",
    (-1, 0, 0, 1): "flip_horizontal",
    (1, 0, 0, -1): "flip_vertical",
    (0, 1, 1, 0): "transpose",
    (0, -1, -1, 0): "transverse",
}
"""Symmetries by the signs of the linear part of their map to the input."""
SILENT = ("copy", "convert")
"""Names of operations that are followed and not reported."""
ENHANCERS = ("Contrast", "Brightness", "Sharpness", "Color")
"""Classes of `PIL.ImageEnhance`."""
GREY_CODES = (6, 7, 10, 11)
"""`cv2.COLOR_*2GRAY` of three and four channels."""
CV2_ROTATIONS = ("rotate_270", "rotate_180", "rotate_90")
"""Names of the values of `cv2.ROTATE_*`, in their order."""


def _by_call(calls: Mapping[str, str]) -> dict[str, str]:
    """Names by call, from calls (separated by spaces) by name."""
    return {call: name for name, listed in calls.items() for call in listed.split()}


FILTERS = _by_call(
    {
        "sharpen": "SHARPEN UnsharpMask DETAIL EDGE_ENHANCE EDGE_ENHANCE_MORE",
        "smooth": "SMOOTH SMOOTH_MORE BLUR BoxBlur",
        "gaussian_blur": "GaussianBlur",
        "median_blur": "MedianFilter",
        "edge_detect": "FIND_EDGES CONTOUR EMBOSS",
    }
)
"""Names of the filters of `PIL.ImageFilter`."""
PLAIN = _by_call(
    {
        "autocontrast": "ImageOps.autocontrast cv2.normalize skimage.exposure.rescale_intensity",
        "equalize": "ImageOps.equalize cv2.equalizeHist skimage.exposure.equalize_hist "
        "skimage.exposure.equalize_adapthist",
        "grayscale": "ImageOps.grayscale skimage.color.rgb2gray",
        "invert": "ImageOps.invert cv2.bitwise_not skimage.util.invert",
        "posterize": "ImageOps.posterize",
        "solarize": "ImageOps.solarize",
        "colorize": "ImageOps.colorize",
        "gaussian_blur": "cv2.GaussianBlur skimage.filters.gaussian",
        "median_blur": "cv2.medianBlur skimage.filters.median",
        "smooth": "cv2.blur cv2.boxFilter cv2.bilateralFilter cv2.fastNlMeansDenoising "
        "cv2.fastNlMeansDenoisingColored skimage.restoration.denoise_bilateral skimage.restoration.denoise_nl_means "
        "skimage.restoration.denoise_tv_chambolle",
        "edge_detect": "cv2.Canny cv2.Sobel cv2.Laplacian skimage.filters.sobel",
        "convolve": "cv2.filter2D",
        "threshold": "cv2.threshold cv2.adaptiveThreshold",
        "blend": "cv2.addWeighted",
        "draw": "cv2.rectangle cv2.line cv2.circle cv2.putText cv2.polylines cv2.fillPoly",
        "morphology": "cv2.erode cv2.dilate cv2.morphologyEx",
        "convert": "cv2.cvtColor",
        "tone": "cv2.LUT skimage.exposure.adjust_gamma skimage.exposure.adjust_log skimage.exposure.adjust_sigmoid",
        "sharpen": "cv2.detailEnhance skimage.filters.unsharp_mask",
        "warp": "cv2.warpPerspective cv2.remap",
    }
)
"""Names of calls that leave every pixel where it is, except for `warp`."""


def turn(name: str, width: int, height: int) -> Affine:
    """The map of one of `SYMMETRIES` of a frame of `width` x `height`, the size before it."""
    if name == "transpose":
        return Affine(0, 1, 0, 1, 0, 0)
    if name == "transverse":
        return Affine(0, -1, width, -1, 0, height)
    return dihedral_affine(name, width, height)


def scaling(output: Size, box: tuple[float, float, float, float]) -> Affine:
    """The map of a resize of `box` to `output`."""
    left, top, right, bottom = box
    return Affine((right - left) / output[0], 0.0, float(left), 0.0, (bottom - top) / output[1], float(top))


def filter_arguments(kind: Any) -> dict[str, Any]:
    """Name and settings of a filter of `PIL.ImageFilter`, which is a class or an object."""
    values = {k: v for k, v in getattr(kind, "__dict__", {}).items() if not k.startswith("_")}
    return {"filter": kind.__name__ if isinstance(kind, type) else type(kind).__name__, **values}


def _rotate(arguments: Mapping[str, Any], size: Size, output: Size) -> Described:
    """`Image.rotate`: counter-clockwise about the centre; the matrix is that of Pillow 13."""
    angle = float(arguments.get("angle") or 0.0) % 360.0
    center, translate = arguments.get("center"), arguments.get("translate")
    name = {0.0: "copy", 90.0: "rotate_90", 180.0: "rotate_180", 270.0: "rotate_270"}.get(angle, "rotate")
    width, height = size
    at = center if center is not None else (width / 2, height / 2)
    shift = translate if translate is not None else (0, 0)
    radians = -math.radians(angle)
    cos, sin = round(math.cos(radians), 15), round(math.sin(radians), 15)
    x0, y0 = -at[0] - shift[0], -at[1] - shift[1]
    c, f = cos * x0 + sin * y0 + at[0], -sin * x0 + cos * y0 + at[1]
    if output != size:
        dx, dy = -(output[0] - width) / 2.0, -(output[1] - height) / 2.0
        c, f = c + cos * dx + sin * dy, f - sin * dx + cos * dy
    return name, Affine(cos, sin, c, -sin, cos, f)


def _resize(arguments: Mapping[str, Any], size: Size, output: Size) -> Described:
    box = arguments.get("box")
    return "resize", scaling(output, tuple(box) if box is not None else (0, 0, *size))


def _crop(arguments: Mapping[str, Any], size: Size, output: Size) -> Described:
    box = arguments.get("box")
    if box is None:
        return "copy", IDENTITY
    return "crop", Affine(1, 0, round(box[0]), 0, 1, round(box[1]))


def _fit(arguments: Mapping[str, Any], size: Size, output: Size) -> Described:
    """`ImageOps.fit`: crop to the aspect of the target, then resize (Pillow 13 `ImageOps.fit`)."""
    bleed, centering = float(arguments.get("bleed") or 0.0), arguments.get("centering") or (0.5, 0.5)
    bleed = bleed if 0.0 <= bleed < 0.5 else 0.0
    border = bleed * size[0], bleed * size[1]
    live = size[0] - border[0] * 2, size[1] - border[1] * 2
    ratio, wanted = live[0] / live[1], output[0] / output[1]
    if ratio == wanted:
        width, height = live
    elif ratio >= wanted:
        width, height = wanted * live[1], live[1]
    else:
        width, height = live[0], live[0] / wanted
    left = border[0] + (live[0] - width) * centering[0]
    top = border[1] + (live[1] - height) * centering[1]
    return "crop", scaling(output, (left, top, left + width, top + height))


def _pad(arguments: Mapping[str, Any], size: Size, output: Size) -> Described:
    scale = min(output[0] / size[0], output[1] / size[1])
    width, height = round(size[0] * scale), round(size[1] * scale)
    centering = arguments.get("centering") or (0.5, 0.5)
    left = round((output[0] - width) * max(0, min(centering[0], 1)))
    top = round((output[1] - height) * max(0, min(centering[1], 1)))
    sx, sy = size[0] / width, size[1] / height
    return "pad", Affine(sx, 0, -left * sx, 0, sy, -top * sy)


def _transform(arguments: Mapping[str, Any], size: Size, output: Size) -> Described:
    data = arguments.get("data")
    method = arguments.get("method")
    method = getattr(method, "value", method)
    if method == 0 and isinstance(data, tuple | list) and len(data) >= 6:
        return "warp", Affine(*(float(v) for v in data[:6]))
    if method == 1 and isinstance(data, tuple | list) and len(data) == 4:
        return "crop", scaling(output, tuple(data))
    return "warp", None


def _warp_affine(arguments: Mapping[str, Any], size: Size, output: Size) -> Described:
    """`cv2.warpAffine`: M maps pixel centres of the input to those of the output, unless WARP_INVERSE_MAP."""
    rows = arguments.get("matrix")
    if rows is None:
        return "warp", None
    a, b, c, d, e, f = (float(v) for v in rows)
    if not int(arguments.get("flags") or 0) & 16:
        det = a * e - b * d
        if abs(det) < 1e-12:
            return "warp", None
        a, b, d, e, c, f = e / det, -b / det, -d / det, a / det, (b * f - e * c) / det, (d * c - a * f) / det
    # From pixel centres at whole numbers to edges at whole numbers.
    c, f = c + 0.5 - 0.5 * (a + b), f + 0.5 - 0.5 * (d + e)
    turned = abs(math.remainder(math.degrees(math.atan2(b, a)), 360.0))
    name = "translate" if turned < 1e-6 and abs(a - 1) < 1e-6 else "resize" if turned < 1e-6 else "rotate"
    return name, Affine(a, b, c, d, e, f)


def _framed(arguments: Mapping[str, Any], size: Size, output: Size) -> Described:
    """`ImageOps.expand` and `ImageOps.crop`: a border is added or removed."""
    border = arguments.get("border", 0)
    left, top = map(int, border[:2] if isinstance(border, tuple | list) else (border, border))
    if output[0] >= size[0] and output[1] >= size[1]:
        return "pad", Affine(1, 0, -left, 0, 1, -top)
    return "crop", Affine(1, 0, left, 0, 1, top)


GEOMETRIC: dict[str, Callable[[Mapping[str, Any], Size, Size], Described]] = {
    "Image.rotate": _rotate,
    "Image.resize": _resize,
    "Image.crop": _crop,
    "Image.transform": _transform,
    "ImageOps.fit": _fit,
    "ImageOps.pad": _pad,
    "ImageOps.expand": _framed,
    "ImageOps.crop": _framed,
    "cv2.warpAffine": _warp_affine,
    "skimage.transform.rotate": _rotate,
}
"""Calls whose map depends on their arguments."""
RESIZES = (
    "cv2.resize cv2.pyrUp cv2.pyrDown skimage.transform.resize skimage.transform.rescale Image.thumbnail Image.reduce "
    "ImageOps.contain ImageOps.cover ImageOps.scale"
).split()


TURNS = (
    "ImageOps.mirror ImageOps.flip cv2.rotate cv2.flip cv2.transpose numpy.rot90 numpy.flip numpy.fliplr numpy.flipud"
).split()
"""Calls that apply a symmetry of the frame."""


def _symmetry(call: str, arguments: Mapping[str, Any]) -> str | None:
    """Name of the symmetry of the frame that a call applies, or `reverse` for other axes; None for other calls."""
    if call == "Image.transpose":
        return TRANSPOSES[int(arguments.get("method", 0))]
    if call == "cv2.rotate":
        return CV2_ROTATIONS[int(arguments["code"])]
    if call == "cv2.flip":
        code = int(arguments["code"])
        return "flip_vertical" if code == 0 else "flip_horizontal" if code > 0 else "rotate_180"
    if call == "cv2.transpose":
        return "transpose"
    if call in ("ImageOps.mirror", "numpy.fliplr"):
        return "flip_horizontal"
    if call in ("ImageOps.flip", "numpy.flipud"):
        return "flip_vertical"
    if call == "numpy.rot90":
        turns = int(arguments.get("k", 1))
        backwards = tuple(arguments.get("axes", (0, 1))) in ((1, 0), (-2, -3))
        return ("identity", "rotate_90", "rotate_180", "rotate_270")[(-turns if backwards else turns) % 4]
    if call == "numpy.flip":
        axis = arguments.get("axis")
        axes = (axis,) if isinstance(axis, int) else tuple(axis or ())
        return {(0,): "flip_vertical", (1,): "flip_horizontal", (0, 1): "rotate_180"}.get(axes, "reverse")
    return None


def _tone(call: str, arguments: Mapping[str, Any]) -> str | None:
    """Name of a call that leaves every pixel where it is and depends on its arguments; None for other calls."""
    if call == "cv2.cvtColor":
        return "grayscale" if arguments.get("code") in GREY_CODES else "convert"
    if call == "Image.filter":
        return FILTERS.get(str(arguments.get("filter")), "filter")
    if call == "Image.convert":
        return "grayscale" if arguments.get("mode") in ("L", "LA", "1") else "convert"
    if call == "ImageEnhance.Sharpness":
        return "sharpness"
    if call.startswith("ImageEnhance."):
        return f"{call.split('.')[1].lower()}_{'up' if arguments.get('factor', 1.0) >= 1 else 'down'}"
    return None


def describe(call: str, arguments: Mapping[str, Any], size: Size, output: Size) -> Described:
    """Name and map of one call that ran.

    Args:
        call: Library and function: `Image.rotate`, `ImageOps.mirror`, `cv2.flip`, `numpy.rot90`.
        arguments: Evaluated arguments by name.
        size: Width and height before.
        output: Width and height after.
    """
    geometric = GEOMETRIC.get(call)
    if geometric is not None:
        return geometric(arguments, size, output)
    symmetry = _symmetry(call, arguments)
    if symmetry in SYMMETRIES:
        return "copy" if symmetry == "identity" else symmetry, turn(symmetry, *size)
    if symmetry is not None:
        return symmetry, None
    if call in RESIZES:
        return "resize", scaling(output, (0, 0, *size))
    tone = _tone(call, arguments)
    if tone is not None:
        return tone, IDENTITY
    name = PLAIN.get(call) or call.rsplit(".", 1)[-1].lower()[:32]
    return name, None if name == "warp" or size != output else IDENTITY
