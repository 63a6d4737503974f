"""Checkpoints from which a run goes on exactly: each is whole or not there, and the newest few are kept.

    RUN/checkpoints/iteration000120.ckpt    a file; under DeepSpeed a folder with a part per rank

A checkpoint is written beside its final name and renamed once it is on disk, so a kill during saving leaves the one
before. It holds what Lightning knows (weights, optimizer, schedule, loops, loaders, callbacks) and the states of every
rank's random generators. A resumed run first takes back what the killed one did after the checkpoint.
"""

from __future__ import annotations

import logging
import os
import random
import time
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
from cv_lightning.trajectory.store import LINES, last_groups
from cv_lightning.types import CVLightningError

logger = logging.getLogger(__name__)


class CheckpointCallback(Checkpoint):
    """Saves every so often, at the last batch and after a signal; restores what Lightning does not.

    Args:
        every_minutes: wall-clock minutes between two checkpoints, which are taken at the end of an iteration.
        every_iterations: also save whenever the iteration is a multiple of this; 0: only by time.
        keep: how many of the newest stay on disk.
    """

    def __init__(self, every_minutes: float = 30.0, every_iterations: int = 0, keep: int = 2) -> None:
        if not every_minutes > 0 or every_iterations < 0 or keep < 1:
            raise ValueError(
                f"CheckpointCallback: every_minutes {every_minutes} must be above 0, every_iterations "
                f"{every_iterations} at least 0, keep {keep} at least 1"
            )
        self.every_minutes = every_minutes
        self.every_iterations = every_iterations
        self.keep = keep
        self.settings: dict[str, Any] = {}
        """Of the run, by dotted name, where the command line has set them: part of every checkpoint."""
        self._saved_at = 0.0
        self._after_validation = False
        self._restored: dict[str, Any] | None = None

    # ------------------------------------------------------------------ saving
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write plain files without a copy in memory."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = StreamingCheckpointIO()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time; where a validation follows, after it, so that no resumed run misses its figures."""
        module = _policy_module(pl_module)
        if not self._is_due(trainer, module.iteration):
            return
        self._after_validation = validation_follows(trainer)
        if not self._after_validation or trainer.should_stop:  # a run that is to stop may leave out the validation
            self.save(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what was due before the validation."""
        if self._after_validation:
            self._after_validation = False
            self.save(trainer, _policy_module(pl_module))

    def _is_due(self, trainer: pl.Trainer, iteration: int) -> bool:
        """The same answer on every rank."""
        ends = trainer.is_last_batch or 0 < trainer.max_steps <= trainer.global_step
        signals = StopOnSignal.of(trainer)
        stops = trainer.should_stop or trainer.received_sigterm or (signals is not None and signals.is_agreed)
        by_count = self.every_iterations > 0 and iteration % self.every_iterations == 0
        by_time = time.monotonic() - self._saved_at >= 60 * self.every_minutes
        return trainer.strategy.reduce_boolean_decision(ends or stops or by_count or by_time, all=False)

    def save(self, trainer: pl.Trainer, module: PolicyModule) -> None:
        """Write beside the final name, rename, then remove the oldest. Called on all ranks.

        Metrics and trajectories are on disk before the name is: see `on_save_checkpoint` here and of the rollout.

        Raises:
            CVLightningError: it cannot be written; what was written of it is removed.
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
            if not _is_of_disk(error):
                raise
            remove(unfinished)
            raise CVLightningError(
                f"{final} cannot be written: {_first_line(error)}. The checkpoint before it stands: free space and "
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
        """Add what Lightning leaves out; the same on every rank, as a checkpoint keeps one. Collective."""
        row: dict[str, float] = {}
        module = _policy_module(pl_module)
        if trainer.training:  # the loggers get the row only after the hook that saves
            row = module.batch_metrics | {"epoch": float(trainer.current_epoch)}
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
        """Remember what to restore once training starts."""
        self._restored = checkpoint.get(KEY)
        done = checkpoint.get("iteration", 0)
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
        # Finished under fewer iterations than the data now has: the epoch goes on.
        if progress and done < getattr(getattr(trainer, "datamodule", None), "num_train_batches", 0):
            progress["is_last_batch"] = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take back what came after the checkpoint, then restore the random generators.

        Raises:
            CVLightningError: a new run in a folder that holds another run's checkpoints.
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
                self._rewind_metrics(trainer, state, own)
            if state is not None and own:
                warn_of_missing_groups(folder, state.get("stored", {}))
        trainer.strategy.barrier("rewind")
        if state is None:
            return
        if len(state["rng"]) == trainer.world_size:
            restore_rng(state["rng"][trainer.global_rank])
        elif trainer.is_global_zero:
            logger.info(
                "the checkpoint was written by %d ranks, this run has %d: random generators start anew, and the "
                "run is no longer bit for bit that of one world size",
                len(state["rng"]),
                trainer.world_size,
            )

    def _rewind_metrics(self, trainer: pl.Trainer, state: dict[str, Any], own: bool) -> None:
        files = _metrics_files(trainer)
        for file, before in zip(files, state.get("rows", []) if own else [], strict=False):
            warn_of_missing_rows(file, state["step"], before)
        for file in files:
            file.rewind(state["step"], state["row"] if own else {})


def validation_follows(trainer: pl.Trainer) -> bool:
    """True if Lightning validates after this training batch. It asks itself the same in private.

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
    """Lightning's, but written straight to the file: no second and third copy in memory, no temporary elsewhere.

    With torch's checksums, by which `damage` tells a checkpoint that a disk has spoiled.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a file; `CheckpointCallback` makes it atomic."""
        torch.save(checkpoint, path)


def check_fits(path: Path, trainer: pl.Trainer) -> None:
    """DeepSpeed goes on from its own folders only, and these hold one share of the optimizer per rank.

    Raises:
        CVLightningError: the checkpoint is another strategy's, or of another number of ranks.
    """
    world_size, sharded = trainer.world_size, isinstance(trainer.strategy, DeepSpeedStrategy)
    if sharded != path.is_dir():
        raise CVLightningError(
            f"{path} is a {'folder of DeepSpeed' if path.is_dir() else 'plain file'}, --trainer.strategy is "
            f"{type(trainer.strategy).__name__}: give the strategy that wrote it, or `export` it and give the folder "
            "as --model.init_args.policy.path"
        )
    shares = len(list(path.glob("checkpoint/*_optim_states.pt")))
    if shares and shares != world_size:
        raise CVLightningError(
            f"{path} holds the optimizer of {shares} ranks, this run has {world_size}: ZeRO cannot share it out anew. "
            f"Start {shares} ranks (--trainer.devices, --trainer.num_nodes), or `export` it and give the folder as "
            "--model.init_args.policy.path"
        )


def _sync(path: Path) -> None:
    """Wait until a file, or every file of a folder, is on disk."""
    for file in (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else (path,):
        sync_file(file)


def _is_of_disk(error: Exception) -> bool:
    """True for what the system says of a disk, and for the RuntimeErrors of torch's writer that hide it."""
    return isinstance(error, OSError) or any(word in str(error) for word in ("PytorchStreamWriter", "inline_container"))


def _first_line(error: Exception) -> str:
    said = error.strerror if isinstance(error, OSError) else None
    return said or str(error).strip().splitlines()[0]


# ---------------------------------------------------------------------------------------------- what a run has logged
def _metrics_files(trainer: pl.Trainer) -> list[MetricsLogger]:
    """Of the first rank, which writes them; the others have none."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger for logger in loggers if isinstance(logger, MetricsLogger)]


def _stored_groups(run: Path) -> dict[str, list[int]]:
    """Last iteration and its number of groups in every file of trajectories, which all ranks have written by now."""
    return {path.name: list(last_groups(path)) for path in sorted((run / LINES).glob("*.jsonl"))}


def warn_of_missing_rows(file: MetricsLogger, step: int, before: int) -> None:
    """Say which rows of the metrics that a checkpoint knew of are gone, as after a power cut.

    Args:
        file: the metrics.
        step: of the checkpoint.
        before: rows of earlier steps that were there when it was written.
    """
    there = file.steps(before=step)
    if len(there) < before:
        gone = sorted(set(range(step)) - set(there))
        logger.warning(
            "%s: %d rows that were written before the checkpoint are missing (a power cut?), those of iterations %s",
            file.path, before - len(there), _ranges([number + 1 for number in gone]),
        )  # fmt: skip


def warn_of_missing_groups(run: Path, stored: dict[str, list[int]]) -> None:
    """Say of which iterations trajectories that a checkpoint knew of are gone.

    Args:
        run: its folder.
        stored: last iteration and its number of groups in each file of trajectories when it was written, by name.
    """
    for name, known in stored.items():
        path = run / LINES / name
        there = list(last_groups(path)) if path.is_file() else [0, 0]
        if there < known:
            first = there[0] if there[0] == known[0] else there[0] + 1
            logger.warning(
                "%s: trajectories of iterations %s that were written before the checkpoint are missing (a power cut?)",
                path, _ranges(list(range(first, known[0] + 1))),
            )  # fmt: skip


def _ranges(numbers: list[int]) -> str:
    """`1-3, 7` of sorted numbers."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in parts)


# ---------------------------------------------------------------------------------------------- random generators
def rng_state() -> dict[str, Any]:
    """Of this process, in types that `torch.load(weights_only=True)` reads."""
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
    """The reverse of `rng_state`; a device that is not there is passed over."""
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
