"""How often a policy answers a task: k rollouts with the project's own agent loop, or a file that says so."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.driver import Rollout
from cv_lightning.agent.request import requests_of
from cv_lightning.background import Background
from cv_lightning.engines import Engine, EngineConfig, SamplingConfig, build_engine, engine_kind
from cv_lightning.factory.progress import ProgressFile
from cv_lightning.models.loading import PolicyConfig, load_adapter, load_policy
from cv_lightning.rewards import RewardConfig, RewardModule
from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.types import DataError, Group, Task, Trajectory

logger = logging.getLogger(__name__)

PassRates = dict[str, tuple[int, int]]
"""By task id: (right, scored) trajectories."""


@dataclass(frozen=True, kw_only=True)
class DifficultyConfig:
    """Which policy is asked, how often, and which pass rates are kept."""

    policy: PolicyConfig
    """The checkpoint that is to be trained."""
    samples: int = 8
    """Rollouts of each task (k)."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How the policy is run."""
    agent: AgentConfig = field(default_factory=AgentConfig)
    """Limits and words of the agent; as in training."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Temperature and seed."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """How answers are scored: mathematics, judge."""
    tasks_at_once: int = 64
    """Tasks rolled out together; what is done is kept after each such batch."""

    def __post_init__(self) -> None:
        if self.samples < 2 or self.tasks_at_once < 1:
            raise ValueError(
                f"--difficulty.samples {self.samples} must be at least 2 (one says neither all nor none) and "
                f"--difficulty.tasks_at_once {self.tasks_at_once} at least 1"
            )


def is_informative(right: int, scored: int) -> bool:
    """True if some rollouts are right and some wrong: of a group that is all the one or the other nothing is learnt."""
    return 0 < right < scored


# ------------------------------------------------------------------------------------------------ measured
def measure(
    tasks: Iterator[tuple[int, Task]],
    config: DifficultyConfig,
    progress: ProgressFile,
    show: Callable[[int], None] | None = None,
) -> PassRates:
    """Roll out the tasks that `progress` does not hold yet.

    Args:
        tasks: with their numbers; read in batches.
        config: the policy.
        progress: gets an entry per task, `{number, id, right, scored}`.
        show: called with the number of tasks done.

    Returns:
        All pass rates, those of earlier runs too.

    Raises:
        EngineError, CheckpointError, SandboxError: the policy or the sandbox cannot be run.
    """
    waiting = (pair for pair in tasks if pair[0] not in progress)
    batch = list(islice(waiting, config.tasks_at_once))
    if batch:
        with _rollout_of(config) as (rollout, rewards):
            while batch:
                for (number, task), (right, scored) in zip(
                    batch, _pass_counts([task for _, task in batch], config, rollout, rewards), strict=True
                ):
                    progress.add({"number": number, "id": task.id, "right": right, "scored": scored})
                if show is not None:
                    show(len(progress))
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
    """(right, scored) of a task's trajectories; one that a failed part ended is not scored, so not wrong."""
    rewards = [member.reward for member in members if member.reward is not None]
    return sum(reward.correct for reward in rewards), len(rewards)


@contextmanager
def _rollout_of(config: DifficultyConfig) -> Iterator[tuple[Rollout, RewardModule]]:
    """The agent loop with the policy's engine, a sandbox and the rewards; all closed afterwards."""
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
    rewards, background = RewardModule(config.reward), Background("difficulty-io")
    try:
        with Sandbox(SandboxConfig()) as sandbox:
            rollout = Rollout(
                engine=engine,
                sandbox=sandbox,
                encoder=DialogueEncoder(adapter),
                background=background,
                config=config.agent,
                banned_ids=adapter.banned_ids(config.agent.tool),
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
    """Pass rates of a file: JSONL of `{id, right, scored}` or `{id, rate}`, such as a build itself writes.

    Raises:
        DataError: the file cannot be read, or a line names neither.
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
                continue  # the head of a build's own file
            if "rate" in entry:
                rate = float(entry["rate"])
                rates[str(entry["id"])] = (round(rate * RATE_UNITS), RATE_UNITS)
            else:
                rates[str(entry["id"])] = (int(entry["right"]), int(entry["scored"]))
        except (ValueError, KeyError, TypeError) as error:
            message = f"--pass_rates {path}, line {number}: wanted {{id, rate}} or {{id, right, scored}} ({error!r})"
            raise DataError(message) from error
    if not rates:
        raise DataError(f"--pass_rates {path}: no pass rate in it")
    return rates


RATE_UNITS = 1_000_000
"""A rate without counts is kept in these parts."""
