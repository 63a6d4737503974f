"""Dialects: published forms are read, malformed ones answered, and what is rendered is read back."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.protocol import example_call, parse_calls, parse_turn, translated
from cv_lightning.dialects import CUT, DIALECTS, HERMES, Dialect, RawCall, dialect_named
from cv_lightning.rewards.markup import final_answer
from cv_lightning.tools import DEFAULT_TOOLS, CodeTool, Tool, ToolContext
from cv_lightning.types import ToolResult

CASES = json.loads((Path(__file__).parent / "dialect_cases.json").read_text(encoding="utf-8"))
XML, BLOCK = DIALECTS["qwen_xml"], DIALECTS["python_block"]
EVERY = [pytest.param(dialect, id=name) for name, dialect in DIALECTS.items()]


class Measure(Tool):
    """A tool with an argument of each type."""

    name = "measure"
    description = "measures."

    def __init__(self, properties: dict[str, Any] | None = None) -> None:
        kinds = ("string", "integer", "number", "boolean", "array", "object")
        self.parameters = {
            "type": "object",
            "properties": properties or {kind: {"type": kind} for kind in kinds},
            "required": [],
        }

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> ToolResult:
        raise NotImplementedError


TOOLS = {"hermes": (CodeTool(), Measure()), "qwen_xml": (CodeTool(), Measure()), "python_block": (CodeTool(),)}


@pytest.mark.parametrize("name", DIALECTS)
def test_golden_strings_are_read_as_stated(name: str) -> None:
    cases, dialect = CASES[name], DIALECTS[name]
    assert len({case["text"] for case in cases}) == len(cases) >= 40
    for case in cases:
        found = parse_calls(case["text"], TOOLS[name], dialect)
        calls = [call.call and {"name": call.call.name, "arguments": call.call.arguments} for call in found]
        assert calls == case["calls"], case["text"]
        error = parse_turn(case["text"], TOOLS[name], dialect).error
        assert (case.get("error") or "") in (error or "") and bool(error) == bool(case.get("error")), case["text"]


def kind_of(value: Any) -> str:
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


MARKUP = [
    "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=p>", "</parameter>", "\n", "```", "`",
    "```python\n", "\n````\n", '"', "\\", "\\u003c", "é", "\u2028", "# image_index: 2\n", "{", "}", "5", " ", "<",
]  # fmt: skip
TEXTS = st.one_of(st.lists(st.sampled_from(MARKUP), max_size=8).map("".join), st.text(max_size=20))
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.one_of(TEXTS, st.integers(-(10**9), 10**9), st.booleans(), FLOATS, st.none())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)
KEYS = st.sampled_from(["a", "b_2", "long_name"])


@pytest.mark.parametrize("dialect", [HERMES, XML])
@settings(max_examples=60, deadline=None)
@given(arguments=st.dictionaries(KEYS, VALUES, max_size=3))
def test_what_is_rendered_is_read_back(dialect: Dialect, arguments: dict[str, Any]) -> None:
    tool = Measure({key: {"type": kind_of(value)} for key, value in arguments.items()} or None)
    found = dialect.find(f"before {dialect.render('measure', arguments)} after")
    assert (len(found.bodies), found.rest, found.unclosed) == (1, f"before {CUT} after", False)
    assert dialect.read(found.bodies[0], [tool]) == RawCall("measure", arguments)


@settings(max_examples=60, deadline=None)
@given(code=TEXTS.filter(str.strip), index=st.none() | st.integers(0, 99))
def test_code_that_is_rendered_is_read_back(code: str, index: int | None) -> None:
    arguments = {"code": code} | ({} if index is None else {"image_index": index})
    found = BLOCK.find(f"before\n{BLOCK.render('code_image_tool', arguments)}\nafter")
    assert (len(found.bodies), found.rest, found.unclosed) == (1, f"before\n{CUT}\nafter", False)
    assert BLOCK.read(found.bodies[0], DEFAULT_TOOLS) == RawCall("code_image_tool", arguments)


@pytest.mark.parametrize("dialect", EVERY)
@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.sampled_from([*MARKUP, "<think>", "</think>", "<answer>", "</answer>", "\0"])).map("".join))
def test_nothing_a_policy_writes_raises(dialect: Dialect, text: str) -> None:
    for around in (
        text,
        f"<tool_call>{text}</tool_call>",
        f"<tool_call><function=measure>{text}</function></tool_call>",
    ):
        parsed = parse_turn(around, TOOLS[dialect.name], dialect)
        assert parsed.call is None or parsed.error is None
        parse_calls(around, TOOLS[dialect.name], dialect)


@pytest.mark.parametrize("dialect", EVERY)
def test_reading_takes_linear_time(dialect: Dialect) -> None:
    begun = time.process_time()
    for piece in (
        "<tool_call>",
        "</tool_call>",
        "<tool_call><function=f></tool_call>",
        "```python\n",
        "\n```",
        "</function>",
    ):
        parse_turn(piece * 20_000, DEFAULT_TOOLS, dialect)
    assert time.process_time() - begun < 2.0


@pytest.mark.parametrize("dialect", EVERY)
def test_the_example_of_the_prompt_is_a_call_and_hides_answers_in_it(dialect: Dialect) -> None:
    (tool,) = DEFAULT_TOOLS
    assert parse_turn(example_call(tool, dialect), DEFAULT_TOOLS, dialect).call is not None
    text = dialect.render(tool.name, {"code": "print('<answer>1</answer>')", "image_index": 0})
    assert final_answer(text, dialect) is None
    assert final_answer(f"{text}\n<answer>2</answer>", dialect) == "2"


@pytest.mark.parametrize("dialect", [XML, BLOCK])
def test_demonstrations_are_rewritten_in_the_dialect(dialect: Dialect) -> None:
    arguments = {"code": "show(image)\nprint(1)", "image_index": 0}
    text = "<think>t</think>" + HERMES.render("code_image_tool", arguments)
    assert translated(text, HERMES) is text
    assert translated(text, dialect) == "<think>t</think>" + dialect.render("code_image_tool", arguments)
    wrong = "<think>t</think><tool_call>{oops</tool_call>"
    assert translated(wrong, dialect) == wrong


def test_a_fence_needs_one_tool_that_runs_code() -> None:
    AgentConfig(dialect="python_block")
    with pytest.raises(ValueError, match="needs one tool with a 'code' argument"):
        AgentConfig(dialect="python_block", tools=[CodeTool(), Measure()])
    with pytest.raises(ValueError, match="name one of hermes, qwen_xml, python_block"):
        AgentConfig(dialect="hermess")
    assert dialect_named("cv_lightning.dialects.HermesDialect").name == "hermes"
