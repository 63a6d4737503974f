"""The orientation probe: questions which of the five turns and flips was applied to an image (CodeVision, figure 1)."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from cv_lightning.data.benchmarks import BY_LETTER, LETTERS
from cv_lightning.data.sources import Rows
from cv_lightning.orientations import ORIENTATIONS, turn_image
from cv_lightning.ranges import PositiveInt, check_ranges
from cv_lightning.types import DataError, Task

DATA_SOURCE = "orientation_probe"
WORDS = {
    "rotate_90": "turned by 90 degrees counter-clockwise",
    "rotate_180": "turned by 180 degrees",
    "rotate_270": "turned by 90 degrees clockwise",
    "flip_horizontal": "mirrored left to right",
    "flip_vertical": "mirrored top to bottom",
}
QUESTION = "\n".join(
    [
        "Exactly one of these was done to the upright picture. Which one?",
        *(f"{letter}. {WORDS[name]}" for letter, name in zip(LETTERS, ORIENTATIONS, strict=False)),
        BY_LETTER,
    ]
)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Number and choice of the images."""

    num_images: PositiveInt = 200
    """Images drawn from the data set without replacement; all if it has fewer."""
    seed: int = 0
    """Seed of the choice of images and of what is applied to each."""

    def __post_init__(self) -> None:
        check_ranges(self, "data.init_args.probe")


class ProbeRows:
    """Images of a data set, each turned or flipped, and the question which of the five it was.

    The five are equally frequent, so that guessing reaches an accuracy of 0.2.

    Args:
        rows: A data set of upright images.
        config: Number of images.
    """

    def __init__(self, rows: Rows[Task], config: ProbeConfig) -> None:
        rng = random.Random(f"{config.seed}/probe")
        self.rows = rows
        self._chosen = rng.sample(range(len(rows)), min(len(rows), config.num_images))
        self._done = [ORIENTATIONS[at % len(ORIENTATIONS)] for at in range(len(self._chosen))]
        rng.shuffle(self._done)

    def __len__(self) -> int:
        return len(self._chosen)

    def row(self, position: int) -> Task:
        """One question.

        Raises:
            DataError: The image is not upright.
        """
        task, done = self.rows.row(self._chosen[position]), self._done[position]
        if set(task.required_transforms) & set(ORIENTATIONS):
            raise DataError(f"{task.id} is not upright: --data.probe needs a data set without turned images")
        return replace(
            task,
            id=f"{task.id}/probe",
            question=QUESTION,
            images=(turn_image(task.images[0], done),),
            ground_truth=LETTERS[ORIENTATIONS.index(done)],
            data_source=DATA_SOURCE,
            required_transforms=(),
            box=None,
            messages=(),
            metadata={"category": done, "orientation": done},
        )
