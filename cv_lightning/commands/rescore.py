"""`cv-lightning rescore STORE --reward RECIPE.yaml --out NEW_STORE`: scores a store with another recipe."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice
from math import nan
from pathlib import Path
from typing import Any

from cv_lightning.background import Background
from cv_lightning.command_line import run_verb
from cv_lightning.rewards.config import RewardConfig
from cv_lightning.rewards.module import RewardModule
from cv_lightning.trajectory.codec import encode_group
from cv_lightning.trajectory.reader import find_files, read_groups
from cv_lightning.trajectory.store import IMAGES, LINES
from cv_lightning.types import DataError, EndState, Group, JudgeError, RewardBreakdown

GROUPS_AT_ONCE = 64
"""Number of groups that the judge is asked about at once."""


@dataclass(frozen=True, kw_only=True)
class Rescore:
    """Score stored trajectories with another recipe, and write them as a new store.

    Trajectories stay as they are; rewards are new, advantages are left out, and a trajectory whose judge failed is
    scored again. Exit code 0: written; 1: the judge failed too often; 2: another error.
    """

    run: Path
    """A trajectory store (a folder with `trajectories/`), or one of its files."""
    out: Path
    """The new store, which must not exist; its images are a link to those of the old one."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The recipe: a file of configs/reward, and single keys such as `--reward.usage`."""


@dataclass(slots=True)
class Rescored:
    """Rewards before and after."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """Two rows for each trajectory, `recipe` before and after: group, position, total, components, correct."""
    unreadable: int = 0
    """Number of lines that hold no group."""

    def add(self, recipe: str, group: int, rewards: list[RewardBreakdown | None]) -> None:
        """Add the rewards of a group."""
        for position, reward in enumerate(rewards):
            row = {"recipe": recipe, "group": group, "position": position, "total": nan}
            if reward is not None:
                row |= {**reward.components, "total": reward.total, "correct": float(reward.correct)}
            self.rows.append(row)


def rescore(config: Rescore) -> Rescored:
    """Write the new store.

    Raises:
        DataError: There are no trajectories, or `out` exists.
        JudgeError: Too many verdicts failed.
    """
    if config.out.exists():
        raise DataError(f"--out {config.out} exists; name a folder that does not")
    reader, found = read_groups(config.run), Rescored()
    temporary = config.out.with_name(f".{config.out.name}.tmp")
    (temporary / LINES).mkdir(parents=True, exist_ok=True)
    with (temporary / LINES / "groups.rank0.jsonl").open("wb") as file:
        for group in _scored(reader, config.reward, found):
            file.write(encode_group(group, tokens=any(trajectory.token_ids for trajectory in group.trajectories)))
    found.unreadable = len(reader.bad_lines)
    if not found.rows:
        shutil.rmtree(temporary)
        raise DataError(
            f"{config.run}: no line of it is a group of trajectories ({found.unreadable} could not be read)"
        )
    images = find_files(config.run)[0].parent.parent / IMAGES
    link = temporary / IMAGES
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(images.resolve(), config.out.parent.resolve() / config.out.name))
    temporary.rename(config.out)
    return found


def _scored(groups: Iterator[Group], reward: RewardConfig, found: Rescored) -> Iterator[Group]:
    """The groups with new rewards, in their order."""
    rewards, background = RewardModule(reward), Background("cv-lightning-rescore")
    numbers = count()
    try:
        while stored := list(islice(groups, GROUPS_AT_ONCE)):
            rescored = [_unscored(group) for group in stored]
            waiting = [
                background.submit(rewards.score_answer(trajectory))
                for group in rescored
                for trajectory in group.trajectories
                if not trajectory.end_state.is_error
            ]
            for future in waiting:
                future.result()
            for before, after in zip(stored, rescored, strict=True):
                number = next(numbers)
                rewards.score_group(after, background.submit(rewards.ask_terms(after)).result())
                found.add("before", number, [trajectory.reward for trajectory in before.trajectories])
                found.add("after", number, [trajectory.reward for trajectory in after.trajectories])
                yield after
    finally:
        rewards.close()
        background.close()


def _unscored(group: Group) -> Group:
    """A copy without rewards and advantages; a trajectory whose judge failed counts as answered again."""
    trajectories = [replace(trajectory, reward=None, advantage=None) for trajectory in group.trajectories]
    for trajectory in trajectories:
        if trajectory.end_state is EndState.ERROR_JUDGE:
            trajectory.end_state, trajectory.error = EndState.ANSWERED, ""
    return replace(group, trajectories=trajectories)


def print_comparison(found: Rescored, out: Path) -> None:
    """Print the mean of every component before and after."""
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    frame = pd.DataFrame(found.rows)
    totals = frame.pivot(index=["group", "position"], columns="recipe", values="total")
    changed = (totals["before"] != totals["after"]) & totals.notna().any(axis=1)
    telling = totals.groupby("group").nunique() > 1
    means = frame.drop(columns=["group", "position"]).groupby("recipe").mean()
    title = f"{len(telling)} groups, {len(totals)} trajectories; {changed.sum()} rewards changed"
    table = Table("mean of", "before", "after", title=title, title_justify="left")
    for name, values in means.items():
        table.add_row(str(name), *(f"{values[each]:.4f}".replace("nan", "-") for each in ("before", "after")))
    table.add_section()
    for name, counts in (
        ("trajectories scored", totals.count()),
        ("groups with different totals", telling.sum()),
    ):
        table.add_row(name, str(counts["before"]), str(counts["after"]))
    console = Console()
    console.print(table)
    if found.unreadable:
        console.print(f"{found.unreadable} lines could not be read and are left out", highlight=False)
    console.print(f"written to {out}", highlight=False, soft_wrap=True)


def _rescore(config: Rescore) -> int:
    try:
        found = rescore(config)
    except JudgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_comparison(found, config.out)
    return 0


main = partial(run_verb, Rescore, name="rescore", run=_rescore)
