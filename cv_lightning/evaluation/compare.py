"""Comparison of two evaluations question by question: paired differences, and the questions that flipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from cv_lightning.evaluation.breakdown import TRANSFORMS
from cv_lightning.evaluation.outcome import Outcome, grouped, outcomes
from cv_lightning.evaluation.paired import FLIPPED_AT, Pair, PairedSummary, pair_outcomes, summarise_pairs
from cv_lightning.evaluation.results import evaluated
from cv_lightning.evaluation.tables import (
    COLUMN_NAMES,
    Evaluated,
    Grid,
    change,
    number,
    p_value,
    pair_cells,
    percent,
    unscored_note,
)
from cv_lightning.images import content_hash
from cv_lightning.trajectory import read_groups
from cv_lightning.types import DataError, Group

BENCHMARKS = "data source"
SIGNIFICANT_P = 0.05
TESTS = {"mcnemar": "McNemar's test", "wilcoxon": "Wilcoxon's test"}
"""Names of the tests of `Difference`."""
SPLITS: dict[str, Callable[[Outcome], str]] = {
    "orientation": lambda outcome: outcome.variant.orientation,
    BENCHMARKS: lambda outcome: outcome.variant.data_source,
    "category": lambda outcome: outcome.category,
}
"""Splits of the differences: a value of each question, by name."""


@dataclass(slots=True, kw_only=True)
class Matching:
    """The questions of two evaluations that are the same."""

    names: dict[str, str] = field(default_factory=dict)
    """Id in the first by id in the second."""
    num_renamed: int = 0
    """Questions among these with another id but the same text, ground truth and images."""
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    num_changed: int = 0
    """Questions of the same id with another text, truth or image: not compared."""

    def __str__(self) -> str:
        if not (self.only_first or self.only_second or self.num_changed):
            renamed = f", {self.num_renamed} of them under another id" if self.num_renamed else ""
            return f"the same {len(self.names)} questions{renamed}"
        return (
            f"different question sets: {len(self.names)} in both ({self.num_renamed} under another id), "
            f"{len(self.only_first)} only in A, {len(self.only_second)} only in B, "
            f"{self.num_changed} of the same id with other text, truth or images; only those in both are compared"
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a paired difference shows about B."""

    word: Literal["better", "worse", "not separated", "not comparable"]
    text: str
    """The difference with its interval, and what the verdict rests on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Differences of evaluation B from evaluation A."""

    names: tuple[str, str]
    matching: Matching
    sides: tuple[Evaluated, Evaluated]
    """Figures of each side over all of its own questions."""
    overall: PairedSummary
    splits: dict[str, dict[str, PairedSummary]]
    """Differences by split and value; only splits with several values."""
    gained: list[str]
    """Ids (in A) of the questions that only B gets right."""
    lost: list[str]
    """Ids (in A) of the questions that only A gets right."""
    changes: dict[str, float]
    """Change of the fraction of right answers of the questions in `gained` and `lost`."""

    @property
    def verdict(self) -> Verdict:
        """The verdict on all questions."""
        return verdict_on(self.overall)

    def verdicts(self) -> dict[str, Verdict]:
        """The verdict on each benchmark; empty if there is only one."""
        return {name: verdict_on(part) for name, part in self.splits.get(BENCHMARKS, {}).items()}

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
            "verdict": self.verdict.word,
            "difference": self.overall.to_json(),
            "splits": {by: {key: part.to_json() for key, part in parts.items()} for by, parts in self.splits.items()},
            "gained": self.gained,
            "lost": self.lost,
        }


def load_evaluation(path: Path) -> dict[str, Group]:
    """The groups of an evaluation by the id of the question; the last where one was asked twice.

    Raises:
        DataError: There is no store, or an empty one.
    """
    groups = {group.task.id: group for group in read_groups(path)}
    if not groups:
        raise DataError(f"{path}: holds no trajectories; give the folder of one evaluation, RUN/eval/NAME")
    return groups


def match_questions(first: Mapping[str, Group], second: Mapping[str, Group]) -> Matching:
    """Pair equal questions by id, then by text, ground truth and images."""
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
        first: Groups by id of the question.
        second: The other evaluation's groups.
        names: Names of the two to display.

    Raises:
        DataError: They have no question in common.
    """
    matching = match_questions(first, second)
    if not matching.names:
        raise DataError(f"{names[0]} and {names[1]} have no question in common: {matching}")
    one, other = outcomes(first.values()), outcomes(second.values())
    renamed = [
        outcome._replace(task_id=matching.names[outcome.task_id])
        for outcome in other
        if outcome.task_id in matching.names
    ]
    pairs = pair_outcomes(one, renamed)
    splits = {by: _split(pairs, {outcome.task_id: key(outcome) for outcome in one}) for by, key in SPLITS.items()}
    return Comparison(
        names=names,
        matching=matching,
        sides=(evaluated(one), evaluated(other)),
        overall=summarise_pairs(pairs),
        splits={
            by: {value: summarise_pairs(part) for value, part in parts.items()}
            for by, parts in splits.items()
            if len(parts) > 1
        },
        changes={pair.task_id: pair.change for pair in pairs if pair.scored and abs(pair.change) >= FLIPPED_AT},
        gained=[pair.task_id for pair in pairs if pair.scored and pair.change >= FLIPPED_AT],
        lost=[pair.task_id for pair in pairs if pair.scored and pair.change <= -FLIPPED_AT],
    )


def _split(pairs: Sequence[Pair], values: Mapping[str, str]) -> dict[str, list[Pair]]:
    """Pairs by the value of their question, orientations in the order of a robustness table."""
    parts = grouped(pairs, lambda pair: values[pair.task_id])
    return {value: parts[value] for value in dict.fromkeys([*TRANSFORMS, *parts]) if value in parts}


def verdict_on(found: PairedSummary) -> Verdict:
    """Better or worse if the interval of the score's difference excludes zero and its test agrees, else neither."""
    score = found.score
    if not found.num_pairs:
        return Verdict("not comparable", "no question was scored in both")
    text = f"score {change(score)} points on {found.num_pairs:,} paired questions"
    if found.num_unscored:
        return Verdict("not comparable", f"{text}; {unscored_note(found)}")
    text += f", p = {score.p:.2g} ({TESTS[score.test]})"
    if score.p >= SIGNIFICANT_P or score.low <= 0 <= score.high:
        return Verdict("not separated", text)
    return Verdict("better" if score.value > 0 else "worse", text)


# ------------------------------------------------------------------------------------------------ tables
def differences(found: Comparison) -> dict[str, dict[str, PairedSummary]]:
    """Differences by title of a table and name of a row; all questions come first."""
    return {"B against A": {"all": found.overall}} | {
        f"By {by}": {COLUMN_NAMES.get(value, value) or "-": part for value, part in parts.items()}
        for by, parts in found.splits.items()
    }


def comparison_tables(found: Comparison) -> list[Grid]:
    """The tables of `differences`, in that order, and one of both sides."""
    notes = [f"{NOTE} {unscored_note(found.overall)}".strip()]
    grids = [
        Grid(title, HEADINGS, [_row(name, part) for name, part in parts.items()], notes.pop() if notes else "")
        for title, parts in differences(found).items()
    ]
    cells = ((title, [cell(attrgetter(name)(entry.summary)) for entry in found.sides]) for title, name, cell in ROWS)
    return [*grids, Grid("Each on all of its own questions", ["", "A", "B"], [[title, *row] for title, row in cells])]


HEADINGS = ("", "questions", "score, B - A", "gained", "lost", "p", "calls, B - A")
NOTE = "Percent with 95 % intervals. Gained, lost: right in B only, in A only. p: of the score's difference."
ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("accuracy, all tasks", "accuracy_all", percent),
    ("tool-use success", "tool_use_success", percent),
    ("unnecessary rotations on upright", "spurious", percent),
    ("tool calls", "tool_calls_mean", number),
    ("turns", "turns_mean", number),
    ("failed (left out)", "num_errors", str),
)


def _row(name: str, found: PairedSummary) -> list[str]:
    return [name, *pair_cells(found), p_value(found), change(found.calls, scale=1, digits=2)]


def flips(
    names: Sequence[str], matching: Matching, first: Mapping[str, Group], second: Mapping[str, Group]
) -> list[tuple[Group, Group]]:
    """The groups of flipped questions, from both sides."""
    back = {mine: theirs for theirs, mine in matching.names.items()}
    return [(first[name], second[back[name]]) for name in names]
