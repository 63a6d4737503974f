"""`python -m cv_lightning rescore RUN --reward NEW.yaml --out STORE`: another reward recipe on stored trajectories."""

from __future__ import annotations

import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import fmean

from cv_lightning.background import Background
from cv_lightning.command_line import read_command_line
from cv_lightning.rewards.config import RewardConfig
from cv_lightning.rewards.module import RewardModule
from cv_lightning.trajectory.codec import encode_group
from cv_lightning.trajectory.reader import find_files, read_groups
from cv_lightning.trajectory.store import IMAGES, LINES
from cv_lightning.types import CVLightningError, DataError, EndState, Group, RewardBreakdown

GROUPS_AT_ONCE = 64
"""Groups that a judge is asked about at once."""


@dataclass(frozen=True, kw_only=True)
class Rescore:
    """Score stored trajectories with another recipe, and write them as a store of their own.

    What was rolled out stays; rewards are new, advantages are left out, and a trajectory that only the judge failed
    gets another chance. Exit code 0: written; 1: the judge failed too often; 2: it cannot be done.
    """

    run: Path
    """A trajectory store (a folder with `trajectories/`), or one of its files."""
    out: Path
    """The new store, which does not exist yet; its pictures are a link to the old one's."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The recipe: a file of configs/reward, and single keys such as `--reward.usage`."""


@dataclass(slots=True)
class Change:
    """What a recipe says of some trajectories."""

    components: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Unweighted values by component, `total` and `correct`."""
    scored: int = 0
    trajectories: int = 0
    telling: int = 0
    """Groups whose totals differ, which are those that GRPO learns from."""

    def add(self, rewards: Iterable[RewardBreakdown | None]) -> None:
        """Count one group."""
        totals = set()
        for reward in rewards:
            self.trajectories += 1
            if reward is None:
                continue
            self.scored += 1
            totals.add(reward.total)
            for name, value in {**reward.components, "total": reward.total, "correct": float(reward.correct)}.items():
                self.components[name].append(value)
        self.telling += len(totals) > 1


@dataclass(slots=True)
class Rescored:
    """Before and after."""

    before: Change = field(default_factory=Change)
    after: Change = field(default_factory=Change)
    groups: int = 0
    changed: int = 0
    """Trajectories whose total is another, or that are scored in one of both only."""
    unreadable: int = 0
    """Lines that are no group."""


def rescore(config: Rescore) -> Rescored:
    """Write the new store.

    Raises:
        DataError: there are no trajectories, or `out` exists.
        JudgeError: too many verdicts failed.
    """
    if config.out.exists():
        raise DataError(f"--out {config.out} exists; name a folder that does not")
    reader, found = read_groups(config.run), Rescored()
    temporary = config.out.with_name(f".{config.out.name}.tmp")
    (temporary / LINES).mkdir(parents=True, exist_ok=True)
    with (temporary / LINES / "groups.rank0.jsonl").open("wb") as file:
        for group in _scored(reader, config.reward, found):
            file.write(encode_group(group, tokens=bool(group.trajectories and group.trajectories[0].token_ids)))
    found.unreadable = len(reader.bad_lines)
    if not found.groups:
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
                rewards.score_group(after, background.submit(rewards.ask_terms(after)).result())
                _compare(before, after, found)
                yield after
    finally:
        rewards.close()
        background.close()


def _unscored(group: Group) -> Group:
    """A copy without rewards and advantages; what only the judge failed is as it was before the judge was asked."""
    trajectories = [replace(trajectory, reward=None, advantage=None) for trajectory in group.trajectories]
    for trajectory in trajectories:
        if trajectory.end_state is EndState.ERROR_JUDGE:
            trajectory.end_state, trajectory.error = EndState.ANSWERED, ""
    return replace(group, trajectories=trajectories)


def _compare(before: Group, after: Group, found: Rescored) -> None:
    old, new = [t.reward for t in before.trajectories], [t.reward for t in after.trajectories]
    found.before.add(old)
    found.after.add(new)
    found.groups += 1
    pairs = zip(old, new, strict=True)
    found.changed += sum((one and one.total) != (other and other.total) for one, other in pairs)


def print_comparison(found: Rescored, out: Path) -> None:
    """The table of components."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    title = f"{found.groups} groups, {found.before.trajectories} trajectories; {found.changed} rewards changed"
    table = Table("mean of", title=title, title_justify="left")
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    before, after = found.before, found.after
    for name in dict.fromkeys([*after.components, *before.components]):
        values = (each.components.get(name) for each in (before, after))
        table.add_row(name, *("-" if not value else f"{fmean(value):.4f}" for value in values))
    table.add_section()
    table.add_row("trajectories scored", str(before.scored), str(after.scored))
    table.add_row("groups whose totals differ", str(before.telling), str(after.telling))
    console.print(table)
    if found.unreadable:
        console.print(f"{found.unreadable} lines could not be read and are left out", highlight=False)
    console.print(f"written to {out}", highlight=False, soft_wrap=True)


def main(args: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    from cv_lightning.types import JudgeError

    given = list(sys.argv[1:] if args is None else args)
    if given and not given[0].startswith("-"):
        given = ["--run", *given]
    try:
        config = read_command_line(Rescore, given, as_positional=False, prog="cv_lightning rescore")
        found = rescore(config)
    except JudgeError as error:
        print(f"rescore: {error}", file=sys.stderr)
        return 1
    except (CVLightningError, ValueError, OSError) as error:
        print(f"rescore: {error}", file=sys.stderr)
        return 2
    print_comparison(found, config.out)
    return 0
