"""The command lines that README.md and docs show, and whether the package's parsers accept them.

What a reader fills in has a stand-in: a config of theirs (MINE.yaml) is a copy of the quickstart's, a recipe (NEW.yaml)
one of ours, `--config ...` the first. Brackets around options that may be left out are taken off. At other files and
folders no parser looks.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
from renames import FIXTURES

ROOT = Path(__file__).parents[1]
RECORDED = FIXTURES / "command_lines.txt"
CALL = re.compile(r"(?:(?:python|torchrun[^`\n]*?) -m cv_lightning|(?<![\w/'\"\[-])cv-lightning(?![\w\[-])) ?([^`]*)")
DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))


def documented() -> list[str]:
    """What stands behind `cv-lightning` or `python -m cv_lightning`, in code blocks and in code within lines.

    Continued lines are joined, and comments and what follows two spaces (an explanation in a column) are cut off.
    """
    found = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
        inside = False
        for line in text.splitlines():
            if line.lstrip().startswith("```"):
                inside = not inside
            elif inside or line.startswith("    "):
                found += [cleaned(match) for match in CALL.findall(line)]
            else:
                spans = re.findall(r"`([^`]+)`", line)
                found += [cleaned(match) for span in spans for match in CALL.findall(span)]
    return [command for command in found if command]


def cleaned(command: str) -> str:
    """One space between words, without what explains the command."""
    command = re.sub(r"\s#.*", "", command)
    command = re.sub(r"(?<=\S) {3,}(?=[a-z]\w* \w+).*", "", command)  # a column of prose
    return " ".join(command.split())


def words(command: str) -> list[str]:
    """As a shell would hand them over; what a reader fills in is a stand-in."""
    command = re.sub(r"\[(--[^\[\]]*)\]", r"\1", command).replace("--config ...", "--config MINE.yaml")
    return shlex.split(command.replace(" ...", ""))


def stand_ins(folder: Path) -> None:
    """Files that the documents leave to their reader, beside the shipped configs."""
    (folder / "configs").symlink_to(ROOT / "configs")
    for path in (ROOT / "configs" / "quickstart").glob("*.yaml"):
        shutil.copy(path, folder)
    for name in ("MINE.yaml", "RECIPE.yaml"):
        shutil.copy(folder / "grpo.yaml", folder / name)
    shutil.copy(ROOT / "configs" / "reward" / "paper.yaml", folder / "NEW.yaml")
    (folder / "served.yaml").write_text("seed_everything: 0\n")


class Parsed(BaseException):
    """A parser has accepted a whole command line; nothing is run."""


def stop_after_parsing(patch: pytest.MonkeyPatch) -> None:
    """Let every command end with `Parsed` once its parser is content."""
    depth = 0

    def stopping(parse: Callable[..., Any]) -> Callable[..., Any]:
        def stopped(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                found = parse(*args, **kwargs)
            finally:
                depth -= 1
            if depth:
                return found
            raise Parsed

        return stopped

    for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
        patch.setattr(parser, "parse_args", stopping(parser.parse_args))
