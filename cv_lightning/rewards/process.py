"""The reward's components over one group, from what each trajectory used. Pure arithmetic, exact on golden/reward.

Formulas: design.md, "Reward" (the released code) and the paper's three binary penalties. Nothing here knows
trajectories or images; see `transforms` for what counts as used and `geometry` for what a crop is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from cv_lightning.rewards.transforms import CORE, ORIENTATION, TURNED

CORRECT_ABOVE = 0.5
"""An answer whose score is above this is correct."""
GATE = 0.1
"""Where a crop is wanted, accuracy counts in full from this mandatory credit on (reference, agent_loop.py:1286)."""
FREE_CALLS = 2
"""Calls that cost nothing even where fewer operations are wanted."""
NECESSARY_BELOW = 2
"""Necessity is paid while fewer trajectories than this are correct without a tool."""

Penalties = Literal["linear", "binary"]
NecessityOver = Literal["any_tool", "optional_tool"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What one scored trajectory of a group did."""

    score: float = 0.0
    """Answer score in [0, 1]."""
    used: frozenset[str] = frozenset()
    """U: labels of the operations that count as used."""
    crop_credit: float = 0.0
    """Worth of the crop in [0, 1]."""
    executions: int = 0
    """Calls handed to the sandbox, failed ones too."""
    format: float = 0.0
    turned: frozenset[str] | None = None
    """Orientation operations to blame where none is wanted; None: those in `used`."""
    ordered: bool | None = None
    """Decides `exact` where it is not None."""

    @property
    def correct(self) -> bool:
        """True above `CORRECT_ABOVE`."""
        return self.score > CORRECT_ABOVE

    @property
    def used_tool(self) -> bool:
        """True with any label or any execution."""
        return bool(self.used) or self.executions > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Choices between the formulas of code and paper."""

    gate: bool = True
    """Multiply accuracy by mandatory where a crop is wanted and mandatory is below `GATE`."""
    penalties: Penalties = "linear"
    necessity_over: NecessityOver = "any_tool"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStatistics:
    """What the necessity term takes from a group."""

    necessity: float
    """max(0, accuracy with the tool - accuracy without); 0 if all used it."""
    correct_without: int
    """Correct trajectories without the tool."""
    tool_users: tuple[bool, ...] = field(default=())
    """Who counts as a user of the tool."""


def group_statistics(uses: Sequence[ToolUse], over: NecessityOver = "any_tool") -> GroupStatistics:
    """Accuracy with and without the tool (paper: r_nec; reference: agent_loop.py:1236)."""
    users = tuple(a.used_tool if over == "any_tool" else bool(a.used - CORE) for a in uses)
    with_tool = [a.correct for a, is_user in zip(uses, users, strict=True) if is_user]
    without = [a.correct for a, is_user in zip(uses, users, strict=True) if not is_user]
    value = max(0.0, (fmean(with_tool) if with_tool else 0.0) - fmean(without)) if without else 0.0
    return GroupStatistics(necessity=value, correct_without=sum(without), tool_users=users)


def group_components(
    expected: frozenset[str], uses: Sequence[ToolUse], rules: Rules | None = None
) -> list[dict[str, float]]:
    """Unweighted components of every trajectory of a group.

    Args:
        expected: E, from `transforms.expected_operations`.
        uses: the scored trajectories of the group, in any order.
        rules: which formulas.

    Returns:
        One mapping per trajectory: accuracy, format, mandatory, necessity, exact, emerge in [0, 1] (necessity below 1),
        and the penalties usage, spurious (counts, or 0/1) and reasoning (0/1), all >= 0.
    """
    rules = rules or Rules()
    statistics = group_statistics(uses, rules.necessity_over)
    return [
        _components(expected, tool_use, rules, statistics, is_user)
        for tool_use, is_user in zip(uses, statistics.tool_users, strict=True)
    ]


def _components(
    expected: frozenset[str], tool_use: ToolUse, rules: Rules, group: GroupStatistics, uses_tool: bool
) -> dict[str, float]:
    credit = mandatory(expected, tool_use)
    gated = rules.gate and "crop" in expected and credit < GATE
    needed = uses_tool and tool_use.correct and group.correct_without < NECESSARY_BELOW and not gated
    exact = exactness(expected, tool_use.used) if tool_use.ordered is None else float(tool_use.ordered)
    values = {
        "accuracy": float(tool_use.correct) * (credit if gated else 1.0),
        "format": tool_use.format,
        "mandatory": credit,
        "necessity": group.necessity if needed else 0.0,
        "exact": exact,
        "emerge": float(tool_use.correct and bool(tool_use.used - CORE)),
    }
    return values | penalties(expected, tool_use, rules.penalties)


def mandatory(expected: frozenset[str], tool_use: ToolUse) -> float:
    """Share of the wanted operations that were used, a crop counted by its worth; in [0, 1], 0 if none is wanted."""
    if not expected:
        return 0.0
    hits = float(len((expected - {"crop"}) & tool_use.used))
    if "crop" in expected and "crop" in tool_use.used:
        hits += tool_use.crop_credit
    return min(1.0, hits / len(expected))


def exactness(expected: frozenset[str], used: frozenset[str]) -> float:
    """1 if core operations are wanted and exactly those were used, else 0; order and repetition do not matter."""
    wanted = expected & CORE
    return float(bool(wanted) and used & CORE == wanted)


def penalties(expected: frozenset[str], tool_use: ToolUse, kind: Penalties) -> dict[str, float]:
    """What is subtracted, unweighted.

    `linear` (released code): usage = calls beyond max(2, |E|), spurious = orientation operations that ran though E has
    none. `binary` (paper): usage = more than |E| + 1 calls, spurious = an orientation operation ran and E is empty,
    reasoning = right although the crop's worth is below 0.1.
    """
    turned = (tool_use.used if tool_use.turned is None else tool_use.turned) & (ORIENTATION | {TURNED})
    if kind == "binary":
        return {
            "usage": float(tool_use.executions > len(expected) + 1),
            "spurious": float(not expected and bool(turned)),
            "reasoning": float("crop" in expected and tool_use.correct and tool_use.crop_credit < GATE),
        }
    return {
        "usage": float(max(0, tool_use.executions - max(FREE_CALLS, len(expected)))),
        "spurious": float(len(turned)) if not expected & ORIENTATION else 0.0,
        "reasoning": 0.0,
    }
