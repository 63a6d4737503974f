"""Token-budget micro-batches: filled on one rank, balanced where several ranks run them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def split_by_tokens(sequences: Sequence[T], lengths: Sequence[int], budget: int) -> list[list[T]]:
    """Split sequences into as few micro-batches as a first-fit of the longest sequences finds, each within the budget.

    A sequence longer than the budget gets a micro-batch of its own. Within a micro-batch they keep their order; the
    result depends on nothing but the arguments.

    Args:
        sequences: anything.
        lengths: tokens of each sequence.
        budget: tokens of one micro-batch.
    """
    bins: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(sequences)), key=lambda i: (-lengths[i], i)):
        for number, (used, members) in enumerate(bins):
            if used + lengths[index] <= budget:
                bins[number] = (used + lengths[index], [*members, index])
                break
        else:
            bins.append((lengths[index], [index]))
    return [[sequences[i] for i in sorted(members)] for _, members in bins]


def split_evenly(sequences: Sequence[T], lengths: Sequence[int], budget: int, count: int) -> list[list[T]]:
    """Split sequences into at most `count` micro-batches of nearly the same number of tokens, the largest first.

    Ranks run their k-th micro-batches side by side, so that each waits for the largest: even ones waste least. The
    longest sequences are dealt first, each to the micro-batch with the fewest tokens. Where one would leave the budget
    that way, the micro-batches are filled instead (`split_by_tokens`).

    Args:
        sequences: anything; they stay on their rank.
        lengths: tokens of each sequence.
        budget: tokens of one micro-batch.
        count: at least what `split_by_tokens` needs: the largest number that any rank does.

    Returns:
        No empty micro-batch; the sequences of each in the order of `sequences`.
    """
    bins: list[tuple[int, list[int]]] = [(0, []) for _ in range(min(count, len(sequences)))]
    for index in sorted(range(len(sequences)), key=lambda i: (-lengths[i], i)):
        number = min(range(len(bins)), key=lambda n: (bins[n][0], n))
        used, members = bins[number]
        bins[number] = used + lengths[index], [*members, index]
    if any(used > budget and len(members) > 1 for used, members in bins):
        return split_by_tokens(sequences, lengths, budget)
    bins.sort(key=lambda bin: -bin[0])
    return [[sequences[i] for i in sorted(members)] for _, members in bins]
