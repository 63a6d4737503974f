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
    more_images: tuple[Image.Image, ...] = ()
    """Images that the call made after the first, in order."""
    response_text: str = ""
    """The tool's whole response, read as it is; each image stands at its `<image>` mark, before the text without marks.
    Empty: the agent frames images, `said` and `error` in its own words, as in a rollout."""
    said: str | None = None
    """The tool's own text, such as what a snippet printed; None: not stated."""
    error: str = ""
    """Why the call failed."""
    learn: bool = True
    """False: the turn is context only and carries no loss."""

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """All images that the call made, in order."""
        return () if self.result_image is None else (self.result_image, *self.more_images)

    @property
    def is_answered(self) -> bool:
        """True if the conversation has a response to the turn, though the response may be an empty text."""
        return self.result_image is not None or bool(self.response_text or self.error) or self.said is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One example for SFT. It may end with a call whose result is not shown."""

    task: Task
    turns: tuple[DemoTurn, ...]
