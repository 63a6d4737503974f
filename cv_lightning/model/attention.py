"""Exact attention on packed rows with plain SDPA: no T x T mask, no Python loop per image.

Segments of a packed row are gathered into right-padded batches, which a causal mask isolates for free, and the
vision tower's images are batched by size. transformers' own path without flash-attention builds a T x T mask for
the language model and attends image by image in the vision tower.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "packed_flash_free"
"""`flash` in the name makes transformers hand the vision tower's segment bounds over instead of looping itself."""


def attention_name(choice: str) -> str:
    """The attention implementation that `PolicyConfig.attention` means on this machine."""
    if choice == "auto":
        flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
        return "flash_attention_2" if flash else NAME
    return NAME if choice == "packed" else choice


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Switch a loaded model, vision tower and language model alike, to an attention implementation."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = name


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within the segments of a packed row; plain SDPA for anything else.

    Args:
        module: the attention layer.
        query: [batch, heads, tokens, head_dim]
        key: [batch, key-value heads, tokens, head_dim]
        value: like key.
        attention_mask: None on packed rows; an additive or boolean 4-D mask elsewhere (generation).
        dropout: probability.
        scaling: of the logits.
        is_causal: False in the vision tower.
        cu_seq_lens_q: [segments + 1] bounds, given by the vision tower.
        position_ids: [1, tokens] text positions; each 0 starts a segment of the language model's row.
        **kwargs: what other implementations take.

    Returns:
        [batch, tokens, heads, head_dim], and None for the weights.
    """
    causal = is_causal is not False
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if cu_seq_lens_q is not None:
        lengths = tuple((cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist())
    elif query.shape[0] == 1 and query.shape[2] == key.shape[2] and position_ids is not None and attention_mask is None:
        lengths = _segment_lengths(position_ids[0])
    else:
        causal = causal and attention_mask is None and query.shape[2] > 1
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, causal, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, head_dim]
    out = _by_segment(q, k, v, lengths, dropout, causal, scaling)
    return out[None], None


def _segment_lengths(positions: torch.Tensor) -> tuple[int, ...]:
    starts = (positions == 0).nonzero()[:, 0].tolist()
    bounds = [*starts, positions.numel()]
    return tuple(b - a for a, b in pairwise(bounds))


def _by_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    dropout: float,
    causal: bool,
    scaling: float | None,
) -> torch.Tensor:
    """Attend within segments. `query`, `key`, `value`: [tokens, heads, head_dim]; returns the same shape."""
    if len(set(lengths)) == 1:
        shape = (len(lengths), lengths[0], *query.shape[1:])
        q, k, v = (x.reshape(shape).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, None, dropout, causal, scale=scaling)
        return out.transpose(1, 2).reshape(query.shape)
    pieces, order = [], []
    for gather, valid in _plans(lengths, causal):
        gather, valid = gather.to(query.device), valid.to(query.device)
        shape = (*gather.shape, *query.shape[1:])
        q, k, v = (x.index_select(0, gather.flatten()).view(shape).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, None, dropout, causal, scale=scaling)
        pieces.append(out.transpose(1, 2).reshape(-1, *query.shape[1:]).index_select(0, valid))
        order.append(gather.flatten().index_select(0, valid))
    back = torch.empty(query.shape[0], dtype=torch.long, device=query.device)
    back[torch.cat(order)] = torch.arange(query.shape[0], device=query.device)
    return torch.cat(pieces).index_select(0, back)


@lru_cache(maxsize=64)
def _plans(lengths: tuple[int, ...], causal: bool) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """For every bucket of segments: token indices [segments, longest], and which of them (flat) are no padding.

    Causal segments of up to twice the shortest length share a bucket, right-padded: a token never sees what follows
    it. Without a causal mask only equal lengths may share one.
    """
    starts = torch.tensor([0, *lengths]).cumsum(0)
    buckets: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        limit = 2 * lengths[buckets[-1][0]] if causal and buckets else (lengths[buckets[-1][0]] if buckets else 0)
        if buckets and lengths[index] <= limit:
            buckets[-1].append(index)
        else:
            buckets.append([index])
    plans = []
    for bucket in buckets:
        longest = lengths[bucket[-1]]
        counts = torch.tensor([lengths[i] for i in bucket])[:, None]
        steps = torch.arange(longest)[None]
        gather = starts[torch.tensor(bucket)][:, None] + torch.minimum(steps, counts - 1)
        plans.append((gather, (steps < counts).flatten().nonzero()[:, 0]))
    return tuple(plans)


def _no_mask_for_packed_rows(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Packed rows (one row, no padding mask) need none; generation gets SDPA's."""
    if kwargs.get("batch_size") == 1 and kwargs.get("attention_mask") is None:
        return None
    return sdpa_mask(*args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask_for_packed_rows)
