"""What one trajectory did: right or wrong, whether the tool was used as the task needs it, what its crops show.

Pure functions of trajectories, live or read from a store. *Tool-use success* holds when the answer was given
on an upright image and, where a crop is needed, after the model saw a crop that shows the ground-truth box and little
else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from cv_lightning.dialects import dialect_named
from cv_lightning.evaluation.scoring import metric_of, official_score
from cv_lightning.images import area, iou, is_upright, source_box
from cv_lightning.orientations import ORIENTATIONS, orientations_of, to_upright
from cv_lightning.rewards.geometry import MAX_AREA_RATIO, shows
from cv_lightning.rewards.markup import final_answer
from cv_lightning.types import Box, EndState, Group, Task, ToolStatus, Trajectory

T = TypeVar("T")

ANSWERED = (EndState.ANSWERED, EndState.ERROR_JUDGE)
"""End states of trajectories that have an answer; the second's was not judged."""
RIGHT_FROM = 0.5
"""Score by a benchmark's own metric from which on an answer counts as right."""


def turns_of(task: Task, source: int = 0) -> list[str]:
    """The right-angle turns and flips that were done to one of the task's images, in the order of application.

    A data set's transforms apply to the first image; `data.corruptions` and the orientation probe, whose transforms
    need not be undone, turn all images.
    """
    form = task.metadata.get("orientation")
    everywhere = [form] if form in ORIENTATIONS else []
    return (orientations_of(task.required_transforms) if source == 0 else []) or everywhere


def answered_upright(task: Task, trajectory: Trajectory) -> bool:
    """True if the last image that the model saw is upright, whatever was done to it on the way."""
    if not trajectory.images:
        return False
    last = trajectory.images[-1]
    return is_upright(last.to_source, to_upright(turns_of(task, last.source), task.images[last.source].size))


def crop_fits(task: Task, trajectory: Trajectory) -> bool:
    """True if some crop that the model saw shows the ground-truth box and little else, in source pixels.

    It shows at least `geometry.MIN_COVERED` of the box and has at most `MAX_AREA_RATIO` times its area. A crop turned
    by another angle than a right one counts as its bounding box.
    """
    if task.box is None:
        return False
    limit = MAX_AREA_RATIO * area(task.box)
    return any(area(crop) <= limit and shows(crop, task.box) for crop in crops(task, trajectory))


def crops(task: Task, trajectory: Trajectory) -> list[Box]:
    """Parts of the first image that the model saw as crops, in its pixels and in order.

    An image that shows the whole image, or the same as its parent (a turned crop), is not a crop.
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
    """True if the trajectory answered on the image that the task needs, and after a text where it needs one."""
    return (
        trajectory.end_state in ANSWERED
        and (not task.metadata.get("needs_text") or any(turn.result and turn.result.text for turn in trajectory.turns))
        and answered_upright(task, trajectory)
        and ("crop" not in task.required_transforms or crop_fits(task, trajectory))
    )


def turned_image(trajectory: Trajectory) -> bool:
    """True if an orientation operation ran, by name or by its net effect (an array turned by slicing)."""
    effects = [effect for turn in trajectory.turns if turn.result for effect in turn.result.effects if effect]
    names = [op.name for op in trajectory.operations] + [name for effect in effects for name in effect.core]
    return any(name.startswith(("rotate", "flip", "transpose")) for name in names)


# ------------------------------------------------------------------------------------------------ what was shown
class ImageVariant(NamedTuple):
    """The form in which a question was asked: as given, turned or corrupted."""

    cluster: str
    """Unit of resampling, the same for all questions about an image, in all variants."""
    data_source: str
    """Data set, the same for all variants."""
    orientation: str
    """`identity`, one of `ORIENTATIONS`, or `other`: several, or by another angle."""
    corruption: str
    """`none` or a name of the suite."""
    severity: int
    """1 to 5; 0 for none."""
    as_given: bool
    """False where `data.corruptions` turned or corrupted it."""


def variant_of(task: Task) -> ImageVariant:
    """The variant of a task: from `data.corruptions`, else from the data set's own transforms."""
    metadata = task.metadata
    orientation, corruption = "identity", "none"
    severity, base, source = 0, task.id, task.data_source
    form, name, level = metadata.get("orientation"), metadata.get("corruption"), metadata.get("severity")
    if form in ("identity", *ORIENTATIONS) and isinstance(name, str) and level in range(6):  # else another's metadata
        orientation, corruption, severity = str(form), name, int(level or 0)
        ending = f"/{orientation}/{corruption}" + (f"_{severity}" if severity else "")
        base, source = task.id.removesuffix(ending), task.data_source.removesuffix(ending)
    as_given = (orientation, corruption) == ("identity", "none")
    turns = [name for name in task.required_transforms if name.startswith(("rotate", "flip"))] or turns_of(task)
    if turns not in ([], [orientation]):
        single = orientation == "identity" and len(turns) == 1 and turns[0] in ORIENTATIONS
        orientation = turns[0] if single else "other"
    return ImageVariant(str(metadata.get("picture") or base), source, orientation, corruption, severity, as_given)


# ------------------------------------------------------------------------------------------------ outcome
class Outcome(NamedTuple):
    """What one trajectory contributes to the figures, without a reference to it: millions can be summarised."""

    task_id: str
    sample: int
    kind: str
    """The task's kind; empty for variants that `data.corruptions` made."""
    variant: ImageVariant
    category: str
    """The question's category within its data set; empty without categories."""
    needs_tool: bool
    end_state: EndState
    correct: bool | None
    """Verdict of the rule, or of the judge if `scored_by` is `judge`; None: unscored."""
    right: bool | None
    """A score of `RIGHT_FROM` by the benchmark's own metric, else `correct`; counts for gain, harm and pass@k."""
    scored_by: str
    """`rule` or `judge`; empty: unscored."""
    score: float | None
    """In [0, 1]: by the benchmark's own metric, which needs no judge, else 1 for correct; None: unscored, also where
    a user's metric raised."""
    metric: str
    """Name of the benchmark's own metric; empty: none."""
    tool_use_success: bool
    """False for tasks that need no tool."""
    fixed: bool | None
    """The last image was upright; None for tasks shown upright, or turned by another angle than a right one."""
    spurious: bool
    """An unnecessary orientation operation ran."""
    num_turns: int
    num_sampled_tokens: int
    num_tokens: int
    """Length of the sequence with prompt, images and tool responses."""
    num_calls: int
    num_calls_ok: int
    """Calls that returned an image."""
    num_operations: int
    """Operations that contributed to a returned image."""
    num_crops: int
    """Crops that the model saw; 0 without a ground-truth box."""
    num_crops_showing: int
    """Crops among these that contain the box."""
    crop_iou: float | None
    """Best overlap of a crop with the ground-truth box; None without a crop or without a box."""

    @property
    def counts(self) -> bool:
        """False after an infrastructure error, except for a failed judge: the model's actions count without a score."""
        return not self.end_state.is_error or self.end_state is EndState.ERROR_JUDGE

    @property
    def is_unjudged(self) -> bool:
        """True if it counts, but a judge that did not reply left it unscored."""
        return self.counts and self.correct is None

    @property
    def is_upright(self) -> bool:
        """True for a task that needs no tool, shown upright."""
        return not self.needs_tool and self.variant.orientation == "identity"


def outcome_of(task: Task, trajectory: Trajectory) -> Outcome:
    """The outcome of one trajectory."""
    variant, reward, tokens = variant_of(task), trajectory.reward, trajectory.tokens
    seen = crops(task, trajectory) if task.box is not None else []
    box = task.box or (0.0, 0.0, 0.0, 0.0)
    correct = reward.correct if reward else None
    metric, score = metric_of(task.metadata), None if correct is None else float(correct)
    right = correct
    if metric is not None:
        score = _official(task.metadata, trajectory)
        right = None if score is None else score >= RIGHT_FROM
    return Outcome(
        task_id=task.id,
        sample=trajectory.sample,
        kind=task.kind if variant.as_given else "",
        variant=variant,
        category=str(task.metadata.get("category") or ""),
        needs_tool=task.needs_tool,
        end_state=trajectory.end_state,
        correct=correct,
        right=right,
        scored_by=reward.scored_by if reward else "",
        score=score,
        metric=metric or "",
        tool_use_success=task.needs_tool and tool_use_success(task, trajectory),
        fixed=answered_upright(task, trajectory) if variant.orientation in ORIENTATIONS or turns_of(task) else None,
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
    """Score by the benchmark's own metric; None without one, or after an infrastructure error."""
    answer = None
    if trajectory.reward is not None:
        answer = trajectory.reward.answer
    elif trajectory.end_state is EndState.ERROR_JUDGE and trajectory.turns:
        answer = final_answer(trajectory.turns[-1].text, dialect_named(trajectory.dialect))
    elif trajectory.end_state.is_error or trajectory.end_state is EndState.ANSWERED:
        return None
    return official_score(answer, metadata)


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Items by key, sorted by key."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(sorted(groups.items()))


def outcomes(groups: Iterable[Group]) -> list[Outcome]:
    """The outcomes of all trajectories."""
    return [outcome_of(group.task, trajectory) for group in groups for trajectory in group.trajectories]
