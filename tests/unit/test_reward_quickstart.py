"""The quickstart's reward on its own tasks: full for solutions, less for guesses and unnecessary rotations."""

from __future__ import annotations

from pathlib import Path

import jsonargparse
import pytest
from reward_samples import Recorder, group

from cv_lightning.digits.scenes import KINDS, DigitsConfig, digit_task, is_small, is_turned
from cv_lightning.rewards import RewardConfig, RewardModule
from cv_lightning.types import Box, Task, Trajectory

FOLDER = Path(__file__).parents[2] / "configs" / "quickstart"
UNDO = {"rotate_90": "rotate_270", "rotate_270": "rotate_90"}


def load(name: str) -> RewardConfig:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--reward", type=RewardConfig)
    return parser.instantiate(parser.parse_args([f"--reward={FOLDER / name}.yaml"])).reward


def solve(subject: Task, crop: Box | None = None) -> Recorder:
    """Turn it upright and crop the card's cell, where wanted."""
    recorder = Recorder(subject)
    applied = subject.metadata["applied"]
    if applied:
        recorder.call(UNDO.get(applied, applied))
    if subject.metadata["cell"]:
        recorder.call(crop or tuple(map(float, subject.metadata["cell"])))
    return recorder


def total(trajectory: Trajectory, name: str = "reward") -> float:
    RewardModule(load(name)).score_group(group(trajectory))
    assert trajectory.reward is not None
    return trajectory.reward.total


@pytest.mark.parametrize("card_share", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_solution_gets_the_full_reward(kind: str, card_share: float) -> None:
    for index in range(20):
        subject = digit_task(DigitsConfig(card_share=card_share), "train", index, kind)  # type: ignore[arg-type]
        honest = solve(subject).answer(subject.ground_truth)
        assert total(honest) == pytest.approx(1.1 if kind == "upright" else 2.2)
        assert total(honest, "reward_accuracy") == pytest.approx(1.1)


@pytest.mark.parametrize("kind", KINDS)
def test_answering_without_the_tool_earns_the_outcome_only(kind: str) -> None:
    subject = digit_task(DigitsConfig(), "train", 3, kind)  # type: ignore[arg-type]
    direct = Recorder(subject).answer(subject.ground_truth)
    assert total(direct) == pytest.approx(0.1 if is_small(kind) else 1.1)  # a small number was guessed
    assert total(direct, "reward_accuracy") == pytest.approx(1.1)


def test_a_small_rotated_number_without_its_crop_keeps_accuracy() -> None:
    """The gate looks at `mandatory`, of which the turn alone is half; the file's comment gives the same figures."""
    subject = digit_task(DigitsConfig(), "train", 3, "turned_and_small")
    applied = str(subject.metadata["applied"])
    turned = Recorder(subject).call(UNDO.get(applied, applied)).answer(subject.ground_truth)
    assert total(turned) == pytest.approx(1.6)
    assert total(solve(subject).answer(subject.ground_truth)) == pytest.approx(2.2)
    assert "1.6 in all against 2.2" in (FOLDER / "reward.yaml").read_text()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not is_turned(kind)])
def test_unnecessary_rotations_cost(kind: str) -> None:
    subject = digit_task(DigitsConfig(), "train", 5, kind)  # type: ignore[arg-type]
    needless = Recorder(subject).call("rotate_90").call("rotate_270")
    if subject.metadata["cell"]:
        needless.call(tuple(map(float, subject.metadata["cell"])))
    trajectory = needless.answer(subject.ground_truth)
    best = total(solve(subject).answer(subject.ground_truth))
    assert total(trajectory) <= best - 1.0  # two turns at 0.5
    assert total(trajectory, "reward_accuracy") == pytest.approx(1.1)


def test_a_loose_or_misplaced_crop_earns_less() -> None:
    subject = digit_task(DigitsConfig(), "train", 8, "small")
    x1, y1, x2, y2 = subject.metadata["cell"]
    loose = solve(subject, (max(0.0, x1 - 64.0), float(y1), float(x2) + 64.0 * (x1 < 64), float(y2))).answer("0")
    beside = solve(subject, (float(x1), float(y2), float(x2), float(y2) + 64.0)).answer("0")
    total(loose)
    total(beside)
    assert loose.reward is not None and beside.reward is not None
    assert 0 < loose.reward.components["mandatory"] <= 0.5
    assert beside.reward.components["mandatory"] < 0.1
