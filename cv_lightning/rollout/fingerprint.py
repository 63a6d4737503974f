"""Config fingerprints: the settings that an evaluation's results depend on, besides model, data and seed.

An interrupted evaluation continues only where its fingerprint is the same.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from cv_lightning.agent.config import AgentConfig
from cv_lightning.engines import EngineConfig
from cv_lightning.rewards import RewardConfig
from cv_lightning.rewards.judge.prompts import load_prompt
from cv_lightning.sandbox import SandboxConfig

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
