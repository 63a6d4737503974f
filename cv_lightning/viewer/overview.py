"""Overview of a run: what was trained or evaluated on what, how far it got, how it was started, and its files.

Everything is read from the run's records (`<verb>_run.json`), configs (`<verb>_config.yaml`) and metrics. A run of an
earlier version has less in its records; what is missing is left out.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cv_lightning.evaluation.runs import OWNER, OWNER_STALE_S, Run, read_config
from cv_lightning.settings import flatten

CONFIG, RECORD = "_config.yaml", "_run.json"
PLANNED = ("num_iterations", "num_steps")
"""Arguments of DataModules that say how many batches a training has."""
LISTED_FILES = 40
FILES = ("report.html", "summary.json", "*_config.yaml", "*_run.json", "*_log.txt", "metrics.csv", "eval/*results.*")
"""Files of a run that a page links, besides exported models."""
MAX_VALUE = 160
"""Characters of a setting's value on the page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One training or evaluation of a run: what one `fit`, `validate` or `test` did in one folder."""

    stage: str
    """Folder below the run, as in `Run.curves`; `run` for the run's own folder."""
    verb: str
    method: str
    """`GRPO`, `SFT`, the name of a user's module, or `evaluation`."""
    model: str
    data: str
    started: str
    minutes: float | None
    unit: str
    """`iterations` of RL, `steps` of SFT; empty for an evaluation."""
    done: int
    planned: int | None
    status: str
    command: str
    changed: Mapping[str, Any]
    """Settings that differ from their defaults, by dotted name."""
    rolled_out: int
    """Trajectories of all iterations; 0 where none were rolled out."""
    store_share: float | None
    """Fraction of the groups that the training was to store."""

    @property
    def progress(self) -> str:
        """Iterations or steps that were done, of how many."""
        if not self.unit:
            return ""
        return f"{self.done:,} of {self.planned:,} {self.unit}" if self.planned else f"{self.done:,} {self.unit}"


def parts_of(run: Run, data_names: Mapping[str, str]) -> list[Part]:
    """The trainings and evaluations of a run, in the order of their folders, trainings before evaluations.

    Args:
        run: The run.
        data_names: Names of DataModules without files, for people, by class name.
    """
    names = {path.removesuffix(CONFIG) for path in run.configs if path.endswith(CONFIG)}
    names |= {path.removesuffix(RECORD) for path in run.records if path.endswith(RECORD)}
    parts = [_part(run, name, data_names) for name in sorted(names)]
    return sorted(parts, key=lambda part: (part.verb != "fit", part.started))


def _part(run: Run, name: str, data_names: Mapping[str, str]) -> Part:
    config, record = read_config(run.configs.get(name + CONFIG, "")), run.records.get(name + RECORD, {})
    folder, _, verb = name.rpartition("/")
    stage = folder or "run"
    module, data = (_class(config, key) for key in ("model", "data"))
    curves = run.curves.get(stage, []) if verb == "fit" else []
    method = module[0].removesuffix("Module") if verb == "fit" else "evaluation"
    done = int(max((curve.steps[-1] for curve in curves if curve.steps), default=0))
    planned = _planned(config, data[1]) if verb == "fit" else None
    rolled = next((sum(curve.values) for curve in curves if curve.name == "rollout/trajectories"), 0.0)
    share = _mapping(_mapping(config.get("rollout")).get("store")).get("share")
    return Part(
        stage=stage,
        verb=verb,
        method=method,
        model=_short(str(_mapping(module[1].get("policy")).get("path") or "")),
        data=_data(data, "train_files" if verb == "fit" else "eval_files", data_names),
        started=_minute(record.get("started")),
        minutes=_minutes(record.get("started"), record.get("ended")),
        unit=("iterations" if rolled else "steps") if verb == "fit" else "",
        done=done,
        planned=planned,
        status=_status(run.folder / folder, verb, record, planned is not None and done >= planned),
        command=_command(record.get("command")),
        changed=flatten(record["changed"]) if isinstance(record.get("changed"), dict) else {},
        rolled_out=int(rolled),
        store_share=share if rolled and isinstance(share, int | float) else None,
    )


def _class(config: Mapping[str, Any], key: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a class that a config names."""
    spec = _mapping(config.get(key))
    return str(spec.get("class_path") or "").rpartition(".")[2], _mapping(spec.get("init_args"))


def _mapping(value: object) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one: a stored config may have been edited."""
    return value if isinstance(value, dict) else {}


def _short(path: str) -> str:
    """The last two parts of a model's path or hub name: an export's folder is called `model`."""
    return "/".join(Path(path).parts[-2:])


def _data(data: tuple[str, dict[str, Any]], key: str, names: Mapping[str, str]) -> str:
    name, arguments = data
    files = arguments.get(key)
    if not files or not isinstance(files, list):
        return names.get(name, name)
    shown = [Path(str(file)).name for file in files[:2]]
    return ", ".join(shown) + (f" and {len(files) - 2} more" if len(files) > 2 else "")


def _planned(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> int | None:
    limit = _mapping(config.get("trainer")).get("limit_train_batches")
    numbers = [arguments.get(name) for name in PLANNED] + [limit]
    found = [number for number in numbers if isinstance(number, int) and not isinstance(number, bool)]
    return min(found, default=None)


def _status(folder: Path, verb: str, record: Mapping[str, Any], is_complete: bool) -> str:
    if record.get("status"):
        return str(record["status"])
    try:
        if time.time() - (folder / OWNER.format(verb=verb)).stat().st_mtime < OWNER_STALE_S:
            return "running"
    except OSError:
        pass
    return "finished" if is_complete else "no end was recorded"


def _command(words: object) -> str:
    """The command as a user types it."""
    if not isinstance(words, list) or len(words) < 2:
        return ""
    python, program, *rest = map(str, words)
    start = ["python", "-m", "cv_lightning"] if program.endswith("__main__.py") else [Path(program).name]
    return shlex.join([*(start if Path(python).name.startswith("python") else [python, program]), *rest])


def _time(text: object) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text))
    except ValueError:
        return None


def _minute(text: object) -> str:
    found = _time(text)
    return f"{found:%Y-%m-%d %H:%M}" if found else ""


def _minutes(started: object, ended: object) -> float | None:
    first, last = _time(started), _time(ended)
    try:
        return (last - first).total_seconds() / 60 if first and last else None
    except TypeError:  # one with a time zone, one without
        return None


# ------------------------------------------------------------------------------------------------ the page's texts
def title_of(parts: Sequence[Part], fallback: str) -> str:
    """What was trained on what, or evaluated on what; a page without records is named by its folder."""
    chosen = [part for part in parts if part.verb == "fit"] or parts
    if not chosen or not chosen[0].model:
        return fallback
    methods = " and ".join(dict.fromkeys(part.method for part in chosen))
    data = ", ".join(dict.fromkeys(part.data for part in chosen if part.data))
    return f"{methods[:1].upper()}{methods[1:]} of {chosen[0].model}" + (f" on {data}" if data else "")


def is_smoke(run: Run) -> bool:
    """True if a config asks for Lightning's fast_dev_run."""
    return any(_mapping(read_config(text).get("trainer")).get("fast_dev_run") for text in run.configs.values())


def stored_text(part: Part, label: str, stored: int) -> str:
    """How many trajectories of a training were stored, of how many that were rolled out."""
    share = f" (rollout.store.share {part.store_share:g})" if part.store_share is not None else ""
    return f"{label}: {stored:,} of the {part.rolled_out:,} trajectories rolled out are stored{share}."


@dataclass(frozen=True, slots=True)
class SettingsTable:
    """Settings that differ from their defaults, side by side."""

    columns: list[str]
    rows: list[tuple[str, list[str | None]]]
    """Name, and its value in each column; None for the default."""


def settings_table(parts: Iterable[Part], labels: Mapping[str, str]) -> SettingsTable:
    """The settings of the parts that recorded them; no columns where none did."""
    chosen = [part for part in parts if part.changed]
    names = dict.fromkeys(name for part in chosen for name in part.changed)
    columns = [f"{labels.get(part.stage, part.stage)}, {part.verb}" for part in chosen]
    rows = [(name, [_value(part.changed[name]) if name in part.changed else None for part in chosen]) for name in names]
    return SettingsTable(columns, rows)


def _value(value: object) -> str:
    text = str(value) or "''"
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."


def files_of(run: Run, folder: str | None) -> list[tuple[str, str]]:
    """Main files of a run with their relative URLs from the page, which are empty where `folder` is None.

    Args:
        run: The run.
        folder: Relative URL of the run's folder.
    """
    found = {path for name in FILES for path in run.folder.glob(f"**/{name}") if path.is_file()}
    found |= {path.parent for path in run.folder.glob("**/model/config.json")}
    names = sorted(path.relative_to(run.folder).as_posix() for path in found)[:LISTED_FILES]
    return [(name, "" if folder is None else quote(f"{folder}/{name}" if folder != "." else name)) for name in names]
