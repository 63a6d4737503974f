"""The command line of the verbs: flags from types and docstrings, one spelling of them, and errors of two lines."""

from __future__ import annotations

import difflib
import json
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from cv_lightning.command_help import HELP_ALL, help_text, hint_of, is_switch, items_of, literals, usage, values
from cv_lightning.files import write_json
from cv_lightning.packaged import resolve_words
from cv_lightning.verbs import HINTS, PROGRAM, Verb, find

EXTRAS = {"optuna": "sweep", "nicegui": "web"}
"""Packages that one verb alone needs, and the extra of pyproject.toml that installs them."""
FREE_KEYS = ("task_types", "dict_kwargs")
"""Settings whose keys are the user's own words, in which a dash stays a dash."""


def find_verb(argv: list[str], verbs: Mapping[str, Verb], prog: str) -> str | int:
    """The name of the verb, or sub-verb, that a command line begins with.

    Args:
        argv: The command line after `prog`.
        verbs: The verbs by name.
        prog: The command that has these verbs.

    Returns:
        The name; an exit code where the list of verbs, or an error, was printed instead.
    """
    kind = "verb" if prog == PROGRAM else "sub-verb"
    line = f"usage: {prog} {kind.upper()} [flags]\n"
    if not argv or argv[0] in ("-h", "--help", HELP_ALL, "--help-all", "help"):
        sys.stdout.write(line + list_of_verbs(verbs, prog, kind))
        return 0 if argv else 2
    names = {name: name for name in verbs} | {other: name for name, verb in verbs.items() for other in verb.also}
    if argv[0] in names:
        return names[argv[0]]
    close = difflib.get_close_matches(argv[0], names, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"{kind}s: {', '.join(verbs)}"
    hint = HINTS.get(argv[0].lower(), hint) if kind == "verb" else hint
    sys.stderr.write(f"{line}error: there is no {kind} '{argv[0]}'; {hint}\n")
    return 2


def list_of_verbs(verbs: Mapping[str, Verb], prog: str, kind: str) -> str:
    """The list of verbs by job, as the help shows it."""
    listed: dict[str, list[tuple[str, str]]] = {}
    for name, verb in verbs.items():
        entries = [(f"{name} {sub}", found.help) for sub, found in verb.verbs.items()]
        if verb.job or kind == "sub-verb":
            listed.setdefault(verb.job, []).extend(entries or [(", ".join([name, *verb.also]), verb.help)])
    width = max(len(name) for entries in listed.values() for name, _ in entries)
    lines = []
    for job, entries in listed.items():
        lines += [f"{job}:"] if job else []
        lines += [f"  {name:{width}}  {text}" for name, text in entries]
    return "\n".join(
        [
            "",
            *lines,
            "",
            f"{prog} {kind.upper()} --help shows the flags of a {kind}, with their values and defaults.",
            "Every verb takes --quiet (warnings and results only) and --verbose (everything, libraries too).",
            "",
        ]
    )


# ------------------------------------------------------------------------------------------------ parsers
class ShortErrors:
    """Mixin for a parser: flags in both spellings, switches without a value, errors of a few lines."""

    prog: str
    exit_on_error: bool
    _option_string_actions: dict[str, Any]

    def parse_args(self, args: Iterable[str] | None = None, *others: Any, **options: Any) -> Any:
        """Parse a command line in which flags may have dashes, switches no value, and packaged configs a name."""
        words = resolve_words(spelled_out(list(sys.argv[1:] if args is None else args), self))
        return super().parse_args(words, *others, **options)  # type: ignore[misc]

    def print_usage(self, file: Any = None) -> None:
        """Print one line."""
        (file or sys.stdout).write(f"usage: {self.prog.replace(' [options]', '')} [flags]\n")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with 2."""
        if not self.exit_on_error:  # the parser of a class within another one, which says more itself
            super().error(message, ex)  # type: ignore[misc]
        parser = getattr(ex, "subcommand_parser", None) or self
        parser.print_usage(sys.stderr)
        sys.stderr.write(f"error: {plain_error(message, parser)}\n")
        raise SystemExit(2)


class VerbParser:
    """Mixin for the parser of a verb: usage and help in our form."""

    verb = Verb("", "")
    needed: frozenset[str] = frozenset()
    """Names of the flags without a default."""
    prog: str

    def print_usage(self, file: Any = None) -> None:
        """Print one line."""
        (file or sys.stdout).write(usage(self))

    def format_help(self, formatter: Any = None) -> str:
        """The short help: all flags but those of nested settings."""
        return help_text(self, everything=False)


def short_parser(**options: Any) -> Any:
    """A jsonargparse parser with short errors, whose flags are described by the docstrings of attributes."""
    return _parser_class()(**options)


def _parser_class() -> Any:
    import jsonargparse

    class Parser(VerbParser, ShortErrors, jsonargparse.ArgumentParser):
        pass

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return Parser


def verb_parser(component: Any, name: str, takes_config: bool = True) -> Any:
    """The parser of a verb.

    Args:
        component: A function whose arguments are the flags, or a config's class whose fields are.
        name: The verb's full name, as in the table.
        takes_config: `--config` is a file with the verb's own flags.
    """
    parser = short_parser(prog=f"{PROGRAM} {name}", allow_abbrev=False)
    parser.verb = find(name)
    if takes_config:
        parser.add_argument("--config", action="config", help="YAML file with any of the flags.")
    add = parser.add_class_arguments if isinstance(component, type) else parser.add_function_arguments
    add(component, as_group=False, as_positional=False, sub_configs=True, fail_untyped=True)
    parser.needed = frozenset(action.dest for action in parser._actions if action.required)
    about = (component.__doc__ or "").partition("\n\n    Args:")[0]
    if isinstance(component, type):  # its docstring begins with what the object is, not with what the verb does
        help_line = parser.verb.help
        about = f"{help_line[0].upper()}{help_line[1:]}. {about.partition('.')[2].lstrip(' ')}"
    parser.description = about
    return parser


def run_verb(
    component: Any,
    args: list[str] | None = None,
    name: str = "",
    run: Callable[[Any], Any] | None = None,
    *,
    prepare: Callable[[Any, list[str]], None] | None = None,
    takes_config: bool = True,
) -> int:
    """Run a verb.

    Flags may have dashes or underscores (`--per-kind`), switches need no value (`--smoke`, or `--smoke false`), lists
    are words (`--seeds 0 1`), and words without a flag are the verb's positional arguments.

    Args:
        component: A function whose arguments are the flags, or a config's class whose fields are.
        args: The command line without the program's name; None: `sys.argv[1:]`.
        name: The verb's full name, as in the table: `data check`.
        run: Takes the object where `component` is a class. An int that it or the function returns is the exit code.
        prepare: Called with the parser and the words before these are parsed; may set other defaults.
        takes_config: `--config` is a file with the verb's own flags.

    Returns:
        The exit code; 2 after an error that a user can act on.
    """
    from cv_lightning.types import CVLightningError

    words = list(sys.argv[1:] if args is None else args)
    try:
        given = arguments(component, words, name, prepare, takes_config)
        if given is None:
            return 0
        result = component(**given)
        result = run(result) if run else result
    except (CVLightningError, ValueError, OSError, ImportError) as error:
        print(f"error: {said(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return result if isinstance(result, int) else 0


def arguments(
    component: Any,
    words: list[str],
    name: str,
    prepare: Callable[[Any, list[str]], None] | None = None,
    takes_config: bool = True,
) -> dict[str, Any] | None:
    """The arguments of a verb's function or class; None where the help was asked for and printed."""
    parser = verb_parser(component, name, takes_config)
    if asked := {"-h", "--help", HELP_ALL, "--help-all"} & set(words):
        print(help_text(parser, everything=not asked <= {"-h", "--help"}), end="")
        return None
    words = spelled_out(words, parser, parser.verb)
    if prepare:
        prepare(parser, words)
    built = parser.instantiate(parser.parse_args(words))
    names = dict.fromkeys(action.dest for action in parser._actions if "." not in action.dest)
    return {name: built[name] for name in names if name in built and name != "config"}


def put_json(file: Path | None, value: Any) -> bool:
    """Write what `--json FILE` asks for; `-` prints it.

    Returns:
        True if it was printed, so that nothing else should be.
    """
    if file is None:
        return False
    if str(file) == "-":
        print(json.dumps(value, indent=1))
        return True
    write_json(file, value)
    return False


def said(error: Exception) -> str:
    """What an error says to a user."""
    if isinstance(error, ImportError):
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        return f"{error}: pip install 'cv-lightning[{extra}]'" if extra else str(error)
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename}: no such file or folder"
    return str(error)


# ------------------------------------------------------------------------------------------------ words
def spelled_out(words: list[str], parser: Any, verb: Verb | None = None) -> list[str]:
    """A command line in the form of jsonargparse: flags with underscores, each with its value behind an `=`.

    Args:
        words: The command line.
        parser: Parser that knows the flags.
        verb: The verb whose positional arguments and short flags are meant; None: words without a flag stay in place,
            and flags that the parser does not know are left to it.
    """
    options: Mapping[str, Any] = parser._option_string_actions
    found: list[str] = []
    lists: dict[str, list[list[str]]] = {}
    loose: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("-") or _is_number(word):
            (loose if verb else found).append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = underscored((verb.short if verb else {}).get(flag, flag), options)
        action = options.get(flag)
        opposite = options.get(f"--{flag[5:]}") if action is None and flag.startswith("--no_") else None
        if is_switch(action or opposite):
            if not equals:
                value = left.pop(0) if left and left[0].lower() in ("true", "false", "null") else "true"
            if opposite:
                flag, value = f"--{flag[5:]}", {"true": "false", "false": "true"}.get(value.lower(), value)
            found.append(f"{flag}={value.lower()}")
        elif verb is None:
            found.append(flag + equals + value)
        elif action is not None and items_of(action) and not flag.endswith("+"):
            given = [value] if equals else _taken(left)
            lists.setdefault(flag, []).append(given)
        elif getattr(action, "nargs", None) == 0 or flag in ("--print_config", "-h"):
            found.append(flag + equals + value)
        else:
            if action is None:
                _check_known(flag, parser)
            if not equals and left and not (left[0].startswith("--") and left[0] != "--"):
                equals, value = "=", left.pop(0)
            found.append(flag + equals + value)
    if verb:
        found += _positional(loose, verb, parser, {word.partition("=")[0] for word in found} | set(lists))
    return found + [f"{flag}={_list_text(given)}" for flag, given in lists.items()]


def split_words(words: list[str], parser: Any) -> tuple[list[str], list[str]]:
    """The words of a parser's own flags, and all others."""
    options: Mapping[str, Any] = parser._option_string_actions
    own: list[str] = []
    others: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        flag, equals, _ = word.partition("=")
        action = options.get(underscored(flag, options))
        is_own = action is not None or flag in ("--help-all", HELP_ALL)
        (own if is_own else others).append(word)
        has_value = left and (left[0].lower() in ("true", "false") if is_switch(action) else left[0][:2] != "--")
        if action is not None and action.nargs != 0 and not equals and has_value:
            own.append(left.pop(0))
    return own, others


def underscored(flag: str, options: Mapping[str, Any]) -> str:
    """A flag in the spelling of the settings; `--max-pixels` is `--max_pixels`."""
    if flag in options or not flag.startswith("--") or "-" not in flag[2:]:
        return flag
    parts = flag[2:].split(".")
    kept = [
        part if before in FREE_KEYS else part.replace("-", "_")
        for before, part in zip(["", *parts[:-1]], parts, strict=True)
    ]
    return "--" + ".".join(kept)


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-\.?\d.*", word) is not None or word == "-"


def _taken(left: list[str]) -> list[str]:
    """Take the words up to the next flag."""
    end = next((at for at, word in enumerate(left) if word.startswith("-") and not _is_number(word)), len(left))
    words = left[:end]
    del left[:end]
    return words


def _list_text(given: list[list[str]]) -> str:
    """A list for jsonargparse: one that is written as `[a, b]` as it stands, words as JSON."""
    if len(given) == 1 and len(given[0]) == 1 and given[0][0].startswith("["):
        return given[0][0]
    return json.dumps([word for words in given for word in words])


def _positional(loose: list[str], verb: Verb, parser: Any, given: set[str]) -> list[str]:
    """Words without a flag as flags, in the order of the verb's table."""
    found, left = [], list(loose)
    for name in verb.positional:
        flag = f"--{name}"
        if not left or flag in given:
            continue
        is_list = items_of(parser._option_string_actions[flag])
        words, left = (left, []) if is_list else (left[:1], left[1:])
        found.append(f"{flag}={_list_text([words]) if is_list else words[0]}")
    if left:
        names = " ".join(verb.positional.values())
        takes = f"takes {names}, and nothing more without a flag" if names else "takes flags only"
        parser.error(f"unexpected '{left[0]}': {parser.prog} {takes}")
    return found


# ------------------------------------------------------------------------------------------------ errors
def _check_known(flag: str, parser: Any) -> None:
    """Refuse a flag that is neither known nor inside a known one."""
    options = parser._option_string_actions
    parts = flag.rstrip("+").split(".")
    parents = [".".join(parts[:end]) for end in range(1, len(parts))]
    if flag.rstrip("+") not in options and not any(_holds_settings(options.get(parent)) for parent in parents):
        close = closest(flag, parser)
        hint = f"did you mean {close}?" if close else f"{parser.prog} --help lists the flags"
        parser.error(f"there is no flag {flag}; {hint}")


def _holds_settings(action: Any) -> bool:
    """True for a flag whose value is a class or a mapping that the parser does not list flag by flag."""
    return action is not None and type(action).__name__ == "ActionTypeHint" and not is_switch(action)


def closest(flag: str, parser: Any) -> str:
    """The flag that a mistyped one is closest to; empty where none is close."""
    known = [name for name in parser._option_string_actions if name.startswith("--") and not name.endswith("+")]
    return next(iter(difflib.get_close_matches(flag, known, n=1, cutoff=0.7)), "")


REQUIRED = re.compile(r"the following arguments are required: (.+)")
NO_VALUE = re.compile(r"argument (\S+?)(?:/\S+)?: expected (?:one|at least one) argument")
BAD_VALUE = re.compile(r"Parser key \"(.+?)\":\s*(.*)", re.DOTALL)
WANTED = re.compile(r"Expected (?:an?|one of) (.+?)(?:\.|$)", re.MULTILINE)
GIVEN = re.compile(r"(?:Got|Given) value: (.*)")


def plain_error(message: str, parser: Any) -> str:
    """A parser's message with the flag it is about, in at most two lines."""
    files = re.findall(r"(?:Unable to load config|File does not exist:?) [\"'](.+?)[\"']", message)
    if missing := [name for name in files if not Path(name).exists()]:
        return f"no such file: {missing[0]}"
    verb: Verb | None = getattr(parser, "verb", None)
    if found := REQUIRED.search(message):
        names = [re.sub(r"^(fit|validate|test)\.", "", name.strip()) for name in found[1].split(",")]
        shown = [(verb.positional if verb else {}).get(name) or f"--{name}" for name in names]
        return f"{' and '.join(shown)} {'is' if len(shown) == 1 else 'are'} missing; {parser.prog} --help explains"
    if found := NO_VALUE.search(message):
        return f"{found[1]} needs a value{_values(found[1], parser)}"
    if verb and (found := BAD_VALUE.search(message)) and (given := GIVEN.findall(found[2])):
        name = verb.positional.get(found[1], f"--{found[1]}")
        return f"{name} {given[-1]}: {_wanted(found[2], f'--{found[1]}', parser)} is wanted"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return "\n".join(lines[:2] if verb else lines)


def _values(flag: str, parser: Any) -> str:
    action = parser._option_string_actions.get(flag)
    return f": {values(action)}" if action is not None else ""


TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "Path": "a path", "str": "text"}


def _wanted(message: str, flag: str, parser: Any) -> str:
    """The expected type in words."""
    action = parser._option_string_actions.get(flag)
    if action is not None:
        if choices := literals(action):
            return f"one of {', '.join(choices)}"
        hint, several = hint_of(action), " each" if items_of(action) else ""
        item = hint_of(typing.get_args(hint)[0]) if several and typing.get_args(hint) else hint
        if (name := getattr(item, "__name__", "")) in TYPES:
            return TYPES[name] + several
    found = WANTED.search(message)
    return found[1] if found else "another value"
