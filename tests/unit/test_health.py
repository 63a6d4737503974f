"""What keeps RL healthy: masks, dynamic sampling with exact resume, curriculum, metrics of unequal ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cv_lightning.data.modules import StepLoader
from cv_lightning.digits.modules import CurriculumPoint, DigitTaskDataModule, curriculum_shares
from cv_lightning.rl.advantages import GRPO
from cv_lightning.rl.algorithm import AlgorithmConfig, DynamicSamplingConfig
from cv_lightning.rl.groups import MaskConfig, assign_advantages, has_reward_variance
from cv_lightning.rollout.collector import merge_metrics, rollout_metrics
from cv_lightning.rollout.dynamic_sampling import TaskQueue, sample_groups
from cv_lightning.types import EndState, Group, Iteration, RewardBreakdown, Task, Trajectory

PICTURE = Image.new("RGB", (32, 32))


def task(name: str) -> Task:
    return Task(id=name, question="?", images=(PICTURE,), ground_truth="1")


def trajectory(of: Task, sample: int, reward: float | None, state: EndState = EndState.ANSWERED) -> Trajectory:
    made = Trajectory(
        task=of, sample=sample, token_ids=[1, 2], loss_mask=[False, True], logprobs=[0.0, -1.0], num_prompt_tokens=1
    )
    made.end_state = state
    made.reward = None if reward is None else RewardBreakdown(components={}, total=reward)
    return made


# ------------------------------------------------------------------ masks
@pytest.mark.parametrize(
    ("switch", "states"),
    [
        ("over_length", {EndState.OVER_LENGTH}),
        ("over_turns", {EndState.MAX_TURNS, EndState.MAX_IMAGES}),
        ("broken", {EndState.NO_ANSWER, EndState.PARSE_ERRORS}),
    ],
)
def test_masked_trajectories_count_in_the_statistics_and_have_no_loss(switch: str, states: set[EndState]) -> None:
    of, judged = task("a"), [state for state in EndState if not state.is_error]
    members = [trajectory(of, i, float(i % 2), state) for i, state in enumerate(judged)]
    plain, masked = Group(task=of, trajectories=members), MaskConfig(**{switch: True})
    assign_advantages([plain], GRPO())
    everybody = {t.end_state: t.advantage for t in members}
    assert None not in everybody.values(), "off by default"
    assign_advantages([plain], GRPO(), masked)
    for t in members:
        assert t.advantage == (None if t.end_state in states else everybody[t.end_state])
    assert rollout_metrics([plain], 1.0)["rollout/masked_frac"] == pytest.approx(len(states) / len(members))


def test_a_group_has_reward_variance_if_rewards_differ_and_one_is_not_masked() -> None:
    of, mask = task("a"), MaskConfig(over_length=True)
    cut = EndState.OVER_LENGTH
    cases = [
        ([(0.0, EndState.ANSWERED), (1.0, EndState.ANSWERED)], True),
        ([(1.0, EndState.ANSWERED), (1.0, EndState.ANSWERED)], False),
        ([(0.0, cut), (1.0, EndState.ANSWERED)], True),
        ([(0.0, cut), (1.0, cut)], False),
        ([(None, EndState.TRUNCATED), (1.0, EndState.ANSWERED)], False),
        ([], False),
    ]
    for members, teaches in cases:
        group = Group(task=of, trajectories=[trajectory(of, i, r, s) for i, (r, s) in enumerate(members)])
        assert has_reward_variance(group, mask) is teaches


# ------------------------------------------------------------------ dynamic sampling
def roll_out(tasks: Sequence[Task]) -> list[Group]:
    """Groups whose rewards differ if the task's name has a +."""
    return [
        Group(task=t, trajectories=[trajectory(t, i, float(i if "+" in t.id else 1)) for i in range(3)]) for t in tasks
    ]


def differ(group: Group) -> bool:
    return has_reward_variance(group, MaskConfig())


def batch(index: int, names: str, num_groups: int = 2) -> Iteration:
    """`a+b` is the teaching task a and the dull task b."""
    found = [name + "+" * (names[at + 1 : at + 2] == "+") for at, name in enumerate(names) if name != "+"]
    return Iteration(index, [task(name) for name in found], num_groups)


def rounds_of(queue: TaskQueue, given_batch: Iteration, trainer: Any = None) -> tuple[list[str], int]:
    queue.add(given_batch, trainer)
    assert given_batch.num_groups is not None
    groups, rounds = sample_groups(queue, given_batch.num_groups, roll_out, differ, lambda value: value)
    return [group.task.id for group in groups], rounds


def test_dynamic_sampling_takes_tasks_in_order_and_keeps_the_rest() -> None:
    queue = TaskQueue()
    assert rounds_of(queue, batch(0, "ab+cd+ef+")) == (["a", "b+", "c", "d+"], 3)
    assert queue.close_iteration(6) == 0
    assert rounds_of(queue, batch(1, "g+h+")) == (["e", "f+", "g+"], 2)
    assert queue.close_iteration(6) == 0
    assert rounds_of(queue, batch(2, "xyz")) == (["h+", "x", "y", "z"], 3), "bounded: it continues without"
    assert queue.close_iteration(6) == 0 and not queue.state_dict()


def test_the_task_queue_is_bounded() -> None:
    queue = TaskQueue()
    rounds_of(queue, batch(0, "a+b+c+d+e+f+"))
    assert queue.close_iteration(3) == 1
    assert [t.id for t in queue.take(9)] == ["c+", "d+", "e+"]


def test_waiting_tasks_are_restored_on_every_rank() -> None:
    names = ["ab+cd+ef+", "g+h+ij"]
    loader: StepLoader[Iteration] = StepLoader(lambda step: batch(step, names[step]), 2)
    trainer = SimpleNamespace(train_dataloader=loader, world_size=1, global_rank=0)
    queue = TaskQueue()
    rounds_of(queue, loader.build(0))
    queue.close_iteration(6)
    resumed = TaskQueue()
    resumed.load_state_dict(queue.state_dict())
    assert rounds_of(resumed, loader.build(1), trainer) == rounds_of(queue, loader.build(1))
    other = TaskQueue()
    other.load_state_dict(queue.state_dict() or {"places": [[(0, 4)]]})
    other.add(loader.build(1), SimpleNamespace(train_dataloader=loader, world_size=2, global_rank=0))
    assert [t.id for t in other.take(9)] == ["g+", "h+", "i", "j"], "another number of ranks starts afresh"


def test_a_rank_without_tasks_takes_part_in_every_round() -> None:
    asked: list[float] = []
    counts = iter([3, 1, 0])

    def others_have(value: float) -> float:
        asked.append(value)
        return max(value, next(counts))

    groups, rounds = sample_groups(TaskQueue(), 2, roll_out, differ, others_have)
    assert not groups and rounds == 2 and asked == [0, 0, 0]


def test_dynamic_sampling_is_off_by_default() -> None:
    data = DigitTaskDataModule(tasks_per_iteration=4, num_iterations=2)
    plain = data.train_dataloader().build(1)
    module = SimpleNamespace(algorithm=AlgorithmConfig(dynamic_sampling=DynamicSamplingConfig(max_oversample=1.6)))
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, lightning_module=module)  # type: ignore[assignment]
    more = data.train_dataloader().build(1)
    assert plain.num_groups is None and len(plain.tasks) == 4
    assert more.num_groups == 4 and len(more.tasks) == 7
    data.overfit_tasks = 2
    assert data.train_dataloader().build(1).num_groups == 2


# ------------------------------------------------------------------ curriculum
def test_the_mix_of_kinds_changes_over_the_run() -> None:
    points = [
        CurriculumPoint(at=0.5, kind_shares={"small": 1.0, "upright": 3.0}),
        CurriculumPoint(at=0.0, kind_shares={"upright": 2.0}),
    ]
    data = DigitTaskDataModule(tasks_per_iteration=32, num_iterations=4, curriculum=points)
    kinds = [[t.metadata["kind"] for t in data.train_dataloader().build(step).tasks] for step in range(4)]
    assert [k.count("small") for k in kinds] == [0, 4, 8, 8]
    assert all(set(k) <= {"small", "upright"} for k in kinds)
    assert data.train_dataloader().build(1).tasks[0].id == data.train_dataloader().build(1).tasks[0].id
    with pytest.raises(ValueError, match="train_files"):
        DigitTaskDataModule(curriculum=points, train_files=["x.parquet"])
    with pytest.raises(ValueError, match="curriculum"):
        CurriculumPoint(at=0.5, kind_shares={"sideways": 1.0})


@given(st.floats(0, 1), st.lists(st.floats(0, 1), min_size=1, max_size=4, unique=True))
def test_kind_fractions_sum_to_one(progress: float, places: list[float]) -> None:
    points = [
        CurriculumPoint(at=at, kind_shares={"upright": 1 + i, "small": 2.0}) for i, at in enumerate(sorted(places))
    ]
    shares = curriculum_shares(points, progress)
    assert sum(shares.values()) == pytest.approx(1.0) and min(shares.values()) >= 0


# ------------------------------------------------------------------ metrics
def test_metrics_of_ranks_with_different_names_are_merged() -> None:
    of = task("a")
    first = [Group(task=of, trajectories=[trajectory(of, 0, 1.0), trajectory(of, 1, 0.0, EndState.MAX_TURNS)])]
    second = [Group(task=of, trajectories=[trajectory(of, 0, 1.0), trajectory(of, 1, 0.0)])]
    one, two, none = (rollout_metrics(groups, 2.0) for groups in (first, second, []))
    merged = merge_metrics([one, two, none])
    assert merged["rollout/trajectories"] == 4
    assert merged["rollout/end_max_turns_frac"] == 0.25 and merged["rollout/end_answered_frac"] == 0.75
    assert merged["rollout/end_error_judge_frac"] == 0.0, "every end state has its number in every iteration"
    assert merged["rollout/length_max"] == 2 and merged["rollout/tokens_per_s"] == 2.0
    assert merge_metrics([one]) == one
    many = {
        "rollout/trajectories": 24.0,
        "rollout/end_error_judge_frac": 0.0,
        "judge/verdicts": 3.0,
        "judge/latency_max_s": 3.0,
    }
    few = {
        "rollout/trajectories": 2.0,
        "rollout/end_error_judge_frac": 1.0,
        "judge/verdicts": 4.0,
        "judge/latency_max_s": 40.0,
    }
    found = merge_metrics([many, few])
    assert found["rollout/end_error_judge_frac"] == pytest.approx(2 / 26), (
        "a rank weighs as much as it has trajectories"
    )
    assert (found["judge/verdicts"], found["judge/latency_max_s"]) == (7, 40)
    found = merge_metrics([{"rollout/trajectories": n, "rollout/groups_found_frac": n / 8} for n in (8.0, 0.0)])
    assert found["rollout/groups_found_frac"] == 0.5, "a rank without trajectories has found none of its groups"
    dropped = merge_metrics([{"rollout/trajectories": 0.0, "rollout/tasks_dropped": n} for n in (2.0, 5.0)])
    assert dropped["rollout/tasks_dropped"] == 7, "also where nothing else is left"
    shares = merge_metrics(
        [{"rollout/spurious": 0.25, "rollout/tool_use_success": math.nan}, {"rollout/spurious": math.nan}]
    )
    assert shares["rollout/spurious"] == 0.25, "a rank without upright tasks has no share of them"
    assert math.isnan(shares["rollout/tool_use_success"])
    assert all(name.startswith("rollout/") for name in merged)
