"""The crop tool: frames of coordinates, boxes that are none, and a crop that counts as one made by code."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import pytest
from PIL import Image

from cv_lightning.agent.protocol import parse_turn
from cv_lightning.rewards.transforms import net_credit, ran_credit, step_credit
from cv_lightning.tools import CropBoxTool, ToolContext
from cv_lightning.types import (
    Affine,
    EndState,
    Task,
    ToolCall,
    ToolResult,
    ToolStatus,
    Trajectory,
    TrajectoryImage,
    Turn,
)

SOURCE = Image.effect_noise((240, 180), 60).convert("RGB")
Frame = Literal["original_px", "model_px", "relative_1000"]


def context(*images: TrajectoryImage, coordinates: Frame = "original_px") -> ToolContext:
    images = images or (TrajectoryImage(original=SOURCE, model_image=SOURCE.resize((120, 60))),)
    return ToolContext(images=images, owner="t", sandbox=None, coordinates=coordinates)  # type: ignore[arg-type]


def crop(box: list[float], where: ToolContext, index: int = 0, label: str = "") -> ToolResult:
    arguments: dict[str, Any] = {"box": box, "image_index": index, "label": label}
    return asyncio.run(CropBoxTool().call(arguments, where))


@pytest.mark.parametrize(
    ("frame", "box"),
    [
        ("original_px", [60, 45, 180, 135]),
        ("original_px", [60.2, 45.9, 179.1, 134.5]),
        ("model_px", [30, 15, 90, 45]),
        ("relative_1000", [250, 250, 750, 750]),
    ],
)
def test_a_box_is_read_in_the_configured_frame_and_cut_at_full_resolution(frame: Frame, box: list[float]) -> None:
    result = crop(box, context(coordinates=frame), label="the middle")
    (made,) = result.images
    assert result.status is ToolStatus.OK and result.text == ""  # text has a reward term of its own
    assert made.image.tobytes() == SOURCE.crop((60, 45, 180, 135)).tobytes()
    assert made.to_source == Affine(1, 0, 60, 0, 1, 45) and made.parent == 0
    assert result.effect is not None and result.effect.crop_box == (60, 45, 180, 135)


def test_a_crop_of_a_turned_image_has_the_map_to_the_source() -> None:
    turned = SOURCE.rotate(90, expand=True)  # 180 x 240
    parent = TrajectoryImage(original=turned, model_image=turned, parent=0, to_source=Affine(0, -1, 240, 1, 0, 0))
    first = TrajectoryImage(original=SOURCE, model_image=SOURCE)
    (made,) = crop([10, 20, 60, 90], context(first, parent), index=1).images
    assert made.parent == 1 and made.to_source == Affine(0, -1, 220, 1, 0, 10)


def test_a_box_that_sticks_out_a_little_is_cut_to_the_image_and_the_policy_reads_it() -> None:
    result = crop([-5, 100, 250, 190], context())
    assert result.images[0].image.size == (240, 80)
    assert result.text == "The box was cut to the image: [0, 100, 240, 180]."


def test_a_box_of_the_whole_image_is_no_crop() -> None:
    result = crop([0, 0, 240, 180], context())
    assert result.effect is not None and (result.effect.core, result.effect.crop_box) == ((), None)


def test_a_box_narrower_than_a_pixel_gives_one_pixel() -> None:
    assert crop([239.9, 179.9, 240, 180], context()).images[0].image.size == (1, 1)
    assert crop([7.4, 7.4, 7.5, 7.5], context()).images[0].image.size == (1, 1)


@pytest.mark.parametrize(
    ("box", "error"),
    [
        ([180, 45, 60, 135], "box [180, 45, 60, 135] is empty: it is [x1, y1, x2, y2] with x1 < x2 and y1 < y2"),
        ([60, 45, 60, 135], "is empty"),
        ([300, 10, 400, 90], "is outside the image, in which coordinates run x from 0 to 240 and y from 0 to 180"),
        ([240, 10, 260, 90], "is outside the image"),
        ([-40, 10, 60, 90], "is outside the image"),
        ([0, 0, 1e300, 90], "is outside the image"),
        ([0, 0, 10**400, 90], "too large"),
        ([0, 0, float("inf"), 90], "must be finite"),
        ([float("nan"), 0, 10, 90], "must be finite"),
    ],
)
def test_a_box_that_is_none_is_an_error_for_the_policy(box: list[float], error: str) -> None:
    result = crop(box, context())
    assert result.status is ToolStatus.ERROR and not result.images and error in result.error


@pytest.mark.parametrize(
    ("box", "error"),
    [
        ("[1, 2, 3]", '"box" must be a list|needs "box": a list: [1, 2, 3] is too short'),
        ('["a", 2, 3, 4]', "'a' is not of type 'number'"),
        ("[true, 2, 3, 4]", "True is not of type 'number'"),
        ('"10 20 30 40"', 'needs "box": a list'),
        ("[1, 2, 3, NaN]", "not valid JSON"),
        ("[1, 2, 3, 1e999]", "not valid JSON"),
    ],
)
def test_a_box_that_does_not_fit_the_schema_is_answered_before_the_call(box: str, error: str) -> None:
    call = f'{{"name": "crop_box", "arguments": {{"box": {box}, "image_index": 0}}}}'
    parsed = parse_turn(f"<think>a</think><tool_call>{call}</tool_call>", [CropBoxTool()])
    assert parsed.call is None and parsed.error is not None
    assert any(each in parsed.error for each in error.split("|")), parsed.error


def test_rewards_count_the_box_as_the_same_crop_by_code() -> None:
    """Labels and boxes of every recipe: a crop of 20..60 x 20..50 of an image that asks for one."""
    result = crop([20, 20, 60, 50], context())
    task = Task(id="t", question="?", images=(SOURCE,), ground_truth="4", required_transforms=("crop",))
    view = result.images[0]
    images = [
        TrajectoryImage(original=SOURCE, model_image=SOURCE),
        TrajectoryImage(original=view.image, model_image=view.image, parent=0, to_source=view.to_source),
    ]
    called = ToolCall(name="crop_box", arguments={"box": [20, 20, 60, 50], "image_index": 0, "label": ""})
    turns = [
        Turn(text="", num_tokens=1, tool_call=called, result=result, image_index=1),
        Turn(text="<answer>4</answer>", num_tokens=1),
    ]
    trajectory = Trajectory(
        task=task, sample=0, token_ids=[], loss_mask=[], logprobs=[], num_prompt_tokens=0, images=images, turns=turns
    )
    trajectory.end_state = EndState.ANSWERED
    for credit in (
        net_credit(trajectory, frozenset({"crop"})),
        ran_credit(trajectory, in_source=True),
        step_credit(trajectory, frozenset({"crop"})),
    ):
        assert credit.labels == {"crop"} and credit.boxes == ((20.0, 20.0, 60.0, 50.0),) and not credit.turned
    assert json.loads(json.dumps(result.operations[0].arguments)) == {"box": [20, 20, 60, 50]}
    assert isinstance(view.image, Image.Image)
