"""Which tasks and conversations come when: pure functions of a step's number, so that a resumed run goes on exactly.

A source is an endless stream of tasks or conversations addressed by position. Nothing here keeps a state
that a checkpoint would have to hold.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from cv_lightning.data.demonstrations import Conversation, DemonstrationConfig, Execute, demonstrate
from cv_lightning.data.digits import KINDS, DigitsConfig, Kind, digit_task
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
    """Rows of files, read one by one and in another order each epoch."""

    def __len__(self) -> int:
        """Number of usable rows."""

    def row(self, position: int) -> Row:
        """The usable row at a position."""

    def order(self, rng: random.Random) -> list[int]:
        """A shuffled order of all positions that is cheap to read."""


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

    def order(self, rng: random.Random) -> list[int]:
        """All positions, shuffled."""
        return rng.sample(range(len(self)), len(self))


# ------------------------------------------------------------------------------------------------ files
class RowTasks:
    """Tasks of files, epoch after epoch.

    Args:
        rows: usable rows.
        seed: of the order.
    """

    def __init__(self, rows: Rows[Task], seed: int) -> None:
        self.rows = rows
        self.seed = seed

    def tasks(self, step: int, count: int, rank: int = 0, world_size: int = 1) -> list[Task]:
        """A rank's share of the tasks of a step."""
        mine = share_of_rank(epoch_positions(self.rows, step, count, self.seed), rank, world_size)
        return [self.rows.row(position) for position in mine]


class RowConversations:
    """Conversations of files, epoch after epoch.

    Args:
        rows: usable rows.
        seed: of the order.
    """

    def __init__(self, rows: Rows[Conversation], seed: int) -> None:
        self.rows = rows
        self.seed = seed

    def conversations(
        self, step: int, count: int, rank: int = 0, world_size: int = 1, *, warm_up: bool = False
    ) -> list[Conversation]:
        """A rank's share of the conversations of a step; files have no warm-up of their own."""
        mine = share_of_rank(epoch_positions(self.rows, step, count, self.seed), rank, world_size)
        return [self.rows.row(position) for position in mine]


def epoch_positions(rows: Rows[Row], step: int, count: int, seed: int) -> list[int]:
    """Positions of the rows of a step: files are gone through epoch after epoch, each newly shuffled."""
    size = len(rows)
    wanted = range(step * count, (step + 1) * count)
    epochs = {at // size for at in wanted}
    orders = {epoch: rows.order(random.Random(f"{seed}/epoch/{epoch}")) for epoch in epochs}
    return [orders[at // size][at % size] for at in wanted]


def share_of_rank(items: Sequence[Item], rank: int, world_size: int) -> list[Item]:
    """The part of a global batch that a rank works on."""
    return list(items[rank::world_size])
