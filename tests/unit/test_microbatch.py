"""Micro-batches hold every sequence once, within the token budget, filled or balanced."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cv_lightning.rl.microbatch import split_by_tokens, split_evenly

LENGTHS = st.lists(st.integers(1, 400), max_size=40)


@given(LENGTHS, st.integers(1, 1000), st.integers(0, 5))
def test_every_sequence_once_and_within_the_budget(lengths: list[int], budget: int, more: int) -> None:
    sequences = list(range(len(lengths)))
    filled = split_by_tokens(sequences, lengths, budget)
    even = split_evenly(sequences, lengths, budget, len(filled) + more)
    for chunks in (filled, even):
        assert sorted(index for chunk in chunks for index in chunk) == sequences
        assert all(chunk and chunk == sorted(chunk) for chunk in chunks)
        assert all(sum(lengths[index] for index in chunk) <= budget or len(chunk) == 1 for chunk in chunks)
    assert len(even) <= len(filled) + more


def test_sequences_are_spread_over_the_requested_number_of_micro_batches() -> None:
    lengths = [100, 90, 80, 70, 60, 50]
    sequences = list(range(6))
    assert len(split_by_tokens(sequences, lengths, 1000)) == 1
    loads = [sum(lengths[index] for index in chunk) for chunk in split_evenly(sequences, lengths, 1000, 3)]
    assert loads == [150, 150, 150]
    assert len(split_evenly(sequences[:2], lengths[:2], 1000, 3)) == 2, "the module adds a dummy sequence as the third"


def test_micro_batches_are_filled_if_even_ones_would_exceed_the_budget() -> None:
    lengths = [6, 5, 4, 3, 3, 3]  # dealt by size: 6 + 3 + 3 and 5 + 4 + 3
    assert split_evenly(list(range(6)), lengths, 12, 2) == [[0, 3, 4], [1, 2, 5]]
    lengths = [3, 3, 2, 2, 2]  # dealt by size: 3 + 2 + 2 and 3 + 2, filled: 3 + 3 and 2 + 2 + 2
    assert split_evenly(list(range(5)), lengths, 6, 2) == [[0, 1], [2, 3, 4]]
