"""Public benchmarks in the formats that they are published in, to tasks.

Each format is one function from a row to a `Question`; `configs/eval` says for each benchmark which files to download.
What the benchmark's own metric needs (`metric`, `accepted_answers`, ...) goes into the task's metadata, for
`evaluation.scoring`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cv_lightning.data.boxes import is_inside
from cv_lightning.data.image_cells import cells_digest, load_images
from cv_lightning.data.readers import TaskFiles, without_marks
from cv_lightning.data.rows import (
    FieldNames,
    ListedRowFiles,
    ReaderConfig,
    RowError,
    RowFiles,
    check_text,
    expand_files,
    is_missing,
    unique_names,
)
from cv_lightning.data.tables import Table, open_table
from cv_lightning.types import Box, Task

LETTERS = "ABCDEFGHIJ"
BY_LETTER = "Answer with the letter of the right option."
TIRBENCH_MENDED = {"60.jpg": "mobi", "62.jpg": "aires"}
"""Answers of task ocr that the benchmark's own scoring replaces, by what the picture's path has in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a row says."""

    text: str
    images: Sequence[Any]
    """Bytes, paths, mappings with either, or base64 texts."""
    answers: list[str]
    """Any of them is right; the first is the ground truth."""
    metric: str | None = None
    """Of `evaluation.scoring`; None: the project's rule."""
    category: str = ""
    box: Box | None = None
    """Where the evidence is, in pixels of the first image."""
    metadata: dict[str, Any] = field(default_factory=dict)


class Format(NamedTuple):
    """How one benchmark is laid out."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[Mapping[str, Any], Path], Question]
    """From a row and the folder that its image paths start from."""


def task_files(files: Sequence[str | Path], config: ReaderConfig) -> RowFiles[Task]:
    """The tasks of files in whichever format the config names.

    Raises:
        DataError: a file is missing or of another format, or none of its rows can be used.
    """
    return TaskFiles(files, config) if config.format == "codevision" else BenchmarkFiles(files, config)


class BenchmarkFiles(ListedRowFiles[Task]):
    """The questions of a public benchmark.

    Args:
        files: .parquet, .tsv, .json or .jsonl.
        config: format and names.

    Raises:
        DataError: a file is missing or of another format, or none of its rows can be used.
    """

    def __init__(self, files: Sequence[str | Path], config: ReaderConfig) -> None:
        super().__init__(expand_files(files, "--data.eval_files"), config)
        self._names = unique_names(self.paths)
        self._format = by_fields(config.fields) if config.format == "fields" else FORMATS[config.format]
        self._tables: list[Table] = [
            open_table(path, self._format.needed, self._format.optional) for path in self.paths
        ]
        self._open([len(rows) for rows in self._tables])

    def read(self, index: int, *, decode: bool = True) -> Task:
        """One question; with `decode` False its images have sizes but no pixels.

        Raises:
            RowError: the row cannot be used.
        """
        file, number = self.locate(index)
        folder = Path(self.config.image_folder or self.paths[file].parent)
        try:
            row = self._tables[file].row(number)
            question = self._format.parse({k: None if is_missing(v) else v for k, v in row.items()}, folder)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise RowError("schema", f"not a row of format {self.config.format!r} ({error!r})") from error
        return self._task(question, f"{self._names[file]}:{number}", folder, decode)

    def _task(self, question: Question, name: str, folder: Path, decode: bool) -> Task:
        images = load_images(question.images, folder, decode)
        text = without_marks(check_text(question.text, "the question"))
        for answer in question.answers:
            check_text(answer, "an answer")
        if not images or not text or not question.answers:
            raise RowError("incomplete", "no image, no question or no answer")
        # an annotation beyond its picture shows nothing, but the question can still be asked
        box = question.box if question.box is not None and is_inside(question.box, images[0].size) else None
        metadata = dict(question.metadata)
        metadata["picture"] = cells_digest(question.images, folder)
        if question.metric or len(question.answers) > 1:
            metadata["accepted_answers"] = question.answers
        if question.metric:
            metadata["metric"] = question.metric
        if question.category:
            metadata["category"] = question.category
        return Task(
            id=name,
            question=text,
            images=images,
            ground_truth=question.answers[0],
            data_source=self.config.data_source or self.config.format,
            box=box,
            metadata=metadata,
        )


# ------------------------------------------------------------------------------------------------ the formats
def _ocrbench(row: Mapping[str, Any], folder: Path) -> Question:
    return Question(
        text=_said(row, "question"),
        images=[row["image"]],
        answers=_texts(row["answer"]),
        metric="ocrbench",
        category=str(row.get("question_type") or ""),
        metadata={"dataset": row.get("dataset")},
    )


def _chartqapro(row: Mapping[str, Any], folder: Path) -> Question:
    """Of a conversation the earlier turns are given with their answers, and the last one is asked."""
    questions, answers, kind = _texts(row["Question"]), _texts(row["Answer"]), str(row["Question Type"])
    parts = [str(row.get("Paragraph") or "").strip()]
    if kind == "Conversational":
        parts += [f"Q: {asked}\nA: {said}" for asked, said in zip(questions[:-1], answers[:-1], strict=True)]
    return Question(
        text="\n\n".join([*(part for part in parts if part), questions[-1]]),
        images=[row["image"]],
        answers=answers[-1:],
        metric="chartqapro",
        category=kind,
        metadata={"question_type": kind, "year": _texts(row["Year"])},
    )


def _vstar(row: Mapping[str, Any], folder: Path) -> Question:
    """The targets' boxes, as left, top, width, height, stand in a JSON file beside the image; else there is no box."""
    beside = (folder / str(row["image"])).with_suffix(".json")
    boxes = json.loads(beside.read_text()).get("bbox", []) if beside.is_file() else []
    corners = [(x, y, x + width, y + height) for x, y, width, height in boxes]
    around: Box | None = None
    if corners:
        left, top, right, bottom = zip(*corners, strict=True)
        around = (float(min(left)), float(min(top)), float(max(right)), float(max(bottom)))
    return Question(
        text=_said(row, "text"),
        images=[row["image"]],
        answers=[_said(row, "label").strip()],
        category=str(row.get("category") or ""),
        box=around,
    )


def _hrbench(row: Mapping[str, Any], folder: Path) -> Question:
    return Question(
        text=_with_options(_said(row, "question"), _letter_columns(row)),
        images=[row["image"]],
        answers=[_said(row, "answer").strip()],
        category=str(row.get("category") or ""),
        metadata={"cycle_category": row.get("cycle_category")},
    )


def _vtcbench(row: Mapping[str, Any], folder: Path) -> Question:
    """With options in columns, or without any; the reference chain of tools is kept, never shown."""
    return Question(
        text=_with_options(_said(row, "question"), _letter_columns(row)),
        images=[row["image"]],
        answers=[_said(row, "answer").strip()],
        category=str(row.get("category") or ""),
        metadata={"reference_tools": row["model_tools_gt"]} if row.get("model_tools_gt") else {},
    )


def _letter_columns(row: Mapping[str, Any]) -> dict[str, str]:
    """Letter to option, of the columns `A`, `B`, ... that are filled."""
    return {letter: str(row[letter]) for letter in LETTERS if row.get(letter) is not None}


def _with_options(question: str, options: Mapping[str, str]) -> str:
    """The question with its options and how to name one; alone where it has none."""
    lettered = [f"{letter}. {option}" for letter, option in options.items()]
    return "\n".join([question, *lettered, *([BY_LETTER] if lettered else [])])


def _tirbench(row: Mapping[str, Any], folder: Path) -> Question:
    images = [row[key] for key in ("image_1", "image_2") if row.get(key)]
    is_ocr = row["task"] == "ocr" and isinstance(row["image_1"], str)
    wrong = [name for name in TIRBENCH_MENDED if is_ocr and name in row["image_1"]]
    return Question(
        text=_said(row, "prompt"),
        images=images,
        answers=[TIRBENCH_MENDED[wrong[0]] if wrong else _said(row, "answer")],
        metric="tirbench",
        category=str(row["task"]),
    )


def _docvqa(row: Mapping[str, Any], folder: Path) -> Question:
    return Question(
        text=_said(row, "question"),
        images=[row["image"]],
        answers=_texts(row["answers"]),
        metric="anls",
        metadata={"question_id": row.get("questionId")},
    )


def by_fields(names: FieldNames) -> Format:
    """The format of files that hold plain columns under names of their own."""

    def parse(row: Mapping[str, Any], folder: Path) -> Question:
        options = _texts(row[names.options]) if names.options and row.get(names.options) else []
        if len(options) > len(LETTERS):
            raise ValueError(f"{len(options)} options, of {len(LETTERS)} at most")
        return Question(
            text=_with_options(_said(row, names.question), dict(zip(LETTERS, options, strict=False))),
            images=row[names.image] if isinstance(row[names.image], list) else [row[names.image]],
            answers=_texts(row[names.answer]),
            metric=names.metric,
            category=str(row.get(names.category) or "") if names.category else "",
        )

    optional = tuple(name for name in (names.options, names.category) if name)
    return Format((names.question, names.answer, names.image), optional, parse)


def _said(row: Mapping[str, Any], key: str) -> str:
    """The text of a column.

    Raises:
        RowError: it is empty.
    """
    if is_missing(row[key]):
        raise RowError("missing key", f"{key} is empty (null or NaN)")
    return str(row[key])


def _texts(value: Any) -> list[str]:
    """A list of texts from a list, one text, or a number."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [str(item) for item in values if not is_missing(item) and str(item).strip()]


FORMATS = {
    "ocrbench": Format(("question", "answer", "image"), ("dataset", "question_type"), _ocrbench),
    "chartqapro": Format(("Question", "Answer", "Question Type", "Year", "image"), ("Paragraph",), _chartqapro),
    "vstar": Format(("image", "text", "label"), ("category",), _vstar),
    "hrbench": Format(("question", "answer", "image"), (*LETTERS, "category", "cycle_category"), _hrbench),
    "vtcbench": Format(("question", "answer", "image"), (*LETTERS, "category", "model_tools_gt"), _vtcbench),
    "tirbench": Format(("image_1", "prompt", "answer", "task"), ("image_2",), _tirbench),
    "docvqa": Format(("question", "answers", "image"), ("questionId",), _docvqa),
}
