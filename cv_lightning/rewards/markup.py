"""The tags of a response: thoughts, calls, tool responses, answers. Pure functions of text, linear in its length.

Agent and reward read a turn with the same functions, so the answer that ends a trajectory is the one that is scored.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
RESPONSE_OPEN, RESPONSE_CLOSE = "<tool_response>", "</tool_response>"
CUT = "\0"
"""Marks the place of removed text; an answer with such a mark in it does not count."""
MAX_NESTING = 64
"""Levels of lists and objects in a call. Python's own limit depends on the stack, so that a value that was read near it
could fail when it is checked, printed or stored."""


class CallBlocks(NamedTuple):
    """Call blocks of a text."""

    bodies: list[str]
    """Contents of the closed blocks, in order."""
    rest: str
    """The text with a `CUT` for every block."""
    unclosed: bool
    """An opening tag without an end follows; `rest` stops there."""


def without_thoughts(text: str) -> str:
    """Text with a `CUT` for every thought.

    Text before a first closing tag without an opening one also belongs to a thought (a template may have opened it);
    an unclosed thought extends to the end.
    """
    first_open, first_close = text.find(THINK_OPEN), text.find(THINK_CLOSE)
    if first_close >= 0 and (first_open < 0 or first_close < first_open):
        text = CUT + text[first_close + len(THINK_CLOSE) :]
    return cut_spans(text, THINK_OPEN, THINK_CLOSE, unclosed=True)


def cut_spans(text: str, opening: str, closing: str, *, unclosed: bool = False, mark: str = CUT) -> str:
    """Text with `mark` for every span from an opening to the next closing tag, tags included.

    Args:
        text: Any text.
        opening: Opening tag.
        closing: Closing tag.
        unclosed: A span without a closing tag extends to the end of the text; else it stays.
        mark: Replaces each span.
    """
    pieces: list[str] = []
    position = 0
    while (start := text.find(opening, position)) >= 0:
        end = text.find(closing, start + len(opening))
        if end < 0:
            if unclosed:
                return "".join([*pieces, text[position:start], mark])
            break
        pieces += [text[position:start], mark]
        position = end + len(closing)
    return "".join([*pieces, text[position:]])


def call_blocks(text: str) -> CallBlocks:
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


def _end_outside_string(text: str, body: int, end: int) -> int:
    further = text.find(CALL_CLOSE, end + 1)
    if further < 0 or text.find(CALL_OPEN, body, further) >= 0 or load_call(text[body:end]) is not None:
        return end
    return further if load_call(text[body:further]) is not None else end


def load_call(block: str) -> Any:
    """JSON value of a block; None where it is not JSON, is too deep (`MAX_NESTING`) or has a number out of range.

    Raw control characters inside strings are accepted.

    Only JSON's own white space may surround the value: a no-break space or a byte-order mark is not accepted.
    """
    try:
        value = json.loads(block, strict=False, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer)
    except (ValueError, OverflowError, RecursionError):
        return None
    return None if _is_deeper(value, MAX_NESTING) else value


def _is_deeper(value: Any, levels: int) -> bool:
    """True if lists and objects are nested more than `levels` deep."""
    if not isinstance(value, dict | list):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(part, levels - 1) for part in parts)


def answer_spans(text: str) -> list[str]:
    """Contents of the closed answers, in order; of nested opening tags, the innermost counts."""
    found: list[str] = []
    position = 0
    while (start := text.find(ANSWER_OPEN, position)) >= 0:
        end = text.find(ANSWER_CLOSE, start)
        if end < 0:
            break
        inner = text[start:end]
        found.append(inner[inner.rfind(ANSWER_OPEN) + len(ANSWER_OPEN) :])
        position = end + len(ANSWER_CLOSE)
    return found


def final_answer(text: str) -> str | None:
    """The last well-formed answer of an assistant turn, stripped; None without one.

    Answers in thoughts, calls and tool responses do not count, nor answers that contain one of these.
    """
    spoken = call_blocks(without_thoughts(text.replace(CUT, ""))).rest
    spoken = cut_spans(spoken, RESPONSE_OPEN, RESPONSE_CLOSE, unclosed=True)
    whole = [answer for answer in answer_spans(spoken) if CUT not in answer]
    return whole[-1].strip() if whole else None


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
