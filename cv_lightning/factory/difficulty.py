"""Pass rates of tasks: measured by k rollouts of a policy with the project's own agent loop, or read from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.driver import Rollout
from cv_lightning.agent.request import requests_of
from cv_lightning.background import Background
from cv_lightning.engines import Engine, EngineConfig, SamplingConfig, build_engine, engine_kind
from cv_lightning.factory.build_files import ProgressFile, Show
from cv_lightning.models.loading import PolicyConfig, load_adapter, load_policy
from cv_lightning.ranges import PositiveInt, Range, check_ranges
from cv_lightning.rewards import RewardConfig, RewardModule
from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.types import DataError, Group, Task, Trajectory

PassRates = dict[str, tuple[int, int]]
"""(right, scored) trajectories by task id."""


@dataclass(frozen=True, kw_only=True)
class DifficultyConfig:
    """Policy whose pass rates are measured, and the number of rollouts."""

    policy: PolicyConfig
    """Checkpoint that will be trained."""
    samples: Annotated[int, Range(at_least=2)] = 8
    """Rollouts of each task (k)."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Engine that runs the policy."""
    agent: AgentConfig = field(default_factory=AgentConfig)
    """Limits and prompts of the agent, as in training."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Temperature and seed."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Scoring of the answers: rules, judge."""
    tasks_at_once: PositiveInt = 64
    """Tasks rolled out together; the progress is stored after each such batch."""

    def __post_init__(self) -> None:
        check_ranges(self, "difficulty")


def is_informative(right: int, scored: int) -> bool:
    """True if some rollouts are right and some wrong; otherwise all advantages of the group are zero."""
    return 0 < right < scored


# ------------------------------------------------------------------------------------------------ measured
def measure(
    tasks: Iterator[tuple[int, Task]],
    config: DifficultyConfig,
    progress: ProgressFile,
    show: Show | None = None,
) -> PassRates:
    """Roll out the tasks that `progress` does not hold yet.

    Args:
        tasks: Tasks with their numbers; read in batches.
        config: The policy.
        progress: Gets an entry per task, `{number, id, right, scored}`.
        show: Called with the number of tasks done.

    Returns:
        All pass rates, including those of earlier runs.

    Raises:
        EngineError, CheckpointError, SandboxError: The policy or the sandbox cannot be run.
    """
    waiting = (pair for pair in tasks if pair[0] not in progress)
    batch = list(islice(waiting, config.tasks_at_once))
    with _rollout_of(config) if batch else nullcontext() as parts:
        while parts is not None and batch:
            counts = _pass_counts([task for _, task in batch], config, *parts)
            for (number, task), (right, scored) in zip(batch, counts, strict=True):
                progress.add({"number": number, "id": task.id, "right": right, "scored": scored})
            if show is not None:
                show(len(progress), None, "")
            batch = list(islice(waiting, config.tasks_at_once))
    return {entry["id"]: (entry["right"], entry["scored"]) for entry in progress.entries()}


def _pass_counts(
    tasks: Sequence[Task], config: DifficultyConfig, rollout: Rollout, rewards: RewardModule
) -> list[tuple[int, int]]:
    trajectories = rollout.run(requests_of(tasks, config.samples), config.sampling)
    counts = []
    for at, task in enumerate(tasks):
        members = trajectories[at * config.samples : (at + 1) * config.samples]
        group = Group(task=task, trajectories=members)
        rewards.score_group(group, rollout.background.submit(rewards.ask_terms(group)).result())
        counts.append(count_right(members))
    return counts


def count_right(members: Sequence[Trajectory]) -> tuple[int, int]:
    """(right, scored) of a task's trajectories; one that an infrastructure error ended is not scored."""
    rewards = [member.reward for member in members if member.reward is not None]
    return sum(reward.correct for reward in rewards), len(rewards)


@contextmanager
def _rollout_of(config: DifficultyConfig) -> Iterator[tuple[Rollout, RewardModule]]:
    """Context with the agent loop on the policy's engine and a sandbox, and the rewards."""
    adapter = load_adapter(config.policy)
    in_process = engine_kind(config.engine) == "transformers"
    engine: Engine = build_engine(
        config.engine,
        config.policy.path,
        dtype=config.policy.dtype,
        seed=config.sampling.seed,
        model=load_policy(config.policy) if in_process else None,
        adapter=adapter,
    )
    encoder = DialogueEncoder(adapter, config.agent.dialect)
    rewards, background = RewardModule(config.reward), Background("difficulty-io")
    try:
        with Sandbox(SandboxConfig()) as sandbox:
            rollout = Rollout(
                engine=engine,
                sandbox=sandbox,
                encoder=encoder,
                background=background,
                config=config.agent,
                banned_ids=encoder.banned_ids(config.agent.tool),
                score=rewards.score_answer,
                window=2 * config.engine.max_num_seqs,
            )
            yield rollout, rewards
    finally:
        background.close()
        rewards.close()
        engine.close()


# ------------------------------------------------------------------------------------------------ given
def read_pass_rates(path: Path) -> PassRates:
    """Pass rates from a file: JSONL of `{id, right, scored}`, as a build writes it, or `{id, rate}`.

    Raises:
        DataError: The file cannot be read, or a line has neither form.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"--pass_rates {path}: cannot be read ({error})") from error
    rates: PassRates = {}
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if "settings" in entry:
                continue  # the first line of a build's own file
            if "rate" in entry:
                rate = float(entry["rate"])
                rates[str(entry["id"])] = (round(rate * RATE_UNITS), RATE_UNITS)
            else:
                rates[str(entry["id"])] = (int(entry["right"]), int(entry["scored"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"--pass_rates {path}, line {number}: not {{id, rate}} or {{id, right, scored}} ({error!r})"
            ) from error
    if not rates:
        raise DataError(f"--pass_rates {path}: the file has no pass rate")
    return rates


RATE_UNITS = 1_000_000
"""Denominator of a rate that is given without counts."""
