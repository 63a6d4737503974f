"""SFT and GRPO steps on fixed data, run by a real Trainer on the tiny model; no engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from module_samples import PROMPT, SGD_LIKE, fit, groups, parameters, policy

from cv_lightning.data.digits import DigitsConfig
from cv_lightning.data.modules import SFTDataModule, StepLoader
from cv_lightning.modules.base import OptimizerConfig
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.modules.sft import SFTModule, encode_conversation
from cv_lightning.rl.losses import PolicyLossConfig
from cv_lightning.types import Group, Iteration


def grpo_after_one_iteration(
    path: Path, made: list[Group] | None = None, **arguments: object
) -> tuple[GRPOModule, pl.Trainer]:
    module = GRPOModule(policy(path), **({"optimizer": SGD_LIKE, "num_minibatches": 1} | arguments))  # type: ignore[arg-type]
    chosen = groups(module, 3) if made is None else made

    def build(step: int) -> Iteration:
        batch = Iteration(step, [group.task for group in chosen])
        batch.groups = chosen
        return batch

    return module, fit(module, build, 1)


def test_many_micro_batches_take_the_step_of_one(tiny_checkpoint: Path) -> None:
    loose = {"loss": PolicyLossConfig(clip_low=0.99, clip_high=1e6, clip_dual=1e6)}
    whole, _ = grpo_after_one_iteration(tiny_checkpoint, max_tokens_per_row=100_000, **loose)
    split, _ = grpo_after_one_iteration(tiny_checkpoint, max_tokens_per_row=100, **loose)
    rows = split.train_rows([t for g in groups(split, 3) for t in g.trajectories])
    assert len(split.pack_micro_batches(rows)) > 3
    assert len(whole.pack_micro_batches(rows)) == 1
    start = GRPOModule(policy(tiny_checkpoint))
    start.trainer = whole.trainer
    start.configure_model()
    assert (parameters(whole) - parameters(start)).abs().max() > 1e-4
    # Adam's first step is lr * sign(gradient) where the gradient is far from its epsilon: compare the gradients' effect
    moved = (parameters(whole) - parameters(split)).abs()
    assert moved.mean() < 1e-7 and (moved > 1e-5).float().mean() < 1e-3


def test_groups_without_signal_change_nothing_but_the_counters(tiny_checkpoint: Path) -> None:
    module = GRPOModule(policy(tiny_checkpoint))
    still = [
        replace(group, trajectories=[replace(t, advantage=0.0) for t in group.trajectories])
        for group in groups(module, 2)
    ]
    trained, trainer = grpo_after_one_iteration(tiny_checkpoint, still, num_minibatches=2)
    module.trainer = trainer
    module.configure_model()
    assert torch.equal(parameters(trained), parameters(module))
    assert trainer.global_step == 2 and trained.iteration == 1
    assert float(trainer.callback_metrics["policy/trajectories"]) == 0


@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_ratio_against_the_trainers_own_logprobs_starts_at_one(tiny_checkpoint: Path, num_minibatches: int) -> None:
    _, trainer = grpo_after_one_iteration(
        tiny_checkpoint,
        old_logprobs="trainer",
        num_minibatches=num_minibatches,
        optimizer=OptimizerConfig(lr=1e-12, weight_decay=0.0),
    )
    assert float(trainer.callback_metrics["policy/ratio_mean"]) == pytest.approx(1.0, abs=1e-5)
    assert (
        float(trainer.callback_metrics["policy/parity_max"]) > 0.1
    )  # the made-up engine log-probabilities are no match


def test_the_reference_pulls_back_and_stays_out_of_checkpoints(tiny_checkpoint: Path, tmp_path: Path) -> None:
    loss = PolicyLossConfig(kl_weight=0.1)
    module = GRPOModule(policy(tiny_checkpoint), SGD_LIKE, loss=loss, num_minibatches=2)
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

    resumed = GRPOModule(policy(tiny_checkpoint), SGD_LIKE, loss=loss, num_minibatches=2)
    again = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    again.fit(resumed, train_dataloaders=StepLoader(build, 2), ckpt_path=str(tmp_path / "run.ckpt"))
    assert torch.equal(parameters(resumed), parameters(module)) and resumed.iteration == 2


def test_sft_lowers_its_loss_and_masks_what_it_must(tiny_checkpoint: Path) -> None:
    module = SFTModule(policy(tiny_checkpoint), OptimizerConfig(lr=1e-3, weight_decay=0.0), prompt=PROMPT)
    data = SFTDataModule(DigitsConfig(), num_steps=1, conversations_per_step=8, warm_up_share=0.0)
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


def test_the_schedule_holds_then_falls() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=10, schedule="hold_linear", final_share=0.05)
    values = [config.multiplier(step, 100) for step in range(100)]
    assert values[0] == pytest.approx(0.1) and values[9] == values[50] == 1.0
    assert values[75] == pytest.approx(0.5) and min(values[10:]) >= 0.05


def test_the_entropy_bonus_raises_the_entropy(tiny_checkpoint: Path) -> None:
    def entropy_after(weight: float) -> float:
        loss = PolicyLossConfig(entropy_weight=weight)
        module = GRPOModule(policy(tiny_checkpoint), SGD_LIKE, loss=loss, num_minibatches=1)
        chosen = groups(module, 2)

        def build(step: int) -> Iteration:
            batch = Iteration(step, [])
            batch.groups = chosen
            return batch

        return float(fit(module, build, 6).callback_metrics["policy/entropy"])

    assert entropy_after(10.0) > entropy_after(0.0) + 1e-3
