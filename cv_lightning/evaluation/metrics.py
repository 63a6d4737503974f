"""What a set of trajectories shows: accuracy, and whether the tool was used as the task needs it.

Pure functions of records; live groups are adapted by `to_record`. Definitions are those of the project's
acceptance table: *must-use* holds when the answer was given on an upright image and, where a crop is needed,
after the model saw a crop that shows the ground-truth box and little else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from cv_lightning.evaluation.statistics import Rate, rate
from cv_lightning.images import area, compose, dihedral_affine, intersection, is_upright
from cv_lightning.trajectory import GroupRecord, TaskRecord, TrajectoryRecord, to_record
from cv_lightning.types import IDENTITY, Affine, EndState, Group, ToolStatus

DIHEDRAL = ("rotate_90", "rotate_180", "rotate_270", "flip_horizontal", "flip_vertical")
QUARTER_TURNS = ("rotate_90", "rotate_270")
MIN_COVERED = 0.9
"""Least share of the ground-truth box that a crop must show."""
MAX_AREA_RATIO = 6.0
"""Largest area of a crop, in areas of the ground-truth box."""


# ------------------------------------------------------------------------------------------------ one trajectory
def to_upright(task: TaskRecord) -> Affine:
    """Map from pixels of the image as given to pixels of the upright picture it was made from.

    Transforms that are no right-angle turn or flip (`crop`, corruptions) are left out.
    """
    names = [name for name in task.required_transforms if name in DIHEDRAL]
    size = task.images[0].size
    if sum(name in QUARTER_TURNS for name in names) % 2:
        size = (size[1], size[0])
    total = IDENTITY
    for name in names:  # in the order of application, from the upright picture on
        total = compose(total, dihedral_affine(name, *size))
        size = (size[1], size[0]) if name in QUARTER_TURNS else size
    return total


def answered_upright(task: TaskRecord, trajectory: TrajectoryRecord) -> bool:
    """True if the last image that the model saw is upright: turned and mirrored by nothing, on balance."""
    if not trajectory.images:
        return False
    last = trajectory.images[-1]
    # only the first image is the one the task's transforms were applied to
    return is_upright(last.to_source, to_upright(task) if last.source == 0 else None)


def crop_fits(task: TaskRecord, trajectory: TrajectoryRecord) -> bool:
    """True if some crop that the model saw shows the ground-truth box and little else, in source pixels.

    At least `MIN_COVERED` of the box, at most `MAX_AREA_RATIO` times its area, and less than the whole image.
    A crop turned by no right angle is taken for its bounding box.
    """
    if task.box is None:
        return False
    width, height = task.images[0].size
    for image in trajectory.images:
        frame = image.source_box
        if image.parent is None or image.source != 0 or frame is None:
            continue
        small = area(frame) < width * height and area(frame) <= MAX_AREA_RATIO * area(task.box)
        if small and intersection(frame, task.box) >= MIN_COVERED * area(task.box):
            return True
    return False


def must_use(task: TaskRecord, trajectory: TrajectoryRecord) -> bool:
    """True if the trajectory answered, and did so on the image that the task needs."""
    return (
        trajectory.end_state is EndState.ANSWERED
        and answered_upright(task, trajectory)
        and ("crop" not in task.required_transforms or crop_fits(task, trajectory))
    )


def turned_image(trajectory: TrajectoryRecord) -> bool:
    """True if an orientation operation ran, by name or by its net effect (an array turned by slicing)."""
    if any(_turns(op.name) for op in trajectory.operations):
        return True
    effects = [turn.result.effect for turn in trajectory.turns if turn.result and turn.result.effect]
    return any(_turns(name) for effect in effects for name in effect.core)


def _turns(name: str) -> bool:
    return name.startswith(("rotate", "flip", "transpose"))


# ------------------------------------------------------------------------------------------------ many
@dataclass(frozen=True, slots=True, kw_only=True)
class KindSummary:
    """The figures of one kind of task."""

    n: int
    """Trajectories, failures of the infrastructure left out."""
    accuracy: Rate
    must_use: Rate
    spurious: Rate
    """Share in which an orientation operation ran; only over tasks that need none."""
    turns: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSummary:
    """The figures of one evaluation; rates are NaN with n = 0 where no trajectory counts."""

    num_tasks: int
    num_trajectories: int
    num_errors: int
    """Failures of engine, sandbox or judge: left out of every rate below."""
    num_unscored: int
    """Without a reward: left out of accuracy."""
    accuracy: Rate
    """Over tasks that need the tool."""
    must_use: Rate
    """Over tasks that need the tool."""
    spurious: Rate
    """Share of trajectories of upright tasks in which an orientation operation ran."""
    accuracy_upright: Rate
    """Over tasks that need no tool."""
    accuracy_all: Rate
    by_kind: dict[str, KindSummary]
    tool_success: Rate
    """Share of tool calls that returned an image."""
    tool_calls_mean: float
    turns_mean: float
    tokens_mean: float
    """Sampled tokens per trajectory."""
    end_states: dict[str, float]
    """Share of trajectories by end state."""

    def scalars(self, *, kinds: bool = False) -> dict[str, float]:
        """The figures as flat numbers for a logger; NaN where nothing counts, so that the keys never change.

        Args:
            kinds: add `<kind>/accuracy`, `<kind>/must_use`, `<kind>/turns` for the kinds that occurred.
        """
        rates = ("accuracy", "must_use", "spurious", "accuracy_upright", "accuracy_all", "tool_success")
        means = ("tool_calls_mean", "turns_mean", "tokens_mean")
        values = {name: getattr(self, name).value for name in rates} | {name: getattr(self, name) for name in means}
        for kind, found in self.by_kind.items() if kinds else ():
            values |= {
                f"{kind}/accuracy": found.accuracy.value,
                f"{kind}/must_use": found.must_use.value,
                f"{kind}/turns": found.turns,
            }
        return values

    def to_json(self) -> dict[str, Any]:
        """JSON values; a rate is {value, low, high, n}, NaN is null."""
        return {key: _json(value) for key, value in asdict(self).items()}


def _json(value: Any) -> Any:
    if isinstance(value, Rate):
        return {name: _json(item) for name, item in value._asdict().items()}
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


class Outcome(NamedTuple):
    """What one trajectory contributes; no reference to it is kept, so millions can be summarised."""

    task_id: str
    sample: int
    kind: str
    needs_tool: bool
    end_state: EndState
    correct: bool | None
    """None: unscored."""
    must_use: bool
    """False for tasks that need no tool."""
    spurious: bool
    """An orientation operation ran though none was needed."""
    num_turns: int
    num_sampled_tokens: int
    num_calls: int
    num_calls_ok: int
    """Calls that returned an image."""


def judge(task: TaskRecord, trajectory: TrajectoryRecord) -> Outcome:
    """Judge one trajectory."""
    return Outcome(
        task_id=task.id,
        sample=trajectory.sample,
        kind=task.kind,
        needs_tool=task.needs_tool,
        end_state=trajectory.end_state,
        correct=trajectory.reward.correct if trajectory.reward else None,
        must_use=task.needs_tool and must_use(task, trajectory),
        spurious=not task.needs_tool and turned_image(trajectory),
        num_turns=len(trajectory.turns),
        num_sampled_tokens=trajectory.num_sampled_tokens,
        num_calls=trajectory.num_tool_calls,
        num_calls_ok=sum(turn.result is not None and turn.result.status is ToolStatus.OK for turn in trajectory.turns),
    )


def outcomes(groups: Iterable[Group | GroupRecord]) -> list[Outcome]:
    """Judge every trajectory, live or stored."""
    found = []
    for group in groups:
        record = to_record(group) if isinstance(group, Group) else group
        found += [judge(record.task, trajectory) for trajectory in record.trajectories]
    return found


def summarise(groups: Iterable[Group | GroupRecord]) -> EvalSummary:
    """Compute every figure of an evaluation.

    Args:
        groups: live groups or records, scored; one task may have several trajectories.
    """
    return summarise_outcomes(outcomes(groups))


def summarise_outcomes(everything: Sequence[Outcome]) -> EvalSummary:
    """Compute every figure from what the trajectories contributed, whichever rank rolled them out."""
    valid = [outcome for outcome in everything if not outcome.end_state.is_error]
    needing = [outcome for outcome in valid if outcome.needs_tool]
    upright = [outcome for outcome in valid if not outcome.needs_tool]
    kinds: dict[str, list[Outcome]] = {}
    for outcome in valid:
        kinds.setdefault(outcome.kind, []).append(outcome)
    states = Counter(outcome.end_state.value for outcome in everything)
    return EvalSummary(
        num_tasks=len({outcome.task_id for outcome in everything}),
        num_trajectories=len(everything),
        num_errors=len(everything) - len(valid),
        num_unscored=sum(outcome.correct is None for outcome in valid),
        accuracy=_rate(needing, lambda o: o.correct),
        must_use=_rate(needing, lambda o: o.must_use),
        spurious=_rate(upright, lambda o: o.spurious),
        accuracy_upright=_rate(upright, lambda o: o.correct),
        accuracy_all=_rate(valid, lambda o: o.correct),
        by_kind={kind: _kind_summary(found) for kind, found in kinds.items()},
        tool_success=_tool_success(valid),
        tool_calls_mean=_mean(o.num_calls for o in valid),
        turns_mean=_mean(o.num_turns for o in valid),
        tokens_mean=_mean(o.num_sampled_tokens for o in valid),
        end_states={state: count / len(everything) for state, count in states.most_common()},
    )


def _kind_summary(found: list[Outcome]) -> KindSummary:
    return KindSummary(
        n=len(found),
        accuracy=_rate(found, lambda o: o.correct),
        must_use=_rate([outcome for outcome in found if outcome.needs_tool], lambda o: o.must_use),
        spurious=_rate([outcome for outcome in found if not outcome.needs_tool], lambda o: o.spurious),
        turns=_mean(o.num_turns for o in found),
    )


def _rate(found: list[Outcome], value: Callable[[Outcome], bool | None]) -> Rate:
    pairs = [(float(hit), outcome.task_id) for outcome in found if (hit := value(outcome)) is not None]
    return rate([hit for hit, _ in pairs], [task for _, task in pairs])


def _tool_success(found: list[Outcome]) -> Rate:
    calls = [
        (float(index < outcome.num_calls_ok), outcome.task_id)
        for outcome in found
        for index in range(outcome.num_calls)
    ]
    return rate([hit for hit, _ in calls], [task for _, task in calls])


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else math.nan
