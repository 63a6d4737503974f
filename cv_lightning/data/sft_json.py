"""Conversations from SFT files: a JSON list (or JSON Lines) of conversations with the tool.

An item has `conversations` (a list of `{from: human|gpt|tool, value}`), `images` (paths in the order of the
`<image>` marks) and may have `system`. The first turn is the human's question, then `gpt` and `tool` alternate.
`messages` with `{role, content}` are read too. A `tool` turn's value is the whole response, or only the marks of its
images beside `text` (the tool's own text) and `error`, which the agent then frames as in a rollout. A `gpt` turn with
`"loss": false` (or `"weight": 0`), such as a deliberately wrong call, is part of the context and carries no loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from cv_lightning.agent.protocol import first_call, parse_turn
from cv_lightning.data.conversations import Conversation, DemoTurn
from cv_lightning.data.image_cells import load_images
from cv_lightning.data.readers import IMAGE_MARK, message_text, without_marks
from cv_lightning.data.rows import ReaderConfig, RowError, RowFiles, check_text, is_missing, log_unread
from cv_lightning.data.tables import read_items
from cv_lightning.dialects.hermes import CALL_CLOSE, CALL_OPEN
from cv_lightning.early import wrong_kind
from cv_lightning.rewards.markup import final_answer
from cv_lightning.tools import Tool
from cv_lightning.types import DataError, Message, Task

READ_KEYS = ("conversations", "messages", "images", "system", "id")
"""Keys of an item that are read, and its name."""
TOOL_KEYS = ("text", "error")
"""Keys of a tool's turn whose response the agent words."""
SPEAKERS = {
    "user": "human",
    "assistant": "gpt",
    "function_call": "gpt",
    "observation": "tool",
}
"""Other names of the speakers in common formats."""


class ConversationFiles(RowFiles[Conversation]):
    """The conversations of JSON files. Texts are in memory; images are read with their conversation.

    Args:
        files: Paths of .json or .jsonl files.
        config: Prompt and folder of images.
        tools: The agent's tools; a conversation that teaches the call of another one, or shows more images of a call
            than its tool returns, cannot be used. Empty: not checked.

    Raises:
        DataError: A file does not exist or is not a JSON list, or has no usable item.
    """

    def __init__(self, files: Sequence[str | Path], config: ReaderConfig, tools: Sequence[Tool] = ()) -> None:
        super().__init__(files, config, "--data.init_args.train_files")
        self._tools = tools
        for path in self.paths:
            if error := wrong_kind("data.init_args.train_files", str(path), "sft"):
                raise DataError(error)
        self._items = [read_items(path) for path in self.paths]
        for path, items in zip(self.paths, self._items, strict=True):
            log_unread(path, items[0] if items and isinstance(items[0], Mapping) else (), READ_KEYS)
        self._open(map(len, self._items))

    def read(self, index: int, *, decode: bool = True) -> Conversation:
        """One conversation; with `decode` False its images have sizes but no pixels.

        Raises:
            RowError: The item cannot be used.
        """
        file, number = self._index.locate(index)
        item = self._items[file][number]
        path, name = self.paths[file], self.names[file]
        conversation = conversation_of_item(item, path, number, self.config, decode=decode, name=name)
        check_calls(conversation, self._tools)
        return conversation


def check_calls(conversation: Conversation, tools: Sequence[Tool]) -> None:
    """Refuse what the agent could not have done with its tools; a wrong call without loss may name any tool.

    Args:
        conversation: The conversation.
        tools: The agent's tools; empty: nothing is checked.

    Raises:
        RowError: A learned turn calls a tool that the agent does not have, or a call shows more images than its tool
            returns.
    """
    most = {tool.name: tool.max_images for tool in tools}
    for turn in conversation.turns if tools else ():
        name = turn.call.name if turn.call is not None else ""
        if name and name not in most and turn.learn:
            raise RowError(
                "unknown tool",
                f"it teaches a call of {name[:60]!r}, and the agent has {', '.join(most)}: name the tool in "
                "rollout.agent.tools, or rename the calls",
            )
        if len(turn.images) > most.get(name, len(turn.images)):
            raise RowError(
                "too many images",
                f"a call of {name} shows {len(turn.images)} images, and the tool returns at most {most[name]}: raise "
                "its max_images in rollout.agent.tools, or leave images out",
            )


# ------------------------------------------------------------------------------------------------ one item
def conversation_of_item(
    item: Any, path: Path, number: int, config: ReaderConfig, *, decode: bool = True, name: str = ""
) -> Conversation:
    """The conversation that an item describes.

    Args:
        item: Entry of the list.
        path: File, for the id, relative image paths and messages.
        number: Entry in the file, from 0.
        config: Prompt and folder of images.
        decode: False reads only the images' headers.
        name: Start of the id; by default the file's stem.

    Raises:
        RowError: The item cannot be used.
    """
    system, speakers = _speakers(item)
    marks = sum(entry.text.count(IMAGE_MARK) for entry in speakers)
    if IMAGE_MARK in system:
        raise RowError("image marks", f"the system message holds an {IMAGE_MARK} mark; only human and tool turns may")
    names = item.get("images") or []
    if not isinstance(names, list):
        raise RowError("no image", f"images is a {type(names).__name__}; a list of paths is wanted")
    if marks != len(names):
        raise RowError("image marks", f"{marks} {IMAGE_MARK} marks but there are {len(names)} images")
    folder = Path(config.image_folder or path.parent)
    images = load_images(names, folder, decode)
    question = speakers[0].text
    num_given = question.count(IMAGE_MARK)
    if num_given == 0:
        raise RowError("image marks", f"the question has no {IMAGE_MARK} mark; the model would see nothing")
    turns = _turns(speakers[1:], images[num_given:])
    answers = [answer for turn in turns if (answer := final_answer(turn.text)) is not None]
    messages = [Message(role="system", content=system)] if system and config.system == "given" else []
    messages.append(Message(role="user", content=question))
    task = Task(
        id=f"{name or path.stem}:{number}",
        question=without_marks(question),
        images=images[:num_given],
        ground_truth=answers[-1] if answers else "",
        data_source=path.stem,
        messages=tuple(messages) if config.prompt == "given" else (),
    )
    return Conversation(task=task, turns=turns)


class _Entry(NamedTuple):
    """One entry of a conversation."""

    speaker: str
    text: str
    learn: bool
    """True if a gpt turn carries loss."""
    said: str | None = None
    """The `text` of a tool's turn."""
    error: str = ""
    """The `error` of a tool's turn."""


def _speakers(item: Any) -> tuple[str, list[_Entry]]:
    """The system message and the entries, which must be human, then gpt and tool alternately."""
    if not isinstance(item, Mapping):
        raise RowError("conversations", f"an item is a mapping with `conversations`; this is {str(item)[:200]!r}")
    is_chat = "conversations" not in item and "messages" in item
    turns, who, what = (
        (item["messages"], "role", "content") if is_chat else (item.get("conversations", ()), "from", "value")
    )
    try:
        speakers = [
            _Entry(
                SPEAKERS.get(str(turn[who]), str(turn[who])),
                _text(turn, who, what),
                _carries_loss(turn),
                *_said(turn, who),
            )
            for turn in turns
        ]
    except (TypeError, KeyError, AttributeError) as error:
        raise RowError("conversations", f"conversations is not a list of {{from, value}} ({error!r})") from error
    system = check_text("" if is_missing(item.get("system")) else str(item["system"]), "system")
    if speakers and speakers[0].speaker == "system":
        system = system or speakers[0].text
        speakers = speakers[1:]
    expected = ["human"] + ["gpt", "tool"] * (len(speakers) // 2)
    given = [entry.speaker for entry in speakers]
    if len(speakers) < 2 or given != expected[: len(speakers)]:
        order = ", ".join(given)[:300]
        raise RowError("conversations", f"turns must be human, then gpt and tool in turn; they are: {order}")
    if not any(entry.learn for entry in speakers[1::2]):
        raise RowError("nothing to learn", "every gpt turn says loss: false or weight: 0")
    return system, speakers


def _text(turn: Mapping[str, Any], who: str, what: str) -> str:
    """The text of a turn, which may be given in parts; a bare call gets the tags that the agent reads.

    The value of a tool's turn may be left out beside `text` or `error`.

    Raises:
        RowError: There is no valid text, for instance because the call is in `tool_calls`.
    """
    value = turn.get(what, "") if _said(turn, who) != (None, "") else turn[what]
    if is_missing(value):
        value = None
    if isinstance(value, list):
        value = message_text(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        calls = "; a call must stand in the text, between <tool_call> tags" if turn.get("tool_calls") else ""
        raise RowError("no text", f"the {what} of a turn of {turn[who]!r} is {value!r}, not a text{calls}")
    check_text(value, f"the {what} of a turn of {turn[who]!r}")
    if turn[who] == "function_call" and CALL_OPEN not in value:
        return f"{CALL_OPEN}\n{value.strip()}\n{CALL_CLOSE}"
    return value


def _carries_loss(turn: Mapping[str, Any]) -> bool:
    loss, weight = turn.get("loss", True), turn.get("weight", 1)
    if loss not in (True, False, None) or weight not in (0, 1, None):
        raise RowError("loss mark", f"loss must be true or false and weight 0 or 1, not {loss!r} and {weight!r}")
    return loss is not False and weight != 0


def _said(turn: Mapping[str, Any], who: str) -> tuple[str | None, str]:
    """The tool's own text and error in a tool's turn.

    Raises:
        RowError: They are not texts.
    """
    if SPEAKERS.get(str(turn[who]), turn[who]) != "tool":
        return None, ""
    given = {key: turn[key] for key in TOOL_KEYS if not is_missing(turn.get(key))}
    for key, value in given.items():
        if not isinstance(value, str):
            raise RowError("no text", f"the {key} of a tool's turn is {value!r}, not a text")
        check_text(value, f"the {key} of a tool's turn")
    return given.get("text"), given.get("error", "")


def _turns(speakers: Sequence[_Entry], images: Sequence[Image.Image]) -> tuple[DemoTurn, ...]:
    """Assistant turns, each with the tool's response."""
    turns = []
    remaining = iter(images)
    for at in range(0, len(speakers), 2):
        text = speakers[at].text.strip()
        if IMAGE_MARK in text:
            raise RowError("image marks", f"a gpt turn holds an {IMAGE_MARK} mark; only human and tool turns may")
        response = speakers[at + 1] if at + 1 < len(speakers) else None
        if response is not None and not parse_turn(text).num_calls:
            raise RowError(
                "no tool call", f"a tool turn follows {text[:80]!r}, which holds no {CALL_OPEN} outside a thought"
            )
        shown = tuple(islice(remaining, response.text.count(IMAGE_MARK))) if response is not None else ()
        turns.append(
            DemoTurn(
                text=text,
                call=first_call(text),
                result_image=shown[0] if shown else None,
                more_images=shown[1:],
                response_text=_response_text(response) if response is not None else "",
                said=response.said if response is not None else None,
                error=response.error if response is not None else "",
                learn=speakers[at].learn,
            )
        )
    return tuple(turns)


def _response_text(response: _Entry) -> str:
    """The whole response that a tool's turn states; empty if it states marks of images only.

    Raises:
        RowError: It states both, a response and the text or error of one.
    """
    beside = response.text.replace(IMAGE_MARK, "").strip()
    if beside and (response.said is not None or response.error):
        raise RowError("tool response", f"a tool turn has text or error, and {beside[:60]!r} in its value, too")
    return response.text.rstrip("\n") if beside else ""
