"""Runs that are told to stop, that find their folder in use, or whose disk is full or read-only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
from export_samples import ROOT, fit_in_process
from lightning.pytorch.trainer.states import TrainerFn
from resume_samples import Run, rows, state, write_grpo, write_sft

from cv_lightning.callbacks import signals
from cv_lightning.callbacks.signals import StopOnSignal, Stopped
from cv_lightning.checkpoints.folder import last_checkpoint


# ------------------------------------------------------------------------------------------------ signals and the lock
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM], ids=lambda number: number.name)
def test_signal_saves_a_checkpoint_and_sets_the_exit_code(
    tiny_checkpoint: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    config = write_sft(tmp_path / "sft.yaml", tiny_checkpoint, steps=10_000, every=0)
    run = Run(config, folder)
    run.wait_for(lambda: len(rows(folder)) >= 3)
    if number is signal.SIGTERM:  # while it runs: a second one finds its lock
        said = Run(config, folder).finish(expect=1)
        assert f"process {run.process.pid} on host" in said and "--take_over true" in said
        assert run.exit_code is None
    run.signal(number)
    said = run.finish(expect=128 + number)
    assert f"{number.name}: finishing the iteration" in said and "Traceback" not in said
    done = float(rows(folder)[-1]["iteration"])
    assert state(folder)["iteration"] == done >= 3
    assert json.loads((folder / "fit_run.json").read_text())["status"] == f"stopped by {number.name}"
    assert not list(folder.glob(".owner*")), "the next run finds no lock"
    assert [float(row["iteration"]) for row in rows(folder)] == list(range(1, int(done) + 1)), "each iteration once"


class Ended(Exception):
    """Stands for the end of the process."""


def test_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(signals, "end_process", end)
    # An earlier fit in this process that ended in an error leaves Lightning's own handler.
    before = signal.getsignal(signal.SIGTERM)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[StopOnSignal()])
    trainer.state.fn = TrainerFn.FITTING
    stop = StopOnSignal.of(trainer)
    assert stop is not None
    stop.on_train_start(trainer, pl.LightningModule())
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked == signal.SIGHUP and not stop.is_agreed
        with pytest.raises(Ended, match="143"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        stop.on_train_batch_end(trainer, pl.LightningModule(), None, None, 0)
        with pytest.raises(Stopped) as stopped:
            stop.on_train_batch_start(trainer, pl.LightningModule(), None, 1)
        assert stopped.value.code == 129
    finally:
        stop.teardown(trainer, pl.LightningModule(), "fit")
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_ignored_signal_stays_ignored() -> None:
    code = (
        "import signal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does\n"
        "from cv_lightning.callbacks.signals import exit_codes\n"
        "with exit_codes():\n"
        "    signal.raise_signal(signal.SIGHUP)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr


def answered(folder: Path) -> Counter[str]:
    lines = (line for path in folder.glob("trajectories/*.jsonl") for line in path.open())
    return Counter(json.loads(line)["task"]["id"] for line in lines if line.endswith("\n"))


def test_signal_stops_an_evaluation_within_5_s_and_it_resumes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = write_grpo(tmp_path / "grpo.yaml", tiny_checkpoint, iterations=1)
    folder, tasks = tmp_path / "run", 120
    flags = ["--data.init_args.test_tasks", f"{{upright: {tasks}}}"]
    run = Run(config, folder, *flags, verb="test")
    run.wait_for(lambda: sum(answered(folder / "eval" / "greedy").values()) >= 3)
    asked = time.monotonic()
    run.signal(signal.SIGTERM)
    said = run.finish(expect=143)
    assert time.monotonic() - asked < 5
    assert "stopped; the same command continues" in said and "Traceback" not in said
    before = answered(folder / "eval" / "greedy")
    assert 3 <= sum(before.values()) < tasks
    said = Run(config, folder, *flags, verb="test").finish()
    assert f"{len(before)} questions were answered before" in said
    assert answered(folder / "eval" / "greedy") == Counter(dict.fromkeys(answered(folder / "eval" / "greedy"), 1))
    assert len(answered(folder / "eval" / "greedy")) == tasks


# ------------------------------------------------------------------------------------------------ damaged checkpoints
@pytest.fixture(scope="module")
def sft_run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished SFT run of two steps, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    return fit_in_process(tiny_checkpoint, folder, "--checkpoint.every_iterations=1", "--checkpoint.keep=2")


def test_damaged_checkpoint_is_skipped_for_the_earlier_one(
    sft_run: Path, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = last_checkpoint(sft_run)
    assert newest is not None and newest.name == "iteration000002.ckpt"
    with newest.open("r+b") as file:
        file.seek(newest.stat().st_size // 2)
        file.write(bytes(65_536))
    fit_in_process(tiny_checkpoint, sft_run, "--ckpt_path=last")
    assert "iteration000002.ckpt is damaged" in caplog.text
    assert [float(row["iteration"]) for row in rows(sft_run)] == [1, 2]
    assert last_checkpoint(sft_run) == newest, "written again"


def test_damaged_by_a_resume_with_another_recipe_is_no_run(
    sft_run: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cv_lightning.cli import main

    before = {path: path.stat().st_mtime_ns for path in sft_run.rglob("*") if path.is_file()}
    config = write_grpo(tmp_path / "grpo.yaml", tiny_checkpoint, iterations=9)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(config), f"--trainer.default_root_dir={sft_run}", "--ckpt_path=last"])
    said = str(stopped.value.code)
    assert "written by SFTModule on DigitSFTDataModule, this config trains GRPOModule on DigitTaskDataModule" in said
    assert "Changed settings: " in said
    assert before == {path: path.stat().st_mtime_ns for path in sft_run.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------ disk
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB: the run's texts fit, a checkpoint of 30 MB does not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def one_error(said: str) -> str:
    """The only error line of an output without tracebacks."""
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in said and "Logging error" not in said, said[-3000:]
    return errors[0]


def test_disk_full_at_a_checkpoint_is_one_line_and_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, small_disk: Path
) -> None:
    config = write_sft(tmp_path / "sft.yaml", tiny_checkpoint, steps=4)
    said = one_error(Run(config, small_disk).finish(expect=1))
    assert "iteration000002.ckpt cannot be written" in said and "--ckpt_path last" in said
    assert list((small_disk / "checkpoints").iterdir()) == [] and not list(small_disk.rglob("*.tmp"))


def test_disk_full_at_the_start_and_read_only_disk_are_one_line(
    tiny_checkpoint: Path, tmp_path: Path, small_disk: Path
) -> None:
    config = write_sft(tmp_path / "sft.yaml", tiny_checkpoint, steps=4)
    (small_disk / "filler").write_bytes(b"x" * (4 << 20))
    said = one_error(Run(config, small_disk).finish(expect=1))
    assert "No space left on device" in said
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    small_disk.with_suffix(".log").unlink()
    said = one_error(Run(config, small_disk).finish(expect=1))
    assert "Read-only file system" in said and list(small_disk.iterdir()) == []


def test_disk_full_or_read_only_at_an_export_is_one_line(
    sft_run: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cv_lightning.commands.export import main

    for _ in range(2):
        assert main(["--ckpt", str(sft_run), "--out", str(small_disk / "model"), "--verify", "false"]) == 2
        assert "--out cannot be written" in one_error(capsys.readouterr().err)
        assert list(small_disk.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)


def test_disk_has_the_metrics_before_the_checkpoint_has_its_name(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cv_lightning.cli import main

    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def record_replace(source: str, target: str) -> None:
        calls.append(f"renamed {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    config = write_grpo(tmp_path / "grpo.yaml", tiny_checkpoint, iterations=2)
    folder = tmp_path / "run"
    main(["fit", "--config", str(config), f"--trainer.default_root_dir={folder}"])
    order = calls[: calls.index("renamed iteration000002.ckpt")]
    assert {"metrics.csv", "groups.rank0.jsonl", "trajectories", "images"} <= set(order)
    assert order[-1] == ".unfinished-iteration000002.ckpt"
    assert calls[len(order) + 1] == "checkpoints"
    assert [row["iteration"] for row in rows(folder)][:2] == ["1.0", "2.0"]


# ------------------------------------------------------------------------------------------------ locale
def test_ascii_locale_reads_and_prints_a_config_with_other_characters(tmp_path: Path) -> None:
    config = tmp_path / "größe.yaml"
    config.write_text("trainer: {default_root_dir: läufe/数}\n", encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "cv_lightning", "fit", "--config", str(config), "--print_config"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    assert "läufe/数" in done.stdout.decode("utf-8")
