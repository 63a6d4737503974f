"""Folders that come with the package (configs, notebooks, scripts), and configs by name.

They lie at the top of a checkout, and inside the package where it was installed from a wheel.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

CONFIGS = "configs"
ENDINGS = (".yaml", ".yml")


def packaged_folder(name: str) -> Path:
    """A folder that comes with the package: `configs`, `notebooks` or `scripts`."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def script(name: str) -> str:
    """A script's path for a command that is shown: from the top of a checkout, absolute where it was installed."""
    installed = Path(__file__).parent / "scripts" / name
    return str(installed) if installed.is_file() else f"scripts/{name}"


def config_names() -> list[str]:
    """Names of all packaged configs, such as `grpo/qwen3_vl_8b`, sorted."""
    folder = packaged_folder(CONFIGS)
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.yaml"))


def resolve_config(name: str | os.PathLike[str]) -> Path | None:
    """The file that a config's name stands for.

    Args:
        name: A file, which is returned as given; or a packaged config: `grpo/qwen3_vl_8b`, with or without `configs/`
            before it and `.yaml` behind it.

    Returns:
        None if there is no such file.
    """
    given = Path(name)
    with suppress(OSError):  # the text of a config in place of its name: longer than a name may be
        if given.exists() and not given.is_dir():
            return given
    short = short_name(name)
    return packaged_folder(CONFIGS) / f"{short}.yaml" if short in config_names() else None


def require_config(name: str | os.PathLike[str]) -> Path:
    """The file that a config's name stands for.

    Raises:
        DataError: There is none; names close ones.
    """
    if (path := resolve_config(name)) is not None:
        return path
    from cv_lightning.types import DataError

    close = close_configs(name)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise DataError(f"{os.fspath(name)}: no such file or packaged config; {hint}`cv-lightning configs list` shows all")


def short_name(name: str | os.PathLike[str]) -> str:
    """A config's name without `configs/` before it and `.yaml` behind it."""
    text = os.fspath(name).removeprefix("./").removeprefix(f"{CONFIGS}/")
    return next((text.removesuffix(ending) for ending in ENDINGS if text.endswith(ending)), text)


def close_configs(name: str | os.PathLike[str]) -> list[str]:
    """Names of packaged configs that a wrong name may have meant, best first, at most three."""
    names, short = config_names(), short_name(name)
    same = [known for known in names if known.rpartition("/")[2] == short.rpartition("/")[2]]
    return [*same, *(found for found in difflib.get_close_matches(short, names, 3, 0.7) if found not in same)][:3]


def resolve_words(words: Sequence[str]) -> list[str]:
    """A command line whose names of packaged configs are replaced by their paths.

    A name is the value of `--config`; of another flag a path that ends in `.yaml`, or a name in the folder that is
    called like the flag (`--rollout.reward reward/paper`), as other values could be mistaken for names. `--out` names
    what will be written.

    Args:
        words: The words after the program's name.
    """
    found: list[str] = []
    flag = ""
    for word in words:
        if word.startswith("-"):
            flag, equals, value = word.partition("=")
            found.append(f"{flag}={_resolved(flag, value)}" if equals else word)
        else:
            found.append(_resolved(flag, word))
            flag = ""
    return found


def _resolved(flag: str, value: str) -> str:
    key = flag.lstrip("-").rpartition(".")[2]
    is_config = key in ("config", "c") or value.endswith(ENDINGS) or value.startswith(f"{key}/")
    path = resolve_config(value) if is_config and key not in ("", "out") else None
    return str(path) if path is not None else value
