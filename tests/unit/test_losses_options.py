"""What each option means, in small cases worked out by hand, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from cv_lightning.rl.aggregation import row_means, token_weights
from cv_lightning.rl.kl import kl_penalty, rewards_with_kl
from cv_lightning.rl.loss_config import PUBLISHED_CLIPS
from cv_lightning.rl.losses import LossInputs, PolicyLossConfig, policy_loss


def tokens(
    ratios: list[float], advantages: list[float], old: float = -3.0, rows: list[int] | None = None
) -> LossInputs:
    """Tokens with the given ratios of policy to old."""
    size = len(ratios)
    return LossInputs(
        logprobs=(torch.tensor(ratios, dtype=torch.float64).log() + old).requires_grad_(),
        old=torch.full((size,), old, dtype=torch.float64),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        row_index=torch.tensor(rows or list(range(size))),
        num_tokens=size,
        num_rows=len(set(rows or range(size))),
    )


def gradient(inputs: LossInputs, config: PolicyLossConfig) -> list[float]:
    """Gradient of the loss times the count: what each token gets."""
    loss, _ = policy_loss(inputs, config)
    (grad,) = torch.autograd.grad(loss, inputs.logprobs)
    return [round(value, 12) for value in (grad * inputs.num_tokens).tolist()]


def test_clip_higher_and_dual_clip() -> None:
    config = PolicyLossConfig(clip_low=0.2, clip_high=0.3, clip_dual=5.0)
    inputs = tokens([1.25, 1.35, 0.75, 0.75, 1.35, 6.0], [1, 1, -1, 1, -1, -1])
    # A token that the clip bounds gets no gradient; one that moves back towards 1 keeps its own.
    assert gradient(inputs, config) == [-1.25, 0.0, 0.0, -0.75, 1.35, 0.0]
    loss, metrics = policy_loss(inputs, config)
    assert loss.item() * 6 == pytest.approx(-1.25 - 1.3 + 0.8 - 0.75 + 1.35 + 5.0)
    assert metrics["clip_frac"].item() == pytest.approx(2 / 6)
    assert metrics["clip_dual_frac"].item() == pytest.approx(1 / 6)
    assert gradient(inputs, PolicyLossConfig(clip_low=0.2, clip_high=0.3, clip_dual=math.inf))[-1] == 6.0


def test_gspo_clips_a_sequence_as_a_whole() -> None:
    config = PolicyLossConfig(policy="gspo", clip_low=0.1, clip_high=0.1, aggregation="seq_mean_token_mean")
    # Row 0: 2 and 0.5 cancel, the ratio is 1. Row 1: geometric mean of 1.21 and 1.44 is 1.32, outside.
    inputs = tokens([2.0, 0.5, 1.21, 1.44], [1, 1, 1, 1], rows=[0, 0, 1, 1])
    assert gradient(inputs, config) == [-1.0, -1.0, 0.0, 0.0]
    _, metrics = policy_loss(inputs, config)
    assert metrics["clip_frac"].item() == 0.5
    assert metrics["ratio_mean"].item() == pytest.approx((2 + 2 * 1.32) / 4)


@pytest.mark.parametrize(("policy", "log_ratio"), [("gspo", 11.0), ("ppo_clip", 21.0)])
def test_tokens_that_only_the_clamp_bounds_are_counted(policy: Any, log_ratio: float) -> None:
    """With A < 0 and without a dual clip no clip bounds them, and yet they have no gradient."""
    inputs = tokens([math.exp(log_ratio), 1.0], [-1.0, -1.0])
    config = PolicyLossConfig(policy=policy, clip_dual=math.inf)
    assert gradient(inputs, config)[0] == 0.0
    metrics = policy_loss(inputs, config)[1]
    assert metrics["ratio_saturated_frac"].item() == pytest.approx(1 / 2)
    assert metrics["clip_frac"].item() == metrics["clip_dual_frac"].item() == 0.0
    risen = policy_loss(tokens([math.exp(log_ratio)], [1.0]), config)[1]  # with A > 0 the clip bounds it, and says so
    assert (risen["ratio_saturated_frac"].item(), risen["clip_frac"].item()) == (0.0, 1.0)


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_unusable_reference_logprobs_have_no_penalty_and_are_counted(estimator: Any, bad: float) -> None:
    inputs = tokens([1.0, 1.0, 1.0], [1.0, -1.0, 0.5])
    inputs.reference = torch.tensor([-2.0, bad, -3.5], dtype=torch.float64)
    config = PolicyLossConfig(kl_weight=0.3, kl=estimator)
    loss, metrics = policy_loss(inputs, config)
    (grad,) = torch.autograd.grad(loss, inputs.logprobs)
    assert math.isfinite(loss.item()) and grad.isfinite().all()
    assert grad[1].item() == pytest.approx(1 / 3)  # its policy gradient, and no other
    assert metrics["nonfinite_reference_frac"].item() == pytest.approx(1 / 3)
    usable = torch.tensor([0, 2])
    alone = kl_penalty(inputs.logprobs.detach()[usable], inputs.reference[usable], estimator)
    assert metrics["kl_to_reference"].item() == pytest.approx(alone.sum().item() / 3)


def test_cispo_keeps_the_gradient_that_ppo_drops() -> None:
    inputs = tokens([0.3, 1.0, 9.0], [1, -1, 1])
    assert gradient(inputs, PolicyLossConfig(policy="cispo")) == [-0.3, 1.0, -5.0]
    assert gradient(inputs, PolicyLossConfig(policy="cispo", clip_low=0.2, clip_high=1.0)) == [-0.8, 1.0, -2.0]
    assert gradient(inputs, PolicyLossConfig(policy="ppo_clip"))[2] == 0.0
    marks = policy_loss(inputs, PolicyLossConfig(policy="cispo", clip_low=0.2, clip_high=9.0))[1]
    assert marks["clip_frac"].item() == pytest.approx(1 / 3)


def test_dppo_bounds_the_probability_not_the_ratio() -> None:
    config = PolicyLossConfig(policy="dppo")  # 0.15 either way, ratio at most 20
    rare = tokens([10.0, 30.0], [1, 1], old=math.log(1e-4))  # 1e-4 -> 1e-3: PPO clips it, though nothing has moved
    assert gradient(rare, config) == [-10.0, -20.0]
    assert gradient(rare, PolicyLossConfig()) == [0.0, 0.0]
    likely = tokens([0.82, 0.82, 0.90], [-1, 1, -1], old=math.log(0.99))  # 0.99 -> 0.81: within PPO's clip
    assert gradient(likely, config) == [0.0, -0.82, 0.9]
    assert gradient(likely, PolicyLossConfig())[0] == 0.82
    assert policy_loss(likely, config)[1]["clip_frac"].item() == pytest.approx(1 / 3)
    assert policy_loss(rare, config)[1]["clip_dual_frac"].item() == pytest.approx(1 / 2)
    # Probability 0.01 -> 0.3, ratio 30: outside the trust region, so that the cap bounds nothing.
    far = tokens([30.0], [1], old=math.log(0.01))
    marks = policy_loss(far, config)[1]
    assert (marks["clip_frac"].item(), marks["clip_dual_frac"].item()) == (1.0, 0.0)


def test_dppo_has_a_bound_for_each_direction() -> None:
    moved = tokens([1.4, 1.4, 0.6, 0.6], [1, -1, -1, 1], old=math.log(0.5))  # 0.2 up and 0.2 down
    assert gradient(moved, PolicyLossConfig(policy="dppo", clip_low=0.3, clip_high=0.1)) == [0.0, 1.4, 0.6, -0.6]
    assert gradient(moved, PolicyLossConfig(policy="dppo", clip_low=0.1, clip_high=0.3)) == [-1.4, 1.4, 0.0, -0.6]


@pytest.mark.parametrize("policy", sorted(PUBLISHED_CLIPS))
def test_on_policy_every_loss_is_the_policy_gradient(policy: Any) -> None:
    inputs = tokens([1.0] * 5, [0.5, -1.0, 2.0, 0.0, -0.25])
    assert gradient(inputs, PolicyLossConfig(policy=policy)) == [-0.5, 1.0, -2.0, 0.0, 0.25]


def test_aggregations_of_the_recipe_differ_as_said() -> None:
    """Rows of 1 and 3 tokens: the long row has three quarters of the token mean, half of the sequence mean."""
    row_index = torch.tensor([0, 1, 1, 1])

    def weights(**options: Any) -> list[float]:
        return token_weights(row_index, 4, 2, PolicyLossConfig(**options)).tolist()

    assert weights(aggregation="token_mean") == pytest.approx([1 / 4] * 4)
    assert weights(aggregation="seq_mean_token_mean") == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])
    assert weights(aggregation="seq_mean_token_sum") == pytest.approx([1 / 2] * 4)
    assert weights(aggregation="constant_length", constant_length=8) == pytest.approx([1 / 16] * 4)


def test_micro_batch_of_one_with_token_mean_is_a_sequence_mean() -> None:
    """Why both are named: the released recipe averages per-micro-batch token means, one sequence each (item 35)."""
    rows = [tokens([1.1, 0.9, 1.2], [1, 1, 1]), tokens([1.05], [-1])]
    config = PolicyLossConfig(aggregation="token_mean")
    recipe = np.mean([policy_loss(row, config)[0].item() for row in rows])
    both = tokens([1.1, 0.9, 1.2, 1.05], [1, 1, 1, -1], rows=[0, 0, 0, 1])
    sequence = policy_loss(both, PolicyLossConfig(aggregation="seq_mean_token_mean"))[0].item()
    assert recipe == pytest.approx(sequence)
    assert recipe != pytest.approx(policy_loss(both, config)[0].item())


def test_k2_in_the_loss_and_weighted_k1_have_the_gradient_of_the_divergence() -> None:
    """Expected gradient over all actions of a small policy, against that of the exact reverse KL."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, generator=generator, requires_grad=True)
    reference = torch.randn(6, dtype=torch.float64, generator=generator).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)

    def expected(estimator: Any, importance: bool) -> torch.Tensor:
        penalty = kl_penalty(logprobs, reference, estimator)
        ratio = (logprobs - logprobs.detach()).exp() if importance else 1.0
        (grad,) = torch.autograd.grad((logprobs.detach().exp() * ratio * penalty).sum(), logits, retain_graph=True)
        return grad

    torch.testing.assert_close(expected("k2", False), exact)
    torch.testing.assert_close(expected("k1", True), exact)
    torch.testing.assert_close(expected("k3", True), exact)
    torch.testing.assert_close(expected("k1", False), torch.zeros_like(exact))
    assert not torch.allclose(expected("k3", False), exact, rtol=0.05)


def test_k3_is_clamped_as_in_the_reference() -> None:
    logprobs = torch.tensor([-40.0, -5.0, -1.0], dtype=torch.float64, requires_grad=True)
    value = kl_penalty(logprobs, torch.tensor([-1.0, -1.0, -1.5], dtype=torch.float64), "k3")
    value.sum().backward()
    assert value.tolist() == pytest.approx([10.0, 10.0, math.exp(-0.5) - 0.5])
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([0.0, 0.0, 1 - math.exp(-0.5)])


def test_k3_of_policies_worlds_apart_is_finite() -> None:
    logprobs = torch.tensor([-200.0], requires_grad=True)  # e^199 is infinite in float32
    value = kl_penalty(logprobs, torch.tensor([-1.0]), "k3")
    value.sum().backward()
    assert value.item() == 10.0
    assert logprobs.grad is not None and logprobs.grad.item() == 0.0


def test_row_means_leave_out_what_is_not_kept() -> None:
    values = torch.tensor([1.0, 3.0, math.nan, 8.0, math.inf])
    found = row_means(values, torch.tensor([0, 0, 0, 2, 3]), torch.tensor([True, True, False, True, False]))
    assert found.tolist() == [2.0, 2.0, 2.0, 8.0, 0.0]


def test_kl_in_the_reward() -> None:
    config = PolicyLossConfig(kl="k1", kl_in="reward", kl_weight=0.5)
    logprobs = torch.tensor([-1.0, -2.0, -0.5, math.nan, -1.0])
    reference = torch.tensor([-1.5, -2.5, -0.25, -1.0, -1.0])
    index = torch.tensor([0, 0, 2, 2, 2])
    found = rewards_with_kl([1.0, 0.25, 0.0], logprobs, reference, index, config)
    assert found.tolist() == pytest.approx([1.0 - 0.5 * 1.0, 0.25, 0.0 + 0.5 * 0.25])
    with pytest.raises(ValueError, match="kl_in"):
        rewards_with_kl([1.0], logprobs, reference, index, PolicyLossConfig(kl_weight=0.5))
    with pytest.raises(ValueError, match="2 rewards"):
        rewards_with_kl([1.0, 2.0], logprobs, reference, index, config)
    empty = torch.zeros(0)
    assert rewards_with_kl([1.0], empty, empty, empty.long(), config).tolist() == [1.0]


def test_kl_in_the_reward_leaves_the_loss_alone() -> None:
    inputs = tokens([1.1, 0.9], [1, -1])
    inputs.reference = inputs.old - 0.5
    plain, _ = policy_loss(inputs, PolicyLossConfig())
    moved, metrics = policy_loss(inputs, PolicyLossConfig(kl="k1", kl_in="reward", kl_weight=3.0))
    assert moved.item() == plain.item()
    assert metrics["kl_to_reference"].item() == pytest.approx(0.5 + math.log(1.1 * 0.9) / 2)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"policy": "ppo"}, "model.loss.policy"),
        ({"clip_low": -0.1}, "model.loss.clip_low"),
        ({"clip_low": 1.5}, "model.loss.clip_low"),
        ({"clip_low": math.nan}, "model.loss.clip_low"),
        ({"clip_high": -1.0}, "model.loss.clip_high"),
        ({"policy": "dppo", "clip_high": 1.5}, "model.loss.clip_high"),
        ({"clip_dual": 1.0}, "model.loss.clip_dual"),
        ({"policy": "cispo", "clip_dual": 10.0}, "model.loss.clip_dual"),
        ({"aggregation": "mean"}, "model.loss.aggregation"),
        ({"aggregation": "constant_length"}, "model.loss.constant_length"),
        ({"aggregation": "constant_length", "constant_length": 0}, "model.loss.constant_length"),
        ({"constant_length": 100}, "model.loss.constant_length"),
        ({"kl": "k4"}, "model.loss.kl "),
        ({"kl_in": "both"}, "model.loss.kl_in"),
        ({"kl_weight": -1.0}, "model.loss.kl_weight"),
        ({"kl_in": "reward"}, "model.loss.kl_weight"),
        ({"kl_importance": True}, "model.loss.kl_importance"),
        ({"kl_importance": True, "kl_in": "reward", "kl_weight": 1.0}, "model.loss.kl_importance"),
        ({"entropy_weight": -1.0}, "model.loss.entropy_weight"),
        ({"importance_cap": 0.0}, "model.loss.importance_cap"),
        ({"importance_band": (1.1, 0.9)}, "model.loss.importance_band"),
    ],
)
def test_refused_with_the_flag_to_change(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        PolicyLossConfig(**options)


def test_missing_inputs_are_refused() -> None:
    inputs = tokens([1.0, 1.1], [1, -1])
    with pytest.raises(ValueError, match="kl_weight"):
        policy_loss(inputs, PolicyLossConfig(kl_weight=0.1))
    with pytest.raises(ValueError, match="entropy_weight"):
        policy_loss(inputs, PolicyLossConfig(entropy_weight=0.1))
    inputs.entropy = torch.ones(2)
    with pytest.raises(ValueError, match="no gradient"):
        policy_loss(inputs, PolicyLossConfig(entropy_weight=0.1))
    with torch.no_grad():  # in evaluation nothing carries one
        inputs.logprobs = inputs.logprobs.detach()
        policy_loss(inputs, PolicyLossConfig(entropy_weight=0.1))


def test_wrong_shapes_and_counts_are_refused() -> None:
    good = tokens([1.0, 1.1], [1, -1])
    values = {name: getattr(good, name) for name in LossInputs.__dataclass_fields__}
    with pytest.raises(ValueError, match=r"old has shape \[3\]"):
        LossInputs(**{**values, "old": torch.zeros(3)})
    with pytest.raises(ValueError, match="num_tokens"):
        LossInputs(**{**values, "num_tokens": 0})


def test_published_clips_stand_in_for_null() -> None:
    assert PolicyLossConfig().clips == (0.2, 0.28, 10.0)
    assert PolicyLossConfig(policy="gspo", clip_high=0.001).clips == (3e-4, 0.001, math.inf)
