"""From code to reward with the real sandbox: operations count if they ran, in the source's coordinates."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from reward_samples import BOX, Recorder, group, task

from cv_lightning.agent.calls import trajectory_image
from cv_lightning.rewards import RewardConfig, RewardModule
from cv_lightning.sandbox import Sandbox
from cv_lightning.tools.code_image import code_call, map_to_source
from cv_lightning.types import Task, ToolImage, Trajectory, Turn


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


def run(sandbox: Sandbox, subject: Task, *snippets: str, answer: str = "42", max_shown: int = 0) -> Trajectory:
    """Each snippet on the last image, recorded as the agent records it."""
    recorder = Recorder(subject)
    for code in snippets:
        parent = recorder.images[-1]
        result = sandbox.run_sync(parent.original, code, max_shown=max_shown)
        at, index = len(recorder.images) - 1, len(recorder.images) if result.made else None
        for effect, image in zip(result.effects, result.made, strict=False):
            made = ToolImage(image=image, parent=at, to_source=map_to_source(recorder.images, at, effect, image))
            recorder.images.append(trajectory_image(recorder.images, made, image))
        call = code_call(code, len(recorder.images) - 1)
        text = "<think>t</think><tool_call>{}</tool_call>"
        num_images = len(result.made) or 1
        recorder.turns.append(
            Turn(text=text, num_tokens=5, tool_call=call, result=result, image_index=index, num_images=num_images)
        )
    return recorder.answer(answer)


def components(trajectory: Trajectory, config: RewardConfig | None = None) -> dict[str, float]:
    RewardModule(config).score_group(group(trajectory))
    assert trajectory.reward is not None
    return trajectory.reward.components


TURN_AND_CROP = {
    "two calls": ("result = image.rotate(270, expand=True)", "result = image.crop((150, 40, 270, 200))"),
    "one call": ("t = image.transpose(Image.Transpose.ROTATE_270)\nresult = t.crop((150, 40, 270, 200))",),
    "arrays": ("result = np.rot90(np.array(image), k=3)", "a = np.array(image)\nresult = a[40:200, 150:270]"),
    "crop first": (
        "w, h = image.size\nresult = image.crop((w // 10, h // 10, w // 2, h // 2)).rotate(-90, expand=True)",
    ),
}


@pytest.mark.parametrize("way", TURN_AND_CROP)
def test_a_crop_of_the_rotated_image_counts_in_the_source(sandbox: Sandbox, way: str) -> None:
    """The image was rotated by 90 degrees; BOX of the source lies at (150, 40, 270, 200) once it is upright."""
    trajectory = run(sandbox, task("rotate_90", "crop"), *TURN_AND_CROP[way])
    found = components(trajectory, RewardConfig(crop_credit="iou"))
    assert (found["mandatory"], found["exact"], found["accuracy"]) == (pytest.approx(1.0), 1.0, 1.0)
    parity = RewardConfig(credit="ran")
    frameless = components(trajectory, parity)["mandatory"]
    # a call's own box is in the frame of the image that it worked on, here the source where there was one call only
    assert frameless == pytest.approx(1.0) if len(TURN_AND_CROP[way]) == 1 else frameless < 0.8


MENTIONS = {
    "comment": "# image.rotate(270).crop((40, 30, 200, 150))\nresult = image",
    "string": "s = 'image.rotate(270).crop((40, 30, 200, 150))'\nresult = image",
    "dead branch": "if 1 > 2:\n    image = image.rotate(270, expand=True)\nresult = image",
    "uncalled": "def f():\n    return image.rotate(270, expand=True)\nresult = image",
    "thrown away": "image.rotate(270, expand=True)\nimage.crop((40, 30, 200, 150))\nresult = image",
    "there and back": "result = image.rotate(270, expand=True).rotate(90, expand=True)",
    "whole": "w, h = image.size\nresult = image.crop((0, 0, w, h))",
    "raises": "image = image.rotate(270, expand=True)\nimage = image.crop((40, 30, 200, 150))\nraise ValueError('x')",
    "enhanced by 1": "result = ImageEnhance.Contrast(image).enhance(1.0)",
    "own names": "def rotate(i, a):\n    return i\nresult = rotate(image, 270)  # .crop((40, 30, 200, 150))",
    "a name from outside": "class rotate_270:\n    pass\nrotate_270()\nresult = image",
}


@pytest.mark.parametrize("recipe", ["default", "paper", "released code"])
@pytest.mark.parametrize("way", MENTIONS)
def test_operations_that_did_not_run_earn_nothing(sandbox: Sandbox, way: str, recipe: str) -> None:
    config = {
        "default": RewardConfig(),
        "paper": RewardConfig(credit="steps", emerge=0.2),
        "released code": RewardConfig(credit="ran", emerge=0.2),
    }[recipe]
    found = components(run(sandbox, task("rotate_90", "crop"), MENTIONS[way]), config)
    assert (found["mandatory"], found["exact"], found["emerge"]) == (0, 0, 0)


def test_operations_only_named_in_text_earn_nothing(sandbox: Sandbox) -> None:
    """Nothing looks at the text: what it says and what ran disagree here."""
    code = "crop = lambda *_: image\nimage.rotate(270, expand=True)\nresult = image"
    trajectory = run(sandbox, task("rotate_90", box=None), code)
    assert components(trajectory)["mandatory"] == 0.0
    assert components(trajectory, RewardConfig(credit="ran"))["mandatory"] == 0.0


def test_a_misplaced_crop_earns_its_overlap(sandbox: Sandbox) -> None:
    x1, y1, x2, y2 = map(int, BOX)
    code = f"result = image.crop(({x1 + 40}, {y1}, {x2 + 40}, {y2}))"
    found = components(run(sandbox, task("crop"), code), RewardConfig(crop_credit="iou"))
    assert found["mandatory"] == pytest.approx(120 / 200, abs=0.02)
