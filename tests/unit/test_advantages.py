"""Advantages equal an independent computation, and are exactly 0 for equal rewards."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest

from cv_lightning.rl.advantages import (
    GRPO,
    RLOO,
    AdvantageEstimator,
    DrGRPO,
    ReduceSum,
    ReinforcePlusPlusBaseline,
    Rewards,
    estimate_advantages,
)

GROUP_METHODS: list[type[AdvantageEstimator]] = [GRPO, DrGRPO, RLOO]
METHODS: list[type[AdvantageEstimator]] = [*GROUP_METHODS, ReinforcePlusPlusBaseline]


def expected(rewards: list[float], method: type[AdvantageEstimator], epsilon: float = 1e-6) -> list[float]:
    """Advantages by the papers' formulas, one reward at a time."""
    n, out = len(rewards), []
    for i, reward in enumerate(rewards):
        if method is RLOO:
            out.append(reward - sum(r for j, r in enumerate(rewards) if j != i) / (n - 1))
        else:
            centred = reward - math.fsum(rewards) / n
            out.append(centred / (statistics.stdev(rewards) + epsilon) if method is GRPO else centred)
    return out


@pytest.mark.parametrize("method", GROUP_METHODS)
@pytest.mark.parametrize("size", [2, 3, 8, 16])
def test_group_advantages_agree(method: Any, size: int) -> None:
    rng = np.random.default_rng(size)
    for rewards in (rng.normal(size=size), rng.integers(0, 2, size) * 1.1, rng.normal(size=size) * 1e4):
        if len(set(rewards)) > 1:
            (found,) = estimate_advantages(method(), [rewards.tolist()])
            np.testing.assert_allclose(found, expected(rewards.tolist(), method), rtol=1e-11, atol=1e-12)
            assert abs(found.sum()) < 1e-8
            both = estimate_advantages(method(), [[1.0], rewards.tolist()])
            assert both[0].tolist() == [0.0] and both[1].tolist() == found.tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [2.1, 1.2, 0.7, 1.3, 0.1, -0.3, 0.0, 1e9])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 10])
def test_equal_rewards_have_exactly_zero_advantage(method: Any, value: float, size: int) -> None:
    groups = estimate_advantages(method(), [[value] * size, [0.0, 1.0]])
    assert groups[0].tolist() == [0.0] * size and groups[1].tolist() != [0.0, 0.0]


@pytest.mark.parametrize("method", METHODS)
def test_empty_groups_and_batches(method: Any) -> None:
    assert estimate_advantages(method(), []) == []
    assert [g.tolist() for g in estimate_advantages(method(), [[], [1.0]])] == [[], [0.0]]


@pytest.mark.parametrize("method", METHODS)
def test_advantages_do_not_depend_on_a_shift(method: Any) -> None:
    rewards = [0.0, 0.1, 1.1, 2.1]
    (shifted,), (plain,) = (estimate_advantages(method(), [[r + shift for r in rewards]]) for shift in (64.0, 0.0))
    np.testing.assert_allclose(shifted, plain, rtol=1e-9)


def test_reinforce_pp_divides_by_the_deviation_of_the_batch() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.normal(size=4).tolist(), [1.0] * 4, (5 * rng.normal(size=6)).tolist()]
    estimator = ReinforcePlusPlusBaseline(epsilon=1e-8)
    centred = [r - statistics.fmean(group) for group in groups for r in group]
    deviation = statistics.stdev(centred)
    found = np.concatenate(estimate_advantages(estimator, groups))
    np.testing.assert_allclose(found, [c / (deviation + 1e-8) for c in centred], rtol=1e-12, atol=1e-15)
    assert found[4:8].tolist() == [0.0] * 4
    assert found.std(ddof=1) == pytest.approx(1.0)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_agree_with_one_rank(method: Any) -> None:
    rng = np.random.default_rng(1)
    groups = [rng.normal(size=5).tolist() for _ in range(4)]
    shares = [groups[:3], groups[3:], []]  # the last rank has none
    estimator = method()
    calls: list[list[float]] = []

    def record(moments: list[float]) -> list[float]:
        calls.append(moments)
        return moments

    for share in shares:
        estimate_advantages(estimator, share, record)
    assert len(calls) == (
        3 if method is ReinforcePlusPlusBaseline else 0
    )  # once on every rank, or on none: no rank waits
    totals = [sum(column) for column in zip(*calls, strict=True)]
    found = [a for share in shares for a in estimate_advantages(estimator, share, lambda moments: totals)]
    for one, other in zip(found, estimate_advantages(estimator, groups), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


class Wrong(AdvantageEstimator):
    """A user's estimator that returns invalid advantages."""

    def __init__(self, out: list[list[float]]) -> None:
        self.out = out

    def __call__(self, groups: Any, reduce_sum: ReduceSum = list) -> list[Rewards]:
        return [np.array(values) for values in self.out]


@pytest.mark.parametrize(
    ("out", "said"), [([[0.0]], "shapes"), ([[0.0, 1.0], [0.0]], "shapes"), ([[0.0, math.nan]], "not finite")]
)
def test_invalid_advantages_are_refused_with_the_name_of_the_estimator(out: list[list[float]], said: str) -> None:
    with pytest.raises(ValueError, match=f"Wrong gave advantages.*{said}"):
        estimate_advantages(Wrong(out), [[0.0, 1.0]])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_unscored_rewards_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        estimate_advantages(GRPO(), [[0.0, bad]])


@pytest.mark.parametrize("kind", [GRPO, ReinforcePlusPlusBaseline])
def test_an_epsilon_of_zero_is_refused_with_the_key_to_change(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"model\.init_args\.algorithm\.advantage\.init_args\.epsilon"):
        kind(epsilon=0.0)
