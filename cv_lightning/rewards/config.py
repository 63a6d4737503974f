"""What the reward is made of, as typed config. No heavy imports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from cv_lightning.ranges import NonNegativeFloat, check_ranges
from cv_lightning.rewards.geometry import CropCredit
from cv_lightning.rewards.judge.config import JudgeConfig
from cv_lightning.rewards.process import RECIPES, Credit, Recipe
from cv_lightning.rewards.terms import RewardTerm

PENALTIES = ("usage", "spurious", "reasoning")
COMPONENTS = ("accuracy", "format", "mandatory", "necessity", "exact", "emerge", *PENALTIES)
METRICS = ("total", "answer_accuracy", "judged", "by_source", "by_transform")
"""Names under `reward/` in the metrics that are not components."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Weights of the components and the choices between formulas.

    total = sum of weight x component, with the penalties usage, spurious and reasoning subtracted. The defaults pay
    for the image that the answer was given on; configs/reward has the recipes of the paper, of the released code and of
    the outcome alone.
    """

    accuracy: NonNegativeFloat = 1.0
    """Weight of the right answer."""
    format: NonNegativeFloat = 0.1
    """Weight of a well-formed response."""
    mandatory: NonNegativeFloat = 1.0
    """Weight of the wanted operations that were used (alpha)."""
    necessity: NonNegativeFloat = 0.0
    """Weight of being right with the tool where the group is wrong without it (beta)."""
    exact: NonNegativeFloat = 0.1
    """Weight of having used the wanted core operations and no others."""
    emerge: NonNegativeFloat = 0.0
    """Weight of being right with an operation outside the core. It also pays for unnecessary operations, hence 0; paper
    and released code use 0.2."""
    usage: NonNegativeFloat = 0.5
    """Weight of the penalty on calls beyond the needed ones (gamma)."""
    spurious: NonNegativeFloat = 0.5
    """Weight of the penalty on unnecessary rotations and flips (gamma)."""
    reasoning: NonNegativeFloat = 0.0
    """Weight of the paper's penalty on being right with a crop that misses; only with `credit: steps`."""
    credit: Credit = "net"
    """What counts as used, and with it the formulas (`RECIPES`). `net`: the net effect on the image that the answer was
    given on; `steps`: everything that ran, exactness in order (paper); `ran`: everything that ran, crops in the frame
    of the image that each call worked on (released code; can be gamed, for comparisons only)."""
    crop_credit: CropCredit | None = None
    """Score of a crop: `iou` with the ground-truth box, or `coverage`: 1 where it shows the box and little else. None:
    coverage for `credit: net`, else iou."""
    gate: bool | None = None
    """Multiply accuracy by mandatory where a crop is wanted and mandatory is below 0.1. None: true, except for
    `credit: steps`."""
    mathematics: bool = False
    """Also compare formulas symbolically (needs the package math-verify)."""
    judge: JudgeConfig | None = None
    """The judge that is asked where the rules say no; None: rules only."""
    terms: list[RewardTerm] = field(default_factory=list)
    """Further components: classes by `class_path`, see docs/rewards.md."""

    def __post_init__(self) -> None:
        check_ranges(self, "rollout.reward")
        recipe = RECIPES[self.credit]
        for name in ("crop_credit", "gate"):
            if self.credit != "net" and getattr(self, name) not in (None, getattr(recipe, name)):
                raise ValueError(
                    f"reward.{name} {getattr(self, name)!r}: it can be chosen with reward.credit 'net' only; "
                    f"{self.credit!r} is the recipe of the paper or of the released code as a whole"
                )
        if self.reasoning and self.credit != "steps":
            raise ValueError("reward.reasoning is a penalty of reward.credit 'steps' only; set that or reasoning to 0")
        names = [term.name for term in self.terms]
        taken = sorted({name for name in names if name in COMPONENTS + METRICS or names.count(name) > 1})
        if taken:
            raise ValueError(f"reward.terms: the names {taken} are taken; give every term a name of its own")

    @property
    def recipe(self) -> Recipe:
        """The formulas in force."""
        recipe = RECIPES[self.credit]
        gate = recipe.gate if self.gate is None else self.gate
        return recipe._replace(crop_credit=self.crop_credit or recipe.crop_credit, gate=gate)

    @property
    def weights(self) -> dict[str, float]:
        """Signed weight of every component: penalties negative, further terms included."""
        signed = {name: getattr(self, name) * (-1.0 if name in PENALTIES else 1.0) for name in COMPONENTS}
        return signed | {term.name: term.weight for term in self.terms}

    def total(self, components: Mapping[str, float]) -> float:
        """Weighted sum of components."""
        weights = self.weights
        return math.fsum(weights[name] * value for name, value in components.items())
