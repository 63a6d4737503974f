"""Tasks from public benchmarks in the formats in which they are published.

`FORMATS` declares each of them; `configs/eval` names the files to download. What a benchmark's own metric needs
(`metric`, `accepted_answers`, ...) goes into the task's metadata, for `evaluation.scoring`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cv_lightning.data.benchmark import Benchmark, Question, scored_by
from cv_lightning.data.boxes import is_inside
from cv_lightning.data.image_cells import cells_digest, load_images
from cv_lightning.data.readers import TaskFiles, without_marks
from cv_lightning.data.rows import FieldNames, ReaderConfig, RowError, RowFiles, check_text, is_missing
from cv_lightning.data.tables import ItemRows, Table, open_table
from cv_lightning.types import Box, Task

LETTERS = "ABCDEFGHIJ"
BY_LETTER = "Answer with the letter of the right option."
TIRBENCH_CORRECTED = {"60.jpg": "mobi", "62.jpg": "aires"}
"""Answers of task ocr that the benchmark's own scoring replaces, by a part of the image's path."""


def task_files(files: Sequence[str | Path], config: ReaderConfig) -> RowFiles[Task]:
    """The tasks of files in the format the config names.

    Raises:
        DataError: A file does not exist or has another format, or has no usable row.
    """
    return TaskFiles(files, config) if config.format == "codevision" else BenchmarkFiles(files, config)


def format_name(config: ReaderConfig) -> str:
    """Name of the format: for a user's own benchmark, that of its class."""
    return config.format if isinstance(config.format, str) else type(config.format).__name__


def benchmark_of(config: ReaderConfig) -> Benchmark:
    """The benchmark that reads the rows of the configured format, `codevision` excepted."""
    if isinstance(config.format, Benchmark):
        return config.format
    return Columns(config.fields) if config.format == "fields" else FORMATS[config.format]


class BenchmarkFiles(RowFiles[Task]):
    """The questions of a public benchmark.

    Args:
        files: Paths of .parquet, .tsv, .json or .jsonl files.
        config: Format and names.

    Raises:
        DataError: A file does not exist or has another format, or has no usable row.
    """

    def __init__(self, files: Sequence[str | Path], config: ReaderConfig) -> None:
        super().__init__(files, config, "--data.eval_files")
        self._benchmark = benchmark = benchmark_of(config)
        self._tables: list[Table] = []
        for path in self.paths:
            if (rows := benchmark.rows(path)) is None:
                self._tables.append(open_table(path, benchmark.needed, benchmark.optional))
            else:
                self._tables.append(ItemRows(rows, benchmark.needed))
        self._open(map(len, self._tables))

    def read(self, index: int, *, decode: bool = True) -> Task:
        """One question; with `decode` False its images have sizes but no pixels.

        Raises:
            RowError: The row cannot be used.
        """
        file, number = self._index.locate(index)
        folder = Path(self.config.image_folder or self.paths[file].parent)
        try:
            row = self._tables[file].row(number)
            known = {name: None if is_missing(value) else value for name, value in row.items()}
            question = self._benchmark.question(known, folder)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise RowError("schema", f"not a row of format {format_name(self.config)!r} ({error!r})") from error
        return self._task(question, f"{self.names[file]}:{number}", folder, decode)

    def _task(self, question: Question, name: str, folder: Path, decode: bool) -> Task:
        images = load_images(question.images, folder, decode)
        text = without_marks(check_text(question.text, "the question"))
        for answer in question.answers:
            check_text(answer, "an answer")
        if not images or not text or not question.answers:
            raise RowError("incomplete", "no image, no question or no answer")
        # An annotation outside its image is dropped; the question remains valid.
        box = question.box if question.box is not None and is_inside(question.box, images[0].size) else None
        metadata = dict(question.metadata)
        metadata["picture"] = cells_digest(question.images, folder)
        metric = self.config.metric or question.metric
        if metric is not None:
            metadata |= scored_by(metric, question.answers)
        elif len(question.answers) > 1:
            metadata["accepted_answers"] = question.answers
        if question.category:
            metadata["category"] = question.category
        return Task(
            id=name,
            question=text,
            images=images,
            ground_truth=question.answers[0],
            data_source=self.config.data_source or format_name(self.config),
            box=box,
            metadata=metadata,
        )


# ------------------------------------------------------------------------------------------------ the formats
class Columns(Benchmark):
    """One question per row, in plain columns.

    Args:
        names: Names of the columns; `options` may be empty.
        lettered: The options are in columns `A`, `B`, ...; the answer is a letter.
        kept: Columns that go into the task's metadata, with their names there.
    """

    def __init__(
        self, names: FieldNames | None = None, *, lettered: bool = False, kept: Mapping[str, str] | None = None
    ) -> None:
        self.names = names = names or FieldNames()
        self.lettered, self.kept = lettered, dict(kept or {})
        self.needed = (names.question, names.answer, names.image)
        more = (*(LETTERS if lettered else ()), names.options, names.category, *self.kept)
        self.optional = tuple(name for name in more if name)

    def question(self, row: Mapping[str, Any], folder: Path) -> Question:
        """Text with options, if there are any, images and answers."""
        names, answers = self.names, _texts(row[self.names.answer])
        options = _texts(row[names.options]) if names.options and row.get(names.options) else []
        if len(options) > len(LETTERS):
            raise ValueError(f"{len(options)} options, of {len(LETTERS)} at most")
        by_letter = dict(zip(LETTERS, options, strict=False))
        if self.lettered:
            by_letter = {letter: str(row[letter]) for letter in LETTERS if row.get(letter) is not None}
            answers = [_text(row, names.answer).strip()]
        return Question(
            text=_with_options(_text(row, names.question), by_letter),
            images=row[names.image] if isinstance(row[names.image], list) else [row[names.image]],
            answers=answers,
            metric=names.metric,
            category=str(row.get(names.category) or "") if names.category else "",
            metadata={key: row[column] for column, key in self.kept.items() if row.get(column) is not None},
        )


class ChartQAPro(Benchmark):
    """Questions on charts. In a conversation, earlier questions come with their answers and the last one is asked."""

    needed = ("Question", "Answer", "Question Type", "Year", "image")
    optional = ("Paragraph",)

    def question(self, row: Mapping[str, Any], folder: Path) -> Question:
        """The last question, after the paragraph and the earlier turns."""
        questions, answers, kind = _texts(row["Question"]), _texts(row["Answer"]), str(row["Question Type"])
        parts = [str(row.get("Paragraph") or "").strip()]
        if kind == "Conversational":
            parts += [
                f"Q: {question}\nA: {answer}" for question, answer in zip(questions[:-1], answers[:-1], strict=True)
            ]
        return Question(
            text="\n\n".join([*(part for part in parts if part), questions[-1]]),
            images=[row["image"]],
            answers=answers[-1:],
            metric="chartqapro",
            category=kind,
            metadata={"question_type": kind, "year": _texts(row["Year"])},
        )


class VStar(Benchmark):
    """Questions on small targets; a JSON file beside the image may hold their boxes (left, top, width, height)."""

    needed = ("image", "text", "label")
    optional = ("category",)

    def question(self, row: Mapping[str, Any], folder: Path) -> Question:
        """The question, with the box around all targets."""
        beside = (folder / str(row["image"])).with_suffix(".json")
        boxes = json.loads(beside.read_text()).get("bbox", []) if beside.is_file() else []
        corners = [(x, y, x + width, y + height) for x, y, width, height in boxes]
        around: Box | None = None
        if corners:
            left, top, right, bottom = zip(*corners, strict=True)
            around = (float(min(left)), float(min(top)), float(max(right)), float(max(bottom)))
        return Question(
            text=_text(row, "text"),
            images=[row["image"]],
            answers=[_text(row, "label").strip()],
            category=str(row.get("category") or ""),
            box=around,
        )


class TIRBench(Benchmark):
    """One or two images; the answers of task ocr are corrected as in the benchmark's own scoring."""

    needed = ("image_1", "prompt", "answer", "task")
    optional = ("image_2",)

    def question(self, row: Mapping[str, Any], folder: Path) -> Question:
        """The prompt, with the task as its category."""
        is_ocr = row["task"] == "ocr" and isinstance(row["image_1"], str)
        wrong = [name for name in TIRBENCH_CORRECTED if is_ocr and name in row["image_1"]]
        return Question(
            text=_text(row, "prompt"),
            images=[row[key] for key in ("image_1", "image_2") if row.get(key)],
            answers=[TIRBENCH_CORRECTED[wrong[0]] if wrong else _text(row, "answer")],
            metric="tirbench",
            category=str(row["task"]),
        )


def _with_options(question: str, options: Mapping[str, str]) -> str:
    """The question followed by its options, if it has any, and how to name one."""
    lettered = [f"{letter}. {option}" for letter, option in options.items()]
    return "\n".join([question, *lettered, *([BY_LETTER] if lettered else [])])


def _text(row: Mapping[str, Any], key: str) -> str:
    """The text of a column.

    Raises:
        RowError: The column is empty.
    """
    if is_missing(row[key]):
        raise RowError("missing key", f"{key} is empty (null or NaN)")
    return str(row[key])


def _texts(value: Any) -> list[str]:
    """A list of texts from a list, one text, or a number."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [str(item) for item in values if not is_missing(item) and str(item).strip()]


FORMATS: dict[str, Benchmark] = {
    "ocrbench": Columns(FieldNames(category="question_type", metric="ocrbench"), kept={"dataset": "dataset"}),
    "chartqapro": ChartQAPro(),
    "vstar": VStar(),
    "hrbench": Columns(FieldNames(category="category"), lettered=True, kept={"cycle_category": "cycle_category"}),
    "vtcbench": Columns(FieldNames(category="category"), lettered=True, kept={"model_tools_gt": "reference_tools"}),
    "tirbench": TIRBench(),
    "docvqa": Columns(FieldNames(answer="answers", metric="anls"), kept={"questionId": "question_id"}),
}
