"""Demonstrations: the shown calls do what the task needs, in every frame of coordinates."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.data.conversations import Conversation
from cv_lightning.digits.demonstrations import DemonstrationConfig, crop_code, demonstrate, tokenizer_corpus
from cv_lightning.digits.scenes import KINDS, DigitsConfig, digit_task
from cv_lightning.digits.sources import DigitDemonstrations
from cv_lightning.types import SandboxError, SandboxResult, ToolStatus

ALWAYS = DemonstrationConfig(tool_share=1.0)
NEVER = DemonstrationConfig(tool_share=0.0)


def execute(image: Image.Image, code: str) -> SandboxResult:
    """Runs a demonstration's own snippet; nothing a model wrote comes here."""
    scope = {"image": image, "Image": Image}
    exec(code, scope)
    return SandboxResult(status=ToolStatus.OK, image=scope["result"])


def conversation(kind: str, config: DemonstrationConfig, index: int = 0, **arguments: bool) -> Conversation:
    digits = DigitsConfig()
    task = digit_task(digits, "train", index, kind)
    return demonstrate(task, config, digits, random.Random(index), execute, **arguments)


@pytest.mark.parametrize("coordinates", ["original_px", "model_px", "relative_1000"])
def test_calls_put_the_number_upright_and_large(coordinates: str) -> None:
    digits = DigitsConfig(coordinates=coordinates)
    for index in range(30):
        task = digit_task(digits, "train", index, "turned_and_small")
        shown = demonstrate(task, ALWAYS, digits, random.Random(0), execute)
        assert [turn.call and turn.call.image_index for turn in shown.turns] == [0, 1, None]
        last = shown.turns[1].result_image
        assert last.size == (64, 64)
        x1, y1, _, _ = task.metadata["upright_box"]
        left, top, _, _ = task.metadata["cell"]
        pixels = np.asarray(last)[..., 0]
        assert not pixels[int(y1 - top), int(x1 - left) : int(x1 - left) + 40].any()
        assert shown.turns[-1].text == f"<think>read</think><answer>{task.ground_truth}</answer>"


def test_a_call_is_written_in_the_protocol() -> None:
    for turn in conversation("turned_and_small", ALWAYS).turns[:-1]:
        assert turn.text.startswith("<think>")
        found = re.fullmatch(r"<think>\w+</think><tool_call>\n(.*)\n</tool_call>", turn.text)
        body = json.loads(found[1])
        assert body["name"] == turn.call.name == "code_image_tool"
        assert body["arguments"] == {"code": turn.call.code, "image_index": turn.call.image_index}


@pytest.mark.parametrize(("kind", "calls"), [("upright", 0), ("turned", 1), ("small", 1), ("turned_and_small", 2)])
def test_demonstrations_call_only_what_the_task_needs(kind: str, calls: int) -> None:
    turns = conversation(kind, ALWAYS).turns
    assert sum(turn.call is not None for turn in turns) == calls
    assert len(turns) == calls + 1
    assert len(conversation(kind, NEVER).turns) == 1


def test_direct_answers_are_right_where_the_config_says_so() -> None:
    def right(kind: str, config: DemonstrationConfig) -> float:
        shown = [conversation(kind, config, index) for index in range(300)]
        return sum(f"<answer>{c.task.ground_truth}</answer>" in c.turns[0].text for c in shown) / len(shown)

    assert right("turned", NEVER) == 1.0
    assert right("small", NEVER) < 0.05
    assert right("turned_and_small", NEVER) < 0.05
    assert right("turned", DemonstrationConfig(tool_share=0.0, direct_turned="random")) < 0.05
    assert right("small", DemonstrationConfig(tool_share=0.0, direct_small="right")) == 1.0


def test_the_share_of_tool_use_and_of_needless_turns() -> None:
    config = DemonstrationConfig(tool_share=0.4, needless_share=0.25)
    used = {kind: sum(len(conversation(kind, config, i).turns) > 1 for i in range(500)) / 500 for kind in KINDS}
    assert used.pop("upright") == pytest.approx(0.25, abs=0.07)
    assert all(share == pytest.approx(0.4, abs=0.08) for share in used.values())


def test_the_warm_up_has_clean_single_turns() -> None:
    source = DigitDemonstrations(DigitsConfig(), DemonstrationConfig(), execute, warm_up_steps=1)
    shown = source.batch(0, 60)
    kinds = [c.task.metadata["kind"] for c in shown]
    assert [kinds.count(kind) for kind in KINDS] == [30, 10, 20, 0]
    for c in shown:
        assert len(c.turns) == 1
        assert (c.turns[0].call is None) == (c.task.metadata["kind"] == "upright")
        assert c.turns[0].result_image is None
        if c.turns[0].call is None:
            assert c.task.ground_truth in c.turns[0].text


def test_a_snippet_that_fails_stops_with_its_error() -> None:
    def broken(image: Image.Image, code: str) -> SandboxResult:
        return SandboxResult(status=ToolStatus.ERROR, error="NameError: line 1")

    digits = DigitsConfig()
    task = digit_task(digits, "train", 0, "turned")
    with pytest.raises(SandboxError, match="NameError: line 1"):
        demonstrate(task, ALWAYS, digits, random.Random(0), broken)


def test_crop_code_names_the_frame() -> None:
    cell = (64, 128, 128, 192)
    assert crop_code(cell, DigitsConfig()) == "result = image.crop((64, 128, 128, 192))"
    assert "16 * s, 32 * s" in crop_code(cell, DigitsConfig(coordinates="model_px"))
    assert "167 * s, 333 * s" in crop_code(cell, DigitsConfig(coordinates="relative_1000"))


def test_the_corpus_holds_every_text_of_a_conversation() -> None:
    digits = DigitsConfig()
    texts = set(tokenizer_corpus(digits, PromptConfig()))
    for kind in KINDS:
        for turn in conversation(kind, ALWAYS, 5).turns:
            if turn.call is not None:
                assert turn.text in texts
    assert digits.question in texts


@pytest.mark.parametrize("flag", ["tool_share", "needless_share"])
def test_a_share_outside_its_range_names_its_flag(flag: str) -> None:
    with pytest.raises(ValueError, match=f"--data.init_args.demonstrations.{flag}"):
        DemonstrationConfig(**{flag: 1.5})
    with pytest.raises(ValueError, match="--warm_up_shares"):
        DemonstrationConfig(warm_up_shares={"sideways": 1.0})
