"""Reward components of a user's own: subclass `RewardTerm`, or name a function in a `FunctionTerm`.

A term that needs one trajectory overrides `value`. One that compares the trajectories of a group, waits for something
or asks the judge overrides `values`, which runs on the event loop while other groups still roll out.
"""

from __future__ import annotations

import importlib
import math
from asyncio import gather
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cv_lightning.ranges import FiniteFloat
from cv_lightning.types import JudgeError, Task, Trajectory

if TYPE_CHECKING:
    from cv_lightning.rewards.judge.client import Judge


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredGroup:
    """The trajectories of one task that can be scored, with the scores of their answers. Read only."""

    task: Task
    trajectories: tuple[Trajectory, ...]
    scores: tuple[float, ...]
    """Answer scores in [0, 1], one for each trajectory."""
    judge: Judge | None = None
    """The judge of `reward.judge`; None where none is configured."""

    async def ask(self, prompt: str, max_tokens: int = 16) -> str:
        """The judge's reply to a prompt.

        Raises:
            JudgeError: It did not reply within the tries and the time of its config.
            ValueError: No judge is configured.
        """
        if self.judge is None:
            raise ValueError("a term of reward.terms asks the judge: give its address in reward.judge.base_url")
        return await self.judge.ask(prompt, max_tokens)

    async def ask_each(self, prompts: Sequence[str], max_tokens: int = 16) -> list[str | None]:
        """The judge's replies to several prompts, asked at once; None where it did not reply.

        Raises:
            ValueError: No judge is configured.
        """

        async def ask(prompt: str) -> str | None:
            try:
                return await self.ask(prompt, max_tokens)
            except JudgeError:
                return None

        return list(await gather(*map(ask, prompts)))


class RewardTerm:
    """One further component of the reward; a subclass overrides `value` or `values`.

    Example:
        >>> class Brevity(RewardTerm):
        ...     def value(self, trajectory, score):
        ...         return 1.0 if sum(turn.num_tokens for turn in trajectory.turns) < 200 else 0.0
    """

    def __init__(self, name: str, weight: FiniteFloat) -> None:
        """Set name and weight.

        Args:
            name: Key of the component in `RewardBreakdown.components` and in metrics (`reward/<name>`).
            weight: Factor in the total; negative for a penalty.

        Raises:
            ValueError: The name is not a word, or the weight is not finite.
        """
        if not name or not name.replace("_", "").isalnum() or not math.isfinite(weight):
            raise ValueError(f"reward.terms: name {name!r} must be letters, digits and _, weight {weight} finite")
        self.name = name
        self.weight = weight

    def __repr__(self) -> str:
        """Class and settings, the same in every process: part of an evaluation's config fingerprint."""
        settings = (f"{name}={_named(value)}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__module__}.{type(self).__qualname__}({', '.join(settings)})"

    def value(self, trajectory: Trajectory, score: float) -> float:
        """Unweighted value of the component for one trajectory.

        Args:
            trajectory: Finished and scoreable. Read only.
            score: Answer score in [0, 1].
        """
        raise NotImplementedError(f"reward.terms: {type(self).__qualname__} defines neither value nor values")

    async def values(self, group: AnsweredGroup) -> Sequence[float | None]:
        """Unweighted values of the component for all trajectories of a group, in their order.

        Returns:
            None for a trajectory about which the judge did not reply: it stays unscored, as if the judge had failed on
            its answer. A `JudgeError` means None for all.
        """
        pairs = zip(group.trajectories, group.scores, strict=True)
        return [float(self.value(trajectory, score)) for trajectory, score in pairs]

    @property
    def looks_at_group(self) -> bool:
        """True for a term that overrides `values`."""
        return type(self).values is not RewardTerm.values


def _named(value: object) -> str:
    """Name of a function; `repr` of another value, or its class where `repr` would give an address."""
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return type(value).__qualname__ if type(value).__repr__ is object.__repr__ else repr(value)


class FunctionTerm(RewardTerm):
    """A component that a function `(trajectory, score) -> float` computes."""

    def __init__(self, name: str, weight: float, function: str) -> None:
        """Import the function.

        Args:
            name: Key of the component.
            weight: Factor in the total.
            function: Its import path: `package.module.function`.

        Raises:
            ValueError: There is no such function.
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


class PrintedText(RewardTerm):
    """1 where a call of a right answer gave the policy a text to read, by printing it; else 0.

    Text is not an image operation: no other component counts it.
    """

    def __init__(self, name: str, weight: float, if_right: bool = True) -> None:
        """Choose what counts.

        Args:
            name: Key of the component.
            weight: Factor in the total.
            if_right: Count right answers only.
        """
        super().__init__(name, weight)
        self.if_right = if_right

    def value(self, trajectory: Trajectory, score: float) -> float:
        """1 or 0."""
        printed = any(turn.result is not None and bool(turn.result.text) for turn in trajectory.turns)
        return float(printed and (score > 0.5 or not self.if_right))
