"""Parsing, cost estimates and limits of plans, without processes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cv_lightning.sandbox import SandboxConfig, plan
from cv_lightning.sandbox.plan_rules import MAX_KERNEL, MAX_RADIUS, output_size

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
CROP = "result = image.crop((1, 2, 30, 40))"


@pytest.mark.parametrize(
    "code",
    [
        "import os",
        "import os as np\n" + CROP,
        "from PIL.Image import open\n" + CROP,
        "while True: pass",
        "result = image.crop((0, 0, 9**9, 9))",
        "result = image.crop((0, 0, 1e9, 9))",
        "result = image.resize((60000, 60000))",
        "result = image.resize((10, 10.5))",
        "result = image.__class__",
        "result = image.im",
        "result = (lambda: image)()",
        "result = image.crop((5, 5, 5, 9))",
        "result = image.crop('abcd')",
        "result = 3",
        "result = None\nx = 1",
        "result = image.crop(*[(0, 0, 3, 3)])",
        "result = image.rotate(**{'angle': 90})",
        "result = image.rotate(float('nan'))",
        "result = image.rotate(int('90'))",
        "result = image.transpose(7)",
        "result = image.transpose(True)",
        f"result = image.filter(ImageFilter.GaussianBlur({MAX_RADIUS + 1}))",
        f"result = image.filter(ImageFilter.MedianFilter({MAX_KERNEL + 2}))",
        "result = image.filter(ImageFilter.MedianFilter(4))",
        "result = image.filter(ImageFilter.Kernel((3, 3), (1,) * 9))",
        "result = ImageOps.expand(image, 100000)",
        "result = ImageEnhance.Contrast(image).enhance('2')",
        "result = ImageEnhance.Contrast(image).image",
        "math = image\nresult = math",
        "Image = image\nresult = Image",
        "from PIL.ImageOps import mirror\nmirror = image\nresult = mirror",
        "a = b = image.rotate(90)",
        "result = image if image else image",
        "result = undefined",
        "",
        "result =",
        "(" * 500 + "1" + ")" * 500,
    ],
)
def test_code_that_is_not_a_plan_is_left_to_a_child(code: str) -> None:
    assert plan.prepare(code, NOISE.size) is None and plan.run(NOISE, code, SandboxConfig()) is None


def test_a_plan_reports_the_net_effect_and_unused_operations() -> None:
    code = "b = image.rotate(45)\na = image.rotate(90, expand=True)\nresult = a.crop((10, 20, 50, 60))"
    result = plan.run(NOISE, code, SandboxConfig())
    assert result is not None and result.effect is not None and result.image is not None
    assert result.effect.core == ("crop", "rotate_90") and result.effect.crop_box == (60, 10, 100, 50)
    assert [(op.name, op.used) for op in result.operations] == [("rotate", False), ("rotate_90", True), ("crop", True)]


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("output = image.rotate(180)\nimage = image.crop((0, 0, 9, 9))", "rotate_180"),
        ("image = image.crop((0, 0, 9, 9))\nresult = img.rotate(180)", "rotate_180"),
        ("img = img.crop((0, 0, 9, 9))", "crop"),
        ("processed_image = image.rotate(180)\nimg = img.crop((0, 0, 9, 9))", "rotate_180"),
    ],
)
def test_plans_pick_the_result_as_a_child_does(code: str, name: str) -> None:
    result = plan.run(NOISE, code, SandboxConfig())
    assert result is not None and [op.name for op in result.operations if op.used] == [name]


def test_nothing_runs_before_its_cost_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("a pixel was touched")

    dear = "a = image.crop((0, 0, 50, 50))\nresult = image.resize((3000, 3000), Image.LANCZOS)"
    prepared = plan.prepare(dear, NOISE.size)
    assert prepared is not None and prepared.cost_ms > 50 and prepared.size == (3000, 3000)
    monkeypatch.setattr(plan, "_apply", fail)
    assert plan.run(NOISE, dear, SandboxConfig(plan_budget_ms=3.0)) is None


def test_a_plan_never_returns_the_input_object() -> None:
    result = plan.run(NOISE, "result = image", SandboxConfig())
    assert result is not None and result.image is not NOISE and result.image is not None
    result.image.putpixel((0, 0), (1, 2, 3))
    assert NOISE.getpixel((0, 0)) != (1, 2, 3)


def test_results_beyond_the_limits_are_left_to_a_child_that_explains() -> None:
    config = SandboxConfig(max_result_pixels=5000, plan_budget_ms=1e6)
    assert plan.run(NOISE, "result = image.resize((100, 60))", config) is None
    assert plan.run(NOISE, "result = image.resize((400, 2))", config) is None
    assert plan.run(NOISE, CROP, config) is not None


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.one_of(st.floats(-720, 720), st.sampled_from([0.0, 90.0, 180.0, 270.0, 45.0, -90.0, 1e-9])),
)
def test_the_size_of_a_rotation_is_predicted(width: int, height: int, angle: float) -> None:
    arguments = {"angle": angle, "expand": True}
    made = Image.new("L", (width, height)).rotate(angle, expand=True)
    assert output_size("Image.rotate", (width, height), arguments) == made.size


def test_functions_and_conditions_are_evaluated() -> None:
    code = (
        "w, h = image.size\na = 90 if w > h else 0\nresult = image.rotate(math.degrees(math.pi / 2) + a, expand=True)"
    )
    prepared = plan.prepare(code, (40, 30))
    assert prepared is not None and math.isclose(prepared.steps[0].arguments["angle"], 180.0)


@pytest.mark.parametrize("flag", ["timeout_s", "memory_mb", "max_result_pixels", "max_code_chars"])
def test_config_errors_name_the_setting(flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        SandboxConfig(**{flag: 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_code_chars"):
        SandboxConfig(max_code_chars=10**6)
    with pytest.raises(ValueError, match="disabled_layers"):
        SandboxConfig(disabled_layers=("wall",))
