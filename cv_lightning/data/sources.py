"""Which tasks and conversations come when: pure functions of a step's number, so that a resumed run goes on exactly.

A source is an endless stream of tasks or conversations addressed by position. Nothing here keeps a state
that a checkpoint would have to hold.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

from cv_lightning.data.conversations import Conversation
from cv_lightning.digits.demonstrations import DemonstrationConfig, Execute, demonstrate
from cv_lightning.digits.scenes import KINDS, DigitsConfig, Kind, digit_task
from cv_lightning.types import Task

Item = TypeVar("Item")
Row = TypeVar("Row", covariant=True)

DEMONSTRATIONS_FROM = 1_000_000_000
"""First scene index of SFT (twice that in its warm-up): its scenes differ from those of RL under the same seed."""


class TaskSource(Protocol):
    """An endless stream of tasks in batches."""

    def tasks(self, step: int, count: int, rank: int = 0, world_size: int = 1) -> list[Task]:
        """A rank's share of the `count` tasks of a step; always the same for the same arguments."""


class ConversationSource(Protocol):
    """An endless stream of conversations in batches."""

    def conversations(
        self, step: int, count: int, rank: int = 0, world_size: int = 1, *, warm_up: bool = False
    ) -> list[Conversation]:
        """A rank's share of the `count` conversations of a step; always the same for the same arguments."""


class Rows(Protocol[Row]):
    """Rows that an evaluation goes through, each once."""

    def __len__(self) -> int:
        """Number of usable rows."""

    def row(self, position: int) -> Row:
        """The usable row at a position.

        Raises:
            RowError: it turns out that it cannot be used after all.
        """


# ------------------------------------------------------------------------------------------------ digits
def balanced_kinds(shares: Mapping[str, float], count: int, rng: random.Random) -> list[Kind]:
    """Kinds in a shuffled order, each within one of its share of `count`; over many calls the shares are exact.

    Args:
        shares: relative frequencies, not all 0.
        count: how many.
        rng: draws what rounding leaves open, and the order.
    """
    kinds = [kind for kind in KINDS if shares.get(kind, 0) > 0]
    total = sum(shares[kind] for kind in kinds)
    offset = rng.random()
    chosen: list[Kind] = []
    reached = 0.0
    for kind in kinds:
        reached += shares[kind] / total * count
        chosen += [kind] * (min(count, math.ceil(reached - offset)) - len(chosen))
    chosen += [kinds[-1]] * (count - len(chosen))
    rng.shuffle(chosen)
    return chosen


class DigitTasks:
    """Training scenes, kinds balanced within each step."""

    def __init__(self, config: DigitsConfig) -> None:
        """`config` gives looks, shares and seed."""
        self.config = config

    def tasks(self, step: int, count: int, rank: int = 0, world_size: int = 1) -> list[Task]:
        """A rank's share of the scenes of a step."""
        kinds = balanced_kinds(self.config.kind_shares, count, random.Random(f"{self.config.seed}/kinds/{step}"))
        mine = share_of_rank(list(enumerate(kinds, start=step * count)), rank, world_size)
        return [digit_task(self.config, "train", index, kind) for index, kind in mine]


class DigitDemonstrations:
    """Conversations about training scenes.

    Args:
        digits: looks, shares and seed of the scenes.
        config: in which scenes the tool is used.
        execute: runs the snippets of the demonstrations.
    """

    def __init__(self, digits: DigitsConfig, config: DemonstrationConfig, execute: Execute) -> None:
        self.digits = digits
        self.config = config
        self.execute = execute

    def conversations(
        self, step: int, count: int, rank: int = 0, world_size: int = 1, *, warm_up: bool = False
    ) -> list[Conversation]:
        """A rank's share of the conversations of a step; in the warm-up they have one turn each."""
        seed = f"{self.digits.seed}/demonstrations/{step}"
        shares = self.config.warm_up_shares if warm_up else self.digits.kind_shares
        kinds = balanced_kinds(shares, count, random.Random(seed))
        first = DEMONSTRATIONS_FROM * (2 if warm_up else 1) + step * count
        mine = share_of_rank(list(enumerate(kinds, start=first)), rank, world_size)
        return [self._conversation(index, kind, random.Random(f"{seed}/{index}"), warm_up) for index, kind in mine]

    def _conversation(self, index: int, kind: Kind, rng: random.Random, warm_up: bool) -> Conversation:
        task = digit_task(self.digits, "train", index, kind)
        return demonstrate(task, self.config, self.digits, rng, self.execute, warm_up=warm_up)


class HeldOutScenes:
    """So many scenes of each kind made of held-out digits, kinds in turn so that every stretch has all of them.

    Args:
        config: looks and seed.
        counts: number of scenes of each kind.

    Raises:
        ValueError: a kind that does not exist, or a negative number.
    """

    def __init__(self, config: DigitsConfig, counts: Mapping[str, int]) -> None:
        if set(counts) - set(KINDS) or min(counts.values(), default=0) < 0:
            raise ValueError(f"--data.val_tasks/test_tasks {dict(counts)}: not negative, and of {', '.join(KINDS)}")
        self.config = config
        kinds = [kind for kind in KINDS if counts.get(kind, 0)]
        longest = max((counts[kind] for kind in kinds), default=0)
        self._scenes = [(index, kind) for index in range(longest) for kind in kinds if index < counts[kind]]

    def __len__(self) -> int:
        return len(self._scenes)

    def row(self, position: int) -> Task:
        """The scene at a position."""
        index, kind = self._scenes[position]
        return digit_task(self.config, "held_out", index, kind)


# ------------------------------------------------------------------------------------------------ files
class EpochRows(Protocol[Row]):
    """Rows of files as training goes through them."""

    @property
    def num_rows(self) -> int:
        """Rows, unusable ones too."""

    def order(self, rng: random.Random) -> list[int]:
        """A shuffled order of all rows that is cheap to read."""

    def take_many(self, places: Sequence[tuple[Sequence[int], int]]) -> Sequence[Row]:
        """The rows at places of orders; usable ones near them where they cannot be used."""


class RowStream(Generic[Item]):
    """Rows of files, epoch after epoch, each newly shuffled.

    Args:
        rows: of the files.
        seed: of the order.
    """

    def __init__(self, rows: EpochRows[Item], seed: int) -> None:
        self.rows = rows
        self.seed = seed
        # Shuffling a million rows takes a second: once an epoch, not once a step. A step may touch two.
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> list[int]:
        return self.rows.order(random.Random(f"{self.seed}/epoch/{epoch}"))

    def step(self, step: int, count: int, rank: int, world_size: int) -> list[Item]:
        """A rank's share of the rows of a step; always the same for the same arguments."""
        size = self.rows.num_rows
        mine = share_of_rank(range(step * count, (step + 1) * count), rank, world_size)
        return list(self.rows.take_many([(self._order(at // size), at % size) for at in mine]))


class RowTasks:
    """Tasks of files, epoch after epoch.

    Args:
        rows: of the files.
        seed: of the order.
    """

    def __init__(self, rows: EpochRows[Task], seed: int) -> None:
        self._stream = RowStream(rows, seed)

    def tasks(self, step: int, count: int, rank: int = 0, world_size: int = 1) -> list[Task]:
        """A rank's share of the tasks of a step."""
        return self._stream.step(step, count, rank, world_size)


class RowConversations:
    """Conversations of files, epoch after epoch.

    Args:
        rows: of the files.
        seed: of the order.
    """

    def __init__(self, rows: EpochRows[Conversation], seed: int) -> None:
        self._stream = RowStream(rows, seed)

    def conversations(
        self, step: int, count: int, rank: int = 0, world_size: int = 1, *, warm_up: bool = False
    ) -> list[Conversation]:
        """A rank's share of the conversations of a step; files have no warm-up of their own."""
        return self._stream.step(step, count, rank, world_size)


def share_of_rank(items: Sequence[Item], rank: int, world_size: int) -> list[Item]:
    """The part of a global batch that a rank works on."""
    return list(items[rank::world_size])
