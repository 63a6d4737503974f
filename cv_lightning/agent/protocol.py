"""Reading one assistant turn: a thought, then a tool call (Hermes JSON) or an answer. Pure functions of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cv_lightning.rewards.markup import CALL_CLOSE, CUT, call_blocks, final_answer, load_call, without_thoughts
from cv_lightning.types import ToolCall

TOOL_NAME = "code_image_tool"

EXAMPLE = (
    '<tool_call>\n{"name": "code_image_tool", "arguments": {"code": "result = image.rotate(90, expand=True)", '
    '"image_index": 0}}\n</tool_call>'
)
"""Shown to the model when a call cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedTurn:
    """What an assistant turn asks for."""

    call: ToolCall | None = None
    """The first call, if it can be run."""
    num_calls: int = 0
    """Call blocks in the turn, outside thoughts; only the first is run."""
    error: str | None = None
    """Why the first call cannot be run, for the model to read."""
    answer: str | None = None
    """The last well-formed answer, outside thoughts, calls and tool responses; a turn that answers runs nothing."""


def parse_turn(text: str) -> ParsedTurn:
    """Read an assistant turn.

    Only what stands outside thoughts counts: a call that is merely mentioned in a thought is not run. A turn that
    begins inside a thought (its template opened it) is read from the closing tag on.
    """
    blocks, _, unclosed = call_blocks(without_thoughts(text.replace(CUT, "")))
    answer = final_answer(text)
    if answer is not None:
        return ParsedTurn(num_calls=len(blocks), answer=answer)
    if not blocks:
        error = f"it has no {CALL_CLOSE}. Write {EXAMPLE}" if unclosed else None
        return ParsedTurn(num_calls=int(unclosed), error=error)
    call, error = read_call(blocks[0])
    return ParsedTurn(call=call, num_calls=len(blocks), error=error)


def parse_tool_calls(text: str) -> list[dict[str, Any]]:
    """All well-formed calls of any name, as `{"name", "arguments"}`, in order; malformed blocks are left out.

    Agrees with the reference's Hermes parser (golden/toolcalls) but for its questionable cases: calls inside thoughts
    are not calls, arguments given as JSON text are decoded, raw line breaks and tabs in strings are accepted, an
    end tag inside a string does not cut the call, and numbers that JSON cannot hold are refused.
    """
    calls = []
    for block in call_blocks(without_thoughts(text.replace(CUT, ""))).bodies:
        value = load_call(block)
        if isinstance(value, dict) and isinstance(value.get("name"), str) and "arguments" in value:
            calls.append({"name": value["name"], "arguments": _decoded(value["arguments"])})
    return calls


def read_call(block: str) -> tuple[ToolCall | None, str | None]:
    """The call of a block, or why there is none."""
    value = load_call(block)
    if value is None:
        return None, f"it is not valid JSON. Write {EXAMPLE}"
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None, f'it needs the keys "name" and "arguments". Write {EXAMPLE}'
    if value["name"] != TOOL_NAME:
        return None, f'there is no tool {value["name"][:40]!r}; the only tool is "{TOOL_NAME}"'
    arguments = _decoded(value.get("arguments"))
    if not isinstance(arguments, dict):
        return None, f'"arguments" must be an object. Write {EXAMPLE}'
    code, index, description = arguments.get("code"), arguments.get("image_index", 0), arguments.get("description", "")
    if not isinstance(code, str) or not code.strip():
        return None, '"arguments" needs "code": a text of Python'
    if isinstance(index, str) and index.strip().isdecimal() and len(index) < 10:
        index = int(index)
    if not isinstance(index, int) or isinstance(index, bool):
        return None, '"image_index" must be a whole number'
    if not isinstance(description, str):
        return None, '"description" must be a text'
    return ToolCall(name=TOOL_NAME, code=code, image_index=index, description=description), None


def _decoded(arguments: Any) -> Any:
    """Arguments given as JSON text of an object are that object."""
    if isinstance(arguments, str):
        inner = load_call(arguments)
        return inner if isinstance(inner, dict) else arguments
    return arguments
