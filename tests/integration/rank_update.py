"""Run by `test_ranks.py` under torchrun: one GRPO iteration on given trajectories, of which each rank has its share.

    torchrun --nproc-per-node N rank_update.py CHECKPOINT OUT SHARES

SHARES is a JSON list with the numbers of trajectories of each rank, in order; the first rank writes weights and
metrics to OUT.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from module_samples import groups, parameters, policy

from cv_lightning.data.modules import StepLoader
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.rl.losses import PolicyLossConfig
from cv_lightning.types import Group, Iteration

BUDGET = 220
"""Tokens of a micro-batch: two or three trajectories."""


class PlainDescent(GRPOModule):
    """Steps along the gradient itself, so that weights differ by no more than gradients do."""

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Stochastic gradient descent."""
        optimizer = torch.optim.SGD(self.policy.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def main(checkpoint: Path, out: Path, shares: list[int]) -> None:
    """Train and write."""
    loss = PolicyLossConfig(kl_weight=0.05)
    module = PlainDescent(policy(checkpoint), None, BUDGET, loss, num_minibatches=2, old_logprobs="trainer")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trajectories = [t for group in groups(module, 3) for t in group.trajectories][: sum(shares)]

    def build(step: int) -> Iteration:
        # Which mini-batch a trajectory belongs to must not depend on the shares.
        first = sum(shares[: trainer.global_rank])
        last = first + shares[trainer.global_rank]
        batch = Iteration(step, [])
        numbered = list(enumerate(trajectories))[first:last]
        halves = [[t for number, t in numbered if number % 2 == half] for half in range(2)]
        batch.groups = [Group(task=trajectories[0].task, trajectories=half) for half in halves]
        return batch

    trainer.fit(module, train_dataloaders=StepLoader(build, 2))
    if trainer.is_global_zero:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save({"weights": parameters(module), "metrics": metrics}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
