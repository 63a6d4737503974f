"""Splitting sequences into micro-batches by tokens: filled on one rank, balanced on several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
Bins = list[tuple[int, list[int]]]
"""Tokens and members of each micro-batch."""


def split_by_tokens(sequences: Sequence[T], lengths: Sequence[int], budget: int) -> list[list[T]]:
    """Split sequences into micro-batches within a token budget, by first fit of the longest ones.

    A sequence longer than the budget gets a micro-batch of its own. Within a micro-batch sequences keep their order.

    Args:
        sequences: Items of any type.
        lengths: Number of tokens of each sequence.
        budget: Most tokens of one micro-batch.
    """
    bins: Bins = []
    for index in _longest_first(lengths):
        for number, (used, members) in enumerate(bins):
            if used + lengths[index] <= budget:
                bins[number] = (used + lengths[index], [*members, index])
                break
        else:
            bins.append((lengths[index], [index]))
    return _members(sequences, bins)


def split_evenly(sequences: Sequence[T], lengths: Sequence[int], budget: int, count: int) -> list[list[T]]:
    """Split sequences into at most `count` micro-batches of nearly equal numbers of tokens, the largest first.

    Ranks run their k-th micro-batches side by side and wait for the largest one, so equal sizes waste least. The
    longest sequences are dealt first, each to the micro-batch with the fewest tokens. If that exceeds the budget, the
    result is that of `split_by_tokens`. No micro-batch is empty.

    Args:
        sequences: Items of any type.
        lengths: Number of tokens of each sequence.
        budget: Most tokens of one micro-batch.
        count: At least as many as `split_by_tokens` needs.
    """
    bins: Bins = [(0, []) for _ in range(min(count, len(sequences)))]
    for index in _longest_first(lengths):
        number = min(range(len(bins)), key=lambda n: (bins[n][0], n))
        used, members = bins[number]
        bins[number] = used + lengths[index], [*members, index]
    if any(used > budget and len(members) > 1 for used, members in bins):
        return split_by_tokens(sequences, lengths, budget)
    return _members(sequences, sorted(bins, key=lambda bin: -bin[0]))


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


def _members(sequences: Sequence[T], bins: Bins) -> list[list[T]]:
    return [[sequences[index] for index in sorted(members)] for _, members in bins]
