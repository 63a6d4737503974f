"""`data build-sft`: conversations from a table, by plan, teacher, sandbox and checks; resumable and concurrent."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.data.rows import RowError
from cv_lightning.factory.build_files import LISTED, ProgressFile, Rejections, Show, write_report
from cv_lightning.factory.compose import Candidate, Composer, Composition, item_of
from cv_lightning.factory.endpoint_teacher import EndpointTeacher, TeacherConfig
from cv_lightning.factory.plans import KINDS, KindAssigner, PlanConfig
from cv_lightning.factory.rerun_files import FileRerun
from cv_lightning.factory.teacher import CropFrame, OfflineTeacher, Teacher
from cv_lightning.factory.verify import verify_file
from cv_lightning.factory.vqa_table import TableConfig, VqaTable
from cv_lightning.files import whole_file
from cv_lightning.ranges import NonNegativeInt, PositiveInt, check_ranges
from cv_lightning.rewards import JudgeConfig
from cv_lightning.rewards.judge.client import Judge
from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.tools import DEFAULT_TOOLS, Tool
from cv_lightning.tools.schema import check_tools
from cv_lightning.types import CVLightningError, DataError, EndpointError

TEMPORARY = ("endpoint", "sandbox")
"""Problems that are not caused by the row: such candidates are tried again when the build is resumed."""
MAX_ENDPOINT_FAILURES = 8
"""Successive candidates without an answer from the endpoint after which the build stops."""
TOKENS = ("prompt_tokens", "completion_tokens")


@dataclass(frozen=True, kw_only=True)
class BuildSFT:
    """A build of SFT conversations."""

    files: list[str]
    """Tables: .parquet, .jsonl, .csv or .tsv with an image, a question and an answer per row, and perhaps a box. Or SFT
    files (.json), whose calls are run again: what the tools really return replaces what the file states."""
    out: Path
    """SFT file to write; images go into the folder `<stem>_images` beside it, the report to `<stem>.report.json` and
    the progress to `<stem>.progress.jsonl`: the same command resumes an interrupted build."""
    count: NonNegativeInt = 0
    """Conversations to try; if more than there are rows, rows are used again with other plans. 0: one per row."""
    seed: int = 0
    """Seed of plans and phrasings."""
    table: TableConfig = field(default_factory=TableConfig)
    """Names of the columns."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """Kinds of conversations, their frequencies, and transforms."""
    frame: CropFrame = field(default_factory=CropFrame)
    """Frame of the coordinates in the conversations."""
    teacher: TeacherConfig | None = None
    """Model behind an OpenAI-compatible endpoint that writes the turns; None: templates, offline."""
    judge: JudgeConfig | None = None
    """Model that compares a final answer if the rules refuse it; None: rules only."""
    tools: list[Tool] | None = None
    """Tools that the calls may name, as in `rollout.agent.tools`. Null: the code tool."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """Sandbox that runs the calls."""
    max_parallel: PositiveInt = 16
    """Conversations made at the same time; raise it for an endpoint."""
    system: bool = False
    """Write the agent's system prompt into the file; otherwise the trainer adds its own to each conversation."""
    learn_faults: bool = True
    """False: deliberately wrong calls are marked `loss: false`; training then shows them without imitating them."""
    verify: bool = False
    """Verify the written file afterwards, with every call run again."""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_tools(self.offered)
        if self.out.suffix != ".json":
            raise ValueError(f"--out {self.out}: an SFT file ends in .json")
        if self.out.resolve() in (Path(file).resolve() for file in self.files):
            raise ValueError(f"--out {self.out} is one of the files to read; give another")

    @property
    def offered(self) -> Sequence[Tool]:
        """The tools."""
        return self.tools or DEFAULT_TOOLS


DETERMINING = ("files", "seed", "table", "plan", "frame", "teacher", "judge", "system", "learn_faults")
"""Settings that determine the conversations; a resumed build must have the same."""


# ------------------------------------------------------------------------------------------------ building
def build_sft(config: BuildSFT, show: Show | None = None) -> dict[str, Any]:
    """Make the conversations; write file, images and report.

    Args:
        config: The build.
        show: Called after each candidate.

    Returns:
        The report, as it is written.

    Raises:
        DataError: A table cannot be read, no row is usable, no conversation was kept, or the progress file belongs to
            another build.
        EndpointError: The endpoint does not answer.
    """
    if all(Path(file).suffix == ".json" for file in config.files):
        with Sandbox(config.sandbox) as sandbox:
            report = FileRerun(
                files=config.files,
                sandbox=sandbox,
                tools=config.offered,
                frame=config.frame,
                count=config.count,
                max_parallel=config.max_parallel,
                show=show,
            ).write(config.out)
        write_report(config.out, report)
        return report
    teacher: Teacher = OfflineTeacher() if config.teacher is None else EndpointTeacher(config.teacher)
    judge = Judge(config.judge) if config.judge is not None else None
    table = VqaTable(config.files, config.table)
    progress_path = config.out.with_name(f"{config.out.stem}.progress.jsonl")
    settings = {name: value for name, value in asdict(config).items() if name in DETERMINING}
    settings["tools"] = list(map(repr, config.offered))
    begun = time.perf_counter()
    try:
        with Sandbox(config.sandbox) as sandbox, ProgressFile(progress_path, settings) as progress:
            composer = Composer(
                teacher=teacher,
                sandbox=sandbox,
                plan=config.plan,
                frame=config.frame,
                seed=config.seed,
                tools=config.offered,
                verdict=judge.verdict if judge is not None else None,
            )
            build = _Build(config, table, composer, progress, show)
            asyncio.run(build.run())
            elapsed = time.perf_counter() - begun
            report = build.report(elapsed)
            _write_items(config.out, progress, report["dropped"])
            report["usage"] = teacher.usage() | report["usage"]
            if judge is not None:
                report["judge"] = judge.metrics()
            if config.verify:
                report["verification"] = asyncio.run(
                    verify_file(config.out, sandbox, config.offered, config.frame)
                ).to_json()
    finally:
        if judge is not None:
            judge.close()
    write_report(config.out, report)
    return report


class _Build:
    """State of one build."""

    def __init__(
        self, config: BuildSFT, table: VqaTable, composer: Composer, progress: ProgressFile, show: Show | None
    ) -> None:
        self.config, self.table, self.composer, self.progress, self.show = config, table, composer, progress, show
        self.total = config.count or len(table)
        self.image_folder = config.out.with_name(f"{config.out.stem}_images")
        self.unfit: list[str] = []
        """Ids of rows for which no kind is possible."""
        self.kinds = KindAssigner(config.plan)
        self.done = self.kept = self.new = 0
        self.failures = 0
        """Successive candidates without an answer from the endpoint."""

    async def run(self) -> None:
        """Try all candidates that the progress file does not hold."""
        kept_before = self._forget_temporary_problems()
        slots = asyncio.Semaphore(self.config.max_parallel)
        self.image_folder.mkdir(parents=True, exist_ok=True)
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self.total):
                    candidate = self._candidate(number)
                    if candidate is None or number in self.progress:
                        self._count(number in kept_before)
                        continue
                    await slots.acquire()
                    group.create_task(self._try(candidate, slots))
        except ExceptionGroup as errors:  # not except*: before 3.11.4 what that raises comes in a group of its own
            ours = [error for error in errors.exceptions if isinstance(error, CVLightningError | OSError)]
            raise ours[0] if ours else errors from None
        finally:
            await self.composer.teacher.close()
        self.table.problems.report(sum(self.kinds.assigned.values()))

    def _forget_temporary_problems(self) -> set[int]:
        """Remove the candidates to try again from the progress; the numbers of those that an earlier run kept."""
        entries = [(int(entry["number"]), entry["problem"]) for entry in self.progress.entries()]
        for number, problem in entries:
            if problem is not None and problem[0] in TEMPORARY:
                self.progress.forget(number)
        return {number for number, problem in entries if problem is None}

    def _candidate(self, number: int) -> Candidate | None:
        """The candidate of a number: its row and the kind assigned to it; None if the row is not usable."""
        try:
            row = self.table.row(number % len(self.table))
        except RowError:
            return None  # the table lists it
        kind = self.kinds.assign(row)
        if kind is None:
            self.unfit.append(row.id)
            return None
        return Candidate(number=number, row=row, kind=kind)

    async def _try(self, candidate: Candidate, slots: asyncio.Semaphore) -> None:
        try:
            outcome = await self.composer.compose(candidate)
            item = None
            if outcome.problem is None:
                names = await asyncio.to_thread(_save_images, outcome, self.image_folder)
                system = PromptConfig().system_text(self.config.offered) if self.config.system else None
                item = item_of(outcome, names, system, self.config.learn_faults)
            self.progress.add(_entry(outcome, item))
            self.new += 1
            self._count(item is not None)
            unreachable = outcome.problem is not None and outcome.problem.kind == "endpoint"
            self.failures = self.failures + 1 if unreachable else 0
            if outcome.problem is not None and self.failures >= MAX_ENDPOINT_FAILURES:
                raise EndpointError(
                    f"{self.failures} successive conversations got no answer: {outcome.problem.detail}. The finished "
                    "ones are kept; the same command resumes the build"
                )
        finally:
            slots.release()

    def _count(self, kept: bool) -> None:
        self.done += 1
        self.kept += kept
        if self.show is not None:
            self.show(self.done, self.total, f"{self.kept} kept")

    def report(self, elapsed_s: float) -> dict[str, Any]:
        """Counts of kept and dropped candidates, including those of earlier runs."""
        tried, kept, calls, totals = Counter[str](), Counter[str](), Counter[int](), Counter[str]()
        dropped = Rejections()
        for entry in self.progress.entries():
            tried[entry["kind"]] += 1
            totals.update({name: entry[name] for name in (*TOKENS, "retries")})
            if entry["problem"] is None:
                kept[entry["kind"]] += 1
                calls[entry["calls"]] += 1
            else:
                reason, detail = entry["problem"]
                dropped.add(reason, entry["id"], detail)
        shares = self.config.plan.shares
        return {
            "rows": len(self.table),
            "tried": len(self.progress),
            "kept": kept.total(),
            "kinds": {
                str(kind): {
                    "tried": tried[kind],
                    "kept": kept[kind],
                    "wanted_share": round(shares.get(kind, 0.0) / sum(shares.values()), 4),
                    "share": round(kept[kind] / max(1, kept.total()), 4),
                }
                for kind in KINDS
            },
            "calls": {str(number): calls[number] for number in sorted(calls)},
            "dropped": dropped.to_json(),
            "unusable_rows": Rejections.of_problems(self.table.problems).to_json(),
            "rows_of_no_kind": {"count": len(self.unfit), "rows": self.unfit[:LISTED]},
            "rewritten_turns": totals["retries"],
            "seconds": round(elapsed_s, 2),
            "per_second": round(self.new / max(elapsed_s, 1e-9), 2),
            "usage": {f"total_{name}": float(totals[name]) for name in TOKENS},
        }


def _entry(outcome: Composition, item: Mapping[str, Any] | None) -> dict[str, Any]:
    names = ("number", "id", "kind", *TOKENS, "retries")
    return {name: getattr(outcome, name) for name in names} | {
        "problem": list(outcome.problem) if outcome.problem is not None else None,
        "calls": sum(turn.is_answered for turn in outcome.turns),
        "item": item,
    }


# ------------------------------------------------------------------------------------------------ writing
def _save_images(outcome: Composition, folder: Path) -> list[str]:
    """Write the images of a conversation; their paths relative to the SFT file."""
    names = []
    for at, image in enumerate(outcome.images):
        name = f"{outcome.number:06d}_{at}.png"
        image.save(folder / name, format="PNG", compress_level=1)
        names.append(f"{folder.name}/{name}")
    return names


def _write_items(path: Path, progress: ProgressFile, dropped: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the kept items, one by one.

    Raises:
        DataError: There is none.
    """
    count = 0
    with whole_file(path) as draft, draft.open("w", encoding="utf-8") as file:
        file.write("[")
        for entry in progress.entries():
            if entry["item"] is not None:
                file.write((",\n" if count else "\n") + json.dumps(entry["item"], ensure_ascii=False))
                count += 1
        file.write("\n]\n")
        if count == 0:
            reasons = ", ".join(f"{found['count']} x {reason}" for reason, found in dropped.items())
            raise DataError(f"no conversation was kept: {reasons or 'no kind is possible for any row (--plan.shares)'}")
