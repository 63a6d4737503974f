"""Python code in coloured pieces, as the report's script draws it; Pygments reads the code."""

from __future__ import annotations

from collections.abc import Iterator

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
"""Kinds of token and the classes of `report.css`; what is none of these has no colour."""


def highlight(code: str) -> list[tuple[str, str]]:
    """(tone, text) of the code's pieces; the texts joined are the code.

    Tones: `com`, `str`, `num`, `k` (keyword), `fn` (a name that is called) and the empty one.
    """
    pieces: list[tuple[str, str]] = []
    for tone, text in _toned([(kind, text) for _, kind, text in LEXER.get_tokens_unprocessed(code)]):
        if pieces and pieces[-1][0] == tone:
            pieces[-1] = (tone, pieces[-1][1] + text)
        else:
            pieces.append((tone, text))
    return pieces


def _toned(tokens: list[tuple[_TokenType, str]]) -> Iterator[tuple[str, str]]:
    for number, (kind, text) in enumerate(tokens):
        called = kind in Token.Name and tokens[number + 1 : number + 2] == [(Token.Punctuation, "(")]
        yield "fn" if called else next((tone for known, tone in TONES if kind in known), ""), text
