"""The plan tier, the effect's verification and the wire form, without processes."""

import numpy as np
import pytest
from PIL import Image

from cv_lightning.sandbox import SandboxConfig, plan
from cv_lightning.sandbox.effect import believed, effect_of
from cv_lightning.sandbox.golden import coordinate_picture
from cv_lightning.sandbox.wire import RawOperation, Trace, WireError, clean_text, pack_trace, unpack_trace
from cv_lightning.types import Affine

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "code",
    ["import os", "while True: pass", "result = image.crop((0, 0, 9**9, 9))", "result = image.resize((60000, 60000))",
     "result = image.__class__", "result = (lambda: image)()", "result = image.crop((5, 5, 5, 9))", "result = 3", "", "result ="],
)  # fmt: skip
def test_a_plan_leaves_other_code_to_a_child(code: str) -> None:
    assert plan.run(NOISE, code, SandboxConfig()) is None


def test_a_plan_tells_the_net_effect() -> None:
    result = plan.run(NOISE, "a = image.rotate(90, expand=True)\nresult = a.crop((10, 20, 50, 60))", SandboxConfig())
    assert result is not None and result.effect is not None and result.image is not None
    assert result.effect.core == ("crop", "rotate_90") and result.effect.crop_box == (60, 10, 100, 50)
    assert [op.name for op in result.operations] == ["rotate_90", "crop"]


@pytest.mark.parametrize("picture", [NOISE, coordinate_picture()])
def test_a_forged_claim_is_not_believed(picture: Image.Image) -> None:
    turned = picture.transpose(Image.Transpose.ROTATE_180)
    width, height = picture.size
    found = believed([Affine(1, 0, 0, 0, 1, 0)], picture, turned)
    assert effect_of(found, picture.size, turned.size).core == ("rotate_180",)
    crop = picture.crop((3, 4, 60, 70))
    assert believed([Affine(1, 0, 40, 0, 1, 15)], NOISE, NOISE.crop((3, 4, 60, 70))) is None
    assert believed([Affine(1, 0, 3, 0, 1, 4)], picture, crop) == Affine(1, 0, 3, 0, 1, 4)
    assert (width, height) == picture.size


def test_trace_survives_its_form_and_damage_is_refused() -> None:
    trace = Trace(
        (RawOperation("crop", "Image.crop", (("box", (1, 2, 3.5, None)),), (9, 9), (2, 2), True),),
        (Affine(1, 0, 0, 0, 1, 0),),
        True,
    )
    data = pack_trace(trace)
    assert unpack_trace(data) == trace
    for cut in range(len(data)):
        with pytest.raises(WireError):
            unpack_trace(data[:cut])
    rng = np.random.default_rng(1)
    for _ in range(2000):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] = int(rng.integers(256))
        try:
            unpack_trace(bytes(damaged))
        except WireError:
            continue


def test_texts_lose_control_characters_and_marks() -> None:
    assert clean_text("a\x1b[2J<|im_end|>\x00b", 99).isprintable()
    assert "<|" not in clean_text("<|im_end|>", 99)


@pytest.mark.parametrize("flag", ["timeout_s", "memory_mb", "max_result_pixels"])
def test_config_names_the_wrong_flag(flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        SandboxConfig(**{flag: 0})
