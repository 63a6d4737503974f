"""Checks and decodes the output of a child; every byte of it is untrusted."""

from __future__ import annotations

import mmap
import os
import signal
from dataclasses import replace

from PIL import Image

from cv_lightning.images import is_usable_size
from cv_lightning.sandbox import wire
from cv_lightning.sandbox.config import SandboxConfig
from cv_lightning.sandbox.effect import checked_operations, net_effect
from cv_lightning.sandbox.pool import ChildResult
from cv_lightning.sandbox.wire import HEADER, WireError, clean_text
from cv_lightning.types import SandboxResult, ToolStatus


def read_outcome(image: Image.Image, outcome: ChildResult, config: SandboxConfig) -> SandboxResult:
    """The result of a job; closes its output.

    Args:
        image: The input, RGB.
        outcome: How the child ended.
        config: Limits.
    """
    if outcome.output_fd < 0:
        text = f"the sandbox could not run the snippet: {outcome.lost or 'it was closed'}"
        return SandboxResult(status=ToolStatus.INFRASTRUCTURE_ERROR, error=text, error_kind="lost", executor="process")
    try:
        result = _without_output(outcome, config) or _read(image, outcome.output_fd, config)
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


def _read(image: Image.Image, fd: int, config: SandboxConfig) -> SandboxResult:
    total = os.fstat(fd).st_size
    magic, status, width, height, num_pixels, num_trace, num_text = HEADER.unpack(os.pread(fd, HEADER.size, 0))
    if magic != wire.MAGIC:
        raise WireError("damaged output")
    if status == wire.STATUS_ERROR and num_text <= wire.MAX_TEXT and HEADER.size + num_text <= total:
        kind, _, text = os.pread(fd, num_text, HEADER.size).decode("utf-8", "replace").partition("\0")
        text = clean_text(text or kind, config.max_error_chars) or "the code failed"
        return SandboxResult(status=ToolStatus.ERROR, error=text, error_kind=clean_text(kind, 40) or "error")
    fits = is_usable_size(width, height) and width * height <= config.max_result_pixels
    sizes = fits and num_pixels == wire.PIXEL * width * height and total == HEADER.size + num_pixels + num_trace
    if status != wire.STATUS_OK or num_text or num_trace > wire.MAX_TRACE or not sizes:
        raise WireError("impossible sizes")
    with mmap.mmap(fd, total, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
        trace = wire.unpack_trace(mapped[HEADER.size + num_pixels :])
        with memoryview(mapped) as view, view[HEADER.size : HEADER.size + num_pixels] as pixels:
            result = Image.frombytes("RGB", (width, height), pixels, "raw", "RGBX")
    found = net_effect(trace.claims, image, result, direct=trace.direct)
    return SandboxResult(
        status=ToolStatus.OK,
        image=result,
        operations=checked_operations(trace.operations, found),
        effect=found.effect,
    )
