"""Splits Python code into coloured pieces with Pygments, as the report's script draws them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter

from pygments.lexers.python import PythonLexer
from pygments.token import Token, _TokenType

LEXER = PythonLexer()
TONES = (
    (Token.Comment, "com"),
    (Token.Literal.String, "str"),
    (Token.Literal.Number, "num"),
    (Token.Keyword, "k"),
    (Token.Operator.Word, "k"),
)
"""Kinds of token with their classes in `report.css`; other tokens have no colour."""


def highlight(code: str) -> list[tuple[str, str]]:
    """Pieces of the code as (tone, text); the joined texts are the code.

    Tones are `com`, `str`, `num`, `k` (keyword), `fn` (a name that is called) and empty.
    """
    tokens = [(kind, text) for _, kind, text in LEXER.get_tokens_unprocessed(code)]
    return [(tone, "".join(text for _, text in run)) for tone, run in groupby(_toned(tokens), key=itemgetter(0))]


def _toned(tokens: list[tuple[_TokenType, str]]) -> Iterator[tuple[str, str]]:
    for number, (kind, text) in enumerate(tokens):
        called = kind in Token.Name and tokens[number + 1 : number + 2] == [(Token.Punctuation, "(")]
        yield "fn" if called else next((tone for known, tone in TONES if kind in known), ""), text
