"""Train-inference mismatch: do engine and trainer agree on the log-probabilities of the same tokens?

The check covers weight sync, image processing, positions, masks, temperature and the ban of vision tokens at once. With
weights that were changed but not synced, the mean difference of a tiny model is 0.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cv_lightning.distributed import gather_lists
from cv_lightning.modules.base import PolicyModule
from cv_lightning.types import MismatchError, Trajectory

ENGINE_MEAN, P99 = 0.08, 1.0
"""Largest accepted mean and 99th percentile of |difference| between engine and trainer in 16 bits; docs/benchmarks.md
shows that rounding stays below them and planted faults exceed them."""


class MismatchReport(NamedTuple):
    """Largest difference and number of compared tokens, over all ranks."""

    max_difference: float
    num_tokens: int


def check_mismatch(
    module: PolicyModule, trajectories: Sequence[Trajectory], temperature: float, tolerance: float
) -> MismatchReport:
    """Compare the trajectories' own log-probabilities with the trainer's.

    Args:
        module: The policy's module, with the weights of the engine that made the trajectories.
        trajectories: This rank's trajectories, if it has any; with images, ideally also with tool results.
        temperature: Temperature of sampling.
        tolerance: Largest accepted difference in float32; see `exceeds`.

    Returns:
        The same on all ranks, which must all call this.

    Raises:
        MismatchError: They differ on some rank, or no rank had anything to compare.
    """
    usable = [t for t in trajectories if any(t.loss_mask) and not t.end_state.is_error]
    several = [[t for t in usable if (len(t.images) > 1) == many] for many in (False, True)]
    own = [trainer_minus_engine(module, part, temperature).abs().float().cpu() for part in several]
    ranks = gather_lists([own])
    by_rank = [torch.cat(parts) for parts in ranks]
    differences = torch.cat(by_rank)
    if not len(differences):
        states = sorted(set(gather_lists([t.end_state.value for t in trajectories])))
        errors = gather_lists([t.error for t in trajectories if t.error])
        raise MismatchError(
            f"self-test: no trajectory could be compared; they ended as {', '.join(states)}"
            + (f" ({errors[0]})" if errors else "")
        )
    worst = float(differences.max())
    # Trajectories with several images are also judged alone: the others would hide images in a wrong order.
    of_several = torch.cat([parts[1] for parts in ranks])
    for judged, which in ((differences, ""), (of_several, " of trajectories with several images")):
        if not len(judged) or not exceeds(judged, module.policy_config.dtype, tolerance, ENGINE_MEAN):
            continue
        maxima = ", ".join(f"{float(part.max()):.2e}" for part in by_rank if len(part))
        where = f" (by rank: {maxima})" if len(by_rank) > 1 else ""
        raise MismatchError(
            f"engine and trainer disagree: |difference| of log-probabilities max {worst:.2e}{where}, mean "
            f"{float(judged.mean()):.2e} over {len(judged)} tokens{which} (tolerance {tolerance:.0e} in float32). "
            "Weights not in sync, images resized twice, or another vLLM/transformers version than this project pins. "
            "rollout.mismatch_tolerance 0 switches the test off; training would be off-policy."
        )
    return MismatchReport(worst, len(differences))


def exceeds(differences: torch.Tensor, dtype: str, tolerance: float, mean: float) -> bool:
    """True if differences of log-probabilities are larger than rounding explains, or not finite.

    Args:
        differences: At least one. Shape [tokens].
        dtype: Type of the parameters. In float32 the largest |difference| counts; in 16 bits mean and 99th percentile
            do, because single tokens of a long sequence may be far off.
        tolerance: Largest accepted |difference| in float32.
        mean: Largest accepted mean of |difference| in 16 bits.
    """
    size = differences.abs().float()
    if dtype == "float32":
        return not float(size.max()) <= tolerance
    return not (float(size.mean()) <= mean and float(torch.quantile(size, 0.99)) <= P99)


@torch.no_grad()
def trainer_minus_engine(module: PolicyModule, trajectories: Sequence[Trajectory], temperature: float) -> torch.Tensor:
    """Trainer minus engine log-probability of every sampled token. Shape [tokens]. Call this on all ranks."""
    sequences = module.train_sequences(trajectories)
    parts = []
    for packed in module.pack_micro_batches(sequences):
        ours = module.logprobs(packed, temperature=temperature).logprobs
        parts.append(ours.float() - packed.rollout_logprobs.to(ours.device))
    return torch.cat(parts)
