"""Runs the calls of conversations again: what the tools really return takes the place of what a file states."""

from __future__ import annotations

from dataclasses import replace

from PIL import Image

from cv_lightning.agent.prompt import harmless
from cv_lightning.data.conversations import Conversation, DemoTurn
from cv_lightning.factory.conversation_checks import Player, Problem
from cv_lightning.images import content_hash
from cv_lightning.sandbox.wire import CUT_OUT
from cv_lightning.types import SandboxError, ToolStatus

FAILED = "call fails"
"""Kind of a call that fails, though the conversation shows a result."""


async def rerun(conversation: Conversation, player: Player) -> tuple[Conversation, list[Problem]]:
    """Run the calls of a conversation again.

    Args:
        conversation: The conversation; a last call without a response is left alone.
        player: Has the task's images, and no turn yet; it records the turns.

    Returns:
        The conversation with the results of this run, and how they differ from the ones that it had.

    Raises:
        SandboxError: A tool itself failed.
    """
    turns, found = [], []
    for number, turn in enumerate(conversation.turns):
        played, images = await player.look(turn.text)
        if played.result is not None and played.result.status is ToolStatus.INFRASTRUCTURE_ERROR:
            raise SandboxError(played.result.error)
        player.keep(played, images)
        if not turn.is_answered and turn is conversation.turns[-1]:
            turns.append(turn)
            continue
        ran = player.demonstrated(played, turn.learn)
        turns.append(ran)
        found += [Problem(kind, f"turn {number}: {detail}") for kind, detail in _differences(turn, ran)]
    return replace(conversation, turns=tuple(turns)), found


def _differences(stated: DemoTurn, ran: DemoTurn) -> list[tuple[str, str]]:
    """(kind, detail) of each difference between a response of a file and the one of a run."""
    if ran.error and not _states_error(stated, ran.error):
        kind = FAILED if stated.images or stated.said or not stated.error else "other error"
        return [(kind, f"the call fails with {ran.error[:200]!r}, the file says otherwise")]
    if stated.error and not ran.error:
        return [("other error", f"the call succeeds, the file has the error {stated.error[:200]!r}")]
    found = []
    if len(stated.images) != len(ran.images):
        counts = f"the call makes {len(ran.images)}, the file shows {len(stated.images)}"
        found.append(("other number of images", counts))
    elif not all(map(_is_same, stated.images, ran.images)):
        found.append(("other image", "the call makes another image than the file's"))
    if not _states_text(stated, (ran.said or "").rstrip("\n")):
        said = stated.response_text or stated.said or ""
        found.append(("other text", f"the call says {(ran.said or '')[:100]!r}, the file {said[:100]!r}"))
    return found


def _states_error(stated: DemoTurn, error: str) -> bool:
    """True if a response names an error; one that states nothing leaves the words to the agent."""
    if stated.response_text:
        return error.strip() in stated.response_text
    return stated.error == error or not stated.is_answered


def _states_text(stated: DemoTurn, said: str) -> bool:
    """True if a response holds what the tool said."""
    if stated.response_text:  # the text stands there as the model reads it
        return CUT_OUT.strip() in stated.response_text or harmless(said) in stated.response_text
    return (stated.said or "").rstrip("\n") == said


def _is_same(one: Image.Image, other: Image.Image) -> bool:
    return content_hash(one) == content_hash(other)
