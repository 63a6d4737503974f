"""Limits and words of the agent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.tools import DEFAULT_TOOLS, Tool
from cv_lightning.tools.schema import check_tools


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What one trajectory may use. The defaults are the released recipe's, but for the cap per turn."""

    max_turns: int = 12
    """Assistant turns."""
    max_turn_tokens: int = 2048
    """Sampled tokens in one turn. Without a cap runaway turns collapse the format at the first RL step."""
    max_prompt_tokens: int = 16384
    """Tokens of the prompt, images expanded."""
    max_response_tokens: int = 16384
    """Tokens after the prompt, tool responses and their images included."""
    max_tool_text_chars: int = 10240
    """Characters of a tool response's text; the middle of a longer one is cut out."""
    max_images: int = 16
    """Images in one trajectory, the task's own included."""
    max_parse_errors: int = 2
    """Malformed calls that are answered with an error before the trajectory ends."""
    tools: list[Tool] | None = None
    """What the policy can call: classes by `class_path`, see docs/tools.md. Null: the code tool alone."""
    tool: bool = True
    """Offer the tools. False: their description is left out and `<tool_call>` cannot be sampled."""
    deterministic: bool = False
    """Admit tool results in a fixed order: bitwise repeatable, slower."""
    deadline_s: float = 1800.0
    """A rollout's wall-clock limit in seconds; what is unfinished then ends as `stopped`."""
    early_stop_fraction: float = 1.0
    """A training rollout ends once this fraction of its trajectories has finished; the rest ends as `stopped`, is
    counted and never scored. Below 1 the engine does not run for a few stragglers (over-provisioning, APRIL,
    2509.18521), but what is cut are long trajectories: keep it above 0.9, or the policy learns from short ones only."""
    tool_deadline_s: float = 60.0
    """Seconds after which a tool call without an answer is given up; its trajectory counts as lost, not as wrong.
    Counted from the last answer to a call handed over before it: calls that wait behind slow ones are not late."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """The words."""

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_turn_tokens", "max_prompt_tokens", "max_response_tokens", "max_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"agent.{name} must be at least 1, not {getattr(self, name)}")
        if self.max_parse_errors < 0 or self.max_tool_text_chars < 16:
            raise ValueError("agent.max_parse_errors must be at least 0 and agent.max_tool_text_chars at least 16")
        if not 0 < self.early_stop_fraction <= 1:
            raise ValueError(f"agent.early_stop_fraction {self.early_stop_fraction} must be above 0 and at most 1")
        if self.deadline_s <= 0 or self.tool_deadline_s <= 0:
            raise ValueError("agent.deadline_s and agent.tool_deadline_s must be above 0 seconds")
        if self.tools is not None and not self.tools:
            raise ValueError("agent.tools is empty; leave it out for the code tool, or set agent.tool false for none")
        check_tools(self.tools or DEFAULT_TOOLS)

    @property
    def offered(self) -> Sequence[Tool]:
        """The tools that the policy is told of; empty for none."""
        return (self.tools or DEFAULT_TOOLS) if self.tool else ()
