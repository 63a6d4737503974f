"""Base of SFT and GRPO: the policy, its processor, packing, and an optimizer step over micro-batches."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
import transformers
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.models.buffers import check_buffers, computed_buffers
from cv_lightning.models.export import check_shapes
from cv_lightning.models.loading import PolicyConfig, load_adapter, load_policy
from cv_lightning.models.logprobs import Entropy, LogProbs, packed_logprobs
from cv_lightning.models.packing import PackedBatch, TrainSequence, bounded_prompt_groups, pack_sequences, packed_length
from cv_lightning.models.vision import VisionCache
from cv_lightning.ranges import (
    Fraction,
    Limit,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    check_ranges,
)
from cv_lightning.rl.microbatch import split_by_tokens, split_evenly
from cv_lightning.types import CheckpointError, CVLightningError, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
Beta = Annotated[float, Range(at_least=0, below=1)]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    schedule: Literal["constant", "cosine", "hold_linear"] = "constant"
    """Schedule after the warm-up: `constant`; `cosine` to 0; `hold_linear`: constant for half of the steps, then linear
    to `final_share`."""
    total_steps: NonNegativeInt = 0
    """Optimizer steps of the whole run, for schedules that end. 0: from `trainer.max_steps` or the data."""
    final_share: Fraction = 0.05
    """Fraction of the peak at the end of `hold_linear`."""
    gradient_clip: Annotated[float, Range(at_least=0, infinite=True)] = 1.0
    """Largest gradient norm; 0: no clipping."""
    skip_norm_above: Limit | None = None
    """Skip and count steps whose gradient norm before clipping is above this (PaLM, 2204.02311, skips the batches of
    its loss spikes). Steps with a non-finite norm are always skipped; null disables the additional threshold, as
    DeepSpeed requires."""

    def __post_init__(self) -> None:
        check_ranges(self, "model.init_args.optimizer")

    def multiplier(self, step: int, total: int) -> float:
        """Learning rate at an optimizer step, counted from 0, as a fraction of the peak."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        done = min(1.0, step / total) if total > 0 else 0.0
        if self.schedule == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "hold_linear":
            return warm * min(1.0, max(self.final_share, (1 - done) / 0.5))
        return warm


class StepResult(NamedTuple):
    """Result of one optimizer step."""

    grad_norm: float
    """Norm before clipping."""
    skipped: bool
    """True if the norm was not finite or above `skip_norm_above`, so that the weights did not change."""


class PolicyModule(pl.LightningModule):
    """A policy under manual optimisation.

    `validation_step` and `test_step` do nothing, because `RolloutCallback` evaluates by rollouts.

    Args:
        policy: The policy model and how it is loaded.
        optimizer: AdamW and schedule.
        max_tokens_per_row: Token budget of one packed micro-batch.
    """

    trains_on_rollouts = False
    """True for a module whose training batches are rolled out."""
    temperature = 1.0
    """Sampling temperature of the sequences, by which log-probabilities divide the logits."""

    def __init__(
        self, policy: PolicyConfig, optimizer: OptimizerConfig | None = None, max_tokens_per_row: PositiveInt = 16384
    ) -> None:
        super().__init__()
        check_ranges(PolicyModule.__init__, "model.init_args", locals())
        self.automatic_optimization = False
        self.policy_config = policy
        self.optimizer_config = optimizer or OptimizerConfig()
        self.max_tokens_per_row = max_tokens_per_row
        self.adapter = load_adapter(policy)
        self.encoder = DialogueEncoder(self.adapter)
        self.vision_cache = VisionCache(self.adapter)
        """Processed images of the iteration under way, which engine and update share."""
        self.policy: PreTrainedModel | None = None
        self.reference: PreTrainedModel | None = None
        """Frozen reference policy, where the algorithm has one."""
        self.loads_policy = True
        """False if a server samples from its own model, so that only the processor is needed."""
        self._buffers_checked = False
        self.iteration = 0
        self._decays: list[float] = []
        """Weight decay of each parameter group of the optimizer."""
        self.on_progress: Callable[[], None] = lambda: None
        """Called after every forward and backward pass; the watchdog sets it."""
        self.batch_metrics: dict[str, float] = {}
        """Metrics of the current training batch, by name."""
        self.steps_per_batch = 1
        """Optimizer steps of one training batch."""

    # ------------------------------------------------------------------ building
    def configure_model(self) -> None:
        """Load the policy, once: Lightning calls this for every stage.

        Raises:
            CVLightningError: The strategy is Lightning's own DeepSpeed strategy, which would not clip gradients.
        """
        if self.policy is not None or not self.loads_policy:
            return
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        strategy = self.trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy) and not getattr(strategy, "clips_manual_steps", False):
            raise CVLightningError(
                f"trainer.strategy {type(strategy).__name__} does not support manual optimization: use "
                "class_path: cv_lightning.strategies.ZeroStrategy (on CPU ranks CPUDeepSpeedStrategy)"
            )
        self.policy = load_policy(self.policy_config).train()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over the policy's trainable parameters, with weight decay on matrices only."""
        assert self.policy is not None
        config, strategy = self.optimizer_config, self.trainer.strategy
        trainable = [p for p in self.policy.parameters() if p.requires_grad]
        matrices = [p for p in trainable if _num_dimensions(p) > 1]
        vectors = [p for p in trainable if _num_dimensions(p) <= 1]
        with_decay = [(matrices, config.weight_decay), (vectors, 0.0)]
        groups = [{"params": params, "weight_decay": decay} for params, decay in with_decay if params]
        self._decays = [decay for params, decay in with_decay if params]
        if not isinstance(strategy, DeepSpeedStrategy) and any(p.dtype != torch.float32 for p in trainable):
            rank_zero_warn(
                f"model.policy.dtype {self.policy_config.dtype}: most steps are smaller than a 16-bit weight's last "
                "digit and are lost. trainer.strategy cv_lightning.strategies.ZeroStrategy steps on float32 copies, "
                "on one GPU too; so does LoRA (model.policy.lora)"
            )
        fused = True if getattr(strategy, "offload_optimizer", False) else None
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)
        total = config.total_steps or self._planned_steps()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: config.multiplier(step, total))
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def check_buffers(self) -> None:
        """Check once that loading, precision plugin and strategy have left the models' buffers in float32.

        Raises:
            CVLightningError: A buffer has changed; the message names it.
        """
        if self._buffers_checked:
            return
        for which, model in (("policy", self.policy), ("reference", self.reference)):
            if model is not None:
                check_buffers(model, which, computed_buffers(model.config))
        self._buffers_checked = True

    def on_validation_start(self) -> None:
        """Check the buffers, because an engine may sample with the policy itself."""
        self.check_buffers()

    on_test_start = on_validation_start

    def on_train_start(self) -> None:
        """Check the buffers, and replace a resumed checkpoint's hyper-parameters by those of the config."""
        self.check_buffers()
        config, scheduler = self.optimizer_config, self.lr_schedulers()
        if not self._decays or not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            return  # a subclass has its own optimizer
        optimizer = self.single_optimizer
        for group, decay in zip(optimizer.param_groups, self._decays, strict=True):
            group |= {"weight_decay": decay, "betas": tuple(config.betas), "initial_lr": config.lr}
            group["lr"] = config.lr * scheduler.lr_lambdas[0](scheduler.last_epoch)
        scheduler.base_lrs = [config.lr] * len(scheduler.base_lrs)

    def _planned_steps(self) -> int:
        """Optimizer steps of the run.

        `trainer.estimated_stepping_batches` would build the loaders too early and lose a resumed loader's position.

        Raises:
            ValueError: The schedule ends, but the number of steps is not known.
        """
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        per_epoch: int = getattr(getattr(self.trainer, "datamodule", None), "num_train_batches", 0)
        batches = max(0, per_epoch * (self.trainer.max_epochs or 1))  # max_epochs is -1 for no limit
        if not batches and self.optimizer_config.schedule != "constant":
            raise ValueError(
                f"model.optimizer.schedule {self.optimizer_config.schedule} needs a number of steps: set "
                "model.optimizer.total_steps or trainer.max_steps"
            )
        return batches * self.steps_per_batch

    # ------------------------------------------------------------------ packing
    def train_sequences(self, trajectories: Sequence[Trajectory]) -> list[TrainSequence]:
        """The training sequences of trajectories; each image is processed once per iteration."""
        cache = self.vision_cache
        cache.get([image.model_image for trajectory in trajectories for image in trajectory.images])
        return [
            TrainSequence(
                token_ids=trajectory.token_ids,
                loss_mask=trajectory.loss_mask,
                vision=cache.get([image.model_image for image in trajectory.images]),
                rollout_logprobs=trajectory.logprobs,
                advantage=trajectory.advantage or 0.0,
                number=number,
            )
            for number, trajectory in enumerate(trajectories)
        ]

    def can_pack(self, trajectory: Trajectory) -> bool:
        """False if a trajectory's lists differ in length, or its image tokens in number from its image features.

        The agent makes no such trajectory. A truncated image would be an error on one rank while the others wait.
        """
        length = len(trajectory.token_ids)
        features = sum(self.encoder.num_image_tokens(image.model_image.size) for image in trajectory.images)
        tokens = trajectory.token_ids.count(self.encoder.image_pad_id)
        return features == tokens and length == len(trajectory.loss_mask) == len(trajectory.logprobs)

    def pack_micro_batches(self, sequences: Sequence[TrainSequence]) -> list[PackedBatch]:
        """Micro-batches within the token budget: at least one, equally many on every rank. Call it on all ranks."""
        assert self.policy is not None
        return [pack_sequences(chunk, self.policy.config, self.adapter) for chunk in self.split_sequences(sequences)]

    def split_sequences(self, sequences: Sequence[TrainSequence]) -> list[list[TrainSequence]]:
        """The sequences of every micro-batch. Call it on all ranks.

        All ranks take as many micro-batches as the rank that needs most, balanced, and fill up with dummy sequences
        that carry no loss. Under ZeRO-3 every forward and backward is collective: a rank with fewer micro-batches, or
        with one that does not run the vision tower, would hang the others.
        """
        assert self.policy is not None
        budget = self.max_tokens_per_row
        groups = bounded_prompt_groups(sequences, self.policy.config, self.adapter, budget)
        lengths = [packed_length(group) for group in groups]
        chunks = _flatten(split_by_tokens(groups, lengths, budget))
        if self.trainer.world_size == 1:
            return chunks or [[self.dummy_sequence()[0]]]
        count = max(1, int(self.reduce_max(len(chunks))))
        chunks = _flatten(split_evenly(groups, lengths, budget, count))
        chunks += [[] for _ in range(count - len(chunks))]
        return [chunk if any(s.vision for s in chunk) else [*chunk, self.dummy_sequence()[0]] for chunk in chunks]

    def dummy_sequence(self) -> tuple[TrainSequence, Image.Image]:
        """The smallest sequence with an image and without loss, and its image: it makes the vision tower run."""
        image = self.encoder.model_image(Image.new("RGB", (self.adapter.image_rule.factor,) * 2))
        pads = [self.encoder.image_pad_id] * self.encoder.num_image_tokens(image.size)
        ids = [self.encoder.end_id, *pads, self.encoder.end_id]
        vision = self.adapter.process_images([image])
        return TrainSequence(token_ids=ids, loss_mask=[False] * len(ids), vision=vision), image

    # ------------------------------------------------------------------ one optimizer step
    def logprobs(
        self,
        batch: PackedBatch,
        *,
        temperature: float | None = None,
        entropy: Entropy = "none",
        model: PreTrainedModel | None = None,
    ) -> LogProbs:
        """Log-probabilities at the loss positions of a packed batch, as the engine computes them.

        Args:
            batch: A packed batch.
            temperature: Sampling temperature; None: the module's.
            entropy: Whether entropies are computed, see `packed_logprobs`.
            model: The reference; None: the policy.
        """
        model = self.policy if model is None else model
        assert model is not None
        temperature = self.temperature if temperature is None else temperature
        found = packed_logprobs(
            model, batch.to(self.device), temperature=temperature, banned_ids=self.adapter.vision_ids, entropy=entropy
        )
        self.on_progress()
        return found

    def accumulate_and_step(self, micro_batches: Sequence[T], loss: Callable[[T], torch.Tensor]) -> StepResult:
        """Run the backward pass of every micro-batch, then one optimizer and one scheduler step.

        Args:
            micro_batches: Micro-batches of this rank; equally many on every rank.
            loss: Gives a micro-batch's share of the *global* loss, such as a sum over its tokens divided by the token
                count of all ranks. It is multiplied by the world size, because ranks average gradients.
        """
        for index, micro_batch in enumerate(micro_batches):
            _announce_backward(self.trainer, is_last=index == len(micro_batches) - 1)
            self.manual_backward(loss(micro_batch) * self.trainer.world_size)
            self.on_progress()
        result = self._take_step()
        scheduler = self.lr_schedulers()
        assert scheduler is not None and not isinstance(scheduler, list)
        scheduler.step()
        return result

    def _take_step(self) -> StepResult:
        """Clip the gradients and step. A skipped step still counts, because every iteration has equally many."""
        optimizer = self.single_optimizer
        engine = _deepspeed_engine(self.trainer)
        if engine is None:
            result = self._clip_or_drop()
            optimizer.step()
        else:  # DeepSpeed clips, and skips a step whose norm is not finite
            optimizer.step()
            result = StepResult(float(engine.get_global_grad_norm()), not engine.was_step_applied())
        optimizer.zero_grad()
        return result

    def _clip_or_drop(self) -> StepResult:
        config = self.optimizer_config
        trained = [p for p in self.parameters() if p.requires_grad]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, config.gradient_clip or math.inf))
        bound = math.inf if config.skip_norm_above is None else config.skip_norm_above
        skipped = not math.isfinite(norm) or norm > bound
        if skipped:
            self.single_optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, skipped)

    @property
    def single_optimizer(self) -> LightningOptimizer:
        """The optimizer, wrapped by Lightning to count its steps."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        return optimizer

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next optimizer step."""
        return float(self.single_optimizer.param_groups[0]["lr"])

    def reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks."""
        return list(values) if self.trainer.world_size == 1 else self._gathered(values).sum(0).tolist()

    def reduce_max(self, value: float) -> float:
        """Maximum over ranks."""
        return value if self.trainer.world_size == 1 else float(self._gathered([value]).max())

    def _gathered(self, values: Sequence[float]) -> torch.Tensor:
        """Values of all ranks, float64 [ranks, values]."""
        gathered = self.all_gather(torch.tensor(values, dtype=torch.float64, device=self.device))
        assert isinstance(gathered, torch.Tensor)
        return gathered

    # ------------------------------------------------------------------ checkpoints
    @contextmanager
    def checkpoint_view(self) -> Iterator[None]:
        """Context manager that exposes only the submodules that belong in a checkpoint (all, by default)."""
        yield

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the iteration counter, because `global_step` counts optimizer steps."""
        checkpoint["iteration"] = self.iteration

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the iteration counter, and refuse weights of another model with one short message.

        Raises:
            CheckpointError: The weights do not fit, or this run has no policy to load them into.
        """
        self.iteration = checkpoint.get("iteration", 0)
        where = f"--ckpt_path {self.trainer.ckpt_path}"
        if not self.loads_policy:
            raise CheckpointError(
                f"{where}: a server samples from a model of its own; leave it out, or `export` it and serve the folder"
            )
        stored = checkpoint.get("state_dict", {})
        if self.policy is None or not stored:  # DeepSpeed loads its tensors itself
            return
        prefix = "policy."
        check_shapes(
            {name.removeprefix(prefix): tensor.shape for name, tensor in stored.items() if name.startswith(prefix)},
            {name: tensor.shape for name, tensor in self.policy.state_dict().items()},
            self.policy.config.model_type,
            where,
            "give the folder that its run began with as --model.init_args.policy.path, and its run's policy.lora",
        )

    # ------------------------------------------------------------------ metrics
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log like Lightning, but in training collect the value in `batch_metrics` instead of calling the loggers.

        The collected metrics belong to one iteration only, and are known before its checkpoint is written.
        """
        if self.trainer.training and not kwargs.get("on_epoch") and kwargs.get("logger") is not False:
            self.batch_metrics[name] = float(value)
            kwargs["logger"] = False
        super().log(name, value, *args, **kwargs)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Give the iteration's metrics to the loggers. Lightning calls the callbacks' hooks before."""
        metrics, self.batch_metrics = self.batch_metrics, {}
        if metrics and self.iteration % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for logger in self.trainer.loggers:
                logger.log_metrics(metrics | {"epoch": float(self.trainer.current_epoch)}, step=self.iteration - 1)
                logger.save()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing: `RolloutCallback` evaluates by rollouts."""

    test_step = validation_step


def _num_dimensions(parameter: torch.nn.Parameter) -> int:
    """Number of dimensions of the full parameter, which is flat and sharded under ZeRO-3."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _deepspeed_engine(trainer: pl.Trainer) -> Any:
    model = trainer.strategy.model
    return model if hasattr(model, "set_gradient_accumulation_boundary") else None


def _flatten(chunks: Sequence[Sequence[Sequence[T]]]) -> list[list[T]]:
    """The sequences of every micro-batch, from its prompt groups."""
    return [[sequence for group in chunk for sequence in group] for chunk in chunks]


def _announce_backward(trainer: pl.Trainer, is_last: bool) -> None:
    """Tell DDP or DeepSpeed whether more micro-batches of the same step follow."""
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = is_last  # one all-reduce per step, not per micro-batch
    engine = _deepspeed_engine(trainer)
    if engine is not None:
        # Without the first call ZeRO-2 would keep the last micro-batch only; without the second ZeRO-3 would.
        engine.set_gradient_accumulation_boundary(is_last)
        clear = getattr(engine.optimizer, "clear_backward_seen_flag", None)
        if clear is not None:
            clear()
