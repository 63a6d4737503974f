"""Limits, tools and prompt of the agent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.dialects import dialect_named
from cv_lightning.ranges import Limit, NonNegativeInt, PositiveInt, Range, check_ranges
from cv_lightning.tools import DEFAULT_TOOLS, Tool
from cv_lightning.tools.schema import check_tools


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Limits of one trajectory, its tools and prompt. Defaults are the released recipe's but for `max_turn_tokens`."""

    max_turns: PositiveInt = 12
    """Maximum assistant turns."""
    max_turn_tokens: PositiveInt = 2048
    """Maximum sampled tokens in one turn. Without this limit endless turns collapse the format at the first RL step."""
    max_prompt_tokens: PositiveInt = 16384
    """Maximum tokens of the prompt, images expanded."""
    max_response_tokens: PositiveInt = 16384
    """Maximum tokens after the prompt, tool responses and their images included."""
    max_tool_text_chars: Annotated[int, Range(at_least=16)] = 10240
    """Maximum characters of a tool response's text; the middle of a longer text is cut out."""
    max_images: PositiveInt = 16
    """Maximum images in one trajectory, the task's own included."""
    max_parse_errors: NonNegativeInt = 2
    """Maximum malformed calls that are answered with an error before the trajectory ends."""
    tools: list[Tool] | None = None
    """The tools, by `class_path`; see docs/tools.md. Null: only the code tool."""
    dialect: str | None = None
    """How tool calls are written: hermes, qwen_xml, python_block, or the import path of a `Dialect` of your own.
    Null: as the model's family does; see docs/tools.md."""
    tool: bool = True
    """Offer the tools. False: the prompt does not describe them and the token that begins a call cannot be sampled."""
    deterministic: bool = False
    """Admit tool results in a fixed order: rollouts repeat bit for bit, and are slower."""
    deadline_s: Limit = 1800.0
    """Time limit of a rollout in seconds; unfinished trajectories then end as `stopped`. Scores that are still missing
    may take as long again."""
    early_stop_fraction: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Fraction of trajectories after which a training rollout ends; the others end as `stopped`, are counted and never
    scored. Below 1 the engine does not run for a few long trajectories (over-provisioning, APRIL, 2509.18521). Keep
    it above 0.9, or the policy learns from short trajectories only."""
    tool_deadline_s: Limit = 60.0
    """Time limit of a tool call in seconds; its trajectory then ends as an infrastructure error, not as wrong. The time
    counts from the last answer to an earlier call, so that calls queued behind slow ones are not late."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """Texts of the prompt and of tool responses."""

    def __post_init__(self) -> None:
        check_ranges(self, "rollout.agent")
        if self.tools is not None and not self.tools:
            raise ValueError("agent.tools is empty; leave it out for the code tool, or set agent.tool false for none")
        check_tools(self.tools or DEFAULT_TOOLS)
        if self.dialect is not None:
            dialect_named(self.dialect).check_tools(self.tools or DEFAULT_TOOLS)

    @property
    def longest_s(self) -> float:
        """Longest time of a rollout in seconds, scores included."""
        return 2 * self.deadline_s

    @property
    def offered(self) -> Sequence[Tool]:
        """The tools that the prompt describes; empty if tools are off."""
        return (self.tools or DEFAULT_TOOLS) if self.tool else ()

    @property
    def answer_prefix(self) -> str:
        """Start of the model's turn; empty if tools are on."""
        return "" if self.tool else self.prompt.answer_prefix or ""
