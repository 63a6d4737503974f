"""A few GRPO updates on fixed trajectories, shared out among the ranks that torchrun started; the first writes FILE.

    torchrun --nproc-per-node N scripts/acceptance/zero_ranks.py FILE [--cpu]

One rank takes everything without sharding, several take their share under ZeRO-3; losses and weights must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from update import trajectories  # noqa: I001 - it prepares the environment

import lightning.pytorch as pl
import torch

from cv_lightning.models.gather import gather_full_params
from cv_lightning.commands.tiny import TinyCheckpoint, write
from cv_lightning.data.modules import StepLoader
from cv_lightning.models.loading import PolicyConfig
from cv_lightning.modules.base import OptimizerConfig
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.rl.algorithm import AlgorithmConfig
from cv_lightning.strategies import CPUDeepSpeedStrategy, ZeroStrategy
from cv_lightning.types import Group, Iteration

STEPS = 3


class Watch(pl.Callback):
    """Losses of every step, and the norms of all weights at the end."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note the loss and the gradient's norm."""
        self.losses += [float(trainer.callback_metrics[f"policy/{name}"]) for name in ("loss", "grad_norm")]

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Note the norms."""
        self.weights = [float(tensor.float().norm()) for _, tensor in gather_full_params(pl_module.policy)]


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    with tempfile.TemporaryDirectory() as name:
        write(TinyCheckpoint(out=Path(name)))
        policy = PolicyConfig(path=name, dtype="float32", kernels="torch")
        module = GRPOModule(policy, OptimizerConfig(lr=1e-4), 512, algorithm=AlgorithmConfig(num_minibatches=1))
        made = trajectories(
            module, [{"tokens": 64 + 24 * (n % 5), "images": 1 + n % 2} for n in range(4 * max(world, 2))]
        )

        def build(step: int) -> Iteration:
            batch = Iteration(step, [])
            batch.groups = [Group(task=t.task, trajectories=[t]) for t in made[rank::world]]
            return batch

        sharded: Any = CPUDeepSpeedStrategy() if options.cpu else ZeroStrategy()
        watch = Watch()
        trainer = pl.Trainer(
            accelerator="cpu" if options.cpu else "gpu", devices=world, strategy=sharded if world > 1 else "auto",
            max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, callbacks=[watch],
        )  # fmt: skip
        trainer.fit(module, train_dataloaders=StepLoader(build, STEPS))
        torch.distributed.barrier() if world > 1 else None
    if rank == 0:
        options.file.write_text(json.dumps({"loss": watch.losses, "weights": watch.weights}))


if __name__ == "__main__":
    main()
