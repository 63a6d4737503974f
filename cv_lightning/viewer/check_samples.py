"""Sample rows of `data check` as its page shows them: images with boxes, question, turns and the row's problems.

The choice depends on the report alone, so the same files give the same page. Number of rows and bytes of images are
bounded, whatever the files hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from cv_lightning.data.conversations import Conversation
from cv_lightning.types import CVLightningError, Task
from cv_lightning.viewer.gallery import thumbnail

USABLE_ROWS = 6
"""Usable rows of a file, evenly spread."""
NOTABLE_ROWS = 6
"""Rows of a file that are skipped, noted or changed by a limit: one of each kind."""
MAX_FILES = 12
MAX_IMAGE_BYTES = 4_000_000
SAMPLE_PX = 320
MAX_TEXT = 2000

Content = Callable[[str, int], Task | Conversation]
"""Reads a row by file and number; a row that cannot be used raises."""


@dataclass(slots=True, kw_only=True)
class SampleImage:
    """An image on the page."""

    data: str
    """Data URI; empty beyond the limit on bytes."""
    width: int
    height: int
    box: tuple[float, float, float, float] | None = None
    """In pixels of the image."""


@dataclass(slots=True, kw_only=True)
class SampleRow:
    """A row on the page."""

    number: int
    problem: str
    """Reason for which training skips the row; empty for a usable one."""
    notes: list[str]
    question: str = ""
    truth: str = ""
    source: str = ""
    transforms: str = ""
    images: list[SampleImage] = field(default_factory=list)
    turns: list[tuple[str, str, SampleImage | None]] = field(default_factory=list)
    """Speaker, text and image of a conversation's turns."""


@dataclass(slots=True)
class Samples:
    """Collects the sample rows of files, up to `MAX_IMAGE_BYTES` of images."""

    content: Content
    num_bytes: int = 0

    def of_report(self, report: Mapping[str, Any]) -> dict[str, list[SampleRow]]:
        """Sample rows by file, of the first `MAX_FILES` files."""
        return {file["path"]: self._of_file(report, file) for file in report["files"][:MAX_FILES]}

    def _of_file(self, report: Mapping[str, Any], file: Mapping[str, Any]) -> list[SampleRow]:
        path = file["path"]
        skipped, noted = _kinds(report["problems"], path), _kinds([*report["notes"], *report["cut"]], path)
        chosen = dict.fromkeys([*_one_of_each(skipped), *_one_of_each(noted)][:NOTABLE_ROWS])
        usable = [row for row in range(file["rows"]) if row not in skipped]
        chosen |= dict.fromkeys(usable[at * len(usable) // USABLE_ROWS] for at in range(USABLE_ROWS) if usable)
        return [self._row(path, row, skipped.get(row, []), noted.get(row, [])) for row in sorted(chosen)]

    def _row(self, path: str, number: int, problems: list[str], notes: list[str]) -> SampleRow:
        try:
            found = self.content(path, number)
        except CVLightningError as error:  # the row itself, or a file that has changed meanwhile
            return SampleRow(number=number, problem=_cut(f"{', '.join(problems)}: {error}".strip(": ")), notes=notes)
        task = found.task if isinstance(found, Conversation) else found
        row = SampleRow(
            number=number,
            problem=", ".join(problems),
            notes=notes,
            question=_cut(task.question),
            truth=_cut(task.ground_truth),
            source=_cut(task.data_source),
            transforms=", ".join(task.required_transforms),
            images=[self._image(image, None if at else task.box) for at, image in enumerate(task.images)],
        )
        for turn in found.turns if isinstance(found, Conversation) else ():
            row.turns.append(("assistant" if turn.learn else "assistant, not trained", _cut(turn.text), None))
            if turn.is_answered:
                shown = [self._image(image, None) for image in turn.images]
                said = turn.response_text or "\n".join(filter(None, (turn.said, turn.error)))
                row.turns.append(("tool", _cut(said), shown[0] if shown else None))
                row.turns += [("tool", "", image) for image in shown[1:]]
        return row

    def _image(self, image: Image.Image, box: tuple[float, float, float, float] | None) -> SampleImage:
        data = thumbnail(image, SAMPLE_PX) if self.num_bytes < MAX_IMAGE_BYTES else ""
        self.num_bytes += len(data)
        return SampleImage(data=data, width=image.width, height=image.height, box=box)


def _kinds(entries: Iterable[Mapping[str, Any]], path: str) -> dict[int, list[str]]:
    """Kinds of the listed rows of a file, by row."""
    found: dict[int, list[str]] = {}
    for entry in entries:
        for row in entry["rows"].get(path, ()):
            found.setdefault(row, []).append(entry["kind"])
    return found


def _one_of_each(kinds: Mapping[int, list[str]]) -> list[int]:
    """The first row of every kind."""
    first: dict[str, int] = {}
    for row in sorted(kinds):
        for kind in kinds[row]:
            first.setdefault(kind, row)
    return list(first.values())


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} [... {len(text) - MAX_TEXT} more characters]"
