"""What a fresh child does: it seals itself, waits for a job, runs the snippet on the image and writes the result."""

from __future__ import annotations

import builtins
import contextlib
import gc
import math
import mmap
import os
import random
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from cv_lightning import images
from cv_lightning.sandbox import guard, layers, tracer, wire
from cv_lightning.sandbox.config import SandboxConfig
from cv_lightning.sandbox.errors import FILE, NOT_FINITE, ResultError, describe_error, describe_traceback
from cv_lightning.sandbox.output import Output, Printed, run_as_cell
from cv_lightning.sandbox.syscalls import SeccompFilter
from cv_lightning.sandbox.wire import HEADER, JOB, PICTURE, PIXEL, Trace

INPUT_FD, OUTPUT_FD, CONTROL_FD = 3, 4, 5
NOT_SEALED = 97
"""Exit status of a child that failed before it got a job."""
MAX_RECURSION = 20_000
PIECE = 1 << 16
"""Bytes that Pillow hands to the kernel at once; small, because the buffer's pages are touched for the first time."""
ASPECT_LIMIT = 200


@dataclass(frozen=True, slots=True)
class ChildJob:
    """One snippet to run."""

    code: str
    width: int
    height: int
    seed: bytes
    config: SandboxConfig
    max_shown: int = 0
    """Images that it may show; 0: one result, and no text."""


def namespace(image: Image.Image, code: str = "") -> dict[str, Any]:
    """The names that a snippet may use without an import: `image` (also as `img`) and the imaging libraries.

    `draw` is made only if the code contains the word, because making it copies the image.
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


def load_input(fd: int, width: int, height: int) -> Image.Image:
    """The input image, directly on the pages of its sealed memfd.

    The mapping is private: pages that the snippet draws on are copied, and no other process sees them.
    """
    mapped = mmap.mmap(fd, width * height * PIXEL, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    # As Image.frombuffer does for modes of four bytes; it does not offer this for RGB.
    core: Any = Image.core  # type: ignore[attr-defined]
    return Image.new("RGB", (0, 0))._new(core.map_buffer(mapped, (width, height), "raw", 0, ("RGB", 0, 1)))


def seed_everything(seed: bytes) -> None:
    """Make random numbers a function of image and code (all forks inherit the same state)."""
    number = int.from_bytes(seed[:4], "little")
    random.seed(number)
    np.random.seed(number)
    cv2 = sys.modules.get("cv2")
    if cv2 is not None:
        cv2.setRNGSeed(number & 0x7FFFFFFF)


# ------------------------------------------------------------------------------------------------ the result
def pick_result(scope: dict[str, Any], image: Image.Image, reference: bool) -> Any:
    """The snippet's result: `result`, `output`, else a reassigned name, else the input if it was drawn on.

    With `reference`, as the released code does it: the first that is set of `result`, `output`, `processed_image`,
    `img`, `image`, so that `image = image.rotate(90)` returns the image unturned; arrays are not accepted.
    """
    if reference:
        names = ("result", "output", "processed_image", "img", "image")
        found = next((scope[name] for name in names if scope.get(name) is not None), image)
        if not isinstance(found, Image.Image):
            raise ResultError("not_an_image", f"the result is not an image but {type(found).__name__}")
        return found
    for name in ("result", "output", "processed_image", "image", "img"):
        value = scope.get(name)
        if value is not None and (value is not image or name in ("result", "output")):
            return value
    if was_drawn_on(image):
        return image
    raise ResultError(
        "no_result", "no result: put the new image into `result`, for example `result = image.crop((0, 0, 100, 100))`"
    )


def was_drawn_on(image: Image.Image) -> bool:
    """True if the input image no longer has the pixels of its memfd."""
    return image.tobytes("raw", "RGBX") != os.pread(INPUT_FD, PIXEL * image.width * image.height, 0)


def _array_to_image(array: np.ndarray[Any, Any]) -> Image.Image:
    shape = "x".join(map(str, array.shape))
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ResultError(
            "wrong_mode", f"the result is an array of shape {shape}, not an image of height x width (x 3)"
        )
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ResultError("nan", NOT_FINITE)
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
        ResultError: Not an image, no pixels, too large, extreme aspect ratio, not finite.
    """
    origin = tracer.TRACER.origin_of(result)
    if isinstance(result, np.ndarray):
        check_size(*(tracer.size_of(result) or (0, 0)), max_pixels)
        result = _array_to_image(result)
    kind = type(result)
    if not isinstance(result, Image.Image) or not kind.__module__.startswith("PIL."):
        raise ResultError(
            "not_an_image",
            f"the result is not an image but {kind.__name__}; `result` must be a PIL image or a uint8 array",
        )
    check_size(*result.size, max_pixels)
    image = to_rgb(result)
    if origin is not None:
        tracer.TRACER.set_origin(image, origin)
    return image


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Reject sizes that the model cannot be shown."""
    if width < 1 or height < 1:
        raise ResultError(
            "zero_size", f"the result has no pixels ({width}x{height}); check the crop box (left, upper, right, lower)"
        )
    if width * height > max_pixels:
        raise ResultError(
            "too_large",
            f"the result is too large: {width}x{height}, at most {max_pixels} pixels; crop or resize it, for example "
            f"`result = result.resize({guard.fitting_size(width, height, max_pixels)})`",
        )
    if max(width, height) >= ASPECT_LIMIT * min(width, height):
        raise ResultError(
            "aspect",
            f"the result of {width}x{height} is {ASPECT_LIMIT} times longer than wide or more; crop a wider part",
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB form of an image of any mode, as `cv_lightning.images.to_rgb`; values must be finite."""
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ResultError("nan", NOT_FINITE)
    return images.to_rgb(image)


# ------------------------------------------------------------------------------------------------ running
@dataclass(frozen=True, slots=True)
class Made:
    """What a snippet made: images as RGB, and a trace for each; without images one trace."""

    images: Sequence[Image.Image]
    traces: Sequence[Trace]


def run_snippet(job: ChildJob, image: Image.Image, output: Output) -> Made:
    """Run model code on an image. Exceptions of the code pass through.

    Args:
        job: The snippet.
        image: The input.
        output: Gets what a snippet prints and shows, if it may.
    """
    scope = namespace(image, job.code)
    seed_everything(job.seed)
    guard.set_limit(job.config.memory_mb)
    tracer.begin(image)
    try:
        if not job.max_shown:
            exec(compile(job.code, FILE, "exec", dont_inherit=True), scope)
            tracer.TRACER.stop()
            picked = pick_result(scope, image, job.config.reference_results)
            result = checked_result(picked, job.config.max_result_pixels)
            return Made([result], [tracer.TRACER.finish(result)])
        scope["show"] = output.show
        with output.collecting():
            run_as_cell(job.code, FILE, scope)
            tracer.TRACER.stop()
            output.take_results(scope)
        try:
            if not output.images:
                output.show(pick_result({**scope, "result": None, "output": None}, image, reference=False))
        except ResultError as missing:
            if missing.kind not in ("no_result", "not_an_image") or output.is_empty:
                raise
        made = output.images
        return Made(made, [tracer.TRACER.finish(each) for each in made] or [tracer.TRACER.finish(None)])
    finally:
        tracer.TRACER.active = False
        guard.set_limit(0)  # processes that are forked after a rehearsal must not inherit its limit


def write_result(fd: int, made: Made, printed: Printed) -> None:
    """Write images, traces and the text; the header last."""
    traces, (text, cut) = [wire.pack_trace(trace) for trace in made.traces], printed.kept()
    os.lseek(fd, HEADER.size + PICTURE.size * len(made.images), os.SEEK_SET)
    for image in made.images:
        wire.write_pixels(fd, image, piece=PIECE)
    os.pwrite(fd, b"".join(traces) + text, os.lseek(fd, 0, os.SEEK_CUR))
    pairs = zip(made.images, traces, strict=False)
    sizes = b"".join(PICTURE.pack(*image.size, len(trace)) for image, trace in pairs)
    alone = 0 if made.images else len(traces[0])
    os.pwrite(fd, HEADER.pack(wire.MAGIC, wire.STATUS_OK, len(made.images), alone, 0, len(text), cut) + sizes, 0)


def write_error(fd: int, kind: str, text: str, printed: Printed) -> None:
    """Write kind and text of an error, separated by a zero byte, and what was printed before it."""
    data, (said, cut) = f"{kind}\0{text}".encode("utf-8", "replace")[: wire.MAX_TEXT], printed.kept()
    os.pwrite(fd, data + said, HEADER.size)
    os.pwrite(fd, HEADER.pack(wire.MAGIC, wire.STATUS_ERROR, 0, 0, len(data), len(said), cut), 0)


def new_output(config: SandboxConfig, max_shown: int) -> Output:
    """An empty output."""
    return Output(config.max_text_bytes, max_shown, checked_result, config.max_result_pixels)


def run_job(job: ChildJob) -> None:
    """Run a job and write its result or error. Never returns."""
    output = new_output(job.config, job.max_shown)
    try:
        made = run_snippet(job, load_input(INPUT_FD, job.width, job.height), output)
        write_result(OUTPUT_FD, made, output.printed)
    except BaseException as error:  # model code may raise anything, SystemExit and its own BaseException included
        try:
            kind, text = describe(error, job)
        except BaseException as worse:  # an exception whose str() raises
            kind, text = "error", f"{type(error).__name__}: cannot be shown ({type(worse).__name__})"
        with contextlib.suppress(OSError):  # the snippet closed it: there is no result then
            write_error(OUTPUT_FD, kind, text, output.printed)
    finally:
        os._exit(0)


def describe(error: BaseException, job: ChildJob) -> tuple[str, str]:
    """Kind and text of an exception of a job."""
    if not job.max_shown:
        return describe_error(error, job.code, job.config.memory_mb)
    return describe_traceback(error, job.code, job.config.memory_mb, job.config.max_error_chars)


# ------------------------------------------------------------------------------------------------ before the job
def keep_only(fd: int) -> int:
    """Close all descriptors but stdio and `fd`, which gets the number `CONTROL_FD`; 3 and 4 become free."""
    os.dup2(fd, CONTROL_FD)
    os.closerange(3, CONTROL_FD)
    os.closerange(CONTROL_FD + 1, 1 << 16)
    return CONTROL_FD


def rehearse() -> None:
    """Run a small snippet, so that the pages which every snippet needs are copied before the clock runs.

    The fork server does it too, so that spare children and those forked on demand start from the same state.
    """
    image = Image.frombytes("RGB", (8, 8), bytes(192))
    code, config = "print(image.size)\nresult = image.crop((1, 1, 5, 5)).rotate(90)\n", SandboxConfig(memory_mb=1)
    for max_shown in (1, 0):
        output = new_output(config, max_shown)
        made = run_snippet(ChildJob(code, 8, 8, bytes(16), config, max_shown), image, output)
        fd = os.memfd_create("rehearsal")
        write_result(fd, made, output.printed)
        os.close(fd)


def cap_recursion() -> None:
    """Bound the recursion limit that a snippet can set.

    This gives a better error and is not a protection: unwinding millions of frames takes longer than the time limit.
    """
    raise_limit = sys.setrecursionlimit

    def setrecursionlimit(limit: int, /) -> None:
        raise_limit(min(limit, MAX_RECURSION))

    sys.setrecursionlimit = setrecursionlimit


def wait_for_job(control: socket.socket, config: SandboxConfig) -> ChildJob:
    """Block until the fork server sends a job; its memfds get the numbers `INPUT_FD` and `OUTPUT_FD`."""
    packet, fds, _, _ = socket.recv_fds(control, JOB.size, 2)
    control.close()
    if fds != [INPUT_FD, OUTPUT_FD]:  # the fork server has gone
        os._exit(0)
    gc.enable()
    _, _, width, height, max_shown, seed = JOB.unpack(packet)
    num_pixels = PIXEL * width * height
    code = os.pread(INPUT_FD, os.fstat(INPUT_FD).st_size - num_pixels, num_pixels).decode("utf-8", "replace")
    return ChildJob(code, width, height, seed, config, max_shown)


# ------------------------------------------------------------------------------------------------ after the fork
@dataclass(frozen=True, slots=True)
class Seal:
    """What a child needs of its fork server to seal itself."""

    server_pid: int
    config: SandboxConfig
    library_bytes: int
    """Address space that the libraries take up."""
    filter: SeccompFilter | None


class ChildStartError(BaseException):
    """Raised in a fresh child: it unwinds the fork server's frames, so that model code finds none of them.

    It is a `BaseException` so that no `except Exception` on the way stops it.
    """

    def __init__(self, control: int) -> None:
        super().__init__()
        self.control = control


def run_child(seal: Seal, control: int) -> None:
    """Everything a child does, from closing what it inherited to its last byte. Never returns."""
    try:
        jobs = socket.socket(fileno=keep_only(control))
        _limit(seal)
        rehearse()
        if seal.filter is not None and not seal.filter.install():
            os._exit(NOT_SEALED)
        run_job(wait_for_job(jobs, seal.config))
    finally:
        os._exit(NOT_SEALED)


def _limit(seal: Seal) -> None:
    config = seal.config
    if "rlimits" not in config.disabled_layers:
        layers.limit_resources(
            memory_bytes=config.memory_mb << 20,
            library_bytes=seal.library_bytes,
            cpu_s=config.cpu_s,
            file_bytes=wire.largest_output(config.max_result_pixels, config.max_text_bytes),
        )
    layers.prctl(layers.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != seal.server_pid:
        os._exit(1)
