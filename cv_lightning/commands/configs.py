"""`cv-lightning configs list | copy NAME`: the configs that come with the package."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml

from cv_lightning.command_line import run_verb
from cv_lightning.files import write_text
from cv_lightning.packaged import CONFIGS, ENDINGS, config_names, packaged_folder, require_config
from cv_lightning.types import DataError

GROUPS = {
    "sft": "supervised fine-tuning: fit --config",
    "grpo": "reinforcement learning: fit --config",
    "hardware": "on top of a recipe: a second --config",
    "logger": "on top of a recipe: a second --config",
    "eval": "evaluation: test --config",
    "reward": "reward recipes: --rollout.reward, rescore --reward",
    "sweeps": "sweep",
    "quickstart": "the parts of quickstart",
    "ablations": "rewards of ablations",
}
"""Folders of configs with the command that takes them, in the order of the list."""
FOLDERS = {
    "notebooks": ("*.ipynb",),
    "scripts": ("environment.sh", "serve_judge.sh", "slurm/*"),
}
"""Folders that can be copied besides configs, with patterns of their files."""
WIDTH = 118
"""Most characters of a line of the list."""


def description(text: str) -> str:
    """First sentence of the comment that a config begins with."""
    lines = re.match(r"(#.*\n)*", text).group().splitlines()  # type: ignore[union-attr]  # an empty match at least
    comment = " ".join(line.lstrip("# ") for line in lines)
    return re.split(r"(?<=\.)\s", comment, maxsplit=1)[0]


def show_configs() -> None:
    """List the packaged configs by their names, with what each one is."""
    names, folder = config_names(), packaged_folder(CONFIGS)
    width = max(map(len, names))
    for group in [*GROUPS, *sorted({name.partition("/")[0] for name in names} - GROUPS.keys())]:
        print(f"{group}: {GROUPS[group]}" if group in GROUPS else group)
        for name in names:
            if name.startswith(f"{group}/"):
                about = description((folder / f"{name}.yaml").read_text(encoding="utf-8"))
                print(f"  {name:{width}}  {shorten(about, WIDTH - width - 4, placeholder=' ...')}")
    print("\ncopy one to change it: cv-lightning configs copy NAME --out FILE; also: configs copy notebooks, scripts")


def copy(name: str, out: Path | None = None, force: bool = False) -> None:
    """Copy a config, and the files that it refers to, so that they can be changed.

    Args:
        name: A config of `configs list`; or `notebooks` or `scripts`, whole folders.
        out: The copy, or an existing folder for it; by default a file of that name in the current folder.
        force: Overwrite files that exist.

    Raises:
        DataError: There is no such config, or a file exists and differs.
    """
    if name.rstrip("/") in FOLDERS:
        texts = _folder_texts(name.rstrip("/"), out)
    else:
        source = require_config(name)
        target = Path(source.name) if out is None else out / source.name if out.is_dir() else out
        texts = dict(_config_texts(source, target))
    existing = [path for path, text in texts.items() if path.exists() and path.read_text(encoding="utf-8") != text]
    if existing and not force:
        raise DataError(f"{existing[0]} exists and differs; --out names another place, --force overwrites it")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        print(f"written to {path}")


def _config_texts(source: Path, target: Path) -> Iterator[tuple[Path, str]]:
    """A config and the files that it refers to, side by side in the folder of `target`: paths and texts.

    Raises:
        DataError: Two of them would be the same file.
    """
    found: dict[Path, Path] = {}
    waiting = [(source, target)]
    while waiting:
        file, copied = waiting.pop()
        if found.setdefault(copied, file) != file:
            raise DataError(f"--out {target}: {source.name} refers to a file of that name; choose another one")
        text = file.read_text(encoding="utf-8")
        for reference in sorted(_references(yaml.safe_load(text), file.parent), key=len, reverse=True):
            part = (file.parent / reference).resolve()
            text = re.sub(rf"(?<![\w./-]){re.escape(reference)}(?![\w./-])", part.name, text)
            if (copy_of := target.parent / part.name) not in found or found[copy_of] != part:
                waiting.append((part, copy_of))
        yield copied, text


def _references(value: Any, folder: Path) -> set[str]:
    """Values in a config that are paths of other configs, relative to its folder."""
    if isinstance(value, str):
        return {value} if value.endswith(ENDINGS) and (folder / value).is_file() else set()
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return {reference for part in parts for reference in _references(part, folder)}


def _folder_texts(name: str, out: Path | None) -> dict[Path, str]:
    """The files of one of `FOLDERS` by the paths of their copies."""
    source = packaged_folder(name)
    files = [path for pattern in FOLDERS[name] for path in sorted(source.glob(pattern)) if path.is_file()]
    return {(out or Path(name)) / path.relative_to(source): path.read_text(encoding="utf-8") for path in files}


list_main = partial(run_verb, show_configs, name="configs list")
copy_main = partial(run_verb, copy, name="configs copy")
