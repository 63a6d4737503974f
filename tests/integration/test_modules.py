"""SFT and GRPO steps on fixed data, run by a real Trainer on the tiny model; no engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.data.digits import DigitsConfig
from cv_lightning.data.modules import SFTDataModule, StepLoader
from cv_lightning.model.loading import PolicyConfig
from cv_lightning.modules.base import OptimizerConfig, PolicyModule
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.modules.sft import SFTModule, encode_conversation
from cv_lightning.rl.losses import PolicyLossConfig
from cv_lightning.types import Group, Iteration, RewardBreakdown, Trajectory, TrajectoryImage

PROMPT = PromptConfig(system="none", state_size=False, tool_ok="<image>Look at the result.")
SGD_LIKE = OptimizerConfig(lr=1e-3, weight_decay=0.0, gradient_clip=0.0, betas=(0.0, 0.0))


def fit(module: PolicyModule, build: Callable[[int], object], steps: int, **trainer_args: object) -> pl.Trainer:
    arguments: dict[str, object] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    trainer = pl.Trainer(**(arguments | trainer_args))  # type: ignore[arg-type]
    trainer.fit(module, train_dataloaders=StepLoader(build, steps))
    return trainer


def groups(module: PolicyModule, num: int, seed: int = 0) -> list[Group]:
    """Groups of four trajectories made of demonstrations, with made-up log-probabilities, rewards and advantages."""
    rng = random.Random(seed)
    data = SFTDataModule(num_steps=1, conversations_per_step=4 * num, warm_up_share=0.0)
    conversations = data.train_dataloader().build(0).conversations
    data.teardown("fit")
    made = []
    for number in range(num):
        members = []
        for sample, conversation in enumerate(conversations[4 * number : 4 * number + 4]):
            dialogue = encode_conversation(module.encoder, conversation, PROMPT)
            reward = rng.choice([0.0, 1.1, 2.1])
            members.append(
                Trajectory(
                    task=conversation.task,
                    sample=sample,
                    token_ids=dialogue.token_ids,
                    loss_mask=dialogue.loss_mask,
                    logprobs=[-rng.random() * 8 if mask else 0.0 for mask in dialogue.loss_mask],
                    num_prompt_tokens=dialogue.loss_mask.index(True),
                    images=[TrajectoryImage(original=image, model_image=image) for image in dialogue.images],
                    reward=RewardBreakdown(components={}, total=reward),
                    advantage=rng.gauss(0, 1) if sample else 0.0,
                )
            )
        made.append(Group(task=members[0].task, trajectories=members))
    return made


def policy(path: Path) -> PolicyConfig:
    return PolicyConfig(path=str(path), dtype="float32")


def parameters(module: PolicyModule) -> torch.Tensor:
    assert module.policy is not None
    return torch.cat([p.detach().flatten() for p in module.policy.parameters()])


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
