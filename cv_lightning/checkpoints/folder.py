"""A run's folder of checkpoints: listing them, finding the newest intact one, removing those after an iteration."""

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
"""Prefix of a checkpoint that is being written or removed."""


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(iteration, path) of the finished checkpoints in a folder, oldest first."""
    found = [(NAME.fullmatch(path.name), path) for path in folder.glob("*.ckpt")]
    return sorted((int(match[1]), path) for match, path in found if match)


def last_checkpoint(run: Path) -> Path | None:
    """The newest intact checkpoint of a run; None if there is none. Damaged ones are skipped with a warning."""
    for _, path in reversed(checkpoints(run / FOLDER)):
        reason = damage(path)
        if not reason:
            return path
        logger.warning("%s is damaged: %s. Trying the one before it", path, reason)
    return None


def is_of(checkpoint: object, run: Path) -> bool:
    """True if a checkpoint lies in the run's own folder; False for None and for one of another run."""
    return checkpoint is not None and run.resolve() in Path(str(checkpoint)).resolve().parents


def refuse_used(run: Path) -> None:
    """Refuse to start a new run in the folder of an earlier one, because it would mix their checkpoints.

    Raises:
        CVLightningError: The folder has checkpoints.
    """
    if found := checkpoints(run / FOLDER):
        raise CVLightningError(
            f"{run} holds a run's checkpoints, the last of iteration {found[-1][0]}: --ckpt_path last continues "
            f"it; for a new run choose another --trainer.default_root_dir, or remove {run / FOLDER}"
        )


def rewind(run: Path, iteration: int) -> None:
    """Remove the trajectories and checkpoints after an iteration, which the resumed run makes again."""
    for path, groups in drop_after(run, iteration).items():
        logger.info("%s: dropped %d groups after iteration %d", path, groups, iteration)
    for number, path in checkpoints(run / FOLDER):
        if number > iteration:
            logger.warning("removing %s: the run continues from iteration %d", path, iteration)
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint. A folder is renamed first, so that half of it is never taken for a checkpoint."""
    if path.is_dir():
        doomed = path if path.name.startswith(UNFINISHED) else path.rename(path.with_name(UNFINISHED + path.name))
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)
