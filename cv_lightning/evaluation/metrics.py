"""Main figures of a set of trajectories: accuracy and tool use."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from cv_lightning.evaluation.outcome import Outcome, grouped, outcomes
from cv_lightning.evaluation.statistics import Difference, Rate, rate
from cv_lightning.types import Group


class Figures:
    """Base of dataclasses that hold figures."""

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """JSON values; a rate is {value, low, high, n}, NaN is null."""
        return {field.name: _json(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]


def _json(value: Any) -> Any:
    match value:
        case Figures():
            return value.to_json()
        case Rate() | Difference():
            return _json(value._asdict())
        case dict():
            return {key: _json(item) for key, item in value.items()}
    return None if value != value else value  # NaN is not equal to itself


@dataclass(frozen=True, slots=True, kw_only=True)
class KindSummary(Figures):
    """The figures of one kind of task."""

    n: int
    """Trajectories without infrastructure errors."""
    accuracy: Rate
    tool_use_success: Rate
    spurious: Rate
    """Unnecessary orientation operations, as in `EvalSummary`."""
    turns: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSummary(Figures):
    """The main figures of one evaluation; rates are NaN with n = 0 where no trajectory counts."""

    num_tasks: int
    num_trajectories: int
    num_errors: int
    """Trajectories with an infrastructure error: in no rate below."""
    num_unscored: int
    """Trajectories without a verdict: not in accuracy."""
    accuracy: Rate
    """Over tasks that need the tool."""
    tool_use_success: Rate
    """Over tasks that need the tool."""
    spurious: Rate
    """Fraction of trajectories of upright tasks in which an orientation operation ran."""
    accuracy_upright: Rate
    """Over tasks that need no tool, shown upright."""
    accuracy_all: Rate
    by_kind: dict[str, KindSummary]
    tool_success: Rate
    """Fraction of tool calls that returned an image."""
    tool_calls_mean: float
    turns_mean: float
    sampled_tokens_mean: float
    """Sampled tokens per trajectory."""
    end_states: dict[str, float]
    """Fraction of trajectories by end state."""

    def scalars(self) -> dict[str, float]:
        """The figures as flat numbers for a logger; NaN where nothing counts, so the keys are always the same."""
        rates = ("accuracy", "tool_use_success", "spurious", "accuracy_upright", "accuracy_all", "tool_success")
        means = ("tool_calls_mean", "turns_mean", "sampled_tokens_mean")
        return {name: getattr(self, name).value for name in rates} | {name: getattr(self, name) for name in means}


def summarise(groups: Iterable[Group]) -> EvalSummary:
    """Compute the main figures of scored groups."""
    return summarise_outcomes(outcomes(groups))


def summarise_outcomes(everything: Sequence[Outcome]) -> EvalSummary:
    """Compute the main figures from the outcomes of all ranks."""
    valid = [outcome for outcome in everything if outcome.counts]
    needing = [outcome for outcome in valid if outcome.needs_tool]
    upright = [outcome for outcome in valid if outcome.is_upright]
    kinds = grouped([outcome for outcome in valid if outcome.kind], lambda o: o.kind)
    states = Counter(outcome.end_state.value for outcome in everything)
    return EvalSummary(
        num_tasks=len({outcome.task_id for outcome in everything}),
        num_trajectories=len(everything),
        num_errors=len(everything) - len(valid),
        num_unscored=sum(outcome.correct is None for outcome in valid),
        accuracy=rate_of(needing, lambda o: o.correct),
        tool_use_success=rate_of(needing, lambda o: o.tool_use_success),
        spurious=rate_of(upright, lambda o: o.spurious),
        accuracy_upright=rate_of(upright, lambda o: o.correct),
        accuracy_all=rate_of(valid, lambda o: o.correct),
        by_kind={kind: _kind_summary(found) for kind, found in kinds.items()},
        tool_success=rate_of_events(valid, lambda o: o.num_calls_ok, lambda o: o.num_calls),
        tool_calls_mean=mean_of(o.num_calls for o in valid),
        turns_mean=mean_of(o.num_turns for o in valid),
        sampled_tokens_mean=mean_of(o.num_sampled_tokens for o in valid),
        end_states={state: count / len(everything) for state, count in states.most_common()},
    )


def _kind_summary(found: list[Outcome]) -> KindSummary:
    return KindSummary(
        n=len(found),
        accuracy=rate_of(found, lambda o: o.correct),
        tool_use_success=rate_of([outcome for outcome in found if outcome.needs_tool], lambda o: o.tool_use_success),
        spurious=rate_of([outcome for outcome in found if outcome.is_upright], lambda o: o.spurious),
        turns=mean_of(o.num_turns for o in found),
    )


def rate_of(found: Iterable[Outcome], value: Callable[[Outcome], float | None]) -> Rate:
    """Mean of a value over trajectories, except those with None. All questions about an image are one cluster."""
    pairs = [(float(hit), outcome.variant.cluster) for outcome in found if (hit := value(outcome)) is not None]
    return rate([hit for hit, _ in pairs], [task for _, task in pairs])


def rate_of_events(found: Iterable[Outcome], hits: Callable[[Outcome], int], total: Callable[[Outcome], int]) -> Rate:
    """Fraction of events, of which a trajectory may have several or none, that are hits."""
    events = [(float(at < hits(o)), o.variant.cluster) for o in found for at in range(total(o))]
    return rate([hit for hit, _ in events], [cluster for _, cluster in events])


def mean_of(values: Iterable[float]) -> float:
    """Mean; NaN of no values."""
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else math.nan
