"""Checks of module, data and trainer together, before an engine is loaded."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning.pytorch as pl
import torch

from cv_lightning.agent.config import AgentConfig
from cv_lightning.callbacks.rollout import RolloutCallback, rolls_out
from cv_lightning.data.modules import EvaluationDataModule, SFTDataModule, Stage, TaskDataModule, missing_tasks
from cv_lightning.data.rows import expand_files
from cv_lightning.early import folder_error, other_run_error
from cv_lightning.models.loading import model_positions
from cv_lightning.modules.base import PolicyModule
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.strategies import PRECISIONS, ZeroStrategy
from cv_lightning.types import CVLightningError

LOG = logging.getLogger(__name__)


def check_fit(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule | None) -> None:
    """Refuse a training on nothing, or one that would fail later; move validations into the run.

    Raises:
        CVLightningError: Names the setting to change.
    """
    _check_folder(trainer)
    if error := other_run_error(Path(trainer.default_root_dir), type(module).__name__):
        raise CVLightningError(error)
    if isinstance(module, PolicyModule):
        check_types(trainer, module.policy_config.dtype, trains=True)
    overfits = isinstance(data, TaskDataModule) and data.overfit_tasks > 0
    if overfits and isinstance(module, GRPOModule) and module.algorithm.dynamic_sampling.max_oversample > 1:
        raise CVLightningError(
            "--data.init_args.overfit_tasks brings the same tasks in every iteration and stands alone: leave out "
            "--model.init_args.algorithm.dynamic_sampling"
        )
    if isinstance(data, EvaluationDataModule):
        data.check_training(trainer.world_size)
        loads_as_ours = type(data).train_dataloader in (TaskDataModule.train_dataloader, SFTDataModule.train_dataloader)
        if loads_as_ours and (trainer.max_epochs or 0) > 1 and trainer.max_steps < 0:
            raise CVLightningError(
                f"--trainer.max_epochs {trainer.max_epochs}: another epoch would bring the same batches again. Leave "
                "it at 1; --data.init_args.num_iterations (SFT: num_steps) is the length of the run. Files are read "
                "again, newly shuffled, as often as that takes"
            )
        limit, interval = trainer.limit_train_batches, trainer.val_check_interval
        length = min(data.num_train_batches, limit if isinstance(limit, int) else data.num_train_batches)
        if isinstance(interval, int) and 0 < length < interval:
            LOG.info("trainer.val_check_interval %d is beyond the run: validating at its end", interval)
            trainer.val_check_interval = length
        for name, files in (("train_files", data.train_files), ("eval_files", data.eval_files)):
            if files:
                expand_files(files, f"--data.init_args.{name}")
    if rolls_out(module, data, "fit"):
        _check_engine(trainer, module)


def check_evaluation(
    trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule | None, stage: Stage
) -> None:
    """Refuse an evaluation of nothing, and one that would fail once the engine is loaded.

    Raises:
        CVLightningError: Names the setting to change.
    """
    _check_folder(trainer)
    if isinstance(module, PolicyModule) and module.loads_policy:
        check_types(trainer, module.policy_config.dtype, trains=False)
    if isinstance(data, EvaluationDataModule):
        if not data.has_tasks(stage):
            raise CVLightningError(f"{stage}: {missing_tasks(stage)}")
        if data.eval_files:
            expand_files(data.eval_files, "--data.init_args.eval_files")
    _check_engine(trainer, module)


def _check_folder(trainer: pl.Trainer) -> None:
    """Refuse a run's folder that cannot be made, before a model is loaded."""
    folder = Path(trainer.default_root_dir)
    if error := folder_error(folder):
        raise CVLightningError(error)


def check_types(trainer: pl.Trainer, dtype: str, trains: bool) -> None:
    """Refuse a type of the policy and a precision, strategy or device that cannot work together.

    Args:
        trainer: Trainer with its strategy, device and precision.
        dtype: `policy.dtype`.
        trains: The policy is trained, not only run.

    Raises:
        CVLightningError: Names the flag to change.
    """
    flag, device = f"--model.init_args.policy.dtype {dtype}", trainer.strategy.root_device.type
    sharded = isinstance(trainer.strategy, ZeroStrategy)
    if trainer.precision not in ("32-true", PRECISIONS[dtype] if sharded else "32-true"):
        raise CVLightningError(
            f"--trainer.precision {trainer.precision}: the type of weights and operations is that of {flag}, and "
            "Lightning's own casts would round rotary frequencies, too. Leave --trainer.precision out and set the "
            "other flag"
        )
    if dtype == "float16" and trains and (device == "cpu" or not sharded):
        raise CVLightningError(
            f"{flag}: gradients in float16 need a scaled loss, which only cv_lightning.strategies.ZeroStrategy on a "
            "GPU does. Take bfloat16, or float32"
        )
    if dtype == "bfloat16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise CVLightningError(
            f"{flag}: {torch.cuda.get_device_name()} does not support bfloat16 (compute capability 8.0 and later do). "
            "Take float16 or float32"
        )


def _check_engine(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse an engine that is too short for the agent's limits, or longer than the model's positions.

    The first would end trajectories without a word, the second is reported by vLLM only after it has started. Limits
    of the agent at their defaults give way to the engine's length.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    rollout = next((callback for callback in reversed(callbacks) if isinstance(callback, RolloutCallback)), None)
    if rollout is None:
        return
    agent, wanted = rollout.agent, rollout.engine_config.max_model_len
    default = AgentConfig()
    unset = default.max_prompt_tokens + default.max_response_tokens
    allowed = agent.max_prompt_tokens + agent.max_response_tokens
    if wanted < allowed != unset:
        raise CVLightningError(
            f"rollout.engine.max_model_len {wanted} is below rollout.agent.max_prompt_tokens {agent.max_prompt_tokens} "
            f"+ max_response_tokens {agent.max_response_tokens}: the engine would cut what the agent allows. Set "
            f"--rollout.engine.max_model_len {allowed}, or lower --rollout.agent.max_response_tokens"
        )
    if not isinstance(module, PolicyModule) or rollout.engine_config.keeps_own_weights:
        return
    positions = model_positions(Path(module.policy_config.path))
    if positions is not None and wanted > positions:
        raise CVLightningError(
            f"rollout.engine.max_model_len {wanted} is more than the {positions} positions of "
            f"{module.policy_config.path}: lower --rollout.engine.max_model_len"
        )
