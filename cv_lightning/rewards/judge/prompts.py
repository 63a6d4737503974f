"""Prompts of the judge: one text file per task type, shipped ones overridable by a folder of the user's."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

SHIPPED = Path(__file__).parent / "prompts"
FIELDS = ("question", "ground_truth", "answer")
MAX_FIELD_CHARS = 4000
"""Longer fields lose their middle; the tags around them survive."""


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """A prompt with the marks {question}, {ground_truth} and {answer}."""

    template: str
    version: str
    """First 12 hex digits of the template's SHA-256: an edited prompt has verdicts of its own in the cache."""

    def fill(self, question: str, ground_truth: str, answer: str) -> str:
        """The prompt for one comparison; the marks are replaced in one pass, so none inside a field is."""
        values = dict(zip(FIELDS, map(_as_data, (question, ground_truth, answer)), strict=True))
        return re.sub(r"\{(" + "|".join(FIELDS) + r")\}", lambda mark: values[mark[1]], self.template)


def load_prompt(task_type: str, folder: str | None) -> JudgePrompt:
    """Read `<task_type>.txt` from the folder, else the shipped one.

    Raises:
        ValueError: There is none, or it lacks a mark; says which prompts there are.
    """
    places = [*([Path(folder)] if folder else []), SHIPPED]
    path = next((path for place in places if (path := place / f"{task_type}.txt").is_file()), None)
    if path is None:
        known = sorted({path.stem for place in places for path in place.glob("*.txt")})
        raise ValueError(f"reward.judge.task_types: there is no prompt {task_type!r}; there are {known}")
    template = path.read_text(encoding="utf-8")
    if missing := [name for name in FIELDS if "{" + name + "}" not in template]:
        raise ValueError(f"{path} lacks the marks {missing}; a judge's prompt needs all of {list(FIELDS)}")
    return JudgePrompt(template, hashlib.sha256(template.encode()).hexdigest()[:12])


def _as_data(text: str) -> str:
    """A field that can neither close its tag nor fill the context."""
    if len(text) > MAX_FIELD_CHARS:
        half = MAX_FIELD_CHARS // 2
        text = f"{text[:half]} [...] {text[-half:]}"
    return text.replace("<", "\u2039").replace(">", "\u203a")
