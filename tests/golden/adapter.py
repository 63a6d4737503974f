"""Feeds golden cases to the project's functions; `compare.py` says what `call` returns by topic."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # compare.py lies outside the project, which need not be installed
    sys.path.insert(0, str(ROOT))

Case = dict[str, Any]


def call(topic: str, case: Case) -> Any:
    """What the project returns for one case of a topic."""
    return TOPICS[topic](case)


def answers(case: Case) -> str | bool | None:
    """Extraction and equivalence of answers."""
    from cv_lightning.rewards.answer import are_answers_equivalent

    given = case["input"]
    if case["fn"] == "extract_answer":
        return _extract_answer(given["text"])
    return are_answers_equivalent(given["prediction"], given["ground_truth"])


MAX_UNTAGGED_LINES = 500
"""The released code extracts nothing from a text of so many lines without an answer tag."""


def _extract_answer(text: str | None) -> str | None:
    """Answer of a whole response, read as leniently as the released code does; training uses `markup.final_answer`.

    The last answer in tags that is not empty; else what follows an unclosed tag; else the last line of a text without
    tags and without an unfinished thought.
    """
    from cv_lightning.rewards.markup import answer_spans, cut_spans

    text = cut_spans(text or "", "<tool_response>", "</tool_response>", mark="")
    closed = [answer.strip() for answer in answer_spans(text)]
    if closed:
        return next((answer for answer in reversed(closed) if answer), "")
    if "<answer>" in text:
        return text.rpartition("<answer>")[2].strip()
    lines = text.strip().split("\n")
    if not text.strip() or len(lines) >= MAX_UNTAGGED_LINES or text.count("<think>") > text.count("</think>"):
        return None
    return lines[-1].strip()


def response_format(case: Case) -> float:
    """Format of a response."""
    from cv_lightning.rewards.format import check_format

    return check_format(case["input"]["text"])


def toolcalls(case: Case) -> dict[str, Any]:
    """All well-formed calls of a turn, read as `parse_turn` reads the first one.

    They agree with the released code's Hermes parser but for its questionable cases: calls inside thoughts are not
    calls, arguments given as JSON text are decoded, raw line breaks and tabs in strings are accepted, an end tag inside
    a string does not cut the call, and numbers that JSON cannot hold are refused.
    """
    from cv_lightning.agent.protocol import _blocks
    from cv_lightning.dialects import HERMES, RawCall
    from cv_lightning.dialects.hermes import load_json

    blocks = [
        block for block in _blocks(case["input"]["text"], HERMES).bodies if "arguments" in (load_json(block) or ())
    ]
    found = [call for block in blocks if isinstance(call := HERMES.read(block, ()), RawCall)]
    return {"calls": [{"name": call.name, "arguments": json.dumps(call.arguments)} for call in found]}


def images(case: Case) -> dict[str, Any]:
    """Size rules of tool outputs."""
    from cv_lightning.images import fit_to_pixels, is_usable_size

    given = case["input"]
    size = given["width"], given["height"]
    resized = fit_to_pixels(*size, min_pixels=given["min_pixels"], max_pixels=given["max_pixels"])
    return {"valid": is_usable_size(*size), "resized": list(resized) if resized else None}


def reward(case: Case) -> dict[str, Any]:
    """Components and totals of a group, by the recipe `reference` with the case's weights."""
    import yaml

    from cv_lightning.images import iou
    from cv_lightning.rewards.config import RewardConfig
    from cv_lightning.rewards.process import ToolUse, group_components
    from cv_lightning.rewards.transforms import expected_operations

    given, params = case["input"], case["input"]["params"]
    recipe = yaml.safe_load((ROOT / "configs" / "reward" / "reference.yaml").read_text())
    weights = {
        "format": params["format_weight"],
        "mandatory": params["alpha"],
        "necessity": params["beta"],
        "emerge": params["emerge_weight"],
        "usage": params["gamma"],
        "spurious": params["gamma"],
    }
    config = RewardConfig(**(recipe | weights))
    expected = expected_operations(_names(given["required_transforms"]))
    truth = _box(given["gt_bbox"])
    uses = [
        ToolUse(
            score=float(rollout["score"]),
            used=frozenset(rollout["used"]),
            crop_score=max((iou(box, truth) for box in map(_box, rollout["crop_boxes"]) if box and truth), default=0.0),
            executions=rollout["exec_ok"] + rollout["exec_error"],
            format=rollout["format_reward"],
        )
        for rollout in given["rollouts"]
    ]
    rollouts = [
        {
            "acc": components["accuracy"],
            "mandatory": components["mandatory"],
            "usage_penalty": components["usage"],
            "spurious_penalty": components["spurious"],
            "r_total": config.total(components),
        }
        for components in group_components(expected, uses, config.recipe)
    ]
    return {"expected_ops": sorted(expected), "rollouts": rollouts}


def _names(required: object) -> list[str]:
    """Names of a column: a list, a mapping (None and False are absent), JSON text of either, or one name."""
    if isinstance(required, str):
        try:
            decoded = json.loads(required)
        except ValueError:
            decoded = None
        return _names(decoded) if isinstance(decoded, list | dict) else [name for name in [required.strip()] if name]
    if isinstance(required, dict):
        required = [name for name, value in required.items() if value is not None and value is not False]
    names = [str(name).strip() for name in required if name is not None] if isinstance(required, list) else []
    return [name for name in names if name]


def _box(value: object) -> tuple[float, float, float, float] | None:
    """Four finite numbers with an area; None for anything else."""
    try:
        x1, y1, x2, y2 = (float(edge) for edge in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return None
    return (x1, y1, x2, y2) if all(map(math.isfinite, (x1, y1, x2, y2))) and x1 < x2 and y1 < y2 else None


def losses(case: Case) -> Any:
    """Advantages, losses and KL penalties."""
    folder = str(Path(__file__).parent)
    if folder not in sys.path:  # compare.py loads this file alone, not as part of a package
        sys.path.insert(0, folder)
    from losses_adapter import golden_losses

    return golden_losses(case)


def transforms(case: Case) -> dict[str, Any]:
    """Net effect of a snippet that is really run."""
    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from sandbox_golden import golden_transforms

    return golden_transforms(case)


TOPICS = {
    "answers": answers,
    "format": response_format,
    "toolcalls": toolcalls,
    "images": images,
    "reward": reward,
    "losses": losses,
    "transforms": transforms,
}
