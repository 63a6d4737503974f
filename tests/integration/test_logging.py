"""A run's metrics, trajectories, config and messages where they belong: W&B (offline), TensorBoard, CSV, log file."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))
from trajectory_samples import KINDS, Policy, digit_task, group
from wandb_file import config, records, rows

from cv_lightning.callbacks.wandb import WandbTrajectories
from cv_lightning.cli import ConfigOnly
from cv_lightning.cli import main as cli_main
from cv_lightning.loggers import TensorBoardRun, run_loggers
from cv_lightning.loggers.metrics_file import MetricsLogger
from cv_lightning.loggers.wandb import PROGRESS_FILE, WandbRun, rows_of, stratified
from cv_lightning.trajectory import TrajectoryWriter

ROOT = Path(__file__).parents[2]


class Done(NamedTuple):
    """A finished fit of three iterations."""

    folder: Path
    said: str
    """On stderr."""
    wandb: Path
    """Its `.wandb` file."""


@pytest.fixture(scope="module")
def done(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("logged") / "a rün"
    rollout, logger = "--rollout.", "--trainer.logger.init_args."
    command = [sys.executable, "-m", "cv_lightning", "fit", "--quiet"]
    command += ["--config", "configs/quickstart/grpo.yaml", "--config", "configs/logger/wandb.yaml"]
    command += ["--trainer.default_root_dir", str(folder), "--model.init_args.policy.path", str(tiny_checkpoint)]
    command += ["--data.init_args.num_iterations", "3", "--data.init_args.tasks_per_iteration", "4"]
    command += [f"{rollout}num_samples", "2", f"{rollout}engine.kind", "transformers"]
    command += [f"{rollout}agent.max_turn_tokens", "16"]
    command += [f"{logger}table_every", "2", f"{logger}table_rows", "5", f"{logger}log_checkpoints", "true"]
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DATA_DIR": str(folder.parent), "WANDB_SILENT": "true"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    return Done(folder, run.stderr, file)


def test_wandb_has_every_metric_once_over_iterations(done: Done) -> None:
    history = [row for row in rows(done.wandb) if "reward/total" in row]
    assert [row["iteration"] for row in history] == [1, 2, 3]
    with (done.folder / "metrics.csv").open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == 3
    for row, line in zip(history, written, strict=True):
        figures = {name: value for name, value in line.items() if value and name not in ("step", "epoch")}
        assert {name: float(value) for name, value in figures.items()} == {
            name: pytest.approx(row[name], nan_ok=True) for name in figures
        }
        assert all("/" in name for name in figures if name != "iteration")
    axes = [r.metric for r in records(done.wandb) if r.WhichOneof("record_type") == "metric" and r.metric.glob_name]
    assert (axes[-1].glob_name, axes[-1].step_metric) == ("*", "iteration")


def test_wandb_has_the_whole_config(done: Done) -> None:
    found = config(done.wandb)
    resolved = yaml.safe_load((done.folder / "fit_config.yaml").read_text())
    assert {name: found[name] for name in resolved} == resolved
    assert found["data"]["init_args"]["tasks_per_iteration"] == 4
    assert {"commit", "command", "versions", "python"} <= found["run"].keys()
    assert {"torch", "lightning", "transformers"} <= found["run"]["versions"].keys()
    settings = found["run"]["settings"]
    algorithm = settings["GRPOModule"]["algorithm"]
    assert algorithm["advantage"] == "GRPO(epsilon=1e-06)", "defaults are told, too"
    assert algorithm["loss"] == "PPOClip(clip_low=0.2, clip_high=0.28, dual_clip=10.0)"


def test_wandb_has_tables_with_images_and_the_model(done: Done) -> None:
    kept = [record.artifact for record in records(done.wandb) if record.WhichOneof("record_type") == "artifact"]
    tables = [artifact for artifact in kept if artifact.type == "run_table"]
    for number, artifact in zip((1, 3), tables, strict=True):
        files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
        table = json.loads(files["train/trajectories.table.json"].read_text())
        data = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        assert len(data) == 5
        for row in data:
            assert row["iteration"] == number
            assert {"question", "answer", "correct", "code", "text", "reward", "reward/format"} <= row.keys()
            picture = row["image 0"]
            with Image.open(files[picture["path"]]) as image:
                assert image.size == (picture["width"], picture["height"])
    assert {artifact.type for artifact in kept} == {"run_table", "model"}
    assert any(entry.path == "model.safetensors" for artifact in kept for entry in artifact.manifest.contents)


def test_a_quiet_run_prints_little_and_logs_all(done: Done) -> None:
    assert "fit 3/3" not in done.said
    assert "engine and trainer agree" not in done.said
    assert "this run did not learn: " in done.said, "a warning, which is no chatter"
    log = (done.folder / "fit_log.txt").read_text()
    assert "cv_lightning" in log.splitlines()[0], "the command"
    assert "engine and trainer agree" in log
    assert "fit 3/3" in log
    assert "this run did not learn: " in log and "  report        `cv-lightning report" in log


@pytest.fixture
def offline(tmp_path: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DATA_DIR", str(tmp_path))

        def start(**options: Any) -> WandbRun:
            logger = WandbRun(mode="offline", id="same", **options)
            logger.write_to(tmp_path / "run")
            return logger

        yield start


def test_a_resumed_run_logs_nothing_twice(offline: Any, tmp_path: Path) -> None:
    """Killed after iteration 3, gone on with from a checkpoint of iteration 1."""
    for iterations in ((1, 2, 3), (2, 3, 4)):
        logger = offline()
        for iteration in iterations:
            logger.log_metrics({"iteration": float(iteration), "reward/total": iteration / 10}, step=iteration - 1)
        logger.log_metrics({"greedy/accuracy": 0.5})  # an evaluation stands at the last iteration
        logger.experiment.finish()
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    logged = [row for path in files for row in rows(path)]
    assert [row["iteration"] for row in logged if "reward/total" in row] == [1, 2, 3, 4]
    assert [row["iteration"] for row in logged if "greedy/accuracy" in row] == [3, 4]
    assert all("trainer/global_step" not in row for row in logged)
    assert json.loads((tmp_path / "run" / PROGRESS_FILE).read_text()) == {"same": 4}


def test_an_evaluation_becomes_a_table_and_an_artifact(offline: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer: Any = SimpleNamespace(default_root_dir=str(run), is_global_zero=True)
    logger = offline(log_evaluations=True, table_rows=3)
    callback = WandbTrajectories(logger)
    for name in ("before", "iteration000020_greedy"):
        with TrajectoryWriter(run / "eval" / name) as writer:
            for index in range(4):
                writer.write_group(group(digit_task(index, KINDS[index])), 0)
        (run / "eval" / name / "metrics.json").write_text("{}")
    os.utime(run / "eval" / "before" / "metrics.json", (0, 0))
    callback.on_test_end(trainer, None)  # type: ignore[arg-type]
    logger.experiment.finish()
    (path,) = (run / "wandb").glob("offline-run-*/*.wandb")
    assert {key.rpartition("/")[0] for row in rows(path) for key in row if key.startswith("eval")} == {"eval/greedy"}
    kept = [record.artifact for record in records(path) if record.WhichOneof("record_type") == "artifact"]
    table, evaluation = sorted(kept, key=lambda artifact: artifact.type, reverse=True)
    assert sum(entry.path.startswith("media/images") for entry in table.manifest.contents) >= 3
    paths = {entry.path for entry in evaluation.manifest.contents}
    assert evaluation.type == "evaluation"
    assert {"metrics.json", "trajectories/groups.rank0.jsonl"} < paths


def test_tensorboard_reads_what_is_logged(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = run_loggers(TensorBoardRun(), tmp_path)
    assert isinstance(found, list)
    assert isinstance(found[0], MetricsLogger), "the report reads metrics.csv whatever else there is"
    for logger in found:
        logger.log_metrics({"reward/total": 0.5}, step=7)
        logger.save()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/total")] == [(7, 0.5)]
    assert "reward/total" in (tmp_path / "metrics.csv").read_text()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's and jsonargparse's own
@pytest.mark.parametrize(("name", "kind"), [("wandb", "WandbRun"), ("tensorboard", "TensorBoardRun"), ("csv", None)])
def test_a_further_config_switches_the_logger(name: str, kind: str | None) -> None:
    arguments = ["fit", "--config", "configs/quickstart/grpo.yaml", "--config", "configs/logger/wandb.yaml"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        found = cli_main([*arguments, "--config", f"configs/logger/{name}.yaml"], ConfigOnly).as_dict()["trainer"]
    assert found["logger"] is True if kind is None else found["logger"]["class_path"].endswith(kind)


def test_tables_hold_every_outcome_and_transform() -> None:
    policy = Policy(turn=0.7, crop=0.7, read=0.7)
    rows = rows_of(group(digit_task(index, KINDS[index % 4]), 6, policy) for index in range(40))

    def strata(some: list[Any]) -> set[tuple[Any, ...]]:
        return {(row.trajectory.reward.correct, row.group.task.required_transforms) for row in some}

    rare = len(strata(rows))
    assert rare > 8
    assert strata(stratified(rows, rare)) == strata(rows)
    assert len(stratified(rows, rare)) == rare
    assert stratified(rows[::-1], 20) == stratified(rows, 20)
    assert len(stratified(rows, 1000)) == len(rows)
