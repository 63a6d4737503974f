"""The policy loss once more, in numpy float64 and row by row: the yardstick of the loss tests.

Written from the papers' formulas with loops over trajectories; shares nothing with `cv_lightning.rl`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Row:
    """One trajectory; every array [tokens]."""

    logprobs: Array
    old: Array
    advantages: Array
    engine: Array
    reference: Array
    entropy: Array

    def moved(self, token: int, step: float) -> Row:
        """The same with one log-probability changed."""
        logprobs = self.logprobs.copy()
        logprobs[token] += step
        return Row(logprobs, self.old, self.advantages, self.engine, self.reference, self.entropy)


def make_rows(rng: np.random.Generator, lengths: list[int], spread: float = 0.5) -> list[Row]:
    """Random trajectories with one advantage each, as in training."""
    rows = []
    for length in lengths:
        old = -rng.exponential(1.0, length) - 0.01
        rows.append(
            Row(
                logprobs=np.minimum(old + spread * rng.normal(size=length), -0.001),
                old=old,
                advantages=np.full(length, rng.normal()),
                engine=old + 0.4 * rng.normal(size=length),
                reference=old + 0.3 * rng.normal(size=length),
                entropy=rng.uniform(0.1, 2.0, length),
            )
        )
    return rows


def surrogate(row: Row, base: Row, policy: str, low: float, high: float, cap: float) -> Array:
    """Loss per token; `base` is the point where stopped gradients are taken.

    `gspo` is the token form of the paper's section 4.3, `gspo_sequence` the plain one of section 4.1.
    """
    out = np.zeros(len(row.old))
    sequence, fixed_sequence = (float(np.exp(np.mean(r.logprobs - r.old))) if len(r.old) else 1.0 for r in (row, base))
    for t, advantage in enumerate(row.advantages):
        ratio = float(np.exp(row.logprobs[t] - row.old[t]))
        fixed = float(np.exp(base.logprobs[t] - base.old[t]))
        score = 1.0 + row.logprobs[t] - base.logprobs[t]
        if policy in ("ppo_clip", "gspo", "gspo_sequence"):
            own = fixed_sequence * float(np.exp(row.logprobs[t] - base.logprobs[t]))
            r = {"ppo_clip": ratio, "gspo": own, "gspo_sequence": sequence}[policy]
            gain = min(r * advantage, min(max(r, 1 - low), 1 + high) * advantage)
            out[t] = -(max(gain, cap * advantage) if advantage < 0 else gain)
        elif policy == "cispo":
            out[t] = -min(max(fixed, 1 - low), 1 + high) * advantage * score
        else:
            shift = float(np.exp(base.logprobs[t]) - np.exp(base.old[t]))
            left = (advantage > 0 and shift > high) or (advantage < 0 and shift < -low)
            out[t] = 0.0 if left else -min(fixed, cap) * advantage * score
    return out


def importance(row: Row, cap: float | None, band: tuple[float, float] | None) -> Array:
    """Weight of each token for the engine's mismatch."""
    weight = np.ones(len(row.old))
    if cap is not None:
        weight = np.minimum(np.exp(row.old - row.engine), cap)
    if band is not None and len(row.old):
        geometric = float(np.prod(np.exp(row.old - row.engine)) ** (1 / len(row.old)))
        if not band[0] <= geometric <= band[1]:
            weight = np.zeros(len(row.old))
    return weight


def kl(p: Array, r: Array, estimator: str) -> Array:
    """Estimate of KL(p || r) per token."""
    ratio = np.exp(r) / np.exp(p)
    return {
        "k1": -np.log(ratio),
        "abs": np.abs(np.log(ratio)),
        "k2": np.log(ratio) ** 2 / 2,
        "k3": ratio - 1 - np.log(ratio),
    }[estimator]


def aggregate(values: list[Array], aggregation: str, constant: int | None) -> float:
    """One number out of the token losses of all trajectories; those without a token do not count."""
    values = [v for v in values if len(v)]
    if aggregation == "token_mean":
        return float(np.concatenate(values).mean())
    if aggregation == "seq_mean_token_mean":
        return float(np.mean([v.mean() for v in values]))
    sums = float(np.mean([v.sum() for v in values]))
    return sums if aggregation == "seq_mean_token_sum" else sums / float(constant or 1)


def objective(rows: list[Row], bases: list[Row], options: dict[str, Any]) -> float:
    """The whole loss of a mini-batch."""
    terms = []
    for row, base in zip(rows, bases, strict=True):
        loss = surrogate(row, base, options["policy"], options["low"], options["high"], options["cap"])
        if options["corrected"]:
            loss = loss * importance(row, options["importance_cap"], options["importance_band"])
        penalty = kl(row.logprobs, row.reference, options["kl"])
        if options["kl_importance"]:
            penalty = penalty * np.exp(row.logprobs - row.old)
        terms.append(loss + options["kl_weight"] * penalty - options["entropy_weight"] * row.entropy)
    return aggregate(terms, options["aggregation"], options["constant_length"])


def numeric_gradient(rows: list[Row], options: dict[str, Any], step: float = 1e-6) -> Array:
    """Central differences of the objective with respect to every log-probability, rows joined."""
    gradient = []
    for i, row in enumerate(rows):
        for t in range(len(row.old)):
            up = [*rows[:i], row.moved(t, step), *rows[i + 1 :]]
            down = [*rows[:i], row.moved(t, -step), *rows[i + 1 :]]
            gradient.append((objective(up, rows, options) - objective(down, rows, options)) / (2 * step))
    return np.array(gradient)
