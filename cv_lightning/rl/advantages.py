"""Advantages of a group of rewards. Pure functions, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """How the rewards of a group become advantages."""

    method: Literal["grpo", "grpo_no_std", "rloo"] = "grpo"
    """`grpo`: centred and divided by the sample deviation (DeepSeekMath); `grpo_no_std`: centred only (Dr.GRPO);
    `rloo`: reward minus the mean of the others (Ahmadian et al. 2024)."""
    epsilon: float = 1e-6
    """Added to the deviation."""

    def __post_init__(self) -> None:
        if self.epsilon <= 0:
            raise ValueError(f"advantage.epsilon must be above 0, not {self.epsilon}")


def group_advantages(rewards: Sequence[float], config: AdvantageConfig) -> NDArray[np.float64]:
    """One advantage per reward.

    A group of equal rewards has advantages of exactly 0, whatever the mean rounds to (the reference gives -0.19 for
    eight rewards of 2.1 in float32; reference.md item 29), and so has a group of one.

    Args:
        rewards: of the scored trajectories of one group.
        config: method and epsilon.

    Returns:
        float64 [len(rewards)].
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.size < 2 or values.max() == values.min():
        return np.zeros_like(values)
    centred = values - values.mean()
    if config.method == "grpo":
        return centred / (values.std(ddof=1) + config.epsilon)
    if config.method == "rloo":
        return centred * (values.size / (values.size - 1))
    return centred
