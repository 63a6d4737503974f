"""Prompts of the judge: one text file per task type, shipped ones overridable by a folder of the user's."""

from __future__ import annotations

import hashlib
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
        values = dict(zip(FIELDS, (question, ground_truth, answer), strict=True))
        pieces: list[str] = []
        rest = self.template
        while True:
            found = [(rest.find("{" + name + "}"), name) for name in FIELDS if "{" + name + "}" in rest]
            if not found:
                return "".join([*pieces, rest])
            start, name = min(found)
            pieces += [rest[:start], _as_data(values[name])]
            rest = rest[start + len(name) + 2 :]


def load_prompt(task_type: str, folder: str | None) -> JudgePrompt:
    """Read `<task_type>.txt` from the folder, else the shipped one.

    Raises:
        ValueError: there is none, or it lacks a mark; says which prompts there are.
    """
    places = [Path(folder)] if folder else []
    for place in [*places, SHIPPED]:
        path = place / f"{task_type}.txt"
        if path.is_file():
            template = path.read_text(encoding="utf-8")
            missing = [name for name in FIELDS if "{" + name + "}" not in template]
            if missing:
                raise ValueError(f"{path} lacks the marks {missing}; a judge's prompt needs all of {list(FIELDS)}")
            return JudgePrompt(template, hashlib.sha256(template.encode()).hexdigest()[:12])
    known = sorted({path.stem for place in [*places, SHIPPED] for path in place.glob("*.txt")})
    raise ValueError(f"reward.judge.task_types: there is no prompt {task_type!r}; there are {known}")


def _as_data(text: str) -> str:
    """A field that can neither close its tag nor fill the context."""
    if len(text) > MAX_FIELD_CHARS:
        half = MAX_FIELD_CHARS // 2
        text = f"{text[:half]} [...] {text[-half:]}"
    return text.replace("<", "\u2039").replace(">", "\u203a")
