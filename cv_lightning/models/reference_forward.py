"""One sequence through transformers' own forward: the reference of the start-up check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from cv_lightning.models.adapters.base import LOGIT_BAN, ModelAdapter
from cv_lightning.models.attention import use_attention
from cv_lightning.models.patches import PatchProjection

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel

PROJECTION = 0.02
"""Largest accepted norm of a 16-bit patch projection's difference from the convolution, over the convolution's norm;
rounding alone is below 0.004."""


class ComparedProjection(PatchProjection):
    """Patch projection of a 16-bit policy that compares its result with the convolution's.

    Large weights amplify its rounding so much that the difference would hide wrong positions in the log-probabilities.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Project patches; the result is NaN if it differs from the convolution's by more than rounding."""
        ours = super().forward(input)
        convolved = torch.nn.Conv3d.forward(self, input).float()
        agrees = (ours.float() - convolved).norm() <= PROJECTION * convolved.norm()
        return ours.masked_fill(~agrees, float("nan"))


@contextmanager
def plain_operations(model: PreTrainedModel) -> Iterator[None]:
    """Context manager that gives a policy transformers' SDPA attention and patch projection instead of ours.

    In 16 bits the patch projection stays ours and is compared separately, see `ComparedProjection`.
    """
    ours = model.config._attn_implementation
    replaced = [module for module in model.modules() if type(module) is PatchProjection]
    use_attention(model, "sdpa")
    for module in replaced:
        exact = module.weight.dtype == torch.float32
        module.__class__ = torch.nn.Conv3d if exact else ComparedProjection  # type: ignore[assignment]
    try:
        yield
    finally:
        use_attention(model, ours)
        for module in replaced:
            module.__class__ = PatchProjection


@torch.no_grad()
def plain_logprobs(
    model: PreTrainedModel,
    adapter: ModelAdapter,
    token_ids: Sequence[int],
    loss_mask: Sequence[bool],
    images: Sequence[Image.Image],
    banned_ids: Sequence[int],
) -> torch.Tensor:
    """Log-probabilities of the learned tokens of one sequence, with transformers' own positions, mask and attention.

    Args:
        model: The policy. If it is sharded, this is a collective of all ranks.
        adapter: The policy's adapter, which prepares the images.
        token_ids: Token ids with expanded images.
        loss_mask: True where a token is learned; the first token never is.
        images: Images at model size, in the order of the sequence; at least one.
        banned_ids: Ids whose logits get `LOGIT_BAN` added, as in training.

    Returns:
        [learned tokens], float32.
    """
    device = model.device
    ids = torch.tensor([token_ids], device=device)
    learned = torch.tensor(loss_mask[1:]).nonzero()[:, 0].to(device)  # position i predicts token i + 1
    with plain_operations(model):
        logits = model(
            **adapter.plain_inputs(ids, torch.ones_like(ids), adapter.process_images(images)),
            logits_to_keep=learned,
            use_cache=False,
        ).logits[0]
    logits = logits.float()
    logits[:, list(banned_ids)] += LOGIT_BAN
    return torch.log_softmax(logits, -1).gather(-1, ids[0, learned + 1, None])[:, 0]
