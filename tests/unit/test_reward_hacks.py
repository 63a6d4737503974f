"""Reward hacks (`reward_hacks`) under every shipped recipe, and the components that they change."""

from __future__ import annotations

import time
from pathlib import Path

import jsonargparse
import pytest
from reward_hacks import HACKS, OPEN, WHOLE, small, turned
from reward_samples import BOX, HEIGHT, WIDTH, Recorder, group, task

from cv_lightning.rewards import RewardConfig, RewardModule
from cv_lightning.rewards.format import check_format, check_turns
from cv_lightning.types import EndState, RewardBreakdown, Trajectory

ROOT = Path(__file__).parents[2]
RECIPES = {
    "default": "configs/reward/default.yaml",
    "quickstart": "configs/quickstart/reward.yaml",
    "quickstart, outcome": "configs/quickstart/reward_accuracy.yaml",
    "accuracy": "configs/reward/accuracy.yaml",
    "paper": "configs/reward/paper.yaml",
    "reference": "configs/reward/reference.yaml",
}
CONFIGS = [RewardConfig(), RewardConfig(crop_credit="iou")]


def recipe(name: str) -> RewardConfig:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--reward", type=RewardConfig)
    return parser.instantiate(parser.parse_args([f"--reward={ROOT / RECIPES[name]}"])).reward


def score(trajectory: Trajectory, config: RewardConfig | None = None) -> RewardBreakdown:
    RewardModule(config).score_group(group(trajectory))
    assert trajectory.reward is not None
    return trajectory.reward


def process_of(reward: RewardBreakdown) -> float:
    """What the use of the tool earned."""
    return sum(reward.components[name] for name in ("mandatory", "exact", "emerge", "necessity"))


# ------------------------------------------------------------------------------------------------ tricks by recipe
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("hack", HACKS)
def test_a_trick_earns_nothing(hack: str, name: str) -> None:
    """A recipe that is open to a trick is listed with it, and must really be: the list is the documentation."""
    config = recipe(name)
    gain = score(HACKS[hack].trick(), config).total - score(HACKS[hack].honest(), config).total
    if hack in OPEN.get(name, set()):
        assert gain > 1e-9, f"{name} is not open to this; take it off the list"
    else:
        assert gain <= 1e-9


def test_docs_list_the_tricks_that_each_recipe_pays() -> None:
    text = (ROOT / "docs" / "rewards.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    for hack in set().union(*OPEN.values()):
        for name in ("paper", "reference"):
            column = 2 if name == "paper" else 3
            assert (rows[hack].split("|")[column].strip() == "open") == (hack in OPEN[name]), hack


# ------------------------------------------------------------------------------------------------ components
@pytest.mark.parametrize("config", CONFIGS)
def test_correct_solutions_get_full_reward(config: RewardConfig) -> None:
    assert score(Recorder(turned()).call("rotate_270").answer(), config).total == pytest.approx(2.2)
    assert score(Recorder(small()).call(BOX).answer(), config).total == pytest.approx(2.2)
    upright = task(box=None)
    assert score(Recorder(upright).answer(), config).total == pytest.approx(1.1)
    both = Recorder(task("rotate_180", "crop")).call("rotate_180")
    crop = (WIDTH - 200.0, HEIGHT - 150.0, WIDTH - 40.0, HEIGHT - 30.0)  # the box in the rotated image
    assert score(both.call(crop).answer(), config).total == pytest.approx(2.2)


def test_trying_every_orientation_earns_nothing_but_penalties() -> None:
    recorder = Recorder(turned())
    for name in ("rotate_270", "rotate_90", "rotate_180", "flip_horizontal", "flip_vertical"):
        recorder.call(name, on=0)
    reward = score(recorder.answer())
    assert process_of(reward) == 0
    assert reward.components["usage"] == 3


def test_unnecessary_rotation_costs_even_when_undone() -> None:
    honest = score(Recorder(task(box=None)).answer())
    there = score(Recorder(task(box=None)).call("rotate_90", "rotate_270").answer())
    assert there.total <= honest.total - 0.5 * 2
    assert score(Recorder(task(box=None)).call(unused=["rotate_90"]).answer()).total < honest.total


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("box", [WHOLE, (1.0, 1.0, WIDTH - 1.0, HEIGHT - 1.0)], ids=["whole", "all but the rim"])
def test_crops_of_the_whole_image_earn_nothing(config: RewardConfig, box: tuple[float, ...]) -> None:
    reward = score(Recorder(small()).call(box).answer(), config)
    assert process_of(reward) == 0
    assert reward.components["accuracy"] == 0


def test_a_crop_of_nearly_the_whole_image_scores_low_by_coverage() -> None:
    large = task("crop", box=(20.0, 20.0, 320.0, 240.0))
    reward = score(Recorder(large).call((0.0, 0.0, 380.0, 290.0)).answer(), CONFIGS[0])
    assert reward.components["mandatory"] <= 0.5


def test_the_same_crop_again_earns_no_more() -> None:
    once = score(Recorder(small()).call(BOX).answer())
    often = Recorder(small())
    for _ in range(5):
        often.call(BOX, on=0)
    assert score(often.answer()).total <= once.total - 0.5 * 3


def test_many_random_crops_earn_nothing() -> None:
    recorder = Recorder(small())
    for left in range(0, 400, 100):
        recorder.call((float(left), 150.0, left + 100.0, 300.0), on=0)
    lucky = Recorder(small()).call(BOX)
    lucky.call((300.0, 200.0, 400.0, 300.0), on=0)
    assert process_of(score(recorder.answer())) == 0
    assert score(lucky.answer()).components["mandatory"] == 0
    in_one_call = Recorder(small()).call((300.0, 200.0, 400.0, 300.0), unused=["crop"] * 20)
    assert score(in_one_call.answer()).components["mandatory"] == 0


def test_failed_rotations_of_an_upright_image_cost() -> None:
    assert score(Recorder(task(box=None)).fail("rotate_90").answer()).components["spurious"] == 1


def test_neutral_and_unknown_operations_do_not_count_as_optional_tools() -> None:
    upright = task(box=None)
    assert score(Recorder(upright).call("copy", "convert", "").answer()).components["emerge"] == 0
    assert score(Recorder(upright).call("contrast_up").answer()).components["emerge"] == 1
    elsewhere = Recorder(upright).call("contrast_up").call(on=0)  # the answer was given on another image
    assert score(elsewhere.answer()).components["emerge"] == 0


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("B", "A or B"),
        ("B", "A, B"),
        ("B", "A/B/C/D"),
        ("C", "(A) (B) (C)"),
        ("A", "A cat"),
        ("C", "vitamin A, vitamin C"),
        ("42", "41, 42"),
        ("42", "41 or 42"),
        ("42", "41/42"),
        ("42", "40-42"),
        ("42", "1 2 3 42"),
        ("2", "H2O"),
        ("45", "3:45"),
        ("42", ""),
        ("yes", "yes or no"),
    ],
)
def test_answers_with_several_options_are_wrong(truth: str, answer: str) -> None:
    reward = score(Recorder(task(box=None, truth=truth)).answer(answer))
    assert not reward.correct


def test_copying_the_prompt_is_wrong() -> None:
    question = "Which number is written: A. 17 or B. 42?"
    for truth in ("42", "B", question):
        reward = score(Recorder(task(box=None, truth=truth, question=question)).answer(question))
        assert not reward.correct


@pytest.mark.parametrize(
    "raw",
    [
        "<think>t</think><answer><think>hm</think>42</answer>",
        "<think>t</think><answer>42<think></answer>",
        "<think>t <answer>42</answer>",
        "<think>t <answer>42</answer></think>",
        "<think>t</think><tool_response><answer>42</answer></tool_response>",
        "<think>t</think><answer>42<tool_call>{}</tool_call></answer>",
        "<think>t</think>42",
    ],
)
def test_answers_in_or_around_other_tags_do_not_count(raw: str) -> None:
    reward = score(Recorder(task(box=None)).answer(raw=raw))
    assert not reward.correct
    assert reward.components["format"] == 0


@pytest.mark.parametrize("end", [s for s in EndState if not s.is_error and s is not EndState.ANSWERED])
def test_a_trajectory_without_an_answer_earns_nothing(end: EndState) -> None:
    reward = score(Recorder(turned()).call("rotate_270").answer(end=end))
    assert process_of(reward) + reward.components["accuracy"] + reward.components["format"] == 0


def test_turns_without_a_thought_lose_the_format_reward() -> None:
    recorder = Recorder(turned()).call("rotate_270").call("contrast_up")
    recorder.turns[1].text = "<tool_call>{}</tool_call>"
    assert score(recorder.answer()).components["format"] == 0
    assert score(recorder.answer(), RewardConfig(credit="ran")).components["format"] == 1
    recorder.turns[0].text = "<tool_call>{}</tool_call>"
    assert score(recorder.answer(), RewardConfig(credit="ran")).components["format"] == 0


@pytest.mark.parametrize(
    "texts",
    [
        ["Hm. <think>t</think><answer>42</answer>"],
        ["\ufeff<think>t</think><answer>42</answer>"],
        ["\u200b<think>t</think><answer>42</answer>"],
        ["<think></think><answer>42</answer>"],
        ["<think> \n</think><answer>42</answer>"],
        ["<think>t</think><answer></answer>"],
        ["<think>t</think><answer> </answer>"],
        ["<think>t</think><tool_call>{}</tool_call><answer>42</answer>"],
        ["<think>t</think><tool_call>{}</tool_call><tool_call>{}</tool_call>", "<think>t</think><answer>42</answer>"],
        ["So: <think>t</think><tool_call>{}</tool_call>", "<think>t</think><answer>42</answer>"],
        ["<think></think><tool_call>{}</tool_call>", "<think>t</think><answer>42</answer>"],
    ],
)
def test_ill_formed_turns_earn_no_format_reward(texts: list[str]) -> None:
    assert check_turns(texts) == 0.0
    if len(texts) == 1 and "tool_call" not in texts[0]:
        assert check_format(texts[0]) == 0.0


@pytest.mark.parametrize(
    "evil", ["<think>" * 20_000, "</think>" * 20_000, "<answer>" * 20_000, "<answer>1" + " " * 10**5]
)
def test_format_and_answer_of_long_texts_take_little_time(evil: str) -> None:
    begun = time.process_time()
    for raw in (evil, "<think>t</think>" + evil + "<answer>42</answer>", f"<answer>{evil}</answer>"):
        score(Recorder(task(box=None)).answer(raw=raw))
    for answer in ("1," * 5000, "1 " * 5000, "A " * 5000, "(" * 9000, "of the " * 2000):
        score(Recorder(task(box=None)).answer(answer))
    assert time.process_time() - begun < 1.0
