"""Which questions an interrupted evaluation has already answered, and whether its trajectories may be kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cv_lightning.evaluation.outcome import Outcome, outcomes
from cv_lightning.evaluation.runs import EVALUATION_RECORD
from cv_lightning.files import whole_file, write_text
from cv_lightning.images import content_hash
from cv_lightning.renames import new_key
from cv_lightning.settings import changed, flatten
from cv_lightning.trajectory import read_groups
from cv_lightning.trajectory.store import LINES
from cv_lightning.types import EndState, Task

STATE = EVALUATION_RECORD
"""In an evaluation's folder: what was evaluated, and whether it is finished."""
ROLLOUT = "rollout."
"""Before the names of a rollout's settings in a config, where `renames.json` finds those of earlier versions."""
RETRIED = frozenset(state.value for state in EndState if state.is_error and state is not EndState.ERROR_TASK)
"""End states of trajectories that a resumed evaluation makes again: something around the model had failed."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A question that is in the store."""

    digest: str
    """Of all but its pixels: `Task.digest`."""
    images: tuple[str, ...]
    """Content hashes of the task's images."""
    outcomes: list[Outcome]

    def is_answer_to(self, task: Task, num_samples: int) -> bool:
        """True if it was this very question in all that is known of it, and all its samples are there."""
        return (
            len(self.outcomes) == num_samples
            and self.digest == task.digest
            and self.images == tuple(content_hash(image) for image in task.images)
        )


def holds(folder: Path, identity: dict[str, Any]) -> Literal["new", "goes on", "finished", "another"]:
    """What a folder holds for an evaluation. Reads only.

    Args:
        folder: of one evaluation.
        identity: what makes the numbers: model, settings, limits, reward.

    Returns:
        `new`: nothing. `goes on`: what an interrupted run of the same evaluation left. `finished`: all of the same one.
        `another`: trajectories of another one.
    """
    state = read_state(folder)
    if state is None or differences(folder, identity):
        return "another" if any(sizes_of(folder).values()) else "new"
    return "finished" if state.get("finished") else "goes on"


def keep_good(folder: Path) -> None:
    """Take failed trajectories and torn lines out of a store; the rest counts."""
    for path in sorted((folder / LINES).glob("*.jsonl")):
        kept = b"".join(_good_lines(path))
        with whole_file(path) as temporary:
            temporary.write_bytes(kept)


def differences(folder: Path, identity: dict[str, Any]) -> list[str]:
    """The settings in which the evaluation in a folder is another one, by dotted name.

    A setting that is None means what was done before there was such a setting.
    """
    known = (read_state(folder) or {}).get("identity")
    if not known:
        return ["all: it is not named"]
    new = flatten(_plain(identity))
    old = {new_key(f"{ROLLOUT}{name}").removeprefix(ROLLOUT): value for name, value in flatten(known).items()}
    return sorted(name for name in changed(old, new) if name in old or new[name] is not None)


def sizes_of(folder: Path) -> dict[str, int]:
    """Bytes of every file of lines in a store, by name."""
    return {path.name: path.stat().st_size for path in (folder / LINES).glob("*.jsonl")}


def keep_only(folder: Path, sizes: Mapping[str, int], kept: Collection[str]) -> int:
    """Take out of a store what was answered before and is not asked any more, or was asked again since.

    Args:
        folder: of one evaluation; nobody writes to it.
        sizes: bytes that each file of lines had when this test started, by name; what came after stays.
        kept: ids of the questions whose earlier answer stands.

    Returns:
        Groups taken out.
    """
    dropped = 0
    for path in sorted((folder / LINES).glob("*.jsonl")):
        end = sizes.get(path.name, 0)
        with path.open("rb") as file, whole_file(path) as temporary, temporary.open("wb") as out:
            while file.tell() < end:
                line = file.readline()
                if json.loads(line)["task"]["id"] in kept:
                    out.write(line)
                else:
                    dropped += 1
            shutil.copyfileobj(file, out)
    return dropped


def _good_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            try:
                states = {trajectory["end_state"] for trajectory in json.loads(line)["trajectories"]}
            except (ValueError, KeyError, TypeError):
                continue  # torn
            if not states & RETRIED:
                yield line.rstrip(b"\n") + b"\n"


def read_state(folder: Path) -> dict[str, Any] | None:
    """The state file; None where there is none that can be read."""
    try:
        found = json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_state(folder: Path, identity: dict[str, Any], *, finished: bool) -> None:
    """Write the state file, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / STATE, json.dumps({"finished": finished, "identity": _plain(identity)}, indent=1) + "\n")


def _plain(value: dict[str, Any]) -> Any:
    """As it comes back from JSON, so that tuples and lists compare equal."""
    return json.loads(json.dumps(value, default=repr, sort_keys=True))


def read_answered(folder: Path) -> dict[str, Answered]:
    """The questions of a store, by id; of one that is there twice, the last."""
    if not (folder / LINES).is_dir():
        return {}
    return {
        group.task.id: Answered(
            digest=group.task.digest,
            images=tuple(content_hash(image) for image in group.task.images),
            outcomes=outcomes([group]),
        )
        for group in read_groups(folder)
    }
