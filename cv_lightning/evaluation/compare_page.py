"""The page of a comparison: differences in tables, and the flipped questions with both trajectories side by side."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from cv_lightning.evaluation.compare import Comparison, flips
from cv_lightning.evaluation.gallery import thumbnail
from cv_lightning.evaluation.tables import Grid
from cv_lightning.trajectory import GroupRecord, ImageRecord, TrajectoryRecord
from cv_lightning.types import DataError

LOG = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "templates"
THUMBNAIL_PX = 224
MAX_TEXT = 4000
"""Characters of a turn that the page shows."""


def render(
    found: Comparison,
    first: Mapping[str, GroupRecord],
    second: Mapping[str, GroupRecord],
    grids: Sequence[Grid],
    max_flips: int,
) -> str:
    """The page as HTML, pictures inside, no script. Texts of models and data are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    sections = []
    for title, names in (("Right in B only", found.gained), ("Right in A only", found.lost)):
        shown = flips(_spread(names, max_flips), found.matching, first, second)
        questions = [_question(one, other) for one, other in shown]
        sections.append({"title": title, "total": len(names), "questions": questions})
    return environment.get_template("compare.html.jinja").render(found=found, grids=grids, sections=sections)


def _spread(names: Sequence[str], most: int) -> list[str]:
    """At most so many, evenly spaced: ids stand by kind, and a page of one kind would mislead."""
    count = min(most, len(names))
    return [names[at * len(names) // count] for at in range(count)]


def _question(one: GroupRecord, other: GroupRecord) -> dict[str, Any]:
    task = one.task
    return {
        "id": task.id,
        "text": task.question[:MAX_TEXT],
        "truth": task.ground_truth,
        "transforms": ", ".join(task.required_transforms) or "none",
        "source": task.data_source,
        "sides": [[_trajectory(trajectory) for trajectory in group.trajectories] for group in (one, other)],
    }


def _trajectory(trajectory: TrajectoryRecord) -> dict[str, Any]:
    reward = trajectory.reward
    return {
        "correct": reward.correct if reward else None,
        "answer": trajectory.answer,
        "end": trajectory.end_state.value,
        "given": [_picture(image) for image in trajectory.images if image.parent is None],
        "turns": [
            {
                "text": turn.text[:MAX_TEXT],
                "status": turn.result.status.value if turn.result else "",
                "error": turn.result.error[:MAX_TEXT] if turn.result else "",
                "operations": ", ".join(op.name for op in turn.result.operations) if turn.result else "",
                "picture": _picture(trajectory.images[turn.image_index]) if turn.image_index is not None else None,
            }
            for turn in trajectory.turns
        ],
    }


def _picture(image: ImageRecord) -> dict[str, Any]:
    try:
        data = thumbnail(image.load(), THUMBNAIL_PX)
    except DataError as error:
        LOG.warning("%s", error)
        data = ""
    return {"data": data, "size": f"{image.size[0]}x{image.size[1]}"}
