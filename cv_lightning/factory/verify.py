"""Verification of a written SFT file: every call is run again and every image compared, pixel by pixel."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image

from cv_lightning.data.conversations import Conversation
from cv_lightning.data.rows import ReaderConfig, RowError
from cv_lightning.data.sft_json import conversation_of_item
from cv_lightning.data.tables import read_items
from cv_lightning.factory.compose import TOOL_ERROR
from cv_lightning.factory.conversation_checks import Facts, Player, Problem, problems_of
from cv_lightning.images import content_hash
from cv_lightning.tools import CodeRunner

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
            "problems": listed,
        }


async def verify_file(path: str | Path, sandbox: CodeRunner) -> Verification:
    """Check every conversation of a file that `data build-sft` wrote, from the file alone.

    Each is read by the trainer's own reader and its calls are run again; the images and errors that they give are
    compared with the file's, and all checks of the builder are made.

    Args:
        path: Path of the JSON list.
        sandbox: Runs the calls.

    Raises:
        DataError: The file cannot be read.
    """
    path = Path(path)
    items = read_items(path)
    found = Verification(conversations=len(items))
    slots = asyncio.Semaphore(AT_ONCE)

    async def check(number: int, item: Any) -> None:
        async with slots:
            problems = await _verify_item(item, path, number, sandbox, found.kinds)
        if problems:
            found.problems[number] = problems

    async with asyncio.TaskGroup() as group:
        for number, item in enumerate(items):
            group.create_task(check(number, item))
    return found


async def _verify_item(item: Any, path: Path, number: int, sandbox: CodeRunner, kinds: Counter[str]) -> list[Problem]:
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
    player = Player(conversation.task.images[0], sandbox, owner=str(number))
    differing = await _replay(conversation, player)
    return differing + problems_of(facts, player.turns, player.images)


async def _replay(conversation: Conversation, player: Player) -> list[Problem]:
    """Play a conversation and compare the tool's results with those of the file."""
    found = []
    for at, turn in enumerate(conversation.turns):
        played, image = await player.look(turn.text)
        player.keep(played, image)
        if played.result is None:
            continue
        if (image is None) != (turn.result_image is None):
            status = f"{played.result.status} {played.result.error}".strip()
            found.append(Problem("other result", f"turn {at}: the call gives {status}, the file says otherwise"))
        elif image is not None and turn.result_image is not None and not _is_same(image.original, turn.result_image):
            found.append(Problem("other image", f"turn {at}: the call makes another image than the file's"))
        elif image is None and turn.response_text != TOOL_ERROR.format(error=played.result.error).strip():
            found.append(Problem("other error", f"turn {at}: the call fails with {played.result.error!r}"))
    return found


def _is_same(one: Image.Image, other: Image.Image) -> bool:
    return content_hash(one) == content_hash(other)
