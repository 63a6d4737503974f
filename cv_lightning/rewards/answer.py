"""Rule stage of answer scoring: whether an answer says the same as the ground truth.

Pure functions of text. They agree with golden/answers except for its questionable cases, which docs/rewards.md lists.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from cv_lightning.rewards.answer_choice import read_choice, read_options, read_truth
from cv_lightning.rewards.answer_quantity import same_quantity, says_quantity, whole_quantity
from cv_lightning.rewards.answer_text import (
    CACHED,
    REPLACEMENT,
    any_case,
    claims,
    normalise,
    says_text,
    text_key,
    without_frame,
)
from cv_lightning.rewards.answer_time import read_dates, says_clock, says_date, whole_clock, whole_date

__all__ = ["AnswerScore", "are_answers_equivalent", "is_copied", "normalise", "rule_score"]

MAX_ANSWER_CHARS = 300
"""A longer answer is only compared as a whole."""


class AnswerScore(NamedTuple):
    """Verdict on an answer."""

    value: float
    """In [0, 1]; correct above 0.5."""
    answer: str | None
    scored_by: Literal["rule", "judge"] = "rule"


# ------------------------------------------------------------------------------------------------ equivalence
def are_answers_equivalent(prediction: object, ground_truth: object, question: str = "") -> bool:
    """True if an answer says the same as the ground truth, by rule.

    The kind of the ground truth decides how the answer is read: an option (one letter, or a text that the question
    lists), a date, a time of day, a quantity, a list, yes or no, else a text. docs/rewards.md has the rules of each.

    Args:
        prediction: The answer; anything but a text is wrong.
        ground_truth: The right answer; nothing equals one that is not a text.
        question: The bare question; with its options an answer can name an option by its text.
    """
    if not isinstance(prediction, str) or not isinstance(ground_truth, str):
        return False
    if REPLACEMENT in prediction and REPLACEMENT not in ground_truth:
        return False  # cut within a character, so the answer is not known
    said, truth = normalise(prediction), normalise(ground_truth)
    if said.casefold() == truth.casefold():
        return True
    if not said or not truth or len(said) > MAX_ANSWER_CHARS + len(truth):
        return False
    options = read_options(question)
    choice = read_truth(truth, options)
    if choice is None:
        return _says(said, truth)
    by_line = normalise(re.sub(r"(?<=\w)\s*\n\s*(?=\w)", ". ", prediction))  # a letter alone on a line is a choice
    letter = read_choice(by_line, options, _is_same_value)
    if letter is None and not options and choice.text:
        return says_text(said, choice.text)
    return letter == choice.letter


def _says(said: str, truth: str) -> bool:
    """True if an answer says a ground truth that is not an option; both are normalised."""
    if (date := whole_date(truth)) is not None:
        return says_date(said, date) or says_text(said, truth)
    if (clock := whole_clock(truth)) is not None:
        return says_clock(said, clock)
    if _VERDICT.fullmatch(truth):
        return _says_verdict(said, truth)
    if re.fullmatch(r"\d{4}", truth) and len(dates := read_dates(said)) == 1:
        return str(dates[0].year) == truth
    if _is_digit_groups(truth) and _is_digit_groups(said):
        return re.sub(r"\D", "", said) == re.sub(r"\D", "", truth)
    if _RATIO.fullmatch(truth):
        return re.sub(r"\s*(?::|\bto\b)\s*", ":", without_frame(claims(said))) == re.sub(r"\s", "", truth)
    if (verdict := says_quantity(said, truth)) is not None:
        return verdict
    if (items := read_items(truth)) is not None and _says_items(said, *items):
        return True
    return says_text(said, truth)


def _is_same_value(said: str, option: str) -> bool:
    """True if a statement asserts an option that is a quantity, date, time of day, list, yes or no."""
    is_value = whole_date(option) or whole_clock(option) or whole_quantity(option) or read_items(option)
    return bool(is_value or _VERDICT.fullmatch(option)) and _says(said, option)


_RATIO = re.compile(r"\d+(?:\s?:\s?\d+)+")
_VERDICT = any_case(r"yes|no|true|false")
_VERDICTS = {
    "yes": "yes", "yeah": "yes", "yep": "yes", "yup": "yes", "no": "no", "nope": "no", "nah": "no",
    "true": "true", "false": "false",
}  # fmt: skip


def _says_verdict(said: str, truth: str) -> bool:
    """True if an answer begins with or asserts the given one of yes, no, true, false, and not its opposite too."""
    wanted = truth.casefold()
    words = {_VERDICTS[word] for word in re.findall(r"[a-z]+", said.casefold()) if word in _VERDICTS}
    asserted = without_frame(claims(said)).casefold()
    first = re.match(r"\W*([a-z]+)(?=\Z|[\s.,;:!])(?!\s+(?:or|and|not)\b)", asserted)
    if first is None or _VERDICTS.get(first[1]) != wanted:
        return False
    opposite = {"yes": "no", "no": "yes", "true": "false", "false": "true"}[wanted]
    rest = asserted[first.end() :]
    is_no_noun = wanted == "no" and re.match(r"\s+(?!(?:it|he|she|they|there|this|that|i)\b)\w", rest) is not None
    return opposite not in words and not is_no_noun


def _is_digit_groups(text: str) -> bool:
    """True for a telephone number or similar: groups of digits, at least seven in all, with blanks, dots or hyphens."""
    is_grouped = re.fullmatch(r"\+?\(?\d+\)?(?:[ .-]+\(?\d+\)?)+", text) is not None
    is_number = re.fullmatch(r"\d{1,3}(?: \d{3})+|\d+\.\d+", text) is not None
    return is_grouped and not is_number and len(re.sub(r"\D", "", text)) >= 7


_SEPARATOR = re.compile(r"\s*[,;]\s*(?:and\s+)?|\s+and\s+|\s*&\s*")


@lru_cache(maxsize=CACHED)
def read_items(text: str) -> tuple[tuple[str, ...], bool] | None:
    """Items of a text that is a list, and whether their order counts; None for any other text.

    A list has commas, semicolons or "and" between its items, and may stand in brackets. Letters and items joined by
    "and" have no order.
    """
    inner = re.sub(r"\A[\[({]\s*(.*?)\s*[\])}]\Z", r"\1", text)
    items = tuple(item.strip(" '\"()[]") for item in _SEPARATOR.split(inner))
    if len(items) < 2 or not all(items):
        return None
    are_letters = all(len(item) == 1 and item.isalpha() for item in items)
    return items, not are_letters and " and " not in f" {inner} "


def _says_items(said: str, items: Sequence[str], is_ordered: bool) -> bool:
    """True if an answer is a list of the same items."""
    for form in dict.fromkeys((said, without_frame(said), without_frame(claims(said)))):
        found = read_items(form)
        if found is None or len(found[0]) != len(items):
            continue
        given = found[0]
        if all(map(_is_same_item, given, items)) or (
            not is_ordered and all(any(_is_same_item(one, other) for one in given) for other in items)
        ):
            return True
    return False


def _is_same_item(said: str, truth: str) -> bool:
    if said.casefold() == truth.casefold():
        return True
    wanted, given = whole_quantity(truth), whole_quantity(said)
    if wanted is not None:
        return given is not None and same_quantity(given, wanted, said)
    return text_key(said) == text_key(truth)


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
        answer: From `markup.final_answer`; None, an empty one or a copy of the question is wrong.
        ground_truth: The right answer, or several of which any is right.
        question: The bare question.
        symbolic: Compares normalised answer and ground truth where the rules say no: a `symbolic.SymbolicComparer`.
    """
    if not answer or is_copied(answer, question):
        return AnswerScore(0.0, answer)
    accepted = [ground_truth] if isinstance(ground_truth, str) else ground_truth
    correct = any(are_answers_equivalent(answer, truth, question) for truth in accepted)
    if not correct and symbolic is not None and len(answer) <= MAX_ANSWER_CHARS and REPLACEMENT not in answer:
        pairs = [(normalise(answer), normalise(truth)) for truth in accepted]
        # the rules alone decide on plain quantities: a computer algebra system would accept 007 for 7
        correct = any(symbolic(*pair) for pair in pairs if not all(whole_quantity(text) for text in pair))
    return AnswerScore(float(correct), answer)
