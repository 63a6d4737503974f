"""The tags of a response: thoughts, tool responses, answers. Pure functions of text, linear in its length.

Agent and reward read a turn with the same functions, so the answer that ends a trajectory is the one that is scored.
"""

from __future__ import annotations

from cv_lightning.dialects import CUT, HERMES, Dialect

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
RESPONSE_OPEN, RESPONSE_CLOSE = "<tool_response>", "</tool_response>"


def without_thoughts(text: str) -> str:
    """Text with a `CUT` for every thought.

    Text before a first closing tag without an opening one also belongs to a thought (a template may have opened it);
    an unclosed thought extends to the end.
    """
    first_open, first_close = text.find(THINK_OPEN), text.find(THINK_CLOSE)
    if first_close >= 0 and (first_open < 0 or first_close < first_open):
        text = CUT + text[first_close + len(THINK_CLOSE) :]
    return cut_spans(text, THINK_OPEN, THINK_CLOSE, unclosed=True)


def cut_spans(text: str, opening: str, closing: str, *, unclosed: bool = False, mark: str = CUT) -> str:
    """Text with `mark` for every span from an opening to the next closing tag, tags included.

    Args:
        text: Any text.
        opening: Opening tag.
        closing: Closing tag.
        unclosed: A span without a closing tag extends to the end of the text; else it stays.
        mark: Replaces each span.
    """
    pieces: list[str] = []
    position = 0
    while (start := text.find(opening, position)) >= 0:
        end = text.find(closing, start + len(opening))
        if end < 0:
            if unclosed:
                return "".join([*pieces, text[position:start], mark])
            break
        pieces += [text[position:start], mark]
        position = end + len(closing)
    return "".join([*pieces, text[position:]])


def answer_spans(text: str) -> list[str]:
    """Contents of the closed answers, in order; of nested opening tags, the innermost counts."""
    found: list[str] = []
    position = 0
    while (start := text.find(ANSWER_OPEN, position)) >= 0:
        end = text.find(ANSWER_CLOSE, start)
        if end < 0:
            break
        inner = text[start:end]
        found.append(inner[inner.rfind(ANSWER_OPEN) + len(ANSWER_OPEN) :])
        position = end + len(ANSWER_CLOSE)
    return found


def final_answer(text: str, dialect: Dialect = HERMES) -> str | None:
    """The last well-formed answer of an assistant turn, stripped; None without one.

    Answers in thoughts, calls and tool responses do not count, nor answers that contain one of these.

    Args:
        text: The turn.
        dialect: How it writes calls.
    """
    spoken = dialect.find(without_thoughts(text.replace(CUT, ""))).rest
    spoken = cut_spans(spoken, RESPONSE_OPEN, RESPONSE_CLOSE, unclosed=True)
    whole = [answer for answer in answer_spans(spoken) if CUT not in answer]
    return whole[-1].strip() if whole else None
