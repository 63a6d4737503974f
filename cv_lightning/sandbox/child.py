"""What happens inside a fresh child: load the picture, seal the process, run the snippet, write the result."""

from __future__ import annotations

import builtins
import linecache
import math
import mmap
import os
import random
import sys
import traceback
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from cv_lightning.sandbox import tracer
from cv_lightning.sandbox.wire import HEADER, MAGIC, MAX_TEXT, STATUS_ERROR, STATUS_OK, Trace, pack_trace

FILE = "<code>"
ASPECT_LIMIT = 200
HINTS = {
    "FileNotFoundError": "files cannot be read; the picture is in `image`",
    "PermissionError": "files, processes and the network are closed; use `image` and the imaging libraries",
    "ModuleNotFoundError": "available: PIL, numpy, cv2, skimage, scipy, math and the standard library",
    "ImportError": "available: PIL, numpy, cv2, skimage, scipy, math and the standard library",
    "SyntaxError": "send complete, valid Python",
}


class ResultError(Exception):
    """The snippet's result is no usable image; `kind` is the typed reason."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class ChildJob:
    """One snippet to run."""

    code: str
    width: int
    height: int
    max_pixels: int
    memory_mb: int
    seed: bytes
    reference: bool


def namespace(image: Image.Image, code: str = "") -> dict[str, Any]:
    """The names that the protocol promises, with `image` (and its old name `img`).

    `draw` is made only where the code speaks of it: it copies the picture.
    """
    scope: dict[str, Any] = {
        "__name__": "__main__", "__builtins__": builtins, "image": image, "img": image, "PIL": PIL, "Image": Image,
        "ImageOps": ImageOps, "ImageEnhance": ImageEnhance, "ImageFilter": ImageFilter, "ImageDraw": ImageDraw,
        "ImageFont": ImageFont, "ImageChops": ImageChops, "ImageColor": ImageColor, "np": np, "numpy": np, "math": math,
    }  # fmt: skip
    for name in ("cv2", "skimage", "scipy"):
        if name in sys.modules:
            scope[name] = sys.modules[name]
    if "draw" in code:
        scope["draw"] = ImageDraw.Draw(image)
    return scope


def load_input(fd: int, width: int, height: int) -> tuple[Image.Image, mmap.mmap]:
    """The input picture from its sealed memfd, and the mapped bytes."""
    mapped = mmap.mmap(fd, width * height * 3, mmap.MAP_PRIVATE, mmap.PROT_READ)
    return Image.frombuffer("RGB", (width, height), mapped, "raw", "RGB", 0, 1), mapped


def seed_everything(seed: bytes) -> None:
    """Make random numbers a function of picture and code (a fork inherits one state for all)."""
    number = int.from_bytes(seed[:4], "little")
    random.seed(number)
    np.random.seed(number)
    cv2 = sys.modules.get("cv2")
    if cv2 is not None:
        cv2.setRNGSeed(number & 0x7FFFFFFF)


# ------------------------------------------------------------------------------------------------ the result
def pick_result(scope: dict[str, Any], image: Image.Image, original: mmap.mmap, reference: bool) -> Any:
    """What the snippet hands back: `result`, `output`, else a rebound name, else the picture if it was drawn on."""
    for name in ("result", "output"):
        if scope.get(name) is not None:
            return scope[name]
    names = ("img", "image") if reference else ("processed_image", "image", "img")
    if reference:
        return next((scope[name] for name in names if isinstance(scope.get(name), Image.Image)), None)
    for name in names:
        if scope.get(name) is not image and scope.get(name) is not None:
            return scope[name]
    if image.tobytes() != original[:]:
        return image
    raise ResultError("no_result", "no result: put the new image into `result`, for example `result = image.crop((0, 0, 100, 100))`")


def _array_to_image(array: np.ndarray[Any, Any]) -> Image.Image:
    shape = "x".join(map(str, array.shape))
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ResultError("wrong_mode", f"the result is an array of shape {shape}, not an image of height x width (x 3)")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ResultError("nan", "the result has NaN or infinite values; use np.nan_to_num and values from 0 to 255")
        array = array * 255.0 if array.size and array.max() <= 1.0 else array
    elif array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype.kind not in "iu":
        raise ResultError("wrong_mode", f"the result is an array of {array.dtype}; use array.astype(np.uint8)")
    if array.dtype != np.uint8:
        array = np.clip(array, 0, 255).astype(np.uint8)
    return Image.fromarray(array)


def checked_result(result: Any, max_pixels: int) -> Image.Image:
    """The result as an RGB image.

    Raises:
        ResultError: not an image, no pixels, too large, extreme aspect, NaN.
    """
    origin = tracer.TRACER.origin_of(result)
    if isinstance(result, np.ndarray):
        check_size(*(tracer.size_of(result) or (0, 0)), max_pixels)
        result = _array_to_image(result)
    kind = type(result)
    if not isinstance(result, Image.Image) or not kind.__module__.startswith("PIL."):
        raise ResultError("not_an_image", f"the result is not an image but {kind.__name__}; `result` must be a PIL image or a uint8 array")
    check_size(*result.size, max_pixels)
    image = to_rgb(result)
    if origin is not None:
        tracer.TRACER.set_origin(image, origin)
    return image


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Refuse sizes that nobody can look at."""
    if width < 1 or height < 1:
        raise ResultError("zero_size", f"the result has no pixels ({width}x{height}); check the crop box (left, upper, right, lower)")
    if width * height > max_pixels:
        raise ResultError("too_large", f"the result is too large: {width}x{height}, at most {max_pixels} pixels; crop or resize")
    if max(width, height) >= ASPECT_LIMIT * min(width, height):
        raise ResultError("aspect", f"the result of {width}x{height} is {ASPECT_LIMIT} times longer than wide or more; crop a wider part")


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB form of an image of any mode, as `cv_lightning.images.to_rgb`; NaN is refused."""
    from cv_lightning import images

    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ResultError("nan", "the result has NaN or infinite values; use np.nan_to_num and values from 0 to 255")
    return images.to_rgb(image)


# ------------------------------------------------------------------------------------------------ errors
def describe_error(error: BaseException, job: ChildJob) -> tuple[str, str]:
    """Kind and text of an exception: its name, the snippet's line, a hint."""
    name = type(error).__name__
    if isinstance(error, ResultError):
        return error.kind, str(error)
    if isinstance(error, MemoryError) or "Insufficient memory" in str(error) or "DecompressionBomb" in name:
        name, message = "MemoryError", f"too large: more than {job.memory_mb} MB of memory; crop or resize to a smaller size"
        return "memory", f"{name}{_line(error, job.code)}: {message}"
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return "no_result", f"no result: the code ended by {name}{_line(error, job.code)}; put the new image into `result`"
    if isinstance(error, SyntaxError):
        at = f" (line {error.lineno})" if error.filename == FILE and error.lineno else ""
        return name, f"{name}{at}: {error.msg}. Hint: {HINTS['SyntaxError']}"
    message = " ".join(str(error).split())[:300]
    hint = HINTS.get(name)
    return name, f"{name}{_line(error, job.code)}: {message}" + (f". Hint: {hint}" if hint else "")


def _line(error: BaseException, code: str) -> str:
    """` (line 3: `x = y`)` of the deepest frame that is the snippet's own."""
    numbers = [frame.f_lineno for frame, _ in _frames(error) if frame.f_code.co_filename == FILE]
    lines = code.splitlines()
    if not numbers or not 0 < numbers[-1] <= len(lines):
        return ""
    at = [lineno for frame, lineno in _frames(error) if frame.f_code.co_filename == FILE][-1]
    return f" (line {at}: `{lines[at - 1].strip()[:80]}`)" if 0 < at <= len(lines) else ""


def _frames(error: BaseException) -> list[tuple[Any, int]]:
    return list(traceback.walk_tb(error.__traceback__))


# ------------------------------------------------------------------------------------------------ running
def run_snippet(job: ChildJob, image: Image.Image, original: mmap.mmap) -> tuple[Image.Image, Trace]:
    """Run model code on an image; the result as RGB, and its trace. Raises whatever the code raises."""
    scope = namespace(image, job.code)
    seed_everything(job.seed)
    tracer.begin(image)
    try:
        exec(compile(job.code, FILE, "exec", dont_inherit=True), scope)
        tracer.TRACER.active = False
        result = checked_result(pick_result(scope, image, original, job.reference), job.max_pixels)
        return result, tracer.TRACER.finish(result)
    finally:
        tracer.TRACER.active = False


def write_result(fd: int, image: Image.Image, trace: Trace) -> None:
    """Pixels in pieces straight from Pillow's memory, then the trace; the header last."""
    image.load()
    encoder = Image._getencoder("RGB", "raw", ("RGB",))
    encoder.setimage(image.im, (0, 0, *image.size))
    at, done = HEADER.size, 0
    while not done:
        _, done, data = encoder.encode(1 << 18)
        if done < 0:
            raise OSError(f"encoder error {done}")
        os.pwrite(fd, data, at)
        at += len(data)
    packed = pack_trace(trace)
    os.pwrite(fd, packed, at)
    os.pwrite(fd, HEADER.pack(MAGIC, STATUS_OK, *image.size, at - HEADER.size, len(packed), 0), 0)


def write_error(fd: int, kind: str, text: str) -> None:
    """Kind and text of an error, separated by a zero byte."""
    data = f"{kind}\0{text}".encode("utf-8", "replace")[:MAX_TEXT]
    os.pwrite(fd, data, HEADER.size)
    os.pwrite(fd, HEADER.pack(MAGIC, STATUS_ERROR, 0, 0, 0, 0, len(data)), 0)


def run_job(job: ChildJob, input_fd: int, output_fd: int) -> None:
    """Everything a sealed child does. Never returns to the fork server's code."""
    try:
        image, original = load_input(input_fd, job.width, job.height)
        result, trace = run_snippet(job, image, original)
        write_result(output_fd, result, trace)
    except BaseException as error:  # model code may raise anything, SystemExit and its own BaseException included
        try:
            kind, text = describe_error(error, job)
        except BaseException as worse:  # an exception whose str() raises
            kind, text = "error", f"{type(error).__name__}: cannot be shown ({type(worse).__name__})"
        write_error(output_fd, kind, text)
    os._exit(0)


linecache.clearcache()
