"""A run's folder of checkpoints: which are there, which is the newest whole one, and dropping the ones after it."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from cv_lightning.checkpoints.damage import damage
from cv_lightning.trajectory.store import drop_after
from cv_lightning.types import CVLightningError

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
NAME = re.compile(r"iteration(\d+)\.ckpt")
UNFINISHED = ".unfinished-"
"""Before the name of what is being written or removed."""


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(iteration, path) of the finished checkpoints in a folder, oldest first."""
    found = [(NAME.fullmatch(path.name), path) for path in folder.glob("*.ckpt")]
    return sorted((int(match[1]), path) for match, path in found if match)


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run in which every byte is as it was written; None if there is none.

    A damaged one is named in a warning and passed over.
    """
    for _, path in reversed(checkpoints(run / FOLDER)):
        reason = damage(path)
        if not reason:
            return path
        logger.warning("%s is damaged: %s. Trying the one before", path, reason)
    return None


def is_of(checkpoint: object, run: Path) -> bool:
    """True if a run goes on from a checkpoint of its own; False for none, and for one of another run."""
    return checkpoint is not None and run.resolve() in Path(str(checkpoint)).resolve().parents


def refuse_used(run: Path) -> None:
    """Stop a new run in the folder of an earlier one, whose checkpoints it would mix with its own.

    Raises:
        CVLightningError: there are checkpoints.
    """
    if found := checkpoints(run / FOLDER):
        raise CVLightningError(
            f"{run} holds a run's checkpoints, the last of iteration {found[-1][0]}: --ckpt_path last goes on with "
            f"it; for a new run choose another --trainer.default_root_dir, or remove {run / FOLDER}"
        )


def rewind(run: Path, iteration: int) -> None:
    """Drop the trajectories and checkpoints that a run made after an iteration: it is about to make them anew."""
    for path, groups in drop_after(run, iteration).items():
        logger.info("%s: dropped %d groups after iteration %d", path, groups, iteration)
    for number, path in checkpoints(run / FOLDER):
        if number > iteration:
            logger.warning("removing %s: the run goes on from iteration %d", path, iteration)
            remove(path)


def remove(path: Path) -> None:
    """A folder first loses its name, so that half of it never passes for a checkpoint."""
    if path.is_dir():
        doomed = path if path.name.startswith(UNFINISHED) else path.rename(path.with_name(UNFINISHED + path.name))
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)
