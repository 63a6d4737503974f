"""Independent numpy implementation of the policy losses in float64, trajectory by trajectory, for the tests.

It follows the papers' formulas with loops over trajectories and shares no code with `cv_lightning.rl`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Sample:
    """One trajectory; every array is [tokens]."""

    logprobs: Array
    old: Array
    advantages: Array
    engine: Array
    reference: Array
    entropy: Array

    def moved(self, token: int, step: float) -> Sample:
        """A copy with one log-probability changed."""
        logprobs = self.logprobs.copy()
        logprobs[token] += step
        return Sample(logprobs, self.old, self.advantages, self.engine, self.reference, self.entropy)


def make_samples(rng: np.random.Generator, lengths: list[int], spread: float = 0.5) -> list[Sample]:
    """Random trajectories with one advantage each, as in training."""
    samples = []
    for length in lengths:
        old = -rng.exponential(1.0, length) - 0.01
        samples.append(
            Sample(
                logprobs=np.minimum(old + spread * rng.normal(size=length), -0.001),
                old=old,
                advantages=np.full(length, rng.normal()),
                engine=old + 0.4 * rng.normal(size=length),
                reference=old + 0.3 * rng.normal(size=length),
                entropy=rng.uniform(0.1, 2.0, length),
            )
        )
    return samples


def token_losses(sample: Sample, base: Sample, policy: str, low: float, high: float, cap: float) -> Array:
    """Loss per token; stopped gradients are taken at `base`.

    `gspo` is the token form of the paper's section 4.3, `gspo_sequence` the sequence form of section 4.1.
    """
    out = np.zeros(len(sample.old))
    geometric, fixed_geometric = (
        float(np.exp(np.mean(r.logprobs - r.old))) if len(r.old) else 1.0 for r in (sample, base)
    )
    for t, advantage in enumerate(sample.advantages):
        ratio = float(np.exp(sample.logprobs[t] - sample.old[t]))
        fixed = float(np.exp(base.logprobs[t] - base.old[t]))
        score = 1.0 + sample.logprobs[t] - base.logprobs[t]
        if policy in ("ppo_clip", "gspo", "gspo_sequence"):
            own = fixed_geometric * float(np.exp(sample.logprobs[t] - base.logprobs[t]))
            r = {"ppo_clip": ratio, "gspo": own, "gspo_sequence": geometric}[policy]
            gain = min(r * advantage, min(max(r, 1 - low), 1 + high) * advantage)
            out[t] = -(max(gain, cap * advantage) if advantage < 0 else gain)
        elif policy == "cispo":
            out[t] = -min(max(fixed, 1 - low), 1 + high) * advantage * score
        else:
            shift = float(np.exp(base.logprobs[t]) - np.exp(base.old[t]))
            left = (advantage > 0 and shift > high) or (advantage < 0 and shift < -low)
            out[t] = 0.0 if left else -min(fixed, cap) * advantage * score
    return out


def importance(sample: Sample, cap: float | None, band: tuple[float, float] | None) -> Array:
    """Importance weight of each token."""
    weight = np.ones(len(sample.old))
    if cap is not None:
        weight = np.minimum(np.exp(sample.old - sample.engine), cap)
    if band is not None and len(sample.old):
        geometric = float(np.prod(np.exp(sample.old - sample.engine)) ** (1 / len(sample.old)))
        if not band[0] <= geometric <= band[1]:
            weight = np.zeros(len(sample.old))
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
    """Aggregate of the token losses of all trajectories; those without a token do not count."""
    values = [v for v in values if len(v)]
    if aggregation == "token_mean":
        return float(np.concatenate(values).mean())
    if aggregation == "seq_mean_token_mean":
        return float(np.mean([v.mean() for v in values]))
    sums = float(np.mean([v.sum() for v in values]))
    return sums if aggregation == "seq_mean_token_sum" else sums / float(constant or 1)


def objective(samples: list[Sample], bases: list[Sample], options: dict[str, Any]) -> float:
    """Loss of a mini-batch."""
    terms = []
    for sample, base in zip(samples, bases, strict=True):
        loss = token_losses(sample, base, options["policy"], options["low"], options["high"], options["cap"])
        if options["corrected"]:
            loss = loss * importance(sample, options["tis_clip"], options["sequence_mask"])
        penalty = kl(sample.logprobs, sample.reference, options["kl"])
        if options["kl_importance"]:
            penalty = penalty * np.exp(sample.logprobs - sample.old)
        terms.append(loss + options["kl_weight"] * penalty - options["entropy_weight"] * sample.entropy)
    return aggregate(terms, options["aggregation"], options["constant_length"])


def numeric_gradient(samples: list[Sample], options: dict[str, Any], step: float = 1e-6) -> Array:
    """Central differences of the objective with respect to every log-probability of all samples."""
    gradient = []
    for i, sample in enumerate(samples):
        for t in range(len(sample.old)):
            up = [*samples[:i], sample.moved(t, step), *samples[i + 1 :]]
            down = [*samples[:i], sample.moved(t, -step), *samples[i + 1 :]]
            gradient.append((objective(up, samples, options) - objective(down, samples, options)) / (2 * step))
    return np.array(gradient)
