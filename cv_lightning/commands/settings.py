"""`cv-lightning settings [WORD ...]`: search the settings of fit, validate and test; their short help.

All pages come from the index of `settings_index.py`, so they are fast and load no model library.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from cv_lightning.command_help import HELP_ALL
from cv_lightning.command_line import put_json, run_verb
from cv_lightning.ranges import Range
from cv_lightning.settings_check import check_command
from cv_lightning.settings_index import ITEM, Entry, Setting, SettingsIndex, load, short_path, shown
from cv_lightning.verbs import PROGRAM

JOBS = {
    "Model": [
        "model.init_args.policy.path",
        "model.init_args.policy.max_pixels",
        "model.init_args.policy.lora",
        "model.init_args.optimizer.lr",
    ],
    "Data": ["data.init_args.train_files", "data.init_args.eval_files"],
    "Length of the run": [
        "data.init_args.num_iterations",
        "data.init_args.tasks_per_iteration",
        "data.init_args.num_steps",
        "data.init_args.conversations_per_step",
    ],
    "Rollouts": [
        "rollout.num_samples",
        "rollout.agent.max_turns",
        "rollout.agent.max_turn_tokens",
        "rollout.agent.tools",
        "rollout.sampling.temperature",
    ],
    "Reward and judge": ["rollout.reward.terms", "rollout.reward.judge.base_url"],
    "Memory": [
        "model.init_args.max_tokens_per_row",
        "model.init_args.policy.gradient_checkpointing",
        "rollout.engine.gpu_memory_utilization",
        "trainer.strategy",
    ],
    "Run folder, logging, resuming": [
        "trainer.default_root_dir",
        "trainer.logger",
        "trainer.val_check_interval",
        "ckpt_path",
    ],
}
"""The settings that matter first, by what a user wants to do."""
SECTIONS = {
    "model": "Model, optimizer and algorithm",
    "data": "Data",
    "rollout": "Rollouts: agent, engine, sampling, reward, sandbox, store",
    "trainer": "Trainer",
    "": "The run: checkpoints, export, progress, checks",
}
"""Titles by the first part of a key; the last one has all others."""
ABOUT = {
    "fit": "Train: SFT or GRPO, as the config says.",
    "validate": "Evaluate on the validation tasks.",
    "test": "Evaluate on the held-out tasks and store the trajectories.",
}
MAX_WIDTH = 120
MAX_YAML = 8
"""Up to so many results, each is shown as a config has it, too."""
MAX_SHOWN = 40
"""Results of a search that are described; the others are named."""


def settings(words: list[str] | None = None, json: Path | None = None) -> None:
    """Search the settings of fit, validate and test by key, docstring and class.

    Args:
        words: Words that a setting must have, all of them; without any: all settings by section.
        json: Write the settings found, with types, defaults and docstrings, into this file.
    """
    index = load()
    found = index.find(words) if words else list(index.entries)
    if put_json(json, [entry_json(entry) for entry in found]):
        return
    width = min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns)
    if not words:
        print(overview(index))
    elif found:
        print(results(found, width))
    else:
        close = index.close_keys("_".join(words), 5, similarity=0.6)
        print(f"no setting has {' and '.join(words)}" + (f"; close: {', '.join(close)}" if close else ""))


def entry_json(entry: Entry) -> dict[str, object]:
    """A setting for programs."""
    known = entry.setting._asdict()
    names = ("type", "default", "doc", "values", "range")
    return {"key": entry.key, "of_classes": entry.of} | {name: known[name] for name in names}


def results(found: Sequence[Entry], width: int) -> str:
    """The results of a search, for people."""
    parts = []
    for entry in found[:MAX_SHOWN]:
        lines = [head(entry), *textwrap.wrap(entry.setting.doc, width - 4)]
        if entry.of:
            lines.append(f"of {', '.join(entry.of)}")
        if entry.setting.classes:
            lines.append(f"classes: {', '.join(map(short_path, entry.setting.classes))}, or your own by class_path")
        if len(found) <= MAX_YAML:
            lines.append(f"in a config: {as_yaml(entry)}")
            lines.append(f"as a flag:   {as_flag(entry)}")
        parts.append("\n    ".join(lines))
    if rest := found[MAX_SHOWN:]:
        parts.append(f"and {len(rest)} more; add a word, or write all with --json FILE")
    return "\n".join(parts)


def head(entry: Entry) -> str:
    """Key, type and default."""
    setting = entry.setting
    default = "required" if setting.is_required else f"default {shown(setting.default)}"
    return f"{entry.key}  ({'; '.join([setting.type, *bounds(setting), default])})"


def bounds(setting: Setting) -> list[str]:
    """The range of a number in words, if it has one."""
    return [str(Range(**setting.range))] if setting.range else []


def example(entry: Entry) -> str:
    """A value in an example: the default where there is one, else its name in capitals."""
    setting = entry.setting
    if setting.classes:
        return f"{{class_path: {short_path(setting.classes[0])}}}"
    return "VALUE" if setting.default is None else shown(setting.default)


def as_yaml(entry: Entry) -> str:
    """A setting as a config has it, on one line."""
    text = example(entry)
    for part in reversed(entry.key.split(".")):
        name = part.removesuffix(ITEM)
        text = f"{{{name}: {f'[{text}]' if part.endswith(ITEM) else text}}}"
    return text[1:-1]


def as_flag(entry: Entry) -> str:
    """A setting on the command line; below a list, the whole list is the value."""
    outer, is_item, _ = entry.key.partition(ITEM)
    if is_item:
        inner = as_yaml(entry._replace(key=f"x{entry.key.removeprefix(outer)}")).removeprefix("x: ")
        return f"--{outer} '{inner}'"
    text = example(entry)
    return f"--{entry.key} " + (f"'{text}'" if set(text) & set(' {}[]"<>|&*') else text)


def overview(index: SettingsIndex) -> str:
    """All keys by section, with where to read more."""
    lines = [f"{len(index.entries)} settings; {PROGRAM} settings WORD shows those with a word, and their docstrings"]
    for title, entries in by_section(index.entries).items():
        lines.append(f"\n{title}")
        lines += [f"  {entry.key} = {shown(entry.setting.default)}" for entry in entries]
    return "\n".join(lines)


def by_section(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Settings by the titles of their sections."""
    found: dict[str, list[Entry]] = {title: [] for title in SECTIONS.values()}
    for entry in entries:
        first = entry.key.partition(".")[0]
        found[SECTIONS.get(first, SECTIONS[""])].append(entry)
    return found


def short_line(entry: Entry) -> str:
    """Flag, default and first sentence of a setting, and which class has it."""
    default = "required" if entry.setting.is_required else shown(entry.setting.default)
    of = f" ({entry.of[0]})" if entry.of else ""
    line = f"  --{entry.key:47} {default:12} "
    text = entry.setting.doc.partition(". ")[0].rstrip(".")
    return line + textwrap.shorten(text, MAX_WIDTH - len(line) - len(of), placeholder="...") + of


def of_jobs(index: SettingsIndex) -> dict[str, list[Entry]]:
    """The settings that matter first, from the index; what differs between classes is there for each.

    Raises:
        KeyError: The index does not have one of them.
    """
    by_key: dict[str, list[Entry]] = {}
    for entry in index.entries:
        by_key.setdefault(entry.key, []).append(entry)
    return {job: [entry for key in keys for entry in by_key[key]] for job, keys in JOBS.items()}


def before_parsing(verb: str, words: Sequence[str]) -> int | None:
    """Answer what needs no heavy import: the short help of a verb, and mistakes in keys and configs.

    Args:
        verb: A verb that takes the settings of fit.
        words: The command line behind it.

    Returns:
        The exit code; None if the command line is for the parser.
    """
    if verb in ABOUT and {"-h", "--help"} & set(words):
        sys.stdout.write(short_help(verb))
        return 0
    if said := check_command(verb, words, runs=True):
        sys.stderr.write(f"error: {said}\n")
        return 2
    return None


def short_help(verb: str) -> str:
    """The help of fit, validate or test: what a user sets first, and how to find the rest."""
    index = load()
    lines = [f"usage: {PROGRAM} {verb} --config CONFIG [--config MORE ...] [--KEY VALUE ...]", "", ABOUT[verb]]
    lines += ["A later --config, and a flag, override earlier ones. Settings that matter first, with their defaults:"]
    for job, entries in of_jobs(index).items():
        lines.append(f"\n{job}")
        lines += map(short_line, entries)
    return "\n".join([*lines, "", *how_to(verb, len(index.entries))]) + "\n"


def how_to(verb: str, count: int) -> Iterator[str]:
    """The last lines of the short help."""
    yield f"{PROGRAM} settings WORD{'':12} search all {count} settings; docs/settings.md lists them"
    yield f"{PROGRAM} {f'{verb} {HELP_ALL}':24} every flag, as the parser has it; --model.help CLASS: those of a class"
    yield f"{PROGRAM} {verb + ' ... --print_config':24} show the config that a command line gives"
    yield f"{PROGRAM} {'plan ...':24} memory and time before anything is loaded"
    yield "example:"
    config = "configs/quickstart/grpo.yaml" if verb == "fit" else "configs/eval/digits.yaml"
    folder = "runs/mine" if verb == "fit" else "runs/eval/mine"
    yield f"  {PROGRAM} {verb} --config {config} --trainer.default_root_dir {folder}"


main = partial(run_verb, settings, name="settings")
