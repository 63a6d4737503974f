"""Aggregation: weights that turn token losses into one number. Sequences are never split over micro-batches."""

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
    `seq_mean_token_sum`, and to the mean length over `constant_length` for that aggregation.

    Args:
        sequence_index: [N] Index of the sequence that each token belongs to.
        num_tokens: Number of sampled tokens of the mini-batch, over micro-batches and ranks.
        num_sequences: Number of sequences with a sampled token, with the same scope.
        aggregation: How token losses become one number.
        constant_length: Tokens; read with `constant_length` only.

    Returns:
        float64 [N].
    """
    device = sequence_index.device
    if not len(sequence_index):  # the counts may be 0 as well
        return torch.zeros(0, dtype=torch.float64, device=device)
    if aggregation == "seq_mean_token_mean":
        lengths = torch.bincount(sequence_index)[sequence_index]
        return 1.0 / (lengths.double() * num_sequences)
    total = num_tokens
    if aggregation != "token_mean":
        total = num_sequences * ((constant_length if aggregation == "constant_length" else None) or 1)
    return torch.full(sequence_index.shape, 1.0 / total, dtype=torch.float64, device=device)
