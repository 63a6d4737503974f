"""The command line of the verbs: flags from types and docstrings, short errors, and lists of verbs."""

from __future__ import annotations

import difflib
import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from cv_lightning.packaged import resolve_words

EXTRAS = {"optuna": "sweep", "nicegui": "web"}
"""Packages that one verb alone needs, and the extra of pyproject.toml that installs them."""


class Verb(NamedTuple):
    """One command."""

    target: str
    """`module:function`, called with the list of arguments; an int that it returns is the exit code."""
    help: str
    """One line."""
    lightning: bool = False
    """LightningCLI's own subcommand: the verb is part of its arguments."""

    def load(self) -> Callable[[list[str] | None], Any]:
        """Import the function."""
        module, name = self.target.split(":")
        function: Callable[[list[str] | None], Any] = getattr(importlib.import_module(module), name)
        return function


def find_verb(argv: list[str], verbs: Mapping[str, Verb], prog: str, kind: str, about: str = "") -> Verb | int:
    """The verb that a command line begins with.

    Args:
        argv: The command line after `prog`.
        verbs: The verbs by name.
        prog: The command that has these verbs.
        kind: What the texts call them: `verb` or `sub-verb`.
        about: Lines of the help after the list.

    Returns:
        The verb; an exit code where the help, or an error, was printed instead.
    """
    usage = f"usage: {prog} {kind.upper()} [options]\n"
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, verbs))
        listed = "".join(f"  {name:{width}}  {verb.help}\n" for name, verb in verbs.items())
        about = f"options of a {kind}: {prog} {kind.upper()} --help\n{about}"
        sys.stdout.write(f"{usage}\n{kind}s:\n{listed}\n{about}")
        return 0 if argv else 2
    if argv[0] not in verbs:
        close = difflib.get_close_matches(argv[0], verbs, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"{kind}s: {', '.join(verbs)}"
        sys.stderr.write(f"{usage}no {kind} '{argv[0]}'; {hint}\n")
        return 2
    return verbs[argv[0]]


class ShortErrors:
    """Mixin for a parser: packaged configs have names, its usage is one line, a config that does not exist is named."""

    prog: str

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        """Parse a command line that may name packaged configs."""
        words = resolve_words(sys.argv[1:] if args is None else args)
        return super().parse_args(words, *rest, **options)  # type: ignore[misc]

    def print_usage(self, file: Any = None) -> None:
        """Print one line."""
        (file or sys.stdout).write(f"usage: {self.prog.replace(' [options]', '')} [options]\n")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with 2."""
        files = re.findall(r"Unable to load config [\"'](.+?)[\"']", message)
        if missing := [name for name in files if not Path(name).exists()]:
            message = f"{message.splitlines()[0]} no such file: {missing[0]}"
        super().error(message, ex)  # type: ignore[misc]
        raise AssertionError("the parser's own error ends the program")


def short_parser(**options: Any) -> Any:
    """A jsonargparse parser with short errors, whose flags are described by the docstrings of attributes."""
    return _parser_class()(**options)


def _parser_class() -> Any:
    import jsonargparse

    class Parser(ShortErrors, jsonargparse.ArgumentParser):
        pass

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return Parser


def run_verb(
    component: Any,
    args: list[str] | None,
    prog: str,
    run: Callable[[Any], Any] | None = None,
    *,
    failed: int = 2,
    leading: str = "",
    aliases: Mapping[str, str] | None = None,
    **options: Any,
) -> int:
    """Run a verb.

    Flags may have dashes (`--per-kind`), switches need no value (`--json`), and lists are words (`--seeds 0 1`).

    Args:
        component: A function, or functions by sub-verb, whose arguments are the flags; or a config's class.
        args: The command line without the program's name; None: `sys.argv[1:]`.
        prog: The verb, for messages.
        run: Takes the object where `component` is a class. An int that it or the function returns is the exit code.
        failed: Exit code after an error that a user can act on.
        leading: Name of the flag that words before the first flag are values of.
        aliases: Other spellings of flags.
        options: Options of `jsonargparse.auto_cli`.

    Returns:
        The exit code.
    """
    import jsonargparse

    from cv_lightning.types import CVLightningError

    words = list(sys.argv[1:] if args is None else args)
    if leading and words and not words[0].startswith("-"):
        words = [f"--{leading}", *words]
    words = spelled_out(words, component, aliases or {})
    if isinstance(component, type):
        options["return_instance"] = True  # otherwise its public methods would be subcommands
    if leading or isinstance(component, type):
        options["as_positional"] = False
    try:
        result = jsonargparse.auto_cli(component, args=words, prog=prog, parser_class=_parser_class(), **options)
        result = run(result) if run else result
    except (CVLightningError, ValueError, OSError, ImportError) as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0]) if isinstance(error, ImportError) else None
        print(f"error: {error}" + (f": pip install 'cv-lightning[{extra}]'" if extra else ""), file=sys.stderr)
        return failed
    except KeyboardInterrupt:
        return 130
    return result if isinstance(result, int) else 0


def spelled_out(args: list[str], component: Any, aliases: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """A command line in the form of jsonargparse: flags with underscores, switches and lists with one value."""
    parts = reversed(component.__mro__) if isinstance(component, type) else [component]
    hints = {name: str(hint) for part in parts for name, hint in getattr(part, "__annotations__", {}).items()}
    found: list[str] = []
    left = list(args)
    while left:
        flag, equals, value = left.pop(0).partition("=")
        flag = aliases.get(flag, flag)
        if flag.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
        hint = hints.get(flag[2:], "")
        if hint in ("bool", str(bool)) and not equals and not (left and left[0].lower() in ("true", "false")):
            equals, value = "=", "true"
        if hint.startswith("list[") and not equals:
            end = next((at for at, word in enumerate(left) if word.startswith("-")), len(left))
            words, left = left[:end], left[end:]
            is_list = len(words) == 1 and words[0].startswith("[")
            equals, value = "=", words[0] if is_list else json.dumps(words)
        found.append(flag + equals + value)
    return found
