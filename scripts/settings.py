"""Writes the index of settings, `cv_lightning/settings_index.json`, and `docs/settings.md` from it.

    python scripts/settings.py             write both
    python scripts/settings.py --check     say whether they are those of the code

Keys, types, defaults and docstrings are those of the parsers of fit, validate and test. Each class that a key can name
is listed with its own settings. Lightning's settings come without its docstrings, except for the ones described here.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import jsonargparse
from jsonargparse._actions import _ActionConfigLoad
from jsonargparse._common import is_subclasses_disabled
from jsonargparse._typehints import ActionTypeHint, get_all_subclass_paths

from cv_lightning import cli, settings_index
from cv_lightning.commands.settings import bounds, by_section, of_jobs
from cv_lightning.ranges import declared_ranges
from cv_lightning.settings_index import Entry, SettingsIndex, shown

PACKAGE = "cv_lightning"
DOCS = Path(__file__).parents[1] / "docs" / "settings.md"
ROOMS = (
    *("digits.modules", "loggers", "loggers.wandb", "strategies", "rewards", "tools", "rl.losses", "data.benchmarks"),
    *("models.adapters.qwen2_5_vl", "models.adapters.qwen3_vl"),
)
"""Modules that define classes for keys and that the command line imports only when one is named."""
OURS = {
    "model": "What is trained, by class_path: SFTModule or GRPOModule.",
    "data": "The data, by class_path: TaskDataModule (Parquet, for RL), SFTDataModule (JSON), or your own.",
    "seed_everything": "Seed of the run: weights, order of the data, sampling. True: a random one.",
    "ckpt_path": "Checkpoint to resume from: a path; `last`: the run's newest, or an error; `auto`: that, or none.",
    "weights_only": "Refuse a checkpoint that holds more than tensors and plain values.",
    "verbose": "Print the metrics of the evaluation.",
    "trainer.accelerator": "Where it runs: `auto`, `cpu` or `gpu`.",
    "trainer.devices": "GPUs (or CPU ranks) on a node: a number, a list of their indices, or `auto`.",
    "trainer.num_nodes": "Number of nodes.",
    "trainer.strategy": "How ranks share the model: `auto`, `ddp`, or a class such as `ZeroStrategy`.",
    "trainer.precision": "Precision of the trainer; leave it out, `model.init_args.policy.dtype` determines it.",
    "trainer.logger": "Loggers beside metrics.csv; false or true: none.",
    "trainer.callbacks": "Further callbacks, by class_path. Those of every run have keys of their own.",
    "trainer.max_epochs": "Leave it at 1: num_iterations or num_steps of the data is the length of the run.",
    "trainer.max_steps": "Stop after this many optimizer steps; -1: no limit.",
    "trainer.max_time": "Stop after this time, DD:HH:MM:SS.",
    "trainer.limit_train_batches": "Train on this many batches: a number, or a fraction.",
    "trainer.limit_val_batches": "Validate on this many batches: a number, or a fraction.",
    "trainer.limit_test_batches": "Test on this many batches: a number, or a fraction. A later test continues.",
    "trainer.val_check_interval": "Validate after this many training batches.",
    "trainer.log_every_n_steps": "Write metrics every so many optimizer steps.",
    "trainer.enable_checkpointing": "False: write no checkpoint.",
    "trainer.enable_progress_bar": "False: print no progress.",
    "trainer.default_root_dir": "The run's folder: metrics, checkpoints, trajectories, config.",
}
"""Texts about the settings of Lightning that users set."""
UNLISTED = ("trainer.callbacks", "trainer.plugins")
"""Keys whose classes of the package are not for users, or have keys of their own."""
BASES = (
    "cv_lightning.modules.base.PolicyModule",
    "cv_lightning.rewards.RewardTerm",
    "cv_lightning.loggers.MetricsLogger",
)
"""Classes that a config does not name."""


PAGE_HEAD = """# Settings

After this page you know every setting of `fit`, `validate` and `test`: its type, default and meaning.

```bash
cv-lightning settings clip            # searches keys and docstrings
cv-lightning fit --help               # the short list below
```

A setting has the same key in a config (nested) and on the command line (dotted). `model.init_args.optimizer.lr` is

```yaml
model:
  init_args:
    optimizer: {lr: 1.0e-5}
```

and `--model.init_args.optimizer.lr 1.0e-5`. `[]` stands for an entry of a list; names in parentheses are
the classes that have the setting. A class is named by its `class_path`, by its bare name if the package has it; classes
of your own have their own `init_args` ([extending.md](extending.md)).

## What matters first"""
PAGE_ALL = """
## All settings

`rollout.sampling.temperature`, `rollout.agent.prompt` and `rollout.agent.tools` also set the module's arguments of
the same names, which cannot be set themselves. `fit --help_all` has the texts of
Lightning's settings that have none here."""
PAGE_CLASSES = """
## Classes
"""


class Parsers(Exception):
    """Carries the parsers of the verbs out of LightningCLI before it parses anything."""


class ParsersOnly(cli.CVLightningCLI):
    """Makes the parsers and stops."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Stop.

        Raises:
            Parsers: Always.
        """
        raise Parsers(self._subcommand_parsers)


def verb_parsers() -> dict[str, jsonargparse.ArgumentParser]:
    """The parsers of fit, validate and test."""
    for room in ROOMS:
        importlib.import_module(f"{PACKAGE}.{room}")
    try:
        cli.main(["fit"], ParsersOnly)
    except Parsers as found:
        parsers: dict[str, jsonargparse.ArgumentParser] = found.args[0]
        return parsers
    raise AssertionError("LightningCLI made no parsers")


class Index:
    """Collects the settings of the verbs and of every class that they can name."""

    def __init__(self) -> None:
        self.classes: dict[str, dict[str, Any]] = {}

    def make(self) -> dict[str, Any]:
        """The index: settings by verb, and by class."""
        jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
        verbs = {verb: self.settings_of(parser) for verb, parser in verb_parsers().items()}
        first, *others = verbs.values()
        shared = {key: value for key, value in first["settings"].items() if all(key in o["settings"] for o in others)}
        own = {verb: {k: v for k, v in found["settings"].items() if k not in shared} for verb, found in verbs.items()}
        root = {"settings": shared, "groups": first["groups"]}
        for source, target in cli.LINKS.items():
            part, _, name = target.partition(".init_args.")
            for path in shared[part]["classes"]:
                if name in self.classes[path]["settings"]:
                    self.classes[path]["settings"][name]["set_by"] = source
        return {"root": root, "verbs": own, "classes": dict(sorted(self.classes.items()))}

    def settings_of(self, parser: jsonargparse.ArgumentParser, kind: type | None = None) -> dict[str, Any]:
        """Settings and groups of the parser of a verb, or of a class, by dotted key."""
        owners = {action.dest: action.basetype for action in parser._actions if isinstance(action, _ActionConfigLoad)}
        groups, owners[""] = list(owners), kind
        settings = {}
        for action in parser._actions:
            if isinstance(action, ActionTypeHint):
                outer, _, name = action.dest.rpartition(".")
                settings[action.dest] = self.setting(action) | range_in(owners.get(outer), name)
        return {"settings": settings, "groups": groups}

    def setting(self, action: ActionTypeHint) -> dict[str, Any]:
        """What is known about one key."""
        hint = action._typehint
        found = {"type": type_text(hint), "default": plain(action.default), "doc": self.doc(action)}
        if choices := values_of(hint):
            found["values"] = choices
        for kind in classes_in(hint):
            if is_subclasses_disabled(kind):
                found["fields"] = self.add(kind)
            elif action.dest not in UNLISTED and (names := own_classes(kind)):
                found["classes"] = sorted({*found.get("classes", []), *(self.add(by_path(name)) for name in names)})
            else:
                found["open"] = True
        if many := container_of(hint):
            found["many"] = many
        return found

    def doc(self, action: ActionTypeHint) -> str:
        """The docstring of a key on one line; our own text for Lightning's."""
        text = action.help if isinstance(action.help, str) else ""
        if action.dest in OURS or action.dest.startswith("trainer."):
            text = OURS.get(action.dest, "")
        return " ".join(text.replace("%%", "%").split())

    def add(self, kind: type) -> str:
        """Add a class; its path as YAML names it."""
        path = str(jsonargparse._util.get_import_path(kind))
        if path not in self.classes:
            self.classes[path] = {}
            parser = jsonargparse.ArgumentParser(exit_on_error=False)
            parser.add_class_arguments(kind, None, sub_configs=True, fail_untyped=False)
            doc = inspect.getdoc(kind) or ""
            self.classes[path] = {"doc": " ".join(doc.split("\n\n")[0].split()), **self.settings_of(parser, kind)}
        return path


def range_in(kind: type | None, name: str) -> dict[str, Any]:
    """The range that a class declares for an argument."""
    ours = [owner for owner in kind.__mro__ if owner.__module__.startswith(f"{PACKAGE}.")] if kind else []
    for owner in ours:
        declared = declared_ranges(owner if is_dataclass(owner) else owner.__init__)
        if name in declared:
            return {"range": declared[name].as_dict()}
    return {}


def own_classes(kind: type) -> list[str]:
    """Paths of the package's classes that a config can name in place of a class."""
    return [path for path in get_all_subclass_paths(kind) if path.startswith(f"{PACKAGE}.") and path not in BASES]


def by_path(path: str) -> type:
    """The class of a path."""
    module, _, name = path.rpartition(".")
    kind: type = getattr(importlib.import_module(module), name)
    return kind


def parts_of(hint: Any) -> Iterator[Any]:
    """The members of a union; the hint itself if it is none."""
    if get_origin(hint) in (Union, UnionType):
        for part in get_args(hint):
            yield from parts_of(part)
    else:
        yield hint


def container_of(hint: Any) -> str | None:
    """`list` or `dict` if the values of a key are many objects."""
    for part in parts_of(hint):
        origin = get_origin(part)
        if isinstance(origin, type) and any(True for inner in get_args(part) for _ in classes_in(inner)):
            return "dict" if issubclass(origin, dict) else "list"
    return None


def classes_in(hint: Any) -> Iterator[type]:
    """Classes whose arguments are settings."""
    for part in parts_of(hint):
        if get_origin(part) is not None and get_origin(part) is not Literal:
            for inner in get_args(part):
                yield from classes_in(inner)
        elif isinstance(part, type) and (is_subclasses_disabled(part) or ActionTypeHint.is_subclass_typehint(part)):
            yield part


def values_of(hint: Any) -> list[Any]:
    """The values that a key can have, where these are listed."""
    parts = [part for part in parts_of(hint) if part is not NoneType]
    if not parts or not all(get_origin(part) is Literal for part in parts):
        return []
    return [value for part in parts for value in get_args(part)]


def type_text(hint: Any) -> str:
    """A type as the pages show it."""
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(dict.fromkeys(type_text(part) for part in get_args(hint)))
    if get_origin(hint) is Literal:
        return " | ".join(json.dumps(value) if not isinstance(value, str) else value for value in get_args(hint))
    if arguments := get_args(hint):
        origin = getattr(get_origin(hint), "__name__", str(get_origin(hint)))
        return f"{origin}[{', '.join('...' if a is Ellipsis else type_text(a) for a in arguments)}]"
    return "null" if hint is NoneType else getattr(hint, "__name__", str(hint).rpartition(".")[2])


def plain(value: Any) -> Any:
    """A default as JSON and YAML have it."""
    if isinstance(value, jsonargparse.Namespace):
        return plain(value.as_dict())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | NoneType) else str(value)


def page(index: SettingsIndex) -> str:
    """docs/settings.md."""
    lines = [PAGE_HEAD]
    for job, entries in of_jobs(index).items():
        lines += [f"\n### {job}\n", *table(entries)]
    lines.append(PAGE_ALL)
    for title, entries in by_section(index.entries).items():
        lines += [f"\n### {title}\n", *table(entries)]
    lines.append(PAGE_CLASSES)
    lines += table_of_classes(index)
    return "\n".join(lines) + "\n"


def table(entries: Sequence[Entry]) -> Iterator[str]:
    """Rows of settings in Markdown."""
    yield "| setting | type | default | |"
    yield "|---|---|---|---|"
    for entry in entries:
        setting = entry.setting
        default = "required" if setting.is_required else f"`{shown(setting.default)}`"
        kind = ", ".join([f"`{setting.type}`", *bounds(setting)])
        of = f" *({', '.join(entry.of)})*" if entry.of else ""
        cells = (f"`{entry.key}`", kind, default, f"{setting.doc}{of}")
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table_of_classes(index: SettingsIndex) -> Iterator[str]:
    """Rows of classes in Markdown."""
    yield "| key | class_path | |"
    yield "|---|---|---|"
    for entry in index.entries:
        for path in entry.setting.classes:
            yield f"| `{entry.key}` | `{path}` | {index.classes[path].doc} |"


def main() -> int:
    """Write, or compare.

    Returns:
        1 if `--check` finds a difference.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    check = parser.parse_args().check
    index = text_of(Index().make())
    wanted = {settings_index.FILE: index, DOCS: page(SettingsIndex(json.loads(index)))}
    old = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in old:
        if not check:
            path.write_text(wanted[path], encoding="utf-8")
        print(f"{path}: {'out of date; run python scripts/settings.py' if check else 'written'}")
    return int(check and bool(old))


def text_of(index: dict[str, Any]) -> str:
    """The file's text: one setting a line, so that a change can be read."""
    text = json.dumps(index, ensure_ascii=False, allow_nan=True, separators=(",", ":"))
    return text.replace('},"', '},\n"') + "\n"


if __name__ == "__main__":
    sys.exit(main())
