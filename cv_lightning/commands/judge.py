"""`cv-lightning judge`: ask the judge for one verdict, or check that its endpoint works."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cv_lightning.command_line import put_json, run_verb
from cv_lightning.rewards.answer import rule_score
from cv_lightning.rewards.judge.check import check_endpoint, verdicts
from cv_lightning.rewards.judge.config import JudgeConfig
from cv_lightning.rewards.process import CORRECT_ABOVE
from cv_lightning.types import JudgeError


@dataclass(frozen=True, kw_only=True)
class JudgeQuestion:
    """A comparison. Exit code 0: the judge gave a verdict; 1: it gave none; 2: the command line is wrong."""

    question: str = ""
    """The bare question."""
    ground_truth: str = ""
    """The right answer."""
    answer: str = ""
    """The given answer."""
    data_source: str = "unknown"
    """Selects the prompt (judge.task_types)."""
    check: bool = False
    """Ask the endpoint two comparisons with known outcome instead."""
    json: Path | None = None
    """Write the result into this file; - prints it as JSON."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """The endpoint."""

    def __post_init__(self) -> None:
        if not self.check and not (self.ground_truth and self.answer):
            raise ValueError("--ground_truth and --answer are needed, or --check")


def ask(asked: JudgeQuestion) -> int:
    """Print the verdicts of rule and judge, or the state of the endpoint; returns the exit code."""
    if asked.check:
        report = check_endpoint(asked.judge)
        said = {"ok": report.ok, "message": report.message, "latency_s": report.latency_s}
        if not put_json(asked.json, said):
            print(report.message)
        return int(not report.ok)
    rule = rule_score(asked.answer, asked.ground_truth, asked.question)
    try:
        [value] = verdicts(asked.judge, [(asked.ground_truth, asked.answer, asked.data_source)], asked.question)
    except JudgeError as error:
        print(error, file=sys.stderr)
        return 1
    correct = {"rule": rule.value > CORRECT_ABOVE, "judge": value > CORRECT_ABOVE}
    words = ", ".join(f"{name}: {'correct' if is_correct else 'wrong'}" for name, is_correct in correct.items())
    if not put_json(asked.json, correct | {"score": value}):
        print(f"{words} ({value:.3f})")
    return 0


main = partial(run_verb, JudgeQuestion, name="judge", run=ask)
