"""What SFT and GRPO share: the policy, its processor, and one way to take an optimizer step over micro-batches."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

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
from cv_lightning.rl.microbatch import split_by_tokens, split_evenly
from cv_lightning.types import CheckpointError, CVLightningError, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-6
    """Peak learning rate."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    schedule: Literal["constant", "cosine", "hold_linear"] = "constant"
    """After the warm-up: `constant`; `cosine` to 0; `hold_linear`: hold for half of the steps, then straight to
    `final_share`."""
    total_steps: int = 0
    """Optimizer steps of the whole run, for the schedules that end. 0: what `trainer.max_steps` or the data say."""
    final_share: float = 0.05
    """Share of the peak that `hold_linear` ends at."""
    gradient_clip: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    skip_norm_above: float | None = None
    """A step whose gradient norm, before clipping, is above this changes nothing and is counted (PaLM, 2204.02311,
    skips the batches of its loss spikes). A norm that is no number is always skipped. Null: only that. Under
    DeepSpeed, which clips by itself, it has to stay null."""

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.warmup_steps < 0 or self.gradient_clip < 0:
            raise ValueError("model.optimizer: lr must be above 0, warmup_steps and gradient_clip at least 0")
        if self.skip_norm_above is not None and not self.skip_norm_above > 0:
            raise ValueError(f"model.optimizer.skip_norm_above must be above 0, not {self.skip_norm_above}")

    def multiplier(self, step: int, total: int) -> float:
        """Learning rate at optimizer step `step` (from 0) over the peak."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        done = min(1.0, step / total) if total > 0 else 0.0
        if self.schedule == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "hold_linear":
            return warm * min(1.0, max(self.final_share, (1 - done) / 0.5))
        return warm


class StepResult(NamedTuple):
    """What one optimizer step did."""

    grad_norm: float
    """Before clipping."""
    skipped: bool
    """True: the norm was no number or above `skip_norm_above`, and the weights stayed as they were."""


class PolicyModule(pl.LightningModule):
    """A policy under manual optimisation.

    `validation_step` and `test_step` do nothing: evaluation is a rollout, which `RolloutCallback` makes.

    Args:
        policy: which model, and how it is loaded.
        optimizer: AdamW and schedule.
        max_tokens_per_row: token budget of one packed row, which is one micro-batch.
    """

    trains_on_rollouts = False
    """True for a module whose training batches are rolled out."""

    def __init__(
        self, policy: PolicyConfig, optimizer: OptimizerConfig | None = None, max_tokens_per_row: int = 16384
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy_config = policy
        self.optimizer_config = optimizer or OptimizerConfig()
        self.max_tokens_per_row = max_tokens_per_row
        self.adapter = load_adapter(policy)
        self.encoder = DialogueEncoder(self.adapter)
        self.vision_cache = VisionCache(self.adapter)
        """Of the iteration under way: each of its images is processed once, whatever reads it."""
        self.policy: PreTrainedModel | None = None
        self.loads_policy = True
        """False where a server samples from a model of its own, and only the processor is needed."""
        self._buffers_checked = False
        self.iteration = 0
        self._decays: list[float] = []
        """Weight decay of each group of the optimizer."""
        self.on_progress: Callable[[], None] = lambda: None
        """Called after every forward and backward; a watchdog of the run sets it."""
        self.batch_metrics: dict[str, float] = {}
        """Metrics of the current training batch, by name."""
        self.steps_per_batch = 1
        """Optimizer steps that one training batch takes."""

    # ------------------------------------------------------------------ building
    def configure_model(self) -> None:
        """Load the policy; idempotent, as Lightning calls it for every stage."""
        if self.policy is None and self.loads_policy:
            if not sys.stderr.isatty():
                transformers.utils.logging.disable_progress_bar()
            self._check_strategy()
            self.policy = load_policy(self.policy_config).train()

    def _check_strategy(self) -> None:
        """Refuse Lightning's own DeepSpeed strategy, which would silently not clip gradients.

        Raises:
            CVLightningError: it is the strategy.
        """
        strategy = self.trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy) and not getattr(strategy, "clips_manual_steps", False):
            raise CVLightningError(
                f"trainer.strategy {type(strategy).__name__} knows nothing of the modules' optimization: use "
                "class_path: cv_lightning.strategies.ZeroStrategy (on CPU ranks CPUDeepSpeedStrategy)"
            )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over the policy's trainable parameters; decay on matrices only."""
        assert self.policy is not None
        config = self.optimizer_config
        trainable = [p for p in self.policy.parameters() if p.requires_grad]
        matrices = [p for p in trainable if _num_dimensions(p) > 1]
        vectors = [p for p in trainable if _num_dimensions(p) <= 1]
        with_decay = [(matrices, config.weight_decay), (vectors, 0.0)]
        groups = [{"params": params, "weight_decay": decay} for params, decay in with_decay if params]
        self._decays = [decay for params, decay in with_decay if params]
        deepspeed = isinstance(self.trainer.strategy, DeepSpeedStrategy)
        if not deepspeed and any(p.dtype != torch.float32 for p in trainable):
            rank_zero_warn(
                f"model.policy.dtype {self.policy_config.dtype}: most steps are smaller than a 16-bit weight's last "
                "digit and are lost. trainer.strategy cv_lightning.strategies.ZeroStrategy steps on float32 copies, "
                "on one GPU too; so does LoRA (model.policy.lora)"
            )
        on_host = getattr(self.trainer.strategy, "offload_optimizer", False)
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True if on_host else None)
        total = config.total_steps or self._planned_steps()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: config.multiplier(step, total))
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    @property
    def loaded_models(self) -> dict[str, PreTrainedModel]:
        """The models that this module holds, by what a message calls them."""
        return {} if self.policy is None else {"policy": self.policy}

    def check_buffers(self) -> None:
        """Check once that loading, precision plugin and strategy have left the models' buffers in float32.

        Raises:
            CVLightningError: they have not; the message names the buffers.
        """
        if self._buffers_checked:
            return
        for which, model in self.loaded_models.items():
            check_buffers(model, which, computed_buffers(model.config))
        self._buffers_checked = True

    def on_validation_start(self) -> None:
        """Check the buffers: an engine may sample with the policy itself."""
        self.check_buffers()

    def on_test_start(self) -> None:
        """Check the buffers: an engine may sample with the policy itself."""
        self.check_buffers()

    def on_train_start(self) -> None:
        """Check the buffers, and apply the command line's hyper-parameters over those of a resumed checkpoint."""
        self.check_buffers()
        config, scheduler = self.optimizer_config, self.lr_schedulers()
        if not self._decays or not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            return  # a subclass has an optimizer of its own
        optimizer = self.single_optimizer
        for group, decay in zip(optimizer.param_groups, self._decays, strict=True):
            group |= {"weight_decay": decay, "betas": tuple(config.betas), "initial_lr": config.lr}
            group["lr"] = config.lr * scheduler.lr_lambdas[0](scheduler.last_epoch)
        scheduler.base_lrs = [config.lr] * len(scheduler.base_lrs)

    def _planned_steps(self) -> int:
        """Optimizer steps of the run.

        Not `trainer.estimated_stepping_batches`: that builds the loaders too early and forgets a resumed one's place.

        Raises:
            ValueError: the schedule ends, but nothing says when.
        """
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        per_epoch: int = getattr(getattr(self.trainer, "datamodule", None), "num_train_batches", 0)
        batches = per_epoch * (self.trainer.max_epochs or 1)
        if not batches and self.optimizer_config.schedule != "constant":
            raise ValueError(
                f"model.optimizer.schedule {self.optimizer_config.schedule} needs to know where it ends: set "
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
            )
            for trajectory in trajectories
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
        temperature: float = 1.0,
        entropy: Entropy = "none",
        model: PreTrainedModel | None = None,
    ) -> LogProbs:
        """Log-probabilities at the loss positions of a packed row, as the engine computes them.

        Args:
            batch: a packed row.
            temperature: of sampling; 1 in SFT.
            entropy: of every distribution; see `packed_logprobs`.
            model: another model than the policy (the reference).
        """
        model = self.policy if model is None else model
        assert model is not None
        found = packed_logprobs(
            model, batch.to(self.device), temperature=temperature, banned_ids=self.adapter.vision_ids, entropy=entropy
        )
        self.on_progress()
        return found

    def accumulate_and_step(self, micro_batches: Sequence[T], loss: Callable[[T], torch.Tensor]) -> StepResult:
        """Backward over every micro-batch, then one optimizer and one scheduler step.

        `loss` returns a micro-batch's share of the *global* loss: a sum over tokens divided by the token count of
        all ranks. Ranks average gradients, so it is multiplied by the world size here.
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
        """Clip the gradients and step; gradients that would do harm change no weight.

        The step is taken all the same, as every iteration has the same number of steps.
        """
        optimizer = self.single_optimizer
        engine = _deepspeed_engine(self.trainer)
        if engine is None:
            result = self._clip_or_drop()
            optimizer.step()
        else:  # which clips by itself, and leaves out a step whose norm is no number
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
        """The one optimizer, as Lightning counts its steps."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        return optimizer

    @property
    def learning_rate(self) -> float:
        """Of the next optimizer step."""
        return float(self.single_optimizer.param_groups[0]["lr"])

    def reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks."""
        if self.trainer.world_size == 1:
            return list(values)
        total = self.all_gather(torch.tensor(values, dtype=torch.float64, device=self.device))
        assert isinstance(total, torch.Tensor)
        return total.sum(0).tolist()

    def reduce_max(self, value: float) -> float:
        """Maximum over ranks."""
        if self.trainer.world_size == 1:
            return value
        values = self.all_gather(torch.tensor(value, dtype=torch.float64, device=self.device))
        assert isinstance(values, torch.Tensor)
        return float(values.max())

    # ------------------------------------------------------------------ checkpoints
    @contextmanager
    def checkpoint_view(self) -> Iterator[None]:
        """While it lasts, the module has the parts only that a checkpoint holds: here all of them."""
        yield

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep our own iteration counter: `global_step` counts optimizer steps."""
        checkpoint["iteration"] = self.iteration

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the iteration counter, and refuse weights of another model before torch lists every one of them.

        Raises:
            CheckpointError: they are, or there is no policy here that could take them.
        """
        self.iteration = checkpoint.get("iteration", 0)
        where = f"--ckpt_path {self.trainer.ckpt_path}"
        if not self.loads_policy:
            raise CheckpointError(
                f"{where}: a server samples from a model of its own; leave it out, or `export` it and serve the folder"
            )
        given = {name: tensor.shape for name, tensor in checkpoint.get("state_dict", {}).items()}
        if self.policy is None or not given:  # DeepSpeed brings its tensors itself
            return
        prefix = "policy."
        check_shapes(
            {name.removeprefix(prefix): shape for name, shape in given.items() if name.startswith(prefix)},
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
        """Rolled out and scored by `RolloutCallback`."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Rolled out and scored by `RolloutCallback`."""


def _num_dimensions(parameter: torch.nn.Parameter) -> int:
    """Of the whole parameter, which under ZeRO-3 is flat and sharded."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _deepspeed_engine(trainer: pl.Trainer) -> Any:
    model = trainer.strategy.model
    return model if hasattr(model, "set_gradient_accumulation_boundary") else None


def _flatten(chunks: Sequence[Sequence[Sequence[T]]]) -> list[list[T]]:
    """The sequences of every micro-batch, from its prompt groups."""
    return [[sequence for group in chunk for sequence in group] for chunk in chunks]


def _announce_backward(trainer: pl.Trainer, is_last: bool) -> None:
    """Tell what averages gradients over ranks whether more micro-batches of the same step follow."""
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = is_last  # one all-reduce a step, not one a micro-batch
    engine = _deepspeed_engine(trainer)
    if engine is not None:
        # ZeRO-2 keeps the last micro-batch only without the first call, ZeRO-3 without the second.
        engine.set_gradient_accumulation_boundary(is_last)
        clear = getattr(engine.optimizer, "clear_backward_seen_flag", None)
        if clear is not None:
            clear()
