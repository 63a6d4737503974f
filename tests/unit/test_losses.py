"""The policy loss agrees with independent numerics, value and gradient, for every combination of its options."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from losses_numpy import Row, make_rows, numeric_gradient, objective

from cv_lightning.rl.losses import LossInputs, PolicyLossConfig, policy_loss

LENGTHS = [5, 1, 0, 8, 3]
"""Tokens of each trajectory; one has none."""
POLICIES = {
    "ppo_clip": (0.2, 0.28, 3.0),
    "gspo": (0.05, 0.08, 1.3),
    "cispo": (0.9, 0.5, None),
    "dppo": (0.12, 0.07, 1.5),
}
AGGREGATIONS = {"token_mean": None, "seq_mean_token_mean": None, "seq_mean_token_sum": None, "constant_length": 7}


def flat(rows: list[Row], name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(np.concatenate([getattr(row, name) for row in rows]), dtype=dtype)


def inputs_of(
    rows: list[Row], *, corrected: bool = False, dtype: torch.dtype = torch.float64, whole: list[Row] | None = None
) -> LossInputs:
    """Inputs of a micro-batch of some rows of a mini-batch `whole`."""
    whole = whole or rows
    return LossInputs(
        logprobs=flat(rows, "logprobs", dtype).requires_grad_(),
        old=flat(rows, "old", dtype),
        advantages=flat(rows, "advantages", dtype),
        row_index=torch.tensor([i for i, row in enumerate(rows) for _ in row.old], dtype=torch.int64),
        num_tokens=float(sum(len(row.old) for row in whole)),
        num_rows=float(sum(len(row.old) > 0 for row in whole)),
        engine=flat(rows, "engine", dtype) if corrected else None,
        reference=flat(rows, "reference", dtype),
        entropy=flat(rows, "entropy", dtype).requires_grad_(),
    )


def config_of(options: dict[str, Any]) -> PolicyLossConfig:
    names = ("policy", "aggregation", "constant_length", "kl", "kl_weight", "kl_importance", "entropy_weight")
    return PolicyLossConfig(
        clip_low=options["low"],
        clip_high=options["high"],
        clip_dual=options["cap"] if options["policy"] != "cispo" else None,
        importance_cap=options["importance_cap"],
        importance_band=options["importance_band"],
        **{name: options[name] for name in names},
    )


def options_of(policy: str = "ppo_clip", aggregation: str = "token_mean", **changes: Any) -> dict[str, Any]:
    low, high, cap = POLICIES[policy]
    return {
        "policy": policy,
        "low": low,
        "high": high,
        "cap": cap,
        "aggregation": aggregation,
        "constant_length": AGGREGATIONS[aggregation],
        "kl": "k3",
        "kl_weight": 0.0,
        "kl_importance": False,
        "entropy_weight": 0.0,
        "corrected": False,
        "importance_cap": None,
        "importance_band": None,
        **changes,
    }


def check(rows: list[Row], options: dict[str, Any]) -> None:
    """Value, gradient of the log-probabilities and of the entropy."""
    inputs = inputs_of(rows, corrected=options["corrected"])
    loss, metrics = policy_loss(inputs, config_of(options))
    loss.backward()
    assert loss.item() == pytest.approx(objective(rows, rows, options), rel=1e-12, abs=1e-13)
    assert metrics["loss"].item() == loss.item()
    assert inputs.logprobs.grad is not None
    assert np.abs(numeric_gradient(rows, options)).max() > 1e-3
    np.testing.assert_allclose(inputs.logprobs.grad.numpy(), numeric_gradient(rows, options), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("policy", "aggregation"), list(itertools.product(POLICIES, AGGREGATIONS)))
@pytest.mark.parametrize("corrected", [False, True])
def test_value_and_gradient_agree_with_numpy(policy: str, aggregation: str, corrected: bool) -> None:
    for seed in range(4):
        rows = make_rows(np.random.default_rng(seed), LENGTHS)
        check(rows, options_of(policy, aggregation, corrected=corrected, importance_cap=1.2 if corrected else None))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gspo_has_the_gradient_of_the_sequence_ratio(aggregation: str) -> None:
    """One advantage a row: the token form's gradient is that of the sequence's loss itself."""
    rows = make_rows(np.random.default_rng(6), LENGTHS, spread=0.05)
    options = options_of("gspo", aggregation)
    inputs = inputs_of(rows)
    policy_loss(inputs, config_of(options))[0].backward()
    assert inputs.logprobs.grad is not None
    desired = numeric_gradient(rows, {**options, "policy": "gspo_sequence"})
    np.testing.assert_allclose(inputs.logprobs.grad.numpy(), desired, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kl", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize("kl_importance", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_kl_and_entropy_agree_with_numpy(policy: str, kl: str, kl_importance: bool) -> None:
    rows = make_rows(np.random.default_rng(7), LENGTHS)
    options = options_of(
        policy, "seq_mean_token_mean", kl=kl, kl_weight=0.3, kl_importance=kl_importance, entropy_weight=0.05
    )
    check(rows, options)


def test_entropy_bonus_raises_entropy() -> None:
    rows = make_rows(np.random.default_rng(1), LENGTHS)
    inputs = inputs_of(rows)
    loss, metrics = policy_loss(inputs, config_of(options_of(entropy_weight=0.5)))
    loss.backward()
    assert inputs.entropy is not None and inputs.entropy.grad is not None
    np.testing.assert_allclose(inputs.entropy.grad.numpy(), -0.5 / sum(LENGTHS))
    assert metrics["entropy"].item() == pytest.approx(np.concatenate([r.entropy for r in rows]).mean())


@pytest.mark.parametrize("cap", [None, 1.1])
@pytest.mark.parametrize("band", [(0.99, 1.01), (0.8, 1.2), (0.0, 100.0)])
def test_sequence_mask_and_cap_combine(cap: float | None, band: tuple[float, float]) -> None:
    rows = make_rows(np.random.default_rng(3), [4, 6, 2, 9, 0, 5, 30])
    options = options_of(corrected=True, importance_cap=cap, importance_band=band)
    inputs = inputs_of(rows, corrected=True)
    loss, metrics = policy_loss(inputs, config_of(options))
    assert loss.item() == pytest.approx(objective(rows, rows, options), rel=1e-12, abs=1e-14)
    masked = [len(r.old) for r in rows if len(r.old) and not band[0] <= math.exp(np.mean(r.old - r.engine)) <= band[1]]
    assert metrics["importance_masked_frac"].item() == pytest.approx(sum(masked) / inputs.num_tokens)
    # Raw, before the cap and the mask: what a run is to be judged by.
    raw = np.concatenate([np.exp(r.old - r.engine) for r in rows])
    assert metrics["importance_weight_mean"].item() == pytest.approx(raw.mean())
    assert metrics["importance_capped_frac"].item() == pytest.approx((raw > cap).mean() if cap else 0.0)


def test_metrics_are_means_over_tokens() -> None:
    rows = make_rows(np.random.default_rng(8), LENGTHS)
    options = options_of("ppo_clip", "seq_mean_token_sum", corrected=True, importance_cap=1.5, kl_weight=0.2)
    _, metrics = policy_loss(inputs_of(rows, corrected=True), config_of(options))
    p, o, e, f = (np.concatenate([getattr(r, n) for r in rows]) for n in ("logprobs", "old", "engine", "reference"))
    expected = {
        "surrogate_loss": objective(rows, rows, {**options, "kl_weight": 0.0}),
        "ratio_mean": np.exp(p - o).mean(),
        "approx_kl": (o - p).mean(),
        "engine_gap_mean": np.abs(o - e).mean(),
        "kl_to_reference": (np.exp(f - p) - (f - p) - 1).mean(),
        "nonfinite_frac": 0.0,
    }
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-12), name


def test_no_correction_where_old_is_the_engine() -> None:
    rows = make_rows(np.random.default_rng(5), LENGTHS)
    with_cap = policy_loss(inputs_of(rows), PolicyLossConfig(importance_cap=1.01, importance_band=(0.999, 1.001)))
    without = policy_loss(inputs_of(rows), PolicyLossConfig(importance_cap=None))
    assert with_cap[0].item() == without[0].item()
    assert not any(name.startswith("importance") for name in with_cap[1])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_to_one(policy: str, aggregation: str) -> None:
    rows = make_rows(np.random.default_rng(11), [5, 1, 0, 8, 3, 2])
    options = options_of(
        policy,
        aggregation,
        corrected=True,
        importance_cap=2.0,
        importance_band=(0.7, 1.4),
        kl_weight=0.1,
        entropy_weight=0.01,
    )
    config = config_of(options)
    whole = inputs_of(rows, corrected=True)
    loss, metrics = policy_loss(whole, config)
    loss.backward()
    losses, gradients, shares = [], [], []
    for part in (rows[:1], rows[1:3], rows[3:5], [], rows[5:]):  # one has no token, as on a rank that is done early
        inputs = inputs_of(part, corrected=True, whole=rows) if part else empty_inputs(rows)
        share, marks = policy_loss(inputs, config)
        share.backward()
        losses.append(share.item())
        shares.append(marks)
        gradients.append(inputs.logprobs.grad)
    assert sum(losses) == pytest.approx(loss.item(), rel=1e-12)
    assert whole.logprobs.grad is not None
    torch.testing.assert_close(torch.cat(gradients), whole.logprobs.grad, rtol=1e-12, atol=1e-15)
    for name, value in metrics.items():
        assert sum(float(s[name]) for s in shares) == pytest.approx(value.item(), rel=1e-12, abs=1e-15), name


def empty_inputs(whole: list[Row] | None = None) -> LossInputs:
    def empty() -> torch.Tensor:
        return torch.zeros(0, dtype=torch.float64)

    return LossInputs(
        logprobs=empty().requires_grad_(),
        old=empty(),
        advantages=empty(),
        row_index=torch.zeros(0, dtype=torch.int64),
        num_tokens=float(sum(len(r.old) for r in whole)) if whole else 0.0,
        num_rows=float(sum(len(r.old) > 0 for r in whole)) if whole else 0.0,
        engine=empty(),
        reference=empty(),
        entropy=empty().requires_grad_(),
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_tokens_anywhere_is_a_zero_with_a_graph(policy: str, aggregation: str) -> None:
    config = config_of(options_of(policy, aggregation, kl_weight=0.1, entropy_weight=0.1, importance_band=(0.9, 1.1)))
    inputs = empty_inputs()
    loss, metrics = policy_loss(inputs, config)
    assert loss.item() == 0.0 and loss.requires_grad
    loss.backward()
    assert inputs.logprobs.grad is not None
    full = policy_loss(inputs_of(make_rows(np.random.default_rng(0), LENGTHS), corrected=True), config)[1]
    assert metrics.keys() == full.keys()  # every rank reduces the same names
    assert all(value.item() == 0.0 and value.shape == () for value in metrics.values())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["old", "engine"])
def test_unusable_engine_logprobs_are_left_out_and_counted(policy: str, bad: float, where: str) -> None:
    rows = make_rows(np.random.default_rng(2), [4, 3, 1])
    inputs = inputs_of(rows, corrected=True)
    for position in (1, 5, 7):  # the last is all that its row has
        getattr(inputs, where)[position] = bad
    config = config_of(options_of(policy, importance_cap=2.0, importance_band=(0.1, 10.0), kl_weight=0.1))
    loss, metrics = policy_loss(inputs, config)
    loss.backward()
    assert metrics["nonfinite_frac"].item() == pytest.approx(3 / 8)
    assert all(math.isfinite(value) for value in metrics.values())
    assert inputs.logprobs.grad is not None and inputs.logprobs.grad.isfinite().all()
    assert (inputs.logprobs.grad[[1, 5, 7]] == 0).all()
    # The others weigh as before: a mini-batch without those tokens, but with its counts.
    keep = [np.array([True, False, True, True]), np.array([True, False, True]), np.array([False])]
    rest = [
        Row(*(getattr(row, name)[mask] for name in Row.__dataclass_fields__))
        for row, mask in zip(rows, keep, strict=True)
    ]
    expected, _ = policy_loss(inputs_of(rest, corrected=True, whole=rows), config)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_nan_of_the_policy_is_not_hidden() -> None:
    inputs = inputs_of(make_rows(np.random.default_rng(2), [4, 3]))
    with torch.no_grad():
        inputs.logprobs[2] = math.nan
    assert math.isnan(policy_loss(inputs, PolicyLossConfig())[0].item())


@pytest.mark.parametrize("policy", POLICIES)
def test_extreme_ratios_stay_finite(policy: str) -> None:
    logprobs = torch.tensor([-60.0, -30.0, -0.1, 0.0], requires_grad=True)
    inputs = LossInputs(
        logprobs=logprobs,
        old=torch.tensor([-0.1, -200.0, -90.0, 0.0]),
        advantages=torch.tensor([1.0, -1.0, -2.0, 0.0]),
        row_index=torch.tensor([0, 1, 2, 3]),
        num_tokens=4,
        num_rows=4,
    )
    loss, metrics = policy_loss(inputs, PolicyLossConfig(policy=policy))
    loss.backward()
    assert loss.isfinite() and all(value.isfinite() for value in metrics.values())
    assert logprobs.grad is not None and logprobs.grad.isfinite().all()


@pytest.mark.parametrize("policy", POLICIES)
def test_half_precision_inputs_are_computed_in_float32(policy: str) -> None:
    rows = make_rows(np.random.default_rng(4), LENGTHS)
    half = inputs_of(rows, corrected=True, dtype=torch.bfloat16)
    loss, metrics = policy_loss(half, PolicyLossConfig(policy=policy))
    assert loss.dtype == torch.float32 and metrics["ratio_mean"].dtype == torch.float32
    single = inputs_of(rows, corrected=True, dtype=torch.bfloat16)
    for name in ("logprobs", "old", "advantages", "engine", "reference", "entropy"):
        setattr(single, name, getattr(single, name).float())
    assert loss.item() == pytest.approx(policy_loss(single, PolicyLossConfig(policy=policy))[0].item(), rel=1e-6)
    loss.backward()
    assert half.logprobs.grad is not None and half.logprobs.grad.dtype == torch.bfloat16
