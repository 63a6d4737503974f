"""Qwen's XML function calls, `<function=name>` with one `<parameter=key>` for each argument (Qwen3-Coder, Qwen3.5)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cv_lightning.dialects.base import CUT, CallBlocks, Dialect, OfferedTool, RawCall
from cv_lightning.dialects.hermes import CALL_CLOSE, CALL_OPEN, load_json

FUNCTION_CLOSE = "</function>"
_FUNCTION = re.compile(r"\s*<function=([^<>\n]{1,200})>")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]{1,200})>")
_PARAMETER_END = re.compile(r"</parameter>(?=\s*(?:<parameter=|\Z))")
_BLOCK_END = re.compile(r"</function>\s*(</tool_call>)")
_TAG = re.compile(r"</?(?:tool_call|function|parameter|think|answer|tool_response)\b|\0")
_WORDS = {"True": True, "False": False, "None": None}
"""Python's spelling of values that a chat template may have written."""


class QwenXMLDialect(Dialect):
    r"""A function tag with parameter tags between `<tool_call>` tags; values are plain text, lists and objects JSON.

    The template has no escapes. A text with a tag of the protocol in it is written as a JSON string with `\u003c`.
    """

    name = "qwen_xml"
    call_token = CALL_OPEN
    call_end = CALL_CLOSE

    def find(self, text: str) -> CallBlocks:
        """Find the closed call blocks; an end tag inside a parameter does not end one that has `</function>` later."""
        bodies: list[str] = []
        rest: list[str] = []
        position = 0
        while (start := text.find(CALL_OPEN, position)) >= 0:
            body = start + len(CALL_OPEN)
            end = text.find(CALL_CLOSE, body)
            if end < 0:
                return CallBlocks(bodies, "".join([*rest, text[position:start]]), True)
            following = text.find(CALL_OPEN, body)  # the search ends there, so that all searches together are linear
            whole = _BLOCK_END.search(text, body, following if following >= 0 else len(text))
            end = whole.start(1) if whole else end
            rest += [text[position:start], CUT]
            bodies.append(text[body:end])
            position = end + len(CALL_CLOSE)
        return CallBlocks(bodies, "".join([*rest, text[position:]]), False)

    def read(self, body: str, tools: Sequence[OfferedTool]) -> RawCall | str:
        """The name and the parameters, which are read by the types of the tool's schema; without one they are texts."""
        function = _FUNCTION.match(body)
        if function is None:
            return f"has no <function=NAME> after {CALL_OPEN}"
        inner = body[function.end() :].rstrip()
        if not inner.endswith(FUNCTION_CLOSE):
            return f"has no {FUNCTION_CLOSE} before {CALL_CLOSE}"
        values = _parameters(inner[: -len(FUNCTION_CLOSE)])
        if isinstance(values, str):
            return values
        name = function[1].strip()
        schema: Mapping[str, Any] = next(
            (tool.parameters.get("properties", {}) for tool in tools if tool.name == name), {}
        )
        return RawCall(name, {key: _value(text, schema.get(key, {})) for key, text in values.items()})

    def render(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Each tag on a line of its own, as the chat template writes it."""
        lines = [CALL_OPEN, f"<function={name}>"]
        for key, value in arguments.items():
            lines += [f"<parameter={key}>", _text(value), "</parameter>"]
        return "\n".join([*lines, FUNCTION_CLOSE, CALL_CLOSE])

    def argument_error(self, error: str, example: str) -> str:
        """The error in words of parameters, and the right form."""
        return super().argument_error(error.replace('"arguments" needs', "it needs the parameter", 1), example)


def _parameters(inner: str) -> dict[str, str] | str:
    """Texts of the parameters by name, or what is wrong with their form."""
    values: dict[str, str] = {}
    position = 0
    while parameter := _PARAMETER.match(inner, position):
        name = parameter[1].strip()
        end = _PARAMETER_END.search(inner, parameter.end())
        if end is None:
            return f"has no </parameter> after <parameter={name[:40]}>"
        if name in values:
            return f"has two parameters {name[:40]!r}"
        values[name] = inner[parameter.end() : end.start()].removeprefix("\n").removesuffix("\n")
        position = end.end()
    return values if not inner[position:].strip() else "has text outside its <parameter=KEY> tags"


def _text(value: Any) -> str:
    if not isinstance(value, str) or _TAG.search(value) or _is_escaped(value):
        return re.sub("<", r"\\u003c", json.dumps(value, ensure_ascii=False))
    return value


def _is_escaped(text: str) -> bool:
    """True for the JSON string of a text with a tag."""
    marked = text[:1] == '"' == text[-1:] and (r"\u003c" in text or r"\u0000" in text)
    return marked and isinstance(load_json(text), str)


def _value(text: str, schema: Any) -> Any:
    """The value of a parameter by the types that its schema allows; text where none fits."""
    kinds = schema.get("type", ()) if isinstance(schema, Mapping) else ()
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if _is_escaped(text):
        return load_json(text)
    bare = text.strip()
    if bare in ("null", "None") and "null" in kinds:
        return None
    if not kinds or "string" in kinds:
        return text
    value = _WORDS[bare] if bare in _WORDS else load_json(bare)
    return text if value is None else value
