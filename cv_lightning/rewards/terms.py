"""Reward components of a user's own: subclass `RewardTerm`, or name a function in a `FunctionTerm`."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable

from cv_lightning.types import Trajectory


class RewardTerm(ABC):
    """One further component of the reward.

    Example:
        >>> class Brevity(RewardTerm):
        ...     def value(self, trajectory, score):
        ...         return 1.0 if sum(turn.num_tokens for turn in trajectory.turns) < 200 else 0.0
    """

    def __init__(self, name: str, weight: float) -> None:
        """Name it.

        Args:
            name: key of the component in `RewardBreakdown.components` and in metrics (`reward/<name>`).
            weight: factor in the total; negative for a penalty.

        Raises:
            ValueError: a name that is no word, or a weight that is not finite.
        """
        if not name or not name.replace("_", "").isalnum() or not math.isfinite(weight):
            raise ValueError(f"reward.terms: name {name!r} must be letters, digits and _, weight {weight} finite")
        self.name = name
        self.weight = weight

    def __repr__(self) -> str:
        """Class and settings, the same in every process: what an evaluation notes, and compares when it goes on."""
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        settings = (f"{name}={_named(value)}" for name, value in sorted(vars(self).items()))
        return f"{kind}({', '.join(settings)})"

    @abstractmethod
    def value(self, trajectory: Trajectory, score: float) -> float:
        """Unweighted value of the component.

        Args:
            trajectory: finished and scoreable; read it, change nothing.
            score: answer score in [0, 1].
        """


def _named(value: object) -> str:
    """A function by its name; anything else as Python writes it, which for what has no such form is its class."""
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return type(value).__qualname__ if type(value).__repr__ is object.__repr__ else repr(value)


class FunctionTerm(RewardTerm):
    """A component that a function `(trajectory, score) -> float` computes."""

    def __init__(self, name: str, weight: float, function: str) -> None:
        """Import the function.

        Args:
            name: key of the component.
            weight: factor in the total.
            function: where the function is: `package.module.function`.

        Raises:
            ValueError: there is no such function.
        """
        super().__init__(name, weight)
        module, _, attribute = function.rpartition(".")
        try:
            self.function: Callable[[Trajectory, float], float] = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"reward.terms: {function!r} of term {name!r} cannot be imported: {error}") from error

    def value(self, trajectory: Trajectory, score: float) -> float:
        """What the function returns."""
        return float(self.function(trajectory, score))
