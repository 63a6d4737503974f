"""Hermes: a call is a JSON object between `<tool_call>` tags (Qwen2.5-VL, Qwen3-VL)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cv_lightning.dialects.base import CUT, CallBlocks, Dialect, OfferedTool, RawCall

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
_TAG = re.compile("<(?=/?tool_call>)")
MAX_NESTING = 64
"""Levels of lists and objects in a call. Python's own limit depends on the stack, so that a value that was read near it
could fail when it is checked, printed or stored."""


class HermesDialect(Dialect):
    """A JSON object with `name` and `arguments` between `<tool_call>` tags."""

    name = "hermes"
    call_token = CALL_OPEN
    call_end = CALL_CLOSE

    def find(self, text: str) -> CallBlocks:
        """Find the closed call blocks.

        An end tag inside a JSON string does not end a block, as long as the next end tag makes it valid JSON.
        """
        bodies: list[str] = []
        rest: list[str] = []
        position = 0
        while (start := text.find(CALL_OPEN, position)) >= 0:
            body = start + len(CALL_OPEN)
            end = text.find(CALL_CLOSE, body)
            if end < 0:
                return CallBlocks(bodies, "".join([*rest, text[position:start]]), True)
            end = _end_outside_string(text, body, end)
            rest += [text[position:start], CUT]
            bodies.append(text[body:end])
            position = end + len(CALL_CLOSE)
        return CallBlocks(bodies, "".join([*rest, text[position:]]), False)

    def read(self, body: str, tools: Sequence[OfferedTool]) -> RawCall | str:
        """The name and the arguments of a JSON object; arguments may be the JSON text of an object."""
        value = load_json(body)
        if value is None:
            return "is not valid JSON"
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return 'needs the keys "name" and "arguments"'
        return RawCall(value["name"], _decoded(value.get("arguments")))

    def render(self, name: str, arguments: Mapping[str, Any]) -> str:
        """One line of JSON between tags, each on a line of its own."""
        body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        body = _TAG.sub(r"\\u003c", body)  # the same JSON string, which ends no block
        return f"{CALL_OPEN}\n{body}\n{CALL_CLOSE}"

    def argument_error(self, error: str, example: str) -> str:
        """The error alone, which names the key of the JSON object."""
        return error


HERMES = HermesDialect()


def _end_outside_string(text: str, body: int, end: int) -> int:
    further = text.find(CALL_CLOSE, end + 1)
    if further < 0 or text.find(CALL_OPEN, body, further) >= 0 or load_json(text[body:end]) is not None:
        return end
    return further if load_json(text[body:further]) is not None else end


def _decoded(arguments: Any) -> Any:
    """Decode arguments that are the JSON text of an object."""
    if isinstance(arguments, str):
        inner = load_json(arguments)
        return inner if isinstance(inner, dict) else arguments
    return arguments


def load_json(text: str) -> Any:
    """JSON value of a text; None where it is not JSON, is too deep (`MAX_NESTING`) or has a number out of range.

    Raw control characters inside strings are accepted.

    Only JSON's own white space may surround the value: a no-break space or a byte-order mark is not accepted.
    """
    try:
        value = json.loads(text, strict=False, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer)
    except (ValueError, OverflowError, RecursionError):
        return None
    return None if _is_deeper(value, MAX_NESTING) else value


def _is_deeper(value: Any, levels: int) -> bool:
    """True if lists and objects are nested more than `levels` deep."""
    if not isinstance(value, dict | list):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(part, levels - 1) for part in parts)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is out of range")
    return value


def _integer(text: str) -> int:
    value = int(text)
    float(value)  # OverflowError where a schema with fractions could not compare it
    return value
