"""Checks of a run's settings that need no heavy imports: devices, folders, and kinds of files.

They refuse only what cannot work. What they do not know, such as the files that a user's class reads, is left to the
checks of `preflight.py` and to the readers.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cv_lightning.renames import may_be_class

GPU_DEVICES = ("nvidiactl", "nvidia0", "dxg", "kfd", "nvmap", "nvhost-gpu")
"""Device files of which a machine with a GPU has one."""
DATA_KINDS = {"TaskDataModule": "rl", "DigitTaskDataModule": "rl", "SFTDataModule": "sft", "DigitSFTDataModule": "sft"}
"""What the project's DataModules train on; those of a user may read any file."""
RESULTS = ("checkpoints", "metrics.csv", "model", "trajectories")
"""Files and folders of a run that has begun."""
CHECKPOINT_WORDS = ("last", "auto", "best", "hpc", "registry")

Settings = Mapping[str, Any]
"""Values by dotted key, with `init_args`: those that the command line and its configs set, without defaults."""


def check_early(verb: str, settings: Settings) -> str | None:
    """What cannot work in a run.

    Args:
        verb: `fit`, `validate` or `test`; nothing is checked for others, which may be about another machine.
        settings: What is set.

    Returns:
        One error with the flag to change; None if there is nothing to say.
    """
    if verb not in ("fit", "validate", "test"):
        return None
    checks: list[Callable[[str, Settings], str | None]] = [
        _model_flag, _device, _checkpoint, _files, _run_folder, _other_run, _policy_path
    ]  # fmt: skip
    try:
        return next(filter(None, (check(verb, settings) for check in checks)), None)
    except OSError:  # a folder that may not be read: the run itself says which
        return None


def _model_flag(verb: str, settings: Settings) -> str | None:
    given = settings.get("model")
    if isinstance(given, str) and ("/" in given or Path(given).is_dir()) and not given.endswith((".yaml", ".yml")):
        return (
            f"--model {given}: `model` names the class that is trained, or its config file. For the weights of a "
            f"folder set --model.init_args.policy.path {given}"
        )
    return None


def _device(verb: str, settings: Settings) -> str | None:
    accelerator = settings.get("trainer.accelerator")
    if accelerator not in ("gpu", "cuda") or any(Path("/dev", name).exists() for name in GPU_DEVICES):
        return None
    return (
        f"trainer.accelerator is {accelerator}, and this process sees no GPU. Leave out the config that asks for GPUs "
        "(configs/hardware/8gpu.yaml and its like), or set --trainer.accelerator cpu; `plan` estimates a run on other "
        "hardware"
    )


def _policy_path(verb: str, settings: Settings) -> str | None:
    path = settings.get("model.init_args.policy.path")
    said = local_folder_error(path) if isinstance(path, str) else None
    return said and f"model.init_args.policy.path {path}: {said}. Set --model.init_args.policy.path"


def local_folder_error(path: str) -> str | None:
    """What is wrong with a model's path that cannot be a name on the hub; None: it exists, or may be a name."""
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        return None
    if folder.exists():
        return "a file; give the folder that holds config.json and the weights"
    is_local = path.startswith((".", "/", "~", "runs/")) or path.count("/") != 1
    if not is_local or "/" not in path:
        return None
    there = next(parent for parent in folder.absolute().parents if parent.is_dir())
    near = sorted(entry.name for entry in there.iterdir() if entry.is_dir() and not entry.name.startswith("."))[:5]
    return f"no such folder; {there} has {', '.join(near) or 'no folders'}. Give a Hugging Face folder of a model"


def _checkpoint(verb: str, settings: Settings) -> str | None:
    path = settings.get("ckpt_path")
    if not isinstance(path, str) or path in CHECKPOINT_WORDS or "://" in path or Path(path).exists():
        return None
    return f"--ckpt_path {path}: no such file or folder; give a checkpoint of this run, last, or leave it out"


# ------------------------------------------------------------------------------------------------ files of data
def _files(verb: str, settings: Settings) -> str | None:
    kind = DATA_KINDS.get(str(settings.get("data.class_path")).rpartition(".")[2])
    if kind is None:
        return None
    is_read = [("train_files", kind)] if verb == "fit" else []
    for name, read_as in [*is_read, ("eval_files", "rl")]:
        for path in _paths(settings.get(f"data.init_args.{name}")):
            own_format = read_as == "rl" and settings.get("data.init_args.reader.format", "codevision") != "codevision"
            if error := _file_error(f"data.init_args.{name}", path, "" if own_format else read_as):
                return error
    return None


def _paths(value: Any) -> Iterator[str]:
    """The local files of a setting; those of the Hub and of other file systems are the readers' to find."""
    for path in [value] if isinstance(value, str) else value if isinstance(value, list) else []:
        if isinstance(path, str) and "://" not in path and not path.startswith("hf:/"):
            yield path


def _file_error(key: str, path: str, kind: str) -> str | None:
    file = Path(os.path.expanduser(path))
    if file.is_dir():
        return f"--{key}: {path} is a folder; name its files"
    if not file.is_file():
        return f"--{key}: no such file: {path} (relative paths start from {Path.cwd()})"
    return wrong_kind(key, path, kind)


def wrong_kind(key: str, path: str, kind: str) -> str | None:
    """What to do about a file of tasks given to SFT, or one of conversations given to RL.

    Args:
        key: Setting that names the file.
        path: The file.
        kind: `sft` or `rl`: what reads it; any other text: nothing is known.
    """
    ending = Path(path).suffix.lower()
    if kind == "sft" and ending in (".parquet", ".csv", ".tsv"):
        return (
            f"{key}: {path} is a table of tasks, which RL reads; SFT reads conversations from .json or .jsonl. "
            f"`cv-lightning data build-sft --files {path} --out sft.json` makes them; then set --{key} '[sft.json]'"
        )
    if kind == "rl" and ending in (".json", ".jsonl", ".csv", ".tsv"):
        holds = "conversations, which SFT reads" if ending.startswith(".json") else "a table"
        return (
            f"{key}: {path} is a file of {holds}; RL and evaluations read tasks from .parquet, or benchmarks by "
            f"--data.init_args.reader.format. `cv-lightning data build-rl` makes such a file from a table; set --{key}"
        )
    return None


# ------------------------------------------------------------------------------------------------ the run's folder
def _run_folder(verb: str, settings: Settings) -> str | None:
    given = settings.get("trainer.default_root_dir")
    return folder_error(Path(given)) if isinstance(given, str) and given else None


def folder_error(run: Path) -> str | None:
    """Why a run's folder cannot be made or written; None if it can."""
    there = next(path for path in (run.absolute(), *run.absolute().parents) if os.path.lexists(path))
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return None
    read_only = os.statvfs(there).f_flag & os.ST_RDONLY
    reason = f"may not be written ({os.strerror(errno.EROFS)})" if read_only else "may not be written"
    if not there.is_dir():
        reason = "is not a folder"
    return f"--trainer.default_root_dir {run} cannot be made: {there} {reason}. Give another folder"


def _other_run(verb: str, settings: Settings) -> str | None:
    run, module = settings.get("trainer.default_root_dir"), settings.get("model.class_path")
    if verb != "fit" or not isinstance(module, str) or not isinstance(run, str):
        return None
    return other_run_error(Path(run), module.rpartition(".")[2])


def other_run_error(run: Path, module: str) -> str | None:
    """Why a run of a module cannot start in a folder with the results of another module's run; None if it can.

    Args:
        run: The run's folder.
        module: Name of the class that is trained.
    """
    try:
        stored = yaml.safe_load((run / "fit_config.yaml").read_text(encoding="utf-8"))
        other = str(stored["model"]["class_path"]).rpartition(".")[2]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None
    if may_be_class(other, module) or not any((run / name).exists() for name in RESULTS):
        return None
    return (
        f"{run} holds a run of {other}, and this config trains {module}: weights and files of both would be mixed. Set "
        "another --trainer.default_root_dir; to begin with its weights, `export` them and give that folder as "
        "--model.init_args.policy.path"
    )
