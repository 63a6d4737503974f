"""Values and gradients of the policy losses equal an independent implementation's for every combination of options."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from losses_numpy import Sample, make_samples, numeric_gradient, objective

from cv_lightning.rl.algorithm import AlgorithmConfig
from cv_lightning.rl.kl import KLConfig
from cv_lightning.rl.losses import CISPO, DPPO, GSPO, PolicyLoss, PPOClip, TokenBatch
from cv_lightning.rl.objective import total_loss

LENGTHS = [5, 1, 0, 8, 3]
"""Number of tokens of each trajectory; one has none."""
POLICIES = {
    "ppo_clip": (0.2, 0.28, 3.0),
    "gspo": (0.05, 0.08, 1.3),
    "cispo": (0.9, 0.5, None),
    "dppo": (0.12, 0.07, 1.5),
}
KINDS: dict[str, type[PolicyLoss]] = {"ppo_clip": PPOClip, "gspo": GSPO, "cispo": CISPO, "dppo": DPPO}
CAP_NAMES = {"ppo_clip": "dual_clip", "gspo": "dual_clip", "dppo": "ratio_cap"}
AGGREGATIONS = {"token_mean": None, "seq_mean_token_mean": None, "seq_mean_token_sum": None, "constant_length": 7}


def flat(samples: list[Sample], name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(np.concatenate([getattr(sample, name) for sample in samples]), dtype=dtype)


def inputs_of(
    samples: list[Sample],
    *,
    corrected: bool = False,
    dtype: torch.dtype = torch.float64,
    whole: list[Sample] | None = None,
    **changes: torch.Tensor,
) -> TokenBatch:
    """Tokens of a micro-batch with some samples of a mini-batch `whole`; `changes` replaces tensors."""
    whole = whole or samples
    tensors = {
        "logprobs": flat(samples, "logprobs", dtype).requires_grad_(),
        "old_logprobs": flat(samples, "old", dtype),
        "advantages": flat(samples, "advantages", dtype),
        "sequence_index": torch.tensor([i for i, sample in enumerate(samples) for _ in sample.old], dtype=torch.int64),
        "reference_logprobs": flat(samples, "reference", dtype),
        "entropy": flat(samples, "entropy", dtype).requires_grad_(),
    }
    if corrected:
        tensors["rollout_logprobs"] = flat(samples, "engine", dtype)
    return TokenBatch(
        **(tensors | changes),
        num_tokens=float(sum(len(sample.old) for sample in whole)),
        num_sequences=float(sum(len(sample.old) > 0 for sample in whole)),
    )


def config_of(options: dict[str, Any]) -> AlgorithmConfig:
    policy = options["policy"]
    bounds = {"clip_low": options["low"], "clip_high": options["high"]}
    if policy in CAP_NAMES:
        bounds[CAP_NAMES[policy]] = options["cap"]
    return AlgorithmConfig(
        loss=KINDS[policy](**bounds),
        kl=KLConfig(weight=options["kl_weight"], estimator=options["kl"], importance=options["kl_importance"]),
        old_logprobs="trainer",
        tis_clip=options["tis_clip"],
        sequence_mask=options["sequence_mask"],
        **{name: options[name] for name in ("aggregation", "constant_length", "entropy_weight")},
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
        "tis_clip": None,
        "sequence_mask": None,
        **changes,
    }


def check(samples: list[Sample], options: dict[str, Any]) -> None:
    """Compare value and gradient with those of the numpy implementation."""
    inputs = inputs_of(samples, corrected=options["corrected"])
    loss, metrics = total_loss(inputs, config_of(options))
    loss.backward()
    assert loss.item() == pytest.approx(objective(samples, samples, options), rel=1e-12, abs=1e-13)
    assert metrics["loss"].item() == loss.item()
    assert inputs.logprobs.grad is not None
    assert np.abs(numeric_gradient(samples, options)).max() > 1e-3
    np.testing.assert_allclose(inputs.logprobs.grad.numpy(), numeric_gradient(samples, options), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("policy", "aggregation"), list(itertools.product(POLICIES, AGGREGATIONS)))
@pytest.mark.parametrize("corrected", [False, True])
def test_value_and_gradient_agree_with_numpy(policy: str, aggregation: str, corrected: bool) -> None:
    for seed in range(4):
        samples = make_samples(np.random.default_rng(seed), LENGTHS)
        check(samples, options_of(policy, aggregation, corrected=corrected, tis_clip=1.2 if corrected else None))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gspo_has_the_gradient_of_the_sequence_ratio(aggregation: str) -> None:
    """With one advantage per sequence, the token form has the gradient of the sequence form."""
    samples = make_samples(np.random.default_rng(6), LENGTHS, spread=0.05)
    options = options_of("gspo", aggregation)
    inputs = inputs_of(samples)
    total_loss(inputs, config_of(options))[0].backward()
    assert inputs.logprobs.grad is not None
    desired = numeric_gradient(samples, {**options, "policy": "gspo_sequence"})
    np.testing.assert_allclose(inputs.logprobs.grad.numpy(), desired, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kl", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize("kl_importance", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_kl_and_entropy_agree_with_numpy(policy: str, kl: str, kl_importance: bool) -> None:
    samples = make_samples(np.random.default_rng(7), LENGTHS)
    options = options_of(
        policy, "seq_mean_token_mean", kl=kl, kl_weight=0.3, kl_importance=kl_importance, entropy_weight=0.05
    )
    check(samples, options)


def test_entropy_bonus_raises_entropy() -> None:
    samples = make_samples(np.random.default_rng(1), LENGTHS)
    inputs = inputs_of(samples)
    loss, metrics = total_loss(inputs, config_of(options_of(entropy_weight=0.5)))
    loss.backward()
    assert inputs.entropy is not None and inputs.entropy.grad is not None
    np.testing.assert_allclose(inputs.entropy.grad.numpy(), -0.5 / sum(LENGTHS))
    assert metrics["entropy"].item() == pytest.approx(np.concatenate([r.entropy for r in samples]).mean())


@pytest.mark.parametrize("cap", [None, 1.1])
@pytest.mark.parametrize("band", [(0.99, 1.01), (0.8, 1.2), (0.0, 100.0)])
def test_sequence_mask_and_cap_combine(cap: float | None, band: tuple[float, float]) -> None:
    samples = make_samples(np.random.default_rng(3), [4, 6, 2, 9, 0, 5, 30])
    options = options_of(corrected=True, tis_clip=cap, sequence_mask=band)
    inputs = inputs_of(samples, corrected=True)
    loss, metrics = total_loss(inputs, config_of(options))
    assert loss.item() == pytest.approx(objective(samples, samples, options), rel=1e-12, abs=1e-14)
    masked = [
        len(r.old) for r in samples if len(r.old) and not band[0] <= math.exp(np.mean(r.old - r.engine)) <= band[1]
    ]
    assert metrics["sequence_mask_frac"].item() == pytest.approx(sum(masked) / inputs.num_tokens)
    # The metric is the raw weight, before truncation and mask.
    raw = np.concatenate([np.exp(r.old - r.engine) for r in samples])
    assert metrics["importance_weight_mean"].item() == pytest.approx(raw.mean())
    assert metrics["tis_clip_frac"].item() == pytest.approx((raw > cap).mean() if cap else 0.0)


def test_metrics_are_means_over_tokens() -> None:
    samples = make_samples(np.random.default_rng(8), LENGTHS)
    options = options_of("ppo_clip", "seq_mean_token_sum", corrected=True, tis_clip=1.5, kl_weight=0.2)
    _, metrics = total_loss(inputs_of(samples, corrected=True), config_of(options))
    p, o, e, f = (np.concatenate([getattr(r, n) for r in samples]) for n in ("logprobs", "old", "engine", "reference"))
    expected = {
        "pg_loss": objective(samples, samples, {**options, "kl_weight": 0.0}),
        "ratio_mean": np.exp(p - o).mean(),
        "approx_kl": (o - p).mean(),
        "engine_gap_mean": np.abs(o - e).mean(),
        "kl_to_reference": (np.exp(f - p) - (f - p) - 1).mean(),
        "nonfinite_frac": 0.0,
    }
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-12), name


def test_no_correction_where_old_is_the_engine() -> None:
    samples = make_samples(np.random.default_rng(5), LENGTHS)
    corrected = AlgorithmConfig(old_logprobs="trainer", tis_clip=1.01, sequence_mask=(0.999, 1.001))
    with_cap = total_loss(inputs_of(samples), corrected)
    without = total_loss(inputs_of(samples), AlgorithmConfig(tis_clip=None))
    assert with_cap[0].item() == without[0].item()
    assert not {"importance_weight_mean", "tis_clip_frac", "sequence_mask_frac"} & with_cap[1].keys()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_to_one(policy: str, aggregation: str) -> None:
    samples = make_samples(np.random.default_rng(11), [5, 1, 0, 8, 3, 2])
    options = options_of(
        policy,
        aggregation,
        corrected=True,
        tis_clip=2.0,
        sequence_mask=(0.7, 1.4),
        kl_weight=0.1,
        entropy_weight=0.01,
    )
    config = config_of(options)
    whole = inputs_of(samples, corrected=True)
    loss, metrics = total_loss(whole, config)
    loss.backward()
    losses, gradients, shares = [], [], []
    for part in (
        samples[:1],
        samples[1:3],
        samples[3:5],
        [],
        samples[5:],
    ):  # one has no token, as on a rank that has finished early
        inputs = inputs_of(part, corrected=True, whole=samples) if part else empty_inputs(samples)
        share, marks = total_loss(inputs, config)
        share.backward()
        losses.append(share.item())
        shares.append(marks)
        gradients.append(inputs.logprobs.grad)
    assert sum(losses) == pytest.approx(loss.item(), rel=1e-12)
    assert whole.logprobs.grad is not None
    torch.testing.assert_close(torch.cat(gradients), whole.logprobs.grad, rtol=1e-12, atol=1e-15)
    for name, value in metrics.items():
        assert sum(float(s[name]) for s in shares) == pytest.approx(value.item(), rel=1e-12, abs=1e-15), name


def empty_inputs(whole: list[Sample] | None = None) -> TokenBatch:
    def empty() -> torch.Tensor:
        return torch.zeros(0, dtype=torch.float64)

    return TokenBatch(
        logprobs=empty().requires_grad_(),
        old_logprobs=empty(),
        advantages=empty(),
        sequence_index=torch.zeros(0, dtype=torch.int64),
        num_tokens=float(sum(len(r.old) for r in whole)) if whole else 0.0,
        num_sequences=float(sum(len(r.old) > 0 for r in whole)) if whole else 0.0,
        rollout_logprobs=empty(),
        reference_logprobs=empty(),
        entropy=empty().requires_grad_(),
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_without_tokens_is_zero_and_has_a_graph(policy: str, aggregation: str) -> None:
    config = config_of(options_of(policy, aggregation, kl_weight=0.1, entropy_weight=0.1, sequence_mask=(0.9, 1.1)))
    inputs = empty_inputs()
    loss, metrics = total_loss(inputs, config)
    assert loss.item() == 0.0 and loss.requires_grad
    loss.backward()
    assert inputs.logprobs.grad is not None
    full = total_loss(inputs_of(make_samples(np.random.default_rng(0), LENGTHS), corrected=True), config)[1]
    assert metrics.keys() == full.keys()  # every rank reduces the same names
    assert all(value.item() == 0.0 and value.shape == () for value in metrics.values())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["old_logprobs", "rollout_logprobs"])
def test_nonfinite_old_and_rollout_logprobs_are_masked_and_counted(policy: str, bad: float, where: str) -> None:
    samples = make_samples(np.random.default_rng(2), [4, 3, 1])
    broken = flat(samples, {"old_logprobs": "old", "rollout_logprobs": "engine"}[where])
    broken[[1, 5, 7]] = bad  # the last is the only token of its trajectory
    inputs = inputs_of(samples, corrected=True, **{where: broken})
    config = config_of(options_of(policy, tis_clip=2.0, sequence_mask=(0.1, 10.0), kl_weight=0.1))
    loss, metrics = total_loss(inputs, config)
    loss.backward()
    assert metrics["nonfinite_frac"].item() == pytest.approx(3 / 8)
    assert all(math.isfinite(value) for value in metrics.values())
    assert inputs.logprobs.grad is not None and inputs.logprobs.grad.isfinite().all()
    assert (inputs.logprobs.grad[[1, 5, 7]] == 0).all()
    # The others keep their weights: the expected mini-batch lacks those tokens but has the same counts.
    keep = [np.array([True, False, True, True]), np.array([True, False, True]), np.array([False])]
    rest = [
        Sample(*(getattr(sample, name)[mask] for name in Sample.__dataclass_fields__))
        for sample, mask in zip(samples, keep, strict=True)
    ]
    expected, _ = total_loss(inputs_of(rest, corrected=True, whole=samples), config)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_nan_of_the_policy_is_not_hidden() -> None:
    samples = make_samples(np.random.default_rng(2), [4, 3])
    broken = flat(samples, "logprobs")
    broken[2] = math.nan
    assert math.isnan(total_loss(inputs_of(samples, logprobs=broken), AlgorithmConfig())[0].item())


@pytest.mark.parametrize("policy", POLICIES)
def test_extreme_ratios_stay_finite(policy: str) -> None:
    logprobs = torch.tensor([-60.0, -30.0, -0.1, 0.0], requires_grad=True)
    inputs = TokenBatch(
        logprobs=logprobs,
        old_logprobs=torch.tensor([-0.1, -200.0, -90.0, 0.0]),
        advantages=torch.tensor([1.0, -1.0, -2.0, 0.0]),
        sequence_index=torch.tensor([0, 1, 2, 3]),
        num_tokens=4,
        num_sequences=4,
    )
    loss, metrics = total_loss(inputs, AlgorithmConfig(loss=KINDS[policy]()))
    loss.backward()
    assert loss.isfinite() and all(value.isfinite() for value in metrics.values())
    assert logprobs.grad is not None and logprobs.grad.isfinite().all()


@pytest.mark.parametrize("policy", POLICIES)
def test_half_precision_inputs_are_computed_in_float32(policy: str) -> None:
    samples = make_samples(np.random.default_rng(4), LENGTHS)
    logprobs = flat(samples, "logprobs", torch.bfloat16).requires_grad_()
    half = inputs_of(samples, corrected=True, dtype=torch.bfloat16, logprobs=logprobs)
    config = AlgorithmConfig(loss=KINDS[policy](), old_logprobs="trainer")
    loss, metrics = total_loss(half, config)
    assert loss.dtype == torch.float32 and metrics["ratio_mean"].dtype == torch.float32
    rounded = [
        Sample(*(flat([sample], name, torch.bfloat16).double().numpy() for name in Sample.__dataclass_fields__))
        for sample in samples
    ]
    single = inputs_of(rounded, corrected=True, dtype=torch.float32)
    assert loss.item() == pytest.approx(total_loss(single, config)[0].item(), rel=1e-6)
    loss.backward()
    assert logprobs.grad is not None and logprobs.grad.dtype == torch.bfloat16
