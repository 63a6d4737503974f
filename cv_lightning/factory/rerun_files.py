"""`data build-sft` on SFT files: every call is run again, and its real result replaces the one in the file."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from cv_lightning.data.conversations import Conversation
from cv_lightning.data.rows import ReaderConfig, RowError
from cv_lightning.data.sft_json import ConversationFiles
from cv_lightning.data.writers import write_sft_json
from cv_lightning.factory.build_files import Rejections, Show
from cv_lightning.factory.conversation_checks import Player, Problem
from cv_lightning.factory.rerun import FAILED, rerun
from cv_lightning.tools import CodeRunner
from cv_lightning.types import DataError, SandboxError

if TYPE_CHECKING:
    from cv_lightning.factory.build_sft import BuildSFT


@dataclass(slots=True)
class FileRerun:
    """Runs the conversations of SFT files again, and counts what differs."""

    config: BuildSFT
    sandbox: CodeRunner
    rows: ConversationFiles
    show: Show | None = None
    kept: int = 0
    calls: Counter[int] = field(default_factory=Counter)
    differing: Rejections = field(default_factory=Rejections)
    dropped: Rejections = field(default_factory=Rejections)

    def write(self) -> dict[str, Any]:
        """Write the conversations with the results of this run; the report.

        Raises:
            DataError: No conversation was kept.
        """
        begun = time.perf_counter()
        write_sft_json(self.config.out, self._conversations())
        if not self.kept:
            raise DataError(f"no conversation was kept of {', '.join(self.config.files)}: {self.dropped.to_json()}")
        elapsed = time.perf_counter() - begun
        return {
            "rows": self.rows.num_rows,
            "tried": self.rows.num_rows,
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
        numbers = iter(range(self.config.count or self.rows.num_rows))
        while some := list(islice(numbers, self.config.max_parallel)):
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
        config = self.config
        player = Player(conversation.task.images, self.sandbox, str(number), config.offered, config.frame)
        try:
            again, found = await rerun(conversation, player)
        except SandboxError as error:
            found, again = [Problem("sandbox", str(error))], None
        failed = [problem for problem in found if problem.kind in (FAILED, "sandbox")]
        for problem in failed[:1] or found[:1]:
            (self.dropped if failed else self.differing).add(problem.kind, conversation.task.id, problem.detail)
        return None if failed else again


def rerun_files(config: BuildSFT, sandbox: CodeRunner, show: Show | None = None) -> dict[str, Any]:
    """Run every call of SFT files again and write the conversations with the real results.

    Args:
        config: The build; of its settings `count`, `frame`, `tools` and `max_parallel` matter.
        sandbox: Runs the calls.
        show: Called after each batch of conversations.

    Raises:
        DataError: A file cannot be read, or no conversation was kept.
    """
    return FileRerun(config, sandbox, ConversationFiles(config.files, ReaderConfig(), config.offered), show).write()
