"""Reading a verdict out of a chat completion. Pure functions of JSON values."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from cv_lightning.rewards.markup import THINK_CLOSE, THINK_OPEN, cut_spans

_RIGHT = {"1", "yes", "true", "correct", "right"}
_WRONG = {"0", "no", "false", "incorrect", "wrong"}
_LABELLED = re.compile(r"(?:verdict|answer|score|result)\s*(?:is|[:=])\s*\W{0,3}(\w{1,12})\W{0,4}\Z", re.IGNORECASE)


def read_verdict(body: object) -> float | None:
    """Verdict of the body of a chat completion; None where it holds none.

    Args:
        body: decoded JSON, of any shape.

    Returns:
        Probability that the answer is right where the server gives probabilities, else 0 or 1; right above 0.5.
    """
    choice = _at(body, "choices", 0)
    text = _at(choice, "message", "content")
    value = parse_verdict(text) if isinstance(text, str) else None
    if value is None:
        return None
    probability = _first_token_probability(_at(choice, "logprobs", "content", 0))
    return value if probability is None else probability


def parse_verdict(text: str) -> float | None:
    """1.0 or 0.0 from the judge's text: one word (1, correct, no, ...), JSON with such a value, or `Verdict: 1`.

    Thoughts are cut out. Anything else is no verdict (None): a sentence is not guessed at.
    """
    text = cut_spans(text[:20_000], THINK_OPEN, THINK_CLOSE, unclosed=True, mark="")
    text = text.rpartition(THINK_CLOSE)[2].strip().strip("`*\"' \n")
    text = text.removeprefix("json").strip()
    if text.startswith("{"):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            return None
        known = [values[key] for key in ("verdict", "score", "correct", "result", "answer") if key in values]
        return _word(str(known[0])) if known else None
    word = _word(text)
    if word is None and len(text) < 2000 and (match := _LABELLED.search(text[-60:])):
        word = _word(match.group(1))
    return word


def _word(text: str) -> float | None:
    word = text.strip().rstrip(".!").casefold()
    if word in ("1.0", "0.0"):
        word = word[0]
    return 1.0 if word in _RIGHT else 0.0 if word in _WRONG else None


def _first_token_probability(token: object) -> float | None:
    """P(1) / (P(1) + P(0)) of the first token, if that is 0 or 1 and the server tells both."""
    if str(_at(token, "token")).strip() not in ("0", "1"):
        return None
    mass = {"0": 0.0, "1": 0.0}
    alternatives = _at(token, "top_logprobs")
    for entry in alternatives if isinstance(alternatives, list) else []:
        name, logprob = str(_at(entry, "token")).strip(), _at(entry, "logprob")
        if name in mass and isinstance(logprob, int | float) and not math.isnan(logprob):
            mass[name] += math.exp(min(0.0, float(logprob)))
    total = mass["0"] + mass["1"]
    return mass["1"] / total if min(mass.values()) > 0 and total > 0 else None


def _at(value: Any, *path: str | int) -> Any:
    """Value at a path of keys and indices; None where there is none."""
    for key in path:
        if isinstance(key, str) and isinstance(value, dict):
            value = value.get(key)
        elif isinstance(key, int) and isinstance(value, list) and len(value) > key:
            value = value[key]
        else:
            return None
    return value
