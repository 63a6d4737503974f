"""Texts for the model: the system prompt, the question, and every tool response.

The system prompts are files in `prompts/`, which the config can override; this module fills them in.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from cv_lightning.agent.protocol import example_call
from cv_lightning.dialects import HERMES, Dialect
from cv_lightning.sandbox.wire import CUT_OUT
from cv_lightning.tools import DEFAULT_TOOLS, Tool
from cv_lightning.tools.base import Coordinates
from cv_lightning.tools.schema import describe_arguments
from cv_lightning.types import DataError, Message, Task

PROMPT_FOLDER = Path(__file__).parent / "prompts"
IMAGE_MARK = "<image>"
CUT = "\0"
"""`DialogueEncoder` cuts a text here before it tokenises the pieces, so that no token spans it. No row contains it."""
_MARKUP = re.compile(r"<(?=/?(?:think|tool_call|tool_response|answer)>)")


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Texts around the question. `{...}` fields are filled in; `<image>` stands for the image."""

    system: str = "default"
    """`default`: our system prompt; `none`: no system message; else a file's path, or the text. `{tools}` in it is
    replaced by the description of the tools."""
    system_without_tool: str = "default"
    """System prompt of evaluations with the tools disabled, given in the same way."""
    question: str = "{images}{question}"
    """User message of a task without messages of its own. `{images}` is one mark per image."""
    tool_ok: str = "<image>\n{size}"
    """Tool response if the call made an image."""
    tool_error: str = "Error: {error}"
    """Tool response if the call failed."""
    parse_error: str = "The tool call could not be read: {error}"
    """Tool response if a call is malformed or names another tool."""
    one_call: str = " Only the first of your {count} calls was run; make one call a turn."
    """Added to the response if a turn has several calls."""
    answer_prefix: str | None = None
    """Start of the model's turn with the tools disabled, such as `<answer>`: what follows is an answer also where the
    model would call the tool or stop. Null: the model begins the turn itself."""
    coordinates: Coordinates = "original_px"
    """Frame of the sizes that the model reads; code always works on original pixels through `image.size`."""
    state_size: bool = True
    """State each image's size in the prompt and in tool responses (the reference does not)."""

    def __post_init__(self) -> None:
        fields = {"question": ("images", "question"), "tool_ok": ("size", "index"), "tool_error": ("error",)}
        fields |= {"parse_error": ("error",), "one_call": ("count",)}
        for name, known in fields.items():
            try:
                getattr(self, name).format(**dict.fromkeys(known, ""))
            except (KeyError, IndexError, ValueError) as error:
                places = ", ".join(f"{{{field}}}" for field in known)
                raise ValueError(
                    f"prompt.{name} {getattr(self, name)!r}: only {places} can be filled in ({error!r}); "
                    "write {{ and }} for braces"
                ) from error
        if self.tool_ok.count(IMAGE_MARK) != 1:
            raise ValueError(
                f"prompt.tool_ok {self.tool_ok!r} must hold {IMAGE_MARK} exactly once, where the new image stands"
            )
        for name in ("system", "system_without_tool"):
            given = getattr(self, name)
            if re.fullmatch(r"\S+\.(md|txt)", given) and not os.path.isfile(given):
                raise ValueError(f"prompt.{name}: there is no file {given}")

    def system_text(self, tools: Sequence[Tool] = DEFAULT_TOOLS, dialect: Dialect = HERMES) -> str | None:
        """The system message; None for none.

        Args:
            tools: Tools that it describes; empty for none.
            dialect: How their calls are written.
        """
        described = tools_text(tools, dialect)
        given, file = (self.system, "system.md") if tools else (self.system_without_tool, "system_without_tool.md")
        if given == "none":
            return None
        if given != "default":
            return (_read(Path(given)) if os.path.isfile(given) else given).replace("{tools}", described)
        hints = "\n".join(f"- {hint}" for hint in dict.fromkeys(hint for tool in tools for hint in tool.hints))
        opening = tools[0].opening if len(tools) == 1 else Tool.opening
        text = _read(PROMPT_FOLDER / file).replace("{opening}", opening)
        return text.replace("{hints}\n", f"{hints}\n" if hints else "").replace("{tools}", described)


def tools_text(tools: Sequence[Tool], dialect: Dialect = HERMES) -> str:
    """Section of the system prompt on the tools: purpose, arguments and an example call of each."""
    sections = [
        f"`{tool.name}` {tool.description}\n\nArguments:\n{describe_arguments(tool.parameters)}\n\n"
        f"Call it like this, once a turn at most, and wait for its answer:\n{example_call(tool, dialect)}"
        for tool in tools
    ]
    return "\n\n".join([f"# Tool{'s' * (len(tools) > 1)}\n{sections[0]}", *sections[1:]]) if tools else ""


@cache
def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()


def size_statement(index: int, original: tuple[int, int], seen: tuple[int, int], coordinates: Coordinates) -> str:
    """One sentence on an image's size, in the frame that the model uses."""
    width, height = original
    if coordinates == "original_px":
        return f"Image {index} is {width}x{height} pixels."
    if coordinates == "model_px":
        return f"Image {index}: you see it at {seen[0]}x{seen[1]}; image.size is ({width}, {height})."
    return f"Image {index}: coordinates run from 0 to 1000 both ways; image.size is ({width}, {height})."


def tool_ok_text(config: PromptConfig, index: int, original: tuple[int, int], seen: tuple[int, int]) -> str:
    """Text of the tool response with image `index`, with its `<image>` mark."""
    size = size_statement(index, original, seen, config.coordinates) if config.state_size else ""
    return config.tool_ok.format(size=size, index=index).strip()


def text_part(text: str) -> dict[str, str]:
    """A text part in which control tokens of the chat format are broken up."""
    return {"type": "text", "text": text.replace("<|", "< |")}


def literal(text: str) -> str:
    """Text whose tags of the protocol (`<tool_call>`, `<think>`, ...) are tokenised as text, not as tags."""
    return _MARKUP.sub("<" + CUT, text.replace(CUT, ""))


def literal_part(text: str) -> dict[str, str]:
    """A text part in which control tokens and tags of the protocol are plain text."""
    return text_part(literal(text))


def split_marks(text: str) -> list[dict[str, str]]:
    """Split text at its `<image>` marks into the content parts of a chat message."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append(text_part(piece))
    return parts


def response_parts(
    text: str, num_images: int, limit: int, said: str = "", literal: Callable[[str], str] = literal
) -> tuple[list[dict[str, str]], str]:
    """Content parts of a tool response, and the text that the model reads in it.

    Images come first, then the tool's own text; an error comes after that text. Only our own marks stand for images;
    anything in a tool's own text that looks like a mark or a tag of the protocol is broken up.

    Args:
        text: The agent's text; it has `num_images` `<image>` marks.
        num_images: Images that the response shows.
        limit: Maximum characters of text without the marks; the middle of a longer text is cut out.
        said: The tool's own text.
        literal: Makes tags and special tokens plain text; `DialogueEncoder.literal` knows those of the tokenizer.
    """
    if not num_images:
        shown = cut_middle(harmless(text.strip()), limit)
        said = cut_said(harmless(said), limit - len(shown) - 1)
        shown = "\n".join(filter(None, (said, shown)))
        return [text_part(literal(shown))], shown
    left, pieces = limit, []
    for piece in text.strip().split(IMAGE_MARK, num_images):
        pieces.append(cut_middle(piece, left))
        left -= len(pieces[-1])
    parts = split_marks(IMAGE_MARK.join(pieces))
    shown = "".join(part.get("text", IMAGE_MARK) for part in parts)
    if said := cut_said(harmless(said), left - 1):
        parts, shown = [*parts, text_part("\n" + literal(said))], f"{shown}\n{said}"
    return parts, shown


def harmless(text: str) -> str:
    """Text without marks of images, ends of the response and control tokens: they get a space after the `<`."""
    return text_part(re.sub(r"<(image|/?tool_response)>", r"< \1>", text.replace(CUT, "")))["text"]


def cut_said(text: str, limit: int) -> str:
    """A tool's text in at most `limit` characters, without line ends at its end."""
    text = text.rstrip("\n")
    return text if len(text) <= limit else cut_middle(text, limit, CUT_OUT)


def cut_middle(text: str, limit: int, mark: str = " ... ") -> str:
    """At most `limit` characters; the middle of a longer text is replaced by a mark."""
    if len(text) <= limit:
        return text
    if limit <= len(mark):
        return text[: max(0, limit)]
    head = (limit - len(mark)) // 2
    return text[:head] + mark + text[len(text) - (limit - len(mark) - head) :]


def _from_row(message: Message) -> Message:
    """A row's message, with plain text for a user or a tool; a system message may describe the protocol."""
    return replace(message, content=literal(message.content)) if message.role in ("user", "tool") else message


def task_messages(
    task: Task,
    sizes: list[tuple[tuple[int, int], tuple[int, int]]],
    config: PromptConfig,
    tools: Sequence[Tool] = DEFAULT_TOOLS,
    dialect: Dialect = HERMES,
) -> list[dict[str, Any]]:
    """Chat messages of a task as content parts, with exactly one image part per task image.

    Args:
        task: Its own `messages` are used if it has any; our system message is put first if they have none.
        sizes: (original size, model size) of each task image.
        config: Texts of the prompt.
        tools: Tools that the prompt describes; empty for none.
        dialect: How their calls are written.

    Raises:
        DataError: The number of image marks differs from the number of images.
    """
    messages = [_from_row(message) for message in task.messages]
    if not messages:
        marks = IMAGE_MARK * len(task.images)
        messages = [Message(role="user", content=config.question.format(images=marks, question=literal(task.question)))]
    system = config.system_text(tools, dialect)
    if system is not None and messages[0].role != "system":
        messages.insert(0, Message(role="system", content=system))
    num_marks = sum(message.content.count(IMAGE_MARK) for message in messages)
    if num_marks != len(task.images):
        raise DataError(f"task {task.id}: {num_marks} <image> marks in its prompt but {len(task.images)} images")
    rendered: list[dict[str, Any]] = [{"role": m.role, "content": split_marks(m.content)} for m in messages]
    if config.state_size:
        lines = [size_statement(i, full, seen, config.coordinates) for i, (full, seen) in enumerate(sizes)]
        rendered[-1]["content"].append({"type": "text", "text": "\n" + "\n".join(lines)})
    return rendered
