"""Multiple choice: the options that a question lists, and which of them an answer names.

A letter counts where it is marked as an option ("(B)", "B.", "B: red"), introduced as one ("the answer is B", "I choose
B") or stands alone; letters of ordinary words ("a cat", "vitamin C", "B-52") do not. Pure functions of text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

from cv_lightning.rewards.answer_text import any_case, claims, normalise, plain, text_key, without_frame

_CONFUSABLE = str.maketrans(
    "\u0410\u0412\u0421\u0415\u041d\u0406\u0408\u0391\u0392\u0395\u0397\u0399\u0430\u0441\u0435", "ABCEHIJABEHIace"
)
"""Cyrillic and Greek letters that look like Latin ones."""
_LONE = re.compile(r"[\s.,:;(\[{<*_`\"'=#-]*([A-Za-z])(?:[\s.,:;!?)\]}>*_`\"']|\s-)*\Z")
_TRUTH = any_case(r"(?:(?:option|choice|answer|letter)[ :]+)?[(\[{<]?\s*([A-Za-z])\s*[)\]}>.:]*\Z")
_TRUTH_WITH_TEXT = re.compile(r"(?:\(([A-Z])\)\s*|([A-Z])[):]\s+|([A-Z])\.\s+)(\S.*)\Z")

_MENTION = re.compile(
    r"(?<![\w/&+.'#-])(?:(?P<open>[(\[])\s?)?(?P<letter>[A-Z]|(?<=[(\[])[a-z](?=\s?[)\]]))(?P<close>\s?[)\]])?"
    r"(?![\w/&+#]|'\w|-\w|\.[A-Za-z]|\s?%)"
)
_LOWER = any_case(
    r"\A[(\[]?([a-z])[)\]](?=\s|\Z)|\A([a-z])[.:] |\b(?:option|choice|answer is|answer:|choose|pick|select"
    r"|letter)\s+([a-z])(?=[\s.,:;!?)]*(?:\Z|because|since))"
)
_MARK = re.compile(r"[):.\],;*]|\s+[A-Z]\b|\s*[(\[:=]|\s+-\s|\s*-\s")
_FOLLOWING = any_case(
    r"\s+(?:is|was|because|since|due|and|or|as|but|not|rather|instead|would|seems?|looks?|matches|shows|fits"
    r"|must|should|has|it|over|for sure|definitely|obviously|clearly|then|here|also)\b"
)
_SAID_OF = frozenset(
    "is be was are choose chose chosen pick picked select selected say says go with for so thus hence "
    "therefore it's that's mean to answer option choice letter image picture figure panel point candidate "
    "label labeled labelled marked graph chart shape piece item box path view and or nor possibly maybe "
    "perhaps probably likely either even alternatively definitely certainly surely clearly obviously then "
    "guess think believe both also than not isn't neither correct right only just first between from unless".split()
)
"""Words before a letter that is chosen; after any other word, a letter belongs to that word (vitamin C)."""
_REJECTED_BEFORE = any_case(
    r"(?:\b(?:not|doubt|doubtful|never|cannot|neither|nor|except|than|without|excluding|unlike|besides"
    r"|against|eliminated?|exclude|discard|rul(?:e|ed|ing) out)|n't|\b(?:instead|because|out) of"
    r"|\banything but|\ball but)(?!\s+only)(?:\s+[\w']+){0,3}\s*[(\[\"'*]*\Z"
)
_REJECTED_AFTER = any_case(
    r"(?:\s*(?:,|and|or|&)+\s*\(?[A-Z]\b)*[)\]\"'*.:,]*\s*(?:(?:is|are|was|were|seems?|looks?|would be"
    r"|must be|can be|has been)\s+(?:[a-z]+ly\s+|also\s+)?(?:not|wrong|incorrect|false|impossible|unlikely"
    r"|invalid|ruled out|excluded|eliminated|out\b|too\b)|or not\b|(?:isn't|aren't|wasn't|can't|cannot"
    r"|doesn't|does not|do not|don't|won't|fails?)\b|\((?:wrong|incorrect|no|false)\))"
)
_CLAUSE = any_case(r"[;.!?](?:\s|\Z)|,\s|\bbut\b|\bso\b")
_PAIR = re.compile(
    r"(?<![\w.'-])(?P<one>[A-Z])[)\]]?\s?(?:[/&+|-]|,|;|\b(?:and|or|to|through|versus|vs\.?|as well as|plus"
    r"|along with|together with)\b)+\s?(?:or |and )?[(\[]?(?P<other>[A-Z])(?![\w'+#-])"
)
"""Two letters side by side."""
_APPROVED = any_case(
    r"[)\]\"'*]*\s+(?:is|must be|seems|looks)(?: the)?(?: only| best| most)* (?:correct|right|answer|choice"
    r"|option|one|true)\b"
)


class Choice(NamedTuple):
    """A ground truth that is an option."""

    letter: str
    text: str = ""
    """The option's text, where it is known."""


# ------------------------------------------------------------------------------------------------ options
@lru_cache(maxsize=256)
def _listed(question: str) -> tuple[tuple[str, str], ...]:
    starts = [
        (match.start(), match.end(), match[1] or match[2] or match[3] or match[4])
        for match in re.finditer(
            r"(?:(?<=\s)|^|(?<=[,;:?(]))(?:[(\[]([A-Za-z])[)\]]\s*|([A-Z])[).:]\s+|([A-Z])[):](?=\S)"
            r"|([a-z])\)\s+)",
            question,
            re.MULTILINE,
        )
    ]
    for first in range(len(starts) - 1, -1, -1):
        if starts[first][2].upper() != "A":
            continue
        chain = [starts[first]]
        for start in starts[first + 1 :]:
            if start[2].upper() == chr(ord("A") + len(chain)) and question[chain[-1][1] : start[0]].strip():
                chain.append(start)
        if len(chain) < 2:
            continue
        ends = [start[0] for start in chain[1:]] + [len(question)]
        texts = [question[start[1] : end] for start, end in zip(chain, ends, strict=True)]
        texts[-1] = texts[-1].lstrip("\n").partition("\n")[0]
        return tuple((start[2].upper(), text.strip(" \n\t,;")) for start, text in zip(chain, texts, strict=True))
    return ()


def read_options(question: str) -> dict[str, str]:
    """Options that a question lists, by letter: "A. red", "(B) blue", on lines of their own or in a row."""
    return dict(_listed(question[-8000:]))


def read_truth(truth: str, options: Mapping[str, str]) -> Choice | None:
    """The option that a normalised ground truth names: by its letter, by letter and text, or by a listed text."""
    if match := _TRUTH.match(truth):
        letter = match[1].upper()
        return Choice(letter, options.get(letter, ""))
    if match := _TRUTH_WITH_TEXT.match(truth):
        letter = match[1] or match[2] or match[3]
        is_listed = letter in options and text_key(options[letter]) == text_key(match[4])
        if is_listed or (match[3] is None and not options):
            return Choice(letter, match[4])
    same = [letter for letter, text in options.items() if text_key(text) == text_key(truth)]
    return Choice(same[0], truth) if len(same) == 1 else None


# ------------------------------------------------------------------------------------------------ answers
def read_choice(
    text: str, options: Mapping[str, str] | None = None, is_same: Callable[[str, str], bool] | None = None
) -> str | None:
    """The one option letter that a normalised answer names, in upper case; None if none or several.

    Args:
        text: The answer.
        options: The options that the question lists; their texts name them, too.
        is_same: Compares an answer with an option's text by meaning, such as the value of a number.
    """
    options = options or {}
    text = plain(text)
    if match := _LONE.match(text.translate(_CONFUSABLE)):
        return match[1].upper()
    if letter := _by_letter_and_text(text, options) or _by_text(text, options, None):
        return letter
    letters = _named(text, options)
    if len(letters) == 1:
        (letter,) = letters
        return None if _contradicts(text, letter, options) else letter
    return None if letters else _by_text(text, options, is_same)


def _by_letter_and_text(text: str, options: Mapping[str, str]) -> str | None:
    """Letter of an answer that consists of a letter and that option's text: "B. A red car", "B A red car"."""
    for form in dict.fromkeys((text, without_frame(text), without_frame(claims(text)))):
        match = re.match(r"[(\[]?([A-Za-z])(?![\w'])[)\].:,-]*\s*[-:(]?\s*(.+)\Z", form)
        if match and match[1].upper() in options:
            letter = match[1].upper()
            if text_key(match[2].rstrip(")") if "(" not in match[2] else match[2]) == text_key(options[letter]):
                return letter
    return None


def _contradicts(text: str, letter: str, options: Mapping[str, str]) -> bool:
    """True if a letter is followed by the whole text of another option."""
    match = re.search(rf"(?<!\w){letter}[)\].:,-]*\s*[-:(]?\s*(.+)\Z", text)
    if match is None:
        return False
    said = text_key(match[1].strip("()"))
    others = {text_key(option) for other, option in options.items() if other != letter}
    return said in others and said != text_key(options.get(letter, ""))


def _named(text: str, options: Mapping[str, str]) -> set[str]:
    """Letters that a statement names and does not reject, in its conclusion where it has one."""
    asserted = claims(text)
    if match := _LOWER.search(asserted):
        return {(match[1] or match[2] or match[3]).upper()} | _mentioned(asserted, options)
    lone = _LONE.match(asserted)
    return {lone[1].upper()} if lone else _mentioned(asserted, options)


def _mentioned(text: str, options: Mapping[str, str]) -> set[str]:
    letters = set()
    highest = max([*options, "J"])
    for match in _MENTION.finditer(text):
        letter = match["letter"].upper()
        before, after = text[: match.start()], text[match.end() :]
        is_first = not before.strip(" *\"'([-")
        if letter > highest and not is_first and not match["close"]:
            continue
        if _is_claimed(match, before, after, is_first) and not _is_rejected(before, after):
            letters.add(letter)
    for pair in _PAIR.finditer(text):
        before, after = text[: pair.start()], text[pair.end() :]
        if re.match(r"\s+[a-z]", after) and not _FOLLOWING.match(after):
            continue  # B, I think; B, a cat
        if not _is_rejected(before, after):
            letters |= {pair["one"], pair["other"]}
    return letters


def _is_rejected(before: str, after: str) -> bool:
    clause = _CLAUSE.split(before)[-1]
    return _REJECTED_BEFORE.search(clause) is not None or _REJECTED_AFTER.match(after) is not None


def _is_claimed(match: re.Match[str], before: str, after: str, is_first: bool) -> bool:
    """True for a letter that names an option, by its own marks or by the words around it."""
    if match["close"] and (match["open"] or max(map(before.rfind, "([")) <= max(map(before.rfind, ")]"))):
        return True
    if _APPROVED.match(after):
        return True
    is_followed_by_word = re.match(r"\s+(?![A-Z](?![\w'.-]))[\w\"']", after) is not None
    if is_followed_by_word and not _FOLLOWING.match(after):
        return False  # a cat, C major
    is_verb_of_i = is_followed_by_word and not re.match(r"\s+(?:is|because|and|or)\b", after)
    if match["letter"] == "I" and (is_verb_of_i or after.startswith("'")):
        return False
    if is_first:
        return bool(_MARK.match(after) or match["close"] or _FOLLOWING.match(after) or not after.strip())
    if re.match(r":|\.\s+\S", after) and re.match(r"\W*[A-Za-z]\s?[).:\]]", match.string):
        return True  # A. red B. blue
    word = re.search(r"([\w']+)[\"'*:]* ?[\"'*(\[]*\Z", before)
    if re.search(r"\b(?:Mr|Mrs|Ms|Dr|St)\. \Z", before):
        return False
    if word is None or re.search(r"[,;/|&:.)\]>-]\s*[\"'*(\[]*\Z", before):
        return True  # the first of its clause
    return word[1].casefold() in _SAID_OF or (len(word[1]) == 1 and word[1].isupper())


def _by_text(text: str, options: Mapping[str, str], is_same: Callable[[str, str], bool] | None) -> str | None:
    """The one option whose text an answer says; with `is_same` also within a sentence that names no other."""
    asserted = claims(text)
    forms = {text_key(form) for form in (text, asserted, without_frame(text), without_frame(asserted))}
    keys = {letter: text_key(normalise(option)) for letter, option in options.items()}
    literal = [letter for letter, option in options.items() if normalise(option).casefold() == text.casefold()]
    if len(literal) == 1:
        return literal[0]  # "3-5" rather than "between 3 and 5"
    same = {letter for letter, key in keys.items() if key and key in forms}
    if not same and is_same is not None:
        same = {letter for letter, option in options.items() if is_same(asserted, normalise(option))}
        if not same:
            return _within(text_key(asserted), keys)
    return same.pop() if len(same) == 1 else None


def _within(said: str, keys: Mapping[str, str]) -> str | None:
    """The one option whose words stand in a sentence, neither rejected nor as part of a longer option's text."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for letter, key in keys.items():
        if len(key) < 2 or key in ("none", "no", "yes", "not") or re.match(r"\W?[\d.]", key):
            continue
        spans[letter] = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(key)}(?!\w)", said)]
    every = [span for found in spans.values() for span in found]
    named = set()
    for letter, found in spans.items():
        for start, end in found:
            if any(a <= start and end <= b and (a, b) != (start, end) for a, b in every):
                continue
            if re.search(
                r"\b(?:not|no|never|neither|nor|than|without|except|non|un|isn't|aren't|or)\b[^,;.]*\Z"
                r"|n't\b[^,;.]*\Z",
                said[:start],
            ):
                return None
            named.add(letter)
    return named.pop() if len(named) == 1 else None
