"""Check that a judge's endpoint works: for `judge --check`, `doctor`, and the start of a training run."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace

from cv_lightning.rewards.judge.client import Judge
from cv_lightning.rewards.judge.config import JudgeConfig
from cv_lightning.rewards.process import CORRECT_ABOVE
from cv_lightning.types import JudgeError


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointReport:
    """What a check of the endpoint found."""

    ok: bool
    message: str
    """One line: what works, or what to change."""
    latency_s: float = 0.0


def check_endpoint(config: JudgeConfig) -> EndpointReport:
    """Ask for two comparisons that any judge gets right; nothing is cached."""
    probe = replace(config, cache_folder=None, max_attempts=1, give_up_s=min(config.give_up_s, config.timeout_s + 5))
    begun = time.perf_counter()
    try:
        found = verdicts(probe, [("4", "four", "math"), ("4", "seven", "math")])
    except (JudgeError, ValueError) as error:
        return EndpointReport(ok=False, message=str(error))
    elapsed = time.perf_counter() - begun
    right, wrong = (value > CORRECT_ABOVE for value in found)
    if right and not wrong:
        return EndpointReport(ok=True, message=f"{config.model} at {config.base_url} judges", latency_s=elapsed)
    said = f"takes 'four' for '4' with {found[0]:.2f} and 'seven' with {found[1]:.2f}"
    message = f"{config.model} at {config.base_url} answers, but {said}; use a stronger model"
    return EndpointReport(ok=False, message=message, latency_s=elapsed)


def verdicts(
    config: JudgeConfig, cases: list[tuple[str, str, str]], question: str = "How much is 2 + 2?"
) -> list[float]:
    """Verdicts on several (ground truth, answer, data source), asked for at once.

    Raises:
        JudgeError: The judge gave none.
    """
    judge = Judge(config)

    async def ask() -> list[float]:
        return list(await asyncio.gather(*(judge.verdict(question, *case) for case in cases)))

    try:
        return asyncio.run(ask())
    finally:
        judge.close()
