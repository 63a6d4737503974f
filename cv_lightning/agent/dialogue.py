"""Tokens in, tokens out: one conversation as the ids that the engine saw and sampled, with its loss mask.

History is never decoded and tokenised again. Two streams grow together: `engine_ids` with one image token per image,
which the engine expands, and `token_ids` with one per image feature, which training uses. Everything that the policy
did not sample, the turn separator included, has mask False.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from PIL import Image

from cv_lightning.agent.prompt import (
    CUT,
    PromptConfig,
    cut_middle,
    harmless,
    literal,
    task_messages,
    text_part,
)
from cv_lightning.dialects import dialect_named
from cv_lightning.images import to_model_image
from cv_lightning.sandbox.wire import CUT_OUT
from cv_lightning.tools import DEFAULT_TOOLS, Tool
from cv_lightning.types import EngineError, Task

if TYPE_CHECKING:
    from cv_lightning.models.adapters import ModelAdapter


MAX_TOKENS_A_CHARACTER = 8
"""Of text as byte-level tokenizers and the breaking of tags make them; used only to skip counting short texts."""


class DialogueEncoder:
    """Turns messages into ids with the tokenizer, chat template, dialect and image rule of one model.

    Args:
        adapter: Bound to the model's processor.
        dialect: Name of the dialect of tool calls. None: the adapter's.
    """

    def __init__(self, adapter: ModelAdapter, dialect: str | None = None) -> None:
        self.adapter = adapter
        self.dialect = dialect_named(dialect or adapter.dialect)
        self.tokenizer = adapter.tokenizer
        self.image_rule = adapter.image_rule
        self.end_id: int = adapter.end_id
        self.image_pad_id: int = adapter.image_id
        self._ids = lru_cache(maxsize=4096)(self._tokenize)
        added = self.tokenizer.get_added_vocab()
        tokens = "|".join(re.escape(token) for token in added if len(token) > 1) or "(?!)"
        self._added = re.compile(f"(?={tokens}).", re.DOTALL)
        """The first character of every special token in a text, of overlapping ones too."""

    def speaking(self, dialect: str | None) -> DialogueEncoder:
        """This encoder, or one of the same model with another dialect; None for this one's."""
        if dialect is None or dialect_named(dialect) is self.dialect:
            return self
        return DialogueEncoder(self.adapter, dialect)

    def banned_ids(self, tool: bool) -> tuple[int, ...]:
        """Ids that must not be sampled.

        Args:
            tool: Whether a tool is offered. Without one, the token that begins a call in the dialect is banned.
        """
        return self.adapter.banned_ids() if tool else self.adapter.banned_ids(self.dialect.call_token)

    def _tokenize(self, text: str) -> tuple[int, ...]:
        pieces = [piece for piece in text.split(CUT) if piece]
        ids = self.tokenizer(pieces, add_special_tokens=False)["input_ids"] if pieces else []
        return tuple(token for piece in ids for token in piece)

    def literal(self, text: str) -> str:
        """Text in which neither a tag of the protocol nor a special token of this tokenizer is read as one.

        It reads as before: the pieces between the cuts are tokenised one by one.
        """
        return self._added.sub(lambda start: start[0] + CUT, literal(text))

    def fit(self, text: str, max_tokens: int | None) -> str:
        """A tool's text in at most `max_tokens` tokens; the middle of a longer text is cut out.

        Args:
            text: As the tool gave it, at most some ten thousand characters.
            max_tokens: None for any number.
        """
        if max_tokens is None or len(text) <= max_tokens // MAX_TOKENS_A_CHARACTER:
            return text
        kept, cut = len(text), text
        while (number := len(self._tokenize(self.literal(harmless(cut))))) > max_tokens and kept:
            kept = min(kept - 1, kept * max_tokens // number)
            cut = cut_middle(text, kept + len(CUT_OUT), CUT_OUT)
        return cut

    def render(self, messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
        """Text of messages by the adapter's chat template."""
        template = self.adapter.chat_template()
        text = self.tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=generation_prompt
        )
        return str(text)

    def prompt_ids(self, messages: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        """Ids of a prompt, generation prompt included, one pad per image."""
        return self._ids(self.render(messages, generation_prompt=True))

    def tool_ids(self, content: Sequence[dict[str, str]], after: Sequence[int] = ()) -> tuple[int, ...]:
        """Ids that follow a finished assistant turn: separator, tool message, generation prompt.

        Args:
            content: Parts of the tool message.
            after: The ids before it. If the turn ended with another token than the end of turn (a model may stop at
                its end of text), the end of turn is put first, so that the conversation follows the template.
        """
        rendered = self.render([{"role": "tool", "content": list(content)}], generation_prompt=True)
        missing = () if not len(after) or after[-1] == self.end_id else (self.end_id,)
        return missing + self._ids("\n" + rendered)

    def assistant_ids(self, text: str) -> tuple[int, ...]:
        """Ids of an assistant turn of a demonstration, end of turn included.

        Tags of the protocol are tokens of their own; control tokens of the chat format are broken up.
        """
        return (*self._ids(text_part(text)["text"]), self.end_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of sampled ids, special tokens kept, without the end of turn."""
        ids = ids[:-1] if len(ids) and ids[-1] == self.end_id else ids
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def num_image_tokens(self, size: tuple[int, int]) -> int:
        """Number of image features of an image of this model size."""
        return self.image_rule.num_tokens(size)

    def model_image(self, image: Image.Image) -> Image.Image:
        """The image as the model sees it."""
        return to_model_image(image, self.image_rule)

    def start(
        self,
        task: Task,
        images: Sequence[Image.Image],
        config: PromptConfig,
        tools: Sequence[Tool] = DEFAULT_TOOLS,
    ) -> Dialogue:
        """A dialogue with the prompt of a task; see `open`."""
        dialogue = Dialogue(encoder=self)
        self.open(dialogue, task, images, config, tools)
        return dialogue

    def open(
        self,
        dialogue: Dialogue,
        task: Task,
        images: Sequence[Image.Image],
        config: PromptConfig,
        tools: Sequence[Tool],
    ) -> None:
        """Put the prompt of a task into an empty dialogue.

        Args:
            dialogue: The empty dialogue.
            task: The question.
            images: `task.images` at model size.
            config: Texts of the prompt.
            tools: Tools that the prompt describes; empty for none.

        Raises:
            DataError: The number of image marks in the task's messages differs from the number of its images.
        """
        sizes = [(full.size, seen.size) for full, seen in zip(task.images, images, strict=True)]
        dialogue.append_context(self.prompt_ids(task_messages(task, sizes, config, tools, self.dialect)), images)


@dataclass(slots=True)
class Dialogue:
    """One growing conversation. Every `append_*` adds ids and images together, or nothing."""

    encoder: DialogueEncoder
    engine_ids: list[int] = field(default_factory=list)
    """Ids for the engine: one pad per image."""
    token_ids: list[int] = field(default_factory=list)
    """Ids for training: one pad per image feature."""
    loss_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    """Model images in the order of their marks."""

    def append_context(self, ids: Sequence[int], images: Sequence[Image.Image] = ()) -> None:
        """Append context ids, which the policy did not sample, with the images of their pads.

        Raises:
            EngineError: The numbers of pads and images differ.
        """
        pad = self.encoder.image_pad_id
        if ids.count(pad) != len(images):
            raise EngineError(f"{ids.count(pad)} image marks but {len(images)} images in one piece of a conversation")
        expanded: list[int] = []
        remaining = iter(images)
        for token in ids:
            expanded += [pad] * self.encoder.num_image_tokens(next(remaining).size) if token == pad else [token]
        self.engine_ids += ids
        self.token_ids += expanded
        self.loss_mask += [False] * len(expanded)
        self.logprobs += [0.0] * len(expanded)
        self.images += images

    def append_sampled(self, ids: Sequence[int], logprobs: Sequence[float] | None, learn: bool = True) -> None:
        """Append ids that the policy sampled, or a turn of a demonstration.

        Args:
            ids: The ids, end of turn included.
            logprobs: Log-probability of each id; None if the engine reports none, and the ids are not trained on.
            learn: False: the ids are context only.

        Raises:
            EngineError: An image pad is among the ids, or the number of log-probabilities differs.
        """
        if self.encoder.image_pad_id in ids:
            raise EngineError("the policy sampled an image token; ban vision tokens in sampling")
        if logprobs is None:
            logprobs, learn = [0.0] * len(ids), False
        if len(ids) != len(logprobs):
            raise EngineError(f"{len(ids)} sampled tokens but {len(logprobs)} log-probabilities")
        self.engine_ids += ids
        self.token_ids += ids
        self.loss_mask += [learn] * len(ids)
        self.logprobs += logprobs
