"""Scenes with something to measure: the answer is what the pixels say, recounted here without the scene's own code."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.data.conversations import Conversation
from cv_lightning.digits.demonstrations import DemonstrationConfig, demonstrate, tokenizer_corpus
from cv_lightning.digits.measure import DARK, MEASURES
from cv_lightning.digits.quickstart import Timing, stages
from cv_lightning.digits.scenes import MEASURE_KINDS, DigitsConfig, digit_task
from cv_lightning.digits.sources import DigitDemonstrations, HeldOutScenes
from cv_lightning.types import DataError, SandboxResult, Task

CONFIG = DigitsConfig(kind_shares=dict.fromkeys(MEASURE_KINDS, 1.0))
ALWAYS = DemonstrationConfig(tool_share=1.0)


def runs_of_cards(image: Image.Image) -> list[int]:
    """Width of every card, from the rows in which the number of gray pixels changes."""
    rows = [int(np.count_nonzero(row < 255)) for row in np.asarray(image.convert("L"))]
    return [row for before, row in zip([0, *rows], rows, strict=False) if row and not before]


def recount(task: Task) -> int:
    image = task.images[0].convert("L")
    histogram = image.histogram()
    match task.metadata["kind"]:
        case "width":
            (width,) = runs_of_cards(task.images[0])
            return width
        case "ink":
            return sum(histogram[:DARK])
        case "shade":
            return max(range(255), key=lambda value: histogram[value])  # the most frequent gray value
        case _:
            first, second = runs_of_cards(task.images[0])
            return abs(first - second)


@pytest.mark.parametrize("kind", MEASURE_KINDS)
def test_the_answer_is_what_the_pixels_say(kind: str) -> None:
    for index in range(25):
        for split in ("train", "held_out"):
            task = digit_task(CONFIG, split, index, kind)
            assert task.ground_truth == str(recount(task)), task.id
            assert task.question == MEASURES[kind].question and task.images[0].size == (384, 384)
            assert task.needs_tool and task.metadata["needs_text"] and not task.required_transforms


@pytest.mark.parametrize("kind", MEASURE_KINDS)
def test_training_and_held_out_scenes_share_no_digit(kind: str) -> None:
    used = {
        split: {digit for i in range(60) for digit in digit_task(CONFIG, split, i, kind).metadata["digits"]}
        for split in ("train", "held_out")
    }
    assert max(used["train"]) < CONFIG.train_digits <= min(used["held_out"])


@pytest.mark.parametrize("kind", MEASURE_KINDS)
def test_no_answer_is_frequent(kind: str) -> None:
    """The best constant answer is right in few of the scenes: chance is low."""
    answers = [digit_task(CONFIG, "held_out", index, kind).ground_truth for index in range(200)]
    assert max(answers.count(answer) for answer in answers) <= 12
    assert all(len(answer) <= 3 for answer in answers)


def execute(image: Image.Image, code: str, *, max_shown: int = 0) -> SandboxResult:
    """Runs a demonstration's own snippet; nothing a model wrote comes here."""
    scope, printed = {"image": image, "np": np, "ImageChops": ImageChops}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, scope)
    return SandboxResult(image=scope.get("result"), text=printed.getvalue() if max_shown else "")


def conversation(kind: str, config: DemonstrationConfig, index: int = 0, warm_up: bool = False) -> Conversation:
    task = digit_task(CONFIG, "train", index, kind)
    return demonstrate(task, config, CONFIG, random.Random(index), execute, warm_up=warm_up)


@pytest.mark.parametrize("kind", MEASURE_KINDS)
def test_demonstrations_answer_with_what_the_call_printed(kind: str) -> None:
    for index in range(10):
        shown = conversation(kind, ALWAYS, index)
        call, answer = shown.turns
        assert call.call is not None and call.call.code == MEASURES[kind].code and call.result_image is None
        assert call.said == f"{shown.task.ground_truth}\n"
        assert answer.text == f"<think>read</think><answer>{call.said.strip()}</answer>"


def test_demonstrations_without_text_show_the_cards_from_near() -> None:
    shown = conversation("width", DemonstrationConfig(tool_share=1.0, measure_with="image"))
    call, answer = shown.turns
    assert call.said is None and call.result_image is not None
    assert call.result_image.width == int(shown.task.ground_truth)
    assert f"<answer>{shown.task.ground_truth}</answer>" in answer.text


def test_answers_without_a_call_are_those_of_other_scenes() -> None:
    never = DemonstrationConfig(tool_share=0.0)
    shown = [conversation(kind, never, index) for kind in MEASURE_KINDS for index in range(50)]
    assert all(len(each.turns) == 1 and each.turns[0].call is None for each in shown)
    assert sum(f"<answer>{each.task.ground_truth}</answer>" in each.turns[0].text for each in shown) < 15


def test_the_warm_up_shows_the_call_only() -> None:
    shares = dict.fromkeys(MEASURE_KINDS, 1.0)
    source = DigitDemonstrations(CONFIG, DemonstrationConfig(warm_up_shares=shares), execute, warm_up_steps=1)
    shown = source.batch(0, 8)
    assert sorted(each.task.kind for each in shown) == sorted([*MEASURE_KINDS, *MEASURE_KINDS])
    assert all(len(each.turns) == 1 and each.turns[0].call is not None for each in shown)


def test_held_out_scenes_alternate_between_the_kinds() -> None:
    scenes = HeldOutScenes(CONFIG, dict.fromkeys(MEASURE_KINDS, 2))
    assert [scenes.row(position).kind for position in range(len(scenes))] == [*MEASURE_KINDS, *MEASURE_KINDS]


def test_the_tokenizer_learns_the_phrases_of_its_task_only() -> None:
    measuring = "\n".join(tokenizer_corpus(CONFIG, PromptConfig()))
    reading = "\n".join(tokenizer_corpus(DigitsConfig(), PromptConfig()))
    for measure in MEASURES.values():
        assert measure.question in measuring and measure.question not in reading
    assert "rotate(" not in measuring and "np.array" not in reading


def test_an_image_without_room_for_the_cards_is_refused() -> None:
    DigitsConfig(original_side=320)
    with pytest.raises(ValueError, match="--original_side 320 must be at least 331"):
        DigitsConfig(original_side=320, kind_shares={"width": 1.0})


# ------------------------------------------------------------------------------------------------ the quickstart
def test_stages_of_the_measuring_task() -> None:
    found = {
        stage.name: stage.arguments for stage in stages(Path("r"), seed=3, smoke=True, ablation=True, task="measure")
    }
    trained = ["sft", "sft_eval", "rl", "rl_eval", "sft_images", "sft_images_eval", "rl_images", "rl_images_eval"]
    assert list(found) == ["tiny", *trained, "summary", "report"]
    for name in trained:
        config = "eval" if name.endswith("_eval") else "sft" if name.startswith("sft") else "grpo"
        words = found[name]
        assert words.index(f"configs/quickstart/{config}.yaml") < words.index(
            f"configs/quickstart/measure_{config}.yaml"
        )
        assert ("configs/quickstart/measure_images.yaml" in words) == ("images" in name and config != "sft")
    assert "measure_with" in " ".join(found["sft_images"]) and "measure_with" not in " ".join(found["sft"])
    assert "r/sft_images/model" in found["rl_images"] and '"ink": 2' in " ".join(found["rl_eval"])
    plain = {stage.name: stage.arguments for stage in stages(Path("r"), seed=3, smoke=False, ablation=False)}
    assert not [word for words in plain.values() for word in words if "measure" in word or "kind_shares" in word]


def test_a_folder_of_another_task_is_not_continued(tmp_path: Path) -> None:
    Timing(tmp_path / "old", seed=0)  # made before there were tasks
    for name in ("old", "new"):
        Timing(tmp_path / name, seed=0, task="digits")
        with pytest.raises(DataError, match="was made with --task digits, not measure"):
            Timing(tmp_path / name, seed=0, task="measure")
