"""What one trajectory did: right or wrong, whether the tool was used as the task needs it, what its crops show.

Pure functions of trajectories, live or read from a store. *Tool-use success* holds when the answer was given
on an upright image and, where a crop is needed, after the model saw a crop that shows the ground-truth box and little
else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from cv_lightning.evaluation.scoring import metric_of, official_score
from cv_lightning.images import area, iou, is_upright, source_box
from cv_lightning.orientations import ORIENTATIONS, orientations_of, to_upright
from cv_lightning.rewards.geometry import MAX_AREA_RATIO, shows
from cv_lightning.rewards.markup import final_answer
from cv_lightning.types import Box, EndState, Group, Task, ToolStatus, Trajectory

ANSWERED = (EndState.ANSWERED, EndState.ERROR_JUDGE)
"""End states of trajectories that have an answer; the second's was not judged."""
RIGHT_FROM = 0.5
"""Score by a benchmark's own metric from which on an answer counts as right where only right and wrong count."""


def turns_of(task: Task, source: int = 0) -> list[str]:
    """The right-angle turns and flips that were done to one of the task's images, in the order of application.

    What a data set's transforms say is true of its first image; `data.corruptions` and the orientation probe, which
    need no transform to be undone, turn all of them.
    """
    names = orientations_of(task.required_transforms)
    form = task.metadata.get("orientation")
    if form not in ORIENTATIONS:
        return names if source == 0 else []
    return names or [form] if source == 0 else [form]


def answered_upright(task: Task, trajectory: Trajectory) -> bool:
    """True if the last image that the model saw is upright: turned and mirrored by nothing, on balance."""
    if not trajectory.images:
        return False
    last = trajectory.images[-1]
    return is_upright(last.to_source, to_upright(turns_of(task, last.source), task.images[last.source].size))


def crop_fits(task: Task, trajectory: Trajectory) -> bool:
    """True if some crop that the model saw shows the ground-truth box and little else, in source pixels.

    At least `geometry.MIN_COVERED` of the box, at most `MAX_AREA_RATIO` times its area, and less than the whole image.
    A crop turned by no right angle is taken for its bounding box.
    """
    if task.box is None:
        return False
    limit = MAX_AREA_RATIO * area(task.box)
    return any(area(crop) <= limit and shows(crop, task.box) for crop in crops(task, trajectory))


def crops(task: Task, trajectory: Trajectory) -> list[Box]:
    """What the crops that the model saw show of the first image, in its pixels and in order.

    An image that shows the whole image, or just what its parent shows (a turned crop), is none.
    """
    width, height = task.images[0].size
    found = []
    for image in trajectory.images:
        frame = source_box(image)
        if image.parent is None or image.source != 0 or frame is None or area(frame) >= width * height:
            continue
        if frame != source_box(trajectory.images[image.parent]):
            found.append(frame)
    return found


def tool_use_success(task: Task, trajectory: Trajectory) -> bool:
    """True if the trajectory answered, and did so on the image that the task needs."""
    return (
        trajectory.end_state in ANSWERED
        and answered_upright(task, trajectory)
        and ("crop" not in task.required_transforms or crop_fits(task, trajectory))
    )


def turned_image(trajectory: Trajectory) -> bool:
    """True if an orientation operation ran, by name or by its net effect (an array turned by slicing)."""
    if any(_turns(op.name) for op in trajectory.operations):
        return True
    effects = [turn.result.effect for turn in trajectory.turns if turn.result and turn.result.effect]
    return any(_turns(name) for effect in effects for name in effect.core)


def _turns(name: str) -> bool:
    return name.startswith(("rotate", "flip", "transpose"))


# ------------------------------------------------------------------------------------------------ what was shown
class Shown(NamedTuple):
    """Which question it was, and in which form."""

    base_id: str
    """Id of the question, the same in all its forms."""
    cluster: str
    """What is drawn together where intervals are resampled: all questions about an image, in all forms."""
    data_source: str
    """Data set, the same in all forms."""
    orientation: str
    """`identity`, one of `ORIENTATIONS`, or `other`: several, or by another angle."""
    corruption: str
    """`none` or a name of the suite."""
    severity: int
    """1 to 5; 0 for none."""
    as_given: bool
    """False where `data.corruptions` turned or corrupted it."""


def shown_as(task: Task) -> Shown:
    """The form of a task: what `data.corruptions` made of it, else what its data set did to the image."""
    metadata = task.metadata
    orientation, corruption = "identity", "none"
    severity, base, source = 0, task.id, task.data_source
    form, name, level = metadata.get("orientation"), metadata.get("corruption"), metadata.get("severity")
    if form in ("identity", *ORIENTATIONS) and isinstance(name, str) and level in range(6):  # else words of another's
        orientation, corruption, severity = str(form), name, int(level or 0)
        ending = f"/{orientation}/{corruption}" + (f"_{severity}" if severity else "")
        base, source = task.id.removesuffix(ending), task.data_source.removesuffix(ending)
    as_given = (orientation, corruption) == ("identity", "none")
    turns = [name for name in task.required_transforms if name.startswith(("rotate", "flip"))] or turns_of(task)
    if turns not in ([], [orientation]):
        single = orientation == "identity" and len(turns) == 1 and turns[0] in ORIENTATIONS
        orientation = turns[0] if single else "other"
    return Shown(base, str(metadata.get("picture") or base), source, orientation, corruption, severity, as_given)


# ------------------------------------------------------------------------------------------------ outcome
class Outcome(NamedTuple):
    """What one trajectory contributes; no reference to it is kept, so millions can be summarised."""

    task_id: str
    sample: int
    kind: str
    """Of the task; empty where `data.corruptions` made another of it than its data set did."""
    shown: Shown
    category: str
    """Of the question within its data set; empty: the data set has none."""
    needs_tool: bool
    end_state: EndState
    correct: bool | None
    """By rule, or by the judge where `scored_by` says so; None: unscored."""
    right: bool | None
    """What gain, harm and pass@k count: by the benchmark's own metric `RIGHT_FROM`, else `correct`."""
    scored_by: str
    """`rule` or `judge`; empty: unscored."""
    score: float | None
    """In [0, 1]: by the benchmark's own metric where it has one, for which no judge is needed, else 1 for correct;
    None: unscored."""
    metric: str
    """Name of the benchmark's own metric; empty: none."""
    tool_use_success: bool
    """False for tasks that need no tool."""
    fixed: bool | None
    """The last image was upright; None for tasks that were shown upright, or turned by no right angle."""
    spurious: bool
    """An orientation operation ran though none was needed."""
    num_turns: int
    num_sampled_tokens: int
    num_tokens: int
    """Whole sequence: prompt, images and tool responses included."""
    num_calls: int
    num_calls_ok: int
    """Calls that returned an image."""
    num_operations: int
    """Operations that ran and reached the image that was returned."""
    num_crops: int
    """Crops that the model saw, where there is a ground-truth box; else 0."""
    num_crops_showing: int
    """Of those, the ones that contain the box."""
    crop_iou: float | None
    """Best overlap of a crop with the ground-truth box; None without a crop or without a box."""

    @property
    def counts(self) -> bool:
        """False after a failure of the infrastructure, but for a judge's: what the model did counts without it, too."""
        return not self.end_state.is_error or self.end_state is EndState.ERROR_JUDGE

    @property
    def is_upright(self) -> bool:
        """True for a task that needs no tool, shown upright."""
        return not self.needs_tool and self.shown.orientation == "identity"


def judge(task: Task, trajectory: Trajectory) -> Outcome:
    """Judge one trajectory."""
    shown, reward, tokens = shown_as(task), trajectory.reward, trajectory.tokens
    seen = crops(task, trajectory) if task.box is not None else []
    box = task.box or (0.0, 0.0, 0.0, 0.0)
    correct = reward.correct if reward else None
    official = _official(task.metadata, trajectory)
    return Outcome(
        task_id=task.id,
        sample=trajectory.sample,
        kind=task.kind if shown.as_given else "",
        shown=shown,
        category=str(task.metadata.get("category") or ""),
        needs_tool=task.needs_tool,
        end_state=trajectory.end_state,
        correct=correct,
        right=correct if official is None else official >= RIGHT_FROM,
        scored_by=reward.scored_by if reward else "",
        score=official if official is not None or correct is None else float(correct),
        metric=metric_of(task.metadata) or "",
        tool_use_success=task.needs_tool and tool_use_success(task, trajectory),
        fixed=answered_upright(task, trajectory) if shown.orientation in ORIENTATIONS or turns_of(task) else None,
        spurious=not task.needs_tool and turned_image(trajectory),
        num_turns=len(trajectory.turns),
        num_sampled_tokens=tokens.num_sampled_tokens,
        num_tokens=tokens.num_tokens,
        num_calls=trajectory.num_tool_calls,
        num_calls_ok=sum(turn.result is not None and turn.result.status is ToolStatus.OK for turn in trajectory.turns),
        num_operations=sum(operation.used for operation in trajectory.operations),
        num_crops=len(seen),
        num_crops_showing=sum(shows(crop, box) for crop in seen),
        crop_iou=max((iou(crop, box) for crop in seen), default=None),
    )


def _official(metadata: dict[str, Any], trajectory: Trajectory) -> float | None:
    """Score by the benchmark's own metric; None: it has none, or infrastructure failed."""
    if trajectory.reward is not None:
        return official_score(trajectory.reward.answer, metadata)
    if trajectory.end_state is EndState.ERROR_JUDGE and trajectory.turns:
        return official_score(final_answer(trajectory.turns[-1].text), metadata)
    return None


def outcomes(groups: Iterable[Group]) -> list[Outcome]:
    """Judge every trajectory, live or stored."""
    return [judge(group.task, trajectory) for group in groups for trajectory in group.trajectories]
