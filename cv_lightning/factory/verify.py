"""Verification of a written SFT file: every call is run again and every image compared, pixel by pixel."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image

from cv_lightning.data.rows import ReaderConfig, RowError
from cv_lightning.data.sft_json import conversation_of_item
from cv_lightning.data.tables import read_items
from cv_lightning.factory.conversation_checks import Facts, Player, Problem, problems_of
from cv_lightning.factory.rerun import rerun
from cv_lightning.factory.teacher import CropFrame
from cv_lightning.tools import DEFAULT_TOOLS, CodeRunner, Tool
from cv_lightning.types import SandboxError

AT_ONCE = 16
"""Conversations verified at the same time."""


@dataclass(slots=True)
class Verification:
    """Result of `verify_file`."""

    conversations: int = 0
    problems: dict[int, list[Problem]] = field(default_factory=dict)
    """Problems by position in the file; conversations without problems are not listed."""
    kinds: Counter[str] = field(default_factory=Counter)

    @property
    def verified(self) -> int:
        """Number of conversations without problems."""
        return self.conversations - len(self.problems)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        listed = {at: [f"{p.kind}: {p.detail}" for p in found] for at, found in sorted(self.problems.items())}
        return {
            "conversations": self.conversations,
            "verified": self.verified,
            "kinds": dict(self.kinds),
            "differences": dict(Counter(p.kind for found in self.problems.values() for p in found).most_common()),
            "problems": listed,
        }


async def verify_file(
    path: str | Path, sandbox: CodeRunner, tools: Sequence[Tool] = DEFAULT_TOOLS, frame: CropFrame | None = None
) -> Verification:
    """Check every conversation of a file that `data build-sft` wrote, from the file alone.

    Each is read by the trainer's own reader and its calls are run again; the images and errors that they give are
    compared with the file's, and all checks of the builder are made.

    Args:
        path: Path of the JSON list.
        sandbox: Runs the calls.
        tools: Tools that the calls may name.
        frame: Frame of the coordinates of calls.

    Raises:
        DataError: The file cannot be read.
    """
    path = Path(path)
    items = read_items(path)
    found = Verification(conversations=len(items))
    slots = asyncio.Semaphore(AT_ONCE)

    async def check(number: int, item: Any) -> None:
        async with slots:
            player = partial(Player, sandbox=sandbox, owner=str(number), tools=tools, frame=frame)
            problems = await _verify_item(item, path, number, player, found.kinds)
        if problems:
            found.problems[number] = problems

    async with asyncio.TaskGroup() as group:
        for number, item in enumerate(items):
            group.create_task(check(number, item))
    return found


async def _verify_item(
    item: Any, path: Path, number: int, make_player: Callable[[Sequence[Image.Image]], Player], kinds: Counter[str]
) -> list[Problem]:
    try:
        conversation = await asyncio.to_thread(conversation_of_item, item, path, number, ReaderConfig())
    except RowError as error:
        return [Problem(error.kind, str(error))]
    if not isinstance(item, Mapping) or "build" not in item:
        return [Problem("no facts", "the item has no `build`; only files that `data build-sft` wrote can be verified")]
    try:
        facts = msgspec.convert(item["build"], Facts)
    except msgspec.ValidationError as error:
        return [Problem("no facts", f"the facts of the conversation cannot be read ({error})")]
    kinds[facts.kind] += 1
    if facts.question != conversation.task.question:
        return [Problem("question", f"{conversation.task.question!r} is not {facts.question!r}")]
    player = make_player(conversation.task.images)
    try:
        _, differing = await rerun(conversation, player)
    except SandboxError as error:
        return [Problem("sandbox", str(error))]
    return differing + problems_of(facts, player.turns, player.images)
