"""Rule stage of answer scoring: what was answered, and whether it says the same as the ground truth.

Pure functions of text, exact on golden/answers but for its questionable cases, where they return what is sensible.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from cv_lightning.rewards.markup import (
    ANSWER_OPEN,
    RESPONSE_CLOSE,
    RESPONSE_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    answer_spans,
    cut_spans,
)

TOLERANCE = 1e-4
"""Largest absolute difference of two numbers that are the same."""
MAX_ANSWER_CHARS = 300
"""A longer answer is compared as a text only: nothing is picked out of it."""
MAX_LAYERS = 6
"""Of emphasis, dollar signs and boxes that are peeled off an answer."""
MAX_UNTAGGED_LINES = 500
"""Of a text without an answer tag that has so many lines nothing is extracted (the reference's limit)."""

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}\.?"
_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+)"
_SUPERSCRIPT = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_VULGAR_AFTER_DIGIT = re.compile("(\\d)([\u00bc-\u00be\u2150-\u215e])")
_NUMBER = re.compile(rf"[+-]?{_UNSIGNED}(?:[eE][+-]?\d{{1,3}})?\Z")
_FRACTION = re.compile(r"([+-]?)(?:(\d{1,15}) )?(\d{1,15}) ?/ ?(\d{1,15})\Z")
_LATEX_FRACTION = re.compile(r"([+-]?)\\[dt]?frac ?\{(\d{1,15})\} ?\{(\d{1,15})\}\Z")
_CURRENCY = re.compile(r"\A([+-]?) ?[$€£¥]+ ?")
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)(?::(\d\d))?\Z")
# A token of digits in running text. What clings to Latin letters (H2O), dots (1.2.3), colons or another number is none.
_TOKEN = re.compile(rf"(?<![A-Za-z\d.:/,^_])[+-]?{_UNSIGNED}(?: ?/ ?\d+)?(?![\d:^])(?!\.\d)")
_JOINT = re.compile(r"\s*(?:,|;|/|\||&|-|or|and|to|)\s*\Z", re.IGNORECASE)
_MARKUP = re.compile(r"\\boxed|[{}()\[\]$*`\"']")
_ALTERNATIVE = re.compile(r"\bor\b", re.IGNORECASE)
_LONE_CHOICE = re.compile(r"[\W_]*([A-Z])[\W_]*\Z", re.IGNORECASE)
_LEADING_CHOICE = re.compile(r"[^\w]*([A-Z])(?:[):.\],*]|\s*[(\-:=])", re.IGNORECASE)
_NAMED_CHOICE = re.compile(r"\b(?:answer|option|choice)(?: is|:| is:)? *[(*\[]*([A-Z])\b(?![-'])", re.IGNORECASE)
_LETTER = re.compile(r"(?<![\w'-])([A-Z])(?![\w'-])")
_MARKED_LETTER = re.compile(r"(?<![\w'-])[(\[]?([A-J]) ?[):.\]]")
_SECOND_LETTER = (
    _MARKED_LETTER,
    re.compile(r"\A(?:or|and) [(\[]?([A-J])(?![\w'-])"),
    re.compile(r"\A[(\[]?([A-J])(?![\w'-])[)\]]?\s*(?:\Z|[,;/&|]|or\b|and\b)"),
)
_SAID_OF = frozenset(
    "is be was are choose chose pick select say says go with so thus hence therefore it's mean to".split()
)
"""Words before a letter that is chosen; a letter behind any other word belongs to it (vitamin C)."""
_ARTICLE = re.compile(r"\bA(?= (?!or |and )[a-z])|\bI\b")


class AnswerScore(NamedTuple):
    """Verdict on an answer."""

    value: float
    """In [0, 1]; correct above 0.5."""
    answer: str | None
    """What was answered."""
    scored_by: Literal["rule", "judge"] = "rule"


# ------------------------------------------------------------------------------------------------ extraction
def extract_answer(text: str | None) -> str | None:
    """Answer of a whole response, as leniently as the reference reads it (golden/answers, extract_answer).

    The last answer in tags that is not empty; else what follows an unclosed tag; else the last line of a text
    without tags and without an unfinished thought. Training scores `markup.final_answer` instead.
    """
    if text is None or not text.strip():
        return None
    text = cut_spans(text, RESPONSE_OPEN, RESPONSE_CLOSE, mark="")
    closed = [answer.strip() for answer in answer_spans(text)]
    if closed:
        return next((answer for answer in reversed(closed) if answer), "")
    if ANSWER_OPEN in text:
        return text[text.rfind(ANSWER_OPEN) + len(ANSWER_OPEN) :].strip()
    lines = text.strip().split("\n")
    if not text.strip() or len(lines) >= MAX_UNTAGGED_LINES or text.count(THINK_OPEN) > text.count(THINK_CLOSE):
        return None
    return lines[-1].strip()


# ------------------------------------------------------------------------------------------------ equivalence
def are_answers_equivalent(prediction: object, ground_truth: object) -> bool:
    """True if an answer says the same as the ground truth, by rule.

    A ground truth of one letter is a choice: the answer must name this letter and no other. One that is a number is
    compared by value (thousands, fractions, percent and currency read) within `TOLERANCE`, with the number that a short
    answer names; of several it is the last, but a list of numbers offers options and is refused. Anything else is
    compared as text, regardless of case, width, spacing and closing punctuation.

    Args:
        prediction: the answer; anything but a text is wrong.
        ground_truth: the right answer; anything but a text is never met.
    """
    if not isinstance(prediction, str) or not isinstance(ground_truth, str):
        return False
    said, truth = normalise(prediction), normalise(ground_truth)
    if said.casefold() == truth.casefold():
        return True
    if not said or not truth or len(said) > MAX_ANSWER_CHARS + len(truth):
        return False
    if len(truth) == 1 and truth.isascii() and truth.isalpha():
        return read_choice(said) == truth.upper()
    if _CLOCK.match(truth):
        return _clock(said) == _clock(truth)
    wanted = read_number(truth)
    if wanted is None:
        return False
    named = read_number(said) or _number_in(said)
    return named is not None and _same_number(named, wanted)


def normalise(text: str) -> str:
    r"""Text without what carries no meaning in an answer: width, spacing, emphasis, `\boxed`, a final full stop."""
    text = text[: 20 * MAX_ANSWER_CHARS]
    # NFKC alone makes 52 of a squared 5 and 11/2 of one and a half
    text = _VULGAR_AFTER_DIGIT.sub(r"\1 \2", _SUPERSCRIPT.sub(lambda match: "^" + match.group(), text))
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("\u2044", "/")
    text = " ".join(text.split())
    for _ in range(MAX_LAYERS):  # each may hide another: **$\boxed{42}$**.
        text = text.strip("*`\"' ")
        text = text.rstrip(".!") if re.search(r"[^\d.][.!]\Z", text) else text
        text = text[1:-1] if len(text) > 1 and text[0] == text[-1] == "$" else _unboxed(text)
    return text


def _unboxed(text: str) -> str:
    """What stands in a box that is the whole text."""
    if not text.startswith("\\boxed{") or not text.endswith("}"):
        return text
    inner, depth = text[7:-1], 0
    for character in inner:
        depth += (character == "{") - (character == "}")
        if depth < 0:  # two boxes
            return text
    return inner


class Number(NamedTuple):
    """A number as it was written."""

    value: float
    is_percent: bool


def read_number(text: str) -> Number | None:
    r"""The number that a whole text is: 12, 1,234, -.5, 2/4, 1 1/2, \frac{1}{2}, $5, 50%; None if it is none."""
    text = _CURRENCY.sub(r"\1", text.strip())
    percent = text.endswith("%")
    text = text.rstrip("%").strip()
    for pattern in (_FRACTION, _LATEX_FRACTION):
        if match := pattern.match(text):
            *head, numerator, denominator = match.groups()
            whole = float(head[1] or 0) if len(head) > 1 else 0.0
            if float(denominator) == 0:
                return None
            value = whole + float(numerator) / float(denominator)
            return Number(-value if head[0] == "-" else value, percent)
    if len(text) > 40 or not _NUMBER.match(text):
        return None
    return Number(float(text.replace(",", "")), percent)


def read_choice(text: str) -> str | None:
    """The one option letter that an answer names, in upper case; None if none or several."""
    if match := _LONE_CHOICE.match(text):
        return match.group(1).upper()
    if match := _LEADING_CHOICE.match(text):
        letter, rest = match.group(1).upper(), text[match.end() :].strip(" ),;:/&|")
        # another option, alone or listed, but not a word of the option's own: "B. A cat"
        others = {found for pattern in _SECOND_LETTER for found in pattern.findall(rest)}
        return letter if others <= {letter} else None
    plain = _ARTICLE.sub(" ", text)
    letters = {letter for letter in _LETTER.findall(plain) if letter <= "J"}
    if named := {letter.upper() for letter in _NAMED_CHOICE.findall(text)}:
        return named.pop() if len(named | letters) == 1 else None
    if len(letters) != 1:
        return None
    before = next(plain[: match.start()] for match in _LETTER.finditer(plain) if match.group(1) in letters)
    word = re.search(r"([\w']+) ?\Z", before)
    return letters.pop() if word is None or word.group(1).casefold() in _SAID_OF else None


def _number_in(text: str) -> Number | None:
    """The last number of a running text, the first of "5 of the 12"; None where several are offered as options."""
    text = re.sub(rf"\b{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?,? (?=\d{{4}}\b)", "", text, flags=re.IGNORECASE)
    tokens = list(_TOKEN.finditer(text))
    if not tokens:
        return None
    for one, other in pairwise(tokens):
        if one.group() != other.group() and _joins_options(text[one.end() : other.start()]):
            return None
    chosen = tokens[-1]
    if len(tokens) == 2 and re.fullmatch(r" (?:out )?of(?: the| all)? ", text[tokens[0].end() : chosen.start()]):
        chosen = tokens[0]
    number = read_number(chosen.group())
    percent = text[chosen.end() :].lstrip().startswith("%")
    return None if number is None else Number(number.value, percent)


def _joins_options(between: str) -> bool:
    """True if what stands between two numbers makes options of them: a comma, a slash, "or", nothing, another box."""
    bare = _MARKUP.sub("", between)
    joined = _JOINT.match(between) or (bare.strip() and _JOINT.match(bare)) or _ALTERNATIVE.search(bare)
    return bool(joined) or "\\boxed" in between


def _same_number(one: Number, other: Number) -> bool:
    if abs(one.value - other.value) <= TOLERANCE:
        return True
    if one.is_percent == other.is_percent:
        return False
    scaled = [n.value / 100 if n.is_percent else n.value for n in (one, other)]
    return abs(scaled[0] - scaled[1]) <= TOLERANCE


def _clock(text: str) -> tuple[int, ...] | None:
    match = _CLOCK.match(text)
    return tuple(int(part or 0) for part in match.groups()) if match else None


# ------------------------------------------------------------------------------------------------ scoring
def is_copied(answer: str, question: str) -> bool:
    """True if an answer repeats the whole question (20 characters or more), which names every option that it lists."""
    asked = normalise(question).casefold()
    return len(asked) >= 20 and asked in normalise(answer).casefold()


def rule_score(
    answer: str | None,
    ground_truth: str | Sequence[str],
    question: str = "",
    *,
    symbolic: Callable[[str, str], bool] | None = None,
) -> AnswerScore:
    """Score an answer by rule.

    Args:
        answer: from `markup.final_answer`; None, an empty one or a copy of the question is wrong.
        ground_truth: the right answer, or several of which any is right.
        question: the bare question.
        symbolic: decides on what the rules refuse, given normalised answer and ground truth: a
            `symbolic.SymbolicComparer`.
    """
    if not answer or is_copied(answer, question):
        return AnswerScore(0.0, answer)
    accepted = [ground_truth] if isinstance(ground_truth, str) else ground_truth
    correct = any(are_answers_equivalent(answer, truth) for truth in accepted)
    if not correct and symbolic is not None and len(answer) <= MAX_ANSWER_CHARS:
        correct = any(symbolic(normalise(answer), normalise(truth)) for truth in accepted)
    return AnswerScore(float(correct), answer)
