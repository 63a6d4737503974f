"""The reward's components over one group, from what each trajectory used. Pure arithmetic, exact on golden/reward.

The formulas of the released code and of the paper; docs/rewards.md explains each. `transforms` decides what counts as
used and `geometry` scores crops: nothing here knows trajectories or images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

from cv_lightning.rewards.geometry import CropCredit
from cv_lightning.rewards.transforms import CORE, ORIENTATION, TURNED

CORRECT_ABOVE = 0.5
"""An answer whose score is above this is correct."""
GATE = 0.1
"""Where a crop is wanted, accuracy counts in full from this mandatory credit on (released code)."""
FREE_CALLS = 2
"""Calls that cost nothing even where fewer operations are wanted."""
NECESSARY_BELOW = 2
"""Necessity is paid while fewer trajectories than this are correct without a tool."""


class Recipe(NamedTuple):
    """Formulas that belong together; `RewardConfig.credit` picks one of `RECIPES`."""

    crop_credit: CropCredit
    gate: bool
    """Multiply accuracy by mandatory where a crop is wanted and mandatory is below `GATE`."""
    penalties: Literal["linear", "binary"]
    """`linear` counts calls and operations, `binary` is 0 or 1 each."""
    necessity_over: Literal["any_tool", "optional_tool"]
    """Who used the tool: all who called it, or who used an operation outside the core."""
    format_by: Literal["turn", "response"]
    """Every turn must be well-formed, or only the response as a whole."""


Credit = Literal["net", "ran", "steps"]
RECIPES: dict[Credit, Recipe] = {
    "net": Recipe("coverage", True, "linear", "any_tool", "turn"),
    "steps": Recipe("iou", False, "binary", "optional_tool", "turn"),
    "ran": Recipe("iou", True, "linear", "any_tool", "response"),
}
"""The project's own recipe, the paper's, and the released code's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What one scored trajectory of a group did."""

    score: float = 0.0
    """Answer score in [0, 1]."""
    used: frozenset[str] = frozenset()
    """Labels of the operations that count as used (U)."""
    crop_score: float = 0.0
    """Score of the crop, in [0, 1]."""
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


def group_components(
    expected: frozenset[str], uses: Sequence[ToolUse], recipe: Recipe = RECIPES["net"]
) -> list[dict[str, float]]:
    """Unweighted components of every trajectory of a group.

    Args:
        expected: The wanted operations (E), from `transforms.expected_operations`.
        uses: The scored trajectories of the group, in any order.
        recipe: Which formulas.

    Returns:
        One mapping per trajectory: accuracy, format, mandatory, necessity, exact, emerge in [0, 1] (necessity below 1),
        and the penalties usage, spurious (counts, or 0/1) and reasoning (0/1), all >= 0.
    """
    by_call = recipe.necessity_over == "any_tool"
    users = [bool(use.used or use.executions) if by_call else bool(use.used - CORE) for use in uses]
    right_with = [use.correct for use, used_tool in zip(uses, users, strict=True) if used_tool]
    right_without = [use.correct for use, used_tool in zip(uses, users, strict=True) if not used_tool]
    # the paper's r_nec: accuracy with the tool less that without it, 0 where all used it
    gain = max(0.0, fmean(right_with or [0.0]) - fmean(right_without)) if right_without else 0.0
    found = []
    for use, used_tool in zip(uses, users, strict=True):
        credit = mandatory(expected, use)
        gated = recipe.gate and "crop" in expected and credit < GATE
        needed = used_tool and use.correct and sum(right_without) < NECESSARY_BELOW and not gated
        components = {
            "accuracy": float(use.correct) * (credit if gated else 1.0),
            "format": use.format,
            "mandatory": credit,
            "necessity": gain if needed else 0.0,
            "exact": exactness(expected, use.used) if use.ordered is None else float(use.ordered),
            "emerge": float(use.correct and bool(use.used - CORE)),
        }
        found.append(components | penalties(expected, use, recipe))
    return found


def mandatory(expected: frozenset[str], tool_use: ToolUse) -> float:
    """Fraction of the wanted operations that were used, a crop counted by its score; 0 if none is wanted."""
    if not expected:
        return 0.0
    hits = float(len((expected - {"crop"}) & tool_use.used))
    if "crop" in expected and "crop" in tool_use.used:
        hits += tool_use.crop_score
    return min(1.0, hits / len(expected))


def exactness(expected: frozenset[str], used: frozenset[str]) -> float:
    """1 if core operations are wanted and exactly those were used, else 0; order and repetition do not matter."""
    wanted = expected & CORE
    return float(bool(wanted) and used & CORE == wanted)


def penalties(expected: frozenset[str], tool_use: ToolUse, recipe: Recipe) -> dict[str, float]:
    """What is subtracted, unweighted.

    `linear` (released code): usage = calls beyond max(2, |E|), spurious = orientation operations that ran though E has
    none. `binary` (paper): usage = more than |E| + 1 calls, spurious = an orientation operation ran and E is empty,
    reasoning = right although the crop's score is below 0.1.
    """
    turned = (tool_use.used if tool_use.turned is None else tool_use.turned) & (ORIENTATION | {TURNED})
    if recipe.penalties == "binary":
        return {
            "usage": float(tool_use.executions > len(expected) + 1),
            "spurious": float(not expected and bool(turned)),
            "reasoning": float("crop" in expected and tool_use.correct and tool_use.crop_score < GATE),
        }
    return {
        "usage": float(max(0, tool_use.executions - max(FREE_CALLS, len(expected)))),
        "spurious": float(len(turned)) if not expected & ORIENTATION else 0.0,
        "reasoning": 0.0,
    }
