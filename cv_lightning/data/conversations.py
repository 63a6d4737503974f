"""Conversations that SFT learns from."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from cv_lightning.types import Task, ToolCall


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoTurn:
    """One assistant turn of a conversation to learn from, and what the tool answered."""

    text: str
    """The whole turn, markup included, without the end-of-turn token."""
    call: ToolCall | None = None
    """The call in `text`; None in a turn that answers."""
    result_image: Image.Image | None = None
    """Image that the call made, at full resolution; None if it made none or the conversation ends with the call."""
    response_text: str = ""
    """Text that the tool answered with beside the image; empty where the agent's own words are used."""
    learn: bool = True
    """False: the turn is context only and carries no loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One example for SFT. It may end with a call whose result is not shown."""

    task: Task
    turns: tuple[DemoTurn, ...]
