"""What `data check` learns of each row; runs in worker processes, a span of rows at a time."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from cv_lightning.data.chunks import ParquetRows
from cv_lightning.data.conversations import Conversation
from cv_lightning.data.image_cells import image_source, is_turned_by_exif, load_image
from cv_lightning.data.readers import (
    NEEDED_COLUMNS,
    extra_info,
    image_cells,
    parse_transforms,
    raw_box,
    task_of_row,
)
from cv_lightning.data.rows import ReaderConfig, RowError
from cv_lightning.data.sft_json import conversation_of_item
from cv_lightning.data.tables import read_items
from cv_lightning.factory.check_copies import thumbnail
from cv_lightning.factory.check_frames import FrameEvidence, frame_evidence
from cv_lightning.factory.check_tokens import TokenCounter
from cv_lightning.images import ImageRule, content_hash
from cv_lightning.orientations import orientations_of
from cv_lightning.types import Box, Task

FileKind = Literal["tasks", "conversations"]
WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "F")
TINY_PX = 8
"""Pictures whose shorter side is less are worth a note."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FactSettings:
    """What is looked at, and at which limits."""

    reader: ReaderConfig
    limits: ImageRule
    pixels: bool
    """Decode every image: finds broken pixels and copies. Otherwise headers only."""
    processor: str = ""
    """Folder of the model whose tokens are counted; empty: texts are not counted."""
    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass(slots=True, kw_only=True)
class RowFacts:
    """One row."""

    row: int
    """Number in the file, from 0."""
    kind: str = ""
    """Kind of the problem for which training skips the row; empty: it is used."""
    message: str = ""
    notes: list[str] = field(default_factory=list)
    """Kinds of what is odd, but no reason to skip the row."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(width, height) of its images, tool results of a conversation included."""
    image_tokens: int = 0
    tokens: int = 0
    """Of the prompt or the conversation, images included; 0 where they are not counted."""
    digests: list[str] = field(default_factory=list)
    """Hash of the pixels of the question's images."""
    thumbnails: list[bytes] = field(default_factory=list)
    question: str = ""
    data_source: str = ""
    split: str = ""
    index: str = ""
    """`id`, else `extra_info.index`, of the row as the file has it."""
    transforms: tuple[str, ...] = ()
    box_frac: float | None = None
    """Share of the first image that the box covers."""
    box_model_px: float | None = None
    """Shorter side of the box in pixels of the image as the model sees it."""
    evidence: FrameEvidence | None = None
    turns: int = 0
    """Assistant turns of a conversation."""


@cache
def token_counter(processor: str, min_pixels: int | None, max_pixels: int | None) -> TokenCounter:
    """A counter, loaded once a process."""
    return TokenCounter(processor, min_pixels, max_pixels)


@cache
def _tasks(path: Path) -> ParquetRows:
    return ParquetRows([path], NEEDED_COLUMNS, optional=("data_source", "id"))


@cache
def _items(path: Path) -> list[Any]:
    return read_items(path)


def num_rows(path: Path, kind: FileKind) -> int:
    """Rows of a file.

    Raises:
        DataError: it cannot be read.
    """
    return len(_tasks(path)) if kind == "tasks" else len(_items(path))


def images_of_row(path: Path, kind: FileKind, row: int, reader: ReaderConfig) -> tuple[Image.Image, ...]:
    """The decoded images of a row's question.

    Raises:
        RowError: the row cannot be used.
    """
    if kind == "tasks":
        return task_of_row(_tasks(path).row(row), path, row, reader).images
    return conversation_of_item(_items(path)[row], path, row, reader).task.images


def inspect_rows(path: Path, kind: FileKind, rows: Sequence[int], settings: FactSettings) -> list[RowFacts]:
    """Facts about some rows of a file, in their order."""
    return list(_inspect(path, kind, rows, settings))


def _inspect(path: Path, kind: FileKind, rows: Sequence[int], settings: FactSettings) -> Iterator[RowFacts]:
    for number in rows:
        facts = RowFacts(row=number)
        try:
            if kind == "tasks":
                _inspect_task(_tasks(path).row(number), path, facts, settings)
            else:
                _inspect_conversation(_items(path)[number], path, facts, settings)
        except RowError as error:
            facts.kind, facts.message = error.kind, str(error)
        yield facts


# ------------------------------------------------------------------------------------------------ one row
def _inspect_task(row: Mapping[str, Any], path: Path, facts: RowFacts, settings: FactSettings) -> None:
    folder = Path(settings.reader.image_folder or path.parent)
    extra = extra_info(row)
    facts.index = str(row.get("id") if row.get("id") is not None else extra.get("index", ""))
    facts.split = str(extra.get("split", ""))
    for number, cell in enumerate(image_cells(row)):
        facts.notes += _image_notes(image_source(cell, f"images[{number}]", folder))
    facts.evidence = _box_evidence(extra, row, folder, settings)
    task = task_of_row(row, path, facts.row, settings.reader, decode=settings.pixels)
    _note_task(task, facts, settings)
    facts.sizes = [image.size for image in task.images]
    facts.image_tokens = _image_tokens(task.images, settings)
    if settings.processor:
        facts.tokens = token_counter(settings.processor, settings.min_pixels, settings.max_pixels).task(task)
    if task.box is not None:
        _measure_box(task.box, task.images[0].size, facts, settings)


def _inspect_conversation(item: Any, path: Path, facts: RowFacts, settings: FactSettings) -> None:
    folder = Path(settings.reader.image_folder or path.parent)
    conversation = conversation_of_item(item, path, facts.row, settings.reader, decode=settings.pixels)
    facts.index = str(item.get("id", ""))
    for number, cell in enumerate(item["images"]):
        facts.notes += _image_notes(image_source(cell, f"images[{number}]", folder))
    facts.turns = len(conversation.turns)
    facts.notes += _conversation_notes(conversation)
    _note_task(conversation.task, facts, settings)
    shown = [turn.result_image for turn in conversation.turns if turn.result_image is not None]
    images = [*conversation.task.images, *shown]
    facts.sizes = [image.size for image in images]
    facts.image_tokens = _image_tokens(images, settings)
    if settings.processor:
        counter = token_counter(settings.processor, settings.min_pixels, settings.max_pixels)
        facts.tokens = counter.conversation(conversation)


def _note_task(task: Task, facts: RowFacts, settings: FactSettings) -> None:
    facts.question = task.question
    facts.data_source = task.data_source
    facts.transforms = task.required_transforms
    if any(min(image.size) < TINY_PX for image in task.images):
        facts.notes.append(f"image less than {TINY_PX} pixels high or wide")
    if "crop" in task.required_transforms and task.box is None:
        facts.notes.append("crop required but no box")
    if settings.pixels:
        facts.digests = [content_hash(image) for image in task.images]
        facts.thumbnails = [thumbnail(image) for image in task.images]


def _conversation_notes(conversation: Conversation) -> list[str]:
    notes = []
    if not conversation.task.ground_truth:
        notes.append("conversation without an answer")
    if any(turn.call is not None and not turn.call.name for turn in conversation.turns):
        notes.append("tool call that cannot be parsed")
    if any(not turn.text for turn in conversation.turns):
        notes.append("empty assistant turn")
    return notes


def _image_notes(source: bytes | Path) -> list[str]:
    """What is odd about a stored image but handled: it is converted, turned, or its first frame is used."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            notes = []
            if image.mode == "CMYK":
                notes.append("CMYK image (converted to RGB)")
            if image.mode in WIDE_MODES:
                notes.append("16-bit or float image (scaled to 8 bits)")
            if image.mode == "P":
                notes.append("palette image (converted to RGB)")
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                notes.append("transparent image (laid on white)")
            if getattr(image, "is_animated", False):
                notes.append("animated image (first frame used)")
            if is_turned_by_exif(image):
                notes.append("image turned by EXIF (applied; boxes count on the turned one)")
            return notes
    except Exception:
        return []  # a problem of the row, which its reader names


def _image_tokens(images: Sequence[Image.Image], settings: FactSettings) -> int:
    sizes = (settings.limits.model_size(*image.size) for image in images)
    return sum(settings.limits.num_tokens(size) for size in sizes)


def _measure_box(box: Box, size: tuple[int, int], facts: RowFacts, settings: FactSettings) -> None:
    width, height = box[2] - box[0], box[3] - box[1]
    seen = settings.limits.model_size(*size)
    facts.box_frac = width * height / (size[0] * size[1])
    facts.box_model_px = min(width * seen[0] / size[0], height * seen[1] / size[1])


def _box_evidence(
    extra: Mapping[str, Any], row: Mapping[str, Any], folder: Path, settings: FactSettings
) -> FrameEvidence | None:
    """Which frame a row's box speaks for; None where it has no box, or no picture."""
    try:
        box = raw_box(extra)
        if box is None:
            return None
        transforms = parse_transforms(extra.get("transform"))
        is_turned = bool(orientations_of(transforms))
        source = image_source(image_cells(row)[0], "images[0]", folder)
        image = load_image(source, "images[0]", decode=settings.pixels and is_turned)
    except RowError:
        return None  # named where the row is read
    return frame_evidence(box, image.size, transforms, image if settings.pixels else None)
