"""Files of a run that is resumed: which checkpoint is the last, and what of metrics and trajectories stands."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from trajectory_samples import digit_task, group

from cv_lightning.callbacks.checkpoint import CheckpointCallback, check_fits, restore_rng, rng_state
from cv_lightning.checkpoints.folder import last_checkpoint, refuse_used, rewind
from cv_lightning.loggers import run_loggers
from cv_lightning.loggers.metrics_file import MetricsLogger
from cv_lightning.trajectory import read_groups
from cv_lightning.trajectory.store import TrajectoryWriter, drop_after
from cv_lightning.types import CVLightningError


def checkpoint(run: Path, iteration: int) -> Path:
    path = run / "checkpoints" / f"iteration{iteration:06d}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"iteration": iteration}, path)
    return path


def test_the_last_checkpoint_is_the_newest_whole_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    refuse_used(tmp_path)
    nine, ten = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    (tmp_path / "checkpoints" / ".unfinished-iteration000011.ckpt").write_bytes(b"half")
    (tmp_path / "checkpoints" / "best.ckpt").write_bytes(b"of another callback")
    assert last_checkpoint(tmp_path) == ten
    ten.write_bytes(ten.read_bytes()[:100])
    assert last_checkpoint(tmp_path) == nine
    sharded = tmp_path / "checkpoints" / "iteration000012.ckpt"
    (sharded / "checkpoint").mkdir(parents=True)
    assert last_checkpoint(tmp_path) == nine, "DeepSpeed writes `latest` when all else is there"
    (sharded / "latest").write_text("checkpoint")
    assert last_checkpoint(tmp_path) == sharded
    with pytest.raises(CVLightningError, match=r"iteration 12.*--ckpt_path last"):
        refuse_used(tmp_path)


def test_a_checkpoint_fits_its_own_strategy_and_number_of_ranks(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1).parent / "iteration000002.ckpt"
    (folder / "checkpoint").mkdir(parents=True)
    for rank in range(2):
        (folder / "checkpoint" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    plain = folder.with_name("iteration000001.ckpt")
    check_fits(folder, trainer(DeepSpeedStrategy(), 2))
    with pytest.raises(CVLightningError, match=r"optimizer of 2 ranks, this run has 4.*--trainer\.devices"):
        check_fits(folder, trainer(DeepSpeedStrategy(), 4))
    check_fits(plain, trainer(DDPStrategy(), 4))
    with pytest.raises(CVLightningError, match=r"folder of DeepSpeed, --trainer\.strategy is DDPStrategy"):
        check_fits(folder, trainer(DDPStrategy(), 2))
    with pytest.raises(CVLightningError, match=r"plain file, --trainer\.strategy is DeepSpeedStrategy"):
        check_fits(plain, trainer(DeepSpeedStrategy(), 4))


def trainer(strategy: Strategy, world_size: int) -> Any:
    return SimpleNamespace(strategy=strategy, world_size=world_size)


def test_an_older_checkpoint_rewinds_the_run(tmp_path: Path) -> None:
    for iteration in (2, 4, 6):
        checkpoint(tmp_path, iteration)
    rewind(tmp_path, 4)
    assert last_checkpoint(tmp_path) == checkpoint(tmp_path, 4)


def test_random_generators_are_restored(tmp_path: Path) -> None:
    import random

    import numpy as np

    torch.save(rng_state(), tmp_path / "rng")
    drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))
    restore_rng(torch.load(tmp_path / "rng", weights_only=True))
    assert drawn == (random.random(), float(np.random.rand()), float(torch.rand(())))


@pytest.mark.parametrize("wrong", [{"every_minutes": 0.0}, {"every_iterations": -1}, {"keep": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CheckpointCallback(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- metrics.csv
def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_metrics_continue_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsLogger(tmp_path)
    for step in range(4):
        first.log_metrics({"loss": torch.tensor(0.5 + step)}, step)
    first.log_metrics({"val/accuracy": 0.25}, 3)
    with path.open("a") as file:
        file.write("9.5,4")  # torn: neither all columns nor an end of line
    assert [row["val/accuracy"] for row in rows(path)[:5]] == ["", "", "", "", "0.25"]

    resumed = MetricsLogger(tmp_path)
    resumed.rewind(2, {"loss": 7.0})
    assert [(row["step"], row["loss"]) for row in rows(path)] == [("0", "0.5"), ("1", "1.5"), ("2", "2.5")]
    resumed.log_metrics({"loss": 8.0, "lr": 0.1}, 3)
    assert [(row["step"], row["loss"], row["lr"]) for row in rows(path)][-2:] == [("2", "2.5", ""), ("3", "8.0", "0.1")]


def test_a_row_lost_to_a_kill_is_restored_from_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    MetricsLogger(tmp_path).log_metrics({"loss": 0.5}, 0)
    MetricsLogger(tmp_path).rewind(1, {"loss": 1.5})
    assert [(row["step"], row["loss"]) for row in rows(path)] == [("0", "0.5"), ("1", "1.5")]


def test_a_new_run_replaces_metrics(tmp_path: Path) -> None:
    MetricsLogger(tmp_path).log_metrics({"loss": 0.5}, 0)
    MetricsLogger(tmp_path).log_metrics({"loss": 1.5}, 0)
    assert [row["loss"] for row in rows(tmp_path / "metrics.csv")] == ["1.5"]


# ---------------------------------------------------------------------------------------------- trajectories
def test_trajectories_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    for rank, iterations in enumerate([(1, 1, 2, 3), (1, 2), (2, 3, 3)]):
        with TrajectoryWriter(tmp_path, rank=rank) as writer:
            for iteration in iterations:
                writer.write_group(group(digit_task(0, "upright")), iteration)
            path = writer.path
    with path.open("ab") as file:
        file.write(b'{"schema": 2, "iteration": 3, "torn')
    dropped = drop_after(tmp_path, 2)
    assert {path.name: count for path, count in dropped.items()} == {"groups.rank0.jsonl": 1, "groups.rank2.jsonl": 2}
    left = read_groups(tmp_path)
    assert [group.iteration for group in left] == [1, 1, 2, 1, 2, 2] and not left.bad_lines
    assert drop_after(tmp_path, 2) == {}
    drop_after(tmp_path, 0)
    assert list(read_groups(tmp_path)) == []
    assert drop_after(tmp_path / "nowhere", 0) == {}


def test_a_test_in_a_runs_folder_leaves_its_curves_unchanged(tmp_path: Path) -> None:
    MetricsLogger(tmp_path).log_metrics({"loss": 0.5}, 0)
    before = (tmp_path / "metrics.csv").read_text()
    found = run_loggers(None, tmp_path, "test")
    assert isinstance(found, list)
    found[0].log_metrics({"greedy/accuracy": 0.5}, 0)
    assert (tmp_path / "metrics.csv").read_text() == before
    assert "greedy/accuracy" in (tmp_path / "test_metrics.csv").read_text()
