"""Golden transforms: the net effect of snippets that are really run, and the reference's way of picking results."""

import json
from pathlib import Path

import pytest
from sandbox_golden import coordinate_image, golden_transforms

from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.types import ToolStatus

CASES = json.loads(Path(__file__).with_name("transforms.public.json").read_text(encoding="utf-8"))["cases"]


def overlap(a: list[float] | None, b: list[float] | None) -> float:
    """Intersection over union; 1 if both are None."""
    if a is None or b is None:
        return float(a is b)
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - shared
    return shared / union


def test_net_effects_agree_with_measured_ones() -> None:
    core, boxes = [], []
    for case in CASES:
        got, truth = golden_transforms(case), case["truth"]
        if sorted(set(got["core"])) not in [sorted(set(option)) for option in truth["core_options"]]:
            core.append((case["id"], case["code"], got["core"]))
        if overlap(got["crop_box"], truth["crop_box"]) <= 0.98:
            boxes.append((case["id"], case["code"], got["crop_box"]))
    assert len(core) <= 0.02 * len(CASES), core
    assert len(boxes) <= 0.05 * len(CASES), boxes


def test_reference_results_equal_the_released_code() -> None:
    image = coordinate_image()
    with (
        Sandbox(SandboxConfig(reference_results=True, max_code_chars=20_000)) as reference,
        Sandbox(SandboxConfig(max_code_chars=20_000)) as ours,
    ):
        for case in CASES:
            verdict = case["truth"].get("reference_executor")
            if verdict is None or case["code"] is None:
                continue
            got = reference.run_sync(image, case["code"])
            if verdict == "input_unchanged":
                assert got.image is not None and got.image.tobytes() == image.tobytes(), case["code"]
            elif verdict == "rejected_not_pil":
                assert (got.status, got.error_kind) == (ToolStatus.ERROR, "not_an_image"), case["code"]
            else:
                assert verdict == "same", f"unknown verdict {verdict}"
                right = ours.run_sync(image, case["code"])
                # Where no result was made, ours reports it and the reference returns the input.
                want = image if right.error_kind == "no_result" else right.image
                assert want is not None and got.image is not None, (case["code"], got.error)
                assert got.image.tobytes() == want.tobytes(), case["code"]


@pytest.mark.parametrize("code", ["image = image.rotate(90)", "rotated = image.rotate(180)"])
def test_where_the_released_code_returns_the_input(code: str) -> None:
    image = coordinate_image()
    with Sandbox(SandboxConfig(reference_results=True)) as reference:
        lost = reference.run_sync(image, code).image
    assert lost is not None and lost.tobytes() == image.tobytes()
    with Sandbox(SandboxConfig()) as ours:
        got = ours.run_sync(image, code)
    if "rotated" in code:
        assert got.error_kind == "no_result" and "result" in got.error
    else:
        assert got.image is not None and got.image.tobytes() == image.rotate(90).tobytes()
