"""Format of a response: thoughts, then one answer and nothing after it. Pure functions of text."""

from __future__ import annotations

from collections.abc import Sequence

from cv_lightning.dialects import CUT, HERMES, Dialect
from cv_lightning.dialects.hermes import CALL_CLOSE, CALL_OPEN
from cv_lightning.rewards.markup import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    RESPONSE_CLOSE,
    RESPONSE_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    cut_spans,
    without_thoughts,
)


def check_format(text: str | None, dialect: Dialect = HERMES) -> float:
    """1.0 if a whole response is well-formed, else 0.0 (golden/format; its questionable cases give 0.0).

    A well-formed response begins with a thought; thoughts are neither empty, nested nor crossed; every call is closed;
    exactly one answer that is not empty stands outside thoughts, without tags inside and with nothing after it. Tool
    responses are removed first. An answer tag in a thought gives 0.0. Calls are not counted here: the golden cases
    accept two in a row.

    Args:
        text: The assistant's turns, joined.
        dialect: How they write calls.
    """
    text = cut_spans((text or "").replace(CUT, ""), RESPONSE_OPEN, RESPONSE_CLOSE, mark="")
    spoken = _spoken(text)
    if spoken is not None and dialect is not HERMES:  # the golden cases hold Hermes calls to what stands in them, too
        spoken = dialect.find(spoken).rest
    if spoken is None or spoken.count(ANSWER_OPEN) != 1 or spoken.count(ANSWER_CLOSE) != 1:
        return 0.0
    before, _, after = spoken.partition(ANSWER_OPEN)
    inside, closed, behind = after.partition(ANSWER_CLOSE)
    well_formed = closed and inside.strip() and not behind.strip() and CUT not in inside and CALL_OPEN not in inside
    return float(bool(well_formed) and before.count(CALL_OPEN) == before.count(CALL_CLOSE))


def check_turns(turns: Sequence[str], dialect: Dialect = HERMES) -> float:
    """1.0 if every assistant turn is well-formed: a thought, then one closed call or, in the last, an answer; else 0.0.

    Stricter than `check_format` of the joined text: every turn needs its own thought, and has either one call, since
    only the first is run, or the answer.

    Args:
        turns: The assistant's turns.
        dialect: How they write calls.
    """
    if not turns or check_format(turns[-1], dialect) == 0 or dialect.find(without_thoughts(turns[-1])).bodies:
        return 0.0
    for text in turns[:-1]:
        spoken = _spoken(text.replace(CUT, ""))
        if spoken is None or ANSWER_OPEN in spoken or ANSWER_CLOSE in spoken:
            return 0.0
        blocks = dialect.find(spoken)
        if blocks.unclosed or len(blocks.bodies) != 1 or CALL_CLOSE in blocks.rest:
            return 0.0
    return 1.0


def _spoken(text: str) -> str | None:
    """Text with a `CUT` for every thought.

    None where it does not begin with a thought, or where one is empty, nested, crossed or opens an answer.
    """
    pieces: list[str] = []
    position = 0
    while (start := text.find(THINK_OPEN, position)) >= 0:
        end = text.find(THINK_CLOSE, start)
        if end < 0 or text.find(THINK_OPEN, start + 1, end) >= 0 or text.find(ANSWER_OPEN, start, end) >= 0:
            return None
        if not text[start + len(THINK_OPEN) : end].strip() or (not pieces and text[:start].strip()):
            return None
        pieces += [text[position:start], CUT]
        position = end + len(THINK_CLOSE)
    pieces.append(text[position:])
    return None if len(pieces) == 1 or THINK_CLOSE in "".join(pieces) else "".join(pieces)
