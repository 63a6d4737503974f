"""Fenced Python: a call is a block of code between lines of backticks, for one tool that runs code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cv_lightning.dialects.base import CUT, CallBlocks, Dialect, OfferedTool, RawCall

CODE, IMAGE_INDEX = "code", "image_index"
_OPEN = re.compile(r"(?<!`)(`{3,})(?:python|py)[ \t]*\n")
_RUN = re.compile(r"`{3,}")
_INDEX = re.compile(r"# image_index: (\d{1,9}|default)(?:\n|\Z)")


class PythonBlockDialect(Dialect):
    """A fenced block; its first line may be `# image_index: 1`, else the tool's default image is meant."""

    name = "python_block"
    call_token = "```python"
    call_end = "line of ``` after its code"

    def find(self, text: str) -> CallBlocks:
        """Find the closed fences. A fence ends at a line of as many backticks as it begins with, or more."""
        bodies: list[str] = []
        rest: list[str] = []
        position = 0
        while opening := _OPEN.search(text, position):
            close = re.compile(rf"\n[ \t]*`{{{len(opening[1])},}}[ \t]*(?=\n|\Z)").search(text, opening.end() - 1)
            if close is None:
                return CallBlocks(bodies, "".join([*rest, text[position : opening.start()]]), True)
            rest += [text[position : opening.start()], CUT]
            bodies.append(text[opening.end() : close.start()])
            position = close.end()
        return CallBlocks(bodies, "".join([*rest, text[position:]]), False)

    def read(self, body: str, tools: Sequence[OfferedTool]) -> RawCall | str:
        """A call of the only tool with the block as its code."""
        index = _INDEX.match(body)
        code = body[index.end() :] if index else body
        if not code.strip():
            return "has no code"
        given = {} if index is None or index[1] == "default" else {IMAGE_INDEX: int(index[1])}
        return RawCall(tools[0].name if tools else "", {CODE: code} | given)

    def render(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The code between fences; arguments other than `code` and `image_index` cannot be written."""
        code, index = arguments.get(CODE), arguments.get(IMAGE_INDEX)
        if not isinstance(code, str):
            raise ValueError(f"{name}: {self.name} can only write calls with a text {CODE!r}")
        fence = "`" * max([3, *(len(run) + 1 for run in _RUN.findall(code))])
        if isinstance(index, int):
            code = f"# {IMAGE_INDEX}: {index}\n{code}"
        elif _INDEX.match(code):
            code = f"# {IMAGE_INDEX}: default\n{code}"
        return f"{fence}python\n{code}\n{fence}"

    def check_tools(self, tools: Sequence[OfferedTool]) -> None:
        """Refuse anything but one tool with a `code` argument."""
        names = ", ".join(tool.name for tool in tools)
        if tools and (len(tools) > 1 or CODE not in tools[0].parameters["properties"]):
            raise ValueError(
                f"agent.dialect {self.name}: a block of Python names no tool, so it needs one tool with a {CODE!r} "
                f"argument, and the tools are {names}\noffer only such a tool in agent.tools, or name another dialect"
            )
