"""`python -m cv_lightning data SUB-VERB`: what a data set holds, and making one; imports what a sub-verb needs."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from typing import NamedTuple


class SubVerb(NamedTuple):
    """One command of `data`."""

    target: str
    """`module:function`, called with the list of arguments; what it returns is the exit code."""
    help: str
    """One line."""


SUB_VERBS = {
    "show": SubVerb("cv_lightning.commands.data_show:main", "print one conversation with its tokens, mask and images"),
    "check": SubVerb("cv_lightning.commands.data_check:main", "say what files hold and whether they will train"),
    "export": SubVerb("cv_lightning.commands.data_export:main", "write the embedded digits as RL Parquet or SFT JSON"),
    "build-sft": SubVerb("cv_lightning.commands.data_build:build_sft", "make SFT conversations from a table of VQA"),
    "build-rl": SubVerb("cv_lightning.commands.data_build:build_rl", "make RL tasks from a table of VQA"),
    "corrupt": SubVerb("cv_lightning.commands.data_build:corrupt", "turn and corrupt a benchmark, boxes mapped along"),
}
USAGE = "usage: python -m cv_lightning data SUB-VERB [options]"


def available() -> dict[str, SubVerb]:
    """The sub-verbs whose module exists; nothing is imported but the package that holds it."""
    return {name: verb for name, verb in SUB_VERBS.items() if importlib.util.find_spec(verb.target.split(":")[0])}


def main(argv: list[str]) -> int:
    """Run one sub-verb.

    Args:
        argv: the command line behind `data`.

    Returns:
        The exit code; 2 if there is no such sub-verb.
    """
    verbs = available()
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, verbs), default=0)
        listed = "\n".join(f"  {name:{width}}  {verb.help}" for name, verb in verbs.items())
        sys.stdout.write(f"{USAGE}\n\nsub-verbs:\n{listed}\n\noptions: python -m cv_lightning data SUB-VERB --help\n")
        return 0 if argv else 2
    if argv[0] not in verbs:
        close = difflib.get_close_matches(argv[0], verbs, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"sub-verbs: {', '.join(verbs)}"
        sys.stderr.write(f"{USAGE}\nno sub-verb '{argv[0]}'; {hint}\n")
        return 2
    module, function = verbs[argv[0]].target.split(":")
    result: int = getattr(importlib.import_module(module), function)(argv[1:])
    return result
