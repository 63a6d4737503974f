"""Training runs on fixed data, each with one strategy, in which the ranks have unequal numbers of samples.

`test_zero.py` runs them in its own process, which has all samples, and on several ranks:

    torchrun --nproc-per-node 2 rank_runs.py FOLDER NAME...

FOLDER/runs.json holds the runs by name. The first rank writes the outcome to FOLDER/NAME.pt.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cv_lightning.environment import prepare_environment

prepare_environment()

import lightning.pytorch as pl  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.strategies import Strategy  # noqa: E402
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig  # noqa: E402
from module_samples import PROMPT, groups  # noqa: E402
from test_bf16_faults import plant  # noqa: E402

from cv_lightning import strategies  # noqa: E402
from cv_lightning.callbacks.start_check import SFTStartCheck  # noqa: E402
from cv_lightning.data.modules import DemonstrationBatch, StepLoader  # noqa: E402
from cv_lightning.digits.modules import DigitSFTDataModule  # noqa: E402
from cv_lightning.digits.scenes import DigitsConfig  # noqa: E402
from cv_lightning.models.gather import gather_full_params  # noqa: E402
from cv_lightning.models.loading import PolicyConfig, load_policy  # noqa: E402
from cv_lightning.models.logprobs import packed_logprobs  # noqa: E402
from cv_lightning.models.lora import LoraConfig  # noqa: E402
from cv_lightning.modules import base  # noqa: E402
from cv_lightning.modules.base import OptimizerConfig, PolicyModule, StepResult  # noqa: E402
from cv_lightning.modules.grpo import GRPOModule  # noqa: E402
from cv_lightning.modules.sft import SFTModule  # noqa: E402
from cv_lightning.rl.algorithm import AlgorithmConfig  # noqa: E402
from cv_lightning.rl.kl import KLConfig  # noqa: E402
from cv_lightning.strategies import CPUDeepSpeedStrategy, ZeroStrategy  # noqa: E402
from cv_lightning.types import CVLightningError, Group, Iteration  # noqa: E402

SHARES = ((4, 5), (0, 9), (7, 2), (9, 0))
"""Numbers of conversations or trajectories of each rank, for successive batches; a rank may have none."""
OPTIMIZER = OptimizerConfig(lr=3e-4, weight_decay=0.01, gradient_clip=0.5, warmup_steps=3)
BUDGET = {1: 100_000, 2: 220}
"""Tokens of a micro-batch by world size: one process takes all sequences at once, ranks two or three."""
CHUNK = 16
"""Loss positions per chunk of logits; so small that ranks have different numbers of chunks."""
EXACT: dict[tuple[object, ...], dict[str, torch.Tensor]] = {}
"""Exact gradients by run; runs that differ only in the strategy share them."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of one training run."""

    checkpoint: str
    module: Literal["sft", "grpo"] = "grpo"
    strategy: Literal["auto", "ddp", "zero2", "zero3", "zero2_offload", "zero3_offload"] = "auto"
    accelerator: Literal["cpu", "gpu"] = "cpu"
    steps: int = 10
    freeze_vision: bool = False
    recompute: bool = False
    lora: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    float32_copies: bool = False
    """Without DeepSpeed, step on float32 copies of the weights, as DeepSpeed does."""
    seed: int = 0
    """Seed of the data."""
    micro_batches: int = 0
    """Number of conversations per rank, one per micro-batch; their summed gradients are recorded. 0: see `SHARES`."""
    accumulation: Literal["float32", "policy"] = "float32"
    communication: Literal["policy", "float32"] = "policy"
    start_check: bool = False
    """Run the start-up check of SFT on a batch of which the first rank has no conversation."""
    fault: Literal["", "dropped_micro_batch", "rotary", "shifted_position"] = ""
    """Planted fault: leave out the first micro-batch of a step, let `zero.Init` round rotary frequencies, or shift the
    positions behind the first image."""
    resume_at: int = 0
    """Stop after this many batches and resume from the checkpoint in a new module; 0: uninterrupted run."""


@dataclass(kw_only=True)
class Outcome:
    """Recorded values of a run."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    """Values of every batch by name."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """Full parameters after the last step."""
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    """Shapes of this rank's parameters of policy and reference before the first step."""
    loaded: dict[str, torch.Tensor] = field(default_factory=dict)
    """Full parameters before the first step."""
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    """Buffers of policy and reference before the first step."""
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    """Gradients of the last step; only with `micro_batches`."""
    exact_gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    """Gradients of the same micro-batches through a plain copy of the policy, summed in float64."""
    error: str = ""
    """Message with which a start-up check refused the run; empty if it passed."""


class Watch(pl.Callback):
    """Records the outcome; saves a checkpoint and stops after `save_after` batches."""

    def __init__(self, save_after: int, folder: Path) -> None:
        self.save_after = save_after
        self.folder = folder
        self.outcome = Outcome()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.outcome.shapes = [tuple(p.shape) for p in pl_module.parameters()]
        self.outcome.loaded = self._whole(pl_module)
        self.outcome.buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        for name, value in trainer.callback_metrics.items():
            self.outcome.metrics.setdefault(name, []).append(float(value))
        if batch_idx + 1 == self.save_after:
            trainer.save_checkpoint(self.folder)
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.outcome.weights = self._whole(pl_module)

    @staticmethod
    def _whole(module: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in gather_full_params(module.policy)}


def perform(run: Run, folder: Path) -> Outcome:
    """Train on all ranks."""
    watch = Watch(run.resume_at, folder / "saved")
    with pytest.MonkeyPatch.context() as patch:
        if run.fault == "rotary":
            patch.setattr(strategies, "unchanged_tensors", nullcontext)
        elif run.fault == "shifted_position":
            plant(run.fault, patch)
        try:
            fit(run, watch)
            if run.resume_at:
                fit(run, watch, folder / "saved")
        except CVLightningError as refused:
            watch.outcome.error = str(refused)
    return watch.outcome


def fit(run: Run, watch: Watch, resume: Path | None = None) -> None:
    """Train from the start or from a checkpoint."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)  # adapters have random initial values
    module = build_module(run, 1 if run.micro_batches else BUDGET[world_size])
    if run.float32_copies:
        use_float32_copies(module)
    if run.fault == "dropped_micro_batch":
        step = module.accumulate_and_step
        module.accumulate_and_step = lambda given, loss: step(given[1:] or given, loss)  # type: ignore[method-assign]
    trainer = pl.Trainer(
        accelerator=run.accelerator,
        devices=world_size,
        strategy=strategy(run),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[watch, *[SFTStartCheck()] * run.start_check],
    )
    if run.micro_batches:
        watch_gradients(module, watch, (run.checkpoint, run.module, run.micro_batches, run.seed))
    build = build_batch(module, trainer, run)
    trainer.fit(
        module, train_dataloaders=StepLoader(build, run.steps), ckpt_path=None if resume is None else str(resume)
    )


class OffloadingRanks(CPUDeepSpeedStrategy):
    """ZeRO on CPU ranks with DeepSpeed's bookkeeping for optimizer states that are offloaded from a GPU."""

    def __init__(self, stage: Literal[2, 3]) -> None:
        super().__init__(stage)
        self.offload_optimizer = True
        self.config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}


def strategy(run: Run) -> str | Strategy:
    """The strategy of a run."""
    stages: dict[str, Literal[2, 3]] = {"zero2": 2, "zero3": 3}
    name, _, offload = run.strategy.partition("_")
    if name not in stages:
        return name
    if run.accelerator == "gpu":
        return ZeroStrategy(stages[name], offload_optimizer=bool(offload), offload_parameters=bool(offload))
    if offload:
        return OffloadingRanks(stages[name])
    return CPUDeepSpeedStrategy(
        stages[name], gradient_accumulation=run.accumulation, gradient_communication=run.communication
    )


def build_module(run: Run, budget: int) -> PolicyModule:
    """SFT as in the recipe, or GRPO with everything that needs a further forward."""
    policy = PolicyConfig(
        path=run.checkpoint,
        dtype=run.dtype,
        freeze_vision=run.freeze_vision,
        freeze_projector=run.freeze_vision,
        gradient_checkpointing=run.recompute,
        lora=LoraConfig(rank=4) if run.lora else None,
    )
    if run.module == "sft":
        return SFTModule(policy, OPTIMIZER, budget, PROMPT)
    steps = 1 if run.micro_batches else 2
    algorithm = AlgorithmConfig(
        kl=KLConfig(weight=0.05), entropy_weight=1e-3, num_minibatches=steps, old_logprobs="trainer"
    )
    return GRPOModule(policy, OPTIMIZER, budget, algorithm)


def use_float32_copies(module: PolicyModule) -> None:
    """Let a module without DeepSpeed clip and step on float32 copies of its parameters."""
    configure, pairs = module.configure_optimizers, []

    def configure_on_copies() -> OptimizerLRSchedulerConfig:
        made = configure()
        for group in made["optimizer"].param_groups:
            copies = [parameter.detach().float().clone().requires_grad_() for parameter in group["params"]]
            pairs.extend(zip(group["params"], copies, strict=True))
            group["params"] = copies
        made["optimizer"].register_step_post_hook(write_back)
        return made

    def write_back(*_: object) -> None:
        for parameter, copy in pairs:
            parameter.data.copy_(copy.data)

    def clip() -> StepResult:
        for parameter, copy in pairs:
            copy.grad, parameter.grad = None if parameter.grad is None else parameter.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_([copy for _, copy in pairs], module.optimizer_config.gradient_clip)
        return StepResult(float(norm), skipped=False)

    module.configure_optimizers = configure_on_copies  # type: ignore[method-assign]
    module._clip_or_drop = clip  # type: ignore[method-assign]


def watch_gradients(module: PolicyModule, watch: Watch, work: tuple[object, ...]) -> None:
    """Record the gradients of a step under DeepSpeed, and those of a plain copy of the policy over all ranks."""
    from deepspeed.utils import safe_get_full_grad

    take, accumulate = module._take_step, module.accumulate_and_step

    def exact(micro_batches: Sequence[Any], loss: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
        plain = load_policy(module.policy_config).train()
        sharded, module.policy = module.policy, plain
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in plain.named_parameters()}
        for micro_batch in micro_batches:
            loss(micro_batch).backward()
            for name, parameter in plain.named_parameters():
                if parameter.grad is not None:
                    sums[name] += parameter.grad
            plain.zero_grad(set_to_none=True)
        module.policy = sharded
        for total in sums.values():
            torch.distributed.all_reduce(total)
        return sums

    def exactly(micro_batches: Sequence[Any], loss: Callable[[Any], torch.Tensor]) -> StepResult:
        if work not in EXACT:
            EXACT[work] = exact(micro_batches, loss)
        watch.outcome.exact_gradients = EXACT[work]
        return accumulate(micro_batches, loss)

    def take_step() -> StepResult:
        assert module.policy is not None
        found = {name: safe_get_full_grad(parameter) for name, parameter in module.policy.named_parameters()}
        watch.outcome.gradients = {name: gradient.clone() for name, gradient in found.items() if gradient is not None}
        return take()

    module.accumulate_and_step, module._take_step = exactly, take_step  # type: ignore[method-assign]


def build_batch(module: PolicyModule, trainer: pl.Trainer, run: Run) -> Callable[[int], object]:
    """This rank's part of a batch by batch number; all ranks have nine samples, or `micro_batches` per rank."""
    total = run.micro_batches * trainer.world_size or 9

    def own(step: int) -> range:
        if run.micro_batches:
            return range(trainer.global_rank * run.micro_batches, (trainer.global_rank + 1) * run.micro_batches)
        shares = SHARES[(step + run.start_check) % len(SHARES)]
        first = sum(shares[: trainer.global_rank])
        return range(first, first + shares[trainer.global_rank]) if trainer.world_size > 1 else range(9)

    if isinstance(module, SFTModule):
        data = DigitSFTDataModule(
            digits=DigitsConfig(seed=run.seed), num_steps=4, conversations_per_step=total, warm_up_share=0.0
        )
        conversations = data.train_dataloader()
        return lambda step: DemonstrationBatch(
            step, [conversations.build(step % 4).conversations[number] for number in own(step)]
        )
    made = groups(module, -(-total // 4), run.seed)
    trajectories = [t for group in made for t in group.trajectories][:total]
    for trajectory in trajectories:
        trajectory.advantage = trajectory.advantage or 0.5  # a group of equal rewards would change its mini-batch

    def iteration(step: int) -> Iteration:
        batch = Iteration(step, [])
        # The mini-batch of a trajectory must not depend on the numbers per rank.
        halves = [[trajectories[n] for n in own(step) if n % 2 == half] for half in range(2)]
        batch.groups = [Group(task=trajectories[0].task, trajectories=half) for half in halves]
        return batch

    return iteration


def main(folder: Path, names: list[str]) -> None:
    """Train runs one after the other."""
    base.packed_logprobs = partial(packed_logprobs, chunk_tokens=CHUNK)  # type: ignore[attr-defined]
    runs = json.loads((folder / "runs.json").read_text())
    for name in names:
        outcome = perform(Run(**runs[name]), folder / f"{name}-{os.environ['WORLD_SIZE']}")
        if os.environ["RANK"] == "0":
            torch.save(asdict(outcome), folder / f"{name}.pt")
            print(name, "done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
