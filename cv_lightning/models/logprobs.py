"""Log-probabilities of a packed row at the positions that the loss needs, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from cv_lightning.models.adapters.base import LOGIT_BAN
from cv_lightning.models.packing import PackedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Entropy = Literal["none", "value", "gradient"]
Head = Callable[[torch.Tensor], torch.Tensor]


class OneCallHead(torch.nn.Linear):
    """An output layer that runs all chunks of a row in one call.

    Under ZeRO-3 every call of a module gathers its weights on all ranks: one for each chunk would be slow, and would
    hang where ranks have unequal numbers of them.
    """

    def forward(self, input: torch.Tensor, inside: Callable[[Head, torch.Tensor], Any] | None = None) -> Any:
        """Apply the layer, or what `inside` makes of it.

        Args:
            input: [..., hidden]
            inside: called with the plain layer and the input.

        Returns:
            [..., vocabulary], or what `inside` returns.
        """
        return super().forward(input) if inside is None else inside(super().forward, input)


def use_one_call_head(model: PreTrainedModel) -> None:
    """Let the output layer run whole rows. Its class changes, its parameters and hooks stay."""
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear:
        head.__class__ = OneCallHead


class LogProbs(NamedTuple):
    """Of the targets of a packed row."""

    logprobs: torch.Tensor
    """[N] float32"""
    entropy: torch.Tensor | None
    """[N] float32, nats; of the whole distribution at each target"""


def packed_logprobs(
    model: PreTrainedModel,
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    entropy: Entropy = "none",
    chunk_tokens: int = 1024,
) -> LogProbs:
    """Log-probability of every target as the engine computes it: ban, then temperature, then softmax in float32.

    The head is applied to the loss positions only, in chunks that are recomputed in the backward pass: memory grows
    with T x hidden, not with T x vocabulary.

    Args:
        model: the policy, or another model of its family.
        batch: a packed row on the model's device.
        temperature: that divides the logits.
        banned_ids: get `LOGIT_BAN` added.
        entropy: `value` computes it too, `gradient` for a loss that holds it.
        chunk_tokens: positions whose logits are in memory at once.
    """
    hidden = batch.adapter.packed_hidden(model, batch)[0].index_select(0, batch.loss_positions)
    targets = batch.targets
    ban = torch.zeros(model.config.get_text_config().vocab_size, device=hidden.device)
    ban[list(banned_ids)] = LOGIT_BAN

    def one_chunk(head: Head, states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head(states).float().add_(ban)  # in place: each copy would be chunk x vocabulary
        if temperature != 1.0:
            logits = logits.div_(temperature)
        normaliser = torch.logsumexp(logits, -1)
        chosen = logits.gather(-1, targets[:, None])[:, 0] - normaliser
        if entropy == "none":
            return chosen, chosen.detach()
        with torch.set_grad_enabled(entropy == "gradient" and torch.is_grad_enabled()):
            spread = normaliser - (torch.softmax(logits, -1) * logits).sum(-1)
        return chosen, spread

    def all_chunks(head: Head, hidden: torch.Tensor) -> torch.Tensor:
        chunks = []
        for states, chosen in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
            if torch.is_grad_enabled() and hidden.shape[0] > chunk_tokens:
                chunks.append(checkpoint(one_chunk, head, states, chosen, use_reentrant=False))
            else:
                chunks.append(one_chunk(head, states, chosen))
        # One tensor: ZeRO-3 hooks each output's backward, and ranks would differ in which of two outputs has one.
        return torch.stack([torch.cat([chunk[0] for chunk in chunks]), torch.cat([chunk[1] for chunk in chunks])])

    head = model.get_output_embeddings()
    whole = head(hidden, inside=all_chunks) if isinstance(head, OneCallHead) else all_chunks(head, hidden)
    return LogProbs(whole[0], whole[1] if entropy != "none" else None)
