"""Tokens as `data check` counts them are those that SFT and the agent see."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_corpus import encoded, picture, row, write_tasks

from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.data.conversations import Conversation, DemoTurn
from cv_lightning.digits.demonstrations import DemonstrationConfig
from cv_lightning.digits.scenes import DigitsConfig, digit_task
from cv_lightning.digits.sources import DigitDemonstrations
from cv_lightning.factory.check import check_files
from cv_lightning.factory.check_facts import CheckConfig
from cv_lightning.factory.check_tokens import TokenCounter
from cv_lightning.modules.sft import encode_conversation
from cv_lightning.types import CheckpointError, SandboxResult, ToolStatus


def conversations() -> list[Conversation]:
    """Demonstrations with calls, and one with a failed call told in the file's own words."""
    turned = lambda image, code: SandboxResult(status=ToolStatus.OK, image=image.rotate(90, expand=True))  # noqa: E731
    made = DigitDemonstrations(DigitsConfig(), DemonstrationConfig(tool_share=1.0), turned).batch(0, 12)
    turns = (
        DemoTurn(text="<think>try</think><tool_call>{oops</tool_call>", response_text="Error: no JSON"),
        DemoTurn(text="<tool_call>{}</tool_call>"),
        DemoTurn(text="<answer>7</answer>"),
    )
    return [*made, Conversation(task=digit_task(DigitsConfig(), "train", 3), turns=turns)]


def test_conversations_and_prompts_have_the_length_that_training_sees(
    tiny_checkpoint: Path, encoder: DialogueEncoder
) -> None:
    counter = TokenCounter(str(tiny_checkpoint))
    prompt = PromptConfig()
    for conversation in conversations():
        assert counter.conversation(conversation) == len(encode_conversation(encoder, conversation, prompt).token_ids)
        task = conversation.task
        seen = [encoder.model_image(image) for image in task.images]
        assert counter.task(task) == len(encoder.start(task, seen, prompt).token_ids)


def test_a_processor_brings_tokens_and_limits_into_the_report(tmp_path: Path, tiny_checkpoint: Path) -> None:
    rows = [row(encoded(picture(200, 200))), row(encoded(picture(64, 64)), extra_question="What? " * 50)]
    path = write_tasks(tmp_path / "set.parquet", rows)
    report = check_files([path], CheckConfig(processor=str(tiny_checkpoint), max_tokens=20))
    assert report["files"][0]["limits"]["factor"] == TokenCounter(str(tiny_checkpoint)).limits.factor
    assert report["tokens"]["all"]["count"] == 2
    assert report["tokens"]["all"]["min"] > report["tokens"]["images"]["min"]
    assert {"more than max_tokens: the row is of no use": 2}.items() <= {
        entry["kind"]: entry["count"] for entry in report["cut"]
    }.items()


def test_a_folder_without_a_processor(tmp_path: Path) -> None:
    path = write_tasks(tmp_path / "set.parquet", [row()])
    with pytest.raises(CheckpointError, match="no processor"):
        check_files([path], CheckConfig(processor=str(tmp_path)))
