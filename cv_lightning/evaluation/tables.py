"""Tables of an evaluation: the same cells as Markdown and on a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from cv_lightning.evaluation.breakdown import NONE, TRANSFORMS, Breakdown
from cv_lightning.evaluation.metrics import EvalSummary
from cv_lightning.evaluation.paired import PairedSummary
from cv_lightning.evaluation.published import published_on
from cv_lightning.evaluation.statistics import Difference, Rate

LOG_WIDTH = 200
"""Characters that a table may have where it does not go to a terminal."""
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

    def markdown(self) -> str:
        """With its title as a heading."""
        lines = [f"### {self.title}", "", _line(self.headings), "|" + "---|" * len(self.headings)]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, title_justify="left", caption=self.note or None, caption_justify="left")
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=number == 0)
        for row in self.rows:
            table.add_row(*row)
        return table


def print_grids(grids: Sequence[Grid], before: str = "", after: str = "") -> None:
    """Print tables, and plain lines around them; in a log, which has no width, without a break in any cell."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    for text in (before, *grids, after):
        if isinstance(text, Grid):
            console.print(text.rich())
        elif text:
            console.print(text, highlight=False, soft_wrap=True)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


# ------------------------------------------------------------------------------------------------ cells
def percent(value: Rate | None) -> str:
    """In percent, with its interval."""
    if value is None or value.n == 0:
        return "-"
    return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def between(bounds: tuple[float, float] | None) -> str:
    """In percent; - where there are none."""
    return "-" if bounds is None else f"{100 * bounds[0]:.1f} - {100 * bounds[1]:.1f}"


def number(value: float) -> str:
    """With two digits."""
    return "-" if math.isnan(value) else f"{value:.2f}"


def change(value: Difference, *, scale: float = 100, digits: int = 1) -> str:
    """Signed, with interval and p."""
    if value.n == 0:
        return "-"
    parts = (f"{scale * part:+.{digits}f}" for part in (value.value, value.low, value.high))
    return "{} [{}, {}]".format(*parts) + f", p {value.p:.2g}"


def p_value(found: PairedSummary) -> str:
    """Of the difference of scores; none where questions are missing because of what their answers were."""
    return "-" if found.num_unscored or not found.num_pairs else f"{found.score.p:.2g}"


def unscored_note(found: PairedSummary) -> str:
    """Why there is no p."""
    return (
        f"{found.num_unscored} questions that a judge left unscored are not compared; the rest is no fair sample of "
        "them, so there is no p."
    )


# ------------------------------------------------------------------------------------------------ main table
def _score(found: Breakdown) -> str:
    """The score, and of how many answers it is not because the judge failed on them."""
    unjudged = f"; {found.num_unjudged} of {found.num_unjudged + found.score.n} unjudged" if found.num_unjudged else ""
    return percent(found.score) + unjudged


def main_table(found: Mapping[str, Evaluated], note: str = "") -> Grid:
    """Every figure, one column an evaluation; rows of which no evaluation has a value are left out."""
    rows: list[list[str]] = []

    def row(title: str, cells: Sequence[str]) -> None:
        if any(cell != "-" for cell in cells):
            rows.append([title, *cells])

    each = list(found.values())
    metrics = ", ".join(sorted({name for entry in each for name in entry.breakdown.metrics}))
    row(f"score ({metrics or 'accuracy'})", [_score(entry.breakdown) for entry in each])
    row("... with the unjudged wrong - right", [between(entry.breakdown.score_bounds) for entry in each])
    judged = any(entry.breakdown.accuracy_judged.n for entry in each)
    row("accuracy, rule alone", [percent(entry.breakdown.accuracy_rule) for entry in each])
    if judged:
        row("accuracy, rule and judge", [percent(entry.breakdown.accuracy_judged) for entry in each])
        row("decided by the judge", [str(entry.breakdown.num_judged) for entry in each])
        row("unscored: judge failed", [str(entry.breakdown.num_unjudged) for entry in each])
    row("accuracy, tool needed", [percent(entry.summary.accuracy) for entry in each])
    row("accuracy, no tool needed", [percent(entry.summary.accuracy_upright) for entry in each])
    row("tool-use success", [percent(entry.summary.tool_use_success) for entry in each])
    row("orientation fixed", [percent(entry.breakdown.orientation_fixed) for entry in each])
    row("needless turning of upright", [percent(entry.summary.spurious) for entry in each])
    row("tool called on upright", [percent(entry.breakdown.tool_on_upright) for entry in each])
    row("tool success", [percent(entry.summary.tool_success) for entry in each])
    row("crop IoU", [percent(entry.breakdown.crop_iou) for entry in each])
    row("crops that show the evidence", [percent(entry.breakdown.crops_faithful) for entry in each])
    row("... before a right answer", [percent(entry.breakdown.crops_faithful_when_right) for entry in each])
    for k in sorted({k for entry in each for k in entry.breakdown.pass_at_k}):
        row(f"pass@{k}", [percent(entry.breakdown.pass_at_k.get(k)) for entry in each])
    row("calls", [number(entry.summary.tool_calls_mean) for entry in each])
    row("operations per answer", [number(entry.breakdown.operations_mean) for entry in each])
    row("turns", [number(entry.summary.turns_mean) for entry in each])
    row("sampled tokens", [number(entry.summary.sampled_tokens_mean) for entry in each])
    row("all tokens", [number(entry.breakdown.length_mean) for entry in each])
    row("trajectories", [str(entry.summary.num_trajectories) for entry in each])
    row("failed (left out)", [str(entry.summary.num_errors) for entry in each])
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
    note = "Uncorrupted pictures alone. The published mean of 6 has Source in it."
    return Grid("By orientation", ["", *found], rows, note)


def corruption_table(found: Mapping[str, Evaluated]) -> Grid | None:
    """Score by corruption and severity, beside that of the uncorrupted; None where nothing was corrupted."""
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
    """With against without the tool on the same questions."""
    if not pairs:
        return None
    rows = [
        [
            name,
            str(found.num_pairs),
            change(found.score).partition(", p")[0],
            percent(found.gain),
            percent(found.harm),
            found.score.test,
            p_value(found),
        ]
        for name, found in pairs.items()
    ]
    headings = ["with - without tool", "questions", "score", "gain", "harm", "test of the score", "p"]
    unscored = max(pairs.values(), key=lambda found: found.num_unscored)
    note = ["Gain, harm: right only with, only without the tool.", unscored_note(unscored)]
    return Grid("What the tool brings", headings, rows, " ".join(note[: 1 + bool(unscored.num_unscored)]))


def published_table(source: str, found: Mapping[str, Evaluated]) -> Grid | None:
    """The user's results on a benchmark and the published ones; None where nothing was published on it."""
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
    note = "Rows of other harnesses were not measured as this one was. Ours are over uncorrupted pictures"
    note += ", score over those that no --data.corruptions turned." if "score" in columns else "."
    return Grid(f"Published on {source}", headings, rows, note)
