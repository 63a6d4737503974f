"""What the reward is made of, as typed config. No heavy imports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from cv_lightning.endpoint.config import EndpointConfig
from cv_lightning.rewards.geometry import CropCredit
from cv_lightning.rewards.process import NecessityOver, Penalties, Rules
from cv_lightning.rewards.terms import RewardTerm

Credit = Literal["net", "ran", "steps"]


class Recipe(NamedTuple):
    """Formulas that belong together; `RewardConfig.credit` picks one."""

    crop_credit: CropCredit
    gate: bool
    penalties: Penalties
    """`linear` counts calls and operations, `binary` is 0 or 1 each."""
    necessity_over: NecessityOver
    """Who used the tool: all who called it, or who used an operation outside the core."""
    format_by: Literal["turn", "response"]
    """Every turn must be well-formed, or only the response as a whole."""
    crop_frame: Literal["source", "call"]
    """Where crops are compared with the box: in the source image, or in the image that each call worked on."""

    @property
    def rules(self) -> Rules:
        """The choices that `process` needs."""
        return Rules(gate=self.gate, penalties=self.penalties, necessity_over=self.necessity_over)


RECIPES: dict[Credit, Recipe] = {
    "net": Recipe("coverage", True, "linear", "any_tool", "turn", "source"),
    "steps": Recipe("iou", False, "binary", "optional_tool", "turn", "source"),
    "ran": Recipe("iou", True, "linear", "any_tool", "response", "call"),
}
"""The project's own recipe, the paper's, and the released code's."""

JUDGE_COUNTS = ("verdicts", "failed", "cost", "requests", "retries", "prompt_tokens", "completion_tokens")
"""Figures of a judge that add up over ranks."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(EndpointConfig):
    """A model behind an OpenAI-compatible endpoint that compares answers where the rules say no."""

    flag: ClassVar[str] = "reward.judge"

    model: str = "Qwen/Qwen3-30B-A3B-Instruct-2507"
    """Name under which the endpoint serves the model. Verdicts are cached by it: one name, one model."""
    api_key_env: str = "JUDGE_API_KEY"
    """Environment variable that holds the key; unset means no key. The key itself is never part of a config."""
    task_types: dict[str, str] = field(default_factory=dict)
    """Prompt by data source: `general`, `ocr`, `mathematics` or a file name of `prompt_folder` without its ending."""
    default_task_type: str = "general"
    """Prompt for data sources that `task_types` does not name."""
    prompt_folder: str | None = None
    """Folder of `<task type>.txt` files that stand in for the shipped prompts of the same name."""
    timeout_s: float = 30.0
    """Most seconds that one request may take as a whole, however slowly its bytes drip."""
    give_up_s: float = 120.0
    """Most seconds that a verdict may take with all its tries and pauses once it is its turn; after that the trajectory
    is unscored. A server that has been down for so long fails waiting questions at once."""
    logprobs: bool = True
    """Read the verdict from the first tokens' probabilities where the server offers them."""
    max_tokens: int = 16
    """Tokens that the judge may answer with."""
    temperature: float = 0.0
    """Sampling temperature of the judge."""
    cache_folder: str | None = None
    """Folder of the disk cache of verdicts; None: verdicts are kept in memory only."""
    cache_megabytes: int = 512
    """Size limit of the disk cache."""
    max_failed_frac: float = 0.1
    """The run stops when more than this share of the last `failure_window` verdicts failed: while it runs once five
    have failed, at the end of a test or validation however few there were."""
    failure_window: int = 200
    """Verdicts that `max_failed_frac` is taken over; fewer while fewer are in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(("max_tokens", "cache_megabytes", "failure_window"), at_least=1)
        self.require(("temperature",), at_least=0)
        if not 0 <= self.max_failed_frac <= 1:
            raise ValueError(f"reward.judge.max_failed_frac is {self.max_failed_frac}; it is a share between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Weights of the components and the choices between formulas.

    total = sum of weight x component, the penalties usage, spurious and reasoning subtracted. The defaults are the
    recipe `default`: they pay for what the answer was given on. configs/reward has those of the paper, of the released
    code and of the outcome alone.
    """

    accuracy: float = 1.0
    """Weight of the right answer."""
    format: float = 0.1
    """Weight of a well-formed response."""
    mandatory: float = 1.0
    """Weight of the wanted operations that were used (alpha)."""
    necessity: float = 0.0
    """Weight of being right by the tool where the group is wrong without (beta)."""
    exact: float = 0.1
    """Weight of having used exactly the wanted core operations."""
    emerge: float = 0.0
    """Weight of being right with an operation outside the core. It pays for needless operations too, so the default is
    without; paper and released code have 0.2."""
    usage: float = 0.5
    """Weight of the penalty on calls beyond the needed ones (gamma)."""
    spurious: float = 0.5
    """Weight of the penalty on turning what needs no turn (gamma)."""
    reasoning: float = 0.0
    """Weight of the paper's penalty on being right with a crop that misses; only with `credit: steps`."""
    credit: Credit = "net"
    """What counts as used, and with it the formulas (`RECIPES`). `net`: what the image that the answer was given on is
    of the source image; `steps`: everything that ran, exactness in order (paper); `ran`: everything that ran, crops in
    the frame of the image that each call worked on (released code; for comparisons, as it can be gamed)."""
    crop_credit: CropCredit | None = None
    """Worth of a crop: `iou` with the ground-truth box, or `coverage`: full where it shows the box and little else.
    None: coverage for `credit: net`, else iou."""
    gate: bool | None = None
    """Where a crop is wanted and mandatory is below 0.1, multiply accuracy by mandatory. None: all but
    `credit: steps`."""
    mathematics: bool = False
    """Compare answers symbolically, too (needs the package math-verify)."""
    judge: JudgeConfig | None = None
    """Ask this judge where the rules say no; None: rules only."""
    terms: list[RewardTerm] = field(default_factory=list)
    """Further components: classes by `class_path`, see docs/rewards.md."""

    def __post_init__(self) -> None:
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


PENALTIES = ("usage", "spurious", "reasoning")
METRICS = ("total", "answer_accuracy", "judged", "by_source", "by_transform")
"""Names under `reward/` in the metrics that are not components."""
COMPONENTS = ("accuracy", "format", "mandatory", "necessity", "exact", "emerge", *PENALTIES)
