"""Parser of an assistant turn: a thought, then a tool call (Hermes JSON) or an answer. Pure functions of text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cv_lightning.rewards.markup import (
    CALL_CLOSE,
    CALL_OPEN,
    CUT,
    CallBlocks,
    call_blocks,
    final_answer,
    load_call,
    without_thoughts,
)
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


def call_markup(name: str, arguments: Mapping[str, Any]) -> str:
    """A tool call as the policy writes it."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{CALL_OPEN}\n{body}\n{CALL_CLOSE}"


def example_call(tool: Tool) -> str:
    """A call that shows the policy how to write one."""
    return call_markup(tool.name, example_arguments(tool.parameters))


def parse_turn(text: str, tools: Sequence[Tool] = DEFAULT_TOOLS) -> ParsedTurn:
    """Parse an assistant turn.

    Calls and answers inside thoughts do not count. A turn that begins inside a thought (its template opened it) is read
    from the closing tag on.

    Args:
        text: The turn, without its end token.
        tools: The offered tools; a call of another tool, or with arguments that do not fit the schema, is an error.
    """
    blocks, _, unclosed = _blocks(text)
    answer = final_answer(text)
    if answer is not None:
        return ParsedTurn(num_calls=len(blocks), answer=answer)
    if not blocks:
        error = f"it has no {CALL_CLOSE}.{_write(tools)}" if unclosed else None
        return ParsedTurn(num_calls=int(unclosed), error=error)
    call, error = _read_call(blocks[0], tools)
    return ParsedTurn(call=call, num_calls=len(blocks), error=error)


def first_call(text: str) -> ToolCall | None:
    """The call of a demonstration's turn: the one that the agent would run, or the first that it would refuse.

    A call of an unknown tool keeps its name and arguments. A malformed call, which may be meant to fail, has no name,
    and its text as `code`.
    """
    parsed, blocks = parse_turn(text), _blocks(text).bodies
    if parsed.call is not None or parsed.answer is not None or not blocks:
        return parsed.call
    call = _named(load_call(blocks[0]))
    if call is None or not isinstance(call["arguments"], dict):
        return ToolCall(name="", arguments={"code": blocks[0].strip()})
    return ToolCall(**call)


def _named(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or "arguments" not in value:
        return None
    return {"name": value["name"], "arguments": _decoded(value["arguments"])}


def _blocks(text: str) -> CallBlocks:
    return call_blocks(without_thoughts(text.replace(CUT, "")))


def _read_call(block: str, tools: Sequence[Tool]) -> tuple[ToolCall | None, str | None]:
    """The call of a block, or why there is none."""
    value = load_call(block)
    if value is None:
        return None, f"it is not valid JSON.{_write(tools)}"
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None, f'it needs the keys "name" and "arguments".{_write(tools)}'
    tool = next((tool for tool in tools if tool.name == value["name"]), None)
    if tool is None:
        return None, f"there is no tool {value['name'][:40]!r}; {_names(tools)}"
    arguments = _decoded(value.get("arguments"))
    if not isinstance(arguments, dict):
        return None, f'"arguments" must be an object.{_write([tool])}'
    values, error = read_arguments(tool.parameters, arguments)
    return (ToolCall(name=tool.name, arguments=values), None) if error is None else (None, error)


def _write(tools: Sequence[Tool]) -> str:
    return f" Write {example_call(tools[0])}" if tools else ""


def _names(tools: Sequence[Tool]) -> str:
    names = ", ".join(f'"{tool.name}"' for tool in tools)
    return f"the only tool is {names}" if len(tools) == 1 else f"the tools are {names}" if tools else "there are none"


def _decoded(arguments: Any) -> Any:
    """Decode arguments that are the JSON text of an object."""
    if isinstance(arguments, str):
        inner = load_call(arguments)
        return inner if isinstance(inner, dict) else arguments
    return arguments
