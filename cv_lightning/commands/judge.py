"""`python -m cv_lightning judge`: ask the judge for one verdict, or check that its endpoint works."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field

from cv_lightning.command_line import read_command_line
from cv_lightning.rewards.answer import rule_score
from cv_lightning.rewards.judge.check import check_endpoint, verdicts
from cv_lightning.rewards.judge.config import JudgeConfig
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


def main(argv: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    try:
        asked = read_command_line(JudgeQuestion, argv, as_positional=False, prog="cv_lightning judge")
        return _check(asked) if asked.check else _ask(asked)
    except ValueError as error:  # a config's own cross-check; it names the flag
        print(error, file=sys.stderr)
        return 2


def _ask(asked: JudgeQuestion) -> int:
    rule = rule_score(asked.answer, asked.ground_truth, asked.question)
    try:
        [value] = verdicts(asked.judge, [(asked.ground_truth, asked.answer, asked.data_source)], asked.question)
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
