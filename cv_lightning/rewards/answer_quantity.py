"""Quantities in answers: the one that a statement asserts, and whether two say the same. Pure functions of text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

from cv_lightning.rewards.answer_numerals import (
    BEFORE,
    BELOW_ZERO,
    LESS,
    LESS_AFTER,
    MAX_QUANTITIES,
    MORE,
    MORE_AFTER,
    OTHER_THAN,
    Quantity,
    scan,
    sign_and_money,
)
from cv_lightning.rewards.answer_text import CACHED, any_case, claims, plain, without_frame
from cv_lightning.rewards.answer_time import MONTHS
from cv_lightning.rewards.answer_units import digits_for_words, ordinal, singular

TOLERANCE = Fraction(1, 10_000)
"""Largest difference of two numbers that are the same, absolute and relative to the right one."""


def _in_one_unit(said: Quantity, truth: Quantity, said_text: str) -> tuple[Fraction, Fraction] | None:
    """Both values in the same unit; None if the units contradict each other. Without a unit, the other's is meant."""
    one, other = said.unit, truth.unit
    if (said.is_percent and other) or (truth.is_percent and one and one.is_known):
        return None
    if one is None or other is None:
        return said.value, truth.value
    if other.is_known:
        if one == other:
            return said.value, truth.value
        if one.kind == other.kind and one.is_known:
            return said.value * one.factor, truth.value * other.factor
        kinds = {one.kind, other.kind}
        if kinds <= {"temperature C", "angle"} or kinds <= {"temperature F", "angle"}:
            return said.value, truth.value
        if kinds == {"mass", "currency gbp"} and "pound" in said_text.casefold():
            return said.value, truth.value
        return None
    counted = {singular(word) for word in re.findall(r"[A-Za-z']+", said_text[said.end :])}
    return (said.value, truth.value) if other.kind in counted else None


def same_quantity(said: Quantity, truth: Quantity, said_text: str = "") -> bool:
    """True if two quantities say the same: value, comparison and, where both have one, unit.

    A value may differ by `TOLERANCE`, absolute and relative, if both are the same when rounded to the decimals that
    both have: 3.00005 for 3, but not 600.0019 for 600.0018, 0.00005 for 0 or one integer for another. Percentages and
    fractions are converted.
    """
    if said.comparison != truth.comparison or said.digits != truth.digits:
        return False
    values = _in_one_unit(said, truth, said_text)
    if values is None:
        return False
    pairs = [values]
    if said.is_percent != truth.is_percent:
        pairs.append((values[0] / (100 if said.is_percent else 1), values[1] / (100 if truth.is_percent else 1)))
    if said.alternative is not None:
        pairs.append((said.alternative, truth.value))
    decimals = [each.decimals for each in (said, truth) if each.decimals is not None]
    if said.is_percent != truth.is_percent or (said.unit and truth.unit and said.unit.factor != truth.unit.factor):
        decimals = []
    return any(_same_value(one, other, min(decimals, default=None)) for one, other in pairs)


def _same_value(one: Fraction, other: Fraction, decimals: int | None) -> bool:
    if one == other:
        return True
    if abs(one - other) > TOLERANCE * min(Fraction(1), abs(other)):
        return False
    return decimals is None or round(one, decimals) == round(other, decimals)


# ------------------------------------------------------------------------------------------------ statements
def read_text(text: str) -> str:
    """A normalised text for the quantity grammar: without LaTeX, number words as digits."""
    return digits_for_words(plain(text))


_FILLER = any_case(
    r"\s*(?:[~=:$#]|about|around|approximately|approx\.?|roughly|exactly|only|just|circa|ca\.|a total of)*\s*"
)
_WHOLE_TAIL = re.compile(r"[\s.!?,;)\]]*\Z")


@lru_cache(maxsize=CACHED)
def whole_quantity(text: str) -> Quantity | None:
    """The quantity that a whole normalised text is, with its unit; None if it says anything else.

    An unknown unit is a noun in lower case ("14 boats"), so that names ("12 Angry Men") stay texts.
    """
    if (number := ordinal(plain(text))) is not None:
        return Quantity(Fraction(number))
    if re.fullmatch(r"none|nil|zero", text, re.IGNORECASE):
        return Quantity(Fraction(0))
    text = read_text(text).strip("()[] ")
    found = scan(text)
    if len(found) != 1:
        return None
    quantity = found[0]
    tail = text[quantity.value_end :]
    if quantity.comparison:
        tail = MORE_AFTER.sub("", LESS_AFTER.sub("", tail, count=1), count=1)
    if BELOW_ZERO.match(text[quantity.end :]):
        tail = ""
    if not _WHOLE_TAIL.match(tail) or quantity.is_rejected:
        return None
    if quantity.unit is not None and not quantity.unit.is_known:
        nouns = text[quantity.end : quantity.value_end].split()
        if len(nouns) > 3 or any(word != word.lower() for word in nouns):
            return None
    before, _, _ = sign_and_money(text[: quantity.start][-2 * BEFORE :])
    for pattern in (MORE, LESS, OTHER_THAN):
        before = pattern.sub("", before)
    return quantity if _FILLER.fullmatch(before) else None


_JOINT = any_case(
    r"\s*(?:[,;/|&+*^\u00d7x~]|\u00b1|-+|\.\.+|\\+|or|and|to|through|till|versus|vs\.?|plus|minus|times"
    r"|,? ?(?:or|and)(?: (?:maybe|possibly|perhaps|even|rather))?|\$|\)\s*\()?\s*\Z"
)
_MARKUP = re.compile(r"\\boxed|[{}()\[\]$*`\"']")
_ALTERNATIVE = any_case(r"\bor\b|\b(?:maybe|possibly|perhaps|alternatively)\b|\?\s*\Z")
_OPERATOR = any_case(r"\s*(?:[+*\u00d7x/^-]|plus|minus|times|divided by|multiplied by)\s*\Z")
_EQUALS = any_case(r"(?<![<>!=])=(?!=)|\b(?:is|equals?|makes?|gives?)\b")
_CONCLUDES = any_case(
    r"\b(?:answer|total(?:s|ling|ing)?|sum|result|altogether|in all|overall|finally|i\.?e\.?|makes?|gives?"
    r"|equals?)\b|[,;.:)]\s*(?:and )?(?:so|thus|therefore|hence)\b"
)
_OF = any_case(r" (?:[a-z]+ ){0,2}(?:out )?of(?: the| these| those| all| a total of)* \Z")


@lru_cache(maxsize=CACHED)
def stated_quantity(text: str) -> tuple[Quantity, str] | None:
    """The one quantity that a normalised statement asserts, and the text it was read from; None if none or several.

    Rejected ones do not count ("not 5 but 6" gives 6), labels and years only where nothing else is named ("Table 3:
    42" gives 42). Numbers side by side, as a list, a range or with "or", are not an answer.
    """
    for candidate in dict.fromkeys((claims(text), text)):
        whole = read_text(candidate).replace("...", " ")
        read = _MONTH_DAY.sub("", whole)  # "May 1, 2024" names 2024 and no 1
        if quantity := _one_of(scan(read), read):
            return quantity, read
        if scan(whole):
            return None
    return None


def _one_of(found: Sequence[Quantity], text: str) -> Quantity | None:
    if len(found) > MAX_QUANTITIES:
        return None
    kept = [each for each in found if not each.is_rejected]
    if not kept or (len(kept) < len(found) and len(kept) > 1):
        return kept[0] if kept and len({each.value for each in kept}) == 1 else None
    if len(kept) == 1:
        return kept[0] if _is_alone(kept[0], text) else None
    if part := _part_of(kept, text):
        return part
    kept = _equated(kept, text)
    if kept and len({(each.value, each.comparison) for each in kept}) == 1:
        return kept[0]
    unlabelled = [each for each in kept if not each.label]
    if concluded := _concluded(unlabelled or kept, text) or _outside_parentheses(unlabelled, text):
        return concluded
    for one, other in pairwise(kept):
        between = {text[one.end : other.start], text[min(one.value_end, other.start) : other.start]}
        if one.value != other.value and any(map(_joins_options, between)):
            return None
    return unlabelled[0] if len({each.value for each in unlabelled}) == 1 else None


def _concluded(found: list[Quantity], text: str) -> Quantity | None:
    """The last quantity where the words before it conclude: "3 cats and 2 dogs, so 5 animals"."""
    if len(found) < 2:
        return None
    between = text[found[-2].end : found[-1].start]
    return found[-1] if _CONCLUDES.search(between) and not _ALTERNATIVE.search(between) else None


def _is_alone(quantity: Quantity, text: str) -> bool:
    """False if unread digits stand beside a quantity: 2-4, 1.2.3, 5:6, 3D."""
    rest = text[: quantity.start] + " " + text[quantity.value_end :]
    return not re.search(r"(?<![A-Za-z\d^_])(?<![A-Za-z]-)\d+(?:[.,:/]\d+)+", rest)


def _part_of(found: list[Quantity], text: str) -> Quantity | None:
    """5 of "5 of the 12 boats", which is also 5/12."""
    if len(found) != 2 or not _OF.search(text[found[0].end : found[1].start]) or found[1].value == 0:
        return None
    return replace(found[0], alternative=found[0].value / found[1].value)


def _equated(found: list[Quantity], text: str) -> list[Quantity]:
    """What an equation asserts: the value of a calculation (40 + 2 = 42), nothing of "1 = 2"."""
    for at, (one, other) in enumerate(pairwise(found)):
        between = text[one.value_end if one.value_end <= other.start else one.end : other.start]
        if not _EQUALS.search(between):
            continue
        is_sign = "=" in between
        left = [_OPERATOR.search(text[a.end : b.start]) for a, b in pairwise(found[: at + 1])]
        right = [_OPERATOR.search(text[a.end : b.start]) for a, b in pairwise(found[at + 1 :])]
        if left and all(left):
            return found[at + 1 :]
        if is_sign and right and all(right):
            return found[: at + 1]
        if is_sign and re.fullmatch(r"\s*=\s*", between):
            return found if one.value == other.value else []
    return found


def _outside_parentheses(found: list[Quantity], text: str) -> Quantity | None:
    """The one quantity before parentheses that explain it: 5 (3 red and 2 blue)."""
    match = re.search(r"[(\[]([^()\[\]]*[A-Za-z+][^()\[\]]*)[)\]]\s*[.!]?\Z", text)
    if match is None:
        return None
    outside = [each for each in found if each.start < match.start()]
    if len({each.value for each in outside}) != 1 or re.search(r"\bor\b", text[outside[0].end :], re.IGNORECASE):
        return None
    return outside[0]


def _joins_options(between: str) -> bool:
    """True if the text between two numbers makes them options: a comma, a slash, "or", nothing, another box."""
    bare = _MARKUP.sub("", between)
    joined = _JOINT.match(between) or (bare.strip() and _JOINT.match(bare)) or _ALTERNATIVE.search(bare)
    return bool(joined) or "\\boxed" in between


_MONTH = f"(?:{'|'.join(name.capitalize() for name in MONTHS)})" + r"\b\.?"
_MONTH_DAY = re.compile(
    rf"\b{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?(?!\d),?|(?<!\d)\d{{1,2}}(?:st|nd|rd|th)?(?: of)? {_MONTH},?"
)


def says_quantity(said: str, truth: str) -> bool | None:
    """True if a normalised statement asserts the quantity that the truth is; None if the truth is not a quantity."""
    wanted = whole_quantity(truth)
    if wanted is None:
        return None
    for form in dict.fromkeys((said, without_frame(claims(said)))):
        whole = whole_quantity(form)
        if whole is not None and same_quantity(whole, wanted, read_text(form).strip("()[] ")):
            return True
    stated = stated_quantity(said)
    return stated is not None and same_quantity(stated[0], wanted, stated[1])
