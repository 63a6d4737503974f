"""SFT rows with texts, several images, errors and several tools give the tokens and the mask of a rollout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sandbox_samples import smooth_image
from scripted_engine import ScriptedEngine

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.driver import Rollout
from cv_lightning.agent.protocol import call_markup
from cv_lightning.agent.request import RolloutRequest
from cv_lightning.background import Background
from cv_lightning.data.conversations import Conversation, DemoTurn
from cv_lightning.data.rows import ReaderConfig, RowError
from cv_lightning.data.sft_json import check_calls, conversation_of_item
from cv_lightning.data.writers import write_sft_json
from cv_lightning.engines.base import SamplingConfig
from cv_lightning.factory.check_tokens import TokenCounter
from cv_lightning.modules.sft import encode_conversation
from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.tools import CodeTool, CropBoxTool
from cv_lightning.types import EndState, Task, Trajectory

TOOLS = [CodeTool(max_text_tokens=64), CropBoxTool()]
ANSWER = "<think>read</think><answer>42</answer>"
BOTH = "print('two parts')\nshow(image.crop((0, 0, 100, 80)))\nshow(image.rotate(90, expand=True))"


def code(text: str, on: int = 0) -> str:
    return "<think>a</think>" + call_markup(CodeTool.name, {"code": text, "image_index": on})


SCRIPT = [
    code("print(image.size)"),
    code(BOTH),
    "<think>b</think>" + call_markup("crop_box", {"box": [10, 10, 60, 50], "image_index": 2}),
    code("print('half')\n1 / 0"),
    code("print('x ' * 900)"),
    code("print('<|im_end|></tool_response> <' + 'image> <think>')", on=3),
    code("print('\\n  indented  ')") + call_markup(CodeTool.name, {"code": "1", "image_index": 0}),
    code("1", on=40),
    "<think>c</think><tool_call>{oops</tool_call>",
    "<think>d</think>" + call_markup("measure", {}),
    "<think>e</think>" + call_markup("crop_box", {"box": [9, 9, 1, 1], "image_index": 0}),
    ANSWER,
]
"""A turn for each form of a response."""


@pytest.fixture(scope="module")
def trajectory(encoder: DialogueEncoder) -> Trajectory:
    background = Background()
    engine = ScriptedEngine(encoder, lambda _, turn: SCRIPT[turn], max_model_len=20_000)
    config = AgentConfig(tools=TOOLS, max_turns=20, max_parse_errors=9)
    task = Task(id="t", question="How many?", images=(smooth_image(),), ground_truth="42")
    with Sandbox(SandboxConfig(num_zygotes=1)) as sandbox:
        rollout = Rollout(engine, sandbox, encoder, background, config, banned_ids=())
        (found,) = rollout.run([RolloutRequest(task, 0)], SamplingConfig())
    background.close()
    assert found.end_state is EndState.ANSWERED, found.error
    assert [turn.num_images for turn in found.turns if turn.image_index is not None] == [2, 1]
    return found


def framed(trajectory: Trajectory) -> Conversation:
    """The conversation with the tools' own texts and errors, which the agent's words frame."""
    turns = []
    for turn in trajectory.turns:
        made = [trajectory.images[at].original for at in turn.image_indices]
        result = turn.result
        turns.append(
            DemoTurn(
                text=turn.text,
                result_image=made[0] if made else None,
                more_images=tuple(made[1:]),
                said=result.text if result is not None else None,
                error=(result.error if result is not None else turn.parse_error) or "",
            )
        )
    return Conversation(task=trajectory.task, turns=tuple(turns))


def as_read(trajectory: Trajectory) -> Conversation:
    """The conversation with the responses as the model read them."""
    turns = []
    for turn in trajectory.turns:
        made = [trajectory.images[at].original for at in turn.image_indices]
        images = {"result_image": made[0] if made else None, "more_images": tuple(made[1:])}
        turns.append(DemoTurn(text=turn.text, response_text=turn.response_text, **images))
    return Conversation(task=trajectory.task, turns=tuple(turns))


@pytest.mark.parametrize("form", [framed, as_read])
@pytest.mark.parametrize("stored", [False, True], ids=["made", "from a file"])
def test_a_row_has_the_tokens_and_mask_of_the_rollout(
    encoder: DialogueEncoder, tiny_checkpoint: Path, trajectory: Trajectory, tmp_path: Path, form: Any, stored: bool
) -> None:
    conversation = form(trajectory)
    if stored:
        write_sft_json(tmp_path / "sft.json", [conversation])
        (item,) = json.loads((tmp_path / "sft.json").read_text())
        conversation = conversation_of_item(item, tmp_path / "sft.json", 0, ReaderConfig())
    prompt = AgentConfig().prompt
    dialogue = encode_conversation(encoder, conversation, prompt, TOOLS)
    assert dialogue.token_ids == trajectory.token_ids
    assert dialogue.loss_mask == trajectory.loss_mask
    assert [image.size for image in dialogue.images] == [image.model_image.size for image in trajectory.images]
    counter = TokenCounter(str(tiny_checkpoint), tools=TOOLS)
    assert counter.conversation(conversation) == len(trajectory.token_ids)


def item(tool: dict[str, Any], gpt: str = code("print(1)"), images: int = 1, **mark: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": gpt, **mark}]
    turns += [{"from": "tool", **tool}, {"from": "gpt", "value": ANSWER}]
    return {"conversations": turns, "images": ["a.png"] * images}


def read(folder: Path, row: dict[str, Any]) -> Conversation:
    smooth_image().save(folder / "a.png")
    conversation = conversation_of_item(row, folder / "sft.json", 0, ReaderConfig())
    check_calls(conversation, TOOLS)
    return conversation


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (item({"value": "3", "text": "3"}), "tool response"),
        (item({"text": 3}), "no text"),
        (item({"text": "a\0"}), "NUL character"),
        (item({"value": "<image><image>"}, images=2), "image marks"),
        (item({"value": "<image>" * 5}, images=6), "too many images"),
        (item({"text": "3"}, gpt=SCRIPT[9]), "unknown tool"),
        (item({"text": "3"}, gpt="<think>a</think>"), "no tool call"),
    ],
)
def test_a_mistake_in_a_tool_turn_is_named(tmp_path: Path, row: dict[str, Any], kind: str) -> None:
    with pytest.raises(RowError) as refused:
        read(tmp_path, row)
    assert refused.value.kind == kind


def test_the_forms_of_a_tool_turn(tmp_path: Path, encoder: DialogueEncoder) -> None:
    def response(row: dict[str, Any]) -> str:
        conversation = read(tmp_path, row)
        text = encoder.tokenizer.decode(
            encode_conversation(encoder, conversation, AgentConfig().prompt, TOOLS).engine_ids
        )
        return text.split("<tool_response>\n")[1].split("\n</tool_response>")[0]

    pad = encoder.tokenizer.decode([encoder.image_pad_id])
    image = f"<|vision_start|>{pad}<|vision_end|>"
    size = "\nImage {} is 240x180 pixels."
    assert response(item({"text": "3\n"})) == "3"
    assert response(item({"text": ""})) == "", "a result without a text"
    assert response(item({"text": "2", "error": "Traceback"})) == "2\nError: Traceback"
    assert response(item({"value": "<image>" * 2, "text": "3"}, images=3)) == (
        f"{image}{size.format(1)}\n{image}{size.format(2)}\n3"
    )
    assert response(item({"value": "<image>\nSee\n<image>: 3\n"}, images=3)) == f"{image}\nSee\n{image}: 3"
