"""The parent believes only maps that pixels prove, and reads only bytes of the right form."""

import json
import os
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cv_lightning.sandbox import SandboxConfig
from cv_lightning.sandbox.effect import effect_of, net_effect
from cv_lightning.sandbox.pool import ChildResult
from cv_lightning.sandbox.reading import printed_text, read_outcome
from cv_lightning.sandbox.wire import (
    CUT_OUT,
    HEADER,
    MAGIC,
    PICTURE,
    STATUS_OK,
    Trace,
    WireError,
    clean_text,
    pack_trace,
    unpack_trace,
)
from cv_lightning.types import Affine, Operation, ToolStatus

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
_Y, _X = np.mgrid[0:300, 0:400]
_WAVES = 128 + 60 * np.sin(_X / 17) + 50 * np.cos(_Y / 11 + _X / 60)
SMOOTH = Image.fromarray(np.stack([_WAVES, _Y // 2, _WAVES / 2 + _X / 4], axis=-1).astype(np.uint8))
IDENTITY = Affine(1, 0, 0, 0, 1, 0)
CROP = Operation(
    name="crop", call="Image.crop", arguments={"box": (1, 2, 3.5, None)}, input_size=(9, 9), output_size=(2, 2)
)
TRACE = Trace((CROP,), (IDENTITY,), True)


# ------------------------------------------------------------------------------------------------ maps
def believed(claims: list[Affine], image: Image.Image, result: Image.Image) -> Affine | None:
    return net_effect(claims, image, result, direct=True).effect.to_input


@pytest.mark.parametrize("image", [NOISE, SMOOTH])
def test_a_forged_map_is_not_believed(image: Image.Image) -> None:
    turned = image.transpose(Image.Transpose.ROTATE_180)
    found = believed([IDENTITY], image, turned)
    assert effect_of(found, image.size, turned.size).core == ("rotate_180",)
    crop = image.crop((3, 4, 60, 70))
    assert believed([Affine(1, 0, 3, 0, 1, 4)], image, crop) == Affine(1, 0, 3, 0, 1, 4)


def test_a_forged_box_is_not_believed() -> None:
    # The true place is found by the pixels.
    assert believed([Affine(1, 0, 40, 0, 1, 15)], NOISE, NOISE.crop((3, 4, 60, 70))) == Affine(1, 0, 3, 0, 1, 4)
    shrunk = NOISE.crop((3, 4, 60, 70)).resize((31, 40))
    assert believed([Affine(1, 0, 40, 0, 1, 15)], NOISE, shrunk) is None
    other = Image.fromarray(np.random.default_rng(5).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    assert believed([IDENTITY, Affine(1, 0, 10, 0, 1, 10)], NOISE, other) is None


@pytest.mark.parametrize("change", [lambda v: 255 - v, lambda v: v // 2, lambda v: min(255, v * 2)])
def test_a_change_of_tone_does_not_hide_a_true_map(change: object) -> None:
    crop = SMOOTH.crop((50, 40, 250, 200))
    claim = Affine(1, 0, 50, 0, 1, 40)
    assert believed([claim], SMOOTH, crop.point(change)) == claim  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ bytes
def test_packed_traces_are_read_back_and_cut_ones_refused() -> None:
    data = pack_trace(TRACE)
    assert unpack_trace(data) == TRACE
    for cut in range(len(data)):
        with pytest.raises(WireError):
            unpack_trace(data[:cut])


def test_an_empty_crop_and_numbers_of_numpy_are_no_reason_to_lose_a_result() -> None:
    empty = Operation(name="crop", call="PIL.Image.crop", input_size=(8, 8), output_size=(0, 4))
    claim = Affine(*np.float32([1, 0, 0.5, 0, 1, 0]))  # type: ignore[arg-type]
    trace = unpack_trace(pack_trace(Trace((empty,), (claim,))))
    assert (trace.operations[0].input_size, trace.operations[0].output_size) == ((8, 8), None)
    assert trace.claims == (Affine(1, 0, 0.5, 0, 1, 0),)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=20,
)
FORGED = st.fixed_dictionaries(
    {},
    optional={
        "operations": st.lists(
            st.fixed_dictionaries(
                {"name": st.sampled_from(["crop", "<|a|>", ""]), "call": st.text(max_size=9)},
                optional={"arguments": st.dictionaries(st.text(max_size=9), JSON, max_size=9), "input_size": JSON},
            ),
            max_size=3,
        ),
        "claims": st.lists(st.lists(st.floats() | st.integers(), min_size=5, max_size=7), max_size=14),
        "direct": JSON,
    },
)


@given(st.binary(max_size=300) | JSON.map(json.dumps).map(str.encode) | FORGED.map(json.dumps).map(str.encode))
def test_any_bytes_are_a_trace_or_an_error(data: bytes) -> None:
    try:
        trace = unpack_trace(data)
    except WireError as error:
        assert str(error)
    else:
        assert all(abs(number) < 1e7 for claim in trace.claims for number in claim)
        assert json.dumps([op.arguments for op in trace.operations], allow_nan=False).isascii()


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 60_000,
        b'{"claims": [[1e999, 0, 0, 0, 1, 0]]}',
        b'{"claims": [[NaN, 0, 0, 0, 1, 0]]}',
        b'{"claims": [[' + b"9" * 400 + b", 0, 0, 0, 1, 0]]}",
        b'{"claims": [' + b",".join([b"[1, 0, 0, 0, 1, 0]"] * 13) + b"]}",
        b'{"operations": [' + b",".join([b'{"name": "a", "call": "b"}'] * 65) + b"]}",
        b'{"operations": [{"name": "a;b", "call": "b"}]}',
        b'{"operations": [{"name": "a", "call": "b", "input_size": [-1, 5]}]}',
        b'{"operations": [{"name": "a", "call": "b", "arguments": {"x": {"y": 1}}}]}',
        b'{"operations": [{"name": "a", "call": "b", "arguments": {"x": [[[[[1]]]]]}}]}',
        b'{"direct": 1}',
        b" " * (1 << 17),
    ],
)
def test_traces_beyond_the_limits_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        unpack_trace(data)


@given(st.integers(0, len(pack_trace(TRACE)) - 1), st.integers(0, 255))
def test_one_wrong_byte_is_read_or_refused(at: int, value: int) -> None:
    damaged = bytearray(pack_trace(TRACE))
    damaged[at] = value
    try:
        assert len(unpack_trace(bytes(damaged)).operations) <= 1
    except WireError as error:
        assert str(error)


def _outcome(data: bytes) -> ChildResult:
    fd = os.memfd_create("test")
    os.write(fd, data)
    return ChildResult(fd)


def _header(images: int, trace: int, error: int, text: int = 0, status: int = STATUS_OK, cut: int = -1) -> bytes:
    return HEADER.pack(MAGIC, status, images, trace, error, text, cut)


def _image(width: int, height: int, trace: int) -> bytes:
    return PICTURE.pack(width, height, trace)


TRACE_BYTES = pack_trace(TRACE)
WHOLE = _image(4, 4, len(TRACE_BYTES)) + bytes(64) + TRACE_BYTES


@pytest.mark.parametrize("max_shown", [0, 4])
@pytest.mark.parametrize(
    "data",
    [
        _header(1, 0, 0) + _image(4, 4, 0) + bytes(64),
        _header(1, 0, 0) + _image(4, 4, 3) + bytes(64) + b"\xff\xff\xff",
        _header(1, 0, 0) + _image(4, 4, len(TRACE_BYTES)) + bytes(48) + TRACE_BYTES,
        _header(1, 0, 0) + _image(0xFFFFFFFF, 0xFFFFFFFF, 3) + bytes(64),
        _header(1, 0, 0) + _image(4, 4, 1 << 31) + bytes(64),
        _header(1, 0, 0) + _image(0, 0, 3) + bytes(3),
        _header(1, 3, 0) + WHOLE,
        _header(1, 0, 5) + WHOLE,
        _header(1, 0, 0, 4) + WHOLE,
        _header(1, 0, 0, 0, cut=5) + WHOLE,
        _header(5, 0, 0) + WHOLE * 5,
        _header(0xFFFFFFFF, 0, 0) + WHOLE,
        _header(0, 0, 0),
        _header(0, 3, 0, 1 << 30) + b"\xff\xff\xff",
        _header(0, 0, 1 << 30, 0, 1),
        _header(0, 0, 5, 0, 1),
        _header(1, 0, 5, 0, 1) + b"x\0abc",
        _header(1, 0, 0, 0, 7) + WHOLE,
        b"\0" * HEADER.size,
        b"PICKLE!!" * 20,
        struct.pack("<8s", MAGIC) + b"\xff" * 64,
    ],
)
def test_invalid_output_is_the_snippets_failure_and_is_closed(data: bytes, max_shown: int) -> None:
    outcome = _outcome(data)
    fd = outcome.output_fd
    result = read_outcome(NOISE, outcome, SandboxConfig(), max_shown)
    assert (result.status, result.error_kind, result.image) == (ToolStatus.KILLED, "invalid_output", None)
    with pytest.raises(OSError):
        os.fstat(fd)


@given(st.binary(max_size=200), st.sampled_from([0, 4]))
def test_any_output_gives_a_result(data: bytes, max_shown: int) -> None:
    result = read_outcome(NOISE, _outcome(MAGIC + data), SandboxConfig(), max_shown)
    is_text = max_shown and result.status is ToolStatus.OK
    assert is_text or result.status in (ToolStatus.KILLED, ToolStatus.ERROR) or result.image is not None


@given(st.lists(st.integers(0, 70), min_size=7, max_size=7), st.binary(max_size=80))
def test_any_sizes_give_a_result(numbers: list[int], data: bytes) -> None:
    status, images, trace, error, text, cut, width = numbers
    header = HEADER.pack(MAGIC, status % 3, images % 4, trace, error, text, cut - 1)
    sizes = _image(width, 3, len(TRACE_BYTES)) * (images % 4)
    data = header + sizes + bytes(12 * width * (images % 4)) + TRACE_BYTES * (images % 4) + data
    result = read_outcome(NOISE, _outcome(data), SandboxConfig(), 4)
    assert result.status in (ToolStatus.OK, ToolStatus.ERROR, ToolStatus.KILLED)
    assert len(result.made) == images % 4 or result.status is not ToolStatus.OK


def test_images_with_traces_of_different_operations_are_refused() -> None:
    """Every image of a call tells of the same operations: a forged list must not stand beside an honest one."""
    other = pack_trace(replace(TRACE, operations=()))
    sizes = _image(4, 4, len(TRACE_BYTES)) + _image(4, 4, len(other))
    data = _header(2, 0, 0) + sizes + bytes(128) + TRACE_BYTES + other
    assert read_outcome(NOISE, _outcome(data), SandboxConfig(), 2).error_kind == "invalid_output"
    data = _header(2, 0, 0) + sizes[:12] * 2 + bytes(128) + TRACE_BYTES * 2
    result = read_outcome(NOISE, _outcome(data), SandboxConfig(), 2)
    assert len(result.made) == 2 and len(result.traces) == 2


@pytest.mark.parametrize(
    ("data", "cut", "wanted"),
    [
        (b"caf\xc3\xa9\t1\n", -1, "café\t1\n"),
        (b"\x1b[31mred\x07\r\n", -1, r"\x1b[31mred\x07\r" + "\n"),
        ("\u202e\u200b\xa0\u3000".encode(), -1, "\\u202e\\u200b\xa0\u3000"),
        (b"\xff\xfe\x00", -1, r"\xff\xfe\x00"),
        ("aéé".encode(), 2, "a" + CUT_OUT + "é"),
        (b"ab", 1, "a" + CUT_OUT + "b"),
    ],
)
def test_what_is_printed_is_readable_text(data: bytes, cut: int, wanted: str) -> None:
    assert printed_text(data, cut) == wanted


def test_no_exit_status_or_signal_counts_as_lost() -> None:
    for status in range(256):
        outcome = ChildResult(os.memfd_create("test"), wait_status=status << 8)
        result = read_outcome(NOISE, outcome, SandboxConfig())
        assert (result.status, result.error_kind) == (ToolStatus.ERROR, "no_result")
    for number in range(1, 65):
        outcome = ChildResult(os.memfd_create("test"), wait_status=number)
        assert read_outcome(NOISE, outcome, SandboxConfig()).status is ToolStatus.KILLED


def test_texts_lose_control_characters_and_marks() -> None:
    assert clean_text("a\x1b[2J<|im_end|>\x00b", 99).isprintable()
    for mark in ("<|im_end|>", "</tool_response>", "<image>", "<|<||>"):
        assert "<|" not in clean_text(mark, 99) and "tool_response>" not in clean_text(mark, 99)
    assert len(clean_text("x" * 5000, 600)) == 600
