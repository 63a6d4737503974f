"""Ways to be paid for nothing. Each earns at most what it earns without the trick, under the default reward."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from reward_samples import BOX, HEIGHT, WIDTH, Recorder, group, task

from cv_lightning.images import compose
from cv_lightning.rewards import RewardConfig, RewardModule
from cv_lightning.types import (
    Affine,
    EndState,
    Operation,
    RewardBreakdown,
    Task,
    ToolStatus,
    Trajectory,
    TrajectoryImage,
)

WHOLE = (0.0, 0.0, float(WIDTH), float(HEIGHT))
CONFIGS = [RewardConfig(), RewardConfig(crop_credit="coverage")]


def score(trajectory: Trajectory, config: RewardConfig | None = None) -> RewardBreakdown:
    RewardModule(config).score_group(group(trajectory))
    assert trajectory.reward is not None
    return trajectory.reward


def process_of(reward: RewardBreakdown) -> float:
    """What the use of the tool earned."""
    return sum(reward.components[name] for name in ("mandatory", "exact", "emerge", "necessity"))


def turned() -> Task:
    return task("rotate_90", box=None)


def small() -> Task:
    return task("crop")


@pytest.mark.parametrize("config", CONFIGS)
def test_honest_work_is_paid_in_full(config: RewardConfig) -> None:
    assert score(Recorder(turned()).call("rotate_270").answer(), config).total == pytest.approx(2.2)
    assert score(Recorder(small()).call(BOX).answer(), config).total == pytest.approx(2.2)
    upright = task(box=None)
    assert score(Recorder(upright).answer(), config).total == pytest.approx(1.1)
    both = Recorder(task("rotate_180", "crop")).call("rotate_180")
    crop = (WIDTH - 200.0, HEIGHT - 150.0, WIDTH - 40.0, HEIGHT - 30.0)  # the box as the turned picture shows it
    assert score(both.call(crop).answer(), config).total == pytest.approx(2.2)


@pytest.mark.parametrize(
    "code",
    [
        "# image.rotate(270) .crop((40,30,200,150))\nresult = image",
        "s = 'image.rotate(270); image.crop((40, 30, 200, 150))'\nresult = image",
        "if False:\n    image = image.rotate(270).crop((40, 30, 200, 150))\nresult = image",
        "def f():\n    return image.rotate(270)\nresult = image",
    ],
    ids=["comment", "string", "dead branch", "uncalled function"],
)
def test_text_of_code_earns_nothing(code: str) -> None:
    reward = score(Recorder(task("rotate_90", "crop")).call(code=code).answer())
    assert process_of(reward) == 0
    assert reward.components["accuracy"] == 0  # and the answer was not read off the crop


def test_results_thrown_away_earn_nothing() -> None:
    reward = score(Recorder(turned()).call(unused=["rotate_270", "contrast_up"]).answer())
    assert process_of(reward) == 0


@pytest.mark.parametrize("calls", [[("rotate_270", "rotate_90")], [("rotate_270",), ("rotate_90",)]])
def test_rotating_there_and_back_earns_nothing(calls: list[tuple[str, ...]]) -> None:
    recorder = Recorder(turned())
    for steps in calls:
        recorder.call(*steps)
    assert process_of(score(recorder.answer())) == 0


def test_turning_on_after_the_image_is_right_earns_nothing() -> None:
    recorder = Recorder(turned()).call("rotate_270").call("rotate_270")
    assert process_of(score(recorder.answer())) == 0


def test_trying_every_orientation_earns_nothing_but_penalties() -> None:
    recorder = Recorder(turned())
    for name in ("rotate_270", "rotate_90", "rotate_180", "flip_horizontal", "flip_vertical"):
        recorder.call(name, on=0)
    reward = score(recorder.answer())
    assert process_of(reward) == 0
    assert reward.components["usage"] == 3


def test_turning_an_upright_image_costs_even_when_turned_back() -> None:
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


def test_a_nearly_whole_crop_is_worth_little_by_coverage() -> None:
    large = task("crop", box=(20.0, 20.0, 320.0, 240.0))
    reward = score(Recorder(large).call((0.0, 0.0, 380.0, 290.0)).answer(), CONFIGS[1])
    assert reward.components["mandatory"] <= 0.5


def test_the_same_crop_again_earns_no_more() -> None:
    once = score(Recorder(small()).call(BOX).answer())
    often = Recorder(small())
    for _ in range(5):
        often.call(BOX, on=0)
    assert score(often.answer()).total <= once.total - 0.5 * 3


def test_spraying_crops_earns_nothing_for_the_lucky_one() -> None:
    recorder = Recorder(small())
    for left in range(0, 400, 100):
        recorder.call((float(left), 150.0, left + 100.0, 300.0), on=0)
    lucky = Recorder(small()).call(BOX)
    lucky.call((300.0, 200.0, 400.0, 300.0), on=0)
    assert process_of(score(recorder.answer())) == 0
    assert score(lucky.answer()).components["mandatory"] == 0
    in_one_call = Recorder(small()).call((300.0, 200.0, 400.0, 300.0), unused=["crop"] * 20)
    assert score(in_one_call.answer()).components["mandatory"] == 0


@pytest.mark.parametrize("status", [ToolStatus.ERROR, ToolStatus.TIMEOUT, ToolStatus.KILLED, ToolStatus.REFUSED])
def test_calls_that_failed_earn_nothing(status: ToolStatus) -> None:
    reward = score(
        Recorder(task("rotate_90", "crop")).fail("rotate_270", "crop", "contrast_up", status=status).answer()
    )
    assert process_of(reward) == 0


def test_failed_turns_of_an_upright_image_still_cost() -> None:
    assert score(Recorder(task(box=None)).fail("rotate_90").answer()).components["spurious"] == 1


def test_a_box_in_the_description_earns_nothing() -> None:
    recorder = Recorder(small()).call()
    recorder.turns[0].tool_call = None
    assert process_of(score(recorder.answer("42 [40, 30, 200, 150] crop"))) == 0


def test_a_picture_shrunk_to_nothing_earns_nothing() -> None:
    trajectory = Recorder(task("rotate_90", "crop")).call("rotate_270").answer()
    last = trajectory.images[-1]
    dot = last.original.resize((20, 20))
    scale = Affine(last.original.width / 20, 0, 0, 0, last.original.height / 20, 0)
    assert last.to_source is not None
    shrunk = TrajectoryImage(original=dot, model_image=dot, parent=1, to_source=compose(last.to_source, scale))
    assert process_of(score(trajectory)) == pytest.approx(0.5)
    trajectory.images.append(shrunk)
    assert process_of(score(trajectory)) == 0


def test_operations_that_change_nothing_earn_nothing() -> None:
    for idle in (
        Operation(name="contrast_up", call="ImageEnhance.Contrast", arguments={"factor": 1.0}),
        Operation(name="resize", call="Image.resize", input_size=(4, 4), output_size=(4, 4)),
        Operation(name="a_name_of_its_own", call="x"),
    ):
        recorder = Recorder(task(box=None)).call()
        assert recorder.turns[0].result is not None
        recorder.turns[0].result = replace(recorder.turns[0].result, operations=(idle,))
        assert score(recorder.answer()).components["emerge"] == 0


def test_neutral_operations_and_unknown_names_are_no_optional_tool() -> None:
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
def test_answers_in_or_around_other_tags_are_none(raw: str) -> None:
    reward = score(Recorder(task(box=None)).answer(raw=raw))
    assert not reward.correct
    assert reward.components["format"] == 0


def test_a_call_after_the_answer_earns_nothing() -> None:
    raw = '<think>t</think><answer>42</answer><tool_call>{"name": "code_image_tool", "arguments": {}}</tool_call>'
    reward = score(Recorder(turned()).answer(raw=raw))
    assert process_of(reward) == 0
    assert reward.components["format"] == 0


@pytest.mark.parametrize("end", [s for s in EndState if not s.is_error and s is not EndState.ANSWERED])
def test_a_trajectory_without_an_answer_earns_nothing(end: EndState) -> None:
    reward = score(Recorder(turned()).call("rotate_270").answer(end=end))
    assert process_of(reward) + reward.components["accuracy"] + reward.components["format"] == 0


def test_thoughtless_turns_lose_the_format() -> None:
    recorder = Recorder(turned()).call("rotate_270")
    recorder.turns[0].text = "<tool_call>{}</tool_call>"
    assert score(recorder.answer()).components["format"] == 0
    assert score(recorder.answer(), RewardConfig(format_by="response")).components["format"] == 1


@pytest.mark.parametrize(
    "evil", ["<think>" * 20_000, "</think>" * 20_000, "<answer>" * 20_000, "<answer>1" + " " * 10**5]
)
def test_no_text_takes_long(evil: str) -> None:
    begun = time.perf_counter()
    for raw in (evil, "<think>t</think>" + evil + "<answer>42</answer>", f"<answer>{evil}</answer>"):
        score(Recorder(task(box=None)).answer(raw=raw))
    for answer in ("1," * 5000, "1 " * 5000, "A " * 5000, "(" * 9000, "of the " * 2000):
        score(Recorder(task(box=None)).answer(answer))
    assert time.perf_counter() - begun < 1.0
