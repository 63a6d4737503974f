"""Fingerprint of an evaluation, and the state of its folder: is it the same, and which questions are answered?

A fingerprint holds the settings that the results depend on. An interrupted evaluation continues only if it is equal.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cv_lightning.agent.config import AgentConfig
from cv_lightning.engines import EngineConfig
from cv_lightning.evaluation.outcome import Outcome, outcomes
from cv_lightning.evaluation.runs import EVALUATION_RECORD
from cv_lightning.files import whole_file, write_text
from cv_lightning.images import content_hash
from cv_lightning.renames import new_key
from cv_lightning.rewards import RewardConfig
from cv_lightning.rewards.judge.prompts import load_prompt
from cv_lightning.sandbox import SandboxConfig
from cv_lightning.settings import changed, flatten
from cv_lightning.trajectory import read_groups
from cv_lightning.trajectory.store import LINES
from cv_lightning.types import EndState, Task

STATE = EVALUATION_RECORD
"""File with the evaluation's fingerprint and whether it is finished."""
ROLLOUT = "rollout."
"""Prefix of a rollout's settings in a config, under which `renames.json` lists earlier names."""
OF_ENGINE = ("kind", "max_model_len", "max_images")
"""Settings of the engine that change what it samples; the others change its speed."""
OF_SANDBOX = (
    "timeout_s",
    "cpu_s",
    "memory_mb",
    "max_code_chars",
    "max_result_pixels",
    "max_error_chars",
    "reference_results",
)
"""Settings of the sandbox that change a snippet's result."""


def rollout_fingerprint(
    agent: AgentConfig, reward: RewardConfig, engine: EngineConfig, sandbox: SandboxConfig
) -> dict[str, Any]:
    """Fingerprint of rollouts and rewards as JSON values, with the text of the prompts.

    Raises:
        ValueError: A prompt of the judge is missing.
    """
    server, judge = engine.server, reward.judge
    types = {judge.default_task_type, *judge.task_types.values()} if judge else ()
    return {
        "agent": asdict(agent),
        "system": {
            "tool": agent.prompt.system_text(replace(agent, tool=True).offered),
            "no_tool": agent.prompt.system_text(()),
        },
        # Evaluations were stored with these names while each formula was a setting.
        "reward": asdict(reward) | reward.recipe._asdict() | {"evidence": "trace"},
        "judge_prompts": {name: load_prompt(name, judge.prompt_folder).version for name in sorted(types) if judge},
        "engine": {name: getattr(engine, name) for name in OF_ENGINE},
        "server": None if server is None else {"base_url": server.base_url, "model": server.model, "api": server.api},
        "sandbox": {name: getattr(sandbox, name) for name in OF_SANDBOX},
    }


@dataclass(frozen=True, slots=True)
class Answered:
    """An answered question in the store."""

    digest: str
    """Hash of the task without its images, `Task.digest`."""
    images: tuple[str, ...]
    """Content hashes of the task's images."""
    outcomes: list[Outcome]

    def is_answer_to(self, task: Task, num_samples: int) -> bool:
        """True if the stored question equals the task and all samples are stored."""
        return (
            len(self.outcomes) == num_samples
            and self.digest == task.digest
            and self.images == tuple(content_hash(image) for image in task.images)
        )


def holds(folder: Path, fingerprint: dict[str, Any]) -> Literal["new", "interrupted", "finished", "another"]:
    """Content of a folder, seen from the evaluation of a fingerprint. Reads only.

    Returns:
        `new` without trajectories, `another` with trajectories of another evaluation; else whether the same evaluation
        was `interrupted` or `finished`.
    """
    state = read_state(folder)
    if state is None or differences(folder, fingerprint):
        return "another" if any(sizes_of(folder).values()) else "new"
    return "finished" if state.get("finished") else "interrupted"


def keep_good(folder: Path) -> None:
    """Remove groups with failed trajectories and incomplete lines from a store."""
    for path in sorted((folder / LINES).glob("*.jsonl")):
        kept = b"".join(_good_lines(path))
        with whole_file(path) as temporary:
            temporary.write_bytes(kept)


def differences(folder: Path, fingerprint: dict[str, Any]) -> list[str]:
    """Dotted names of the settings in which the evaluation in a folder differs.

    A setting that is None equals a missing one: it stands for the behaviour before the setting existed.
    """
    known = (read_state(folder) or {}).get("identity")
    if not known:
        return ["all: the folder has no fingerprint"]
    new = flatten(_plain(fingerprint))
    old = {new_key(f"{ROLLOUT}{name}").removeprefix(ROLLOUT): value for name, value in flatten(known).items()}
    return sorted(name for name in changed(old, new) if name in old or new[name] is not None)


def sizes_of(folder: Path) -> dict[str, int]:
    """Sizes of a store's files of lines in bytes, by name."""
    return {path.name: path.stat().st_size for path in (folder / LINES).glob("*.jsonl")}


def keep_only(folder: Path, sizes: Mapping[str, int], kept: Collection[str]) -> None:
    """Remove stale groups: questions no longer in the data set, or answered again in this run.

    Args:
        folder: The evaluation's folder, to which nothing writes now.
        sizes: Sizes of the files when this test started, by name; later groups are kept.
        kept: Ids of the questions whose earlier answer is kept.
    """
    for path in sorted((folder / LINES).glob("*.jsonl")):
        end = sizes.get(path.name, 0)
        with path.open("rb") as file, whole_file(path) as temporary, temporary.open("wb") as out:
            while file.tell() < end:
                line = file.readline()
                if json.loads(line)["task"]["id"] in kept:
                    out.write(line)
            shutil.copyfileobj(file, out)


def _good_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            try:
                unscored = [t["end_state"] for t in json.loads(line)["trajectories"] if t["reward"] is None]
            except (ValueError, KeyError, TypeError):
                continue  # incomplete
            if all(state == EndState.ERROR_TASK.value for state in unscored):
                yield line.rstrip(b"\n") + b"\n"


def read_state(folder: Path) -> dict[str, Any] | None:
    """The state file's content; None without a readable one."""
    try:
        found = json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_state(folder: Path, fingerprint: dict[str, Any], *, finished: bool) -> None:
    """Write the state file, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / STATE, json.dumps({"finished": finished, "identity": _plain(fingerprint)}, indent=1) + "\n")


def _plain(value: dict[str, Any]) -> Any:
    """The value as JSON returns it, so that tuples and lists compare equal."""
    return json.loads(json.dumps(value, default=repr, sort_keys=True))


def read_answered(folder: Path) -> dict[str, Answered]:
    """The questions of a store by id; the last answer counts."""
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
