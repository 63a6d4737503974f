"""Shared by tests of the modules: a short fit, groups made of demonstrations, settings."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch

from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.data.modules import StepLoader
from cv_lightning.digits.modules import DigitSFTDataModule
from cv_lightning.digits.scenes import DigitsConfig
from cv_lightning.models.loading import PolicyConfig
from cv_lightning.modules.base import OptimizerConfig, PolicyModule
from cv_lightning.modules.sft import encode_conversation
from cv_lightning.types import Group, RewardBreakdown, Trajectory, TrajectoryImage

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
    data = DigitSFTDataModule(
        digits=DigitsConfig(seed=seed), num_steps=1, conversations_per_step=4 * num, warm_up_share=0.0
    )
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
