"""Weights that turn token losses into one number. Sequences are never split over micro-batches."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant_length"]


def aggregation_weights(
    sequence_index: Tensor,
    num_tokens: float,
    num_sequences: float,
    aggregation: Aggregation,
    constant_length: int | None = None,
) -> Tensor:
    """Weight of every token in the global loss.

    Over all micro-batches and ranks the weights sum to 1 for the two token means, to the mean length for
    `seq_mean_token_sum`, and to mean length over constant for `constant_length`.

    Args:
        sequence_index: [N] Which sequence each token belongs to.
        num_tokens: Sampled tokens of the mini-batch, over micro-batches and ranks.
        num_sequences: Sequences with a sampled token, same scope.
        aggregation: How token losses become one number.
        constant_length: Tokens; the constant of `constant_length`.

    Returns:
        float64 [N].
    """
    shape, device = sequence_index.shape, sequence_index.device
    if not len(sequence_index):  # the counts may be 0 as well
        return torch.zeros(shape, dtype=torch.float64, device=device)
    if aggregation == "token_mean":
        return torch.full(shape, 1.0 / num_tokens, dtype=torch.float64, device=device)
    if aggregation == "seq_mean_token_mean":
        lengths = torch.bincount(sequence_index)[sequence_index]
        return 1.0 / (lengths.double() * num_sequences)
    constant = constant_length if aggregation == "constant_length" else None
    return torch.full(shape, 1.0 / (num_sequences * (constant or 1)), dtype=torch.float64, device=device)


def sequence_means(values: Tensor, sequence_index: Tensor, mask: Tensor) -> Tensor:
    """For every token, the mean of `values` over the unmasked tokens of its sequence; 0 where none is unmasked.

    Args:
        values: [N]; anything where the mask is False.
        sequence_index: [N] Which sequence each token belongs to.
        mask: [N] bool; False leaves a token out.

    Returns:
        [N], the type of `values`.
    """
    if not len(values):
        return values
    size = int(sequence_index.max()) + 1
    kept = torch.where(mask, values, torch.zeros_like(values))
    sums = values.new_zeros(size).index_add(0, sequence_index, kept)
    counts = values.new_zeros(size).index_add(0, sequence_index, mask.to(values.dtype))
    return (sums / counts.clamp(min=1.0))[sequence_index]
