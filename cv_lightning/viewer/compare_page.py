"""The page of a comparison: differences with intervals, and flipped questions with both trajectories."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cv_lightning.evaluation.compare import Comparison, comparison_tables, differences, flips
from cv_lightning.evaluation.statistics import Difference
from cv_lightning.files import write_text
from cv_lightning.trajectory import pixels_of
from cv_lightning.types import DataError, Group, Trajectory, TrajectoryImage, Turn
from cv_lightning.viewer.gallery import thumbnail
from cv_lightning.viewer.highlight import highlight
from cv_lightning.viewer.pages import environment, render

LOG = logging.getLogger(__name__)
THUMBNAIL_PX = 224
CALL = "<tool_call>"
MAX_TEXT = 4000
"""Characters of a turn on the page."""
MARGIN = 0.03
"""Free space at both ends of a drawing, as a fraction of its width."""


class Span(NamedTuple):
    """An interval of a drawing, in percent of its width."""

    low: float
    value: float
    high: float
    zero: float
    """Position of no difference."""
    tone: str
    """`right` or `wrong` if the interval is above or below zero, else empty."""


def comparison_page(found: Comparison, first: Mapping[str, Group], second: Mapping[str, Group], max_flips: int) -> str:
    """The page as HTML with embedded images and without script. Texts of models and data are escaped."""
    sections = []
    for title, names in (("Regressions, right in A only", found.lost), ("Gains, right in B only", found.gained)):
        shown = flips(_largest(names, found.changes, max_flips), found.matching, first, second)
        questions = [_question(one, other) for one, other in shown]
        sections.append({"title": title, "total": len(names), "questions": questions})
    tables = comparison_tables(found)
    drawn = iter(spans([part.score for parts in differences(found).values() for part in parts.values()]))
    drawings = [[next(drawn) for _ in parts] for parts in differences(found).values()]
    return render(
        environment().get_template("compare.html.jinja"),
        kind="comparison",
        title=title_of(found),
        found=found,
        verdict=found.verdict,
        verdicts=found.verdicts(),
        tones={"better": "good", "worse": "bad"},
        differences=zip(tables, drawings, strict=False),
        sides=tables[-1],
        sections=sections,
    )


def spans(found: Sequence[Difference]) -> list[Span | None]:
    """Intervals on one axis that includes zero; None for an interval without questions."""
    ends = [end for part in found if part.n for end in (part.low, part.high)]
    start = min(0.0, *ends) if ends else 0.0
    width = (max(0.0, *ends) - start if ends else 0.0) or 1.0

    def place(value: float) -> float:
        return 100 * (MARGIN + (1 - 2 * MARGIN) * (value - start) / width)

    def span(part: Difference) -> Span:
        tone = "right" if part.low > 0 else "wrong" if part.high < 0 else ""
        return Span(place(part.low), place(part.value), place(part.high), place(0.0), tone)

    return [span(part) if part.n else None for part in found]


def title_of(found: Comparison) -> str:
    """The verdict as a heading."""
    sentences = {
        "better": "B is better than A",
        "worse": "B is worse than A",
        "not separated": f"A and B are not separated at {found.overall.num_pairs:,} questions",
        "not comparable": "A and B cannot be compared",
    }
    return sentences[found.verdict.word]


def _largest(names: Sequence[str], changes: Mapping[str, float], most: int) -> list[str]:
    """At most `most` names, the largest changes first; of equal changes that are too many, some evenly spread."""
    chosen: list[str] = []
    for size in sorted({abs(changes[name]) for name in names}, reverse=True):
        chosen += _spread([name for name in names if abs(changes[name]) == size], most - len(chosen))
    return chosen


def _spread(names: Sequence[str], most: int) -> list[str]:
    """At most `most` names, evenly spaced: names are sorted by kind, and the page should show all kinds."""
    count = min(most, len(names))
    return [names[at * len(names) // count] for at in range(count)]


def _question(one: Group, other: Group) -> dict[str, Any]:
    task = one.task
    return {
        "id": task.id,
        "text": task.question[:MAX_TEXT],
        "truth": task.ground_truth,
        "transforms": ", ".join(task.required_transforms) or "none",
        "source": task.data_source,
        "sides": [[_trajectory(trajectory) for trajectory in group.trajectories] for group in (one, other)],
    }


def _trajectory(trajectory: Trajectory) -> dict[str, Any]:
    reward = trajectory.reward
    return {
        "correct": reward.correct if reward else None,
        "answer": trajectory.answer,
        "end": trajectory.end_state.value,
        "given": [_image(image) for image in trajectory.images if image.parent is None],
        "turns": [
            {
                "text": _text(turn)[:MAX_TEXT],
                "code": highlight(turn.tool_call.text[:MAX_TEXT]) if turn.tool_call else [],
                "status": turn.result.status.value if turn.result else "",
                "error": turn.result.error[:MAX_TEXT] if turn.result else "",
                "operations": ", ".join(op.name for op in turn.result.operations) if turn.result else "",
                "said": turn.result.text[:MAX_TEXT] if turn.result else "",
                "images": [_image(trajectory.images[index]) for index in turn.image_indices],
            }
            for turn in trajectory.turns
        ],
    }


def _text(turn: Turn) -> str:
    """The turn's text, without a parsed call, whose code is shown as code."""
    return turn.text.partition(CALL)[0].strip() if turn.tool_call else turn.text


def _image(image: TrajectoryImage) -> dict[str, Any]:
    try:
        data = thumbnail(pixels_of(image.original), THUMBNAIL_PX)
    except DataError as error:
        LOG.warning("%s", error)
        data = ""
    return {"data": data, "size": f"{image.original.width}x{image.original.height}"}


def write_comparison(
    found: Comparison,
    first: Mapping[str, Group],
    second: Mapping[str, Group],
    out: Path,
    max_flips: int = 30,
) -> None:
    """Write `compare.json` and `compare.html` into a folder, which is made if it does not exist.

    The page shows the trajectories of at most `max_flips` questions of each direction, from the groups by question.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "compare.json", json.dumps(found.to_json(), indent=1) + "\n")
    write_text(out / "compare.html", comparison_page(found, first, second, max_flips))
