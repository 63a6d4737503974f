"""The `cv-lightning` commands that README.md, docs and notebooks show, and whether the package's parsers accept them.

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
from shell_commands import ROOT, own_arguments, page_files, shown_commands

RECORDED = FIXTURES / "command_lines.txt"
CALL = re.compile(r"(?:^|(?<=[/\s]))cv[-_]lightning(?=\s|$)")


def documented() -> list[str]:
    """What stands behind `cv-lightning` or `python -m cv_lightning`, or what a batch script hands on to it."""
    found = []
    for command in shown_commands():
        if command.program == "sbatch":
            found.append(f"fit {command.text.partition('.sbatch ')[2]}")
        elif own_arguments(command) is not None:
            found.append(CALL.split(command.text, maxsplit=1)[1].strip())
    return [command for command in found if command and command.split()[0] != "VERB"]


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
    for name, text in page_files((ROOT / "docs" / "your_own.md").read_text(encoding="utf-8")).items():
        (folder / name).write_text(text, encoding="utf-8")


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
