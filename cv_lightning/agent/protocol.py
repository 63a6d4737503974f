"""Reading one assistant turn: a thought, then a tool call (Hermes JSON) or an answer. Pure functions of text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from cv_lightning.types import ToolCall

TOOL_NAME = "code_image_tool"
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"

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
    """The last answer, outside thoughts and calls; a turn that answers runs nothing."""


def parse_turn(text: str) -> ParsedTurn:
    """Read an assistant turn.

    Only what stands outside thoughts counts: a call that is merely mentioned in a thought is not run. A turn that
    begins inside a thought (its template opened it) is read from the closing tag on.
    """
    spoken = outside_thoughts(text)
    blocks, rest, unclosed = call_blocks(spoken)
    answer = _last_answer(rest)
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
    for block in call_blocks(outside_thoughts(text))[0]:
        value = load_call(block)
        if isinstance(value, dict) and isinstance(value.get("name"), str) and "arguments" in value:
            calls.append({"name": value["name"], "arguments": _decoded(value["arguments"])})
    return calls


def outside_thoughts(text: str) -> str:
    """Text with every closed thought cut out; what precedes a stray first closing tag belongs to a thought, too."""
    first_open, first_close = text.find(THINK_OPEN), text.find(THINK_CLOSE)
    if first_close >= 0 and (first_open < 0 or first_close < first_open):
        text = text[first_close + len(THINK_CLOSE) :]
    pieces = []
    position = 0
    while (start := text.find(THINK_OPEN, position)) >= 0:
        pieces.append(text[position:start])
        end = text.find(THINK_CLOSE, start)
        if end < 0:
            return "".join(pieces)  # an unclosed thought swallows the rest
        position = end + len(THINK_CLOSE)
    return "".join([*pieces, text[position:]])


def call_blocks(text: str) -> tuple[list[str], str, bool]:
    """Bodies of the closed call blocks, the text without them, and whether an unclosed one follows.

    An end tag inside a JSON string does not end a block, as long as a later end tag makes it valid JSON.
    """
    blocks, rest, position = [], [], 0
    while (start := text.find(CALL_OPEN, position)) >= 0:
        body = start + len(CALL_OPEN)
        end = text.find(CALL_CLOSE, body)
        if end < 0:
            return blocks, "".join([*rest, text[position:start]]), True
        further = text.find(CALL_CLOSE, end + 1)
        if further >= 0 and CALL_OPEN not in text[body:further] and load_call(text[body:end]) is None:
            end = further if load_call(text[body:further]) is not None else end
        rest.append(text[position:start])
        blocks.append(text[body:end])
        position = end + len(CALL_CLOSE)
    return blocks, "".join([*rest, text[position:]]), False


def load_call(block: str) -> Any:  # noqa: ANN401 - any JSON value
    """JSON value of a block; None where it is none. Raw control characters inside strings are accepted."""
    try:
        return json.loads(block.strip(), strict=False, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


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
    if isinstance(index, str) and index.strip().isdecimal():
        index = int(index)
    if not isinstance(index, int) or isinstance(index, bool):
        return None, '"image_index" must be a whole number'
    return ToolCall(name=TOOL_NAME, code=code, image_index=index, description=str(description)), None


def _decoded(arguments: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Arguments given as JSON text of an object are that object."""
    if isinstance(arguments, str):
        inner = load_call(arguments)
        return inner if isinstance(inner, dict) else arguments
    return arguments


def _last_answer(text: str) -> str | None:
    close = text.rfind(ANSWER_CLOSE)
    start = text.rfind(ANSWER_OPEN, 0, close) if close >= 0 else -1
    return text[start + len(ANSWER_OPEN) : close].strip() if start >= 0 else None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is out of range")
    return value
