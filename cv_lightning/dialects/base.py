"""Base class of dialects: find the call blocks of a turn, read one, write one.

To add a dialect, write a subclass of `Dialect` in any module and name it: `rollout.agent.dialect: my_module.MyDialect`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

CUT = "\0"
"""Marks the place of removed text; an answer with such a mark in it does not count."""


class OfferedTool(Protocol):
    """The part of a tool that dialects read."""

    name: str
    parameters: Mapping[str, Any]


class CallBlocks(NamedTuple):
    """Call blocks of a text."""

    bodies: list[str]
    """Contents of the closed blocks, in order."""
    rest: str
    """The text with a `CUT` for every block."""
    unclosed: bool
    """An opening tag without an end follows; `rest` stops there."""


@dataclass(frozen=True, slots=True)
class RawCall:
    """A call as it was written: its arguments are not checked against a schema yet."""

    name: str
    arguments: Any
    """A dictionary, or whatever stood in its place."""


class Dialect(ABC):
    """A way to write tool calls. It has no state and takes no settings; nothing that a policy writes may raise."""

    name: ClassVar[str]
    """Short name of one of ours; the import path of any other class."""
    call_token: ClassVar[str]
    """Begins a call. With the tools off it is banned in sampling, if the tokenizer has it as one token."""
    call_end: ClassVar[str]
    """What an unclosed block lacks, in errors."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = f"{cls.__module__}.{cls.__qualname__}"

    @abstractmethod
    def find(self, text: str) -> CallBlocks:
        """Find the call blocks, in a time linear in the text's length.

        Args:
            text: A turn without its thoughts.
        """

    @abstractmethod
    def read(self, body: str, tools: Sequence[OfferedTool]) -> RawCall | str:
        """The call in a block, or what is wrong with its form: the rest of a sentence that begins with "it".

        Args:
            body: Content of a block that `find` found.
            tools: The offered tools; none for demonstrations. An unknown tool is not an error here.
        """

    @abstractmethod
    def render(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The call as a policy writes it; `find` and `read` give its name and arguments back.

        Raises:
            ValueError: The dialect cannot write the call.
        """

    def argument_error(self, error: str, example: str) -> str:
        """Text for a policy whose arguments do not fit a schema.

        Args:
            error: Which argument, and what it must be.
            example: A call of this tool.
        """
        return f"{error}. Write {example}"

    def check_tools(self, tools: Sequence[OfferedTool]) -> None:  # noqa: B027 (most dialects can call any tool)
        """Refuse tools that cannot be called in this dialect.

        Raises:
            ValueError: The message says which, and what to change.
        """
