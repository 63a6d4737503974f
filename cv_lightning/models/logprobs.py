"""Log-probabilities of a packed batch at the loss positions only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from cv_lightning.models.adapters.base import LOGIT_BAN, LOGIT_CHUNK
from cv_lightning.models.packing import PackedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Entropy = Literal["none", "value", "gradient"]
Head = Callable[[torch.Tensor], torch.Tensor]


class OneCallHead(torch.nn.Linear):
    """An output layer that computes all chunks of a packed batch in one call.

    Under ZeRO-3 every call of a module gathers its weights on all ranks. One call per chunk would be slow, and would
    hang if ranks had different numbers of chunks.
    """

    def forward(self, input: torch.Tensor, inside: Callable[[Head, torch.Tensor], Any] | None = None) -> Any:
        """Apply the layer, or call `inside` with the plain layer and the input and return its result.

        Args:
            input: [..., hidden]
            inside: Function that applies the layer itself.
        """
        return super().forward(input) if inside is None else inside(super().forward, input)


def use_one_call_head(model: PreTrainedModel) -> None:
    """Turn the output layer into a `OneCallHead`. Its class changes, its parameters and hooks stay."""
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear:
        head.__class__ = OneCallHead


class LogProbs(NamedTuple):
    """Log-probabilities and entropies at the targets of a packed batch."""

    logprobs: torch.Tensor
    """[N] float32"""
    entropy: torch.Tensor | None
    """[N] float32, nats: entropy of the whole distribution at each target; None if not requested"""


def packed_logprobs(
    model: PreTrainedModel,
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    entropy: Entropy = "none",
    chunk_tokens: int = LOGIT_CHUNK,
) -> LogProbs:
    """Log-probability of every target as the engine computes it: ban, then temperature, then softmax in float32.

    The head is applied to the loss positions only, in chunks that are recomputed in the backward pass, so that memory
    grows with T x hidden instead of T x vocabulary.

    Args:
        model: The policy, or another model of its family.
        batch: A packed batch on the model's device.
        temperature: Divisor of the logits.
        banned_ids: Ids whose logits get `LOGIT_BAN` added.
        entropy: Whether entropies are computed, and whether with gradient.
        chunk_tokens: Number of positions whose logits are in memory at once.
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
