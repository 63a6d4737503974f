"""SFT and GRPO steps on fixed data by a real Trainer with the tiny model, without an engine."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from module_samples import PROMPT, SGD_LIKE, fit, groups, parameters, policy

from cv_lightning.callbacks.watchdog import Watchdog
from cv_lightning.commands.tiny import TinyCheckpoint, write
from cv_lightning.data.modules import StepLoader
from cv_lightning.digits.modules import DigitSFTDataModule
from cv_lightning.digits.scenes import DigitsConfig
from cv_lightning.models.adapters.tiny import TinyModelConfig
from cv_lightning.models.loading import load_policy
from cv_lightning.modules.base import OptimizerConfig
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.modules.sft import SFTModule, encode_conversation
from cv_lightning.rl.algorithm import AlgorithmConfig
from cv_lightning.rl.kl import KLConfig
from cv_lightning.rl.losses import PPOClip
from cv_lightning.types import Group, Iteration

ONE_STEP = AlgorithmConfig(num_minibatches=1)


def grpo_after_one_iteration(
    path: Path, made: list[Group] | None = None, **arguments: object
) -> tuple[GRPOModule, pl.Trainer]:
    module = GRPOModule(policy(path), **({"optimizer": SGD_LIKE, "algorithm": ONE_STEP} | arguments))  # type: ignore[arg-type]
    chosen = groups(module, 3) if made is None else made

    def build(step: int) -> Iteration:
        batch = Iteration(step, [group.task for group in chosen])
        batch.groups = chosen
        return batch

    return module, fit(module, build, 1)


def test_many_micro_batches_take_the_step_of_one(tiny_checkpoint: Path) -> None:
    loose = AlgorithmConfig(loss=PPOClip(clip_low=0.99, clip_high=1e6, dual_clip=1e6), num_minibatches=1)
    whole, _ = grpo_after_one_iteration(tiny_checkpoint, max_tokens_per_row=100_000, algorithm=loose)
    split, _ = grpo_after_one_iteration(tiny_checkpoint, max_tokens_per_row=100, algorithm=loose)
    sequences = split.train_sequences([t for g in groups(split, 3) for t in g.trajectories])
    assert len(split.pack_micro_batches(sequences)) > 3
    assert len(whole.pack_micro_batches(sequences)) == 1
    start = GRPOModule(policy(tiny_checkpoint))
    start.trainer = whole.trainer
    start.configure_model()
    assert (parameters(whole) - parameters(start)).abs().max() > 1e-4
    # Adam's first step is lr * sign(gradient) where the gradient is far from its epsilon: compare the gradients' effect
    moved = (parameters(whole) - parameters(split)).abs()
    assert moved.mean() < 1e-7 and (moved > 1e-5).float().mean() < 1e-3


def test_groups_of_equal_rewards_change_only_the_counters(tiny_checkpoint: Path) -> None:
    module = GRPOModule(policy(tiny_checkpoint))
    still = [
        replace(group, trajectories=[replace(t, advantage=0.0) for t in group.trajectories])
        for group in groups(module, 2)
    ]
    trained, trainer = grpo_after_one_iteration(tiny_checkpoint, still, algorithm=AlgorithmConfig())
    module.trainer = trainer
    module.configure_model()
    assert torch.equal(parameters(trained), parameters(module))
    assert trainer.global_step == 2 and trained.iteration == 1
    assert float(trainer.callback_metrics["policy/trajectories"]) == 0


@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_ratio_against_the_trainers_own_logprobs_starts_at_one(tiny_checkpoint: Path, num_minibatches: int) -> None:
    _, trainer = grpo_after_one_iteration(
        tiny_checkpoint,
        algorithm=AlgorithmConfig(old_logprobs="trainer", num_minibatches=num_minibatches),
        optimizer=OptimizerConfig(lr=1e-12, weight_decay=0.0),
    )
    assert float(trainer.callback_metrics["policy/ratio_mean"]) == pytest.approx(1.0, abs=1e-5)
    # The engine's log-probabilities are made up.
    assert float(trainer.callback_metrics["policy/mismatch_max"]) > 0.1


def test_the_reference_pulls_back_and_stays_out_of_checkpoints(tiny_checkpoint: Path, tmp_path: Path) -> None:
    algorithm = AlgorithmConfig(kl=KLConfig(weight=0.1))
    module = GRPOModule(policy(tiny_checkpoint), SGD_LIKE, algorithm=algorithm)
    chosen = groups(module, 2)

    def build(step: int) -> Iteration:
        batch = Iteration(step, [])
        batch.groups = chosen
        return batch

    trainer = fit(module, build, 2)
    assert float(trainer.callback_metrics["policy/kl_to_reference"]) > 0
    assert module.reference is not None and not any(p.requires_grad for p in module.reference.parameters())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=False)
    assert saved["iteration"] == 2 and not any(name.startswith("reference.") for name in saved["state_dict"])

    resumed = GRPOModule(policy(tiny_checkpoint), SGD_LIKE, algorithm=algorithm)
    again = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    again.fit(resumed, train_dataloaders=StepLoader(build, 2), ckpt_path=str(tmp_path / "run.ckpt"))
    assert torch.equal(parameters(resumed), parameters(module)) and resumed.iteration == 2


def test_sft_lowers_its_loss_and_learns_assistant_tokens_only(tiny_checkpoint: Path) -> None:
    module = SFTModule(policy(tiny_checkpoint), OptimizerConfig(lr=1e-3, weight_decay=0.0), prompt=PROMPT)
    data = DigitSFTDataModule(digits=DigitsConfig(), num_steps=1, conversations_per_step=8, warm_up_share=0.0)
    batch = data.train_dataloader().build(0)
    losses: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            losses.append(float(trainer.callback_metrics["sft/loss"]))

    fit(module, lambda step: batch, 8, callbacks=[Watch()])
    data.teardown("fit")
    assert losses[-1] < losses[0] - 1.0
    assert module.trainer.global_step == 8

    conversation = next(c for c in batch.conversations if len(c.turns) > 1)
    dialogue = encode_conversation(module.encoder, conversation, PROMPT)
    learned = [token for token, mask in zip(dialogue.token_ids, dialogue.loss_mask, strict=True) if mask]
    wanted = [token for turn in conversation.turns for token in module.encoder.assistant_ids(turn.text)]
    assert learned == wanted


def test_hold_linear_schedule() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=10, schedule="hold_linear", final_share=0.05)
    values = [config.multiplier(step, 100) for step in range(100)]
    assert values[0] == pytest.approx(0.1) and values[9] == values[50] == 1.0
    assert values[75] == pytest.approx(0.5) and min(values[10:]) >= 0.05


def test_the_entropy_bonus_raises_the_entropy(tiny_checkpoint: Path) -> None:
    def entropy_after(weight: float) -> float:
        algorithm = AlgorithmConfig(entropy_weight=weight, num_minibatches=1)
        module = GRPOModule(policy(tiny_checkpoint), SGD_LIKE, algorithm=algorithm)
        chosen = groups(module, 2)

        def build(step: int) -> Iteration:
            batch = Iteration(step, [])
            batch.groups = chosen
            return batch

        return float(fit(module, build, 6).callback_metrics["policy/entropy"])

    assert entropy_after(10.0) > entropy_after(0.0) + 1e-3


# ------------------------------------------------------------------ invalid trajectories and skipped steps
@pytest.mark.parametrize("broken", ["bound", "infinite"])
def test_a_step_with_a_nonfinite_gradient_is_skipped_and_counted(tiny_checkpoint: Path, broken: str) -> None:
    optimizer = OptimizerConfig(lr=1e-3, weight_decay=0.1, skip_norm_above=1e-9 if broken == "bound" else None)
    made = groups(GRPOModule(policy(tiny_checkpoint)), 1)
    if broken == "infinite":
        made[0].trajectories[1].advantage = math.inf
    trained, trainer = grpo_after_one_iteration(tiny_checkpoint, made, optimizer=optimizer)
    assert torch.equal(parameters(trained), parameters(start(tiny_checkpoint)))
    assert float(trainer.callback_metrics["policy/skipped_steps"]) == 1
    assert trainer.global_step == 1, "every iteration has the same number of steps"
    with pytest.raises(ValueError, match="skip_norm_above"):
        OptimizerConfig(skip_norm_above=0.0)


def test_trajectories_that_cannot_be_packed_are_skipped_and_counted(tiny_checkpoint: Path) -> None:
    made = groups(GRPOModule(policy(tiny_checkpoint)), 2)
    short, many, unknown = made[0].trajectories[1:]
    short.loss_mask = short.loss_mask[:-1]
    many.token_ids = [*many.token_ids[:-1], many.token_ids[many.loss_mask.index(True) - 1]]
    many.token_ids[-1] = next(t for t in many.token_ids if many.token_ids.count(t) > 8)  # an image token too many
    unknown.logprobs = [math.nan if mask else 0.0 for mask in unknown.loss_mask]
    trained, trainer = grpo_after_one_iteration(tiny_checkpoint, made, max_tokens_per_row=20)  # all are longer
    metrics = trainer.callback_metrics
    assert float(metrics["policy/unpackable"]) == 2
    assert 0 < float(metrics["policy/nonfinite_frac"]) < 1
    moved = parameters(trained) - parameters(start(tiny_checkpoint))
    assert moved.isfinite().all() and moved.abs().max() > 1e-5


def test_an_iteration_without_groups_takes_its_steps(tiny_checkpoint: Path) -> None:
    trained, trainer = grpo_after_one_iteration(tiny_checkpoint, [Group(task=None, trajectories=[])])  # type: ignore[arg-type]
    assert trainer.global_step == 1 and trained.iteration == 1
    assert float(trainer.callback_metrics["policy/loss"]) == 0


def test_every_forward_and_backward_reports_progress_to_the_watchdog(tiny_checkpoint: Path) -> None:
    """An update of many long sequences may take longer than the watchdog's time-out."""
    module = GRPOModule(policy(tiny_checkpoint), SGD_LIKE, max_tokens_per_row=100, algorithm=ONE_STEP)
    heard: list[int] = []
    module.on_progress = lambda: heard.append(1)
    batch = Iteration(0, [])
    batch.groups = groups(module, 2)
    fit(module, lambda step: batch, 1)
    sequences = module.train_sequences([t for g in batch.groups for t in g.trajectories])
    num_batches = len(module.pack_micro_batches(sequences))
    assert num_batches > 1 and len(heard) >= num_batches, "one forward and backward per micro-batch with a gradient"
    watchdog = Watchdog()
    watchdog.setup(pl.Trainer(accelerator="cpu", logger=False), module, "fit")
    module.on_progress()
    assert time.monotonic() - watchdog.place.since < 1.0 and module.on_progress == watchdog.progress


# ------------------------------------------------------------------ reference policy and images
def test_kl_in_the_reward_is_the_sum_over_each_trajectory(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write(TinyCheckpoint(out=tmp_path, model=TinyModelConfig(seed=1)))
    kl = KLConfig(weight=0.05, estimator="k1", place="reward", reference_path=str(tmp_path))
    module = GRPOModule(policy(tiny_checkpoint), None, 250, AlgorithmConfig(kl=kl), temperature=0.9)
    module.trainer = pl.Trainer(accelerator="cpu", logger=False)
    module.policy, module.reference = start(tiny_checkpoint).policy, load_policy(policy(tmp_path))
    trajectories = [t for group in groups(module, 2) for t in group.trajectories]
    unlearnt = replace(trajectories[1], loss_mask=[False] * len(trajectories[1].loss_mask))
    odd = [trajectories[0], replace(trajectories[0], images=[]), unlearnt]
    penalised = module.advantage_rewards(odd)
    assert penalised[1:] == [t.reward.total for t in odd[1:] if t.reward is not None], "the update leaves them out, too"
    assert penalised[0] != trajectories[0].reward.total and len(module._kl_penalties) == 1  # type: ignore[union-attr]
    penalised = module.advantage_rewards(trajectories)
    for trajectory, reward in zip(trajectories, penalised, strict=True):
        (alone,) = module.pack_micro_batches(module.train_sequences([trajectory]))
        reference = module.logprobs(alone, temperature=0.9, model=module.reference).logprobs.detach()
        assert trajectory.reward is not None
        gap = sum(logprob for logprob, mask in zip(trajectory.logprobs, trajectory.loss_mask, strict=True) if mask)
        assert reward == pytest.approx(trajectory.reward.total - 0.05 * (gap - float(reference.sum())), abs=1e-4)
    module.algorithm = AlgorithmConfig()
    assert module.advantage_rewards(trajectories) == [t.reward.total for t in trajectories if t.reward is not None]


def test_the_reference_runs_every_second_iteration_at_twice_the_weight(tiny_checkpoint: Path) -> None:
    module = GRPOModule(
        policy(tiny_checkpoint),
        SGD_LIKE,
        algorithm=AlgorithmConfig(kl=KLConfig(weight=0.1, importance=True, every=2), num_minibatches=1),
    )
    weights, calls = [], []
    compute = module._reference_logprobs
    module._reference_logprobs = lambda batch: calls.append(module.iteration) or compute(batch)  # type: ignore[method-assign]
    made = groups(module, 1)

    def build(step: int) -> Iteration:
        weights.append(module.kl_weight)
        batch = Iteration(step, [])
        batch.groups = made
        return batch

    fit(module, build, 3)
    assert weights == [0.2, 0.0, 0.2] and calls == [0, 2]


def test_each_image_is_processed_once_an_iteration(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processed: list[int] = []
    module = GRPOModule(policy(tiny_checkpoint))
    process = module.adapter.process_images
    monkeypatch.setattr(
        module.adapter, "process_images", lambda images: processed.extend(map(id, images)) or process(images)
    )
    trajectories = [t for group in groups(module, 2) for t in group.trajectories]
    for _ in range(2):
        module.train_sequences(trajectories)
    assert sorted(processed) == sorted({id(image.model_image) for t in trajectories for image in t.images})
    trained, _ = grpo_after_one_iteration(tiny_checkpoint, groups(module, 1))
    assert not trained.vision_cache._known, "the next iteration has other images"


def start(path: Path) -> GRPOModule:
    """The policy before training."""
    module = GRPOModule(policy(path))
    module.policy = load_policy(module.policy_config)
    return module


def test_mismatch_is_measured_if_no_trajectory_has_a_gradient(tiny_checkpoint: Path) -> None:
    module = GRPOModule(policy(tiny_checkpoint))
    still = [
        replace(group, trajectories=[replace(t, advantage=0.0) for t in group.trajectories])
        for group in groups(module, 2)
    ]
    _, trainer = grpo_after_one_iteration(tiny_checkpoint, still, algorithm=AlgorithmConfig())
    # The engine's log-probabilities are made up.
    assert float(trainer.callback_metrics["policy/mismatch_max"]) > 0.1
    broken = [
        replace(g, trajectories=[replace(t, logprobs=[float("nan")] * len(t.logprobs)) for t in g.trajectories])
        for g in still
    ]
    _, trainer = grpo_after_one_iteration(tiny_checkpoint, broken, algorithm=AlgorithmConfig())
    assert float(trainer.callback_metrics["policy/mismatch_max"]) == 1e9
