"""What the parent believes of a child: maps that pixels prove, and bytes that keep their form."""

import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cv_lightning.sandbox import SandboxConfig
from cv_lightning.sandbox.effect import believed, effect_of
from cv_lightning.sandbox.pool import ChildResult
from cv_lightning.sandbox.reading import read_outcome
from cv_lightning.sandbox.wire import (
    HEADER,
    MAGIC,
    STATUS_OK,
    RawOperation,
    Trace,
    WireError,
    clean_text,
    pack_trace,
    unpack_trace,
)
from cv_lightning.types import Affine, ToolStatus

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
_Y, _X = np.mgrid[0:300, 0:400]
_WAVES = 128 + 60 * np.sin(_X / 17) + 50 * np.cos(_Y / 11 + _X / 60)
SMOOTH = Image.fromarray(np.stack([_WAVES, _Y // 2, _WAVES / 2 + _X / 4], axis=-1).astype(np.uint8))
IDENTITY = Affine(1, 0, 0, 0, 1, 0)
TRACE = Trace(
    (RawOperation("crop", "Image.crop", (("box", (1, 2, 3.5, None)),), (9, 9), (2, 2), True),), (IDENTITY,), True
)


# ------------------------------------------------------------------------------------------------ maps
@pytest.mark.parametrize("picture", [NOISE, SMOOTH])
def test_a_forged_map_is_not_believed(picture: Image.Image) -> None:
    turned = picture.transpose(Image.Transpose.ROTATE_180)
    found = believed([IDENTITY], picture, turned)
    assert effect_of(found, picture.size, turned.size).core == ("rotate_180",)
    crop = picture.crop((3, 4, 60, 70))
    assert believed([Affine(1, 0, 3, 0, 1, 4)], picture, crop) == Affine(1, 0, 3, 0, 1, 4)


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
def test_a_trace_survives_its_form_and_damage_is_refused() -> None:
    data = pack_trace(TRACE)
    assert unpack_trace(data) == TRACE
    for cut in range(len(data)):
        with pytest.raises(WireError):
            unpack_trace(data[:cut])


@given(st.binary(max_size=300))
def test_any_bytes_are_a_trace_or_an_error(data: bytes) -> None:
    try:
        assert unpack_trace(data).operations is not None
    except WireError as error:
        assert str(error)


@given(st.integers(0, len(pack_trace(TRACE)) - 1), st.integers(0, 255))
def test_one_wrong_byte_is_read_or_refused(at: int, value: int) -> None:
    damaged = bytearray(pack_trace(TRACE))
    damaged[at] = value
    try:
        assert len(unpack_trace(bytes(damaged)).operations) == 1
    except WireError as error:
        assert str(error)


def _outcome(data: bytes) -> ChildResult:
    fd = os.memfd_create("test")
    os.write(fd, data)
    return ChildResult(fd)


def _header(width: int, height: int, pixels: int, trace: int, text: int, status: int = STATUS_OK) -> bytes:
    return HEADER.pack(MAGIC, status, width, height, pixels, trace, text)


@pytest.mark.parametrize(
    "data",
    [
        _header(4, 4, 64, 0, 0),
        _header(4, 4, 64, 3, 0) + bytes(64) + b"\xff\xff\xff",
        _header(4, 4, 48, 0, 0) + bytes(48),
        _header(0xFFFFFFFF, 0xFFFFFFFF, 1 << 62, 0, 0),
        _header(4, 4, 64, 1 << 31, 0) + bytes(64),
        _header(0, 0, 0, 0, 0),
        _header(4, 4, 64, 3, 5) + bytes(72),
        _header(0, 0, 0, 0, 1 << 30, 1),
        _header(4, 4, 64, 3, 0, 7) + bytes(67),
        b"\0" * HEADER.size,
        b"PICKLE!!" * 20,
        struct.pack("<8s", MAGIC) + b"\xff" * 64,
    ],
)
def test_impossible_output_is_the_snippets_fault_and_its_memfd_is_closed(data: bytes) -> None:
    outcome = _outcome(data)
    fd = outcome.output_fd
    result = read_outcome(NOISE, outcome, SandboxConfig(), is_plan=False)
    assert (result.status, result.error_kind, result.image) == (ToolStatus.KILLED, "invalid_output", None)
    with pytest.raises(OSError):
        os.fstat(fd)


@given(st.binary(max_size=200))
def test_any_output_gives_a_result(data: bytes) -> None:
    result = read_outcome(NOISE, _outcome(MAGIC + data), SandboxConfig(), is_plan=False)
    assert result.status in (ToolStatus.KILLED, ToolStatus.ERROR) or result.image is not None


def test_whatever_way_a_child_ends_it_is_not_lost() -> None:
    for status in range(256):
        outcome = ChildResult(os.memfd_create("test"), wait_status=status << 8)
        result = read_outcome(NOISE, outcome, SandboxConfig(), is_plan=False)
        assert (result.status, result.error_kind) == (ToolStatus.ERROR, "no_result")
    for number in range(1, 65):
        outcome = ChildResult(os.memfd_create("test"), wait_status=number)
        assert read_outcome(NOISE, outcome, SandboxConfig(), is_plan=False).status is ToolStatus.KILLED


def test_texts_lose_control_characters_and_marks() -> None:
    assert clean_text("a\x1b[2J<|im_end|>\x00b", 99).isprintable()
    for mark in ("<|im_end|>", "</tool_response>", "<image>", "<|<||>"):
        assert "<|" not in clean_text(mark, 99) and "tool_response>" not in clean_text(mark, 99)
    assert len(clean_text("x" * 5000, 600)) == 600
