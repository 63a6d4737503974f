"""The binary forms between parent, fork server and child: bounded, validated, without pickle.

A job goes to a fork server as one packet with two memfds: the sealed input (pixels, then code) and an empty output.
The fork server never sees the code, so a child of it cannot find another snippet's. The child writes a fixed header,
the sizes of its images, their pixels and traces (JSON), an error text, and what the snippet printed into the output.
The parent treats all of it as untrusted, because model code ran in the process that wrote it: everything is checked,
and nothing in it names a type.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
from PIL import Image

from cv_lightning.types import Affine, Operation

RUN, CANCEL = 1, 2
JOB = struct.Struct("<BQIIB16s")
"""kind, job id, width, height, images that it may show (0: one result, no text), seed."""
PIXEL = 4
"""Bytes of a pixel on the wire: Pillow's own layout of RGB, so that nothing is packed or unpacked."""
REPLY = struct.Struct("<QIidQ")
"""job id, 1 if it broke the time or CPU limit, wait status, elapsed s, peak memory in bytes."""
HEADER = struct.Struct("<8sIIIIIi")
"""magic, status, number of images, bytes of a trace without an image, of the error, of what was printed, and the place
in that where its middle was cut out (-1: nowhere)."""
PICTURE = struct.Struct("<III")
"""width, height, bytes of trace. One per image, after the header."""
MAGIC = b"cvlsbx02"
STATUS_OK, STATUS_ERROR = 0, 1
MAX_TRACE = 1 << 16
MAX_TEXT = 4096
MAX_SHOWN = 16
"""Images that one snippet may show, at most."""
CUT_OUT = "\n[... output cut ...]\n"
"""Stands in a text where its middle is missing."""
MAX_OPERATIONS = 64
MAX_CLAIMS = 12
MAX_ARGUMENTS = 8
_MARKS = "<| |> <tool_call> </tool_call> <tool_response> </tool_response> <image> <answer> </answer>".split()


def largest_output(max_pixels: int, text_bytes: int) -> int:
    """Bytes of the largest output that a child may write."""
    images = PIXEL * max_pixels + MAX_SHOWN * (PICTURE.size + MAX_TRACE)
    return HEADER.size + images + MAX_TEXT + text_bytes


class WireError(Exception):
    """Bytes that are not a valid message."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What the child reports: the operations that ran, and candidate maps from result to input, the best first."""

    operations: tuple[Operation, ...] = ()
    claims: tuple[Affine, ...] = ()
    direct: bool = False
    """True if the first claim was followed from the input to the result without a gap."""


def write_pixels(fd: int, image: Image.Image, *, piece: int) -> None:
    """Write the pixels of an RGB image at the position of a file, straight from Pillow's memory.

    Args:
        fd: File to write to.
        image: RGB.
        piece: Bytes that Pillow hands to the kernel at once.

    Raises:
        OSError: They could not be written.
    """
    image.load()
    encoder = Image._getencoder("RGB", "raw", ("RGBX",))
    encoder.setimage(image.im, (0, 0, *image.size))
    failed = encoder.encode_to_file(fd, piece)
    if failed < 0:
        raise OSError(f"an image of {image.width}x{image.height} pixels could not be written (encoder error {failed})")


def pack_trace(trace: Trace) -> bytes:
    """The bytes of a trace; operations beyond `MAX_OPERATIONS` are dropped, and half of them while it is too long."""
    operations = [asdict(operation) for operation in trace.operations[:MAX_OPERATIONS]]
    claims = [tuple(map(float, claim)) for claim in trace.claims[:MAX_CLAIMS]]  # of NumPy's numbers, too
    while True:
        form = {"operations": operations, "claims": claims, "direct": trace.direct}
        data = json.dumps(form, separators=(",", ":")).encode()
        if len(data) <= MAX_TRACE:
            return data
        operations = operations[: len(operations) // 2]


def unpack_trace(data: bytes) -> Trace:
    """Read a trace.

    Raises:
        WireError: The bytes are not JSON of the right form, or a number or a length is out of range.
    """
    if len(data) > MAX_TRACE:
        raise WireError(f"a trace of {len(data)} bytes")
    try:
        trace = msgspec.convert(json.loads(data.decode()), Trace)
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise WireError("a damaged trace") from error
    if len(trace.operations) > MAX_OPERATIONS or len(trace.claims) > MAX_CLAIMS:
        raise WireError(f"{len(trace.operations)} operations and {len(trace.claims)} claims")
    if not all(abs(number) < 1e7 for claim in trace.claims for number in claim):  # also false for NaN
        raise WireError("a map with numbers out of range")
    return Trace(tuple(map(_checked, trace.operations)), trace.claims, trace.direct)


def _checked(operation: Operation) -> Operation:
    name, sizes = clean_text(operation.name, 32), (operation.input_size, operation.output_size)
    valid = name.replace("_", "").isalnum() and len(operation.arguments) <= MAX_ARGUMENTS
    if not valid or any(size is not None and not 0 <= min(size) <= max(size) < 1 << 32 for size in sizes):
        raise WireError("an impossible operation")
    before, after = (None if size is None or 0 in size else size for size in sizes)  # a crop may be empty
    return Operation(
        name=name,
        call=clean_text(operation.call, 64),
        arguments={clean_text(key, 24): _checked_value(value) for key, value in operation.arguments.items()},
        input_size=before,
        output_size=after,
        used=operation.used,
    )


def _checked_value(value: Any, depth: int = 0) -> Any:
    """A decoded argument: short texts, numbers of modest size, tuples of at most 16 values, nested at most 4 deep."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value if abs(value) < 1e300 else None  # None for NaN, too
    if isinstance(value, str):
        return clean_text(value, 80)
    if isinstance(value, list) and depth < 4:
        return tuple(_checked_value(item, depth + 1) for item in value[:16])
    raise WireError("an argument of an unknown kind")


def clean_text(text: str, limit: int) -> str:
    """Text without control characters and marks of the chat format, cut to `limit` characters."""
    kept = "".join(c if c.isprintable() or c == "\n" else " " for c in text[: 4 * limit])
    for mark in _MARKS:
        kept = kept.replace(mark, " ")
    return kept[:limit]
