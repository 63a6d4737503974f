"""Two evaluations question by question: paired differences, what flipped, and a page that shows how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cv_lightning.evaluation.breakdown import TRANSFORMS
from cv_lightning.evaluation.outcome import Outcome, judge
from cv_lightning.evaluation.paired import FLIPPED_AT, Pair, PairedSummary, pair_outcomes, split, summarise_pairs
from cv_lightning.evaluation.results import evaluated
from cv_lightning.evaluation.tables import (
    COLUMN_NAMES,
    Evaluated,
    Grid,
    change,
    number,
    p_value,
    percent,
    unscored_note,
)
from cv_lightning.images import content_hash
from cv_lightning.trajectory import read_groups
from cv_lightning.types import DataError, Group

SPLITS = {
    "orientation": lambda outcome: outcome.shown.orientation,
    "data source": lambda outcome: outcome.shown.data_source,
    "category": lambda outcome: outcome.category,
}
"""What differences are split by."""


@dataclass(slots=True, kw_only=True)
class Matching:
    """Which question of the second evaluation is which of the first."""

    names: dict[str, str] = field(default_factory=dict)
    """Id in the first by id in the second."""
    num_renamed: int = 0
    """Of those, how many have another id but the same words, ground truth and images."""
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    num_changed: int = 0
    """Same id, other words, truth or images: not compared."""

    @property
    def is_whole(self) -> bool:
        """True if both asked the same questions."""
        return not (self.only_first or self.only_second or self.num_changed)

    def __str__(self) -> str:
        if self.is_whole:
            return f"the same {len(self.names)} questions" + (
                f", {self.num_renamed} of them under another id" if self.num_renamed else ""
            )
        return (
            f"different question sets: {len(self.names)} in both ({self.num_renamed} under another id), "
            f"{len(self.only_first)} only in A, {len(self.only_second)} only in B, "
            f"{self.num_changed} of the same id with other words, truth or pictures; only what is in both is compared"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """B against A."""

    names: tuple[str, str]
    matching: Matching
    sides: tuple[Evaluated, Evaluated]
    """Over all of each side's own questions."""
    overall: PairedSummary
    splits: dict[str, dict[str, PairedSummary]]
    """By what, by value; only splits with more than one value. Orientations as everywhere, the rest by name."""
    gained: list[str]
    """Ids (in A) of the questions that only B gets right."""
    lost: list[str]
    """Ids (in A) of the questions that only A gets right."""

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "a": {"path": self.names[0]} | self.sides[0].summary.to_json(),
            "b": {"path": self.names[1]} | self.sides[1].summary.to_json(),
            "questions": {
                "paired": len(self.matching.names),
                "renamed": self.matching.num_renamed,
                "changed": self.matching.num_changed,
                "only_a": self.matching.only_first,
                "only_b": self.matching.only_second,
            },
            "difference": self.overall.to_json(),
            "splits": {
                by: {value: found.to_json() for value, found in parts.items()} for by, parts in self.splits.items()
            },
            "gained": self.gained,
            "lost": self.lost,
        }


def load_evaluation(path: Path) -> dict[str, Group]:
    """The groups of an evaluation, by the id of the question; of one that is there twice, the last.

    Raises:
        DataError: no store there, or an empty one.
    """
    groups = {group.task.id: group for group in read_groups(path)}
    if not groups:
        raise DataError(f"{path}: holds no trajectories; give the folder of one evaluation, RUN/eval/NAME")
    return groups


def match_questions(first: Mapping[str, Group], second: Mapping[str, Group]) -> Matching:
    """Pair by id where the question is the same, then by what was asked and shown."""
    matching = Matching()
    same = {name for name in first.keys() & second.keys() if _asked(first[name]) == _asked(second[name])}
    matching.names = {name: name for name in first if name in same}
    left = {name: _asked(group) for name, group in first.items() if name not in same}
    right = {name: _asked(group) for name, group in second.items() if name not in same}
    by_question = {asked: name for name, asked in left.items()}
    often = Counter(left.values()) + Counter(right.values())
    for name, asked in right.items():
        if asked in by_question and often[asked] == 2:  # asked once on each side
            matching.names[name] = by_question[asked]
            matching.num_renamed += 1
    taken = set(matching.names.values())
    changed = {name for name in left.keys() & right.keys() if name not in taken and name not in matching.names}
    matching.num_changed = len(changed)
    matching.only_first = sorted(set(left) - taken - changed)
    matching.only_second = sorted(set(right) - matching.names.keys() - changed)
    return matching


def _asked(group: Group) -> tuple[str, str, tuple[str, ...]]:
    task = group.task
    return task.question, task.ground_truth, tuple(content_hash(image) for image in task.images)


def compare(first: Mapping[str, Group], second: Mapping[str, Group], names: tuple[str, str] = ("A", "B")) -> Comparison:
    """Compare two evaluations.

    Args:
        first: groups by id of the question.
        second: the other's.
        names: of the two, for people.

    Raises:
        DataError: they have no question in common.
    """
    matching = match_questions(first, second)
    if not matching.names:
        raise DataError(f"{names[0]} and {names[1]} have no question in common: {matching}")
    one, other = _outcomes(first), _outcomes(second)
    renamed = [
        outcome._replace(task_id=matching.names[outcome.task_id])
        for outcome in other
        if outcome.task_id in matching.names
    ]
    pairs = pair_outcomes(one, renamed)
    splits = {}
    for by, key in SPLITS.items():
        parts = split(pair_outcomes(one, renamed, by=key))
        if len(parts) > 1:
            splits[by] = {value: summarise_pairs(parts[value]) for value in sorted(parts, key=_place)}
    return Comparison(
        names=names,
        matching=matching,
        sides=(evaluated(one), evaluated(other)),
        overall=summarise_pairs(pairs),
        splits=splits,
        gained=[pair.task_id for pair in pairs if pair.scored and _change(pair) >= FLIPPED_AT],
        lost=[pair.task_id for pair in pairs if pair.scored and _change(pair) <= -FLIPPED_AT],
    )


def _place(value: str) -> tuple[int, str]:
    return TRANSFORMS.index(value) if value in TRANSFORMS else len(TRANSFORMS), value


def _change(pair: Pair) -> float:
    return pair.right[1] - pair.right[0]


def _outcomes(groups: Mapping[str, Group]) -> list[Outcome]:
    return [judge(group.task, trajectory) for group in groups.values() for trajectory in group.trajectories]


# ------------------------------------------------------------------------------------------------ tables
def differences(found: Comparison) -> dict[str, dict[str, PairedSummary]]:
    """By the title of a table: B against A, by the name of a row. All questions come first."""
    return {"B against A": {"all": found.overall}} | {
        f"By {by}": {COLUMN_NAMES.get(value, value) or "-": part for value, part in parts.items()}
        for by, parts in found.splits.items()
    }


def comparison_tables(found: Comparison) -> list[Grid]:
    """The tables of `differences`, in that order, and one of both sides."""
    grids = [
        Grid(title, HEADINGS, [_row(name, part) for name, part in parts.items()], "" if place else _note(found))
        for place, (title, parts) in enumerate(differences(found).items())
    ]
    sides = [entry.summary for entry in found.sides]
    rows = [
        ["accuracy, all tasks", *(percent(side.accuracy_all) for side in sides)],
        ["tool-use success", *(percent(side.tool_use_success) for side in sides)],
        ["needless turning of upright", *(percent(side.spurious) for side in sides)],
        ["tool calls", *(number(side.tool_calls_mean) for side in sides)],
        ["turns", *(number(side.turns_mean) for side in sides)],
        ["failed (left out)", *(str(side.num_errors) for side in sides)],
    ]
    return [*grids, Grid("Each on all of its own questions", ["", "A", "B"], rows)]


HEADINGS = ("", "questions", "score, B - A", "gained", "lost", "p", "calls, B - A")
NOTE = "Percent with 95 % intervals. Gained, lost: right in B only, in A only. p: of the score's difference."


def _note(found: Comparison) -> str:
    return " ".join([NOTE, *([unscored_note(found.overall)] if found.overall.num_unscored else [])])


def _row(name: str, found: PairedSummary) -> list[str]:
    return [
        name,
        str(found.num_pairs),
        change(found.score).partition(", p")[0],
        percent(found.gain),
        percent(found.harm),
        p_value(found),
        change(found.calls, scale=1, digits=2).partition(", p")[0],
    ]


def flips(
    names: Sequence[str], matching: Matching, first: Mapping[str, Group], second: Mapping[str, Group]
) -> list[tuple[Group, Group]]:
    """The groups of flipped questions, on both sides."""
    back = {mine: theirs for theirs, mine in matching.names.items()}
    return [(first[name], second[back[name]]) for name in names]
