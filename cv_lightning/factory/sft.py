"""`data build-sft`: conversations from a table, by plan, teacher, sandbox and checks; resumable and concurrent."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.data.rows import RowError, RowProblems
from cv_lightning.factory.compose import Candidate, Composer, Composition, item_of
from cv_lightning.factory.endpoint import EndpointTeacher, TeacherConfig
from cv_lightning.factory.plans import KINDS, KindDealer, PlanConfig
from cv_lightning.factory.progress import ProgressFile, write_report
from cv_lightning.factory.table import TableConfig, VqaRow, VqaTable
from cv_lightning.factory.teacher import CropFrame, OfflineTeacher, Teacher
from cv_lightning.factory.verify import verify_file
from cv_lightning.files import whole_file
from cv_lightning.rewards.judge.client import Judge
from cv_lightning.rewards.judge.config import JudgeConfig
from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.types import CVLightningError, DataError, EndpointError

NOT_THE_ROWS_FAULT = ("endpoint", "sandbox")
"""Problems that another run may not have: such candidates are tried again when the build goes on."""
MAX_ENDPOINT_FAILURES = 8
"""Candidates in a row without an answer from the endpoint that end the build."""


@dataclass(frozen=True, kw_only=True)
class BuildSFT:
    """A build of SFT conversations."""

    files: list[str]
    """Tables: .parquet, .jsonl, .csv or .tsv with a picture, a question and an answer a row, and perhaps a box."""
    out: Path
    """SFT file to write; images go into the folder `<stem>_images` beside it, the report to `<stem>.report.json` and
    what is done so far to `<stem>.progress.jsonl`: the same command goes on with it."""
    count: int = 0
    """Conversations to try; more than there are rows: rows are used again with other plans. 0: one a row."""
    seed: int = 0
    """Seed of plans and phrasings."""
    table: TableConfig = field(default_factory=TableConfig)
    """Which columns hold what."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """Which kinds, in which shares, with which transforms."""
    frame: CropFrame = field(default_factory=CropFrame)
    """How the conversations speak of places in an image."""
    teacher: TeacherConfig | None = None
    """Model behind an OpenAI-compatible endpoint that writes the turns; None: templates, offline."""
    judge: JudgeConfig | None = None
    """Model that compares a final answer where the rules say no; None: rules only."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """Where the calls are run."""
    max_parallel: int = 16
    """Conversations under way at once; raise it for an endpoint."""
    system: bool = False
    """Write the agent's system prompt into the file; without, the trainer puts its own before each conversation."""
    learn_faults: bool = True
    """False: calls that go wrong on purpose are marked `loss: false`: seen and recovered from, never imitated."""
    verify: bool = False
    """Afterwards verify the written file from disk, every call run again."""

    def __post_init__(self) -> None:
        if self.count < 0 or self.max_parallel < 1:
            raise ValueError(
                f"--count {self.count} must not be negative, --max_parallel {self.max_parallel} at least 1"
            )
        if self.out.suffix != ".json":
            raise ValueError(f"--out {self.out}: an SFT file ends in .json")


def image_folder_of(out: Path) -> Path:
    """Where the images of an SFT file go."""
    return out.with_name(f"{out.stem}_images")


def settings_of(config: BuildSFT) -> dict[str, Any]:
    """What the conversations depend on; a build that goes on must have the same."""
    names = ("files", "seed", "table", "plan", "frame", "teacher", "judge", "system", "learn_faults")
    return {name: value for name, value in asdict(config).items() if name in names}


@dataclass(slots=True)
class BuildState:
    """What a progress display shows."""

    total: int
    done: int = 0
    kept: int = 0


Show = Callable[[BuildState], None]


# ------------------------------------------------------------------------------------------------ building
def build_sft(config: BuildSFT, show: Show | None = None) -> dict[str, Any]:
    """Make the conversations, write file, images and report.

    Args:
        config: the build.
        show: called after each candidate.

    Returns:
        The report, as it is written.

    Raises:
        DataError: a table cannot be read, no row can be used, nothing was kept, or the progress is of another build.
        EndpointError: the endpoint does not answer.
    """
    teacher: Teacher = OfflineTeacher() if config.teacher is None else EndpointTeacher(config.teacher)
    judge = Judge(config.judge) if config.judge is not None else None
    table = VqaTable(config.files, config.table)
    progress_path = config.out.with_name(f"{config.out.stem}.progress.jsonl")
    begun = time.perf_counter()
    try:
        with Sandbox(config.sandbox) as sandbox, ProgressFile(progress_path, settings_of(config)) as progress:
            composer = Composer(
                teacher=teacher,
                sandbox=sandbox,
                plan=config.plan,
                frame=config.frame,
                seed=config.seed,
                verdict=judge.verdict if judge is not None else None,
            )
            build = _Build(config, table, composer, progress, show)
            asyncio.run(build.run())
            elapsed = time.perf_counter() - begun
            num_kept = _write_items(config.out, progress)
            report = build.report(elapsed) | {"usage": teacher.usage() | _tokens(progress)}
            if judge is not None:
                report["judge"] = judge.metrics()
            if config.verify and num_kept:
                report["verification"] = asyncio.run(verify_file(config.out, sandbox)).to_json()
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
        self.rows = RowProblems()
        self.unfit: list[str] = []
        """Ids of rows that can be none of the kinds."""
        self.state = BuildState(total=config.count or len(table))
        self.dealer = KindDealer(config.plan)
        self.new = 0
        self.kept_before: set[int] = set()
        self.failures = 0
        """Candidates in a row that got no answer from the endpoint."""

    async def run(self) -> None:
        """Try all candidates that were not tried before."""
        self._look_back()
        slots = asyncio.Semaphore(self.config.max_parallel)
        image_folder_of(self.config.out).mkdir(parents=True, exist_ok=True)
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self.state.total):
                    candidate = self._candidate(number)
                    if candidate is None or number in self.progress:
                        self._count(number in self.kept_before)
                        continue
                    await slots.acquire()
                    group.create_task(self._try(candidate, slots))
        except ExceptionGroup as errors:  # not except*: before 3.11.4 what that raises comes in a group of its own
            ours = [error for error in errors.exceptions if isinstance(error, CVLightningError | OSError)]
            raise ours[0] if ours else errors from None
        finally:
            await self.composer.teacher.close()
        self.rows.report(sum(self.dealer.dealt.values()))

    def _look_back(self) -> None:
        """Take what an earlier run did; what was no fault of the row's is undone."""
        again = []
        for entry in self.progress.entries():
            problem = entry["problem"]
            if problem is None:
                self.kept_before.add(int(entry["number"]))
            elif problem[0] in NOT_THE_ROWS_FAULT:
                again.append(int(entry["number"]))
        for number in again:
            self.progress.forget(number)

    def _candidate(self, number: int) -> Candidate | None:
        """The candidate of a number: its row and the kind that is dealt to it; None where the row cannot be used."""
        position = number % len(self.table)
        try:
            row = self.table.row(position)
            _require_text(row, self.config.table)
        except RowError as error:
            if number < len(self.table):
                self.rows.add(*self.table.place(position), error)
            return None
        kind = self.dealer.deal(row)
        if kind is None:
            self.unfit.append(row.id)
            return None
        return Candidate(number=number, row=row, kind=kind)

    async def _try(self, candidate: Candidate, slots: asyncio.Semaphore) -> None:
        try:
            outcome = await self.composer.compose(candidate)
            item = None
            if outcome.problem is None:
                names = await asyncio.to_thread(_save_images, outcome, self.config)
                system = PromptConfig().system_text() if self.config.system else None
                item = item_of(outcome, names, system, self.config.learn_faults)
            self.progress.add(_entry(outcome, item))
            self.new += 1
            self._count(item is not None)
            unreachable = outcome.problem is not None and outcome.problem.kind == "endpoint"
            self.failures = self.failures + 1 if unreachable else 0
            if outcome.problem is not None and self.failures >= MAX_ENDPOINT_FAILURES:
                raise EndpointError(
                    f"{self.failures} conversations in a row got no answer: {outcome.problem.detail}. What is done is "
                    "kept; the same command goes on"
                )
        finally:
            slots.release()

    def _count(self, kept: bool) -> None:
        self.state.done += 1
        self.state.kept += kept
        if self.show is not None:
            self.show(self.state)

    def report(self, elapsed_s: float) -> dict[str, Any]:
        """What was kept and why not, over all candidates, those of earlier runs too."""
        kinds: dict[str, Counter[str]] = {str(kind): Counter() for kind in KINDS}
        dropped: dict[str, dict[str, Any]] = {}
        calls: Counter[int] = Counter()
        retries = 0
        for entry in self.progress.entries():
            kinds[entry["kind"]]["tried"] += 1
            retries += entry["retries"]
            if entry["problem"] is None:
                kinds[entry["kind"]]["kept"] += 1
                calls[entry["calls"]] += 1
                continue
            name, detail = entry["problem"]
            found = dropped.setdefault(name, {"count": 0, "rows": [], "first": detail})
            found["count"] += 1
            found["rows"] = [*found["rows"], entry["id"]][:20]
        kept = sum(counts["kept"] for counts in kinds.values())
        total = sum(self.config.plan.shares.values())
        shares = {str(kind): self.config.plan.shares.get(kind, 0.0) / total for kind in KINDS}
        return {
            "rows": len(self.table),
            "tried": len(self.progress),
            "kept": kept,
            "kinds": {
                kind: {
                    "tried": counts["tried"],
                    "kept": counts["kept"],
                    "wanted_share": round(shares[kind], 4),
                    "share": round(counts["kept"] / max(1, kept), 4),
                }
                for kind, counts in kinds.items()
            },
            "calls": {str(number): calls[number] for number in sorted(calls)},
            "dropped": dict(sorted(dropped.items(), key=lambda pair: -pair[1]["count"])),
            "unusable_rows": _unusable(self.rows),
            "rows_of_no_kind": {"count": len(self.unfit), "rows": self.unfit[:20]},
            "rewritten_turns": retries,
            "seconds": round(elapsed_s, 2),
            "per_second": round(self.new / max(elapsed_s, 1e-9), 2),
        }


def _require_text(row: VqaRow, config: TableConfig) -> None:
    for name, text in ((config.question, row.question), (config.answer, row.answer)):
        if not text:
            raise RowError("no question" if name == config.question else "no answer", f"column {name!r} is empty")


def _entry(outcome: Composition, item: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "number": outcome.number,
        "id": outcome.id,
        "kind": outcome.kind,
        "problem": list(outcome.problem) if outcome.problem is not None else None,
        "calls": sum(turn.result is not None for turn in outcome.turns),
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
        "retries": outcome.retries,
        "item": item,
    }


def _tokens(progress: ProgressFile) -> dict[str, float]:
    """Tokens of all candidates, those of earlier runs too."""
    totals: Counter[str] = Counter()
    for entry in progress.entries():
        for name in ("prompt_tokens", "completion_tokens"):
            totals[name] += entry[name]
    return {f"total_{name}": float(totals[name]) for name in ("prompt_tokens", "completion_tokens")}


def _unusable(rows: RowProblems) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for problem in rows.problems:
        kind = found.setdefault(problem.kind, {"count": 0, "rows": [], "first": problem.message})
        kind["count"] += 1
        kind["rows"] = [*kind["rows"], problem.row][:20]
    return found


# ------------------------------------------------------------------------------------------------ writing
def _save_images(outcome: Composition, config: BuildSFT) -> list[str]:
    """Write the images of a conversation; their paths relative to the SFT file."""
    folder, names = image_folder_of(config.out), []
    for at, image in enumerate(outcome.images):
        name = f"{outcome.number:06d}_{at}.png"
        image.save(folder / name, format="PNG", compress_level=1)
        names.append(f"{folder.name}/{name}")
    return names


def _write_items(path: Path, progress: ProgressFile) -> int:
    """Write the kept items, one by one; how many there are.

    Raises:
        DataError: none is.
    """
    count = 0
    reasons: Counter[str] = Counter()
    with whole_file(path) as draft, draft.open("w", encoding="utf-8") as file:
        file.write("[")
        for entry in progress.entries():
            if entry["item"] is None:
                reasons[str(entry["problem"][0])] += 1
                continue
            file.write((",\n" if count else "\n") + json.dumps(entry["item"], ensure_ascii=False))
            count += 1
        file.write("\n]\n")
        if count == 0:
            said = ", ".join(f"{number} x {reason}" for reason, number in reasons.most_common())
            raise DataError(f"no conversation was kept: {said or 'no row can be any of the kinds (--plan.shares)'}")
    return count
