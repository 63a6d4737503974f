"""`cv-lightning VERB`, or `python -m cv_lightning VERB`: the dispatcher.

It imports what a verb needs once the verb is known.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from cv_lightning.command_help import HELP_ALL
from cv_lightning.command_line import find_verb
from cv_lightning.verbs import PROGRAM, VERBS, Verb


def main(argv: list[str]) -> int:
    """Run one verb.

    Args:
        argv: The command line without the program's name.

    Returns:
        The exit code; 2 if there is no such verb.
    """
    if argv[:1] == ["--version"]:
        from cv_lightning import __version__

        sys.stdout.write(f"cv_lightning {__version__}\n")
        return 0
    if argv[:1] == ["help"] and argv[1:]:
        argv = [*argv[1:], "--help"]
    found = find_command(argv)
    if isinstance(found, int):
        return found
    verb, name, rest = found
    from cv_lightning.environment import prepare_environment, set_up_logging, take_verbosity

    is_own = argv == sys.argv[1:]
    words = take_verbosity(rest)
    arguments: list[str] | None = words
    if verb.lightning:
        from cv_lightning.commands.settings import before_parsing

        if (code := before_parsing(name, words)) is not None:
            return code
        prepare_environment()
        argv = [name, *("--help" if word in ("--help-all", HELP_ALL) else word for word in words)]
        if is_own:  # ranks that Lightning starts read it, too
            sys.argv[1:] = argv
        arguments = None if is_own else argv  # Lightning reads sys.argv itself, and warns of a second command line
    set_up_logging()
    from cv_lightning.files import describe_disk_error

    try:
        result = verb.load()(arguments)
    except OSError as error:
        if not (said := describe_disk_error(error)):
            raise
        sys.stderr.write(f"error: {said}\n")
        return 1
    return result if isinstance(result, int) else 0


def find_command(argv: list[str]) -> tuple[Verb, str, list[str]] | int:
    """The verb, or sub-verb, that a command line names.

    Returns:
        The verb, its name in full, and the words after it; an exit code where help or an error was printed instead.
    """
    name = find_verb(argv, VERBS, PROGRAM)
    if isinstance(name, int):
        return name
    verb, rest = VERBS[name], argv[1:]
    if not verb.verbs:
        return verb, name, rest
    sub = find_verb(rest, verb.verbs, f"{PROGRAM} {name}")
    return sub if isinstance(sub, int) else (verb.verbs[sub], f"{name} {sub}", rest[1:])


def run() -> None:
    """Entry point of the installed script."""
    from cv_lightning.environment import use_current_folder, use_utf8

    use_utf8()
    use_current_folder()
    if "WANDB_SWEEP_ID" in os.environ and any(VERBS[word].lightning for word in sys.argv[1:2] if word in VERBS):
        sys.argv[1:] = agent_arguments(sys.argv[1:], os.environ)  # ranks that Lightning starts read it, too
    try:
        sys.exit(main(sys.argv[1:]))
    finally:
        _end_output()


def _end_output() -> None:
    """Write what is left of the output; a reader that has left, such as `head`, is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more


def agent_arguments(arguments: list[str], environment: Mapping[str, str]) -> list[str]:
    """The command line of a trial that W&B's agent started, as LightningCLI takes it.

    A resumed run may get `--_wandb={...}` (wandb#4237), which is left out. Each trial gets its own run folder, unless
    the command names one.
    """
    kept = [word for word in arguments if not word.startswith("--_wandb=")]
    sweep, run = environment.get("WANDB_SWEEP_ID"), environment.get("WANDB_RUN_ID")
    is_named = any(word.partition("=")[0] == "--trainer.default_root_dir" for word in kept)
    return kept if is_named or not (sweep and run) else [*kept, f"--trainer.default_root_dir=runs/sweeps/{sweep}/{run}"]


if __name__ == "__main__":
    run()
