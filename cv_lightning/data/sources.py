"""Streams of tasks and conversations addressed by position.

A batch is a pure function of the step's number, so that a source has no state for a checkpoint to store and a resumed
run continues exactly.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

from cv_lightning.data.rows import RowFiles

Item = TypeVar("Item")
Row = TypeVar("Row", covariant=True)


class Source(Protocol[Item]):
    """An endless stream of tasks or conversations in batches."""

    def batch(self, step: int, count: int, rank: int = 0, world_size: int = 1) -> list[Item]:
        """A rank's part of the `count` items of a step; equal arguments give equal items.

        Args:
            step: Number of the step, from 0.
            count: Items of all ranks.
            rank: This rank.
            world_size: Number of ranks.
        """


class Rows(Protocol[Row]):
    """Rows of an evaluation, each used once."""

    def __len__(self) -> int:
        """Number of usable rows."""

    def row(self, position: int) -> Row:
        """The usable row at a position.

        Raises:
            RowError: Its pixels turn out to be broken.
        """


class RowStream(Generic[Item]):
    """Rows of files, epoch after epoch, each newly shuffled.

    Args:
        rows: Rows of the files.
        seed: Seed of the order.
    """

    def __init__(self, rows: RowFiles[Item], seed: int) -> None:
        self.rows = rows
        self.seed = seed
        # Shuffling a million rows takes a second, so it is done once per epoch. A step may belong to two epochs.
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> list[int]:
        return self.rows.order(random.Random(f"{self.seed}/epoch/{epoch}"))

    def batch(self, step: int, count: int, rank: int = 0, world_size: int = 1) -> list[Item]:
        """A rank's part of the rows of a step."""
        size = self.rows.num_rows
        mine = slice_of_rank(range(step * count, (step + 1) * count), rank, world_size)
        return list(self.rows.take_many([(self._order(at // size), at % size) for at in mine]))


def slice_of_rank(items: Sequence[Item], rank: int, world_size: int) -> list[Item]:
    """The part of a global batch that a rank works on."""
    return list(items[rank::world_size])
