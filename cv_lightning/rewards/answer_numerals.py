r"""Numbers in the text of an answer.

A quantity is read with everything that changes its value or meaning: sign words, comparisons, scale words, percent,
unit, rejection ("not 3", "5 is wrong"). Values are exact fractions; digits that identify something (007, 041512) are
compared as written. Pure functions of text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from cv_lightning.rewards.answer_text import CACHED, any_case
from cv_lightning.rewards.answer_units import (
    CURRENCY_SIGNS,
    FUNCTION_WORDS,
    LETTER_SCALES,
    SCALES,
    SYMBOLS,
    WORDS,
    Unit,
    singular,
)

MAX_DIGITS = 60
"""A longer numeral is not read as a number."""
MAX_QUANTITIES = 16
"""In a text with more numbers, none counts as asserted."""
BEFORE, BEHIND = 60, 80
"""Characters around a numeral that can change its meaning."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number as it is meant."""

    value: Fraction
    decimals: int | None = 0
    """Digits behind the decimal point; None for fractions and powers, which are exact."""
    is_percent: bool = False
    unit: Unit | None = None
    comparison: str = ""
    """`<`, `>`, `!=` or nothing."""
    is_rejected: bool = False
    digits: str = ""
    """The numeral itself where its digits identify something: a leading zero."""
    start: int = 0
    end: int = 0
    """End of the numeral in the text."""
    value_end: int = 0
    """End of the numeral with its scale and unit."""
    label: str = ""
    """The word before it that makes it a label: Table 3, in 2020."""
    alternative: Fraction | None = None
    """Second reading of the numeral: 5/12 of "5 out of 12"."""


# ------------------------------------------------------------------------------------------------ numerals
_GROUPED = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|[1-9]\d?(?:,\d\d)+,\d{3}(?:\.\d+)?"
_EUROPEAN = r"\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}(?![.\d])"
_SPACED = r"[1-9]\d{0,2}(?: \d{3})+(?:[.,]\d+)?(?! ?\d)|[1-9]\d{0,2}(?:'\d{3})+(?:\.\d+)?"
_COMMA = r"\d+,\d+"
_POINT = r"\d+\.\d+|\.\d+|\d+\.?(?!\d)"
_FRACTION = r"(?:(?P<whole>\d{1,15}) )?(?P<over>\d{1,15}) ?/ ?(?P<under>\d{1,15})(?! ?/ ?\d)"
_POWER = (
    r"(?:(?P<mantissa>\d+(?:\.\d+)?) ?(?:x|\u00d7|\*) ?)?(?P<base>\d{1,6}(?:\.\d{1,6})?) ?(?:\^"
    r"|\*\*) ?[({]?(?P<exponent>[+-]?\d{1,3})[)}]?"
)
_NUMERAL = re.compile(
    rf"(?<![A-Za-z\u00c0-\u024f_\d^])(?<![A-Za-z]-)(?<!\d[.:/])(?<!\d,)(?:{_POWER}|{_FRACTION}"
    rf"|(?P<plain>{_GROUPED}|{_EUROPEAN}|{_SPACED}|{_COMMA}|{_POINT})(?:[eE](?P<e>[+-]?\d{{1,3}}))?)"
)
_NOT_A_NUMBER = re.compile(r"\d|-[A-Z](?![a-z])|[.,:/^]\d|-\d+-\d|_|#")
_ORDINAL_SUFFIX = any_case(r"(?:st|nd|rd|th)\b")
_SQUARED = any_case(r" squared\b| cubed\b")

# ------------------------------------------------------------------------------------------------ context
_SIGN_WORD = any_case(r"\b(?:minus|negative|neg\.?)\s*\Z")
_PLUS_WORD = any_case(r"\b(?:plus|positive)\s*\Z")
_SIGN = re.compile(r"(?:\A|(?<=[\s(\[{=:,;<>~$\u20ac\u00a3\u00a5\"'*|\u4e00-\u9fff]))([+-])\s?\Z")
_MONEY = re.compile(r"(US\$|[" + re.escape(CURRENCY_SIGNS) + r"]|\b(?:USD|EUR|GBP|JPY|CNY|RMB|INR|KRW|Rs\.?))\s*\Z")
_APPROXIMATE = any_case(
    r"(?:[~=:]|\b(?:about|around|approximately|approx\.?|roughly|circa|ca\.|some|exactly|only|just|precisely"
    r"|total of|equal to|equals|is|are|the|a|number|value)\b)\s*\Z"
)
MORE = any_case(
    r"(?:>=?|\u2265|\b(?:more|greater|larger|bigger|higher|longer|older|taller|further|farther"
    r"|better) than(?: or equal to)?|\bover|\babove|\bat (?:the )?(?:very )?least|\bno (?:less|fewer) than"
    r"|\bnot (?:less|fewer) than|\bexceed(?:s|ing)?|\bbeyond|\bupwards? of|\bin excess of|\bjust over"
    r"|\ba minimum of|\bminimum(?: of)?|\bmin\.?|\bas (?:many|much) as|\bstarting (?:at|from)"
    r"|\bonwards from)\s*\Z"
)
LESS = any_case(
    r"(?:<=?|\u2264|\b(?:less|fewer|smaller|lower|shorter|younger|nearer|worse) than(?: or equal to)?|\bunder"
    r"|\bbelow|\bat (?:the )?(?:very )?most|\b(?:no|not) (?:more|greater|larger) than|\bup to|\bjust under"
    r"|\bshort of|\ba maximum of|\bmaximum(?: of)?|\bmax\.?|\balmost|\bnearly|\bclose to|\bapproaching"
    r"|\bnot quite|\bbarely|\bhardly|\bscarcely)\s*\Z"
)
OTHER_THAN = any_case(
    r"(?:!=|\u2260|<>|\u00b1|\+ ?/? ?-|--|-\+|\b(?:other than|different from|than|except(?: for)?|excluding"
    r"|(?:any|every)(?:thing|one)? but|all but|besides|without|neither|nor|unlike))\s*\Z"
)
_YEAR_COMPARED = any_case(r"\b(?:(before|prior to|until|earlier than)|(after|later than|since))\s*(?:the year )?\Z")
_REJECTED_BEFORE = any_case(
    r"(?:\b(?:not|never|cannot|neither|nor|doubt)|n't)(?!\s+only)(?:\s+[A-Za-z']+){0,3}\s*\Z"
    r"|\b(?:is|are|was|were|has|have|see|with) no\s*\Z"
)
_REJECTED_AFTER = any_case(
    r"\s*(?:(?:is|was|are|were|seems?|looks?|would be)\s+(?:[a-z]+ly\s+)?(?:not|wrong|incorrect|false"
    r"|impossible|unlikely|too\b|ruled out|out of the question)\b|(?:not included|excluded)\b"
    r"|(?:isn't|aren't|wasn't|can't|cannot|doesn't|won't)\b|\((?:wrong|incorrect|no|false)\))"
)
MORE_AFTER = any_case(
    r"\s*(?:\+(?!\s*\d)|(?:or|and|&)\s+(?:more|above|over|up|higher|greater|larger|older|longer|upwards)\b"
    r"|plus\b(?!\s*[\d-])|(?:at )?(?:the )?(?:very )?(?:least|minimum)\b|upwards\b|onwards\b)"
)
LESS_AFTER = any_case(
    r"\s*(?:(?:or|and|&)\s+(?:less|fewer|below|under|lower|smaller|younger|shorter)\b"
    r"|(?:at )?(?:the )?(?:very )?(?:most|maximum)\b)"
)
BELOW_ZERO = any_case(r"\s*(?:\u00b0 ?[CF]?|degrees?(?: celsius| fahrenheit)?)?\s*below (?:zero|0|freezing)\b")
_LABEL = any_case(
    r"\b(room|table|figure|fig\.?|page|line|row|column|chapter|section|step|question|image|picture|number"
    r"|no\.?|item|option|panel|part|point|level|floor|gate|bus|route|platform|in|year|since|until|by|of"
    r"|#)\s*\Z|#\s*\Z"
)
_CLAUSE = any_case(r"[,;.!?](?:\s|\Z)|\bbut\b")


@lru_cache(maxsize=CACHED)
def scan(text: str) -> tuple[Quantity, ...]:
    """Quantities of a plain text, in order; at most one more than `MAX_QUANTITIES`."""
    found: list[Quantity] = []
    position = 0
    while (match := _NUMERAL.search(text, position)) and len(found) <= MAX_QUANTITIES:
        position = match.end()
        if quantity := _read(match, text):
            found.append(quantity)
            if BELOW_ZERO.match(text[quantity.end :]):
                position = quantity.value_end
    return tuple(found)


def _read(match: re.Match[str], text: str) -> Quantity | None:
    """The quantity that begins with a numeral; None for digits of something else: H2O, 1.2.3, 12abc, 3D."""
    numeral = _numeral(match)
    end = match.end()
    if match[0].endswith(".") and match["plain"]:
        end -= 1
    rest = text[end : end + BEHIND]
    if numeral is None or _NOT_A_NUMBER.match(rest):
        return None
    value, decimals, digits = numeral
    before = text[max(0, match.start() - BEFORE) : match.start()]
    before, negative, money = sign_and_money(before)
    value, scaled = _scale(value, rest, is_money=money is not None)
    rest = rest[scaled:]
    if scaled:
        decimals, digits = None, ""
    if re.match(r"s\b", rest) and re.fullmatch(r"\d{3}0", match[0]):
        return None  # the 1990s
    if suffix := _ORDINAL_SUFFIX.match(rest):
        rest = rest[suffix.end() :]
    if power := _SQUARED.match(rest):
        value, rest = value ** (2 if "sq" in power[0] else 3), rest[power.end() :]
    unit, used = read_unit(rest)
    if used == 0 and rest[:1].isascii() and rest[:1].isalpha():
        return None  # 12abc
    if below := BELOW_ZERO.match(rest):
        negative, used = True, below.end()
        unit = unit if unit is None or unit.is_known else None
    is_percent = unit is not None and unit.kind == "percent"
    after = rest[used:]
    outside = rest if unit is not None and not unit.is_known else after
    return Quantity(
        value=-value if negative else value,
        decimals=decimals,
        is_percent=is_percent,
        unit=money or (None if is_percent else unit),
        comparison=_comparison(before, after, rest, value if decimals == 0 else None),
        is_rejected=_is_rejected(before, outside),
        digits=digits,
        start=match.start(),
        end=end,
        value_end=min(len(text), end + BEHIND) - len(after),
        label=_label(before),
    )


def _numeral(match: re.Match[str]) -> tuple[Fraction, int | None, str] | None:
    """Value, decimals and identifying digits of a numeral."""
    if len(match[0]) > MAX_DIGITS:
        return None
    if match["base"]:
        exponent = int(match["exponent"])
        if abs(exponent) > 100 or Fraction(match["base"]) == 0:
            return None
        return Fraction(match["mantissa"] or 1) * Fraction(match["base"]) ** exponent, None, ""
    if match["under"]:
        if int(match["under"]) == 0:
            return None
        return Fraction(match["whole"] or 0) + Fraction(int(match["over"]), int(match["under"])), None, ""
    text, point = _decimal_text(match["plain"])
    if text.count(".") > 1:  # 0,000,000
        return None
    if match["e"]:
        if abs(int(match["e"])) > 400:
            return None
        return Fraction(text) * Fraction(10) ** int(match["e"]), None, ""
    identifies = len(text) > 1 and text[0] == "0" and not point
    return Fraction(text), point, text if identifies else ""


def _decimal_text(numeral: str) -> tuple[str, int]:
    """A numeral with a decimal point and without grouping, and the number of its decimals."""
    numeral = numeral.rstrip(".")
    for pattern, grouping, point in ((_GROUPED, ",", "."), (_EUROPEAN, ".", ","), (_SPACED, " '", ".")):
        if re.fullmatch(pattern, numeral) and not (pattern == _GROUPED and numeral[0] == "0"):
            numeral = re.sub(f"[{re.escape(grouping)}]", "", numeral).replace(point, ".")
            break
    numeral = numeral.replace(",", ".")
    numeral = f"0{numeral}" if numeral.startswith(".") else numeral
    return numeral, len(numeral.partition(".")[2])


def sign_and_money(before: str) -> tuple[str, bool, Unit | None]:
    """Text before sign and currency of a numeral, whether it is negative, and the currency."""
    money: Unit | None = None
    negative = False
    for _ in range(3 if before and not before.isspace() else 0):
        if match := _SIGN_WORD.search(before):
            negative, before = True, before[: match.start()]
        elif match := _PLUS_WORD.search(before):
            if re.search(r"\d\s*\Z", before[: match.start()]):
                break
            before = before[: match.start()]
        elif money is None and (match := _MONEY.search(before)):
            money, before = SYMBOLS[match[1]], before[: match.start()]
        elif (match := _SIGN.search(before)) and not re.search(r"\d\s*\Z", before[: match.start(1)]):
            negative, before = negative or match[1] == "-", before[: match.start(1)]
        else:
            break
    return before, negative, money


def _scale(value: Fraction, rest: str, *, is_money: bool) -> tuple[Fraction, int]:
    """The value times the scale words after it, and the length of these in the text."""
    used = 0
    while match := re.match(r"\s*-?([A-Za-z]+)\b", rest[used:]):
        word = match[1]
        attached = match[0] == word
        if word.casefold() in SCALES:
            value *= SCALES[word.casefold()]
        elif used == 0 and word in LETTER_SCALES and (attached or word == "k" or is_money):
            value *= 10 ** LETTER_SCALES[word]
        elif used == 0 and is_money and word in ("m", "b"):
            value *= 10 ** (6 if word == "m" else 9)
        else:
            break
        used += match.end()
        if word.casefold() not in SCALES:
            break
    return value, used


def _comparison(before: str, after: str, rest: str, whole: Fraction | None) -> str:
    """How a quantity is compared ("more than 3" is not 3): `>`, `<`, `!=` or empty."""
    left = before
    for _ in range(4 if before and not before.isspace() else 0):
        if MORE.search(left):
            return ">"
        if LESS.search(left):
            return "<"
        if OTHER_THAN.search(left):
            return "!="
        match = _APPROXIMATE.search(left)
        if match is None:
            break
        left = left[: match.start()]
    if whole is not None and 1000 <= whole <= 2999 and (match := _YEAR_COMPARED.search(before)):
        return "<" if match[1] else ">"
    for text in dict.fromkeys((rest, after)) if rest else ():
        if MORE_AFTER.match(text):
            return ">"
        if LESS_AFTER.match(text):
            return "<"
    return ""


def _is_rejected(before: str, after: str) -> bool:
    clause = _CLAUSE.split(before)[-1]
    return _REJECTED_BEFORE.search(clause) is not None or _REJECTED_AFTER.match(after) is not None


def _label(before: str) -> str:
    match = _LABEL.search(before)
    return "" if match is None else (match[1] or "#").casefold()


# ------------------------------------------------------------------------------------------------ units
_SYMBOL = re.compile(
    r"\s*-?(\u00b0 ?[CF]\b|\u00b0|%|[A-Za-z\u03bc]+(?:\^?[23](?!\d))?(?:/[a-z]+)?|["
    + re.escape(CURRENCY_SIGNS)
    + "\u5143\u5186]|['\"](?=\\s|\\Z|\\d))"
)
_NOUN = re.compile(r"\s*-?([A-Za-z][A-Za-z'-]*)")
_QUOTES = {"'": "ft", '"': "in"}


def read_unit(text: str) -> tuple[Unit | None, int]:
    """Unit at the start of a text, and its length there.

    A known unit by its longest name; else the nouns up to the first function word ("red cars on the left" gives the
    unit "car"). (None, 0) without either.
    """
    words = re.match(r"\s*-?((?:[A-Za-z]+\.?[ ]?){1,3})", text)
    parts = words[1].split() if words else []
    for count in range(min(3, len(parts)), 0, -1):
        *first, last = " ".join(parts[:count]).casefold().rstrip(".").split()
        unit = WORDS.get(" ".join([*first, last])) or WORDS.get(" ".join([*first, singular(last)]))
        if unit is not None:
            at = text.index(parts[count - 1], text.index(parts[0]))
            return unit, at + len(parts[count - 1].rstrip("."))
    if symbol := _SYMBOL.match(text):
        name = _QUOTES.get(symbol[1], symbol[1].replace("\u00b0 ", "\u00b0"))
        if name == "%":
            return Unit("percent", Fraction(1)), symbol.end()
        if name in ("C", "F") and text[:1].isspace():
            name = f"\u00b0{name}"
        spaced_word = name in ("in", "a", "h", "d", "t", "x", "K", "B", "ha") and text[:1].isspace()
        if name in SYMBOLS and not (spaced_word and re.match(r"\s*[A-Za-z\d]", text[symbol.end() :])):
            return SYMBOLS[name], symbol.end()
    nouns: list[str] = []
    position = 0
    while (match := _NOUN.match(text, position)) and len(nouns) < 4:
        if position == 0 and match[0] == match[1]:
            break  # attached letters are not a word
        if match[1].casefold() in FUNCTION_WORDS or match[1].casefold() in SCALES:
            break
        nouns.append(match[1])
        position = match.end()
    if nouns:
        return Unit(singular(nouns[-1]), Fraction(1), False), position
    cjk = re.match(r"\s*[\u3040-\u30ff\u4e00-\u9fff]", text)
    return None, 0 if cjk is None else cjk.end()
