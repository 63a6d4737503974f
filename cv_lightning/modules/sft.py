"""Supervised fine-tuning on multi-turn conversations, packed."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from cv_lightning.agent.dialogue import Dialogue, DialogueEncoder
from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.agent.protocol import translated
from cv_lightning.data.conversations import Conversation
from cv_lightning.data.modules import DemonstrationBatch
from cv_lightning.data.responses import ResponseWriter
from cv_lightning.models.loading import PolicyConfig
from cv_lightning.models.packing import PackedBatch, TrainSequence
from cv_lightning.modules.base import OptimizerConfig, PolicyModule
from cv_lightning.ranges import PositiveInt
from cv_lightning.tools import DEFAULT_TOOLS, Tool
from cv_lightning.tools.schema import check_tools


class SFTModule(PolicyModule):
    """Cross-entropy on the assistant's tokens; all other tokens are context.

    Args:
        policy: The policy model and how it is loaded.
        optimizer: AdamW and schedule.
        max_tokens_per_row: Token budget of one packed micro-batch.
        prompt: Texts of the prompt; the command line sets those of `rollout.agent`, with which RL continues.
        tools: Tools that the system prompt offers, also those of `rollout.agent`. None: the code tool.
        dialect: How tool calls are written, also that of `rollout.agent`. None: as the model's family does.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        optimizer: OptimizerConfig | None = None,
        max_tokens_per_row: PositiveInt = 16384,
        prompt: PromptConfig | None = None,
        tools: list[Tool] | None = None,
        dialect: str | None = None,
    ) -> None:
        super().__init__(policy, optimizer, max_tokens_per_row)
        self.prompt = prompt or PromptConfig()
        self.tools = tuple(tools or DEFAULT_TOOLS)
        check_tools(self.tools)
        self.encoder = self.encoder.speaking(dialect)
        self.encoder.dialect.check_tools(self.tools)

    def training_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """Take one optimizer step on a batch of conversations; the loss is a mean over the tokens of all ranks."""
        start = time.perf_counter()
        sequences = self.conversation_sequences(batch.conversations)
        micro_batches = self.pack_micro_batches(sequences)
        counts = [sum(sum(s.loss_mask) for s in sequences), sum(len(s.token_ids) for s in sequences)]
        num_learned, num_tokens = self.reduce_sum([float(count) for count in counts])
        rate = self.learning_rate
        losses: list[torch.Tensor] = []

        def loss(micro_batch: PackedBatch) -> torch.Tensor:
            share = -self.logprobs(micro_batch).logprobs.sum() / max(num_learned, 1.0)
            losses.append(share.detach())
            return share

        step = self.accumulate_and_step(micro_batches, loss)
        self.vision_cache.clear()
        self.iteration += 1
        (mean,) = self.reduce_sum([float(torch.stack(losses).sum())])
        seconds = time.perf_counter() - start
        self.log_dict(
            {
                "sft/loss": mean,
                "sft/grad_norm": step.grad_norm,
                "sft/skipped_steps": float(step.skipped),
                "sft/lr": rate,
                "sft/tokens": num_tokens,
                "sft/tokens_per_s": num_tokens / seconds,
                "time/update_s": seconds,
                "iteration": float(self.iteration),
            }
        )

    def conversation_sequences(self, conversations: list[Conversation]) -> list[TrainSequence]:
        """Training sequences of conversations."""
        dialogues = [encode_conversation(self.encoder, each, self.prompt, self.tools) for each in conversations]
        cache = self.vision_cache
        cache.get([image for dialogue in dialogues for image in dialogue.images])
        return [
            TrainSequence(token_ids=d.token_ids, loss_mask=d.loss_mask, vision=cache.get(d.images)) for d in dialogues
        ]


def encode_conversation(
    encoder: DialogueEncoder,
    conversation: Conversation,
    prompt: PromptConfig,
    tools: Sequence[Tool] = DEFAULT_TOOLS,
) -> Dialogue:
    """Tokens and mask of a demonstration: those of a rollout in which the agent ran the same calls.

    Responses that the conversation does not state whole are in the agent's words. Hermes calls are written in the
    encoder's dialect.
    """
    task = conversation.task
    writer = ResponseWriter(encoder=encoder, prompt=prompt, tools=tools)
    dialogue = encoder.start(task, [encoder.model_image(image) for image in task.images], prompt, tools)
    for turn in conversation.turns:
        ids = encoder.assistant_ids(translated(turn.text, encoder.dialect))
        dialogue.append_sampled(ids, [0.0] * len(ids), learn=turn.learn)
        if turn.is_answered or turn is not conversation.turns[-1]:
            views = [encoder.model_image(image) for image in turn.images]
            sizes = [(image.size, view.size) for image, view in zip(turn.images, views, strict=True)]
            parts, _ = writer.response(turn, len(dialogue.images), sizes)
            dialogue.append_context(encoder.tool_ids(parts), views)
    return dialogue
