"""`python -m cv_lightning data SUB-VERB`: inspect, build and export data sets; imports what a sub-verb needs."""

from __future__ import annotations

from cv_lightning.command_line import Verb, find_verb

SUB_VERBS = {
    "show": Verb("cv_lightning.commands.data_show:main", "print one conversation with its tokens, mask and images"),
    "check": Verb("cv_lightning.commands.data_check:main", "report what files hold and whether they will train"),
    "export": Verb("cv_lightning.commands.data_export:main", "write the embedded digits as RL Parquet or SFT JSON"),
    "build-sft": Verb("cv_lightning.commands.data_build:build_sft", "make SFT conversations from a table of VQA"),
    "build-rl": Verb("cv_lightning.commands.data_build:build_rl", "make RL tasks from a table of VQA"),
    "corrupt": Verb("cv_lightning.commands.data_build:corrupt", "turn and corrupt a benchmark, boxes mapped along"),
}


def main(argv: list[str]) -> int:
    """Run one sub-verb; returns the exit code."""
    verb = find_verb(argv, SUB_VERBS, "python -m cv_lightning data", "sub-verb")
    return verb if isinstance(verb, int) else int(verb.load()(argv[1:]))
