"""Supervised fine-tuning on multi-turn conversations, packed."""

from __future__ import annotations

import torch

from cv_lightning.agent.dialogue import Dialogue, DialogueEncoder
from cv_lightning.agent.prompt import PromptConfig, split_marks, text_part, tool_ok_text
from cv_lightning.data.demonstrations import Conversation
from cv_lightning.data.modules import DemonstrationBatch
from cv_lightning.model.loading import PolicyConfig
from cv_lightning.model.packing import PackedBatch, TrainRow, pack_rows
from cv_lightning.model.vision import VisionCache
from cv_lightning.modules.base import OptimizerConfig, PolicyModule
from cv_lightning.rl.microbatch import split_by_tokens


class SFTModule(PolicyModule):
    """Cross-entropy on the assistant's tokens; everything else is context."""

    def __init__(
        self,
        policy: PolicyConfig,
        optimizer: OptimizerConfig | None = None,
        max_tokens_per_row: int = 16384,
        prompt: PromptConfig | None = None,
    ) -> None:
        """
        Args:
            policy: which model, and how it is loaded.
            optimizer: AdamW and schedule.
            max_tokens_per_row: token budget of one packed row, which is one micro-batch.
            prompt: the words around the question; use the agent's own, or RL starts off-distribution (trap T2).
        """
        super().__init__(policy, optimizer, max_tokens_per_row)
        self.prompt = prompt or PromptConfig()
        self.vision_cache: VisionCache | None = None

    def training_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """One optimizer step on one batch of conversations; the loss is a mean over all ranks' tokens."""
        rows = [self.train_row(conversation) for conversation in batch.conversations]
        packed = [self.pack(chunk) for chunk in split_by_tokens([len(r.token_ids) for r in rows], self.max_tokens_per_row, rows)]
        num_loss, num_all = self.reduce_sum([sum(sum(r.loss_mask) for r in rows), sum(len(r.token_ids) for r in rows)])
        total = 0.0

        def loss(micro_batch: PackedBatch) -> torch.Tensor:
            nonlocal total
            value = -self.logprobs(micro_batch).logprobs.sum() / num_loss
            total += float(value.detach())
            return value

        norm = self.accumulate_and_step(packed, loss)
        self.iteration += 1
        (mean,) = self.reduce_sum([total])
        rate = self.optimizers().param_groups[0]["lr"]
        metrics = {"sft/loss": mean, "sft/grad_norm": norm, "sft/tokens": num_all, "sft/lr": rate, "iteration": float(self.iteration)}
        self.log_dict(metrics, prog_bar=False)

    def train_row(self, conversation: Conversation) -> TrainRow:
        """A conversation as training reads it."""
        dialogue = encode_conversation(self.encoder, conversation, self.prompt)
        if self.vision_cache is None:
            self.vision_cache = VisionCache(self.processor)
        return TrainRow(
            token_ids=dialogue.token_ids, loss_mask=dialogue.loss_mask, vision=self.vision_cache.get(dialogue.images)
        )

    def pack(self, rows: list[TrainRow]) -> PackedBatch:
        """Pack rows into one micro-batch."""
        assert self.policy is not None
        return pack_rows(rows, self.policy.config)


def encode_conversation(encoder: DialogueEncoder, conversation: Conversation, prompt: PromptConfig) -> Dialogue:
    """Tokens and mask of a demonstration, with the same boundaries as the agent's own (trap T2)."""
    task = conversation.task
    seen = [encoder.model_image(image) for image in task.images]
    dialogue = encoder.start(task, seen, prompt, tool=True)
    for turn in conversation.turns:
        ids = encoder.assistant_ids(turn.text)
        dialogue.append_sampled(ids, [0.0] * len(ids), learn=turn.learn)
        if turn.result_image is not None:
            view = encoder.model_image(turn.result_image)
            text = tool_ok_text(prompt, len(dialogue.images), turn.result_image.size, view.size)
            dialogue.append_given(encoder.tool_ids(split_marks(text)), [view])
        elif turn.call is not None and turn is not conversation.turns[-1]:
            dialogue.append_given(encoder.tool_ids([text_part(prompt.tool_error.format(error=turn.response_text))]))
    return dialogue
