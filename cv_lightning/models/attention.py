"""Exact attention on packed sequences: no T x T mask, no Python loop per image, shared prompts computed once.

On a GPU it runs a variable-length kernel: flash-attn's where it is installed, otherwise PyTorch's own `varlen_attn`.
Elsewhere it runs plain SDPA: sequences are gathered into right-padded batches, which a causal mask isolates, and the
vision tower's images are batched by size. transformers' own path without flash-attention builds a T x T mask for the
language model and attends image by image in the vision tower; none of its paths lets sequences share a prefix.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "packed_flash_free"
"""`flash` in the name makes transformers pass the vision tower's segment bounds instead of looping itself."""
LONG = 192
"""Number of tokens from which a sequence is attended to by a call of its own if there is no variable-length kernel."""
MIN_CAPABILITY = (8, 0)
"""Lowest compute capability on which PyTorch's flash attention runs."""
PROBE_TOLERANCE = 3e-2
"""Largest difference of a kernel in bfloat16 from SDPA in float32, for outputs and gradients of order 1."""

logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """A span of a packed batch whose tokens attend to each other, and to a prefix that stands earlier in the batch."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0
    """0: the piece is a whole sequence."""


Pieces = tuple[Piece, ...]
Kernel = Callable[..., torch.Tensor]
"""A function with the arguments of flash-attn's `flash_attn_varlen_func`."""
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Pieces by the tensor they are read from: every layer gets the same one, and reading it waits for the GPU."""


def attention_name(choice: str) -> str:
    """Name of the attention implementation for a value of `PolicyConfig.attention`."""
    return NAME if choice in ("auto", "packed") else choice


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Switch a loaded model, vision tower and language model alike, to an attention implementation."""
    if name == NAME and torch.cuda.is_available():
        variable_length_kernel()  # chosen and tested here, not in the first forward pass
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
    """Attention within the sequences of a packed batch; plain SDPA for any other input.

    Args:
        module: The attention layer.
        query: [batch, heads, tokens, head_dim]
        key: [batch, key-value heads, tokens, head_dim]
        value: Same shape as `key`.
        attention_mask: None for packed batches; an additive or boolean 4-D mask elsewhere (generation).
        dropout: Probability.
        scaling: Scale of the logits; None: 1 / sqrt(head_dim).
        is_causal: False in the vision tower.
        cu_seq_lens_q: [segments + 1] Bounds, from the vision tower.
        position_ids: [1, tokens] Text positions of the language model; a step back begins another sequence.
        **kwargs: Arguments of other implementations.

    Returns:
        [batch, tokens, heads, head_dim], and None in place of the attention weights.
    """
    causal = is_causal is not False
    if cu_seq_lens_q is not None:
        pieces = _pieces(cu_seq_lens_q, _pieces_of_bounds)
    elif query.shape[0] == 1 and query.shape[2] == key.shape[2] and position_ids is not None and attention_mask is None:
        pieces = _pieces(position_ids, _pieces_of_positions)
    else:
        key, value = _for_every_head(query, key, value)
        causal = causal and attention_mask is None and query.shape[2] > 1
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, causal, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    kernel = None
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        kernel = variable_length_kernel()
    if kernel is None:
        key, value = _for_every_head(query, key, value)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, head_dim]
    if kernel is not None:
        return _variable_length(kernel.run, q, k, v, pieces, causal, scaling)[None], None
    return _by_piece(q, k, v, pieces, dropout, causal, scaling)[None], None


def _for_every_head(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values repeated for every query head that shares them."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


# ------------------------------------------------------------------------------------------------ what attends to what
def _pieces(source: torch.Tensor, read: Callable[[list[int]], Pieces]) -> Pieces:
    found: Pieces | None = _known.get(source)
    if found is None:
        found = _known[source] = read(source.flatten().tolist())
    return found


def _pieces_of_bounds(bounds: list[int]) -> Pieces:
    return tuple(Piece(a, b - a) for a, b in pairwise(bounds))


def _pieces_of_positions(positions: list[int]) -> Pieces:
    """Pieces by the text positions of a packed batch, see `pack_sequences`.

    Position 0 begins a sequence. A step back to another position n begins a sequence with the same first n tokens.
    """
    starts = [i for i, position in enumerate(positions) if i == 0 or position != positions[i - 1] + 1]
    pieces, sequence = [], 0
    for start, end in pairwise([*starts, len(positions)]):
        shared = positions[start]
        sequence = sequence if shared else start
        pieces.append(Piece(start, end - start, sequence if shared else 0, shared))
    return tuple(pieces)


# ------------------------------------------------------------------------------------------------ kernels for GPUs
class VariableLengthKernel(NamedTuple):
    """The attention kernel of this machine's GPUs."""

    name: str
    run: Kernel


def attention_kernel_name() -> str:
    """Name of the kernel that attends to packed 16-bit batches on this machine."""
    found = variable_length_kernel()
    return "packed SDPA" if found is None else found.name


@cache
def variable_length_kernel() -> VariableLengthKernel | None:
    """The kernel for packed batches on this machine's GPUs; None if there is none, or it disagrees with SDPA.

    PyTorch's kernel is compared with SDPA once, on the current GPU: shared prompts rely on the last query of a causal
    sequence attending to the last key if there are more keys than queries, which is not documented.
    """
    if not torch.cuda.is_available():
        return None
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        return VariableLengthKernel(f"flash-attn {importlib.metadata.version('flash-attn')}", flash_attn_varlen_func)
    capability = torch.cuda.get_device_capability()
    if importlib.util.find_spec("torch.nn.attention.varlen") is None or capability < MIN_CAPABILITY:
        return None
    try:
        worst = kernel_error(torch_varlen, torch.device("cuda", torch.cuda.current_device()))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        logger.warning("torch's varlen_attn does not run on this GPU (%s): packed SDPA is used, which is slower", error)
        return None
    if not worst <= PROBE_TOLERANCE:  # also for NaN
        logger.warning(
            "torch's varlen_attn differs from SDPA by %.2g on this GPU: packed SDPA is used, which is slower", worst
        )
        return None
    return VariableLengthKernel(f"torch {torch.__version__} varlen_attn", torch_varlen)


def torch_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    longest_query: int,
    longest_key: int,
    *,
    softmax_scale: float | None,
    causal: bool,
) -> torch.Tensor:
    """PyTorch's variable-length attention with the arguments of flash-attn's `flash_attn_varlen_func`, no dropout.

    `query` and the result are [tokens, heads, head_dim], `key` and `value` [key tokens, key-value heads, head_dim]; the
    bounds are int32 [sequences + 1]. With `causal` the last query attends to the last key.
    """
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query,
        key,
        value,
        query_bounds,
        key_bounds,
        longest_query,
        longest_key,
        scale=softmax_scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out


def kernel_error(kernel: Kernel, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Largest difference of a kernel from SDPA in float32, over outputs and gradients of a small packed batch.

    The batch has sequences with a shared prefix, grouped queries and the head widths of the released models; attention
    is computed with and without a causal mask.
    """
    pieces = (Piece(0, 40), Piece(40, 9, 0, 24), Piece(49, 1, 0, 24), Piece(50, 17), Piece(67, 30, 50, 5))
    alone = tuple(Piece(piece.start, piece.length) for piece in pieces)
    worst = 0.0
    # The hooks hide the tensors of this comparison from code that saves tensors in order to recompute them.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        for seed, (width, groups, causal) in enumerate(((128, 2, True), (72, 1, False), (80, 1, False))):
            these = pieces if causal else alone
            generator = torch.Generator().manual_seed(seed)
            shapes = [(97, 4, width), *[(97, 4 // groups, width)] * 2, (97, 4, width)]
            q, k, v, weights = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
            ours = [x.clone().requires_grad_() for x in (q, k, v)]
            plain = [x.float().requires_grad_() for x in (q, k, v)]
            found = _variable_length(kernel, ours[0], ours[1], ours[2], these, causal, None)
            keys, values = (x.repeat_interleave(groups, 1) for x in plain[1:])
            expected = _by_piece(plain[0], keys, values, these, 0.0, causal, None)
            gradients = torch.autograd.grad(found, ours, weights)
            others = torch.autograd.grad(expected, plain, weights.float())
            for a, b in zip((found, *gradients), (expected, *others), strict=True):
                error = (a.detach().float() - b.detach()).abs().max() / b.detach().abs().max().clamp(min=1.0)
                worst = max(worst, float(error.nan_to_num(float("inf"))))
    return worst


def _variable_length(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pieces: Pieces,
    causal: bool,
    scaling: float | None,
) -> torch.Tensor:
    """All pieces in one call; shapes as in `_by_piece`, but keys and values may have fewer heads.

    A piece may have more keys, those of its prefix, than queries: the kernel's causal mask ends at the last key.
    """
    gather, query_bounds, key_bounds = (x if x is None else x.to(query.device) for x in _bounds(pieces))
    if gather is not None:
        key, value = key.index_select(0, gather), value.index_select(0, gather)
    longest = max(piece.length for piece in pieces), max(piece.length + piece.prefix_length for piece in pieces)
    return kernel(query, key, value, query_bounds, key_bounds, *longest, softmax_scale=scaling, causal=causal)


@lru_cache(maxsize=64)
def _bounds(pieces: Pieces) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Token index of each key (None: keys are the tokens in order), and bounds of the pieces in queries and keys."""
    queries = torch.tensor([0, *(piece.length for piece in pieces)]).cumsum(0).int()
    if not any(piece.prefix_length for piece in pieces):
        return None, queries, queries
    keys = torch.tensor([0, *(piece.length + piece.prefix_length for piece in pieces)]).cumsum(0).int()
    return torch.cat([_tokens(piece) for piece in pieces]), queries, keys


def _tokens(piece: Piece) -> torch.Tensor:
    """Token indices of the keys of a piece."""
    prefix = torch.arange(piece.prefix_start, piece.prefix_start + piece.prefix_length)
    return torch.cat([prefix, torch.arange(piece.start, piece.start + piece.length)])


# ------------------------------------------------------------------------------------------------ plain SDPA
def _by_piece(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pieces: Pieces,
    dropout: float,
    causal: bool,
    scaling: float | None,
) -> torch.Tensor:
    """Attend within pieces. `query`, `key`, `value`: [tokens, heads, head_dim]; returns the same shape."""
    first = pieces[0].length
    if all(piece.length == first and not piece.prefix_length for piece in pieces):
        shape = (len(pieces), first, *query.shape[1:])
        q, k, v = (x.reshape(shape).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, None, dropout, causal, scale=scaling)
        return out.transpose(1, 2).reshape(query.shape)
    found, order = [], []
    for gather, valid in _plans(pieces, causal):
        gather, valid = gather.to(query.device), valid.to(query.device)
        shape = (*gather.shape, *query.shape[1:])
        q, k, v = (x.index_select(0, gather.flatten()).view(shape).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, None, dropout, causal, scale=scaling)
        found.append(out.transpose(1, 2).reshape(-1, *query.shape[1:]).index_select(0, valid))
        order.append(gather.flatten().index_select(0, valid))
    places = torch.cat(order)
    back = torch.empty_like(places)
    back[places] = torch.arange(query.shape[0], device=query.device)
    return torch.cat(found).index_select(0, back)


@lru_cache(maxsize=64)
def _plans(pieces: Pieces, causal: bool) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Batches of pieces: token indices [pieces, longest], and the flat positions in them that are a piece's own.

    Causal pieces of up to twice the shortest length, prefixes included, share a right-padded batch, because a token
    never attends to the padding behind it. Without a causal mask only equal lengths share one. A piece of `LONG` tokens
    or more has its own, because padding would cost more than another call.
    """
    batches: list[list[tuple[torch.Tensor, int]]] = []
    for tokens, prefix in sorted(((_tokens(piece), piece.prefix_length) for piece in pieces), key=lambda x: len(x[0])):
        limit = (2 if causal else 1) * len(batches[-1][0][0]) if batches else 0
        if len(tokens) <= limit and not (causal and len(tokens) >= LONG):
            batches[-1].append((tokens, prefix))
        else:
            batches.append([(tokens, prefix)])
    plans: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in batches:
        gather = torch.nn.utils.rnn.pad_sequence([tokens for tokens, _ in batch], batch_first=True)
        steps = torch.arange(gather.shape[1])[None]
        first = torch.tensor([prefix for _, prefix in batch])[:, None]
        end = torch.tensor([len(tokens) for tokens, _ in batch])[:, None]
        plans.append((gather, ((steps >= first) & (steps < end)).flatten().nonzero()[:, 0]))
    return tuple(plans)


def _no_mask_for_packed_sequences(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """No mask for a packed batch, which has one row and no padding mask; SDPA's mask for generation."""
    if kwargs.get("batch_size") == 1 and kwargs.get("attention_mask") is None:
        return None
    return sdpa_mask(*args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask_for_packed_sequences)
