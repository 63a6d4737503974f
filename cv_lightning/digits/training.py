"""How the quickstart was trained, in sentences from its stored configs: demonstrations of SFT, reward of RL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from cv_lightning.digits.demonstrations import DemonstrationConfig
from cv_lightning.digits.measure import MEASURES
from cv_lightning.digits.scenes import KINDS
from cv_lightning.renames import migrate_config
from cv_lightning.rewards.config import COMPONENTS, PENALTIES, RewardConfig

ANSWERS = {"right": "correctly", "random": "with a random number"}


def training_story(configs: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Sentences about SFT and RL, by heading.

    Args:
        configs: Text of every resolved config, by path below the run.

    Returns:
        Nothing for a stage without a config, or whose config has none of these settings.
    """
    story = []
    for stage, title, tell in (
        ("sft", "Supervised fine-tuning", _sft),
        ("rl", "Reinforcement learning", _rl),
        ("rl_accuracy", "Ablation", _rl),
        ("sft_images", "Supervised fine-tuning without text", _sft),
        ("rl_images", "Reinforcement learning without text", _rl),
    ):
        config = yaml.safe_load(configs.get(f"{stage}/fit_config.yaml", ""))
        if isinstance(config, dict) and (sentences := tell(migrate_config(config)[0])):
            story.append((title, sentences))
    return story


def _sft(config: dict[str, Any]) -> list[str]:
    data = _arguments(config, "data")
    if data.get("train_files"):
        return [f"Conversations of {', '.join(data['train_files'])}."]
    if "num_steps" not in data:
        return []
    shown = asdict(DemonstrationConfig()) | (data.get("demonstrations") or {})
    share, steps, warm_up = shown["tool_share"], data["num_steps"], data.get("warm_up_share") or 0.0
    direct = (
        f"as by a reader who never rotates or crops: rotated numbers {ANSWERS[shown['direct_turned']]}, small ones "
        f"{ANSWERS[shown['direct_small']]}"
    )
    if set((data.get("digits") or {}).get("kind_shares") or KINDS) <= MEASURES.keys():
        direct = "with the answer of another scene"
    sentences = [
        f"{steps} steps of {data['conversations_per_step']} conversations.",
        f"Of the tasks that need the tool, {100 * share:g} % demonstrate it, with its results. The other "
        f"{100 * (1 - share):g} % are answered at once, {direct}.",
    ]
    if shown["needless_share"]:
        sentences.append(f"{100 * shown['needless_share']:g} % of the upright tasks rotate the image without need.")
    if not warm_up:
        return [*sentences, "No warm-up on single turns."]
    parts = ", ".join(f"{kind.replace('_', ' ')} {part:g}" for kind, part in shown["warm_up_shares"].items())
    return [
        *sentences,
        f"Warm-up: the first {100 * warm_up:g} % of the steps ({round(steps * warm_up)}) show clean single turns only, "
        f"{data['warm_up_conversations_per_step']} a step ({parts} parts): an upright task is answered correctly; of "
        "any other the first call is shown, without its result.",
    ]


def _rl(config: dict[str, Any]) -> list[str]:
    data, model, rollout = _arguments(config, "data"), _arguments(config, "model"), config.get("rollout") or {}
    algorithm, sentences = model.get("algorithm") or {}, []
    if "num_iterations" in data and "tasks_per_iteration" in data:
        sentences.append(
            f"GRPO: {data['num_iterations']} iterations of {data['tasks_per_iteration']} tasks with "
            f"{rollout.get('num_samples', 8)} trajectories each, {algorithm.get('num_minibatches', 2)} optimizer steps "
            "an iteration."
        )
    if isinstance(reward := rollout.get("reward"), dict):
        sentences.append(f"Reward: {reward_formula(reward)}.")
    if (weight := (algorithm.get("kl") or {}).get("weight")) is not None:
        sentences.append(f"KL to the SFT model: weight {weight:g}." if weight else "No KL term to the SFT model.")
    return sentences


def reward_formula(reward: Mapping[str, Any]) -> str:
    """The weighted sum of a reward config, weights of 0 left out."""
    defaults = RewardConfig()
    terms = []
    for name in COMPONENTS:
        if weight := float(reward.get(name, getattr(defaults, name))):
            sign = "\N{MINUS SIGN}" if name in PENALTIES else "+"
            terms.append(f"{sign} {name}" if weight == 1 else f"{sign} {weight:g} {name}")
    return " ".join(terms).removeprefix("+ ") or "0"


def _arguments(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Arguments of a class that a config names; empty where it has none."""
    spec = config.get(part)
    return spec.get("init_args") or {} if isinstance(spec, dict) else {}
