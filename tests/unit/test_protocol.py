"""One assistant turn, read without guessing."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from cv_lightning.agent.protocol import example_call, first_call, parse_turn
from cv_lightning.tools import CodeTool, Tool, ToolContext
from cv_lightning.tools.code_image import code_call
from cv_lightning.types import ToolCall, ToolResult


def call(code: object = "result = image", name: str = CodeTool.name, **arguments: object) -> str:
    body = json.dumps({"name": name, "arguments": {"code": code, **arguments}})
    return f"<tool_call>\n{body}\n</tool_call>"


def test_a_call_is_read_with_its_defaults() -> None:
    parsed = parse_turn("<think>turn it</think>" + call())
    assert parsed.call is not None
    assert (parsed.call.code, parsed.call.image_index, parsed.call.description) == ("result = image", 0, "")
    assert (parsed.num_calls, parsed.error, parsed.answer) == (1, None, None)


def test_arguments_are_read() -> None:
    parsed = parse_turn(call("x", image_index=2, description="d"))
    assert parsed.call is not None
    assert (parsed.call.image_index, parsed.call.description) == (2, "d")
    parsed = parse_turn(call("x", image_index="2"))
    assert parsed.call is not None
    assert parsed.call.image_index == 2


@pytest.mark.parametrize("raw", ["a = 1\nb = 2", "a\tb", "a\r\nb"])
def test_raw_line_breaks_in_strings_are_repaired(raw: str) -> None:
    text = '<tool_call>{"name": "code_image_tool", "arguments": {"code": "' + raw + '"}}</tool_call>'
    parsed = parse_turn(text)
    assert parsed.call is not None
    assert parsed.call.code == raw


def test_the_first_of_several_calls_is_run_and_all_are_counted() -> None:
    parsed = parse_turn(call("first") + call("second"))
    assert parsed.call is not None
    assert parsed.call.code == "first"
    assert parsed.num_calls == 2


def test_a_call_in_a_thought_is_not_run() -> None:
    assert parse_turn(f"<think>{call()}</think>").call is None
    assert parse_turn(f"I begin in a thought {call()}</think>").call is None
    parsed = parse_turn(f"<think>{call('no')}</think>{call('yes')}")
    assert parsed.call is not None
    assert parsed.call.code == "yes"


def test_an_end_tag_in_a_string_does_not_cut_the_call() -> None:
    parsed = parse_turn(call("s = '</tool_call>'"))
    assert parsed.call is not None
    assert parsed.call.code == "s = '</tool_call>'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<tool_call>{nonsense}</tool_call>", "not valid JSON"),
        ('<tool_call>{"name": "code_image_tool"', "no </tool_call>"),
        ('<tool_call>{"arguments": {}}</tool_call>', "needs the keys"),
        ("<tool_call>[1]</tool_call>", "needs the keys"),
        (call(name="search"), "there is no tool 'search'"),
        ('<tool_call>{"name": "code_image_tool", "arguments": [1]}</tool_call>', "must be an object"),
        (call(code=7), 'needs "code"'),
        (call(code="  "), 'needs "code"'),
        (call(image_index="first"), "whole number"),
        (call(image_index=True), "whole number"),
        (call(image_index="9" * 5000), "whole number"),
        (call(description=[1]), "must be a text"),
        (
            '<tool_call>{"name": "code_image_tool", "arguments": {"code": "x", "a": 1e400}}</tool_call>',
            "not valid JSON",
        ),
        ('<tool_call>\u00a0{"name": "code_image_tool", "arguments": {"code": "x"}}</tool_call>', "not valid JSON"),
        ('<tool_call>\ufeff{"name": "code_image_tool", "arguments": {"code": "x"}}</tool_call>', "not valid JSON"),
        ('<tool_call>{"name":\u00a0"code_image_tool", "arguments": {"code": "x"}}</tool_call>', "not valid JSON"),
        ("<tool_call>" + "[" * 5000 + "</tool_call>", "not valid JSON"),
    ],
)
def test_what_is_wrong_is_told(text: str, message: str) -> None:
    parsed = parse_turn(text)
    assert parsed.call is None
    assert parsed.error is not None
    assert message in parsed.error
    assert len(parsed.error) < 300


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>t</think><answer> 42 </answer>", "42"),
        ("<answer>1</answer><answer>2</answer>", "2"),
        ("<answer>one</answer> middle </answer>", "one"),
        ("<answer>red <answer>blue</answer>", "blue"),
        ("<answer></answer>", ""),
        ("<think><answer>1</answer></think>", None),
        ("<answer>1", None),
        ("<answer>4<tool_response>x</tool_response>2</answer>", None),
        ("<tool_response><answer>9</answer></tool_response>", None),
        ("<answer><think>x</think>1</answer>", None),
        ("<answer>1</answer><answer>2<think>3</think></answer>", "1"),
        ("plain", None),
    ],
)
def test_answers(text: str, answer: str | None) -> None:
    assert parse_turn(text).answer == answer


def test_a_turn_that_answers_runs_nothing() -> None:
    parsed = parse_turn(call() + "<answer>1</answer>")
    assert (parsed.call, parsed.answer, parsed.num_calls) == (None, "1", 1)


@pytest.mark.parametrize("tag", ["<think>", "</think>", "<tool_call>", "</tool_call>", "<answer>", "<tool_response>"])
@pytest.mark.parametrize("around", ["", "<tool_call>", "<think>t</think>"])
def test_reading_takes_no_time(tag: str, around: str) -> None:
    begun = time.perf_counter()
    parse_turn(around + tag * 50_000 + around)
    parse_turn((around + tag + "x") * 20_000)
    assert time.perf_counter() - begun < 1.0


def test_arguments_nested_too_deep_are_no_json() -> None:
    """Near Python's own limit they could be read, and then fail where they are checked or stored."""
    for depth, is_read in ((60, True), (100, False), (900, False), (100_000, False)):
        nested = "[" * depth + "]" * depth
        text = f'<tool_call>{{"name": "f", "arguments": {{"a": {nested}}}}}</tool_call>'
        call_read = first_call(text)
        assert call_read is not None and (call_read.name == "f") is is_read
        assert parse_turn(text).call is None
        call_of_code = f'<tool_call>{{"name": "code_image_tool", "arguments": {{"code": {nested}}}}}</tool_call>'
        assert parse_turn(call_of_code).error


def test_whole_numbers_beyond_floating_point_are_no_json() -> None:
    """A schema with `multipleOf` could not check them."""
    for digits, is_read in ((300, True), (400, False), (10_000, False)):
        text = f'<tool_call>{{"name": "f", "arguments": {{"a": 1{"0" * digits}}}}}</tool_call>'
        call_read = first_call(text)
        assert call_read is not None and (call_read.name == "f") is is_read


def test_a_no_break_space_outside_strings_is_no_call() -> None:
    for space in ("\u00a0", "\ufeff", "\u2003", "\x0b"):
        body = f'{space}{{"name": "f", "arguments": {{}}}}'
        assert first_call(f"<tool_call>{body}</tool_call>") == ToolCall(name="", arguments={"code": body.strip()})
    spaced = '<tool_call>\r\n\t {"name": "f", "arguments": {"t": "a\u00a0b"}}\n</tool_call>'
    assert first_call(spaced) == ToolCall(name="f", arguments={"t": "a\u00a0b"})


# ------------------------------------------------------------------------------------------------ other tools
class Zoom(Tool):
    """A tool with every kind of argument."""

    name = "zoom"
    description = "zooms."

    def __init__(self) -> None:
        box = {"type": "array", "items": {"$ref": "#/$defs/side"}, "minItems": 4, "maxItems": 4}
        self.parameters = {
            "type": "object",
            "properties": {
                "box": box | {"description": "what to show", "examples": [[0, 0, 9, 9]]},
                "mode": {"enum": ["near", "far"], "default": "near"},
                "factor": {"type": "number", "exclusiveMinimum": 0},
            },
            "required": ["box"],
            "$defs": {"side": {"type": "integer", "minimum": 0}},
        }

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> ToolResult:
        return ToolResult(text="zoomed")


ZOOM = (CodeTool(), Zoom())


def zoom(**arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': 'zoom', 'arguments': arguments})}</tool_call>"


def test_a_call_is_checked_against_the_schema_of_its_tool() -> None:
    parsed = parse_turn(zoom(box=[1, 2, 3, "x"]), ZOOM)
    assert parsed.call is None
    parsed = parse_turn(zoom(box=[1, 2, 3, 4], factor=1.5, unknown=7), ZOOM)
    assert parsed.call is not None
    assert parsed.call.arguments == {"box": [1, 2, 3, 4], "mode": "near", "factor": 1.5}
    assert (parsed.call.code, parsed.call.image_index) == ("", 0) and parsed.call.text.startswith("zoom({")
    assert parse_turn(call(), ZOOM).call == parse_turn(call()).call


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (zoom(), '"arguments" needs "box": a list'),
        (zoom(box="all"), '"arguments" needs "box": a list'),
        (zoom(box=[1, 2, 3]), "is too short"),
        (zoom(box=[1, 2, 3, -4]), "minimum of 0"),
        (zoom(box=[1, 2, 3, 4], mode="middle"), "is not one of"),
        (zoom(box=[1, 2, 3, 4], factor="big"), '"factor" must be a number'),
        (zoom(box=[1, 2, 3, 4], factor=None), '"factor" must be a number'),
        (call(name="search"), 'there is no tool \'search\'; the tools are "code_image_tool", "zoom"'),
    ],
)
def test_arguments_that_do_not_fit_the_schema_are_explained(text: str, message: str) -> None:
    parsed = parse_turn(text, ZOOM)
    assert parsed.call is None and parsed.error is not None
    assert message in parsed.error and len(parsed.error) < 300


@pytest.mark.parametrize("tool", ZOOM, ids=lambda tool: tool.name)
def test_the_example_in_the_prompt_is_a_call_that_runs(tool: Tool) -> None:
    assert parse_turn(example_call(tool), ZOOM).call is not None


def test_the_errors_of_the_code_tool_keep_their_bytes() -> None:
    write = 'Write <tool_call>\n{"name": "code_image_tool", "arguments": {"code": "result = image.rotate(90, '
    write += 'expand=True)", "image_index": 0}}\n</tool_call>'
    told = {
        "<tool_call>{nonsense}</tool_call>": f"it is not valid JSON. {write}",
        "<tool_call>{": f"it has no </tool_call>. {write}",
        "<tool_call>[1]</tool_call>": f'it needs the keys "name" and "arguments". {write}',
        call(name="search"): "there is no tool 'search'; the only tool is \"code_image_tool\"",
        '<tool_call>{"name": "code_image_tool"}</tool_call>': f'"arguments" must be an object. {write}',
        call(code=7): '"arguments" needs "code": a text of Python',
        call(code=" "): '"arguments" needs "code": a text of Python',
        call(image_index=2.0): '"image_index" must be a whole number',
        call(image_index=None): '"image_index" must be a whole number',
        call(description=1): '"description" must be a text',
    }
    assert {text: parse_turn(text).error for text in told} == told


def test_the_first_call_is_found_as_the_agent_finds_it() -> None:
    text = f"<think>{call('no')}</think>{call('yes')}"
    assert first_call(text) == parse_turn(text).call == code_call("yes")
    assert first_call(call(name="search")) == ToolCall(name="search", arguments={"code": "result = image"})
    malformed = first_call("<tool_call> {oops </tool_call>")
    assert malformed == ToolCall(name="", arguments={"code": "{oops"})
    assert first_call(f"<think>{call()}</think>") is None
    assert first_call(call() + "<answer>1</answer>") is None
