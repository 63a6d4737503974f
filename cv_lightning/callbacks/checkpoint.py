"""Checkpoints from which a run resumes exactly.

    RUN/checkpoints/iteration000120.ckpt    a file; under DeepSpeed a folder with a part per rank

A checkpoint is written under a temporary name and renamed once it is on disk, so that a kill during saving leaves the
earlier one. It holds Lightning's state (weights, optimizer, schedule, loops, loaders, callbacks) and the random
generators of every rank. A resumed run first removes the metrics and trajectories that came after the checkpoint.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DeepSpeedStrategy

from cv_lightning.callbacks.signals import StopOnSignal
from cv_lightning.checkpoints.folder import (
    FOLDER,
    UNFINISHED,
    checkpoints,
    is_of,
    refuse_used,
    remove,
    rewind,
)
from cv_lightning.checkpoints.recipe import KEY, describe_classes
from cv_lightning.distributed import gather_lists
from cv_lightning.files import sync_file, sync_folder
from cv_lightning.loggers.metrics_file import MetricsLogger
from cv_lightning.modules.base import PolicyModule
from cv_lightning.ranges import Limit, NonNegativeInt, PositiveInt, check_ranges
from cv_lightning.trajectory.store import LINES, last_groups
from cv_lightning.types import CVLightningError

logger = logging.getLogger(__name__)
TORCH_WRITER = ("PytorchStreamWriter", "inline_container")


class CheckpointCallback(Checkpoint):
    """Saves by time or iterations, at the last batch and after a signal; restores what Lightning leaves out.

    Args:
        every_minutes: Minutes between two checkpoints, which are saved at the end of an iteration.
        every_iterations: Also save whenever the iteration is a multiple of this; 0 for time alone.
        keep: Number of newest checkpoints that stay on disk.
    """

    def __init__(
        self,
        every_minutes: Limit = 30.0,
        every_iterations: NonNegativeInt = 0,
        keep: PositiveInt = 2,
    ) -> None:
        check_ranges(CheckpointCallback.__init__, "checkpoint", locals())
        self.every_minutes = every_minutes
        self.every_iterations = every_iterations
        self.keep = keep
        self.settings: dict[str, Any] = {}
        """The run's settings by dotted name, stored in every checkpoint; the command line sets them."""
        self._saved_at = 0.0
        self._after_validation = False
        self._restored: dict[str, Any] | None = None

    # ------------------------------------------------------------------ saving
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let Lightning write checkpoint files without a copy in memory."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = StreamingCheckpointIO()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time; if a validation follows, after it, so that a resumed run has its metrics."""
        module = _policy_module(pl_module)
        if not self._is_due(trainer, module.iteration):
            return
        self._after_validation = validation_follows(trainer)
        if not self._after_validation or trainer.should_stop:  # a run that stops may leave out the validation
            self.save(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the checkpoint that was due before the validation."""
        if self._after_validation:
            self._after_validation = False
            self.save(trainer, _policy_module(pl_module))

    def _is_due(self, trainer: pl.Trainer, iteration: int) -> bool:
        """True on all ranks if any of them has a reason to save."""
        ends = trainer.is_last_batch or 0 < trainer.max_steps <= trainer.global_step
        signals = StopOnSignal.of(trainer)
        stops = trainer.should_stop or trainer.received_sigterm or (signals is not None and signals.is_agreed)
        by_count = self.every_iterations > 0 and iteration % self.every_iterations == 0
        by_time = time.monotonic() - self._saved_at >= 60 * self.every_minutes
        return trainer.strategy.reduce_boolean_decision(ends or stops or by_count or by_time, all=False)

    def save(self, trainer: pl.Trainer, module: PolicyModule) -> None:
        """Write under a temporary name, rename, then remove the oldest checkpoints. Call this on all ranks.

        Metrics and trajectories are on disk before the final name is; `on_save_checkpoint` of this callback and of
        `RolloutCallback` see to that.

        Raises:
            CVLightningError: The checkpoint cannot be written; a part of it is removed.
        """
        start = time.monotonic()
        folder = Path(trainer.default_root_dir) / FOLDER
        final = folder / f"iteration{module.iteration:06d}.ckpt"
        unfinished = final.with_name(UNFINISHED + final.name)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            remove(unfinished)
        try:
            trainer.save_checkpoint(unfinished, weights_only=False)  # ends with a barrier
            if trainer.is_global_zero:
                _sync(unfinished)
                os.replace(unfinished, final)
                sync_folder(folder)
        except (OSError, RuntimeError) as error:
            # torch's writer hides an OSError in a RuntimeError.
            if not isinstance(error, OSError) and not any(name in str(error) for name in TORCH_WRITER):
                raise
            remove(unfinished)
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error).strip().splitlines()[0]
            raise CVLightningError(
                f"{final} cannot be written: {reason}. The earlier checkpoint is intact: free space and "
                "continue with --ckpt_path last"
            ) from error
        if trainer.is_global_zero:
            for _, old in checkpoints(folder)[: -self.keep]:
                remove(old)
            logger.info("saved %s in %.1f s", final, time.monotonic() - start)
        self._saved_at = time.monotonic()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the state that Lightning leaves out, equal on all ranks. A collective."""
        module = _policy_module(pl_module)
        # The loggers get this iteration's row only after the hook that saves.
        row = module.batch_metrics | {"epoch": float(trainer.current_epoch)} if trainer.training else {}
        step = module.iteration - 1
        checkpoint[KEY] = {
            "rng": gather_lists([rng_state()]),
            "row": row,
            "step": step,
            "rows": [file.sync(before=step) for file in _metrics_files(trainer)],
            "stored": _stored_groups(Path(trainer.default_root_dir)) if trainer.is_global_zero else {},
            "recipe": describe_classes(pl_module, getattr(trainer, "datamodule", None)) | {"settings": self.settings},
        }

    # ------------------------------------------------------------------ resuming
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the state that `on_train_start` restores."""
        self._restored = checkpoint.get(KEY)
        done = checkpoint.get("iteration", 0)
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
        # The run had ended after fewer iterations than the data has now: the epoch continues.
        if progress and done < getattr(getattr(trainer, "datamodule", None), "num_train_batches", 0):
            progress["is_last_batch"] = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove what came after the checkpoint, then restore the random generators.

        Raises:
            CVLightningError: The run is new and its folder holds another run's checkpoints.
        """
        self._saved_at = time.monotonic()
        folder = Path(trainer.default_root_dir)
        own = is_of(trainer.ckpt_path, folder)
        if not own:
            refuse_used(folder)
        state, self._restored = self._restored, None
        if trainer.is_global_zero:
            for leftover in (folder / FOLDER).glob(f"{UNFINISHED}*"):
                remove(leftover)
            iteration = _policy_module(pl_module).iteration
            rewind(folder, iteration)  # 0: a run without checkpoints starts over
            if state is not None:
                files = _metrics_files(trainer)
                if own:
                    warn_of_lost_rows(files, state)
                    warn_of_lost_groups(folder, state.get("stored", {}))
                for file in files:
                    file.rewind(state["step"], state["row"] if own else {})
        trainer.strategy.barrier("rewind")
        if state is None:
            return
        if len(state["rng"]) == trainer.world_size:
            restore_rng(state["rng"][trainer.global_rank])
        elif trainer.is_global_zero:
            logger.info(
                "the checkpoint was written by %d ranks, this run has %d: random generators are seeded again, and the "
                "run is no longer bit for bit that of one world size",
                len(state["rng"]),
                trainer.world_size,
            )


def validation_follows(trainer: pl.Trainer) -> bool:
    """True if Lightning validates after this training batch; Lightning's own test of this is private.

    False where `trainer.val_check_interval` is a duration, which only Lightning measures: the checkpoint is then
    saved before the validation.
    """
    every, batches = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not sum(trainer.num_val_batches) or batches is None:
        return False
    if every is not None and (trainer.current_epoch + 1) % every:
        return False
    if batches == float("inf"):
        return trainer.is_last_batch
    loop = trainer.fit_loop.epoch_loop
    return trainer.should_stop or ((loop.total_batch_idx if every is None else loop.batch_idx) + 1) % batches == 0


class StreamingCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints straight to the file; Lightning's own makes two copies in memory first.

    The file has torch's checksums, by which `damage` finds a checkpoint that a disk has spoiled.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a file; `CheckpointCallback` makes this atomic."""
        torch.save(checkpoint, path)


def check_fits(path: Path, trainer: pl.Trainer) -> None:
    """Check that this strategy and number of ranks can resume from a checkpoint.

    DeepSpeed resumes from its own folders only, which hold one part of the optimizer state per rank.

    Raises:
        CVLightningError: Another strategy or another number of ranks wrote the checkpoint.
    """
    world_size, sharded = trainer.world_size, isinstance(trainer.strategy, DeepSpeedStrategy)
    if sharded != path.is_dir():
        raise CVLightningError(
            f"{path} is a {'folder of DeepSpeed' if path.is_dir() else 'plain file'}, --trainer.strategy is "
            f"{type(trainer.strategy).__name__}: give the strategy that wrote it, or `export` it and give the folder "
            "as --model.init_args.policy.path"
        )
    parts = len(list(path.glob("checkpoint/*_optim_states.pt")))
    if parts and parts != world_size:
        raise CVLightningError(
            f"{path} holds the optimizer of {parts} ranks, this run has {world_size}: ZeRO cannot redistribute it. "
            f"Start {parts} ranks (--trainer.devices, --trainer.num_nodes), or `export` it and give the folder as "
            "--model.init_args.policy.path"
        )


def _sync(path: Path) -> None:
    """Wait until a file, or every file of a folder, is on disk."""
    for file in (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else (path,):
        sync_file(file)


# ---------------------------------------------------------------------------------------------- metrics, trajectories
def _metrics_files(trainer: pl.Trainer) -> list[MetricsLogger]:
    """The metrics files on the first rank, which writes them; empty on the others."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger for logger in loggers if isinstance(logger, MetricsLogger)]


def _stored_groups(run: Path) -> dict[str, list[int]]:
    """Last iteration and its number of groups in each file of trajectories; all ranks have written theirs."""
    return {path.name: list(last_groups(path)) for path in sorted((run / LINES).glob("*.jsonl"))}


def warn_of_lost_rows(files: Sequence[MetricsLogger], state: Mapping[str, Any]) -> None:
    """Name the rows of metrics that a checkpoint's state counted and that are missing, as after a power cut."""
    for file, before in zip(files, state.get("rows", []), strict=False):
        found = file.steps(before=state["step"])
        if len(found) < before:
            lost = [step + 1 for step in sorted(set(range(state["step"])).difference(found))]
            logger.warning(
                "%s: %d rows written before the checkpoint are missing (a power cut?), those of iterations %s",
                file.path, before - len(found), _ranges(lost),
            )  # fmt: skip


def warn_of_lost_groups(run: Path, stored: Mapping[str, list[int]]) -> None:
    """Name the iterations whose trajectories a checkpoint counted and that are missing."""
    for name, known in stored.items():
        path = run / LINES / name
        found = list(last_groups(path)) if path.is_file() else [0, 0]
        if found < known:
            first = found[0] if found[0] == known[0] else found[0] + 1
            logger.warning(
                "%s: trajectories of iterations %s that were written before the checkpoint are missing (a power cut?)",
                path, _ranges(range(first, known[0] + 1)),
            )  # fmt: skip


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers like `1-3, 7`."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


# ---------------------------------------------------------------------------------------------- random generators
def rng_state() -> dict[str, Any]:
    """Random states of this process, in types that `torch.load(weights_only=True)` reads."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned; the state of a missing device is ignored."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _policy_module(module: pl.LightningModule) -> PolicyModule:
    if not isinstance(module, PolicyModule):
        raise TypeError(f"CheckpointCallback works with a PolicyModule, not with {type(module).__name__}")
    return module
