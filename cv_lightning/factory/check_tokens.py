"""Number of tokens of a task's prompt or of a conversation, counted by the agent's own encoder."""

from __future__ import annotations

from collections.abc import Sequence

from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.prompt import PromptConfig, task_messages
from cv_lightning.agent.protocol import translated
from cv_lightning.data.conversations import Conversation
from cv_lightning.data.responses import ResponseWriter
from cv_lightning.tools import DEFAULT_TOOLS, Tool
from cv_lightning.types import Task


class TokenCounter:
    """Counts with a model's tokenizer; images need a size only.

    Args:
        processor: Hugging Face folder of a model.
        min_pixels: Pixels of the smallest image for the model; None: the processor's.
        max_pixels: Pixels of the largest image for the model; None: the processor's.
        tools: Tools that the system prompt offers.

    Raises:
        CheckpointError: The folder has no processor.
    """

    def __init__(
        self,
        processor: str,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        tools: Sequence[Tool] = DEFAULT_TOOLS,
    ) -> None:
        from cv_lightning.models.loading import PolicyConfig, load_adapter

        adapter = load_adapter(PolicyConfig(path=processor, min_pixels=min_pixels, max_pixels=max_pixels))
        self.limits = adapter.image_rule
        self.encoder = DialogueEncoder(adapter)
        self.prompt, self.tools = PromptConfig(), tools

    def task(self, task: Task) -> int:
        """Tokens of a task's prompt with the tool offered, images expanded."""
        sizes = [(image.size, self.limits.model_size(*image.size)) for image in task.images]
        ids = self.encoder.prompt_ids(task_messages(task, sizes, self.prompt, self.tools, self.encoder.dialect))
        return len(ids) - len(task.images) + sum(self.encoder.num_image_tokens(seen) for _, seen in sizes)

    def conversation(self, conversation: Conversation) -> int:
        """Tokens of a conversation in SFT."""
        total = self.task(conversation.task)
        num_images = len(conversation.task.images)
        writer = ResponseWriter(encoder=self.encoder, prompt=self.prompt, tools=self.tools)
        for turn in conversation.turns:
            total += len(self.encoder.assistant_ids(translated(turn.text, self.encoder.dialect)))
            if turn.is_answered or turn is not conversation.turns[-1]:
                sizes = [(image.size, self.limits.model_size(*image.size)) for image in turn.images]
                parts, _ = writer.response(turn, num_images, sizes)
                total += len(self.encoder.tool_ids(parts)) - len(sizes)
                total += sum(self.encoder.num_image_tokens(seen) for _, seen in sizes)
                num_images += len(sizes)
        return total
