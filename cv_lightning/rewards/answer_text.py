r"""Text of an answer before anything is read from it: normal form, statement frames, comparison of plain texts.

Pure functions of text, linear in its length. `normalise` removes what carries no meaning in any answer; `plain` also
removes LaTeX; `claims` finds the part of a short statement that is asserted.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

MAX_NORMALISED_CHARS = 6000
"""The rest of a longer text is not read."""
MAX_LAYERS = 6
"""Nested emphasis, dollar signs, quotes and boxes that are removed."""
CACHED = 1024
"""Texts that each cached function remembers: one decision reads the same text several times."""
REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that do not decode."""


def any_case(pattern: str) -> re.Pattern[str]:
    """Compile a pattern that ignores case."""
    return re.compile(pattern, re.IGNORECASE)


_SUPERSCRIPT = re.compile("[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_VULGAR_AFTER_DIGIT = re.compile("(\\d)([\u00bc-\u00be\u2150-\u215e])")
_MINUS_BEFORE_DIGIT = re.compile("\u2212 +(?=[\\d.$\u20ac\u00a3\u00a5])")
_CHARACTERS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe58\ufe63\uff0d", "-")
    | dict.fromkeys("\u2014\u2015", " - ")
    | dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u02bc\u00b4\uff07", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\u300c\u300d\u300e\u300f", '"')
    | {"\u00ba": "\u00b0", "\u02da": "\u00b0", "\u2044": "/", "\u3002": ".", "\u3001": ",", "\u20e3": None}
)
_DROPPED_CATEGORIES = frozenset({"Cf", "Cc"})
_VARIATION_SELECTORS = frozenset(map(chr, [*range(0xFE00, 0xFE10), *range(0x180B, 0x180E)]))
_WRAPPERS = "*`\"' "

_LATEX = (
    (re.compile(r"\\(?:text|mathrm|mathbf|mathit|textbf|textit|operatorname|mbox|emph)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b"), "\u00b0"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)(?!\d)"), r" \1/\2"),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r" \1/\2"),
    (re.compile(r"\\(?:times|cdot)\b"), "\u00d7"),
    (re.compile(r"\\(?:leq?|leqslant)\b"), "<="),
    (re.compile(r"\\(?:geq?|geqslant)\b"), ">="),
    (re.compile(r"\\neq?\b"), "!="),
    (re.compile(r"\\(?:lt)\b"), "<"),
    (re.compile(r"\\(?:gt)\b"), ">"),
    (re.compile(r"\\(?:approx|sim|simeq)\b"), "~"),
    (re.compile(r"\\(?:left|right|displaystyle)\b|\\[!,;:()\[\]]|\\quad\b"), " "),
    (re.compile(r"\\([%$&#_{}])"), r"\1"),
    (re.compile(r"(?<![\w\\])\{([^{}]*)\}"), r"\1"),
)


@lru_cache(maxsize=CACHED)
def normalise(text: str) -> str:
    r"""Normal form of an answer: width, invisible characters, dashes, quotes, spacing, emphasis, `\boxed`, full stop.

    Applying it twice changes nothing more.
    """
    text = text[:MAX_NORMALISED_CHARS]
    if not text.isascii():
        text = _to_plain_characters(text)
    text = " ".join(text.split())
    for _ in range(MAX_LAYERS):  # each may hide another: **$\boxed{42}$**.
        before = text
        text = text.strip(_WRAPPERS)
        text = text.rstrip(".!") if re.search(r"[^\d.][.!]\Z", text) else text
        text = text[1:-1] if len(text) > 1 and text[0] == text[-1] == "$" else _unboxed(text)
        if text == before:
            break
    return text


def _to_plain_characters(text: str) -> str:
    # NFKC alone makes 52 of a squared 5 and 11/2 of one and a half
    text = _VULGAR_AFTER_DIGIT.sub(r"\1 \2", _SUPERSCRIPT.sub(lambda match: "^" + match.group(), text))
    text = _MINUS_BEFORE_DIGIT.sub("-", text)
    # before NFKC, which would put a space in front of a prime or an accent, and after it
    text = text.translate(_CHARACTERS)
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS)
    kept = (
        str(unicodedata.decimal(character)) if not character.isascii() and character.isdecimal() else character
        for character in text
        if (unicodedata.category(character) not in _DROPPED_CATEGORIES or character.isspace())
        and character not in _VARIATION_SELECTORS
    )
    return "".join(kept)


def _unboxed(text: str) -> str:
    """Content of a box that is the whole text."""
    if not text.startswith("\\boxed{") or not text.endswith("}"):
        return text
    inner, depth = text[7:-1], 0
    for character in inner:
        depth += (character == "{") - (character == "}")
        if depth < 0:  # two boxes
            return text
    return inner


@lru_cache(maxsize=CACHED)
def plain(text: str) -> str:
    """Normalised text without LaTeX commands and emphasis marks, for reading; formulas keep their operators."""
    if "\\" in text or "{" in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    if "**" in text or "`" in text or "__" in text:
        text = re.sub(r"\*\*(?!\s*\d)|(?<!\d)\*\*|`|__", "", text)
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------ statements
_OPENING = any_case(
    r"(?:so|thus|hence|therefore|then|okay|ok|well|clearly|(?:probably|possibly|perhaps|maybe|most likely)\b"
    r"|i (?:think|believe|guess|suppose|would say|'d say|see|read|count|counted|say|choose)(?: that)?"
    r"|(?:in|from|according to|based on|looking at) (?:the|this) (?:image|picture|photo|figure|chart|sign"
    r"|graph|table)|(?:the |my )?(?:final |correct |right |best )?(?:answer|result|solution)(?: is| was)?"
    r"|answer)\b(?: that\b)?[:,]?\s+|(?:answer|result)\s*[:=]\s*"
)
_COPULA = any_case(
    r"(?:(?:the|this|that|my|its|their|his|her) (?:[\w'-]+ ){1,5}?(?:is|are|was|were|says?|reads?|said|shows?"
    r"|equals)|it(?:'s| is| was| says| said| reads| shows| equals)|this is|that(?:'s| is)"
    r"|there(?:'s| is| are| was| were)|they(?:'re| are| were)|he is|she is|is|in|on|at|to)\b\s*:?\s*"
)
_ARTICLE = any_case(r"(?:a|an|the) (?=\S)")
_CONCLUSION = any_case(
    r"\b(?:final|correct|right|best)?\s*(?:answer|choice|option)(?: must be| should be| would be| is|:"
    r"| is:)\s*[:,]?\s*"
)
_REASON = any_case(r"[,;.]?\s+(?:because|since|due to|given that|considering)\b|[,;]\s+(?:as|for|so that)\s+(?=[a-z])")
_CORRECTED = any_case(
    r"\A.*(?:\b(?:thought|first|initially|guessed|looks? like)\b[^.;]*[,;.]?\s+but\b|\?\s*no\b,?"
    r"|\b(?:wait|actually|correction)\b[,:]?)(?:\s+(?:it's|it is))?\s*"
)
_NOT_BUT = any_case(
    r"\A.*?(?:\bnot|n't|\bnever)\b(?! only)[^,;.]*(?:[,;]?\s+but(?: rather| instead)?\s+"
    r"|[,;]\s+(?:it's|it is|rather|instead)\s+)"
)
_NOT = r"not\b(?! (?:only|included|counted|present|possible|right|correct)\b)"
_VERBS = "is are was were be am do does did can could would will may might must should has have had".split()
_REJECTED_TAIL = any_case(
    rf"(?:[,;(]\s*(?:and |but )?(?:it's |it is |certainly |definitely )?{_NOT}|\s(?:and|but) {_NOT}|"
    + "".join(rf"(?<!\b{verb})" for verb in _VERBS)
    + rf"\s{_NOT}"
    r"|[,;(]?\s*\b(?:rather than|instead of|as opposed to|unlike)\b)(?P<rejected>.*)\Z"
)
_HEDGE_BEHIND = any_case(
    r",\s*(?:definitely|certainly|surely|clearly|probably|maybe|perhaps|for sure|i (?:think|guess|believe))\Z"
)
_PARENTHESIS = re.compile(r"\s*[(\[][^()\[\]]*[)\]]\s*\Z")


@lru_cache(maxsize=CACHED)
def claims(text: str) -> str:
    """The asserted part of a statement: its conclusion, without reasons and rejected alternatives.

    "The answer is A, not B" gives "A", "not A but C" gives "C", "B, because A is wrong" gives "B". A statement that
    only rejects ("not 3") is not changed.
    """
    named = list(_CONCLUSION.finditer(text))
    if named and text[named[-1].end() :].strip(" .,;:"):
        text = text[named[-1].end() :]
    text = _HEDGE_BEHIND.sub("", text)
    if (reason := _REASON.search(text)) and text[: reason.start()].strip():
        text = text[: reason.start()]
    if (corrected := _CORRECTED.match(text)) and text[corrected.end() :].strip():
        text = text[corrected.end() :]
    if contrast := _NOT_BUT.match(text):
        text = text[contrast.end() :]
    elif (tail := _REJECTED_TAIL.search(text)) and text[: tail.start()].strip() and tail["rejected"].strip():
        text = text[: tail.start()]
    return text.strip(" ,;:")


@lru_cache(maxsize=CACHED)
def without_frame(text: str) -> str:
    """A statement without the words that introduce its content: "The sign says STOP" gives "STOP"."""
    for _ in range(4):
        before = text
        for pattern in (_OPENING, _COPULA):
            match = pattern.match(text)
            if match and match.end() < len(text):
                text = text[match.end() :].strip()
        if text == before:
            break
    return text.strip(" *`\"'")


# ------------------------------------------------------------------------------------------------ texts
@lru_cache(maxsize=CACHED)
def text_key(text: str) -> str:
    """Text for comparison: without case, leading article, hyphens, closing punctuation, abbreviation dots, spacing."""
    text = plain(text).casefold().strip(" *_`\"'.,;:!?")
    text = _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text
    text = re.sub(r"\s*&\s*", " and ", text)
    text = re.sub(r"(?<=\b[^\W\d])\.(?=\w|\Z|\s)|(?<=\b[^\W\d][^\W\d])\.(?=\s)", "", text)  # U.S.A., Dr. Smith
    text = re.sub(r"\A(?:from|between) (\d\S*) (?:to|and) (?=\d)", r"\1-", text)
    text = re.sub(r"(?<=\d)\s*(?:-|\bto\b)\s*(?=\d)", "-", text)
    text = re.sub(r"(?<=[^\W\d])-(?=[^\W\d])", " ", text)
    text = re.sub(r"\s*([,:;/()=+])\s*", r"\1", text)
    return " ".join(text.split())


def says_text(said: str, truth: str) -> bool:
    """True if a statement asserts the text of the truth and nothing else. Both are normalised."""
    wanted = {text_key(truth), text_key(without_frame(truth))} - {""}
    asserted = claims(said)
    forms = {said, asserted, without_frame(said), without_frame(asserted)}
    forms |= {_PARENTHESIS.sub("", form) for form in forms if not re.search(r"\bor\b", form)}
    return any(text_key(form) in wanted for form in forms)
