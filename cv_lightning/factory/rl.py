"""`data build-rl`: RL tasks from a table: what each must use, small regions, difficulty, duplicates, leakage."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cv_lightning.data.rows import RowError, RowProblems
from cv_lightning.data.writers import write_task_parquet
from cv_lightning.factory.difficulty import DifficultyConfig, PassRates, is_informative, measure, read_pass_rates
from cv_lightning.factory.overlap import KnownPictures, Match, PictureSet, pictures_of
from cv_lightning.factory.plans import given_box
from cv_lightning.factory.progress import ProgressFile, write_report
from cv_lightning.factory.table import Region, TableConfig, VqaRow, VqaTable
from cv_lightning.orientations import ORIENTATIONS, turn_image
from cv_lightning.types import DataError, Task

LISTED = 20
"""Ids of a reason that a report lists."""


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """Which operations a task must use."""

    transforms: tuple[str, ...] = ORIENTATIONS
    """What pictures are turned by, each equally often; empty: they are never turned."""
    turned_share: float = 0.5
    """Share of the tasks whose picture is turned."""
    small_share: float = 0.02
    """A box of at most this share of its picture's area needs a crop."""
    region_questions: int = 0
    """Questions about each picture's annotated small text, beside the row's own (MVToolBench's: read the line that
    begins with a word, count a letter in it). They never say where it is."""
    region_share: float = 1e-3
    """Texts of at most this share of the picture's area are asked about."""

    def __post_init__(self) -> None:
        if set(self.transforms) - set(ORIENTATIONS):
            raise ValueError(f"--plan.transforms {list(self.transforms)}: only of {', '.join(ORIENTATIONS)}")
        for name in ("turned_share", "small_share", "region_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--plan.{name} {getattr(self, name)} is a share: between 0 and 1")
        if self.region_questions < 0:
            raise ValueError(f"--plan.region_questions {self.region_questions} must not be negative")


@dataclass(frozen=True, kw_only=True)
class BuildRL:
    """A build of RL tasks."""

    files: list[str]
    """Tables: .parquet, .jsonl, .csv or .tsv with a picture, a question and an answer a row, and perhaps a box."""
    out: Path
    """Parquet file to write; the report goes to `<stem>.report.json`, pass rates to `<stem>.pass_rates.jsonl`."""
    split: str = "train"
    """What the rows' `split` says."""
    seed: int = 0
    """Seed of transforms and region questions."""
    table: TableConfig = field(default_factory=TableConfig)
    """Which columns hold what."""
    plan: TaskPlan = field(default_factory=TaskPlan)
    """What the tasks must use."""
    duplicates: Literal["question", "picture", "keep"] = "question"
    """Drop rows whose picture and question were there before, or whose picture was; or keep them all."""
    test_files: list[str] = field(default_factory=list)
    """RL files and tables whose pictures must not be trained on, in whatever orientation."""
    leak_match: Match = "pixels"
    """`pixels`: the same pixels; `near`: re-encoded or rescaled pictures too."""
    near_bits: int = 10
    """Bits of 256 that the hashes of near pictures differ in at most."""
    pass_rates: Path | None = None
    """File of pass rates by task id (JSONL): those of all right and all wrong are dropped, those that it does not name
    too."""
    difficulty: DifficultyConfig | None = None
    """Measure the pass rates with this policy; None: no task is dropped for being easy or hard."""

    def __post_init__(self) -> None:
        if self.out.suffix != ".parquet":
            raise ValueError(f"--out {self.out}: an RL file ends in .parquet")
        if self.pass_rates is not None and self.difficulty is not None:
            raise ValueError("--pass_rates gives what --difficulty would measure; give one of them")
        if not 0 <= self.near_bits < 128:
            raise ValueError(f"--near_bits {self.near_bits}: 0 to 127 of 256; unrelated pictures differ in about 128")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """A task without its pixels."""

    id: str
    position: int
    """Of its row in the table; the row's own picture is read again when the task is made."""
    row: VqaRow
    """Question, answer and box; its picture is left out, so that a table's pictures are never all in memory."""
    applied: tuple[str, ...]
    needs_crop: bool

    def task(self, table: VqaTable, pass_rate: float | None = None) -> Task:
        """The task with its picture turned.

        Args:
            table: where the picture is.
            pass_rate: of the policy, for the metadata.

        Raises:
            RowError: the picture cannot be decoded.
        """
        image = table.row(self.position).image()
        for name in self.applied:
            image = turn_image(image, name)
        return Task(
            id=self.id,
            question=self.row.question,
            images=(image,),
            ground_truth=self.row.answer,
            data_source=self.row.data_source,
            required_transforms=(*self.applied, *(("crop",) if self.needs_crop else ())),
            box=given_box(self.row, self.applied),
            metadata={
                "source_id": self.id,
                "upright_bbox": list(self.row.box) if self.row.box is not None else None,
                "pass_rate": pass_rate,
            },
        )


# ------------------------------------------------------------------------------------------------ specs
class TaskPlanner:
    """Decides what each row's tasks must use.

    Args:
        plan: shares and sizes.
        seed: of all draws.
    """

    def __init__(self, plan: TaskPlan, seed: int) -> None:
        self.plan, self.seed = plan, seed
        self._deck: list[str] = []
        self._stretch = 0

    def specs(self, row: VqaRow, position: int) -> Iterator[TaskSpec]:
        """The tasks of a row: its own question, if it has one, and those about its small texts."""
        rng = random.Random(f"{self.seed}/{row.id}")
        if row.question and row.answer:
            yield self._spec(row.id, position, row, rng)
        if self.plan.region_questions:
            asked = region_questions(row, self.plan, rng)
            for number, each in enumerate(asked):
                yield self._spec(f"{row.id}/region{number}", position, each, rng)

    def _spec(self, name: str, position: int, row: VqaRow, rng: random.Random) -> TaskSpec:
        turned = bool(self.plan.transforms) and rng.random() < self.plan.turned_share
        small = row.box_share is not None and row.box_share <= self.plan.small_share
        bare = replace(row, picture=b"", regions=())
        applied = (self._next(),) if turned else ()
        return TaskSpec(id=name, position=position, row=bare, applied=applied, needs_crop=small)

    def _next(self) -> str:
        """Transforms in shuffled order, each once before any comes again."""
        if not self._deck:
            names = list(self.plan.transforms)
            self._deck = random.Random(f"{self.seed}/deck/{self._stretch}").sample(names, len(names))
            self._stretch += 1
        return self._deck.pop()


def region_questions(row: VqaRow, plan: TaskPlan, rng: random.Random) -> list[VqaRow]:
    """Questions about annotated small text, answered by the annotation; the text is named by how it begins.

    Only texts whose first word no other text of the picture begins with are asked about, so that the question has one
    answer.
    """
    total = row.size[0] * row.size[1]
    begins = Counter(_first_word(region.text) for region in row.regions)
    small = [
        region
        for region in row.regions
        if _area(region) <= plan.region_share * total
        and begins[_first_word(region.text)] == 1
        and len(_first_word(region.text)) >= 2
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


def _first_word(text: str) -> str:
    words = re.findall(r"\S+", text.casefold())
    return words[0] if words else ""


def _area(region: Region) -> float:
    x1, y1, x2, y2 = region.box
    return (x2 - x1) * (y2 - y1)


# ------------------------------------------------------------------------------------------------ building
def build_rl(config: BuildRL, show: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Make the tasks, write file and report.

    Args:
        config: the build.
        show: called with the number of tasks whose difficulty was measured.

    Returns:
        The report.

    Raises:
        DataError: a file cannot be read, or no task is left.
    """
    begun = time.perf_counter()
    build = _Build(config)
    specs = build.specs()
    rates = build.pass_rates(specs, show)
    kept = [spec for spec in specs if rates is None or build.is_kept(spec, rates)]
    if not kept:
        why = dict(build.counts) or "the tables have no usable row"
        raise DataError(f"no task is left: {why}\n{build.rows.summary()}")
    tasks = (spec.task(build.table, _rate(rates, spec)) for spec in kept)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_task_parquet(config.out, tasks, config.split)
    report = build.report(kept, rates, time.perf_counter() - begun)
    write_report(config.out, report)
    return report


class _Build:
    """State of one build."""

    def __init__(self, config: BuildRL) -> None:
        self.config = config
        self.table = VqaTable(config.files, config.table)
        self.rows = RowProblems()
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.known: KnownPictures | None = None
        if config.test_files:
            self.known = KnownPictures(config.leak_match, config.near_bits)
            for image in pictures_of(config.test_files, config.table):
                self.known.add(image)

    def drop(self, reason: str, name: str) -> None:
        """Count a task that is not kept."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, []).append(name)

    def specs(self) -> list[TaskSpec]:
        """The tasks of all usable rows, without duplicates and without what the test files show."""
        planner = TaskPlanner(self.config.plan, self.config.seed)
        seen: set[tuple[str, str]] = set()
        pictures = PictureSet()
        found = []
        for position in range(len(self.table)):
            try:
                row = self.table.row(position)
                image = row.image()
            except RowError as error:
                self.rows.add(*self.table.place(position), error)
                continue
            if self.known is not None and image in self.known:
                self.drop("in the test files", row.id)
                continue
            picture = pictures.add(image) if self.config.duplicates != "keep" else ""
            if self.config.duplicates == "picture" and (picture, "") in seen:
                self.drop("duplicate", row.id)
                continue
            seen.add((picture, ""))
            for spec in planner.specs(row, position):
                key = (picture, spec.row.question)
                if self.config.duplicates == "question" and key in seen:
                    self.drop("duplicate", spec.id)
                    continue
                seen.add(key)
                found.append(spec)
        self.rows.report(len(found) + sum(self.counts.values()))
        return found

    def pass_rates(self, specs: list[TaskSpec], show: Callable[[int], None] | None) -> PassRates | None:
        """Given, measured, or None where no task is dropped by it."""
        config = self.config
        if config.pass_rates is not None:
            return read_pass_rates(config.pass_rates)
        if config.difficulty is None:
            return None
        path = config.out.with_name(f"{config.out.stem}.pass_rates.jsonl")
        names = ("files", "seed", "table", "plan", "duplicates", "test_files", "leak_match", "near_bits", "difficulty")
        settings = {name: value for name, value in asdict(config).items() if name in names}
        with ProgressFile(path, settings) as progress:
            tasks = ((number, spec.task(self.table)) for number, spec in enumerate(specs))
            return measure(tasks, config.difficulty, progress, show)

    def is_kept(self, spec: TaskSpec, rates: PassRates) -> bool:
        """True if the policy answers the task sometimes."""
        if spec.id not in rates:
            self.drop("no pass rate", spec.id)
            return False
        right, scored = rates[spec.id]
        if scored < 2:
            self.drop("not scored", spec.id)
        elif not is_informative(right, scored):
            self.drop("all right" if right else "all wrong", spec.id)
        else:
            return True
        return False

    def report(self, kept: list[TaskSpec], rates: PassRates | None, elapsed_s: float) -> dict[str, Any]:
        """What was kept and why not."""
        required = Counter("+".join((*spec.applied, *(["crop"] if spec.needs_crop else []))) or "none" for spec in kept)
        measured = [right / scored for right, scored in (rates or {}).values() if scored]
        histogram = Counter(min(9, int(10 * rate)) / 10 for rate in measured)
        kinds = dict.fromkeys(problem.kind for problem in self.rows.problems)
        same = {kind: [p for p in self.rows.problems if p.kind == kind] for kind in kinds}
        return {
            "rows": len(self.table),
            "kept": len(kept),
            "required": dict(required.most_common()),
            "sources": dict(Counter(spec.row.data_source for spec in kept)),
            "dropped": {
                reason: {"count": count, "rows": self.examples[reason][:LISTED], "first": self.examples[reason][0]}
                for reason, count in self.counts.most_common()
            },
            "unusable_rows": {
                kind: {"count": len(found), "rows": [p.row for p in found[:LISTED]], "first": found[0].message}
                for kind, found in same.items()
            },
            "test_pictures": self.known.count if self.known is not None else 0,
            "pass_rates": {f"{low:.1f}": histogram[low] for low in sorted(histogram)},
            "seconds": round(elapsed_s, 2),
        }


def _rate(rates: PassRates | None, spec: TaskSpec) -> float | None:
    if rates is None:
        return None
    right, scored = rates[spec.id]
    return right / scored
