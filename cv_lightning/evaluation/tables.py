"""Tables of an evaluation, as Markdown and for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from rich.console import Console
from rich.table import Table

from cv_lightning.evaluation.breakdown import TRANSFORMS, Breakdown
from cv_lightning.evaluation.metrics import EvalSummary
from cv_lightning.evaluation.paired import PairedSummary
from cv_lightning.evaluation.published import published_on
from cv_lightning.evaluation.statistics import NONE, Difference, Rate

LOG_WIDTH = 200
"""Width of a table, in characters, where the output is not a terminal."""
EMPTY = "-"
"""Cell of a figure for which nothing counts."""
COLUMN_NAMES = {
    "identity": "Source",
    "rotate_90": "R90",
    "rotate_180": "R180",
    "rotate_270": "R270",
    "flip_horizontal": "FlipH",
    "flip_vertical": "FlipV",
    "other": "otherwise",
    "mean_of_six": "mean of 6",
    "mean_of_transformed": "mean of 5 turned",
}


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One evaluation's figures."""

    summary: EvalSummary
    breakdown: Breakdown


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of texts."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self, level: int = 3) -> str:
        """Markdown table below its title, a heading of the given level."""
        cells = [self.headings, ["---"] * len(self.headings), *self.rows]
        lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in cells]
        return "\n".join(["#" * level + f" {self.title}", "", *lines, *(["", self.note] if self.note else [])]) + "\n"

    def rich(self) -> Table:
        """Table for a terminal, without rows in which nothing counts."""
        table = Table(title=self.title, title_justify="left", caption=self.note or None, caption_justify="left")
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=number == 0)
        for row in self.rows:
            if any(cell != EMPTY for cell in row[1:]):
                table.add_row(*row)
        return table


def print_grids(grids: Sequence[Grid], before: str = "", after: str = "") -> None:
    """Print tables with plain lines around them; in a log, which has no width, no cell is wrapped."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    for text in (before, *grids, after):
        if isinstance(text, Grid):
            console.print(text.rich())
        elif text:
            console.print(text, highlight=False, soft_wrap=True)


# ------------------------------------------------------------------------------------------------ cells
def percent(value: Rate | None) -> str:
    """A rate in percent with its interval; `-` where nothing counts."""
    if value is None or value.n == 0:
        return "-"
    return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def between(bounds: tuple[float, float] | None) -> str:
    """Bounds in percent; `-` without any."""
    return "-" if bounds is None else f"{100 * bounds[0]:.1f} - {100 * bounds[1]:.1f}"


def number(value: float) -> str:
    """A number with two digits; `-` for NaN."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def change(value: Difference, *, scale: float = 100, digits: int = 1) -> str:
    """A signed difference with its interval; `-` where nothing counts."""
    if value.n == 0:
        return "-"
    return "{} [{}, {}]".format(*(f"{scale * part:+.{digits}f}" for part in value[:3]))


def p_value(found: PairedSummary) -> str:
    """P of the difference of scores; `-` where the judge failed on questions, which biases the rest."""
    return "-" if found.num_unscored or not found.num_pairs else f"{found.score.p:.2g}"


def unscored_note(found: PairedSummary) -> str:
    """The reason for a missing p; empty where none is missing."""
    if not found.num_unscored:
        return ""
    return (
        f"{found.num_unscored} questions that a judge left unscored are not compared; the rest is not a fair sample, "
        "so there is no p."
    )


# ------------------------------------------------------------------------------------------------ main table
def _score(found: Breakdown) -> str:
    """The score, and how many answers are not in it because the judge or the metric failed on them."""
    unjudged = f"; {found.num_unjudged} of {found.num_unjudged + found.score.n} unjudged" if found.num_unjudged else ""
    return percent(found.score) + unjudged


ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("... with the unjudged wrong - right", "breakdown.score_bounds", between),
    ("accuracy, rule alone", "breakdown.accuracy_rule", percent),
    ("accuracy, rule and judge", "breakdown.accuracy_judged", percent),
    ("decided by the judge", "breakdown.num_judged", str),
    ("unscored: judge or metric failed", "breakdown.num_unjudged", str),
    ("accuracy, tool needed", "summary.accuracy", percent),
    ("accuracy, no tool needed", "summary.accuracy_upright", percent),
    ("tool-use success", "summary.tool_use_success", percent),
    ("orientation fixed", "breakdown.orientation_fixed", percent),
    ("unnecessary rotations on upright", "summary.spurious", percent),
    ("tool called on upright", "breakdown.tool_on_upright", percent),
    ("successful tool calls", "summary.tool_success", percent),
    ("crop IoU", "breakdown.crop_iou", percent),
    ("crops that show the evidence", "breakdown.crops_faithful", percent),
    ("... before a right answer", "breakdown.crops_faithful_when_right", percent),
    ("calls", "summary.tool_calls_mean", number),
    ("operations per answer", "breakdown.operations_mean", number),
    ("turns", "summary.turns_mean", number),
    ("sampled tokens", "summary.sampled_tokens_mean", number),
    ("all tokens", "breakdown.length_mean", number),
    ("trajectories", "summary.num_trajectories", str),
    ("failed (left out)", "summary.num_errors", str),
)
"""Rows of the main table: title, attribute of `Evaluated`, format of the cell."""
JUDGE_COUNTS = ("breakdown.num_judged", "breakdown.num_unjudged")
"""Rows that are left out where no judge was asked."""


def main_table(found: Mapping[str, Evaluated], note: str = "") -> Grid:
    """Every figure, one column per evaluation; rows without any value are left out."""
    each = list(found.values())
    metrics = ", ".join(sorted({name for entry in each for name in entry.breakdown.metrics}))
    rows = [[f"score ({metrics or 'accuracy'})", *(_score(entry.breakdown) for entry in each)]]
    for k in sorted({k for entry in each for k in entry.breakdown.pass_at_k}):
        rows.append([f"pass@{k}", *(percent(entry.breakdown.pass_at_k.get(k)) for entry in each)])
    judged = any(entry.breakdown.accuracy_judged.n for entry in each)
    for title, path, cell in ROWS:
        if judged or path not in JUDGE_COUNTS:
            rows.append([title, *(cell(attrgetter(path)(entry)) for entry in each)])
    rows = [row for row in rows if set(row[1:]) != {"-"}]
    return Grid("Results", ["", *found], rows, f"Percent with 95 % intervals where brackets are. {note}".strip())


def transform_table(found: Mapping[str, Evaluated]) -> Grid | None:
    """Score by orientation; None where nothing was turned."""
    if not any(len(entry.breakdown.by_transform) > 1 for entry in found.values()):
        return None
    rows = [
        [COLUMN_NAMES[column], *(percent(entry.breakdown.by_transform.get(column)) for entry in found.values())]
        for column in [*TRANSFORMS, "other"]
        if column in TRANSFORMS or any(column in entry.breakdown.by_transform for entry in found.values())
    ]
    for name in ("mean_of_six", "mean_of_transformed"):
        rows.append([COLUMN_NAMES[name], *(percent(getattr(entry.breakdown, name)) for entry in found.values())])
    note = "Uncorrupted images only. The published mean of 6 includes Source."
    return Grid("By orientation", ["", *found], rows, note)


def corruption_table(found: Mapping[str, Evaluated]) -> Grid | None:
    """Score by corruption and severity, and that of uncorrupted images; None where nothing was corrupted."""
    levels = sorted({level for e in found.values() for rates in e.breakdown.by_corruption.values() for level in rates})
    if not any(levels):
        return None
    rows = [
        [name, corruption, *(percent(rates.get(level)) for level in levels)]
        for name, entry in found.items()
        for corruption, rates in entry.breakdown.by_corruption.items()
    ]
    headings = [f"severity {level}" if level else "uncorrupted" for level in levels]
    return Grid("By corruption and severity", ["", "corruption", *headings], rows)


def split_table(found: Mapping[str, Evaluated], name: str, title: str) -> Grid | None:
    """Score by `by_source` or `by_category`; None where there is at most one."""
    keys = list(dict.fromkeys(key for entry in found.values() for key in getattr(entry.breakdown, name)))
    if len(keys) < 2:
        return None
    rows = [[key, *(percent(getattr(entry.breakdown, name).get(key)) for entry in found.values())] for key in keys]
    return Grid(title, ["", *found], rows)


def tool_table(pairs: Mapping[str, PairedSummary]) -> Grid | None:
    """Comparison of the same questions with and without the tool; None without any."""
    if not pairs:
        return None
    rows = [[name, *pair_cells(found), found.score.test, p_value(found)] for name, found in pairs.items()]
    headings = ["with - without tool", "questions", "score", "gain", "harm", "test of the score", "p"]
    unscored = max(pairs.values(), key=lambda found: found.num_unscored)
    note = f"Gain, harm: right only with, only without the tool. {unscored_note(unscored)}".strip()
    return Grid("What the tool brings", headings, rows, note)


def pair_cells(found: PairedSummary) -> list[str]:
    """Cells of a paired comparison: questions, difference of the score, gain, harm."""
    return [str(found.num_pairs), change(found.score), percent(found.gain), percent(found.harm)]


def published_table(source: str, found: Mapping[str, Evaluated]) -> Grid | None:
    """The user's results on a benchmark beside published ones; None where there are none."""
    published = published_on(source)
    if not published:
        return None
    columns = [name for name in [*COLUMN_NAMES, "score"] if any(name in entry.scores for entry in published)]
    rows = []
    for name, entry in found.items():
        part = entry.breakdown
        own = part.by_transform | {"mean_of_six": part.mean_of_six, "mean_of_transformed": part.mean_of_transformed}
        own["score"] = part.as_given.get(source, NONE)
        cells = [percent(own.get(column)) for column in columns]
        rows.append([f"this: {name}", "this model", "this code base", *cells])
    for other in published:
        cells = [f"{other.scores[column]:g}" if column in other.scores else "-" for column in columns]
        rows.append([other.work, other.base, f"{other.source}: {other.harness}", *cells])
    headings = ["", "base model", "source: harness", *(COLUMN_NAMES.get(column, column) for column in columns)]
    note = "Other harnesses measure differently. Rows of this code base are over uncorrupted images"
    note += ", score over those that no --data.corruptions turned." if "score" in columns else "."
    return Grid(f"Published on {source}", headings, rows, note)
