"""Dates and times of day in answers. Pure functions of text."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from cv_lightning.rewards.answer_text import CACHED, any_case
from cv_lightning.rewards.answer_units import numbered

MONTHS = numbered("january february march april may june july august september october november december", 1)
MONTHS |= {name[:3]: number for name, number in MONTHS.items()} | {"sept": 9}
_NAME = rf"(?P<month>{'|'.join(sorted(MONTHS, key=len, reverse=True))})\b\.?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?(?![\d:.%]\d?)"
_YEAR = r"(?P<year>\d{4})(?!\d)"
_DATES = tuple(
    any_case(pattern)
    for pattern in (
        r"(?<![\w/.-])(?P<year>\d{4})(?P<separator>[-/.])(?P<first>\d{1,2})(?P=separator)(?P<second>\d{1,2})(?![\w/-])",
        r"(?<![\w/.-])(?P<first>\d{1,2})(?P<separator>[-/.])(?P<second>\d{1,2})(?P=separator)(?P<year>\d{4}|\d{2})(?![\w/-])",
        rf"\b{_NAME} {_DAY},?(?: of)? {_YEAR}",
        rf"(?<!\d){_DAY}(?: of)?[ -]{_NAME},?[ -]{_YEAR}",
        rf"\b{_NAME},? (?:of )?{_YEAR}",
        rf"\b{_NAME} {_DAY}(?! ?\w)",
        rf"(?<!\d)(?:the )?{_DAY}(?: of)? {_NAME}",
    )
)
_CLOCK = any_case(
    r"(?<![\w:.,])(?P<hour>[01]?\d|2[0-4])(?:(?::|(?P<dot>\.))(?P<minute>[0-5]\d)(?::(?P<second>[0-5]\d))?"
    r"|(?P<bare>(?=\s?[ap]\.?m\b)| ?o'clock))(?![\d:])\s?(?P<half>[ap])?(?(half)\.?m\b\.?)(?: ?o'clock)?"
)
_REJECTED = any_case(r"(?:\b(?:not|never|before|after|until|past|than|by|since|or|nor)|n't)(?:\s+[A-Za-z']+){0,2}\s*\Z")


class Date(NamedTuple):
    """A date; None for a part that is not said."""

    year: int | None
    month: int | None
    day: int | None
    is_numeric: bool = False
    """Month and day in numbers before the year, of which either may come first."""


class Clock(NamedTuple):
    """A time of day as it was said."""

    hour: int
    minute: int
    second: int
    half: str
    """`a`, `p`, or nothing."""


def read_dates(text: str) -> list[Date]:
    """Dates of a normalised text, in order."""
    found: list[tuple[int, Date]] = []
    for pattern in _DATES:
        for match in pattern.finditer(text):
            date = _date(match)
            if date is not None:
                found.append((match.start(), date))
        text = pattern.sub(lambda match: "\0" * len(match[0]), text)
    return [date for _, date in sorted(found)]


def _date(match: re.Match[str]) -> Date | None:
    parts = match.groupdict()
    year = int(parts["year"]) if parts.get("year") else None
    if parts.get("first"):
        first, second = int(parts["first"]), int(parts["second"])
        leads = match.start("year") < match.start("first")
        if year is not None and year < 100:
            year += 2000 if year < 50 else 1900
        if not leads and first > 12 >= second:
            return Date(year, second, first, True)
        return Date(year, first, second, not leads) if 1 <= first <= 12 and 1 <= second <= 31 else None
    day = int(parts["day"]) if parts.get("day") else None
    if day is not None and not 1 <= day <= 31:
        return None
    return Date(year, MONTHS[parts["month"].casefold()], day)


@lru_cache(maxsize=CACHED)
def whole_date(text: str) -> Date | None:
    """The date that a whole normalised text is, at most with its weekday; None if it says anything else."""
    bare = re.sub(
        r"\A(?:on |the )?(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?\.?,? )?",
        "",
        text,
        flags=re.IGNORECASE,
    )
    for pattern in _DATES:
        if match := pattern.match(bare):
            if bare[match.end() :].strip(" ."):
                continue
            return _date(match)
    return None


def says_date(said: str, truth: Date) -> bool:
    """True if a text names one date and it has all that the truth has."""
    found = set(read_dates(said))
    if len(found) != 1:
        return False
    (date,) = found
    if _REJECTED.search(re.split(r"\d|" + "|".join(MONTHS), said, maxsplit=1, flags=re.IGNORECASE)[0]):
        return False
    readings = [date]
    if date.is_numeric and not truth.is_numeric and date.day is not None and date.day <= 12:
        readings.append(date._replace(month=date.day, day=date.month))
    if truth.is_numeric and not date.is_numeric and truth.day is not None and truth.day <= 12:
        readings.append(date._replace(month=date.day, day=date.month))
    return any(
        all(wanted is None or wanted == has for wanted, has in zip(truth[:3], reading[:3], strict=True))
        for reading in readings
    )


def _clock(match: re.Match[str]) -> Clock | None:
    if match["dot"] and not match["half"]:
        return None  # 3.45 is a number
    half = (match["half"] or "").casefold()
    hour = int(match["hour"])
    if half and not 1 <= hour <= 12:
        half = ""
    return Clock(hour, int(match["minute"] or 0), int(match["second"] or 0), half)


@lru_cache(maxsize=CACHED)
def whole_clock(text: str) -> Clock | None:
    """The time of day that a whole normalised text is."""
    match = _CLOCK.match(text)
    return _clock(match) if match and not text[match.end() :].strip(" .") else None


def says_clock(said: str, truth: Clock) -> bool:
    """True if a text names one time of day and it is that of the truth; am and pm count where both say it."""
    matches = list(_CLOCK.finditer(said))
    found = {clock for match in matches if (clock := _clock(match)) is not None}
    if len(found) != 1 or _REJECTED.search(said[: matches[0].start()]):
        return False
    (clock,) = found
    if clock.half and truth.half:
        return clock == truth
    same_face = (clock.hour % 12, clock.minute, clock.second) == (truth.hour % 12, truth.minute, truth.second)
    if clock.half or truth.half:
        lettered, other = (clock, truth) if clock.half else (truth, clock)
        hour = lettered.hour % 12 + (12 if lettered.half == "p" else 0)
        return same_face and (other.hour <= 12 or other.hour % 24 == hour)
    return clock == truth
