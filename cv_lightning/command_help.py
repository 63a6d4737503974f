"""The help of a verb: one line for each flag, values and defaults, and nested settings on demand."""

from __future__ import annotations

import dataclasses
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

HELP_ALL = "--help_all"
COLUMN, MAX_WIDTH = 30, 110
"""Where the descriptions begin, and the longest line."""
SENTENCE = re.compile(r"(?<=[^.]{3}\.)\s+(?=[A-Z`])")


class Flag(NamedTuple):
    """One flag as the help shows it."""

    name: str
    """Name of the setting, dotted."""
    left: str
    """The flag with its values."""
    text: str
    """The whole description."""
    default: Any
    required: bool


# ------------------------------------------------------------------------------------------------ types
def hint_of(action: Any) -> Any:
    """The type of a flag, or a type itself, without `None` and annotations; None where a flag has no type."""
    return _plain(getattr(action, "_typehint", None) if hasattr(action, "option_strings") else action)


def _plain(hint: Any) -> Any:
    """A type without `None` and without annotations."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return _plain(kinds[0]) if len(kinds) == 1 else hint
    return _plain(typing.get_args(hint)[0]) if typing.get_origin(hint) is typing.Annotated else hint


def is_switch(action: Any) -> bool:
    """True for a flag that needs no value."""
    return hint_of(action) is bool


def items_of(action: Any) -> bool:
    """True for a flag that takes a list."""
    return typing.get_origin(hint_of(action)) in (list, tuple)


def literals(action: Any) -> list[str]:
    """The values that a flag may have, where these are few."""
    hint = hint_of(action)
    if typing.get_origin(hint) in (list, tuple):
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is typing.Literal:
        return [str(value) for value in typing.get_args(hint)]
    return [str(value) for value in getattr(action, "choices", None) or ()]


def values(action: Any) -> str:
    """What stands behind a flag in the help: `N`, `{train,held_out}`, `FILE`."""
    hint, name = hint_of(action), action.dest.rpartition(".")[2]
    more = " ..." if items_of(action) else ""
    if choices := literals(action):
        return "{" + ",".join(choices) + "}" + more
    item = _plain(typing.get_args(hint)[0]) if more and typing.get_args(hint) else hint
    kind = getattr(item, "__name__", str(item)).lower()
    if kind == "bool":
        return "{true,false}"
    if "int" in kind:
        return "N" + more
    if "float" in kind:
        return ("SECONDS" if name.endswith("_s") and not name.endswith("_per_s") else "NUMBER") + more
    if kind in ("path", "str"):
        return _of_text(name, str(action.help).lower(), is_path=kind == "path") + more
    return "MAPPING" if kind in ("dict", "mapping") else "SETTINGS"


def _of_text(name: str, about: str, is_path: bool) -> str:
    """What a text or path is, by its name and its description."""
    if name.endswith("url"):
        return "URL"
    first = re.search(r"folder|file|page", about)
    if not is_path and not about.startswith(("folder", "model folder", "hugging face folder", "held-out files")):
        return "TEXT"
    return "FOLDER" if first and first[0] == "folder" else "FILE"


# ------------------------------------------------------------------------------------------------ flags
def flags_of(parser: Any, opened: Callable[[str], bool] = lambda name: True) -> Iterator[Flag]:
    """The flags of a parser but for help, config and what jsonargparse adds.

    Args:
        parser: The parser.
        opened: Says of a setting that may be left out as a whole whether its parts are listed; to read these may import
            torch.
    """
    defaults, titles = parser.get_defaults(), groups_of(parser)
    for action in parser._actions:
        if dataclasses.is_dataclass(hint := hint_of(action)) and type(action).__name__ == "ActionTypeHint":
            about = " ".join(str(action.help).split()).rstrip(".")
            if not opened(action.dest):
                about += f"; --{action.dest}.NAME for each of its settings, see {HELP_ALL}"
            yield Flag(action.dest, f"--{action.dest} FILE", about, None, False)
            if not opened(action.dest):
                continue
            inner = type(parser)()
            inner.add_class_arguments(hint, action.dest, sub_configs=True)
            yield from (flag._replace(required=False) for flag in flags_of(inner) if flag.name != action.dest)
            continue
        if not action.option_strings or type(action).__name__ not in ("ActionTypeHint", "_ActionConfigLoad"):
            continue
        flag = f"--{action.dest}"
        nested = type(action).__name__ == "_ActionConfigLoad"
        default = None if nested else defaults.get(action.dest)
        if nested:
            left = f"{flag} FILE"
        elif is_switch(action) and "." not in action.dest:
            left = f"{flag}, --no_{action.dest}" if default is True else flag
        else:
            left = f"{flag} {values(action)}"
        text = f"{titles.get(action.dest, action.dest)}, from a YAML file" if nested else str(action.help or "")
        text = " ".join(text.split())
        yield Flag(action.dest, left, text, default, action.dest in parser.needed)


def groups_of(parser: Any) -> dict[str, str]:
    """Titles of the nested settings by their first name."""
    found: dict[str, str] = {}
    for group in parser._action_groups:
        names = {action.dest.partition(".")[0] for action in group._group_actions if "." in action.dest}
        if len(names) == 1:
            found.setdefault(names.pop(), (group.title or "").rstrip(":. "))
    for action in parser._actions:
        if dataclasses.is_dataclass(hint_of(action)):
            found.setdefault(action.dest, str(action.help).rstrip(". "))
    return found


def usage(parser: Any) -> str:
    """One line: the verb, what it takes without a flag, and the flags it needs."""
    verb = getattr(parser, "verb", None)
    positional = dict(verb.positional) if verb else {}
    required = {flag.name: flag.left for flag in flags_of(parser, lambda name: False) if flag.required}
    words = [name if key in required else f"[{name}]" for key, name in positional.items()]
    words += [left for key, left in required.items() if key not in positional]
    return " ".join(["usage:", parser.prog, *words, "[flags]"]) + "\n"


# ------------------------------------------------------------------------------------------------ text
def help_text(parser: Any, everything: bool) -> str:
    """The help of a verb.

    Args:
        parser: Its parser.
        everything: Also list every nested setting, with its whole description.
    """
    verb = parser.verb
    width = min(shutil.get_terminal_size((100, 24)).columns, MAX_WIDTH)
    opened = {name.partition(".")[0] for name in verb.shown}
    flags = {flag.name: flag for flag in flags_of(parser, lambda name: everything or name in opened)}
    nested: dict[str, list[Flag]] = {}
    for name, flag in flags.items():
        nested.setdefault(name.partition(".")[0], []).append(flag)
    lines = [usage(parser).rstrip(), ""]
    for paragraph in re.split(r"\n\s*\n", parser.description.strip()):
        lines += [*textwrap.wrap(" ".join(paragraph.split()), width), ""]
    for key, name in verb.positional.items():
        lines += _entry(f"  {name}", flags[key], width, everything)
    titles = groups_of(parser)
    for name, members in nested.items():
        if name in verb.positional:
            continue
        if len(members) == 1:
            lines += _entry(f"  {members[0].left}", members[0], width, everything)
            continue
        if everything:
            lines += ["", *textwrap.wrap(f"{titles.get(name, name)}:", width)]
            for flag in members:
                lines += _entry(f"  {flag.left}", flag, width, everything)
            continue
        for flag in sorted((flag for flag in members if flag.name in verb.shown), key=lambda flag: flag.name):
            lines += _entry(f"  {flag.left}", flag, width, everything)
        if name not in verb.shown:
            title = titles.get(name, name)
            lines += _two_columns(f"  --{name}.*", f"{title}: {len(members) - 1} settings, see {HELP_ALL}", width)
    return "\n".join([*lines, "", *_footer(parser, width, everything)]) + "\n"


def _footer(parser: Any, width: int, everything: bool) -> list[str]:
    config = (
        "--config FILE (any of its flags in YAML), --print_config, "
        if "--config" in parser._option_string_actions
        else ""
    )
    text = f"Every verb also takes {config}--quiet and --verbose. Flags may be written with dashes, too."
    if not everything:
        text += f" {parser.prog} {HELP_ALL} shows every setting with its whole description."
    return textwrap.wrap(text, width)


def _entry(left: str, flag: Flag, width: int, whole: bool) -> list[str]:
    """Lines of one flag."""
    text = flag.text if whole else SENTENCE.split(flag.text)[0].rstrip(".;")
    text = text.rstrip(".")
    if flag.required:
        text += " (required)"
    elif not (flag.default is None or flag.default is False or flag.default in ("", [], {})):
        shown = "on" if flag.default is True else _shown(flag.default)
        text += f" (default: {shown})"
    return _two_columns(left, text, width)


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _two_columns(left: str, text: str, width: int) -> list[str]:
    wrapped = textwrap.wrap(text, width - COLUMN) or [""]
    if len(left) > COLUMN - 2:
        return [left, *(" " * COLUMN + line for line in wrapped)]
    return [f"{left:{COLUMN}}{wrapped[0]}".rstrip(), *(" " * COLUMN + line for line in wrapped[1:])]
