"""Reading a verdict from a chat completion. Pure functions of JSON values.

A verdict counts only where the prompt asked for it: the whole reply is one word of the grammar, a JSON object with a
verdict, or a text that ends in `Verdict: <word>`. A sentence about the answers is never a verdict: "The correct answer
is 1" repeats the ground truth. Two verdicts that contradict each other do not count.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from cv_lightning.rewards.markup import THINK_CLOSE, THINK_OPEN, cut_spans

GRAMMAR = 2
"""Version of the grammar, part of a cached verdict's key: a corrected grammar asks again."""
_RIGHT = {"1", "yes", "true", "correct", "right"}
_WRONG = {"0", "no", "false", "incorrect", "wrong"}
_DECORATION = "`*_\"' \t\r\n"
_LABELLED = re.compile(
    r"#*\s*(?:(?:the|my) )?(?:final )?(?:verdict|judge?ment|decision)[*_`\s]*(?:\bis\b|[:=])[*_`\"'\s]*"
    r"(?P<word>[01]\.0|\w+)[*_`\"'\s]*[.!]?",
    re.IGNORECASE,
)
_SCORE = re.compile(r"(?:final )?score\s*[:=][*_`\s]*(?P<word>[01])[*_`\s]*\.?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|(?<=[.!?;])\s+|(?<=[.!?][*_`\"'])\s+")
_FIRST_WORD = re.compile(r"\W*(\w+)(?:\Z|[^\w\s]|\s+\W)")
"""A word that stands alone before punctuation: `1.`, `Yes, ...`, `No - ...`."""
_JSON_KEYS = ("verdict", "is_correct", "correct", "score")
_JSON_COMPANIONS = frozenset(("reason", "reasoning", "explanation", "rationale", "confidence", "analysis", "comment"))
"""Keys beside which `correct` and `score` keep their meaning."""


def read_verdict(body: object) -> float | None:
    """Verdict of the body of a chat completion; None where it holds none.

    Args:
        body: Decoded JSON, of any shape.

    Returns:
        Probability that the answer is right where the reply is one digit and the server gives its probabilities, else
        0 or 1; right above 0.5. None also where text and probabilities contradict each other.
    """
    choice = _at(body, "choices", 0)
    text = _at(choice, "message", "content")
    value = parse_verdict(text) if isinstance(text, str) else None
    if value is None or text.strip() not in ("0", "1"):
        return value  # the first token is not the verdict: "1. The answers differ. Verdict: 0"
    probability = _first_token_probability(_at(choice, "logprobs", "content", 0), text.strip())
    if probability is None or probability == 0.5:
        return value
    return probability if (probability > 0.5) == (value > 0.5) else None


def read_text(body: object) -> str | None:
    """Text of the body of a chat completion; None where it holds none."""
    text = _at(body, "choices", 0, "message", "content")
    return text if isinstance(text, str) and text.strip() else None


def parse_verdict(text: str) -> float | None:
    """1.0 or 0.0 from the judge's text: one word (1, correct, no, ...), JSON with such a value, or `... Verdict: 1`.

    Thoughts are removed first. None for anything else: the meaning of a sentence is not guessed.
    """
    text = cut_spans(text, THINK_OPEN, THINK_CLOSE, unclosed=True, mark="")
    text = text.rpartition(THINK_CLOSE)[2].strip().strip(_DECORATION)
    text = text.removeprefix("json").strip()
    if text.startswith("{"):
        return _json_verdict(text)
    whole = _word(text)
    if whole is None and (score := _SCORE.fullmatch(text)):
        whole = _word(score["word"])
    return _labelled_verdict(text) if whole is None else whole


def _labelled_verdict(text: str) -> float | None:
    """The verdict behind the label that ends a text, unless an earlier one or the first word says otherwise."""
    sentences = [sentence.strip() for sentence in _SENTENCE_END.split(text) if sentence.strip()]
    labelled = [_LABELLED.fullmatch(sentence.strip(_DECORATION)) for sentence in sentences]
    if not sentences or labelled[-1] is None:
        return None
    value = _word(labelled[-1]["word"])
    others = [_word(match["word"]) for match in labelled if match is not None]
    if first := _FIRST_WORD.match(sentences[0]):
        others.append(_word(first[1]) if _word(first[1]) is not None else value)
    return value if all(other == value for other in others) else None


def _json_verdict(text: str) -> float | None:
    """The verdict of a JSON object; None where it holds none, several that differ, or a value of another meaning."""
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    keys = {key.casefold() for key, _ in pairs}
    found = []
    for key, value in pairs:
        key = key.casefold()
        # {"correct": "1", "given": "7"} repeats the ground truth, {"score": 1, "max": 5} has another scale
        if key == "verdict" or (key in _JSON_KEYS and keys <= _JSON_COMPANIONS | {*_JSON_KEYS}):
            found.append(_word(str(value)) if isinstance(value, str | int | float | bool) else None)
    return found[0] if found and all(value == found[0] for value in found) else None


def _word(text: str) -> float | None:
    word = text.strip().rstrip(".!").casefold()
    if word in ("1.0", "0.0"):
        word = word[0]
    return 1.0 if word in _RIGHT else 0.0 if word in _WRONG else None


def _first_token_probability(token: object, digit: str) -> float | None:
    """P(1) / (P(1) + P(0)) of the first token, if that is the digit of the text and the server gives both."""
    if str(_at(token, "token")).strip() != digit:
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
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value
