"""Templates, style and security policy of all pages."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cv_lightning import __version__

TEMPLATES = Path(__file__).parent / "templates"


def environment() -> jinja2.Environment:
    """Environment of the templates; it escapes texts of models and data, and an undefined name is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def style() -> Markup:
    """The style sheet of all pages."""
    return Markup((TEMPLATES / "report.css").read_text())


def colours() -> str:
    """The colours of all pages in both schemes, as CSS variables."""
    return str(style()).partition("\n* {")[0]


def render(
    template: jinja2.Template, *, kind: str, title: str, script: str = "", policy: str = "", **values: Any
) -> str:
    """A whole page: a template that extends `base.html.jinja`, with the style of all pages.

    Args:
        template: The page's template.
        kind: What the page is, in a word, beside the name of the package.
        title: Title of the page.
        script: The page's own script, the only one that may run.
        policy: Further directives of the content security policy.
        values: Values of the template.
    """
    sheet = style()
    return template.render(
        kind=kind,
        title=title,
        version=__version__,
        style=sheet,
        script=Markup(script),
        policy=_policy(sheet, script, policy),
        **values,
    )


def _policy(sheet: str, script: str, more: str) -> str:
    """Content security policy: allows this style, this script, images of the page and its folder, and nothing else."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (sheet, script)]
    allowed = f"script-src 'sha256-{hashes[1]}'; " if script else ""
    return (
        f"default-src 'none'; img-src data: 'self' file:; style-src 'sha256-{hashes[0]}'; {allowed}{more}"
        "base-uri 'none'; form-action 'none'"
    )
