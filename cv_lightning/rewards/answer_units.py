"""Units, scale words and number words of answers. Tables, and the functions that read them."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from cv_lightning.rewards.answer_text import CACHED, any_case


class Unit(NamedTuple):
    """What a number counts."""

    kind: str
    """Dimension of a known unit, or the noun of an unknown one (singular, lower case)."""
    factor: Fraction = Fraction(1)
    """Times the dimension's base unit."""
    is_known: bool = True


def _table(text: str) -> dict[str, Unit]:
    """Lines `dimension: factor name name ...; factor name ...`."""
    found: dict[str, Unit] = {}
    for line in text.strip().splitlines():
        kind, _, entries = line.partition(":")
        for entry in entries.split(";"):
            factor, *names = entry.split()
            found |= {name.replace("_", " "): Unit(kind.strip(), Fraction(factor)) for name in names}
    return found


# One entry a line: dimension, then factor and names; `_` is a space. Symbols keep their case, words are lower case.
SYMBOLS = _table(
    """
length: 1/1000000 um \u03bcm; 1/1000 mm; 1/100 cm; 1/10 dm; 1 m; 1000 km; 127/5000 in; 381/1250 ft
length: 1143/1250 yd; 25146/15625 mi
mass: 1/1000000 mg; 1/1000 g; 1 kg kgs; 1000 t; 45359237/100000000 lb lbs; 45359237/1600000000 oz
time: 1/1000 ms; 1 s secs; 60 min mins; 3600 h hr hrs; 86400 d
area: 1/1000000 mm2 mm^2; 1/10000 cm2 cm^2 sq_cm; 1 m2 m^2 sqm sq_m; 1000000 km2 km^2 sq_km; 10000 ha
area: 145161/1562500 ft2 ft^2 sqft sq_ft
volume: 1/1000 ml mL cm3 cm^3 cc; 1/100 cl cL; 1 l L; 1000 m3 m^3
speed: 1 m/s; 5/18 km/h kmh kph; 1397/3125 mph
temperature C: 1 \u00b0C \u2103
temperature F: 1 \u00b0F \u2109
temperature: 1 K
angle: 1 \u00b0 deg
data: 1 B; 1000 KB kB; 1000000 MB; 1000000000 GB; 1000000000000 TB
frequency: 1 Hz; 1000 kHz; 1000000 MHz; 1000000000 GHz
power: 1 W; 1000 kW; 1000000 MW; 1000000000 GW
energy: 1 J; 1000 kJ; 4184 kcal; 3600000 kWh
voltage: 1/1000 mV; 1 V; 1000 kV
pixels: 1 px
currency usd: 1 $ US$ USD usd
currency eur: 1 \u20ac EUR eur
currency gbp: 1 \u00a3 GBP gbp
currency jpy: 1 \u00a5 JPY CNY RMB \u5143 \u5186
currency inr: 1 \u20b9 INR Rs Rs.
currency krw: 1 \u20a9 KRW
ratio: 1 x
"""
)
WORDS = _table(
    """
length: 1/1000 millimeter millimetre; 1/100 centimeter centimetre; 1 meter metre; 1000 kilometer kilometre
length: 127/5000 inch inche; 381/1250 foot feet; 1143/1250 yard; 25146/15625 mile
mass: 1/1000000 milligram; 1/1000 gram gramme; 1 kilogram kilo; 1000 ton tonne; 45359237/100000000 pound
mass: 45359237/1600000000 ounce
time: 1/1000 millisecond; 1 second sec; 60 minute; 3600 hour; 86400 day; 604800 week
year: 1 year yr
month: 1 month
area: 1/10000 square_centimeter square_centimetre; 1 square_meter square_metre
area: 1000000 square_kilometer square_kilometre; 145161/1562500 square_foot square_feet; 10000 hectare
volume: 1/1000 milliliter millilitre; 1 liter litre; 1000 cubic_meter cubic_metre
speed: 5/18 kilometers_per_hour kilometres_per_hour; 1397/3125 miles_per_hour
speed: 1 meters_per_second metres_per_second
temperature C: 1 degrees_celsius degree_celsius celsius degrees_centigrade degrees_c
temperature F: 1 degrees_fahrenheit degree_fahrenheit fahrenheit degrees_f
temperature: 1 kelvin
angle: 1 degree
percent: 1 percent per_cent pct percentage_point
currency usd: 1 dollar us_dollar buck
currency eur: 1 euro
currency gbp: 1 british_pound pound_sterling
currency jpy: 1 yen yuan
currency inr: 1 rupee
pixels: 1 pixel
ratio: 1 times
"""
)
"""By the singular; a plural in -s is found, too."""

CURRENCY_SIGNS = "$\u20ac\u00a3\u00a5\u20b9\u20a9"
SCALES = {
    word: Fraction(value)
    for value, words in {
        10**2: "hundred",
        10**3: "thousand thousands",
        10**5: "lakh lakhs",
        10**6: "million millions mn mio",
        10**7: "crore crores",
        10**9: "billion billions bn",
        10**12: "trillion trillions tn",
        12: "dozen dozens",
    }.items()
    for word in words.split()
}
LETTER_SCALES = {"k": 3, "K": 3, "M": 6, "B": 9, "T": 12}
"""Powers of ten of letters attached to a number; after a currency sign `m` and `b` count, too."""

# Words that belong to the sentence, not to what is counted: a noun ends before them.
FUNCTION_WORDS = frozenset(
    "a an and are around as at be because been but by can for from had has have here if in into is it its "
    "less more of off on only or out over overall per right since so than that the their then there these "
    "they this those to total altogether under up visible was were which who with you i we not now left".split()
)


def singular(word: str) -> str:
    """Lower-case word without a plural ending."""
    word = word.casefold()
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 2 else word


# ------------------------------------------------------------------------------------------------ number words
def numbered(words: str, start: int = 0, step: int = 1) -> dict[str, int]:
    """Numbers by word, for words in ascending order."""
    return {word: step * number for number, word in enumerate(words.split(), start)}


_ONES = numbered(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = numbered("twenty thirty forty fifty sixty seventy eighty ninety", 2, 10) | {"fourty": 40}
_MULTIPLES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {
    "half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
    "ninth": 9, "tenth": 10,
}  # fmt: skip
_PARTS |= {f"{word}s": value for word, value in _PARTS.items() if word != "halves"}
_ORDINALS = numbered(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth",
    1,
)
_WORD = "|".join(sorted([*_ONES, *_TENS, "hundred", *_MULTIPLES], key=len, reverse=True))
_NUMBER_WORDS = any_case(rf"\b(?:a )?(?:{_WORD})\b(?:(?:[ -]+|,? and )(?:{_WORD})\b)*")
_PART_WORDS = any_case(
    r"(?:(?P<whole>\d+) and )?(?P<count>\b(?:a|an|one)\b|(?<![\d.,/])\d+)?[ -]*\b(?P<part>"
    + "|".join(_PARTS)
    + r")\b(?: of)?(?: (?:a|an)\b)?"
)
_POINT = re.compile(r"(\d+) point ((?:\d )*\d+)\b")
_PRONOUN = any_case(
    r"\b(?:the|this|that|which|each|every|no|any|some|another|other|first|second|last|next"
    r"|\w+(?:er|est|red|ow|een|lue|ack|ite|all|eft|ight)) \Z"
)
_PRONOUN_AFTER = any_case(
    r" (?:on|in|at|with|that|who|which|is|below|above|to|from|can|should|of (?:them|these|those))\b"
)
_BARE_PART = any_case(
    r"(?:\A|[=:,(-]|\b(?:is|are|was|about|exactly|only|just|around|roughly|approximately|than|at))\s*\Z"
)
ORDINAL = any_case(r"\A(?:the )?(" + "|".join(_ORDINALS) + r")(?: one| place)?\Z")


def ordinal(text: str) -> int | None:
    """Number of a text that is an ordinal ("third", "the second one")."""
    match = ORDINAL.match(text)
    return _ORDINALS[match[1].casefold()] if match else None


@lru_cache(maxsize=CACHED)
def digits_for_words(text: str) -> str:
    """Text with number words as digits: "twenty-one" as 21, "two and a half" as 2 1/2; pronouns ("no one") stay."""
    if not _NUMBER_WORDS.search(text) and not _PART_WORDS.search(text) and "dozen" not in text.casefold():
        return text
    text = _NUMBER_WORDS.sub(lambda match: _spelled(match, text), text)
    text = _POINT.sub(lambda match: f"{match[1]}.{match[2].replace(' ', '')}", text)
    text = re.sub(r"\ba (?=dozen|few hundred)", "1 ", text, flags=re.IGNORECASE)
    return " ".join(_PART_WORDS.sub(_part, text).split())


def _spelled(match: re.Match[str], text: str) -> str:
    words = re.split(r"[ -]+", match[0].casefold().replace(",", ""))
    if words == ["one"]:
        before, after = text[: match.start()], text[match.end() :]
        if _PRONOUN.search(before) or (before.strip() and _PRONOUN_AFTER.match(after)):
            return match[0]
    if words[0] == "a" and text[: match.start()].casefold().endswith("half "):
        return match[0]
    if words in (["hundred"], ["thousand"], ["million"], ["billion"], ["trillion"]) and words[0] != text.casefold():
        return match[0]  # the scale of a number in digits, or of none
    return " ".join(_parse_words(words))


def _parse_words(words: list[str]) -> list[str]:
    """Numbers in a sequence of number words; "and" joins only after a hundred or a scale: "five and six" are two."""
    found: list[str] = []
    total = current = 0
    last = ""  # kind of the word before: "", one, ten, hundred, scale
    pending = False  # an "and" behind a number

    def close() -> None:
        nonlocal total, current, last
        if last:
            found.append(str(total + current))
        total, current, last = 0, 0, ""

    for word in words:
        if word == "a":
            continue
        if word == "and":
            if last not in ("hundred", "scale"):
                close()
                found.append("and")
            pending = True
            continue
        if word in _ONES:
            value = _ONES[word]
            if last == "one" or (last == "ten" and (value > 9 or pending)):
                close()
            current, last = current + value, "one"
        elif word in _TENS:
            if last in ("one", "ten"):
                close()
            current, last = current + _TENS[word], "ten"
        elif word == "hundred":
            current, last = max(current, 1) * 100, "hundred"
        else:
            total, current, last = total + max(current, 1) * _MULTIPLES[word], 0, "scale"
        pending = False
    close()
    if len(found) == 2 and found[0] in ("18", "19", "20") and len(found[1]) == 2 and "and" not in words:
        return ["".join(found)]  # nineteen eighty-four
    return found


def _part(match: re.Match[str]) -> str:
    count, word = match["count"], match["part"].casefold()
    if word in _ORDINALS and count is None:
        return match[0]  # third without a number before it is an ordinal
    if word == "seconds" or (count is None and word not in ("half", "quarter")):
        return match[0]
    if count is None and not _BARE_PART.search(match.string[: match.start()]):
        return match[0]  # the left half
    number = count if count and count.isdigit() else "1"
    if match["whole"] and number != "1":
        return match[0]
    tail = " " if match[0].endswith((" a", " an", " of")) else ""
    return f"{match['whole'] + ' ' if match['whole'] else ''}{number}/{_PARTS[word]}{tail}"
