"""How a run was trained, in sentences read off its saved configs: what SFT showed, what RL paid for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import yaml

from cv_lightning.digits.demonstrations import DemonstrationConfig
from cv_lightning.renames import migrate_config
from cv_lightning.rewards.config import COMPONENTS, PENALTIES, RewardConfig

CONFIG = "{stage}/fit_config.yaml"


def training_story(configs: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Sentences about SFT and RL, by heading.

    Args:
        configs: text of every resolved config, by path below the run.

    Returns:
        Nothing for a stage without a config, or with one that says nothing about it.
    """
    story = []
    for stage, title, tell in (
        ("sft", "Supervised fine-tuning", _sft),
        ("rl", "Reinforcement learning", _rl),
        ("rl_accuracy", "Ablation", _rl),
    ):
        text = configs.get(CONFIG.format(stage=stage))
        loaded = yaml.safe_load(text) if text else None
        if isinstance(loaded, dict) and (sentences := tell(migrate_config(loaded)[0])):
            story.append((title, sentences))
    return story


def demonstrated_share(config: Mapping[str, Any]) -> float | None:
    """Share of the tasks that need the tool in which SFT showed its use; None where SFT read files."""
    data = _at(config, "data", "init_args")
    if not isinstance(data, dict) or data.get("train_files") or "num_steps" not in data:
        return None
    return float(_demonstrations(data)["tool_share"])


def _demonstrations(data: Mapping[str, Any]) -> dict[str, Any]:
    """The demonstrations' config; a saved config leaves out what was left at its default."""
    defaults = DemonstrationConfig()
    known = {item.name: getattr(defaults, item.name) for item in fields(defaults)}
    return known | (data.get("demonstrations") or {})


# ------------------------------------------------------------------------------------------------ SFT
def _sft(config: dict[str, Any]) -> list[str]:
    share = demonstrated_share(config)
    data = _at(config, "data", "init_args") or {}
    if share is None:
        return [f"Conversations of {', '.join(data['train_files'])}."] if data.get("train_files") else []
    shown = _demonstrations(data)
    steps, warm_up = data["num_steps"], data.get("warm_up_share") or 0.0
    sentences = [
        f"{steps} steps of {data['conversations_per_step']} conversations.",
        f"Of the tasks that need the tool, {_percent(share)} demonstrate it, with its results. The other "
        f"{_percent(1 - share)} are answered at once, as a reader would who never turns or zooms: turned numbers "
        f"{_said(shown['direct_turned'])}, small ones {_said(shown['direct_small'])}.",
    ]
    if shown["needless_share"]:
        sentences.append(f"{_percent(shown['needless_share'])} of the upright tasks turn the picture for no reason.")
    if warm_up:
        kinds = shown["warm_up_shares"]
        parts = ", ".join(f"{kind.replace('_', ' ')} {part:g}" for kind, part in kinds.items())
        sentences.append(
            f"Warm-up: the first {_percent(warm_up)} of the steps ({round(steps * warm_up)}) show clean single turns "
            f"only, {data['warm_up_conversations_per_step']} a step ({parts} parts): an upright task is "
            "answered rightly; of any other the first call is shown, without its result."
        )
    else:
        sentences.append("No warm-up on single turns.")
    return sentences


def _said(policy: str) -> str:
    return {"right": "rightly", "random": "with a random number"}.get(policy, f"by the rule “{policy}”")


# ------------------------------------------------------------------------------------------------ RL
def _rl(config: dict[str, Any]) -> list[str]:
    data = _at(config, "data", "init_args") or {}
    rollout = _at(config, "rollout") or {}
    model = _at(config, "model", "init_args") or {}
    sentences = []
    if "num_iterations" in data and "tasks_per_iteration" in data:
        samples = rollout.get("num_samples", 8)
        sentences.append(
            f"GRPO: {data['num_iterations']} iterations of {data['tasks_per_iteration']} tasks with {samples} "
            f"trajectories each, {_at(model, 'algorithm', 'num_minibatches') or 2} optimizer steps an iteration."
        )
    reward = rollout.get("reward")
    if isinstance(reward, dict):
        sentences.append(f"Reward: {reward_formula(reward)}.")
    if (weight := _at(model, "algorithm", "kl", "weight")) is not None:
        sentences.append(f"KL to the SFT model: weight {weight:g}." if weight else "No KL term to the SFT model.")
    return sentences


def reward_formula(reward: Mapping[str, Any]) -> str:
    """The weighted sum of a reward config, weights of 0 left out."""
    defaults = RewardConfig()
    weights = {name: float(reward.get(name, getattr(defaults, name))) for name in COMPONENTS}
    terms = []
    for name, weight in weights.items():
        sign = "\N{MINUS SIGN}" if name in PENALTIES else "+"
        if weight:
            terms.append(f"{sign} {name}" if weight == 1 else f"{sign} {weight:g} {name}")
    return " ".join(terms).removeprefix("+ ") or "0"


def _at(config: Any, *path: str) -> Any:
    """The value at a path of keys; None where it leads nowhere."""
    for key in path:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _percent(share: float) -> str:
    return f"{100 * share:g} %"
