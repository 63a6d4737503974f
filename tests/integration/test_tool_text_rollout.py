"""Printed text and several images through loop, sandbox, rewards and store."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from PIL import Image
from sandbox_samples import smooth_image
from scripted_engine import ScriptedEngine

from cv_lightning.agent.calls import run_call
from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.driver import Rollout
from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.agent.request import RolloutRequest
from cv_lightning.background import Background
from cv_lightning.engines.base import SamplingConfig
from cv_lightning.rewards import RewardConfig, RewardModule
from cv_lightning.rewards.terms import PrintedText
from cv_lightning.rewards.transforms import net_credit, ran_credit
from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.tools import CodeTool, Tool, ToolContext
from cv_lightning.trajectory import StoreConfig, TrajectoryWriter, read_groups
from cv_lightning.types import (
    EndState,
    Group,
    ImageError,
    Task,
    ToolCall,
    ToolImage,
    ToolResult,
    ToolStatus,
    Trajectory,
    TrajectoryImage,
)

ANSWER = "<think>read</think><answer>42</answer>"
TASK = Task(
    id="t",
    question="How many?",
    images=(smooth_image(),),
    ground_truth="42",
    required_transforms=("crop",),
    box=(20.0, 20.0, 60.0, 50.0),
)


def call(code: str, on: int = 0) -> str:
    arguments = {"name": CodeTool.name, "arguments": {"code": code, "image_index": on}}
    return f"<think>a</think><tool_call>{json.dumps(arguments)}</tool_call>"


def rolled_out(encoder: DialogueEncoder, *codes: str, tool: CodeTool | None = None) -> Trajectory:
    turns = [*map(call, codes), ANSWER]
    config = AgentConfig(tools=[tool or CodeTool()], deterministic=True, prompt=PromptConfig(state_size=False))
    background = Background()
    engine = ScriptedEngine(encoder, lambda _, turn: turns[turn], max_model_len=8192)
    with Sandbox(SandboxConfig(num_zygotes=1)) as sandbox:
        rollout = Rollout(engine, sandbox, encoder, background, config, banned_ids=())
        (trajectory,) = rollout.run([RolloutRequest(TASK, 0)], SamplingConfig())
    background.close()
    assert trajectory.end_state is EndState.ANSWERED, trajectory.error
    return trajectory


def test_text_and_images_reach_the_model_the_rewards_and_the_store(encoder: DialogueEncoder, tmp_path: Path) -> None:
    show = "for box in [(150, 90, 230, 170), (15, 15, 65, 55)]:\n    print(box)\n    show(image.crop(box))"
    trajectory = rolled_out(encoder, "print(image.size)", show, "print('half')\n1 / 0", "print('x' * 9000)")
    counted, shown, failed, long, _ = trajectory.turns
    assert counted.result is not None and counted.result.status is ToolStatus.OK and counted.image_index is None
    assert counted.response_text == "(240, 180)" and list(counted.image_indices) == []
    assert list(shown.image_indices) == [1, 2]
    assert shown.response_text == "<image>\n<image>\n(150, 90, 230, 170)\n(15, 15, 65, 55)"
    assert failed.response_text == "half\nError: Traceback:\n  line 2: 1 / 0\nZeroDivisionError: division by zero"
    assert "[... output cut ...]" in long.response_text
    assert len(encoder.tokenizer(long.response_text)["input_ids"]) <= 1024
    assert [(image.parent, image.to_source and image.to_source[2::3]) for image in trajectory.images[1:]] == [
        (0, (150, 90)),
        (0, (15, 15)),
    ]
    # credit is for the image that the answer was given on, blame for all
    assert net_credit(trajectory, frozenset({"crop"})).boxes == ((15, 15, 65, 55),)
    assert len(ran_credit(trajectory, in_source=True).boxes) == 2
    reward = RewardModule(RewardConfig(terms=[PrintedText("printed", 0.5), PrintedText("wrong", -1.0, if_right=False)]))
    group = Group(task=TASK, trajectories=[trajectory])
    reward.score_group(group)
    assert trajectory.reward is not None
    assert trajectory.reward.components["mandatory"] == 1.0 and trajectory.reward.components["printed"] == 1.0
    with TrajectoryWriter(tmp_path, StoreConfig(tokens=True)) as writer:
        writer.write_group(group, 0)
    (read,) = read_groups(tmp_path)
    (found,) = read.trajectories
    assert [turn.response_text for turn in found.turns] == [turn.response_text for turn in trajectory.turns]
    assert [turn.image_indices for turn in found.turns] == [turn.image_indices for turn in trajectory.turns]
    stored = found.turns[1].result
    assert stored is not None and shown.result is not None and stored.traces == shown.result.traces
    reward.score_group(read)
    assert found.reward == trajectory.reward, "rescored from the store"


def test_without_text_the_call_is_as_it_was(encoder: DialogueEncoder) -> None:
    printed, image = "print(image.size)", "print(1)\nresult = image.crop((15, 15, 65, 55))"
    trajectory = rolled_out(encoder, printed, image, "1 / 0", tool=CodeTool(text=False))
    first, second, third, _ = (turn.response_text for turn in trajectory.turns)
    assert first.startswith("Error: no result: put the new image into `result`") and second == "<image>"
    assert third == "Error: ZeroDivisionError (line 1: `1 / 0`): division by zero"
    assert not PrintedText("printed", 1.0).value(trajectory, 1.0)


class Pair(Tool):
    """Returns two images, of which one cannot be shown."""

    name = "pair"
    description = "shows two images."
    parameters = {"type": "object", "properties": {}}  # noqa: RUF012
    max_images = 2

    async def call(self, arguments: dict[str, object], context: ToolContext) -> ToolResult:
        images = [Image.new("RGB", size) for size in ((8, 8), (9, 9))]
        return ToolResult(images=tuple(ToolImage(image=image, parent=0, to_source=None) for image in images))


class Only:
    """Sizes images, and refuses small ones."""

    def model_image(self, image: Image.Image) -> Image.Image:
        if image.width < 9:
            raise ImageError("too small")
        return image


def test_an_image_that_cannot_be_shown_leaves_the_others() -> None:
    image = Image.new("RGB", (9, 9))
    context = ToolContext(images=[TrajectoryImage(original=image, model_image=image)], owner="o", sandbox=None)  # type: ignore[arg-type]
    made = asyncio.run(run_call(Pair(), ToolCall(name="pair"), context, Only()))
    assert [view.size for view in made.views] == [(9, 9)] == [each.image.size for each in made.result.images]
    assert made.not_shown == "too small"
    one = Pair()
    one.max_images = 1
    with pytest.raises(ValueError, match="it may return 1"):
        asyncio.run(run_call(one, ToolCall(name="pair"), context, Only()))
