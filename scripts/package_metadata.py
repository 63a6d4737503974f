"""Hook of the build: long description and URLs of the package, from README.md and the repository's address.

A page on PyPI has no files beside it. Relative links and images become absolute; while no address is set in
pyproject.toml (`[tool.hatch.metadata.hooks.custom] repository`) links become plain text and images are left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

IMAGE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<path>[^)\s:]+)\)")
FIGURE = re.compile(r"^!\[[^\]]*\]\([^)\s:]+\)\n(\n\*[^\n]*\*\n)?\n?", re.M)
"""An image that is a paragraph, with its caption."""
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<path>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)")


def long_description(text: str, repository: str, version: str) -> str:
    """README.md as it can be shown away from the repository.

    Args:
        text: Its Markdown.
        repository: Address of the repository on GitHub; empty if unknown.
        version: Links lead to the tag `v<version>`.
    """
    if not repository:
        return LINK.sub(lambda found: found["text"], FIGURE.sub("", text))
    base = repository.rstrip("/")
    text = IMAGE.sub(lambda found: f"![{found['text']}]({base}/raw/v{version}/{found['path']})", text)
    return LINK.sub(
        lambda found: f"[{found['text']}]({base}/blob/v{version}/{found['path']}{found['anchor'] or ''})", text
    )


def urls(repository: str) -> dict[str, str]:
    """The project's URLs; none if the address is unknown."""
    base = repository.rstrip("/")
    pages = {
        "Repository": "",
        "Documentation": "/tree/main/docs",
        "Issues": "/issues",
        "Release notes": "/blob/main/docs/releases.md",
    }
    return {name: f"{base}{path}" for name, path in pages.items()} if base else {}


class PackageMetadata(MetadataHookInterface):
    """Sets `readme` and `urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill the dynamic fields."""
        root, repository = Path(self.root), self.config.get("repository", "")
        version = re.search(r'^__version__ = "(.+)"', (root / "cv_lightning/__init__.py").read_text(), re.M)
        text = (root / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": long_description(text, repository, version[1] if version else "main"),
        }
        metadata["urls"] = urls(repository)
