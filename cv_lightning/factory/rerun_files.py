"""`data build-sft` on SFT files: every call is run again, and its real result replaces the one in the file."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from cv_lightning.data.conversations import Conversation
from cv_lightning.data.rows import ReaderConfig, RowError
from cv_lightning.data.sft_json import ConversationFiles
from cv_lightning.data.writers import write_sft_json
from cv_lightning.factory.build_files import Rejections, Show
from cv_lightning.factory.conversation_checks import Player, Problem
from cv_lightning.factory.rerun import FAILED, rerun
from cv_lightning.factory.teacher import CropFrame
from cv_lightning.tools import CodeRunner, Tool
from cv_lightning.types import DataError, SandboxError


@dataclass(slots=True, kw_only=True)
class FileRerun:
    """Runs the conversations of SFT files again, and counts what differs."""

    files: list[str]
    sandbox: CodeRunner
    tools: Sequence[Tool]
    frame: CropFrame
    count: int
    """Conversations to run; 0: all."""
    max_parallel: int
    show: Show | None = None
    rows: ConversationFiles = field(init=False)
    kept: int = 0
    calls: Counter[int] = field(default_factory=Counter)
    differing: Rejections = field(default_factory=Rejections)
    dropped: Rejections = field(default_factory=Rejections)

    def __post_init__(self) -> None:
        self.rows = ConversationFiles(self.files, ReaderConfig(), self.tools)

    def write(self, out: Path) -> dict[str, Any]:
        """Write the conversations with the results of this run.

        Args:
            out: SFT file.

        Returns:
            The report.

        Raises:
            DataError: No conversation was kept.
        """
        begun = time.perf_counter()
        write_sft_json(out, self._conversations())
        if not self.kept:
            raise DataError(f"no conversation was kept of {', '.join(self.files)}: {self.dropped.to_json()}")
        elapsed = time.perf_counter() - begun
        return {
            "rows": self.rows.num_rows,
            "tried": min(self.count or self.rows.num_rows, self.rows.num_rows),
            "kept": self.kept,
            "kinds": {},
            "calls": {str(number): self.calls[number] for number in sorted(self.calls)},
            "differing": self.differing.to_json(),
            "dropped": self.dropped.to_json(),
            "unusable_rows": Rejections.of_problems(self.rows.problems).to_json(),
            "rows_of_no_kind": {"count": 0, "rows": []},
            "usage": {},
            "seconds": round(elapsed, 2),
            "per_second": round(self.kept / max(elapsed, 1e-9), 2),
        }

    def _conversations(self) -> Iterator[Conversation]:
        numbers = iter(range(min(self.count or self.rows.num_rows, self.rows.num_rows)))
        while some := list(islice(numbers, self.max_parallel)):
            for conversation in asyncio.run(self._run(some)):
                if conversation is not None:
                    self.kept += 1
                    self.calls[sum(turn.is_answered for turn in conversation.turns)] += 1
                    yield conversation
            if self.show is not None:
                self.show(some[-1] + 1, self.rows.num_rows, f"{self.kept} kept")

    async def _run(self, numbers: list[int]) -> list[Conversation | None]:
        return await asyncio.gather(*map(self._rerun, numbers))

    async def _rerun(self, number: int) -> Conversation | None:
        try:
            conversation = await asyncio.to_thread(self.rows.read, number)
        except RowError as error:
            self.rows.problems.add(*self.rows.place(number), error)
            return None
        player = Player(conversation.task.images, self.sandbox, str(number), self.tools, self.frame)
        try:
            again, found = await rerun(conversation, player)
        except SandboxError as error:
            found, again = [Problem("sandbox", str(error))], None
        failed = [problem for problem in found if problem.kind in (FAILED, "sandbox")]
        for problem in failed[:1] or found[:1]:
            (self.dropped if failed else self.differing).add(problem.kind, conversation.task.id, problem.detail)
        return None if failed else again
