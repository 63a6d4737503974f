"""The newcomer's command, small: every stage really runs, and what it leaves is what the README says."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from digests import assert_recorded, run_digest, smoke_digest
from PIL import Image

from cv_lightning.digits.quickstart import scene_flags

ROOT = Path(__file__).parents[2]
KEEP_ALL = ["--rollout.store", "{share: 1.0, tokens: true}"]
SETTINGS = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}


def quickstart(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cv_lightning", "quickstart", "--smoke", "--out", str(out), *flags]
    return subprocess.run(command, cwd=ROOT, env=SETTINGS, capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a smoke run with the ablation; scripts/test.sh keeps it for the notebooks."""
    folder = Path(os.environ.get("CVL_SMOKE_RUN") or tmp_path_factory.mktemp("quickstart") / "run")
    done = quickstart(folder, "--ablation", "--seed", "3")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "report.html" in done.stdout
    return folder


def test_every_stage_writes_its_result(run: Path) -> None:
    timing = json.loads((run / "timing.json").read_text())
    stages = {"tiny", "sft", "sft_eval", "rl", "rl_eval", "rl_accuracy", "rl_accuracy_eval", "summary", "report"}
    assert set(timing) == stages | {"seed", "ranks", "smoke", "task"} and (timing["seed"], timing["ranks"]) == (3, 1)
    for stage in ("sft", "rl", "rl_accuracy"):
        assert (run / stage / "model" / "model.safetensors").is_file()
        assert (run / stage / "fit_config.yaml").is_file()
        record = json.loads((run / stage / "fit_run.json").read_text())
        assert record["versions"]["transformers"] and record["status"] == "finished" and record["changed"]["model"]


def test_summary_has_the_promised_figures(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["seed"] == 3 and summary["minutes"] > 0
    assert 0 < summary["mismatch_max"] < 1e-4
    figures = {"accuracy", "tool_use_success", "spurious", "accuracy_upright", "accuracy_tool_off", "by_kind"}
    for stage in ("sft_sampled", "sft", "rl_sampled", "rl", "rl_accuracy", "rl_accuracy_sampled"):
        assert set(summary[stage]) == figures
        assert set(summary[stage]["by_kind"]) == {"upright", "turned", "small", "turned_and_small"}


def test_evaluations_store_every_trajectory(run: Path) -> None:
    for stage in ("sft", "rl", "rl_accuracy"):
        for mode in ("greedy", "sampled"):
            for tool in ("tool", "notool"):
                folder = run / "eval" / f"{stage}_{mode}_{tool}"
                lines = [line for path in folder.glob("trajectories/*.jsonl") for line in path.read_text().splitlines()]
                assert len(lines) == 8, folder
                assert json.loads((folder / "metrics.json").read_text())["num_trajectories"] == 8


def test_training_logs_its_metrics(run: Path) -> None:
    rows = list(csv.DictReader((run / "rl" / "metrics.csv").open()))
    assert [float(row["iteration"]) for row in rows] == [1.0, 2.0]
    for name in (
        "reward/total",
        "reward/accuracy",
        "reward/mandatory",
        "rollout/tool_use_success",
        "policy/mismatch_max",
    ):
        assert rows[0][name] != "", name
    assert all(float(row["policy/mismatch_max"]) < 1e-4 for row in rows)
    sft = list(csv.DictReader((run / "sft" / "metrics.csv").open()))
    assert len(sft) == 6 and float(sft[-1]["sft/loss"]) < float(sft[0]["sft/loss"])


# ------------------------------------------------------------------------------------------------ recorded values
def test_run_equals_the_recorded_values(run: Path) -> None:
    """Metrics, evaluations, trajectories and weights, as tests/fixtures/smoke.json.gz has them."""
    assert_recorded(smoke_digest(run))


def assert_engine_and_trainer_agree(policy: Path, out: Path, family: str, *flags: str) -> None:
    """GRPO of a policy too young to earn anything: regularised, all its trajectories count, and its weights change."""
    command = [sys.executable, "-m", "cv_lightning", "fit", "--config", "configs/quickstart/grpo.yaml"]
    command += ["--trainer.default_root_dir", str(out), "--model.init_args.policy.path", str(policy)]
    command += ["--model.init_args.algorithm.kl.weight", "0.01", "--model.init_args.algorithm.entropy_weight", "0.01"]
    command += ["--model.init_args.optimizer.warmup_steps", "0"]
    command += ["--data.init_args.num_iterations", "3", "--data.init_args.tasks_per_iteration", "2"]
    command += [*scene_flags(family, "data.init_args."), *flags]
    done = subprocess.run(command, cwd=ROOT, env=SETTINGS, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert len(rows) == 3
    for row in rows:
        assert float(row["policy/trajectories"]) > 0
        assert 0 < float(row["policy/mismatch_max"]) <= 1e-4
        assert float(row["policy/kl_to_reference"]) > 1e-6  # the weights do change


def test_engine_and_trainer_agree_at_every_iteration(run: Path, tmp_path: Path) -> None:
    assert_engine_and_trainer_agree(run / "sft" / "model", tmp_path / "run", "qwen3_vl", *KEEP_ALL)
    assert_recorded({"parity": run_digest(tmp_path / "run")})  # token by token


@pytest.mark.slow
def test_qwen25_runs_every_stage(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = quickstart(folder, "--model", "qwen2_5_vl")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    timing = json.loads((folder / "timing.json").read_text())
    stages = {"tiny", "sft", "sft_eval", "rl", "rl_eval", "summary", "report"}
    assert set(timing) == stages | {"seed", "ranks", "smoke", "task"}
    for stage in ("tiny", "sft/model", "rl/model"):
        assert json.loads((folder / stage / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    losses = [float(row["sft/loss"]) for row in csv.DictReader((folder / "sft" / "metrics.csv").open())]
    assert len(losses) == 6 and losses[-1] < losses[0]
    summary = json.loads((folder / "summary.json").read_text())
    for stage in ("sft", "rl"):
        assert set(summary[stage]["by_kind"]) == {"upright", "turned", "small", "turned_and_small"}
        shown = [Image.open(path).size for path in (folder / "eval" / f"{stage}_greedy_tool").rglob("*.png")]
        assert {(84, 84), (336, 336)} <= set(shown)
    assert (folder / "report.html").is_file()
    assert_engine_and_trainer_agree(folder / "sft" / "model", tmp_path / "mismatch", "qwen2_5_vl")


def test_report_loads_nothing_from_elsewhere(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "<html" in page and len(page) > 20_000
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_finished_stages_are_not_run_again(run: Path) -> None:
    before = (run / "rl" / "metrics.csv").stat().st_mtime
    done = quickstart(run, "--ablation", "--seed", "3")
    assert done.returncode == 0 and "done before" in done.stdout
    assert (run / "rl" / "metrics.csv").stat().st_mtime == before
    other = quickstart(run, "--seed", "4")
    assert other.returncode == 2 and "--seed 3" in other.stderr
    other = quickstart(run, "--seed", "3", "--model", "qwen2_5_vl")
    assert other.returncode == 2 and "--model qwen3_vl" in other.stderr


# ------------------------------------------------------------------------------------------------ Ctrl-C
@pytest.fixture
def training(run: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A GRPO run during its rollouts."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "cv_lightning", "fit", "--config", "configs/quickstart/grpo.yaml"]
    command += [
        "--trainer.default_root_dir",
        str(tmp_path / "run"),
        "--model.init_args.policy.path",
        str(run / "sft/model"),
    ]
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=SETTINGS,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )
    deadline = time.monotonic() + 240
    while "engine and trainer agree" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)
    yield process, log
    process.kill()
    process.wait()


def test_ctrl_c_in_a_rollout_ends_cleanly(training: tuple[subprocess.Popen[str], Path]) -> None:
    process, log = training
    time.sleep(1.0)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children  # the sandbox's fork servers at least
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert process.returncode in (1, 130)
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_measuring_task_runs_every_stage_with_text_and_with_images_only(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = quickstart(folder, "--task", "measure", "--ablation")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    summary = json.loads((folder / "summary.json").read_text())
    for stage in ("sft", "rl", "sft_images", "rl_images"):
        assert set(summary[stage]["by_kind"]) == {"width", "ink", "shade", "difference"}
        for store in (folder / "eval" / f"{stage}_greedy_notool").glob("trajectories/*.jsonl"):
            texts = [json.loads(line)["trajectories"][0]["turns"][0]["text"] for line in store.read_text().splitlines()]
            assert len(texts) == 8 and all(text.startswith("<think>read</think><answer>") for text in texts)
    assert "SFT, no text" in (folder / "report.html").read_text()
