"""Advantages against independent numerics, and their exact zeros."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest

from cv_lightning.rl.advantages import AdvantageConfig, batch_advantages, group_advantages

GROUP_METHODS = ["grpo", "grpo_no_std", "rloo"]
METHODS = [*GROUP_METHODS, "reinforce_pp_baseline"]


def expected(rewards: list[float], method: str, epsilon: float = 1e-6) -> list[float]:
    """From the papers' formulas, one reward at a time."""
    n, out = len(rewards), []
    for i, reward in enumerate(rewards):
        if method == "rloo":
            out.append(reward - sum(r for j, r in enumerate(rewards) if j != i) / (n - 1))
        else:
            centred = reward - math.fsum(rewards) / n
            out.append(centred / (statistics.stdev(rewards) + epsilon) if method == "grpo" else centred)
    return out


@pytest.mark.parametrize("method", GROUP_METHODS)
@pytest.mark.parametrize("size", [2, 3, 8, 16])
def test_group_advantages_agree(method: Any, size: int) -> None:
    rng = np.random.default_rng(size)
    for rewards in (rng.normal(size=size), rng.integers(0, 2, size) * 1.1, rng.normal(size=size) * 1e4):
        if len(set(rewards)) > 1:
            found = group_advantages(rewards.tolist(), AdvantageConfig(method=method))
            np.testing.assert_allclose(found, expected(rewards.tolist(), method), rtol=1e-11, atol=1e-12)
            assert abs(found.sum()) < 1e-8
            both = batch_advantages([[1.0], rewards.tolist()], AdvantageConfig(method=method))
            assert both[0].tolist() == [0.0] and both[1].tolist() == found.tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [2.1, 1.2, 0.7, 1.3, 0.1, -0.3, 0.0, 1e9])
@pytest.mark.parametrize("size", [1, 2, 7, 8, 10])
def test_equal_rewards_have_exactly_zero_advantage(method: Any, value: float, size: int) -> None:
    config = AdvantageConfig(method=method)
    groups = batch_advantages([[value] * size, [0.0, 1.0]], config)
    assert groups[0].tolist() == [0.0] * size and groups[1].tolist() != [0.0, 0.0]


@pytest.mark.parametrize("method", METHODS)
def test_empty_groups_and_batches(method: Any) -> None:
    config = AdvantageConfig(method=method)
    assert batch_advantages([], config) == []
    assert [g.tolist() for g in batch_advantages([[], [1.0]], config)] == [[], [0.0]]


@pytest.mark.parametrize("method", METHODS)
def test_advantages_do_not_depend_on_a_shift(method: Any) -> None:
    rewards = [0.0, 0.1, 1.1, 2.1]
    config = AdvantageConfig(method=method)
    (shifted,), (plain,) = (batch_advantages([[r + shift for r in rewards]], config) for shift in (64.0, 0.0))
    np.testing.assert_allclose(shifted, plain, rtol=1e-9)


def test_reinforce_pp_divides_by_the_deviation_of_the_batch() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.normal(size=4).tolist(), [1.0] * 4, (5 * rng.normal(size=6)).tolist()]
    config = AdvantageConfig(method="reinforce_pp_baseline", epsilon=1e-8)
    centred = [r - statistics.fmean(group) for group in groups for r in group]
    deviation = statistics.stdev(centred)
    found = np.concatenate(batch_advantages(groups, config))
    np.testing.assert_allclose(found, [c / (deviation + 1e-8) for c in centred], rtol=1e-12, atol=1e-15)
    assert found[4:8].tolist() == [0.0] * 4
    assert found.std(ddof=1) == pytest.approx(1.0)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_agree_with_one_rank(method: Any) -> None:
    rng = np.random.default_rng(1)
    groups = [rng.normal(size=5).tolist() for _ in range(4)]
    shares = [groups[:3], groups[3:], []]  # the last rank has none
    config = AdvantageConfig(method=method)
    calls: list[list[float]] = []

    def record(moments: list[float]) -> list[float]:
        calls.append(moments)
        return moments

    for share in shares:
        batch_advantages(share, config, record)
    assert len(calls) == (3 if config.needs_batch else 0)  # once on every rank, or on none: no rank waits
    totals = [sum(column) for column in zip(*calls, strict=True)]
    found = [a for share in shares for a in batch_advantages(share, config, lambda moments: totals)]
    for one, other in zip(found, batch_advantages(groups, config), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_no_half_of_a_method() -> None:
    with pytest.raises(ValueError, match="reinforce_pp_baseline"):
        group_advantages([0.0, 1.0], AdvantageConfig(method="reinforce_pp_baseline"))


@pytest.mark.parametrize("size", [0, 1, 8])
def test_a_group_alone_of_equal_rewards(size: int) -> None:
    assert group_advantages([2.1] * size, AdvantageConfig()).tolist() == [0.0] * size


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_unscored_rewards_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        group_advantages([0.0, bad], AdvantageConfig())


@pytest.mark.parametrize(("options", "flag"), [({"method": "gae"}, "method"), ({"epsilon": 0.0}, "epsilon")])
def test_refused_with_the_flag_to_change(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=f"advantage.{flag}"):
        AdvantageConfig(**options)
