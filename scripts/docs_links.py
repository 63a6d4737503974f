"""MkDocs hook: links from a page to a file outside docs/ work on GitHub; on the site they become the link's text.

A link to a file that is not in the repository is a warning, and `mkdocs build --strict` fails on it.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(?:#[^)]*)?\)")
logger = logging.getLogger("mkdocs.hooks.docs_links")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Text of a page with the links to files outside docs/ replaced by their text."""

    def text(link: re.Match[str]) -> str:
        if not (ROOT / link[2]).exists():
            logger.warning("%s links to %s, which is not in the repository", page.file.src_path, link[2])
        return link[1]

    return OUTSIDE.sub(text, markdown)
