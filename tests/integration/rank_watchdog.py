"""Run by `test_sync.py`: two gloo ranks in each of several kinds of trouble, under a watchdog.

    rank_watchdog.py FOLDER MODE...

The ranks of a mode write what they say to
`FOLDER/<mode>.rank<r>.txt`. Prints a JSON object: by mode, the exit code of each rank and whether it left a child.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning.pytorch as pl
import torch
from forked import fork_ranks, wait
from torch.utils.data import DataLoader

from cv_lightning.callbacks.watchdog import Watchdog

NEVER_S = 600
"""Seconds that are longer than the test waits."""


class Trouble(pl.LightningModule):
    """Two steps; in the second one, the last rank is in trouble.

    Args:
        mode: which.
    """

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Return a loss, or make trouble."""
        troubled = self.global_rank == (0 if self.mode == "first_killed" else 1)
        if batch_idx == 1 and troubled:
            subprocess.Popen(["sleep", str(NEVER_S)])  # has to go with the rank
            if self.mode in ("killed", "first_killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.mode == "stopped":
                time.sleep(3)  # long enough to have told where it is
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.mode == "raises":
                raise RuntimeError("the engine died")
            if self.mode == "stuck":
                with Watchdog.at(self.trainer, "rollout 2", waits=False):
                    time.sleep(NEVER_S)
            if self.mode == "slow":
                with Watchdog.at(self.trainer, "rollout 2", waits=False) as get_on:
                    for _ in range(16):
                        time.sleep(0.5)
                        get_on()
        loss: torch.Tensor = self.layer(batch).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(folder: Path, mode: str, rank: int) -> None:
    """Train as one rank."""
    watchdog = Watchdog(timeout_s=4.0, silence_s=6.0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        default_root_dir=folder / mode,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watchdog],
    )
    trainer.fit(Trouble(mode), DataLoader([torch.ones(1)] * 8, batch_size=2))  # type: ignore[arg-type]


def main(folder: Path, modes: list[str]) -> None:
    """Run every mode."""
    results = {}
    for mode in modes:
        ranks = fork_ranks(2, partial(run, folder, mode), lambda rank, mode=mode: folder / f"{mode}.rank{rank}.txt")
        results[mode] = [wait(ranks[0])]
        if mode == "stopped":  # only this signal ends it
            os.kill(ranks[1], signal.SIGKILL)
        results[mode].append(wait(ranks[1]))
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
