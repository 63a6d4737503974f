"""Checks and decodes the output of a child; every byte of it is untrusted."""

from __future__ import annotations

import codecs
import mmap
import os
import signal
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from PIL import Image

from cv_lightning.images import is_usable_size
from cv_lightning.sandbox import wire
from cv_lightning.sandbox.config import SandboxConfig
from cv_lightning.sandbox.effect import checked_operations, net_effect
from cv_lightning.sandbox.pool import ChildResult
from cv_lightning.sandbox.wire import CUT_OUT, HEADER, Trace, WireError, clean_text
from cv_lightning.types import ImageTrace, SandboxResult, ToolStatus

KEPT = "\n\t\u200c\u200d"
"""Characters that stay although they are not printable."""


def read_outcome(image: Image.Image, outcome: ChildResult, config: SandboxConfig, max_shown: int = 0) -> SandboxResult:
    """The result of a job; closes its output.

    Args:
        image: The input, RGB.
        outcome: How the child ended.
        config: Limits.
        max_shown: Images that the snippet might show; 0: one result, and no text.
    """
    if outcome.output_fd < 0:
        text = f"the sandbox could not run the snippet: {outcome.lost or 'it was closed'}"
        return SandboxResult(status=ToolStatus.INFRASTRUCTURE_ERROR, error=text, error_kind="lost", executor="process")
    try:
        result = _without_output(outcome, config) or _read(image, outcome.output_fd, config, max_shown)
    except WireError as error:
        text = f"the code ended without a usable result ({clean_text(str(error), 80)}); put the new image into `result`"
        result = SandboxResult(status=ToolStatus.KILLED, error=text, error_kind="invalid_output")
    finally:
        outcome.close()
    return replace(result, executor="process", elapsed_s=outcome.elapsed_s)


def _without_output(outcome: ChildResult, config: SandboxConfig) -> SandboxResult | None:
    """The result of a child that was killed or wrote nothing; None if there is an output to read."""
    if outcome.late:
        limits = f"limit {config.timeout_s:g} s, {config.cpu_s} s of CPU time"
        text = f"TimeoutError: the code ran too long ({limits}); do less"
        return SandboxResult(status=ToolStatus.TIMEOUT, error_kind="timeout", error=text)
    if os.WIFSIGNALED(outcome.wait_status):
        number = os.WTERMSIG(outcome.wait_status)
        name = next((known.name for known in signal.Signals if known == number), f"signal {number}")
        text = f"the code crashed its process ({name}) or broke a limit; try another way"
        return SandboxResult(status=ToolStatus.KILLED, error_kind=name, error=text)
    if os.fstat(outcome.output_fd).st_size < HEADER.size:
        text = "no result: the code ended its process; put the new image into `result`"
        return SandboxResult(status=ToolStatus.ERROR, error_kind="no_result", error=text)
    return None


def _read(image: Image.Image, fd: int, config: SandboxConfig, max_shown: int) -> SandboxResult:
    total = os.fstat(fd).st_size
    magic, status, num_images, num_trace, num_error, num_text, cut = HEADER.unpack(os.pread(fd, HEADER.size, 0))
    if magic != wire.MAGIC:
        raise WireError("damaged output")
    least, most = (0, max_shown) if max_shown else (1, 1)
    is_short = num_error <= wire.MAX_TEXT and num_text <= config.max_text_bytes and -1 <= cut <= num_text
    if not is_short or (num_text and not max_shown) or num_images > most:
        raise WireError("impossible sizes")
    if status == wire.STATUS_ERROR and not num_images and HEADER.size + num_error + num_text <= total:
        said = printed_text(os.pread(fd, num_text, HEADER.size + num_error), cut)
        kind, _, text = os.pread(fd, num_error, HEADER.size).decode("utf-8", "replace").partition("\0")
        text = clean_text(text or kind, config.max_error_chars) or "the code failed"
        kind = clean_text(kind, 40) or "error"
        return SandboxResult(status=ToolStatus.ERROR, error=text, error_kind=kind, text=said)
    if status != wire.STATUS_OK or num_error or num_images < least or bool(num_trace) == bool(num_images):
        raise WireError("impossible sizes")
    places = _places(fd, num_images, num_trace, total - num_text, config.max_result_pixels)
    with mmap.mmap(fd, total, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
        said = printed_text(mapped[total - num_text :], cut)
        traces = [wire.unpack_trace(mapped[place.trace]) for place in places]
        with memoryview(mapped) as view:
            pictures = [_picture(view, place) for place in places if place.size != (0, 0)]
    return replace(_proven(image, pictures, traces), text=said)


class _Place(NamedTuple):
    """Where an image and its trace lie in an output; without an image only the trace."""

    size: tuple[int, int]
    pixels: slice
    trace: slice


def _places(fd: int, num_images: int, num_trace: int, end: int, max_pixels: int) -> list[_Place]:
    """The parts of an output, of which nothing is left over.

    Raises:
        WireError: A size is impossible, or the parts do not end at `end`.
    """
    at = HEADER.size + wire.PICTURE.size * num_images
    if not num_images:
        found = [_Place((0, 0), slice(0), slice(at, at + num_trace))]
    else:
        sizes = list(wire.PICTURE.iter_unpack(os.pread(fd, at - HEADER.size, HEADER.size)))
        areas = [width * height for width, height, _ in sizes]
        usable = all(is_usable_size(width, height) for width, height, _ in sizes)
        if len(sizes) != num_images or not usable or sum(areas) > max_pixels:
            raise WireError("impossible sizes")
        trace, found = at + wire.PIXEL * sum(areas), []
        for (width, height, length), area in zip(sizes, areas, strict=True):
            pixels = slice(at, at + wire.PIXEL * area)
            found.append(_Place((width, height), pixels, slice(trace, trace + length)))
            at, trace = pixels.stop, trace + length
    if found[-1].trace.stop != end or any(place.trace.stop - place.trace.start > wire.MAX_TRACE for place in found):
        raise WireError("impossible sizes")
    return found


def _picture(view: memoryview, place: _Place) -> Image.Image:
    with view[place.pixels] as pixels:
        return Image.frombytes("RGB", place.size, pixels, "raw", "RGBX")


def _proven(image: Image.Image, pictures: Sequence[Image.Image], traces: Sequence[Trace]) -> SandboxResult:
    """The result with images and traces; the pixels of each image are compared with the input's.

    Raises:
        WireError: The traces do not tell of the same operations.
    """
    ran = [replace(op, used=False) for op in traces[0].operations]
    if any([replace(op, used=False) for op in trace.operations] != ran for trace in traces[1:]):
        raise WireError("traces that differ")
    if not pictures:
        return SandboxResult(status=ToolStatus.OK, operations=tuple(ran))
    each = []
    for picture, trace in zip(pictures, traces, strict=True):
        found = net_effect(trace.claims, image, picture, direct=trace.direct)
        each.append((found.effect, checked_operations(trace.operations, found)))
    used = [tuple(at for at, op in enumerate(operations) if op.used) for _, operations in each]
    operations = tuple(replace(op, used=any(at in numbers for numbers in used)) for at, op in enumerate(ran))
    told = [ImageTrace(effect=effect, used=numbers) for (effect, _), numbers in zip(each, used, strict=True)]
    return SandboxResult(
        status=ToolStatus.OK,
        image=pictures[-1],
        earlier=tuple(pictures[:-1]),
        operations=operations,
        effect=each[-1][0],
        traces=tuple(told) if len(told) > 1 else (),
    )


def printed_text(data: bytes, cut: int) -> str:
    """What a snippet printed, as text that no reader can stumble over: what is not printable is written as in Python.

    Line ends, tabs, spaces of any width and the joiners of emojis stay. Of a text whose middle is missing the two parts
    are joined by `CUT_OUT`.

    Args:
        data: UTF-8, as far as it is any.
        cut: Where the middle is missing; -1: nowhere.
    """
    if cut < 0:
        return readable(data.decode("utf-8", "backslashreplace"))
    head = codecs.getincrementaldecoder("utf-8")("backslashreplace").decode(data[:cut])  # a torn character is left out
    tail = data[cut:]
    while tail and len(data) - cut - len(tail) < 3 and tail[0] & 0xC0 == 0x80:
        tail = tail[1:]
    return readable(head) + CUT_OUT + readable(tail.decode("utf-8", "backslashreplace"))


def readable(text: str) -> str:
    """Text in which control characters, terminal codes and invisible marks are written as Python writes them."""
    return text if text.isascii() and text.isprintable() else "".join(map(_readable, text))


@lru_cache(maxsize=4096)
def _readable(character: str) -> str:
    kept = character.isprintable() or character in KEPT or unicodedata.category(character) == "Zs"
    return character if kept else repr(character)[1:-1]
