"""Number of tokens of a task's prompt or of a conversation, counted by the agent's own encoder."""

from __future__ import annotations

from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.prompt import PromptConfig, literal_part, split_marks, task_messages, tool_ok_text
from cv_lightning.data.conversations import Conversation
from cv_lightning.types import Task


class TokenCounter:
    """Counts with a model's tokenizer; images need a size only.

    Args:
        processor: Hugging Face folder of a model.
        min_pixels: Pixels of the smallest image for the model; None: the processor's.
        max_pixels: Pixels of the largest image for the model; None: the processor's.

    Raises:
        CheckpointError: The folder has no processor.
    """

    def __init__(self, processor: str, min_pixels: int | None = None, max_pixels: int | None = None) -> None:
        from cv_lightning.models.loading import PolicyConfig, load_adapter

        adapter = load_adapter(PolicyConfig(path=processor, min_pixels=min_pixels, max_pixels=max_pixels))
        self.limits = adapter.image_rule
        self.encoder = DialogueEncoder(adapter)
        self.prompt = PromptConfig()

    def task(self, task: Task) -> int:
        """Tokens of a task's prompt with the tool offered, images expanded."""
        sizes = [(image.size, self.limits.model_size(*image.size)) for image in task.images]
        ids = self.encoder.prompt_ids(task_messages(task, sizes, self.prompt))
        return len(ids) - len(task.images) + sum(self.encoder.num_image_tokens(seen) for _, seen in sizes)

    def conversation(self, conversation: Conversation) -> int:
        """Tokens of a conversation in SFT."""
        total = self.task(conversation.task)
        num_images = len(conversation.task.images)
        for turn in conversation.turns:
            total += len(self.encoder.assistant_ids(turn.text))
            image = turn.result_image
            if image is not None:
                seen = self.limits.model_size(*image.size)
                text = tool_ok_text(self.prompt, num_images, image.size, seen)
                parts = (
                    [{"type": "image"}, literal_part(turn.response_text)] if turn.response_text else split_marks(text)
                )
                total += len(self.encoder.tool_ids(parts)) - 1 + self.encoder.num_image_tokens(seen)
                num_images += 1
            elif turn is not conversation.turns[-1]:
                response = turn.response_text or self.prompt.tool_error.format(error="")
                total += len(self.encoder.tool_ids([literal_part(response)]))
        return total
