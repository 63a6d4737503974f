"""What the numbers of an evaluation depend on, besides model, data and seed.

An interrupted evaluation continues only where all of it is the same.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from cv_lightning.agent.config import AgentConfig
from cv_lightning.data.modules import EvaluationDataModule
from cv_lightning.engines import EngineConfig
from cv_lightning.rewards import RewardConfig
from cv_lightning.rewards.judge.prompts import load_prompt
from cv_lightning.sandbox import SandboxConfig

OF_ENGINE = ("kind", "max_model_len", "max_images")
"""Settings of the engine that change what it can say; the others change how fast."""
OF_SANDBOX = (
    "timeout_s",
    "cpu_s",
    "memory_mb",
    "max_code_chars",
    "max_result_pixels",
    "max_error_chars",
    "reference_results",
)
"""Settings of the sandbox that change what a snippet gets."""


def describe_rollouts(
    agent: AgentConfig, reward: RewardConfig, engine: EngineConfig, sandbox: SandboxConfig
) -> dict[str, Any]:
    """As JSON values, prompts as the text that their files hold.

    Raises:
        ValueError: a prompt of the judge is missing.
    """
    server, judge = engine.server, reward.judge
    types = {judge.default_task_type, *judge.task_types.values()} if judge else ()
    return {
        "agent": asdict(agent),
        "system": {
            "tool": agent.prompt.system_text(replace(agent, tool=True).offered),
            "no_tool": agent.prompt.system_text(()),
        },
        # the formulas under the names that evaluations stored while each was a setting
        "reward": asdict(reward) | reward.recipe._asdict() | {"evidence": "trace"},
        "judge_prompts": {name: load_prompt(name, judge.prompt_folder).version for name in sorted(types) if judge},
        "engine": {name: getattr(engine, name) for name in OF_ENGINE},
        "server": None if server is None else {"base_url": server.base_url, "model": server.model, "api": server.api},
        "sandbox": {name: getattr(sandbox, name) for name in OF_SANDBOX},
    }


def describe_questions(data: object) -> dict[str, Any]:
    """JSON values that identify the questions of a data module."""
    return data.describe_questions() if isinstance(data, EvaluationDataModule) else {"module": type(data).__name__}
