"""The local sweep runner with a command that takes no time; and its commands against those of W&B's own agent."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cv_lightning.__main__ import agent_arguments
from cv_lightning.commands.sweep import MAX_FIRST_FAILURES, fill_command, main, read_sweep
from cv_lightning.types import DataError

pytest.importorskip("optuna", reason="no Optuna: pip install 'cv-lightning[sweep]'")
SWEEPS = sorted((Path(__file__).parents[2] / "configs" / "sweeps").glob("*.yaml"))
JOB = """
import pathlib, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
folder, x = pathlib.Path(flags["trainer.default_root_dir"]), float(flags["x"])
if flags.get("kind") == "bad":
    sys.exit("this kind is bad")
rows = [f"{i},{(x - 0.3) ** 2}" for i in range(1, 5)]
for number in range(1, 5):
    (folder / "metrics.csv").write_text("step,loss\\n" + "\\n".join(rows[:number]) + "\\n")
    if flags.get("slow"):
        (folder / "started").write_text("")
        time.sleep(30)
"""


def sweep_file(folder: Path, job: str = JOB, **changes: Any) -> Path:
    (folder / "job.py").write_text(job)
    content = {
        "method": "random",
        "metric": {"name": "loss"},
        "parameters": {"x": {"min": 0.0, "max": 1.0}},
        "command": ["${env}", "${interpreter}", str(folder / "job.py"), "${args}"],
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def trials(out: Path, *states: str) -> list[dict[str, str]]:
    with (out / "sweep.csv").open() as file:
        return [row for row in csv.DictReader(file) if not states or row["state"] in states]


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_resumed_sweep_keeps_its_trials_and_draws_new_values(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = sweep_file(tmp_path, method=method), tmp_path / "out"
    assert main([str(path), "--count", "2", "--out", str(out)]) == 0
    first = trials(out)
    assert main([str(path), "--count", "4", "--out", str(out)]) == 0
    found = trials(out, "COMPLETE")
    assert found[:2] == first and len({row["params_x"] for row in found}) == len(found) == 4
    assert all(float(row["value"]) == pytest.approx((float(row["params_x"]) - 0.3) ** 2) for row in found)
    assert main([str(path), "--count", "2", "--out", str(out), "--set", "y=1"]) == 2
    assert "give another --out" in capsys.readouterr().err


def test_failed_trials_are_shown_and_run_again_by_the_next_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = sweep_file(tmp_path, JOB.replace("if flags", "if x > 0.6 or flags")), tmp_path / "out"
    arguments = [str(path), "--count", "6", "--out", str(out)]
    assert main(arguments) == 0
    failed = trials(out, "FAIL")
    assert 0 < len(failed) < 6 and "failed: exit code 1: this kind is bad" in capsys.readouterr().out
    (tmp_path / "job.py").write_text(JOB)
    assert main(arguments) == 0
    found = trials(out, "COMPLETE")
    assert len(found) == 6 and {row["params_x"] for row in failed} < {row["params_x"] for row in found}


def test_sweep_whose_first_trials_all_fail_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = sweep_file(tmp_path), tmp_path / "out"
    assert main([str(path), "--count", "9", "--out", str(out), "--set", "kind=bad"]) == 2
    assert len(trials(out, "FAIL")) == MAX_FIRST_FAILURES
    assert f"the first {MAX_FIRST_FAILURES} trials failed; the last: exit code 1: this kind" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_sweep_and_trial_which_is_run_again(tmp_path: Path, number: signal.Signals) -> None:
    path, out = (
        sweep_file(tmp_path, parameters={"x": {"min": 0.0, "max": 1.0}, "slow": {"value": "yes"}}),
        tmp_path / "out",
    )
    command = [sys.executable, "-m", "cv_lightning", "sweep", str(path), "--count", "1", "--out", str(out)]
    with subprocess.Popen(command) as process:
        while not (out / "trial-000" / "started").exists():
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    assert not subprocess.run(["pgrep", "-f", str(tmp_path / "job.py")], capture_output=True).stdout
    (tmp_path / "job.py").write_text(JOB.replace('"slow"', '"slower"'))
    assert main(command[4:]) == 0
    before, after = trials(out)
    assert (before["state"], after["state"]) == ("FAIL", "COMPLETE") and before["params_x"] == after["params_x"]


def test_trial_that_falls_behind_is_stopped_early(tmp_path: Path) -> None:
    job = JOB.replace("range(1, 5):\n", "range(1, 5):\n    time.sleep(0.3)\n").replace("(x - 0.3) ** 2", "x")
    stop = {"type": "hyperband", "min_iter": 1, "eta": 2}
    path, out = sweep_file(tmp_path, job, early_terminate=stop), tmp_path / "out"
    assert main([str(path), "--count", "3", "--out", str(out)]) == 0
    finished, stopped = (trials(out, state) for state in ("COMPLETE", "PRUNED"))
    assert stopped and min(float(row["params_x"]) for row in finished) < min(float(row["params_x"]) for row in stopped)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "grid"}, "method: grid"),
        ({"parameters": {"model": {"parameters": {"lr": {"value": 1}}}}}, "parameters.model"),
        ({"parameters": {"betas": {"values": [[0.9, 0.98]]}}}, "parameters.betas"),
        ({"parameters": {"x": {"distribution": "q_beta", "min": 0, "max": 1}}}, "parameters.x"),
        ({"early_terminate": {"type": "envelope"}}, "type: envelope"),
        ({"scheduler": {"type": "x"}}, "scheduler"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_sweep_key_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = sweep_file(tmp_path, **changes)
    with pytest.raises(DataError) as refused:
        read_sweep(path)
    assert f"`{said}` is not supported" in str(refused.value) and f"`wandb sweep {path}`" in str(refused.value)


def test_old_metric_is_refused_with_its_new_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="greedy/must_use is called greedy/tool_use_success now"):
        read_sweep(sweep_file(tmp_path, metric={"name": "greedy/must_use"}))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweep_commands_equal_those_of_wandb(path: Path) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

    config = load_sweep_config(str(path))
    sweep = read_sweep(path)
    assert config is not None and set(config["parameters"]) == {*sweep["searched"], *sweep["constants"]}
    values = {name: spec.get("value", spec.get("min", True)) for name, spec in config["parameters"].items()}
    macros = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    macros |= {"interpreter": [sys.executable], "env": []}
    expected: list[str] = []
    for word in create_sweep_command(config["command"]):
        expected += macros[word[2:-1]] if word.startswith("${") else [word]
    assert fill_command(sweep["command"], values) == expected
    assert expected[1:4] == ["-m", "cv_lightning", "fit"]


def test_argument_of_wandb_agent_is_removed() -> None:
    agent = {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r1"}
    given = ["fit", "--config", "a.yaml", "--_wandb={'x': 1}", "--model.lr=1"]
    kept = ["fit", "--config", "a.yaml", "--model.lr=1"]
    assert agent_arguments(given, agent) == [*kept, "--trainer.default_root_dir=runs/sweeps/s1/r1"]
    own = [*kept, "--trainer.default_root_dir=here"]
    assert agent_arguments(own, agent) == own


def test_help_imports_no_heavy_package() -> None:
    code = "import sys; from cv_lightning.commands.sweep import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'matplotlib', 'wandb', 'pandas'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
