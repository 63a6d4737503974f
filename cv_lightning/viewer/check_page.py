"""The page of `data check`: one self-contained HTML file, with sample rows and repeated images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from cv_lightning.data.conversations import Conversation
from cv_lightning.files import write_text
from cv_lightning.viewer.check_samples import Content, Samples
from cv_lightning.viewer.gallery import thumbnail
from cv_lightning.viewer.pages import environment, render

THUMBNAIL_PX = 128
MAX_THUMBNAILS = 80
"""Thumbnails on the page at most."""
CHART_WIDTH, CHART_HEIGHT = 400, 90


def write_check_page(path: Path, report: Mapping[str, Any], content: Content) -> None:
    """Write the page of a report of `check_files`; `content` reads a row by file and number."""
    templates = environment().overlay(undefined=jinja2.Undefined)  # parts of the report may be missing
    templates.filters |= {"bars": _bars, "name": lambda p: Path(p).name, "place": _place, "whole": _whole}
    names = [Path(file["path"]).name for file in report["files"]]
    title = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    page = render(
        templates.get_template("check.html.jinja"),
        kind="data check",
        title=title,
        report=report,
        thumbnails=_thumbnails(report, content),
        samples=Samples(content).of_report(report),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def _whole(number: float) -> str:
    return f"{number:,.0f}"


def _place(place: Mapping[str, Any]) -> str:
    return f"{Path(place['path']).name}, row {place['row']}"


def _bars(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rectangles of a histogram, a gap between them."""
    step, highest = CHART_WIDTH / len(values["counts"]), max(values["counts"])
    return [
        {
            "x": round(at * step + 1, 2),
            "y": round(CHART_HEIGHT * (1 - count / highest), 2),
            "width": round(step - 2, 2),
            "height": round(CHART_HEIGHT * count / highest, 2),
            "title": f"{_whole(values['edges'][at])} to {_whole(values['edges'][at + 1])}: {count}",
        }
        for at, count in enumerate(values["counts"])
    ]


def _thumbnails(report: Mapping[str, Any], content: Content) -> dict[str, str]:
    """Data URIs of the images that the page shows, by place; leaks first."""
    thumbnails: dict[str, str] = {}
    for part, sides in (("leakage", ("held_out", "train")), ("near_copies", ("image", "like"))):
        pairs = report["copies"][part]["pairs"][:60] if report["copies"] else ()
        for place in (pair[side] for pair in pairs for side in sides):
            if _place(place) not in thumbnails and len(thumbnails) < MAX_THUMBNAILS:
                found = content(place["path"], int(place["row"]))
                task = found.task if isinstance(found, Conversation) else found
                thumbnails[_place(place)] = thumbnail(task.images[int(place["image"])], THUMBNAIL_PX)
    return thumbnails
