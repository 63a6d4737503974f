"""What the verbs' command lines share: flags from types and docstrings, and errors not buried under a usage text."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

EXTRAS = {"optuna": "sweep", "nicegui": "web"}
"""The extra of pyproject.toml that installs a package which one verb alone needs."""


class ShortErrors:
    """For a parser class: one line of usage, and a file that is not there is named as such."""

    prog: str

    def print_usage(self, file: Any = None) -> None:
        """One line."""
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


def read_command_line(component: Any, args: list[str] | None, prog: str, **options: Any) -> Any:
    """What `jsonargparse.auto_cli` makes of a command line: an object of a config's class, or a function's result.

    Flags may have dashes (`--per-kind`), switches come without a value (`--json`), lists as words (`--seeds 0 1`).

    Args:
        component: the class or function, or several by name.
        args: the command line without the program's name; None: `sys.argv[1:]`.
        prog: the verb, for messages.
        options: further ones of `auto_cli`.
    """
    import jsonargparse

    words = spelled_out(sys.argv[1:] if args is None else args, component)
    return jsonargparse.auto_cli(component, args=words, prog=prog, parser_class=_parser_class(), **options)


def spelled_out(args: list[str], component: Any) -> list[str]:
    """A command line as jsonargparse takes it: flags with underscores, switches and lists with one value."""
    hints = getattr(component, "__annotations__", {})
    switches = {f"--{name}" for name, kind in hints.items() if kind in ("bool", bool)}
    lists = {f"--{name}" for name, kind in hints.items() if str(kind).startswith("list[")}
    found: list[str] = []
    left = list(args)
    while left:
        flag, equals, value = left.pop(0).partition("=")
        if flag.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
        if flag in switches and not equals and not (left and left[0].lower() in ("true", "false")):
            equals, value = "=", "true"
        if flag in lists and not equals:
            end = next((at for at, word in enumerate(left) if word.startswith("-")), len(left))
            words, left = left[:end], left[end:]
            is_list = len(words) == 1 and words[0].startswith("[")
            equals, value = "=", words[0] if is_list else json.dumps(words)
        found.append(flag + equals + value)
    return found


def run_verb(component: Any, args: list[str] | None, prog: str, failed: int = 2, **options: Any) -> int:
    """Run a verb that is a typed function.

    Args:
        component: the function, whose arguments are the flags; an int that it returns is the exit code.
        args: the command line without the program's name; None: `sys.argv[1:]`.
        prog: the verb, for messages.
        failed: exit code where it raises one of the errors that a user can act on.
        options: further ones of `auto_cli`.

    Returns:
        The exit code.
    """
    from cv_lightning.types import CVLightningError

    try:
        result = read_command_line(component, args, prog, **options)
    except (CVLightningError, ValueError, OSError, ImportError) as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0]) if isinstance(error, ImportError) else None
        print(f"error: {error}" + (f": pip install 'cv-lightning[{extra}]'" if extra else ""), file=sys.stderr)
        return failed
    except KeyboardInterrupt:
        return 130
    return result if isinstance(result, int) else 0
