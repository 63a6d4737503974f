"""What an operation is called and where its result's pixels come from: pure functions of evaluated arguments.

Used by the tracer in the child and by the plan tier, so that both tell the same story. Sizes are (width, height);
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
"""By the value of `PIL.Image.Transpose`."""
SYMMETRIES = ("identity", *TRANSPOSES)
"""The eight symmetries of a frame."""
GREY_CODES = (6, 7, 10, 11)
"""`cv2.COLOR_*2GRAY` of three and four channels."""
CV2_ROTATIONS = ("rotate_270", "rotate_180", "rotate_90")
"""By the value of `cv2.ROTATE_*`."""
FILTERS = {
    "SHARPEN": "sharpen",
    "UnsharpMask": "sharpen",
    "DETAIL": "sharpen",
    "EDGE_ENHANCE": "sharpen",
    "EDGE_ENHANCE_MORE": "sharpen",
    "SMOOTH": "smooth",
    "SMOOTH_MORE": "smooth",
    "BLUR": "smooth",
    "BoxBlur": "smooth",
    "GaussianBlur": "gaussian_blur",
    "MedianFilter": "median_blur",
    "FIND_EDGES": "edge_detect",
    "CONTOUR": "edge_detect",
    "EMBOSS": "edge_detect",
}
PLAIN = {
    "ImageOps.autocontrast": "autocontrast",
    "ImageOps.equalize": "equalize",
    "ImageOps.grayscale": "grayscale",
    "ImageOps.invert": "invert",
    "ImageOps.posterize": "posterize",
    "ImageOps.solarize": "solarize",
    "ImageOps.colorize": "colorize",
    "cv2.GaussianBlur": "gaussian_blur",
    "cv2.medianBlur": "median_blur",
    "cv2.blur": "smooth",
    "cv2.boxFilter": "smooth",
    "cv2.bilateralFilter": "smooth",
    "cv2.fastNlMeansDenoising": "smooth",
    "cv2.fastNlMeansDenoisingColored": "smooth",
    "cv2.Canny": "edge_detect",
    "cv2.Sobel": "edge_detect",
    "cv2.Laplacian": "edge_detect",
    "cv2.equalizeHist": "equalize",
    "cv2.filter2D": "convolve",
    "cv2.threshold": "threshold",
    "cv2.adaptiveThreshold": "threshold",
    "cv2.bitwise_not": "invert",
    "cv2.normalize": "autocontrast",
    "cv2.addWeighted": "blend",
    "cv2.rectangle": "draw",
    "cv2.line": "draw",
    "cv2.circle": "draw",
    "cv2.putText": "draw",
    "cv2.polylines": "draw",
    "cv2.fillPoly": "draw",
    "cv2.erode": "morphology",
    "cv2.dilate": "morphology",
    "cv2.morphologyEx": "morphology",
    "cv2.cvtColor": "convert",
    "cv2.LUT": "tone",
    "cv2.detailEnhance": "sharpen",
    "cv2.warpPerspective": "warp",
    "cv2.remap": "warp",
    "skimage.exposure.equalize_hist": "equalize",
    "skimage.exposure.equalize_adapthist": "equalize",
    "skimage.exposure.rescale_intensity": "autocontrast",
    "skimage.exposure.adjust_gamma": "tone",
    "skimage.exposure.adjust_log": "tone",
    "skimage.exposure.adjust_sigmoid": "tone",
    "skimage.filters.gaussian": "gaussian_blur",
    "skimage.filters.median": "median_blur",
    "skimage.filters.unsharp_mask": "sharpen",
    "skimage.filters.sobel": "edge_detect",
    "skimage.color.rgb2gray": "grayscale",
    "skimage.restoration.denoise_bilateral": "smooth",
    "skimage.restoration.denoise_nl_means": "smooth",
    "skimage.restoration.denoise_tv_chambolle": "smooth",
    "skimage.util.invert": "invert",
}
"""Calls that leave every pixel where it is (but for the warps), by name."""
NOT_AFFINE = ("warp",)


def matrix_of(name: str, size: Size) -> Affine:
    """The map of a turn or flip of a picture of `size`, transpose and transverse included."""
    width, height = size
    if name == "transpose":
        return Affine(0, 1, 0, 1, 0, 0)
    if name == "transverse":
        return Affine(0, -1, width, -1, 0, height)
    return dihedral_affine(name, width, height)


def turn(name: str, width: int, height: int) -> Affine:
    """The map of one of `SYMMETRIES` of a frame."""
    return matrix_of(name, (width, height))


def scaling(output: Size, box: tuple[float, float, float, float]) -> Affine:
    """The map of a resize of `box` to `output`."""
    return Affine((box[2] - box[0]) / output[0], 0.0, float(box[0]), 0.0, (box[3] - box[1]) / output[1], float(box[1]))


def _rotate(arguments: Mapping[str, Any], size: Size, output: Size) -> Described:
    """`Image.rotate`: counter-clockwise about the centre; Pillow 13 `Image.rotate` gives the matrix."""
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


def _border(arguments: Mapping[str, Any], size: Size, output: Size) -> tuple[int, int]:
    border = arguments.get("border", 0)
    if isinstance(border, tuple | list):
        return int(border[0]), int(border[1])
    return int(border), int(border)


def _transform(arguments: Mapping[str, Any], size: Size, output: Size) -> Described:
    data = arguments.get("data")
    method = arguments.get("method")
    method = getattr(method, "value", method)
    if method == 0 and isinstance(data, tuple | list) and len(data) >= 6:
        return "warp", Affine(*(float(v) for v in data[:6]))
    if method == 1 and isinstance(data, tuple | list) and len(data) == 4:
        return "crop", scaling(output, tuple(data))
    return "warp", None


def _enhance(kind: str, arguments: Mapping[str, Any]) -> str:
    factor = arguments.get("factor", 1.0)
    word = {"Contrast": "contrast", "Brightness": "brightness", "Sharpness": "sharpness", "Color": "color"}[kind]
    return word if word == "sharpness" else f"{word}_{'up' if factor >= 1 else 'down'}"


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


def _skimage_rotate(arguments: Mapping[str, Any], size: Size, output: Size) -> Described:
    name, affine = _rotate({**arguments, "center": arguments.get("center"), "translate": None}, size, output)
    return name, affine


def _framed(arguments: Mapping[str, Any], size: Size, output: Size) -> Described:
    """`ImageOps.expand` and `ImageOps.crop`: a border is added or cut off."""
    left, top = _border(arguments, size, output)
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
    "skimage.transform.rotate": _skimage_rotate,
}
"""Calls whose map is worked out from their arguments."""
RESIZES = (
    "cv2.resize cv2.pyrUp cv2.pyrDown skimage.transform.resize skimage.transform.rescale Image.thumbnail Image.reduce "
    "ImageOps.contain ImageOps.cover ImageOps.scale"
).split()


def _array_turn(call: str, arguments: Mapping[str, Any], size: Size) -> Described:
    """np.rot90, flip, fliplr, flipud on rows x columns."""
    if call == "numpy.rot90":
        name = ("copy", "rotate_90", "rotate_180", "rotate_270")[int(arguments.get("k", 1)) % 4]
        axes = tuple(arguments.get("axes", (0, 1)))
        if axes in ((1, 0), (-2, -3)):
            name = {"rotate_90": "rotate_270", "rotate_270": "rotate_90"}.get(name, name)
    elif call == "numpy.flip":
        axis = arguments.get("axis")
        axis = (axis,) if isinstance(axis, int) else axis
        name = {(0,): "flip_vertical", (1,): "flip_horizontal", (0, 1): "rotate_180"}.get(tuple(axis or ()), "reverse")
    else:
        name = "flip_horizontal" if call == "numpy.fliplr" else "flip_vertical"
    if name == "reverse":
        return name, None
    return name, IDENTITY if name == "copy" else matrix_of(name, size)


def _symmetry(call: str, arguments: Mapping[str, Any]) -> str | None:
    """Which symmetry of the frame a call is; None if it is no such call."""
    if call == "Image.transpose":
        return TRANSPOSES[int(arguments.get("method", 0))]
    if call == "cv2.rotate":
        return CV2_ROTATIONS[int(arguments["code"])]
    if call == "cv2.flip":
        code = int(arguments["code"])
        return "flip_vertical" if code == 0 else "flip_horizontal" if code > 0 else "rotate_180"
    return {"ImageOps.mirror": "flip_horizontal", "ImageOps.flip": "flip_vertical", "cv2.transpose": "transpose"}.get(
        call
    )


def _tone(call: str, arguments: Mapping[str, Any]) -> str | None:
    """Name of a call that leaves every pixel where it is; None if it is no such call."""
    if call == "cv2.cvtColor":
        return "grayscale" if arguments.get("code") in GREY_CODES else "convert"
    if call == "Image.filter":
        return FILTERS.get(str(arguments.get("filter")), "filter")
    if call == "Image.convert":
        return "grayscale" if arguments.get("mode") in ("L", "LA", "1") else "convert"
    return _enhance(call.split(".")[1], arguments) if call.startswith("ImageEnhance.") else None


def describe(call: str, arguments: Mapping[str, Any], size: Size, output: Size) -> Described:
    """Name and map of one call that really ran.

    Args:
        call: library and function: `Image.rotate`, `ImageOps.mirror`, `cv2.flip`, `numpy.rot90`.
        arguments: evaluated arguments by name.
        size: width and height before.
        output: width and height after.
    """
    geometric = GEOMETRIC.get(call)
    if geometric is not None:
        return geometric(arguments, size, output)
    symmetry = _symmetry(call, arguments)
    if symmetry is not None:
        return symmetry, matrix_of(symmetry, size)
    if call.startswith("numpy."):
        return _array_turn(call, arguments, size)
    if call in RESIZES:
        return "resize", scaling(output, (0, 0, *size))
    tone = _tone(call, arguments)
    if tone is not None:
        return tone, IDENTITY
    name = PLAIN.get(call) or call.rsplit(".", 1)[-1].lower()[:32]
    return name, None if name in NOT_AFFINE or size != output else IDENTITY
