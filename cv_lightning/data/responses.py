"""The tool's response to a turn of a demonstration, as the agent writes it in a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.prompt import IMAGE_MARK, PromptConfig, cut_said, response_parts, text_part, tool_ok_text
from cv_lightning.agent.protocol import parse_turn
from cv_lightning.data.conversations import DemoTurn
from cv_lightning.tools import DEFAULT_TOOLS, Tool

Parts = list[dict[str, str]]
Sizes = Sequence[tuple[tuple[int, int], tuple[int, int]]]
"""(original size, size for the model) of each image of a response."""


@dataclass(frozen=True, kw_only=True)
class ResponseWriter:
    """Writes the responses of conversations under the texts, tools and limits of an agent."""

    encoder: DialogueEncoder
    prompt: PromptConfig
    tools: Sequence[Tool] = DEFAULT_TOOLS
    max_chars: int = AgentConfig.max_tool_text_chars
    """Maximum characters of a response, as in `agent.max_tool_text_chars`."""

    def response(self, turn: DemoTurn, first_image: int, sizes: Sizes) -> tuple[Parts, str]:
        """Content parts of the response to a turn, and the text that the model reads in it.

        Args:
            turn: The turn.
            first_image: Number of the response's first image in the conversation.
            sizes: Sizes of `turn.images`.
        """
        if turn.response_text:
            return self._as_written(turn.response_text, len(sizes))
        prompt, parsed = self.prompt, parse_turn(turn.text, self.tools)
        error = turn.error
        if parsed.call is None and parsed.error is not None:
            text = prompt.parse_error.format(error=error or parsed.error)
            return response_parts(text, 0, self.max_chars, literal=self.encoder.literal)
        note = prompt.one_call.format(count=parsed.num_calls) if parsed.num_calls > 1 else ""
        if error or (not sizes and turn.said is None):
            note = prompt.tool_error.format(error=error) + note
        shown = [tool_ok_text(prompt, number, *size) for number, size in enumerate(sizes, first_image)]
        name = parsed.call.name if parsed.call is not None else ""
        limit = next((tool.max_text_tokens for tool in self.tools if tool.name == name), None)
        said = self.encoder.fit(cut_said(turn.said or "", self.max_chars), limit)
        return response_parts("\n".join(shown) + note, len(sizes), self.max_chars, said, self.encoder.literal)

    def _as_written(self, text: str, num_images: int) -> tuple[Parts, str]:
        """A response that the file states whole. Control tokens and tags of the protocol in it are plain text."""
        if IMAGE_MARK not in text:
            text = IMAGE_MARK * num_images + text
        parts: Parts = []
        for number, piece in enumerate(text.split(IMAGE_MARK)):
            parts += [{"type": "image"}] if number else []
            parts += [text_part(self.encoder.literal(piece))] if piece else []
        return parts, "".join(part.get("text", IMAGE_MARK) for part in parts)
