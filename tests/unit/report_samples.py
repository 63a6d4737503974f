"""A run folder like the quickstart's, made by the real writers from trajectories of a pretended policy that learns."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from lightning.pytorch.loggers import CSVLogger
from trajectory_samples import KINDS, Policy, digit_task, group

from cv_lightning.evaluation.metrics import summarise
from cv_lightning.rewards import RewardConfig
from cv_lightning.rewards.metrics import means, reward_sums
from cv_lightning.rollout.collector import rollout_metrics
from cv_lightning.trajectory import StoreConfig, TrajectoryWriter
from cv_lightning.types import Group

CONFIGS = Path(__file__).parents[2] / "configs" / "quickstart"
AFTER_SFT = {"greedy": Policy(0.1, 0.05, 0.0, 0.0, 0.9), "sampled": Policy(0.5, 0.4, 0.14, 0.08, 0.85)}
AFTER_RL = {"greedy": Policy(0.99, 0.98, 0.0, 0.0, 0.9), "sampled": Policy(0.95, 0.95, 0.01, 0.01, 0.85)}
TOOL_OFF = Policy(0, 0, 0, 0, 0.85)
WITHOUT_PROCESS = {"greedy": Policy(0.97, 0.95, 0.0, 0.0, 0.9), "sampled": Policy(0.9, 0.9, 0.06, 0.01, 0.85)}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything."""

    per_kind: int = 12
    """Held-out tasks of each kind."""
    iterations: int = 30
    tasks: int = 8
    """Of each iteration."""
    samples: int = 4
    ablation: bool = False


def write_run(folder: Path, size: Size | None = None) -> Path:
    """Write everything that a quickstart leaves in its folder, but the weights."""
    size = size or Size()
    stages = {"sft": AFTER_SFT, "rl": AFTER_RL} | ({"rl_accuracy": WITHOUT_PROCESS} if size.ablation else {})
    for stage, modes in stages.items():
        for mode, policy in modes.items():
            _evaluate(folder / "eval" / f"{stage}_{mode}_tool", policy, size)
            _evaluate(folder / "eval" / f"{stage}_{mode}_notool", TOOL_OFF, size)
    _sft(folder / "sft")
    _rl(folder / "rl", size, "reward", needless=0.02)
    timing: dict[str, float] = {"seed": 0, "ranks": 1, "install": 252.1, "tiny": 6.0, "sft": 250.0, "sft_eval": 61.5}
    timing |= {"rl": 400.0, "rl_eval": 68.5}
    if size.ablation:
        _rl(folder / "rl_accuracy", size, "reward_accuracy", needless=0.2)
        timing |= {"rl_accuracy": 395.0, "rl_accuracy_eval": 70.0}
    (folder / "timing.json").write_text(json.dumps(timing))
    return folder


def _evaluate(folder: Path, policy: Policy, size: Size) -> None:
    groups = [group(digit_task(index, kind), 1, policy) for kind in KINDS for index in range(size.per_kind)]
    with TrajectoryWriter(folder) as writer:
        for item in groups:
            writer.write_group(item, 0)
    (folder / "metrics.json").write_text(json.dumps(summarise(groups).to_json()))
    _, mode, tool = folder.name.rsplit("_", 2)
    setting = {"name": f"{mode}_{tool}", "temperature": float(mode == "sampled"), "tool": tool == "tool"}
    (folder / "evaluation.json").write_text(json.dumps({"finished": True, "identity": {"setting": setting}}))


def _sft(folder: Path) -> None:
    logger = CSVLogger(folder, name="", version="")
    rng = random.Random(0)
    for step in range(200):
        loss = 2.5 * 0.97**step + 0.3 + rng.random() / 10 + (0.4 if 70 <= step < 90 else 0)
        values = {"sft/loss": loss, "sft/grad_norm": 1 + rng.random(), "sft/tokens": 8000.0, "sft/lr": 1e-3}
        logger.log_metrics(values | {"iteration": step + 1.0, "epoch": 0}, step)
    logger.save()
    (folder / "fit_config.yaml").write_text(yaml.safe_dump(resolved("sft")))
    record = {"command": ["python", "fit"], "commit": "0123abcd", "python": "3.11", "versions": {"torch": "2.13.0"}}
    (folder / "fit_run.json").write_text(json.dumps(record))


def _rl(folder: Path, size: Size, recipe: str, needless: float) -> None:
    logger = CSVLogger(folder, name="", version="")
    assert logger.experiment is not None  # made while the folder is still empty
    weights = resolved(recipe)
    reward = RewardConfig(**weights)
    rng = random.Random(1)
    with TrajectoryWriter(folder, StoreConfig(share=0.3)) as writer:
        for iteration in range(size.iterations):
            groups = _iteration(iteration, size, reward, needless)
            for item in groups:
                writer.write_group(item, iteration)
            values = rollout_metrics(groups, 2.0) | means(reward_sums(groups))
            values |= {f"rollout/{name}": value for name, value in summarise(groups).scalars().items()}
            values |= {"policy/mismatch_max": 1e-5 * (1 + rng.random()), "policy/entropy": 0.9 * 0.97**iteration}
            values |= {"policy/clipped_frac": rng.random() / 50, "policy/grad_norm": fmean([rng.random()] * 3)}
            values |= {"time/sync_s": 0.1, "time/rollout_s": 2.0, "time/update_s": 1.5}
            logger.log_metrics(values | {"iteration": iteration + 1.0, "epoch": 0}, iteration)
    logger.save()
    config = resolved("grpo")
    config["rollout"]["reward"] = weights
    (folder / "fit_config.yaml").write_text(yaml.safe_dump(config))


def resolved(name: str) -> Any:
    """A shipped config with the files that it names in their places, as a run saves it."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        is_file = isinstance(value, str) and value.endswith(".yaml") and (CONFIGS / value).is_file()
        return yaml.safe_load((CONFIGS / value).read_text()) if is_file else value

    return walk(walk(f"{name}.yaml"))


def _iteration(iteration: int, size: Size, reward: RewardConfig, needless: float) -> list[Group]:
    done = min(1.0, 1.5 * iteration / size.iterations)
    policy = Policy(0.4 + 0.55 * done, 0.35 + 0.6 * done, needless * (1 - done), 0.1 * (1 - done), 0.6 + 0.3 * done)
    tasks = [digit_task(1000 + size.tasks * iteration + i, KINDS[i % len(KINDS)]) for i in range(size.tasks)]
    return [group(task, size.samples, policy, iteration=iteration, reward=reward) for task in tasks]
