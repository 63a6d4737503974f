"""`python -m cv_lightning judge`: ask the judge for one verdict, or check that its endpoint works."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field, replace

from cv_lightning.rewards.answer import rule_score
from cv_lightning.rewards.config import JudgeConfig
from cv_lightning.rewards.process import CORRECT_ABOVE
from cv_lightning.types import JudgeError


@dataclass(frozen=True, kw_only=True)
class JudgeQuestion:
    """One comparison. Exit code 0: a verdict was given; 1: the judge gave none; 2: the command line is wrong."""

    question: str = ""
    """The bare question."""
    ground_truth: str = ""
    """The right answer."""
    answer: str = ""
    """The given answer."""
    data_source: str = "unknown"
    """Picks the prompt (judge.task_types)."""
    check: bool = False
    """Ask the endpoint two comparisons with known outcome instead."""
    as_json: bool = False
    """Print JSON."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """The endpoint."""

    def __post_init__(self) -> None:
        if not self.check and not (self.ground_truth and self.answer):
            raise ValueError("--ground-truth and --answer are needed, or --check")


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointReport:
    """What a check of the endpoint found."""

    ok: bool
    message: str
    """One line for people: what works, or what to change."""
    latency_s: float = 0.0


def check_endpoint(config: JudgeConfig) -> EndpointReport:
    """Ask two comparisons that any judge gets right; nothing is cached. Used by `doctor`."""
    probe = replace(config, cache_folder=None, max_attempts=1, give_up_s=min(config.give_up_s, config.timeout_s + 5))
    begun = time.perf_counter()
    try:
        verdicts = _verdicts(probe, [("4", "four", "math"), ("4", "seven", "math")])
    except (JudgeError, ValueError) as error:
        return EndpointReport(ok=False, message=str(error))
    elapsed = time.perf_counter() - begun
    right, wrong = (value > CORRECT_ABOVE for value in verdicts)
    if right and not wrong:
        return EndpointReport(ok=True, message=f"{config.model} at {config.base_url} judges", latency_s=elapsed)
    found = f"takes 'four' for '4' with {verdicts[0]:.2f} and 'seven' with {verdicts[1]:.2f}"
    message = f"{config.model} at {config.base_url} answers, but {found}; use a stronger model"
    return EndpointReport(ok=False, message=message, latency_s=elapsed)


def _verdicts(
    config: JudgeConfig, cases: list[tuple[str, str, str]], question: str = "How much is 2 + 2?"
) -> list[float]:
    """Verdicts on (ground truth, answer, data source), asked at once."""
    from cv_lightning.rewards.judge import Judge

    judge = Judge(config)

    async def ask() -> list[float]:
        return list(await asyncio.gather(*(judge.verdict(question, *case) for case in cases)))

    try:
        return asyncio.run(ask())
    finally:
        judge.close()


def main(argv: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    flags = [_underscored(flag) for flag in (sys.argv[1:] if argv is None else argv)]
    try:
        asked = jsonargparse.auto_cli(JudgeQuestion, as_positional=False, args=flags, prog="cv_lightning judge")
        return _check(asked) if asked.check else _ask(asked)
    except ValueError as error:  # a config's own cross-check; it names the flag
        print(error, file=sys.stderr)
        return 2


def _ask(asked: JudgeQuestion) -> int:
    rule = rule_score(asked.answer, asked.ground_truth, asked.question)
    try:
        [value] = _verdicts(asked.judge, [(asked.ground_truth, asked.answer, asked.data_source)], asked.question)
    except JudgeError as error:
        print(error, file=sys.stderr)
        return 1
    said = {"rule": rule.value > CORRECT_ABOVE, "judge": value > CORRECT_ABOVE, "score": value}
    text = f"rule: {_word(said['rule'])}, judge: {_word(said['judge'])} ({value:.3f})"
    print(json.dumps(said) if asked.as_json else text)
    return 0


def _check(asked: JudgeQuestion) -> int:
    report = check_endpoint(asked.judge)
    said = {"ok": report.ok, "message": report.message, "latency_s": report.latency_s}
    print(json.dumps(said) if asked.as_json else report.message)
    return int(not report.ok)


def _word(correct: bool | float) -> str:
    return "correct" if correct else "wrong"


def _underscored(flag: str) -> str:
    """`--ground-truth=a-b` as `--ground_truth=a-b`."""
    name, equals, value = flag.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if flag.startswith("--") else flag
