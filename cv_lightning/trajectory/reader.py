"""The typed reader of trajectory stores, for reports, notebooks and tables."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cv_lightning.trajectory.codec import decode_group
from cv_lightning.trajectory.store import IMAGES, LINES
from cv_lightning.types import DataError, Group, Trajectory

if TYPE_CHECKING:
    import pandas as pd

LOG = logging.getLogger(__name__)


class BadLine(NamedTuple):
    """A line that is not a group."""

    file: Path
    line: int
    """Number of the line, from 1."""
    reason: str


class GroupReader(Iterator[Group]):
    """Iterates over the groups of a store, files in order of name, lines in order of writing.

    Lines that cannot be read (cut off by a kill, or damaged) are skipped and listed in `bad_lines`.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.bad_lines: list[BadLine] = []
        self._groups = self._read()

    def __next__(self) -> Group:
        return next(self._groups)

    def _read(self) -> Iterator[Group]:
        for path in self.files:
            before = len(self.bad_lines)
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip() and (group := self._decode(path, number, line)) is not None:
                        yield group
            if bad := self.bad_lines[before:]:
                lines = ", ".join(str(entry.line) for entry in bad[:5]) + (", ..." if len(bad) > 5 else "")
                LOG.warning("%s: %d unreadable lines skipped (%s)", path, len(bad), lines)

    def _decode(self, path: Path, number: int, line: bytes) -> Group | None:
        try:
            return decode_group(line, path.parent.parent / IMAGES)
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            self.bad_lines.append(BadLine(path, number, f"{type(error).__name__}: {error}"))
            return None


def find_files(path: str | Path) -> list[Path]:
    """The trajectory files of a store.

    Args:
        path: A store (a folder with `trajectories/`), its `trajectories` folder, or one file.

    Raises:
        DataError: There are none; the message names the stores below the folder, if any.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    for folder in (path / LINES, path):
        if files := sorted(folder.glob("*.jsonl")):
            return files
    if (path / LINES).is_dir():
        return []
    below = sorted(str(found.parent.relative_to(path)) for found in path.glob(f"**/{LINES}") if found.is_dir())
    hint = f"; it holds the stores {', '.join(below)}: name one of them" if below else ""
    raise DataError(f"{path}: no trajectories (expected {LINES}/*.jsonl){hint}")


def read_groups(path: str | Path) -> GroupReader:
    """Iterate over the groups of a store; pixels are read only when they are needed.

    Args:
        path: A store (a folder with `trajectories/`), its `trajectories` folder, or one file.

    Returns:
        An iterator of `Group`; its `bad_lines` lists the lines that were skipped.

    Raises:
        DataError: There are no files, or a line has a newer schema.
    """
    return GroupReader(find_files(path))


FLAT_COLUMNS: dict[str, type] = {
    **dict.fromkeys(("iteration", "sample", "policy_version", "turns", "tool_calls", "images"), int),
    **dict.fromkeys(("tokens", "sampled_tokens"), int),
    **dict.fromkeys(("task_id", "kind", "data_source", "question", "ground_truth", "required_transforms"), str),
    **dict.fromkeys(("end_state", "answer", "operations", "text", "code"), str),
    "correct": bool,
    **dict.fromkeys(("reward", "advantage", "logprob_mean", "generate_s", "tool_s", "total_s"), float),
}
"""Columns of `to_dataframe` and their types, without the reward components; None stands for an unknown value."""


def to_dataframe(groups: Iterable[Group]) -> pd.DataFrame:
    """One row per trajectory: task, outcome, reward components (`reward/<name>`), lengths and tool use.

    `turns`, `tool_calls` and `images` are counts, times are seconds; `required_transforms` is joined by `+`,
    `operations` by spaces.
    """
    import pandas as pd

    return pd.DataFrame([flat_row(group, trajectory) for group in groups for trajectory in group.trajectories])


def flat_row(group: Group, trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as scalars: `FLAT_COLUMNS` and the reward components."""
    task, reward, tokens = group.task, trajectory.reward, trajectory.tokens
    row: dict[str, Any] = {
        "iteration": group.iteration,
        "task_id": task.id,
        "sample": trajectory.sample,
        "kind": task.kind,
        "data_source": task.data_source,
        "question": task.question,
        "ground_truth": task.ground_truth,
        "required_transforms": "+".join(task.required_transforms),
        "end_state": trajectory.end_state.value,
        "answer": trajectory.answer,
        "correct": reward.correct if reward else None,
        "reward": reward.total if reward else None,
        "advantage": trajectory.advantage,
        "turns": len(trajectory.turns),
        "tool_calls": trajectory.num_tool_calls,
        "operations": " ".join(op.name for op in trajectory.operations),
        "images": len(trajectory.images),
        "tokens": tokens.num_tokens,
        "sampled_tokens": tokens.num_sampled_tokens,
        "logprob_mean": tokens.logprob.mean if tokens.logprob else None,
        "policy_version": trajectory.policy_version,
        "generate_s": sum(turn.generate_s for turn in trajectory.turns),
        "tool_s": sum(turn.tool_s for turn in trajectory.turns),
        "total_s": trajectory.total_s,
        "text": trajectory.response_text,
        "code": "\n".join(turn.tool_call.code for turn in trajectory.turns if turn.tool_call),
    }
    return in_utf8(row) | {f"reward/{name}": value for name, value in (reward.components if reward else {}).items()}


def in_utf8(row: dict[str, Any]) -> dict[str, Any]:
    """The row with lone surrogates, which a model may write and UTF-8 lacks, in their backslash form."""
    return {
        name: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for name, value in row.items()
    }
