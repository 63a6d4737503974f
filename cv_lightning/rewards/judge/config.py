"""Config of the judge. No heavy imports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cv_lightning.endpoint.config import EndpointConfig
from cv_lightning.ranges import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt

JUDGE_COUNTS = ("verdicts", "failed", "cost", "requests", "retries", "prompt_tokens", "completion_tokens")
"""Figures of a judge that add up over ranks."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(EndpointConfig):
    """A model behind an OpenAI-compatible endpoint that compares answers where the rules say no."""

    flag: ClassVar[str] = "rollout.reward.judge"

    model: str = "Qwen/Qwen3-30B-A3B-Instruct-2507"
    """Name under which the endpoint serves the model. It is part of a cached verdict's key."""
    api_key_env: str = "JUDGE_API_KEY"
    """Environment variable that holds the key; unset means no key. The key itself is never part of a config."""
    task_types: dict[str, str] = field(default_factory=dict)
    """Prompt by data source: `general`, `ocr`, `mathematics` or a file name of `prompt_folder` without its ending."""
    default_task_type: str = "general"
    """Prompt for data sources that `task_types` does not name."""
    prompt_folder: str | None = None
    """Folder of `<task type>.txt` files that stand in for the shipped prompts of the same name."""
    timeout_s: PositiveFloat = 30.0
    """Seconds that one request may take as a whole."""
    give_up_s: PositiveFloat = 120.0
    """Seconds that a verdict may take with all its tries and pauses, not counting the queue; after that the trajectory
    is unscored. When the server has been down for so long, waiting questions fail at once."""
    logprobs: bool = True
    """Read the verdict from the first tokens' probabilities where the server offers them."""
    max_tokens: PositiveInt = 16
    """Tokens that the judge may answer with."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature of the judge."""
    cache_folder: str | None = None
    """Folder of the disk cache of verdicts; None: verdicts are kept in memory only."""
    cache_megabytes: PositiveInt = 512
    """Size limit of the disk cache."""
    max_failed_frac: Fraction = 0.1
    """The run stops when more than this fraction of the last `failure_window` verdicts failed: while it runs once five
    have failed, at the end of a test or validation however few there were."""
    failure_window: PositiveInt = 200
    """Verdicts that `max_failed_frac` is taken over; fewer while fewer are in."""

    def __post_init__(self) -> None:
        super().__post_init__()
