"""Facts about single rows for `data check`; worker processes collect them, a span of rows at a time."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
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
from cv_lightning.factory.check_frames import FrameEvidence, frame_evidence
from cv_lightning.factory.check_tokens import TokenCounter
from cv_lightning.factory.near_images import thumbnail
from cv_lightning.images import ImageRule, area, content_hash
from cv_lightning.orientations import orientations_of
from cv_lightning.ranges import NonNegativeInt, PositiveInt, check_ranges
from cv_lightning.types import Task

FileKind = Literal["tasks", "conversations"]
WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "F")
TINY_PX = 8
"""Images with a shorter side than this are noted."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Options and limits of a check. The defaults are the recipe's."""

    reader: ReaderConfig = field(default_factory=ReaderConfig)
    test_files: tuple[str, ...] = ()
    """Held-out files: images that they share with the others are leakage. None: `extra_info.split` tells which rows are
    held out."""
    processor: str = ""
    """Hugging Face folder of a model: its tokenizer counts tokens, and its factor and pixel limits apply."""
    factor: PositiveInt = 32
    """Without a processor, the model sees images whose sides are multiples of this: patch size times merge size."""
    min_pixels: PositiveInt | None = None
    """Smallest number of pixels of an image for the model; by default the processor's, else 784."""
    max_pixels: PositiveInt | None = None
    """Largest number; by default the processor's, else 6,422,528 for tasks and 262,144 for conversations."""
    max_tokens: PositiveInt | None = None
    """Largest number of tokens of a prompt (tasks: 16,384 by default) or a conversation (32,768)."""
    pixels: bool = True
    """Decode every image. False: read headers only, which is fast but finds neither broken pixels nor copies."""
    max_rows: NonNegativeInt = 0
    """Rows inspected per file, evenly spread; 0: all."""
    num_workers: NonNegativeInt = 0
    """Number of processes; 0: one per core if there are rows enough."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(slots=True, kw_only=True)
class RowFacts:
    """Facts about one row."""

    row: int
    """Number in the file, from 0."""
    kind: str = ""
    """Kind of the problem for which training skips the row; empty: training uses it."""
    message: str = ""
    notes: list[str] = field(default_factory=list)
    """Unusual properties for which the row is not skipped."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(width, height) of its images, tool results of a conversation included."""
    image_tokens: int = 0
    tokens: int = 0
    """Tokens of the prompt or the conversation, images included; 0 if they are not counted."""
    digests: list[str] = field(default_factory=list)
    """Hashes of the pixels of the question's images."""
    thumbnails: list[bytes] = field(default_factory=list)
    question: str = ""
    data_source: str = ""
    split: str = ""
    index: str = ""
    """The row's `id`, else its `extra_info.index`."""
    transforms: tuple[str, ...] = ()
    box_frac: float | None = None
    """Fraction of the first image that the box covers."""
    box_model_px: float | None = None
    """Shorter side of the box in pixels of the image that the model sees."""
    evidence: FrameEvidence | None = None
    turns: int = 0
    """Assistant turns of a conversation."""


def token_counter(config: CheckConfig) -> TokenCounter:
    """The counter of the configured processor, which each process loads once.

    Raises:
        CheckpointError: The folder has no processor.
    """
    return _token_counter(config.processor, config.min_pixels, config.max_pixels)


_token_counter = cache(TokenCounter)


@cache
def _tasks(path: Path) -> ParquetRows:
    return ParquetRows([path], NEEDED_COLUMNS, optional=("data_source", "id"))


@cache
def _items(path: Path) -> list[Any]:
    return read_items(path)


def num_rows(path: Path, kind: FileKind) -> int:
    """Rows of a file.

    Raises:
        DataError: It cannot be read.
    """
    return len(_tasks(path)) if kind == "tasks" else len(_items(path))


def content_of_row(path: Path, kind: FileKind, row: int, reader: ReaderConfig) -> Task | Conversation:
    """The task or conversation of a row, its images decoded.

    Raises:
        RowError: The row cannot be used.
    """
    if kind == "tasks":
        return task_of_row(_tasks(path).row(row), path, row, reader)
    return conversation_of_item(_items(path)[row], path, row, reader)


def inspect_rows(
    path: Path, kind: FileKind, rows: Sequence[int], config: CheckConfig, limits: ImageRule
) -> list[RowFacts]:
    """Facts about some rows of a file, in their order."""
    inspector = _Inspector(path, config, limits)
    return [inspector.facts(kind, number) for number in rows]


class _Inspector:
    """Collects the facts about rows of one file."""

    def __init__(self, path: Path, config: CheckConfig, limits: ImageRule) -> None:
        self.path, self.config, self.limits = path, config, limits
        self.folder = Path(config.reader.image_folder or path.parent)

    def facts(self, kind: FileKind, number: int) -> RowFacts:
        """The facts about a row."""
        facts = RowFacts(row=number)
        try:
            if kind == "tasks":
                self._inspect_task(_tasks(self.path).row(number), facts)
            else:
                self._inspect_conversation(_items(self.path)[number], facts)
        except RowError as error:
            facts.kind, facts.message = error.kind, str(error)
        return facts

    def _inspect_task(self, row: Mapping[str, Any], facts: RowFacts) -> None:
        extra = extra_info(row)
        facts.index = str(row.get("id") if row.get("id") is not None else extra.get("index", ""))
        facts.split = str(extra.get("split", ""))
        facts.notes += self._image_notes(image_cells(row))
        facts.evidence = self._box_evidence(extra, row)
        task = task_of_row(row, self.path, facts.row, self.config.reader, decode=self.config.pixels)
        self._add_images(task, task.images, facts)
        if self.config.processor:
            facts.tokens = token_counter(self.config).task(task)
        if task.box is not None:
            (width, height), (seen_width, seen_height) = facts.sizes[0], self.limits.model_size(*facts.sizes[0])
            x1, y1, x2, y2 = task.box
            facts.box_frac = area(task.box) / (width * height)
            facts.box_model_px = min((x2 - x1) * seen_width / width, (y2 - y1) * seen_height / height)

    def _inspect_conversation(self, item: Any, facts: RowFacts) -> None:
        conversation = conversation_of_item(item, self.path, facts.row, self.config.reader, decode=self.config.pixels)
        facts.index = str(item.get("id", ""))
        facts.notes += self._image_notes(item["images"]) + _conversation_notes(conversation)
        facts.turns = len(conversation.turns)
        results = [image for turn in conversation.turns for image in turn.images]
        self._add_images(conversation.task, [*conversation.task.images, *results], facts)
        if self.config.processor:
            facts.tokens = token_counter(self.config).conversation(conversation)

    def _add_images(self, task: Task, images: Sequence[Image.Image], facts: RowFacts) -> None:
        """Add what is known about the task and all images of its row."""
        facts.sizes = [image.size for image in images]
        facts.image_tokens = sum(self.limits.num_tokens(self.limits.model_size(*size)) for size in facts.sizes)
        facts.question, facts.data_source = task.question, task.data_source
        facts.transforms = task.required_transforms
        if any(min(image.size) < TINY_PX for image in task.images):
            facts.notes.append(f"image less than {TINY_PX} pixels high or wide")
        if "crop" in task.required_transforms and task.box is None:
            facts.notes.append("crop required but no box")
        if self.config.pixels:
            facts.digests = [content_hash(image) for image in task.images]
            facts.thumbnails = [thumbnail(image) for image in task.images]

    def _image_notes(self, cells: Sequence[Any]) -> list[str]:
        sources = [image_source(cell, f"images[{number}]", self.folder) for number, cell in enumerate(cells)]
        return [note for source in sources for note in _image_notes(source)]

    def _box_evidence(self, extra: Mapping[str, Any], row: Mapping[str, Any]) -> FrameEvidence | None:
        """Evidence of a row for the frame of its box; None if it has no box or no readable image."""
        try:
            box = raw_box(extra)
            if box is None:
                return None
            transforms = parse_transforms(extra.get("transform"))
            decode = self.config.pixels and bool(orientations_of(transforms))
            source = image_source(image_cells(row)[0], "images[0]", self.folder)
            image = load_image(source, "images[0]", decode=decode)
        except RowError:
            return None  # reading the row names the problem
        return frame_evidence(box, image.size, transforms, image if self.config.pixels else None)


def _conversation_notes(conversation: Conversation) -> list[str]:
    turns = conversation.turns
    notes = {
        "conversation without an answer": not conversation.task.ground_truth,
        "tool call that cannot be parsed": any(turn.call is not None and not turn.call.name for turn in turns),
        "empty assistant turn": any(not turn.text for turn in turns),
    }
    return [note for note, holds in notes.items() if holds]


def _image_notes(source: bytes | Path) -> list[str]:
    """Unusual properties of a stored image that decoding handles."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            properties = {
                "CMYK image (converted to RGB)": image.mode == "CMYK",
                "16-bit or float image (scaled to 8 bits)": image.mode in WIDE_MODES,
                "palette image (converted to RGB)": image.mode == "P",
                "transparent image (laid on white)": (
                    image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
                ),
                "animated image (first frame used)": getattr(image, "is_animated", False),
                "image turned by EXIF (applied; boxes count on the turned one)": is_turned_by_exif(image),
            }
        return [note for note, holds in properties.items() if holds]
    except Exception:  # a decoder may raise anything; reading the row names the problem
        return []
