"""Each option of the losses in small cases calculated by hand, and the refusal of invalid options."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from cv_lightning.rl.aggregation import aggregation_weights
from cv_lightning.rl.algorithm import AlgorithmConfig, DynamicSamplingConfig
from cv_lightning.rl.kl import KLConfig, kl_penalty, rewards_with_kl
from cv_lightning.rl.losses import CISPO, DPPO, GSPO, PolicyLoss, PPOClip, TokenBatch
from cv_lightning.rl.objective import total_loss


def tokens(
    ratios: list[float],
    advantages: list[float],
    old: float = -3.0,
    sequences: list[int] | None = None,
    **more: torch.Tensor,
) -> TokenBatch:
    """Tokens with the given ratios of policy to old."""
    size = len(ratios)
    return TokenBatch(
        logprobs=(torch.tensor(ratios, dtype=torch.float64).log() + old).requires_grad_(),
        old_logprobs=torch.full((size,), old, dtype=torch.float64),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        sequence_index=torch.tensor(sequences or list(range(size))),
        num_tokens=size,
        num_sequences=len(set(sequences or range(size))),
        **more,
    )


def gradient(inputs: TokenBatch, loss_of: PolicyLoss | AlgorithmConfig) -> list[float]:
    """Gradient of the loss for each token, multiplied by the number of tokens."""
    algorithm = loss_of if isinstance(loss_of, AlgorithmConfig) else AlgorithmConfig(loss=loss_of)
    loss, _ = total_loss(inputs, algorithm)
    (grad,) = torch.autograd.grad(loss, inputs.logprobs)
    return [round(value, 12) for value in (grad * inputs.num_tokens).tolist()]


def test_clip_higher_and_dual_clip() -> None:
    config = PPOClip(clip_low=0.2, clip_high=0.3, dual_clip=5.0)
    inputs = tokens([1.25, 1.35, 0.75, 0.75, 1.35, 6.0], [1, 1, -1, 1, -1, -1])
    # A token that the clip bounds gets no gradient; one that moves back towards 1 keeps its own.
    assert gradient(inputs, config) == [-1.25, 0.0, 0.0, -0.75, 1.35, 0.0]
    loss, metrics = total_loss(inputs, AlgorithmConfig(loss=config))
    assert loss.item() * 6 == pytest.approx(-1.25 - 1.3 + 0.8 - 0.75 + 1.35 + 5.0)
    assert metrics["clip_frac"].item() == pytest.approx(2 / 6)
    assert metrics["dual_clip_frac"].item() == pytest.approx(1 / 6)
    assert gradient(inputs, PPOClip(clip_low=0.2, clip_high=0.3, dual_clip=math.inf))[-1] == 6.0


def test_gspo_clips_a_sequence_as_a_whole() -> None:
    config = AlgorithmConfig(loss=GSPO(clip_low=0.1, clip_high=0.1), aggregation="seq_mean_token_mean")
    # Sequence 0: 2 and 0.5 cancel, the ratio is 1. Sequence 1: geometric mean of 1.21 and 1.44 is 1.32, outside.
    inputs = tokens([2.0, 0.5, 1.21, 1.44], [1, 1, 1, 1], sequences=[0, 0, 1, 1])
    assert gradient(inputs, config) == [-1.0, -1.0, 0.0, 0.0]
    _, metrics = total_loss(inputs, config)
    assert metrics["clip_frac"].item() == 0.5
    assert metrics["ratio_mean"].item() == pytest.approx((2 + 2 * 1.32) / 4)


@pytest.mark.parametrize(("kind", "log_ratio"), [(GSPO, 11.0), (PPOClip, 21.0)])
def test_tokens_that_only_the_clamp_bounds_are_counted(kind: Any, log_ratio: float) -> None:
    """With A < 0 and without a dual clip no clip bounds them, but the clamp removes their gradient."""
    inputs = tokens([math.exp(log_ratio), 1.0], [-1.0, -1.0])
    config = kind(dual_clip=math.inf)
    assert gradient(inputs, config)[0] == 0.0
    metrics = total_loss(inputs, AlgorithmConfig(loss=config))[1]
    assert metrics["ratio_saturated_frac"].item() == pytest.approx(1 / 2)
    assert metrics["clip_frac"].item() == metrics["dual_clip_frac"].item() == 0.0
    risen = kind()(tokens([math.exp(log_ratio)], [1.0]))[1]  # with A > 0 the clip bounds it and is counted
    assert (risen["ratio_saturated_frac"].item(), risen["clip_frac"].item()) == (0.0, 1.0)


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_reference_logprobs_have_no_penalty_and_are_counted(estimator: Any, bad: float) -> None:
    reference = torch.tensor([-2.0, bad, -3.5], dtype=torch.float64)
    inputs = tokens([1.0, 1.0, 1.0], [1.0, -1.0, 0.5], reference_logprobs=reference)
    loss, metrics = total_loss(inputs, AlgorithmConfig(kl=KLConfig(weight=0.3, estimator=estimator)))
    (grad,) = torch.autograd.grad(loss, inputs.logprobs)
    assert math.isfinite(loss.item()) and grad.isfinite().all()
    assert grad[1].item() == pytest.approx(1 / 3)  # its policy gradient, and no other
    assert metrics["nonfinite_reference_frac"].item() == pytest.approx(1 / 3)
    usable = torch.tensor([0, 2])
    alone = kl_penalty(inputs.logprobs.detach()[usable], reference[usable], estimator)
    assert metrics["kl_to_reference"].item() == pytest.approx(alone.sum().item() / 3)


def test_cispo_keeps_the_gradient_that_ppo_drops() -> None:
    inputs = tokens([0.3, 1.0, 9.0], [1, -1, 1])
    assert gradient(inputs, CISPO()) == [-0.3, 1.0, -5.0]
    assert gradient(inputs, CISPO(clip_low=0.2, clip_high=1.0)) == [-0.8, 1.0, -2.0]
    assert gradient(inputs, PPOClip())[2] == 0.0
    marks = CISPO(clip_low=0.2, clip_high=9.0)(inputs)[1]
    assert marks["clip_frac"].item() == pytest.approx(1 / 3)


def test_dppo_bounds_the_probability_not_the_ratio() -> None:
    config = DPPO()  # 0.15 either way, ratio at most 20
    rare = tokens([10.0, 30.0], [1, 1], old=math.log(1e-4))  # 1e-4 -> 1e-3: PPO clips it, though nothing has moved
    assert gradient(rare, config) == [-10.0, -20.0]
    assert gradient(rare, PPOClip()) == [0.0, 0.0]
    likely = tokens([0.82, 0.82, 0.90], [-1, 1, -1], old=math.log(0.99))  # 0.99 -> 0.81: within PPO's clip
    assert gradient(likely, config) == [0.0, -0.82, 0.9]
    assert gradient(likely, PPOClip())[0] == 0.82
    assert config(likely)[1]["clip_frac"].item() == pytest.approx(1 / 3)
    assert config(rare)[1]["ratio_cap_frac"].item() == pytest.approx(1 / 2)
    # Probability 0.01 -> 0.3, ratio 30: outside the trust region, so that the cap bounds nothing.
    far = tokens([30.0], [1], old=math.log(0.01))
    marks = config(far)[1]
    assert (marks["clip_frac"].item(), marks["ratio_cap_frac"].item()) == (1.0, 0.0)


def test_dppo_has_a_bound_for_each_direction() -> None:
    moved = tokens([1.4, 1.4, 0.6, 0.6], [1, -1, -1, 1], old=math.log(0.5))  # 0.2 up and 0.2 down
    assert gradient(moved, DPPO(clip_low=0.3, clip_high=0.1)) == [0.0, 1.4, 0.6, -0.6]
    assert gradient(moved, DPPO(clip_low=0.1, clip_high=0.3)) == [-1.4, 1.4, 0.0, -0.6]


@pytest.mark.parametrize("kind", [PPOClip, GSPO, CISPO, DPPO])
def test_on_policy_every_loss_is_the_policy_gradient(kind: Any) -> None:
    inputs = tokens([1.0] * 5, [0.5, -1.0, 2.0, 0.0, -0.25])
    assert gradient(inputs, kind()) == [-0.5, 1.0, -2.0, 0.0, 0.25]


def test_weights_of_the_aggregations() -> None:
    """Of sequences of 1 and 3 tokens, the long one has 3/4 of the token mean and 1/2 of the sequence mean."""
    sequence_index = torch.tensor([0, 1, 1, 1])

    def weights(**options: Any) -> list[float]:
        return aggregation_weights(sequence_index, 4, 2, **options).tolist()

    assert weights(aggregation="token_mean") == pytest.approx([1 / 4] * 4)
    assert weights(aggregation="seq_mean_token_mean") == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])
    assert weights(aggregation="seq_mean_token_sum") == pytest.approx([1 / 2] * 4)
    assert weights(aggregation="constant_length", constant_length=8) == pytest.approx([1 / 16] * 4)


def test_micro_batch_of_one_with_token_mean_is_a_sequence_mean() -> None:
    """The released recipe averages token means of micro-batches with one sequence each."""
    sequences = [tokens([1.1, 0.9, 1.2], [1, 1, 1]), tokens([1.05], [-1])]
    config = AlgorithmConfig(aggregation="token_mean")
    recipe = np.mean([total_loss(sequence, config)[0].item() for sequence in sequences])
    both = tokens([1.1, 0.9, 1.2, 1.05], [1, 1, 1, -1], sequences=[0, 0, 0, 1])
    per_sequence = total_loss(both, AlgorithmConfig(aggregation="seq_mean_token_mean"))[0].item()
    assert recipe == pytest.approx(per_sequence)
    assert recipe != pytest.approx(total_loss(both, config)[0].item())


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


def test_sequence_means_leave_out_masked_tokens() -> None:
    values = torch.tensor([1.0, 3.0, math.nan, 8.0, math.inf])
    inputs = tokens([1.0] * 5, [0.0] * 5, sequences=[0, 0, 0, 2, 3])
    inputs.mask = torch.tensor([True, True, False, True, False])
    assert inputs.sequence_means(values).tolist() == [2.0, 2.0, 2.0, 8.0, 0.0]


def test_kl_in_the_reward() -> None:
    config = KLConfig(estimator="k1", place="reward", weight=0.5)
    logprobs = torch.tensor([-1.0, -2.0, -0.5, math.nan, -1.0])
    reference = torch.tensor([-1.5, -2.5, -0.25, -1.0, -1.0])
    index = torch.tensor([0, 0, 2, 2, 2])
    found = rewards_with_kl([1.0, 0.25, 0.0], logprobs, reference, index, config)
    assert found.tolist() == pytest.approx([1.0 - 0.5 * 1.0, 0.25, 0.0 + 0.5 * 0.25])
    empty = torch.zeros(0)
    assert rewards_with_kl([1.0], empty, empty, empty.long(), config).tolist() == [1.0]


def test_kl_in_the_reward_leaves_the_loss_alone() -> None:
    reference = torch.full((2,), -3.5, dtype=torch.float64)
    inputs = tokens([1.1, 0.9], [1, -1], reference_logprobs=reference)
    plain, _ = total_loss(inputs, AlgorithmConfig())
    in_reward = KLConfig(estimator="k1", place="reward", weight=3.0)
    moved, metrics = total_loss(inputs, AlgorithmConfig(kl=in_reward))
    assert moved.item() == plain.item()
    assert metrics["kl_to_reference"].item() == pytest.approx(0.5 + math.log(1.1 * 0.9) / 2)


@pytest.mark.parametrize(
    ("kind", "options", "key"),
    [
        (PPOClip, {"clip_low": -0.1}, "loss.init_args.clip_low"),
        (PPOClip, {"clip_low": 1.5}, "loss.init_args.clip_low"),
        (PPOClip, {"clip_low": math.nan}, "loss.init_args.clip_low"),
        (PPOClip, {"clip_high": -1.0}, "loss.init_args.clip_high"),
        (DPPO, {"clip_high": 1.5}, "loss.init_args.clip_high"),
        (PPOClip, {"dual_clip": 1.0}, "loss.init_args.dual_clip"),
        (GSPO, {"dual_clip": 0.5}, "loss.init_args.dual_clip"),
        (DPPO, {"ratio_cap": 1.0}, "loss.init_args.ratio_cap"),
        (CISPO, {"clip_low": 2.0}, "loss.init_args.clip_low"),
        (AlgorithmConfig, {"aggregation": "mean"}, "aggregation"),
        (AlgorithmConfig, {"aggregation": "constant_length"}, "constant_length"),
        (AlgorithmConfig, {"aggregation": "constant_length", "constant_length": 0}, "constant_length"),
        (AlgorithmConfig, {"constant_length": 100}, "constant_length"),
        (AlgorithmConfig, {"entropy_weight": -1.0}, "entropy_weight"),
        (AlgorithmConfig, {"num_minibatches": 0}, "num_minibatches"),
        (AlgorithmConfig, {"old_logprobs": "both"}, "old_logprobs"),
        (AlgorithmConfig, {"tis_clip": 0.0}, "tis_clip"),
        (AlgorithmConfig, {"sequence_mask": (1.1, 0.9)}, "sequence_mask"),
        (AlgorithmConfig, {"sequence_mask": (0.9, 1.1)}, "old_logprobs"),
        (DynamicSamplingConfig, {"max_oversample": 0.5}, "dynamic_sampling.max_oversample"),
        (KLConfig, {"estimator": "k4"}, "kl.estimator "),
        (KLConfig, {"place": "both"}, "kl.place"),
        (KLConfig, {"weight": -1.0}, "kl.weight"),
        (KLConfig, {"place": "reward"}, "kl.weight"),
        (KLConfig, {"importance": True}, "kl.importance"),
        (KLConfig, {"importance": True, "place": "reward", "weight": 1.0}, "kl.importance"),
        (KLConfig, {"every": 2}, "kl.every"),
        (KLConfig, {"every": 0, "weight": 1.0}, "kl.every"),
    ],
)
def test_refused_with_the_key_to_change(kind: Any, options: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=f"model.init_args.algorithm.{key}"):
        kind(**options)


def test_gspo_warns_of_a_clip_range_for_token_ratios(caplog: pytest.LogCaptureFixture) -> None:
    GSPO()
    assert not caplog.records
    GSPO(clip_low=0.2, clip_high=0.28)
    assert "4e-4" in caplog.text


def test_missing_inputs_are_refused() -> None:
    bonus = AlgorithmConfig(entropy_weight=0.1)
    inputs = tokens([1.0, 1.1], [1, -1])
    with pytest.raises(ValueError, match=r"kl\.weight"):
        total_loss(inputs, AlgorithmConfig(kl=KLConfig(weight=0.1)))
    with pytest.raises(ValueError, match="entropy_weight"):
        total_loss(inputs, bonus)
    with pytest.raises(ValueError, match="no gradient"):
        total_loss(tokens([1.0, 1.1], [1, -1], entropy=torch.ones(2)), bonus)
    with torch.no_grad():  # in evaluation no tensor has a gradient
        inputs = tokens([1.0, 1.1], [1, -1], entropy=torch.ones(2))
        inputs.logprobs = inputs.logprobs.detach()
        total_loss(inputs, bonus)


def test_wrong_shapes_and_counts_are_refused() -> None:
    good = tokens([1.0, 1.1], [1, -1])
    values = {name: getattr(good, name) for name, field in TokenBatch.__dataclass_fields__.items() if field.init}
    with pytest.raises(ValueError, match=r"old_logprobs has shape \[3\]"):
        TokenBatch(**{**values, "old_logprobs": torch.zeros(3)})
    with pytest.raises(ValueError, match="num_tokens"):
        TokenBatch(**{**values, "num_tokens": 0})


def test_defaults_are_the_published_bounds() -> None:
    assert vars(PPOClip()) == {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0}
    assert vars(GSPO(clip_high=0.001)) == {"clip_low": 3e-4, "clip_high": 0.001, "dual_clip": math.inf}
    assert vars(CISPO()) == {"clip_low": 1.0, "clip_high": 4.0}
    assert vars(DPPO()) == {"clip_low": 0.15, "clip_high": 0.15, "ratio_cap": 20.0}


def test_kl_every_scales_the_weight_by_the_interval() -> None:
    kl = KLConfig(weight=0.1, every=2)
    assert [kl.weight_at(iteration) for iteration in range(3)] == [0.2, 0.0, 0.2]
    assert KLConfig(weight=0.1, place="reward").weight_at(0) == 0.0
