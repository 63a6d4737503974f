"""The binary forms between parent, fork server and child: bounded, validated, without pickle or JSON.

A job goes to a fork server as one packet with two memfds: the sealed input (pixels, then code) and an empty output.
The fork server never sees the code, so a child of it cannot find another snippet's. The child writes into the output a
fixed header, the pixels, a trace and an error text. What the parent reads from it was written by a process in which
model code ran: everything is checked, and nothing in it names a type.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from cv_lightning.types import Affine

RUN, CANCEL = 1, 2
JOB = struct.Struct("<BQdIIIQ16s")
"""kind, job id, wall limit in s, width, height, flags, most pixels of the result, seed."""
FLAG_REFERENCE, FLAG_PLAN = 1, 2
PIXEL = 4
"""Bytes of a pixel on the wire: Pillow's own layout of RGB, so that nothing is packed or unpacked."""
KIND_NOT_PLAN = "not_plan"
"""Error kind of a worker that could not execute a plan; a child has to run it."""
REPLY = struct.Struct("<BQIiddQ")
"""kind (RUN), job id, 1 if killed at the deadline, wait status, elapsed s, CPU s, peak memory in bytes."""
HEADER = struct.Struct("<8sIIIQII")
"""magic, status, width, height, bytes of pixels, bytes of trace, bytes of text."""
MAGIC = b"cvlsbx01"
STATUS_OK, STATUS_ERROR = 0, 1
MAX_TRACE = 1 << 16
MAX_TEXT = 4096
MAX_OPERATIONS = 64
MAX_CLAIMS = 12

Value = None | bool | int | float | str | tuple["Value", ...]


class WireError(Exception):
    """Bytes that are no valid message."""


@dataclass(frozen=True, slots=True)
class RawOperation:
    """One operation as the child tells it."""

    name: str
    call: str
    arguments: tuple[tuple[str, Value], ...]
    input_size: tuple[int, int] | None
    output_size: tuple[int, int] | None
    used: bool


@dataclass(frozen=True, slots=True)
class Trace:
    """What the child says that ran, and which maps from result to input it offers; the first is its best."""

    operations: tuple[RawOperation, ...] = ()
    claims: tuple[Affine, ...] = ()
    direct: bool = False
    """True if the first claim was followed from the input to the result without a gap."""


# ------------------------------------------------------------------------------------------------ encoding
def _pack_text(text: str, limit: int) -> bytes:
    data = text.encode("utf-8", "replace")[:limit]
    return struct.pack("<H", len(data)) + data


def _pack_value(value: object, depth: int = 0) -> bytes:
    if value is None:
        return b"n"
    if isinstance(value, bool):
        return b"t" if value else b"f"
    if isinstance(value, int) and -(1 << 62) < value < 1 << 62:
        return b"i" + struct.pack("<q", value)
    if isinstance(value, int | float):
        return b"d" + struct.pack("<d", float(value) if abs(value) < 1e300 else 0.0)
    if isinstance(value, tuple | list) and depth < 3:
        items = list(value)[:16]
        return b"(" + bytes([len(items)]) + b"".join(_pack_value(item, depth + 1) for item in items)
    return b"s" + _pack_text(str(value), 80)


def _pack_size(size: tuple[int, int] | None) -> bytes:
    return struct.pack("<II", *(size or (0, 0)))


def pack_trace(trace: Trace) -> bytes:
    """The bytes of a trace; operations beyond `MAX_OPERATIONS` are dropped, arguments cut."""
    parts = [
        struct.pack(
            "<BBB", min(len(trace.operations), MAX_OPERATIONS), min(len(trace.claims), MAX_CLAIMS), trace.direct
        )
    ]
    parts += [struct.pack("<6d", *claim) for claim in trace.claims[:MAX_CLAIMS]]
    for op in trace.operations[:MAX_OPERATIONS]:
        arguments = op.arguments[:8]
        parts += [_pack_text(op.name, 32), _pack_text(op.call, 64), bytes([op.used, len(arguments)])]
        parts += [_pack_size(op.input_size), _pack_size(op.output_size)]
        parts += [_pack_text(key, 24) + _pack_value(value) for key, value in arguments]
    data = b"".join(parts)
    return (
        data
        if len(data) <= MAX_TRACE
        else pack_trace(Trace(trace.operations[: len(trace.operations) // 2], trace.claims))
    )


# ------------------------------------------------------------------------------------------------ decoding
class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise WireError(f"cut off at byte {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def text(self, limit: int) -> str:
        (count,) = struct.unpack("<H", self.take(2))
        if count > limit:
            raise WireError(f"a text of {count} bytes, {limit} allowed")
        return clean_text(self.take(count).decode("utf-8", "replace"), limit)

    def value(self, depth: int = 0) -> Value:
        kind = self.take(1)
        if kind in b"ntf":
            return {b"n": None, b"t": True, b"f": False}[kind]
        if kind == b"i":
            return int(struct.unpack("<q", self.take(8))[0])
        if kind == b"d":
            number = float(struct.unpack("<d", self.take(8))[0])
            return number if abs(number) < 1e300 else None
        if kind == b"s":
            return self.text(80)
        if kind == b"(" and depth < 4:
            return tuple(self.value(depth + 1) for _ in range(min(self.take(1)[0], 16)))
        raise WireError(f"unknown kind of value {kind!r}")

    def size(self) -> tuple[int, int] | None:
        width, height = struct.unpack("<II", self.take(8))
        return (width, height) if width and height else None


def unpack_trace(data: bytes) -> Trace:
    """Read a trace.

    Raises:
        WireError: any byte that the form does not allow.
    """
    if len(data) > MAX_TRACE:
        raise WireError(f"a trace of {len(data)} bytes")
    reader = _Reader(data)
    num_operations, num_claims, direct = struct.unpack("<BBB", reader.take(3))
    if num_operations > MAX_OPERATIONS or num_claims > MAX_CLAIMS or direct > 1:
        raise WireError(f"{num_operations} operations and {num_claims} claims")
    claims = []
    for _ in range(num_claims):
        numbers = struct.unpack("<6d", reader.take(48))
        if not all(abs(number) < 1e7 for number in numbers):  # also false for NaN
            raise WireError("a map with numbers out of range")
        claims.append(Affine(*numbers))
    operations = []
    for _ in range(num_operations):
        name, call = reader.text(32), reader.text(64)
        used, num_arguments = reader.take(2)
        if not name.replace("_", "").isalnum() or used > 1 or num_arguments > 8:
            raise WireError("an operation that cannot be")
        sizes = reader.size(), reader.size()
        arguments = tuple((reader.text(24), reader.value()) for _ in range(num_arguments))
        operations.append(RawOperation(name, call, arguments, *sizes, bool(used)))
    if reader.at != len(data):
        raise WireError("bytes after the end of a trace")
    return Trace(tuple(operations), tuple(claims), bool(direct))


def clean_text(text: str, limit: int) -> str:
    """Text without control characters and marks of the chat format, cut to `limit` characters."""
    kept = "".join(c if c.isprintable() or c == "\n" else " " for c in text[: 4 * limit])
    for mark in (
        "<|",
        "|>",
        "<tool_call>",
        "</tool_call>",
        "<tool_response>",
        "</tool_response>",
        "<image>",
        "<answer>",
        "</answer>",
    ):
        kept = kept.replace(mark, " ")
    return kept[:limit]
