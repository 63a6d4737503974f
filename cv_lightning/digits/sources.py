"""The embedded scenes as sources of a run: tasks, demonstrations, held-out scenes.

Pure functions of a step's number, like every source of `data.sources`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

from cv_lightning.data.conversations import Conversation
from cv_lightning.data.sources import share_of_rank
from cv_lightning.digits.demonstrations import DemonstrationConfig, Execute, demonstrate
from cv_lightning.digits.scenes import KINDS, DigitsConfig, Kind, digit_task
from cv_lightning.types import Task

DEMONSTRATIONS_FROM = 1_000_000_000
"""First scene index of SFT (twice that in its warm-up): its scenes differ from those of RL under the same seed."""


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

    def batch(self, step: int, count: int, rank: int = 0, world_size: int = 1, *, warm_up: bool = False) -> list[Task]:
        """A rank's share of the scenes of a step; there is no warm-up."""
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

    def batch(
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
