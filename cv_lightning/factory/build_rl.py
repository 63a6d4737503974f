"""`data build-rl`: RL tasks from a table, selected by pass rate, without duplicates and without images of test sets."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cv_lightning.data.writers import write_task_parquet
from cv_lightning.factory.build_files import ProgressFile, Rejections, Show, write_report
from cv_lightning.factory.difficulty import DifficultyConfig, PassRates, is_informative, measure, read_pass_rates
from cv_lightning.factory.overlap import KnownImages, Match, OrientedImages, images_of
from cv_lightning.factory.plans import check_transforms, given_box, given_image, is_small
from cv_lightning.factory.vqa_table import Region, TableConfig, VqaRow, VqaTable
from cv_lightning.images import area
from cv_lightning.orientations import ORIENTATIONS
from cv_lightning.ranges import Fraction, NonNegativeInt, check_ranges
from cv_lightning.types import DataError, Task


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """Operations that the tasks require."""

    transforms: tuple[str, ...] = ORIENTATIONS
    """Transforms applied to images, each equally often; empty: none."""
    turned_share: Fraction = 0.5
    """Fraction of the tasks with a turned image."""
    small_share: Fraction = 0.02
    """A box of at most this fraction of its image's area requires a crop."""
    region_questions: NonNegativeInt = 0
    """Questions on small annotated text per image, besides the row's own (as in MVToolBench: read the line that begins
    with a word, count a letter in it). They never state where the text is."""
    region_share: Fraction = 1e-3
    """Largest area of such text, as a fraction of the image's."""

    def __post_init__(self) -> None:
        check_ranges(self, "plan")
        check_transforms(self)


@dataclass(frozen=True, kw_only=True)
class BuildRL:
    """A build of RL tasks."""

    files: list[str]
    """Tables: .parquet, .jsonl, .csv or .tsv with an image, a question and an answer per row, and perhaps a box."""
    out: Path
    """Parquet file to write; the report goes to `<stem>.report.json`, pass rates to `<stem>.pass_rates.jsonl`."""
    split: str = "train"
    """Value of `extra_info.split` in every row."""
    seed: int = 0
    """Seed of transforms and region questions."""
    table: TableConfig = field(default_factory=TableConfig)
    """Names of the columns."""
    plan: TaskPlan = field(default_factory=TaskPlan)
    """Operations that the tasks require."""
    duplicates: Literal["question", "picture", "keep"] = "question"
    """`question`: drop rows with the image and the question of an earlier row; `picture`: with its image; `keep`: keep
    all."""
    test_files: list[str] = field(default_factory=list)
    """RL files and tables whose images, in any orientation, are kept out of training."""
    leak_match: Match = "pixels"
    """`pixels`: equal pixels; `near`: also re-encoded or rescaled images, by the rule of `data check`."""
    pass_rates: Path | None = None
    """File of pass rates by task id (JSONL): tasks that were always or never right are dropped, as are those without a
    pass rate."""
    difficulty: DifficultyConfig | None = None
    """Measure the pass rates with this policy; None: tasks are not selected by difficulty."""

    def __post_init__(self) -> None:
        if self.out.suffix != ".parquet":
            raise ValueError(f"--out {self.out}: an RL file ends in .parquet")
        if self.pass_rates is not None and self.difficulty is not None:
            raise ValueError("--pass_rates gives what --difficulty would measure; give one of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """A task without its pixels."""

    id: str
    position: int
    """Position of its row in the table; the image is read again when the task is made."""
    row: VqaRow
    """Question, answer and box, without the image, so that the images of a table are never all in memory."""
    applied: tuple[str, ...]
    needs_crop: bool

    @property
    def required(self) -> tuple[str, ...]:
        """Transforms that were applied, and `crop` if one is needed."""
        return (*self.applied, "crop") if self.needs_crop else self.applied

    def task(self, table: VqaTable, pass_rate: float | None = None) -> Task:
        """The task with its image turned.

        Args:
            table: Table with the image.
            pass_rate: Pass rate of the policy, for the metadata.

        Raises:
            RowError: The image cannot be decoded.
        """
        return Task(
            id=self.id,
            question=self.row.question,
            images=(given_image(table.row(self.position), self.applied),),
            ground_truth=self.row.answer,
            data_source=self.row.data_source,
            required_transforms=self.required,
            box=given_box(self.row, self.applied),
            metadata={
                "source_id": self.id,
                "upright_bbox": list(self.row.box) if self.row.box is not None else None,
                "pass_rate": pass_rate,
            },
        )


# ------------------------------------------------------------------------------------------------ specs
class TaskPlanner:
    """Determines the operations that the tasks of each row require.

    Args:
        plan: Fractions and sizes.
        seed: Seed of all draws.
    """

    def __init__(self, plan: TaskPlan, seed: int) -> None:
        self.plan, self.seed = plan, seed
        self._shuffled: list[str] = []
        self._round = 0

    def specs(self, row: VqaRow, position: int) -> Iterator[TaskSpec]:
        """The tasks of a row: its own question, if it has one, and those about its small texts."""
        rng = random.Random(f"{self.seed}/{row.id}")
        if row.question and row.answer:
            yield self._spec(row.id, position, row, rng)
        if self.plan.region_questions:
            for number, asked in enumerate(region_questions(row, self.plan, rng)):
                yield self._spec(f"{row.id}/region{number}", position, asked, rng)

    def _spec(self, name: str, position: int, row: VqaRow, rng: random.Random) -> TaskSpec:
        turned = bool(self.plan.transforms) and rng.random() < self.plan.turned_share
        return TaskSpec(
            id=name,
            position=position,
            row=replace(row, source=b"", regions=()),
            applied=(self._next_transform(),) if turned else (),
            needs_crop=is_small(row, self.plan.small_share),
        )

    def _next_transform(self) -> str:
        """Transforms in shuffled order, each once per round."""
        if not self._shuffled:
            names = list(self.plan.transforms)
            self._shuffled = random.Random(f"{self.seed}/deck/{self._round}").sample(names, len(names))
            self._round += 1
        return self._shuffled.pop()


def region_questions(row: VqaRow, plan: TaskPlan, rng: random.Random) -> list[VqaRow]:
    """Questions on small annotated text, which are answered by the annotation and name the text by its first word.

    The first word must be unique in the image, so that the question has one answer.
    """
    largest = plan.region_share * row.size[0] * row.size[1]
    begins = Counter(_first_word(region) for region in row.regions)
    small = [
        region
        for region in row.regions
        if area(region.box) <= largest
        and begins[_first_word(region)] == 1
        and len(_first_word(region)) >= 2
        and len(region.text.split()) >= 2
    ]
    chosen = rng.sample(small, min(len(small), plan.region_questions))
    return [_region_question(row, region, rng) for region in chosen]


def _region_question(row: VqaRow, region: Region, rng: random.Random) -> VqaRow:
    text = " ".join(region.text.split())
    first = text.split()[0]
    letters = sorted({letter for letter in text.casefold() if letter.isalpha()})
    if letters and rng.random() < 0.5:
        letter = rng.choice(letters)
        question = f'How many times does the letter "{letter}" (upper or lower case) occur in the text that begins with'
        question, answer = f'{question} "{first}"?', str(text.casefold().count(letter))
    else:
        question, answer = f'What does the text that begins with "{first}" say in full?', text
    return replace(row, question=question, answer=answer, box=region.box, regions=())


def _first_word(region: Region) -> str:
    return next(iter(region.text.casefold().split()), "")


# ------------------------------------------------------------------------------------------------ building
def build_rl(config: BuildRL, show: Show | None = None) -> dict[str, Any]:
    """Make the tasks; write file and report.

    Args:
        config: The build.
        show: Called with the number of tasks whose pass rate was measured.

    Returns:
        The report.

    Raises:
        DataError: A file cannot be read, or no task is left.
    """
    begun = time.perf_counter()
    build = _Build(config)
    specs = build.specs()
    rates = build.pass_rates(specs, show)
    kept = [spec for spec in specs if rates is None or build.is_kept(spec, rates)]
    if not kept:
        why = build.dropped.counts() or "the tables have no usable row"
        raise DataError(f"no task is left: {why}\n{build.table.problems.summary()}")
    tasks = (spec.task(build.table, _rate(rates, spec)) for spec in kept)
    write_task_parquet(config.out, tasks, config.split)
    report = build.report(kept, rates, time.perf_counter() - begun)
    write_report(config.out, report)
    return report


class _Build:
    """State of one build."""

    def __init__(self, config: BuildRL) -> None:
        self.config = config
        self.table = VqaTable(config.files, config.table, with_regions=True)
        self.dropped = Rejections()
        self.known: KnownImages | None = None
        if config.test_files:
            self.known = KnownImages(config.leak_match)
            for image in images_of(config.test_files, config.table):
                self.known.add(image)

    def specs(self) -> list[TaskSpec]:
        """The tasks of all usable rows, without duplicates and without images of the test files."""
        planner = TaskPlanner(self.config.plan, self.config.seed)
        duplicates, images, seen = self.config.duplicates, OrientedImages(), set[tuple[str, ...]]()
        found = []
        for position, row, image in self.table.usable():
            if self.known is not None and image in self.known:
                self._drop("in the test files", row.id)
                continue
            name = images.add(image) if duplicates != "keep" else ""
            if duplicates == "picture" and (name,) in seen:
                self._drop("duplicate", row.id)
                continue
            seen.add((name,))
            for spec in planner.specs(row, position):
                key = (name, spec.row.question)
                if duplicates == "question" and key in seen:
                    self._drop("duplicate", spec.id)
                    continue
                seen.add(key)
                found.append(spec)
        self.table.problems.report(len(found) + sum(self.dropped.counts().values()))
        return found

    def pass_rates(self, specs: list[TaskSpec], show: Show | None) -> PassRates | None:
        """The given or measured pass rates; None if tasks are not selected by them."""
        config = self.config
        if config.pass_rates is not None:
            return read_pass_rates(config.pass_rates)
        if config.difficulty is None:
            return None
        path = config.out.with_name(f"{config.out.stem}.pass_rates.jsonl")
        names = ("files", "seed", "table", "plan", "duplicates", "test_files", "leak_match", "difficulty")
        settings = {name: value for name, value in asdict(config).items() if name in names}
        with ProgressFile(path, settings) as progress:
            tasks = ((number, spec.task(self.table)) for number, spec in enumerate(specs))
            return measure(tasks, config.difficulty, progress, show)

    def is_kept(self, spec: TaskSpec, rates: PassRates) -> bool:
        """True if the policy answers the task sometimes right and sometimes wrong."""
        right, scored = rates.get(spec.id, (0, 0))
        if is_informative(right, scored):
            return True
        reason = "no pass rate" if spec.id not in rates else "not scored" if scored < 2 else ""
        self._drop(reason or ("all right" if right else "all wrong"), spec.id)
        return False

    def _drop(self, reason: str, name: str) -> None:
        self.dropped.add(reason, name, name)

    def report(self, kept: list[TaskSpec], rates: PassRates | None, elapsed_s: float) -> dict[str, Any]:
        """Counts of kept and dropped tasks."""
        required = Counter("+".join(spec.required) or "none" for spec in kept)
        measured = [right / scored for right, scored in (rates or {}).values() if scored]
        histogram = Counter(min(9, int(10 * rate)) / 10 for rate in measured)
        return {
            "rows": len(self.table),
            "kept": len(kept),
            "required": dict(required.most_common()),
            "sources": dict(Counter(spec.row.data_source for spec in kept)),
            "dropped": self.dropped.to_json(),
            "unusable_rows": Rejections.of_problems(self.table.problems).to_json(),
            "test_pictures": self.known.count if self.known is not None else 0,
            "pass_rates": {f"{low:.1f}": histogram[low] for low in sorted(histogram)},
            "seconds": round(elapsed_s, 2),
        }


def _rate(rates: PassRates | None, spec: TaskSpec) -> float | None:
    if rates is None:
        return None
    right, scored = rates[spec.id]
    return right / scored
