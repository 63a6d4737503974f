"""From tokens to rows and to one number. Rows (trajectories) are never split over micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from cv_lightning.rl.loss_config import PolicyLossConfig


def token_weights(row_index: Tensor, num_tokens: float, num_rows: float, config: PolicyLossConfig) -> Tensor:
    """Weight of every token in the global loss.

    Over all micro-batches and ranks they sum to 1 for the two token means, to the mean length for
    `seq_mean_token_sum`, to mean length over constant for `constant_length`.

    Args:
        row_index: [N] which trajectory each token belongs to.
        num_tokens: sampled tokens of the mini-batch, over micro-batches and ranks.
        num_rows: trajectories with a sampled token, same scope.
        config: the aggregation.

    Returns:
        float64 [N].
    """
    shape, device = row_index.shape, row_index.device
    if not len(row_index):  # the counts may be 0 as well
        return torch.zeros(shape, dtype=torch.float64, device=device)
    if config.aggregation == "token_mean":
        return torch.full(shape, 1.0 / num_tokens, dtype=torch.float64, device=device)
    if config.aggregation == "seq_mean_token_mean":
        return 1.0 / (row_lengths(row_index).double() * num_rows)
    constant = config.constant_length if config.aggregation == "constant_length" else None
    return torch.full(shape, 1.0 / (num_rows * (constant or 1)), dtype=torch.float64, device=device)


def row_lengths(row_index: Tensor) -> Tensor:
    """For every token, how many tokens its row has: int64 [N]."""
    return torch.bincount(row_index)[row_index] if len(row_index) else torch.zeros_like(row_index)


def row_means(values: Tensor, row_index: Tensor, keep: Tensor) -> Tensor:
    """For every token, the mean of `values` over the kept tokens of its row; 0 in a row that keeps none.

    Args:
        values: [N]; anything where not kept.
        row_index: [N]
        keep: [N] bool.

    Returns:
        [N], the type of `values`.
    """
    if not len(values):
        return values
    size = int(row_index.max()) + 1
    kept = torch.where(keep, values, torch.zeros_like(values))
    sums = values.new_zeros(size).index_add(0, row_index, kept)
    counts = values.new_zeros(size).index_add(0, row_index, keep.to(values.dtype))
    return (sums / counts.clamp(min=1.0))[row_index]
