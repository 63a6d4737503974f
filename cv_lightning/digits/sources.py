"""The embedded scenes as sources of a run: tasks, demonstrations, held-out scenes.

Pure functions of a step's number, like every source of `data.sources`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

from cv_lightning.data.conversations import Conversation
from cv_lightning.data.sources import slice_of_rank
from cv_lightning.digits.demonstrations import DemonstrationConfig, Execute, demonstrate
from cv_lightning.digits.scenes import ALL_KINDS, DigitsConfig, Kind, digit_task
from cv_lightning.types import Task

DEMONSTRATIONS_FROM = 1_000_000_000
"""First scene index of SFT (twice that in its warm-up), so that its scenes differ from those of RL."""


def balanced_kinds(shares: Mapping[str, float], count: int, rng: random.Random) -> list[Kind]:
    """Kinds in random order, whose numbers follow the shares up to rounding; over many calls the shares are exact.

    Args:
        shares: Relative frequencies, not all 0.
        count: Number of kinds.
        rng: Draws the rounding and the order.
    """
    kinds = [kind for kind in ALL_KINDS if shares.get(kind, 0) > 0]
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
    """Training scenes, kinds balanced within each step.

    Args:
        config: Look, kinds and seed of the scenes.
        kind_shares: Relative frequency of the kinds in a step; by default that of the config throughout.
    """

    def __init__(self, config: DigitsConfig, kind_shares: Callable[[int], Mapping[str, float]] | None = None) -> None:
        self.config = config
        self.kind_shares = kind_shares or (lambda step: config.kind_shares)

    def batch(self, step: int, count: int, rank: int = 0, world_size: int = 1) -> list[Task]:
        """A rank's part of the scenes of a step."""
        kinds = balanced_kinds(self.kind_shares(step), count, random.Random(f"{self.config.seed}/kinds/{step}"))
        mine = slice_of_rank(list(enumerate(kinds, start=step * count)), rank, world_size)
        return [digit_task(self.config, "train", index, kind) for index, kind in mine]


class DigitDemonstrations:
    """Conversations about training scenes.

    Args:
        digits: Look, kinds and seed of the scenes.
        config: In which scenes the tool is used.
        execute: Runs the snippets of the demonstrations.
        warm_up_steps: Number of steps, at the start, with conversations of one turn.
    """

    def __init__(
        self, digits: DigitsConfig, config: DemonstrationConfig, execute: Execute, warm_up_steps: int = 0
    ) -> None:
        self.digits = digits
        self.config = config
        self.execute = execute
        self.warm_up_steps = warm_up_steps

    def batch(self, step: int, count: int, rank: int = 0, world_size: int = 1) -> list[Conversation]:
        """A rank's part of the conversations of a step."""
        warm_up = step < self.warm_up_steps
        seed = f"{self.digits.seed}/demonstrations/{step}"
        shares = self.config.warm_up_shares if warm_up else self.digits.kind_shares
        kinds = balanced_kinds(shares, count, random.Random(seed))
        first = DEMONSTRATIONS_FROM * (2 if warm_up else 1) + step * count
        mine = slice_of_rank(list(enumerate(kinds, start=first)), rank, world_size)
        return [self._conversation(index, kind, random.Random(f"{seed}/{index}"), warm_up) for index, kind in mine]

    def _conversation(self, index: int, kind: Kind, rng: random.Random, warm_up: bool) -> Conversation:
        task = digit_task(self.digits, "train", index, kind)
        return demonstrate(task, self.config, self.digits, rng, self.execute, warm_up=warm_up)


class HeldOutScenes:
    """Scenes of held-out digits, a given number of each kind; the kinds alternate.

    Args:
        config: Look and seed of the scenes.
        counts: Number of scenes of each kind.

    Raises:
        ValueError: A kind does not exist, or a number is negative.
    """

    def __init__(self, config: DigitsConfig, counts: Mapping[str, int]) -> None:
        if set(counts) - set(ALL_KINDS) or min(counts.values(), default=0) < 0:
            raise ValueError(
                f"--data.init_args.val_tasks/test_tasks {dict(counts)}: not negative, and of {', '.join(ALL_KINDS)}"
            )
        self.config = config
        kinds = [kind for kind in ALL_KINDS if counts.get(kind, 0)]
        longest = max((counts[kind] for kind in kinds), default=0)
        self._scenes = [(index, kind) for index in range(longest) for kind in kinds if index < counts[kind]]

    def __len__(self) -> int:
        return len(self._scenes)

    def row(self, position: int) -> Task:
        """The scene at a position."""
        index, kind = self._scenes[position]
        return digit_task(self.config, "held_out", index, kind)
