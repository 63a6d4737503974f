"""Advantages of groups of rewards. Pure functions, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

AdvantageMethod = Literal["grpo", "grpo_no_std", "rloo", "reinforce_pp_baseline"]


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """How the rewards of a group become advantages."""

    method: AdvantageMethod = "grpo"
    """`grpo`: reward minus the group's mean, over its sample deviation (DeepSeekMath, 2402.03300; the recipe).
    `grpo_no_std`: the difference alone, as in Dr.GRPO (2503.20783); with dense rewards the division magnifies noise.
    `rloo`: reward minus the mean of the others (2402.14740). `reinforce_pp_baseline`: the difference over the deviation
    of the whole batch (REINFORCE++ with a baseline, 2501.03262)."""
    epsilon: float = 1e-6
    """Added to the deviation, of the group or the batch."""

    def __post_init__(self) -> None:
        if self.method not in (known := get_args(AdvantageMethod)):
            raise ValueError(f"advantage.method is one of {', '.join(known)}, not {self.method!r}")
        if not self.epsilon > 0:
            raise ValueError(f"advantage.epsilon must be above 0, not {self.epsilon}")

    @property
    def needs_batch(self) -> bool:
        """True if an advantage depends on other groups: `batch_advantages` is the whole method."""
        return self.method == "reinforce_pp_baseline"


def group_advantages(rewards: Sequence[float], config: AdvantageConfig) -> NDArray[np.float64]:
    """One advantage per reward of one group.

    A group of equal rewards has advantages of exactly 0, whatever the mean rounds to (the reference gives -0.19 for
    eight rewards of 2.1 in float32; reference.md item 29), and so has a group of one.

    Args:
        rewards: of the scored trajectories of one group; may be empty.
        config: method and epsilon.

    Returns:
        float64 [len(rewards)].

    Raises:
        ValueError: a reward is NaN or infinite (an unscored trajectory is to be left out, not scored NaN), or the
            method needs the other groups too.
    """
    if config.needs_batch:
        raise ValueError(f"advantage.method {config.method} needs all groups of an iteration: batch_advantages")
    return _scaled(_centred(rewards), config)


def _centred(rewards: Sequence[float]) -> NDArray[np.float64]:
    """Rewards less their mean; exactly 0 where all are equal."""
    values = np.asarray(rewards, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"rewards must be finite; leave unscored trajectories out of their group: {values.tolist()}")
    if values.size < 2 or values.max() == values.min():
        return np.zeros_like(values)
    return np.asarray(values - values.mean(), dtype=np.float64)


def _scaled(centred: NDArray[np.float64], config: AdvantageConfig) -> NDArray[np.float64]:
    """What the method makes of the centred rewards of one group."""
    if config.method == "rloo" and centred.size > 1:
        return centred * (centred.size / (centred.size - 1))
    if config.method == "grpo" and centred.any():
        return centred / (float(centred.std(ddof=1)) + config.epsilon)
    return centred


def batch_advantages(
    rewards: Sequence[Sequence[float]],
    config: AdvantageConfig,
    reduce_sum: Callable[[list[float]], Sequence[float]] | None = None,
) -> list[NDArray[np.float64]]:
    """Advantages of all groups of an iteration, for every method.

    Where the method needs the whole batch, its deviation is taken over every reward of every rank. As each group is
    centred, so is the batch: no mean is subtracted, and groups of equal rewards stay at exactly 0.

    Args:
        rewards: of this rank's groups; may be empty, as may a group.
        config: method and epsilon.
        reduce_sum: sums a list of floats over ranks; called exactly once, on every rank, where the method needs the
            batch, and never otherwise. None: one rank.

    Returns:
        One float64 array per group.
    """
    groups = [_centred(group) for group in rewards]
    if not config.needs_batch:
        return [_scaled(group, config) for group in groups]
    moments = [float(sum(g.size for g in groups)), float(sum((g**2).sum() for g in groups))]
    count, squares = reduce_sum(moments) if reduce_sum is not None else moments
    deviation = (squares / max(count - 1, 1)) ** 0.5
    return [group / (deviation + config.epsilon) for group in groups]
