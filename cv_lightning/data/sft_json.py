"""SFT files: a JSON list of conversations with the tool, to `Conversation` objects.

An item has `conversations` (a list of `{from: human|gpt|tool, value}`), `images` (paths in the order of the
`<image>` marks) and may have `system`. The first turns are the human's question, then `gpt` and `tool` alternate.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cv_lightning.data.demonstrations import Conversation, DemoTurn
from cv_lightning.data.readers import IMAGE_MARK, load_image
from cv_lightning.data.rows import ReaderConfig, RowError, RowProblems, expand_files
from cv_lightning.types import DataError, Message, Task, ToolCall

TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)


class ConversationFiles:
    """The usable conversations of JSON files, by position.

    `problems` lists the items that were skipped. Texts are in memory, images are read when a conversation is.

    Args:
        files: paths of JSON files.
        config: prompt and folder of images.

    Raises:
        DataError: a file is missing or no JSON list, or no item of all files can be used.
    """

    def __init__(self, files: Sequence[str], config: ReaderConfig) -> None:
        self.config = config
        self.problems = RowProblems()
        self._items: list[tuple[Path, int, Mapping[str, Any]]] = []
        for path in expand_files(files, "--data train_files"):
            for number, item in enumerate(_read_list(path)):
                try:
                    conversation_of_item(item, path, number, config, decode=False)
                except RowError as error:
                    self.problems.add(path, number, error)
                else:
                    self._items.append((path, number, item))
        self.problems.report(len(self))

    def __len__(self) -> int:
        return len(self._items)

    def row(self, position: int) -> Conversation:
        """The conversation at a position; the next one whose pixels can be decoded if its own cannot.

        Raises:
            DataError: the pixels of no conversation can be decoded.
        """
        for at in range(position, position + len(self)):
            path, number, item = self._items[at % len(self)]
            try:
                return conversation_of_item(item, path, number, self.config)
            except RowError as error:
                self.problems.add(path, number, error)
        raise DataError(f"no conversation with pixels that can be decoded:\n{self.problems.summary()}")

    def order(self, rng: random.Random) -> list[int]:
        """All positions, shuffled."""
        return rng.sample(range(len(self)), len(self))


def _read_list(path: Path) -> list[Any]:
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(items, list):
        raise DataError(f"{path}: holds a {type(items).__name__}; a list of conversations is wanted")
    return items


# ------------------------------------------------------------------------------------------------ one item
def conversation_of_item(
    item: Any, path: Path, number: int, config: ReaderConfig, *, decode: bool = True
) -> Conversation:
    """The conversation that an item describes.

    Args:
        item: entry of the list.
        path: file, for the id, relative image paths and messages.
        number: entry in the file, from 0.
        config: prompt and folder of images.
        decode: False reads no more than the images' headers.

    Raises:
        RowError: the item cannot be used.
    """
    speakers = _speakers(item)
    marks = sum(value.count(IMAGE_MARK) for _, value in speakers)
    names = item.get("images") or []
    if marks != len(names):
        raise RowError("image marks", f"{marks} {IMAGE_MARK} marks but there are {len(names)} images")
    folder = Path(config.image_folder or path.parent)
    images = [load_image(folder / str(name), f"images[{i}]", decode) for i, name in enumerate(names)]
    question = speakers[0][1]
    num_given = question.count(IMAGE_MARK)
    if num_given == 0:
        raise RowError("image marks", f"the question has no {IMAGE_MARK} mark; the model would see nothing")
    turns = _turns(speakers[1:], images[num_given:])
    answers = [answer for turn in turns for answer in ANSWER.findall(turn.text)]
    messages = [Message(role="system", content=str(item["system"]))] if item.get("system") else []
    messages.append(Message(role="user", content=question))
    task = Task(
        id=f"{path.stem}:{number}",
        question=question.replace(IMAGE_MARK, "").strip(),
        images=tuple(images[:num_given]),
        ground_truth=answers[-1] if answers else "",
        data_source=path.stem,
        messages=tuple(messages) if config.prompt == "given" else (),
    )
    return Conversation(task=task, turns=turns)


def _speakers(item: Any) -> list[tuple[str, str]]:
    """(speaker, text) of each turn, checked to be human, then gpt and tool in turn."""
    try:
        speakers = [(str(turn["from"]), str(turn["value"])) for turn in item["conversations"]]
    except (TypeError, KeyError) as error:
        raise RowError("conversations", f"conversations is no list of {{from, value}} ({error!r})") from error
    expected = ["human"] + ["gpt", "tool"] * (len(speakers) // 2)
    if len(speakers) < 2 or [speaker for speaker, _ in speakers] != expected[: len(speakers)]:
        order = ", ".join(speaker for speaker, _ in speakers)
        raise RowError("conversations", f"turns must be human, then gpt and tool in turn; they are: {order}")
    return speakers


def _turns(speakers: Sequence[tuple[str, str]], images: Sequence[Image.Image]) -> tuple[DemoTurn, ...]:
    """Assistant turns, each with what the tool said after it."""
    turns = []
    remaining = iter(images)
    for at in range(0, len(speakers), 2):
        text = speakers[at][1].strip()
        if IMAGE_MARK in text:
            raise RowError("image marks", f"a gpt turn holds an {IMAGE_MARK} mark; only human and tool turns may")
        response = speakers[at + 1][1] if at + 1 < len(speakers) else ""
        if response.count(IMAGE_MARK) > 1:
            raise RowError("image marks", f"a tool turn shows {response.count(IMAGE_MARK)} images; one at most")
        image = next(remaining) if IMAGE_MARK in response else None
        call = parse_call(text)
        turns.append(
            DemoTurn(
                text=text,
                call=call,
                result_image=image,
                response_text=response.replace(IMAGE_MARK, "").strip(),
            )
        )
    return tuple(turns)


def parse_call(text: str) -> ToolCall | None:
    """The first call in an assistant turn; one that is no JSON keeps its text as code (it was meant to fail)."""
    found = TOOL_CALL.search(text)
    if found is None:
        return None
    try:
        call = json.loads(found[1])
        arguments = call["arguments"]
        return ToolCall(
            name=str(call["name"]),
            code=str(arguments.get("code", "")),
            image_index=int(arguments.get("image_index", 0)),
            description=str(arguments.get("description", "")),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return ToolCall(name="", code=found[1])
