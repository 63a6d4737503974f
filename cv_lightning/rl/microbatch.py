"""Token-budget micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def split_by_tokens(rows: Sequence[T], lengths: Sequence[int], budget: int) -> list[list[T]]:
    """Split rows into as few micro-batches as a first-fit of the longest rows finds, each within the budget.

    A row longer than the budget gets a micro-batch of its own. The order of rows within a micro-batch is that of
    `rows`; the result depends on nothing but the arguments.

    Args:
        rows: anything.
        lengths: tokens of each row.
        budget: tokens of one micro-batch.
    """
    bins: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(rows)), key=lambda i: (-lengths[i], i)):
        for number, (used, members) in enumerate(bins):
            if used + lengths[index] <= budget:
                bins[number] = (used + lengths[index], [*members, index])
                break
        else:
            bins.append((lengths[index], [index]))
    return [[rows[i] for i in sorted(members)] for _, members in bins]
