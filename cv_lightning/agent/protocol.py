"""Parser of an assistant turn: a thought, then a tool call in a dialect, or an answer. Pure functions of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cv_lightning.dialects import CUT, HERMES, CallBlocks, Dialect, RawCall
from cv_lightning.dialects.hermes import CALL_CLOSE, CALL_OPEN
from cv_lightning.rewards.markup import THINK_CLOSE, final_answer, without_thoughts
from cv_lightning.tools import DEFAULT_TOOLS, Tool
from cv_lightning.tools.schema import example_arguments, read_arguments
from cv_lightning.types import ToolCall


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedTurn:
    """Tool call or answer of an assistant turn."""

    call: ToolCall | None = None
    """The first call, if it can be run."""
    num_calls: int = 0
    """Call blocks in the turn, outside thoughts; only the first is run."""
    error: str | None = None
    """Why the first call cannot be run; the model reads it."""
    answer: str | None = None
    """The last well-formed answer, outside thoughts, calls and tool responses; a turn that answers runs nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedCall:
    """One call block of a turn: the call, or why it cannot be run."""

    call: ToolCall | None = None
    error: str | None = None


def call_markup(name: str, arguments: Mapping[str, Any], dialect: Dialect = HERMES) -> str:
    """A tool call as the policy writes it."""
    return dialect.render(name, arguments)


def example_call(tool: Tool, dialect: Dialect = HERMES) -> str:
    """A call that shows the policy how to write one."""
    return dialect.render(tool.name, example_arguments(tool.parameters))


def parse_turn(text: str, tools: Sequence[Tool] = DEFAULT_TOOLS, dialect: Dialect = HERMES) -> ParsedTurn:
    """Parse an assistant turn.

    Calls and answers inside thoughts do not count. A turn that begins inside a thought (its template opened it) is read
    from the closing tag on.

    Args:
        text: The turn, without its end token.
        tools: The offered tools; a call of another tool, or with arguments that do not fit the schema, is an error.
        dialect: How the policy writes calls.
    """
    blocks, _, unclosed = _blocks(text, dialect)
    answer = final_answer(text, dialect)
    if answer is not None:
        return ParsedTurn(num_calls=len(blocks), answer=answer)
    if not blocks:
        error = f"it has no {dialect.call_end}.{_write(tools, dialect)}" if unclosed else None
        return ParsedTurn(num_calls=int(unclosed), error=error)
    first = _read_call(blocks[0], tools, dialect)
    return ParsedTurn(call=first.call, num_calls=len(blocks), error=first.error)


def parse_calls(
    text: str, tools: Sequence[Tool] = DEFAULT_TOOLS, dialect: Dialect = HERMES, limit: int | None = None
) -> list[ParsedCall]:
    """Parse all closed call blocks of a turn, in order; those inside thoughts do not count.

    Args:
        text: The turn, without its end token.
        tools: The offered tools.
        dialect: How the policy writes calls.
        limit: Blocks after this many are not parsed; None parses all.
    """
    return [_read_call(block, tools, dialect) for block in _blocks(text, dialect).bodies[:limit]]


def first_call(text: str, dialect: Dialect = HERMES) -> ToolCall | None:
    """The call of a demonstration's turn: the one that the agent would run, or the first that it would refuse.

    A call of an unknown tool keeps its name and arguments. A malformed call, which may be meant to fail, has no name,
    and its text as `code`.
    """
    parsed, blocks = parse_turn(text, dialect=dialect), _blocks(text, dialect).bodies
    if parsed.call is not None or parsed.answer is not None or not blocks:
        return parsed.call
    raw = dialect.read(blocks[0], ())
    if isinstance(raw, str) or not isinstance(raw.arguments, dict):
        return ToolCall(name="", arguments={"code": blocks[0].strip()})
    return ToolCall(name=raw.name, arguments=raw.arguments)


def translated(text: str, dialect: Dialect) -> str:
    """A demonstration's turn with its Hermes calls in a model's dialect; a call that cannot be written so stays."""
    thought, close, rest = text.rpartition(THINK_CLOSE)
    blocks = HERMES.find(rest.replace(CUT, ""))
    if dialect is HERMES or blocks.unclosed or not blocks.bodies:
        return text
    calls = [_translated_call(body, dialect) for body in blocks.bodies]
    pieces = blocks.rest.split(CUT)
    return thought + close + "".join(map(str.__add__, pieces, [*calls, ""]))


def _translated_call(body: str, dialect: Dialect) -> str:
    raw = HERMES.read(body, ())
    if isinstance(raw, RawCall) and isinstance(raw.arguments, dict):
        try:
            return dialect.render(raw.name, raw.arguments)
        except ValueError:  # a wrong call on purpose, for instance of a tool that the dialect cannot name
            pass
    return f"{CALL_OPEN}{body}{CALL_CLOSE}"


def _blocks(text: str, dialect: Dialect) -> CallBlocks:
    return dialect.find(without_thoughts(text.replace(CUT, "")))


def _read_call(block: str, tools: Sequence[Tool], dialect: Dialect) -> ParsedCall:
    """The call of a block, or why there is none."""
    raw = dialect.read(block, tools)
    if isinstance(raw, str):
        return ParsedCall(error=f"it {raw}.{_write(tools, dialect)}")
    tool = next((tool for tool in tools if tool.name == raw.name), None)
    if tool is None:
        return ParsedCall(error=f"there is no tool {raw.name[:40]!r}; {_names(tools)}")
    if not isinstance(raw.arguments, dict):
        return ParsedCall(error=f'"arguments" must be an object.{_write([tool], dialect)}')
    values, error = read_arguments(tool.parameters, raw.arguments)
    if error is not None:
        return ParsedCall(error=dialect.argument_error(error, example_call(tool, dialect)))
    return ParsedCall(call=ToolCall(name=tool.name, arguments=values))


def _write(tools: Sequence[Tool], dialect: Dialect) -> str:
    return f" Write {example_call(tools[0], dialect)}" if tools else ""


def _names(tools: Sequence[Tool]) -> str:
    names = ", ".join(f'"{tool.name}"' for tool in tools)
    return f"the only tool is {names}" if len(tools) == 1 else f"the tools are {names}" if tools else "there are none"
