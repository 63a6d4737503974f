"""Golden cases of losses: padded [rows, tokens] lists in, what the flat functions of `cv_lightning.rl` give out.

Three conventions of the reference are put in here and nowhere in the project: its masked means divide by the count
plus 1e-8, its sequence means count rows without tokens, and its normalised sum divides by the padded width alone.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from cv_lightning.rl.advantages import GRPO, DrGRPO, estimate_advantages
from cv_lightning.rl.aggregation import aggregation_weights
from cv_lightning.rl.algorithm import AlgorithmConfig
from cv_lightning.rl.kl import kl_penalty
from cv_lightning.rl.losses import GSPO, PPOClip, TokenBatch
from cv_lightning.rl.objective import total_loss

MASKED_MEAN_EPSILON = 1e-8
AGGREGATIONS = {
    "token-mean": "token_mean",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-mean": "seq_mean_token_mean",
    "seq-mean-token-sum-norm": "constant_length",
}
ESTIMATORS = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
VARIANTS = ("vanilla", "gspo")


def golden_losses(case: dict[str, Any]) -> Any:
    """What the project computes for one case, in the case's precision."""
    functions = {
        "grpo_advantage": _advantage,
        "policy_loss": _policy_loss,
        "aggregate": _aggregate,
        "kl_penalty": _kl_penalty,
    }
    return functions[case["fn"]](case["input"], getattr(torch, case["dtype"]))


def _tensor(rows: Any, dtype: torch.dtype) -> Tensor:
    def number(value: Any) -> Any:
        return [number(v) for v in value] if isinstance(value, list) else float(value)

    return torch.tensor(number(rows), dtype=dtype)


def _aggregation(name: str, mask: Tensor) -> tuple[dict[str, Any], float]:
    """The project's options and count of sequences for one of the reference's names."""
    rows, width = mask.shape
    if name == "seq-mean-token-sum-norm":
        return {"aggregation": "constant_length", "constant_length": width}, 1.0
    return {"aggregation": AGGREGATIONS[name]}, float(rows)


def _advantage(given: dict[str, Any], dtype: torch.dtype) -> list[list[float]]:
    totals = _tensor(given["token_level_rewards"], torch.float64).sum(-1)
    members = defaultdict(list)
    for row, group in enumerate(given["group"]):
        members[group].append(row)
    estimator = GRPO(epsilon=given["epsilon"]) if given["norm_by_std"] else DrGRPO()
    advantages = torch.zeros(len(totals), dtype=torch.float64)
    for rows in members.values():
        advantages[rows] = torch.from_numpy(estimate_advantages(estimator, [totals[rows].tolist()])[0])
    mask = _tensor(given["response_mask"], dtype)
    return (advantages.to(dtype).unsqueeze(-1) * mask).tolist()


def _policy_loss(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any] | None:
    if given["variant"] not in VARIANTS:
        return None
    sequence = given["variant"] == "gspo"
    mask = _tensor(given["response_mask"], dtype)
    row_index, column = mask.nonzero(as_tuple=True)
    logprobs = _tensor(given["log_prob"], dtype).requires_grad_()

    def flat(name: str) -> Tensor:
        return _tensor(given[name], dtype)[row_index, column]

    # The reference ignores the aggregation asked for with gspo, and has no dual clip there.
    aggregation, num_rows = _aggregation("seq-mean-token-mean" if sequence else given["aggregation"], mask)
    corrected = given["rollout_log_prob"] is not None and given["tis_cap"] > 0
    bounds = {name: 0.2 if given[name] is None else given[name] for name in ("clip_low", "clip_high")}
    algorithm = AlgorithmConfig(
        loss=GSPO(**bounds) if sequence else PPOClip(**bounds, dual_clip=given["clip_dual"]),
        tis_clip=given["tis_cap"] if corrected else None,
        **aggregation,
    )
    tokens = TokenBatch(
        logprobs=logprobs[row_index, column],
        old_logprobs=flat("old_log_prob"),
        advantages=flat("advantages"),
        sequence_index=row_index,
        num_tokens=len(row_index) + MASKED_MEAN_EPSILON,
        num_sequences=num_rows,
        rollout_logprobs=flat("rollout_log_prob") if corrected else None,
    )
    loss, metrics = total_loss(tokens, algorithm)
    loss.backward()
    assert logprobs.grad is not None
    return {
        "loss": loss.item(),
        "clip_fraction": metrics["clip_frac"].item(),
        "clip_fraction_lower": metrics["dual_clip_frac"].item(),
        "approx_kl": metrics["approx_kl"].item(),
        "grad_log_prob": logprobs.grad.tolist(),
    }


def _aggregate(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    matrix = _tensor(given["matrix"], dtype).requires_grad_()
    mask = _tensor(given["mask"], dtype)
    row_index, column = mask.nonzero(as_tuple=True)
    options, num_rows = _aggregation(given["aggregation"], mask)
    share = mask[row_index, column]
    if options["aggregation"] == "seq_mean_token_mean":  # a fractional mask weighs within its row
        share = share * ((mask > 0).sum(-1) / mask.sum(-1))[row_index]
    weights = aggregation_weights(row_index, float(mask.sum()) + MASKED_MEAN_EPSILON, num_rows, **options).to(dtype)
    loss = (matrix[row_index, column] * share * weights).sum()
    loss.backward()
    assert matrix.grad is not None
    return {"loss": loss.item(), "grad": matrix.grad.tolist()}


def _kl_penalty(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    logprobs = _tensor(given["log_prob"], dtype).requires_grad_()
    name = given["penalty"]
    try:
        penalty = kl_penalty(logprobs, _tensor(given["ref_log_prob"], dtype), ESTIMATORS.get(name, name))
    except ValueError:  # the project refuses a name that it does not know; the reference's word for that:
        return {"error": "NotImplementedError"}
    penalty.sum().backward()
    assert logprobs.grad is not None
    return {"kl": penalty.tolist(), "grad_of_sum": logprobs.grad.tolist()}
