"""Checks the keys and simple values of a command line and its configs in less than a second, before heavy imports.

It refuses only what the parser of `fit` would refuse. What the index of settings does not know, such as the arguments
of a user's class, is left to that parser.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from cv_lightning.command_line import underscored
from cv_lightning.early import check_early
from cv_lightning.given_settings import Given, Mistake, dotted, read_command, read_file, value_of
from cv_lightning.packaged import resolve_config
from cv_lightning.ranges import Range, out_of_range
from cv_lightning.renames import new_key
from cv_lightning.settings_index import Level, Setting, SettingsIndex, load, short_path

SHOWING = ("print_config", "help", "help_all", "help-all")
"""Flags that show something in place of a run."""
NO_SETTINGS = ("help", "print_config", "config", "help_all")
"""Flags of every parser."""
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
VERBS = ("fit", "validate", "test")
FILE_ENDINGS = (".yaml", ".yml", ".json")
NULLS = ("null", "Null", "NULL", "None", "none", "~", "")
SIMPLE = {"int": "a whole number", "float": "a number", "bool": "true or false"}
WORD = re.compile(r"[A-Za-z][A-Za-z_ -]*")
NUMBER_WORDS = ("nan", "inf", "infinity")
TRUTHS = ("true", "false", "yes", "no", "on", "off", "y", "n")
MAX_MISTAKES = 2
"""Mistakes that are described, one a line."""


class KeyMatch(NamedTuple):
    """What the index knows about a key."""

    key: tuple[str, ...]
    """Its parts, with `init_args` where a flag has left it out."""
    settings: tuple[Setting, ...] = ()
    """The setting, one for each class that may be meant; empty: a group, or left to the parser."""
    is_group: bool = False
    unknown: int = 0
    """Number of parts up to the first one that is not known; 0: all are, or may be."""
    siblings: Sequence[str] = ()
    """Names that are known in the unknown one's place."""
    owners: Sequence[str] = ()
    """Classes that were looked in."""


def check_command(verb: str, words: Sequence[str], runs: bool = False) -> str | None:
    """The first mistakes in the keys and configs of a command line.

    Args:
        verb: `fit`, `validate`, `test`, or a verb that takes their flags and some of its own.
        words: The command line behind it.
        runs: Also check what a run on this machine needs.

    Returns:
        At most three lines, without `error:`; None if there is nothing to say.
    """
    check = KeyCheck(load(), is_strict=verb in VERBS)
    if old := next(filter(None, map(check.renamed_flag, words)), None):
        return old
    try:
        said, values = check.said(list(read_command(words)))
    except Mistake as error:
        return str(error)
    shows_only = any(word.partition("=")[0].endswith(SHOWING) for word in words)
    return said or (check_early(verb, values) if runs and not shows_only else None)


class KeyCheck:
    """Compares keys with the index.

    Args:
        settings: The index.
        is_strict: The verb has no flags of its own.
    """

    def __init__(self, settings: SettingsIndex, is_strict: bool = True) -> None:
        self.settings = settings
        self.is_strict = is_strict
        self.chosen: dict[tuple[str, ...], set[str]] = {}
        """Classes that any source names, by key without `init_args`."""

    def renamed_flag(self, word: str) -> str | None:
        """An error about a flag that has another name today; those of a user's own callbacks look like some."""
        old = underscored(word.partition("=")[0], {}).removeprefix("--").removesuffix("+")
        new = new_key(old) if word.startswith("--") else old
        return f"--{old} is now --{new}" if new != old and not self.find(new.split(".")).unknown else None

    def said(self, given: Sequence[Given]) -> tuple[str | None, dict[str, Any]]:
        """The first mistakes, a line each; without any, the values of settings by whole key.

        Raises:
            Mistake: A file that a key names is not YAML, or has old keys.
        """
        every = list(self._with_files(given))
        for one in every:
            if one.text is not None:
                named = one.parts[:-1] if one.parts[-1] == "class_path" else one.parts
                self.chosen.setdefault(_plain(named), set()).add(one.text)
        unknown = list(dict.fromkeys(self._unknown(every)))
        if unknown:
            hint = f"`cv-lightning settings {unknown[0][1]}` searches all settings"
            return "\n".join([*(line for line, _ in unknown[:MAX_MISTAKES]), _more(len(unknown), hint)]), {}
        values, ranges = self.flat(every)
        wrong = [*dict.fromkeys(filter(None, map(self._wrong_value, every))), *out_of_range(values, ranges)]
        return "\n".join(filter(None, [*wrong[:MAX_MISTAKES], _more(len(wrong), "")])) or None, values

    def flat(self, given: Sequence[Given]) -> tuple[dict[str, Any], dict[str, Range]]:
        """The values of settings and classes by whole key (the last source has it), and the ranges that these have."""
        values: dict[str, Any] = {}
        ranges: dict[str, Range] = {}
        for one in given:
            found = self.find(one.parts)
            bounds = found.settings[0].range if found.settings else {}
            if found.settings or one.parts[-1] == "class_path":
                is_class = bool(found.settings and found.settings[0].classes) and one.text is not None
                key = dotted(found.key)
                values |= {f"{key}.class_path": one.text} if is_class else {}
                values[key] = number_of(value_of(one.node), found.settings)
                if values[key] is None:  # a later source switches the whole block off
                    values = {name: value for name, value in values.items() if not name.startswith(f"{key}.")}
                if bounds and all(setting.range == bounds for setting in found.settings):
                    ranges[key] = Range(**bounds)
        return values, ranges

    def find(self, parts: Sequence[str], any_class: bool = False) -> KeyMatch:
        """What the index knows about a key.

        Args:
            parts: The key.
            any_class: Look in all classes that may be named, not in those that are.
        """
        levels = [self.settings.root]
        owners: tuple[str, ...] = ()
        seen: tuple[str, ...] = ()
        rest = list(parts)
        while True:
            size, found = _match(levels, rest)
            if not found:
                is_class = bool(size) and rest[size - 1] in CLASS_KEYS
                unknown = len(parts) - len(rest) + size if size and not is_class else 0
                siblings = [name for level in levels for name in level.children(rest[: size - 1])] if size else ()
                return KeyMatch((*seen, *rest), (), not size, unknown, siblings, owners)
            seen, rest = (*seen, *rest[:size]), rest[size:]
            if rest and (found[0].many == "dict" or (found[0].many and rest[0].startswith("["))):
                seen = (*seen, rest.pop(0))
            if not rest:
                return KeyMatch(seen, () if seen[-1].startswith("[") else found, False, 0, (), owners)
            if rest[0] == "init_args" and any(setting.classes for setting in found):
                rest.pop(0)
            inner = None if rest and rest[0] in (*CLASS_KEYS, "help") else found
            paths = self._inner(inner, seen, any_class) if inner and rest else None
            if not paths:
                return KeyMatch((*seen, *rest))
            if found[0].classes:
                seen = (*seen, "init_args")
            levels, owners = [self.settings.classes[path] for path in paths], tuple(map(short_path, paths))

    def _inner(self, found: Sequence[Setting], seen: Sequence[str], any_class: bool) -> list[str] | None:
        """The classes in which the keys below a setting are looked up; None if others may be meant."""
        fields = [setting.fields for setting in found if setting.fields]
        known = [path for setting in found for path in setting.classes]
        if fields and not known:
            return list(dict.fromkeys(fields))
        if any_class:
            return known
        paths = [self.settings.class_named(name, known) for name in self.chosen.get(_plain(seen), ())]
        return None if None in paths else [path for path in dict.fromkeys(paths) if path]

    def _with_files(self, given: Sequence[Given]) -> Iterator[Given]:
        """All keys, with those of the files that some of them name."""
        for one in given:
            yield one
            name = one.text or ""
            if not name.endswith(FILE_ENDINGS) and (one.source or not name.startswith(f"{one.parts[-1]}/")):
                continue
            found = self.find(one.parts, any_class=True)
            if found.is_group or any(setting.fields or setting.classes for setting in found.settings):
                named = [one.folder / name, Path(name), *([] if one.source else filter(None, [resolve_config(name)]))]
                path = next((path for path in named if path.is_file()), None)
                if path is not None:
                    yield from self._with_files(list(read_file(path, one.parts)))
                elif found.is_group:
                    raise Mistake(f"{one.named(one.key)} is {name}: no such file")

    def _unknown(self, given: Sequence[Given]) -> Iterator[tuple[str, str]]:
        """Errors about unknown keys, with the word to search for."""
        reported: list[tuple[str, ...]] = []
        for one in given:
            is_other = one.parts[0] in (*NO_SETTINGS, *VERBS) or one.parts[-1] == "help"
            is_own_flag = not self.is_strict and not one.source and len(one.parts) == 1
            if is_other or any(one.parts[: len(known)] == known for known in reported):
                continue
            found = self.find(one.parts)
            if found.unknown and not is_own_flag and not self._is_negated(one):
                reported.append(one.parts[: found.unknown])
                yield self._describe(one, found), one.parts[found.unknown - 1]

    def _is_negated(self, one: Given) -> bool:
        """True for `--no_KEY` of a switch."""
        switch = self.find([one.parts[0].removeprefix("no_"), *one.parts[1:]]).settings
        return not one.source and any("bool" in setting.type for setting in switch)

    def _describe(self, one: Given, found: KeyMatch) -> str:
        *outer, name = one.parts[: found.unknown]
        key = one.named(dotted([*outer, name]))
        if others := self._other_owners(outer, name):
            place, chosen = dotted(outer).removesuffix(".init_args"), " or ".join(found.owners)
            return f"{key} is a setting of {' and '.join(others)}, and {place}.class_path is {chosen}"
        near = difflib.get_close_matches(name, found.siblings, 2, 0.7)
        keys = [dotted([*outer, sibling]) for sibling in near] or self.settings.close_keys(dotted([*outer, name]), 2)
        rest = one.parts[found.unknown :]
        keys = [dotted([key, *rest]) if self.find([*key.split("."), *rest]).settings else key for key in keys]
        flags = keys if one.source else [f"--{found}" for found in keys]
        of = f" of {' or '.join(found.owners)}" if found.owners else ""
        return f"{key} is not a setting{of}." + (f" Did you mean {' or '.join(flags)}?" if flags else "")

    def _other_owners(self, outer: Sequence[str], name: str) -> list[str]:
        """Classes which the config could name in place of its own, and that have the key."""
        while outer and outer[-1] == "init_args":
            outer = outer[:-1]
        known = [path for setting in self.find(outer).settings for path in setting.classes] if outer else []
        return [short_path(path) for path in known if name in self.settings.classes[path].children(())]

    def _wrong_value(self, one: Given) -> str | None:
        """An error about a value that its setting cannot have, if that is certain."""
        if one.text is None or not (found := self.find(one.parts)).settings:
            return None
        allowed = {_allowed(setting, one.text) for setting in found.settings}
        if None in allowed:
            return None
        near = difflib.get_close_matches(one.text, [str(v) for s in found.settings for v in s.values], 1)
        hint = f". Did you mean {near[0]}?" if near else ""
        return f"{one.named(one.key)} is {one.text!r}; it must be {' or '.join(sorted(filter(None, allowed)))}{hint}"


def _match(levels: Sequence[Level], rest: Sequence[str]) -> tuple[int, tuple[Setting, ...]]:
    """The setting that the first parts of a key name.

    Returns:
        The number of parts, and what the levels know about it; without any, the number of parts up to the unknown one,
        or 0 where all parts name a group.
    """
    for size in range(1, len(rest) + 1):
        name = ".".join(rest[:size])
        if found := tuple(level.settings[name] for level in levels if name in level.settings):
            return size, found
        if not any(name in level.groups for level in levels):
            return size, ()
    return 0, ()


def number_of(value: Any, settings: Sequence[Setting]) -> Any:
    """A value; as a number if its setting is one and YAML reads a text, as it does `1e-3`."""
    if isinstance(value, str) and any("float" in setting.type.split(" | ") for setting in settings):
        with suppress(ValueError):
            return float(value)
    return value


def _allowed(setting: Setting, text: str) -> str | None:
    """What a setting may be, if a text is certainly none of it."""
    if setting.open or setting.fields or setting.classes or (text in NULLS):
        return None
    if setting.values:
        values = [str(value) for value in setting.values]
        is_text = all(isinstance(value, str) for value in setting.values)
        return None if text in values or not is_text else f"one of {', '.join(values)}"
    kinds = [kind for kind in setting.type.split(" | ") if kind != "null"]
    if not all(kind in SIMPLE for kind in kinds) or not WORD.fullmatch(text):
        return None
    known = [*(TRUTHS if "bool" in kinds else ()), *(NUMBER_WORDS if "float" in kinds else ())]
    return None if text.lower() in known else " or ".join(SIMPLE[kind] for kind in kinds)


def _plain(parts: Sequence[str]) -> tuple[str, ...]:
    return tuple(part for part in parts if part != "init_args")


def _more(count: int, hint: str) -> str:
    more = f"{count - MAX_MISTAKES} more like this" if count > MAX_MISTAKES else ""
    return "; ".join(filter(None, [more, hint]))
