"""The page of `data check`: one HTML file that loads nothing, with small pictures of what comes twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from cv_lightning.files import write_text
from cv_lightning.viewer.gallery import thumbnail
from cv_lightning.viewer.pages import environment, style

THUMBNAIL_PX = 128
MAX_PICTURES = 80
"""Embedded at most."""
CHART_WIDTH, CHART_HEIGHT = 400, 90


def write_check_page(
    path: Path, report: Mapping[str, Any], images_of: Callable[[str, int], Sequence[Image.Image]]
) -> None:
    """Write the page.

    Args:
        path: file to write.
        report: of `check_files`.
        images_of: The images of a row, by file and number.
    """
    templates = environment().overlay(undefined=jinja2.Undefined)  # parts of the report may be missing
    templates.filters |= {"bars": _bars, "name": lambda p: Path(p).name, "place": _place, "whole": _whole}
    names = [Path(file["path"]).name for file in report["files"]]
    title = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    page = templates.get_template("check.html.jinja").render(
        report=report, title=title, pictures=_pictures(report, images_of), style=style()
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


# ------------------------------------------------------------------------------------------------ pictures
def _pictures(report: Mapping[str, Any], images_of: Callable[[str, int], Sequence[Image.Image]]) -> dict[str, str]:
    """Place to a small image as a data URI."""
    pictures: dict[str, str] = {}
    for place in _places(report["copies"]):
        if len(pictures) >= MAX_PICTURES:
            break
        if _place(place) not in pictures:
            images = images_of(place["path"], int(place["row"]))
            pictures[_place(place)] = thumbnail(images[int(place["image"])], THUMBNAIL_PX)
    return pictures


def _places(copies: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The pairs that the page shows, leaks first."""
    if copies is None:
        return
    for part, sides in (("leakage", ("held_out", "train")), ("near_copies", ("image", "like"))):
        for pair in copies[part]["pairs"][:60]:
            yield from (pair[side] for side in sides)
