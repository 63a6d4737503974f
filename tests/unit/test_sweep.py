"""The local sweep driver with a command that takes no time; and its commands against those of W&B's own agent."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cv_lightning.commands.sweep import FAIL_ALIKE, agent_arguments, main
from cv_lightning.commands.sweep_file import fill_command, read_sweep
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
    if x > 0.9 and flags.get("slow"):
        time.sleep(30 if number > 1 else 0)
"""


def sweep_file(folder: Path, **changes: Any) -> Path:
    (folder / "job.py").write_text(JOB)
    content = {
        "method": "grid",
        "metric": {"name": "loss"},
        "parameters": {
            "x": {"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.5},
            "kind": {"values": ["good", "bad"]},
        },
        "command": ["${env}", "${interpreter}", str(folder / "job.py"), "${args}"],
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "sweep.json").read_text())


def test_failed_trials_are_shown_and_finished_ones_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = sweep_file(tmp_path), tmp_path / "out"
    assert main([str(path), "--count", "2", "--out", str(out)]) == 0
    first = result(out)["trials"]
    assert len(first) == 2
    assert main([str(path), "--count", "99", "--out", str(out)]) == 0  # a grid has an end
    found = result(out)
    assert found["trials"][:2] == first and len(found["trials"]) == 6
    assert {(row["parameters"]["x"], row["parameters"]["kind"]) for row in found["trials"]} == {
        (x, kind) for x in (0.0, 0.5, 1.0) for kind in ("good", "bad")
    }
    assert found["failed"] == 3 and found["best"]["parameters"] == {"x": 0.5, "kind": "good"}
    assert found["best"]["value"] == pytest.approx(0.04)
    assert all(row["error"] == "exit code 1: this kind is bad" for row in found["trials"] if row["state"] == "failed")
    said = capsys.readouterr().out
    assert "2 trials were run before" in said and "this kind is bad" in said
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert main([str(path), "--count", "99", "--out", str(out)]) == 0
    assert len(result(out)["trials"]) == 6


def test_a_sweep_that_cannot_start_stops_and_goes_on_once_it_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = {"kind": {"value": "bad"}, "x": {"min": 0.0, "max": 1.0}}
    path, out = sweep_file(tmp_path, method="random", parameters=only), tmp_path / "out"
    assert main([str(path), "--count", "9", "--out", str(out)]) == 2
    assert len(result(out)["trials"]) == FAIL_ALIKE
    assert f"the first {FAIL_ALIKE} trials failed alike: exit code 1: this kind is bad" in capsys.readouterr().err
    parameters = [row["parameters"] for row in result(out)["trials"]]
    (tmp_path / "job.py").write_text(JOB.replace('== "bad"', '== "mended"'))
    assert main([str(path), "--count", "6", "--out", str(out), "--retry"]) == 0
    found = result(out)
    assert found["failed"] == 0 and len(found["trials"]) == 6
    assert [row["parameters"] for row in found["trials"]][:FAIL_ALIKE] == parameters
    with pytest.raises(SystemExit):
        main([str(path), "--count", "0", "--out", str(out)])
    assert "--count must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("count", [3, 6])
def test_failed_points_of_a_grid_are_tried_again(tmp_path: Path, count: int) -> None:
    points = {"kind": {"values": ["bad"]}, "x": {"values": [i / 10 for i in range(count)]}}
    path, out = sweep_file(tmp_path, parameters=points), tmp_path / "out"
    assert main([str(path), "--count", "9", "--out", str(out)]) == (2 if count > FAIL_ALIKE else 1)
    (tmp_path / "job.py").write_text(JOB.replace('== "bad"', '== "mended"'))
    assert main([str(path), "--count", "9", "--out", str(out), "--retry"]) == 0
    found = result(out)
    assert found["failed"] == 0 and sorted(row["parameters"]["x"] for row in found["trials"]) == points["x"]["values"]


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_going_on_draws_new_values(tmp_path: Path, method: str) -> None:
    path = sweep_file(tmp_path, method=method, parameters={"x": {"min": 0.0, "max": 1.0}})
    for count in (2, 4, 6):
        assert main([str(path), "--count", str(count), "--out", str(tmp_path / "out")]) == 0
    drawn = [row["parameters"]["x"] for row in result(tmp_path / "out")["trials"]]
    assert len(set(drawn)) == 6


def test_an_interrupted_trial_gets_another_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sweep_file(tmp_path, method="bayes", parameters={"x": {"min": 0.0, "max": 1.0}})
    out, arguments = tmp_path / "out", [str(path), "--count", "2", "--out", str(tmp_path / "out")]

    def interrupt(folder: Path, name: str) -> list[float]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cv_lightning.commands.sweep.metric_values", interrupt)
        assert main(arguments) == 130
    assert main(arguments) == 0
    journal = [json.loads(line) for line in (out / "journal.log").read_text().splitlines()]
    tried = [entry["param_value_internal"] for entry in journal if "param_value_internal" in entry]
    rows = result(out)["trials"]
    assert len(rows) == 2 and [row["state"] for row in rows] == ["finished", "finished"]
    assert rows[0]["parameters"]["x"] == tried[0] and rows[0]["number"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_that_stops_a_trial_ends_the_sweep_and_the_trial_is_run_again(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweep_file(tmp_path, parameters={"x": {"values": [0.0]}})
    stopped = f"({{}}/'metrics.csv').write_text('step,loss\\n1,2\\n'); sys.exit({128 + number})"
    (tmp_path / "job.py").write_text(JOB.replace("rows = [", stopped.format("folder") + "\nrows = ["))
    arguments = [str(path), "--count", "1", "--out", str(tmp_path / "out")]
    assert main(arguments) == 128 + number
    assert f"was stopped by {number.name}" in capsys.readouterr().out
    (tmp_path / "job.py").write_text(JOB)
    assert main(arguments) == 0
    assert [row["state"] for row in result(tmp_path / "out")["trials"]] == ["finished"]


def test_a_hopeless_trial_is_stopped(tmp_path: Path) -> None:
    path = sweep_file(
        tmp_path,
        parameters={"x": {"values": [0.0, 0.5, 1.0]}, "slow": {"value": "yes"}},
        early_terminate={"type": "hyperband", "min_iter": 1, "eta": 2},
    )
    seeds = [seed for seed in range(20) if _order(seed) == [0.5, 0.0, 1.0]]
    assert main([str(path), "--count", "3", "--out", str(tmp_path / "out"), "--seed", str(seeds[0])]) == 0
    states = {row["parameters"]["x"]: row["state"] for row in result(tmp_path / "out")["trials"]}
    assert states[0.5] == "finished" and states[1.0] == "stopped early"


def _order(seed: int) -> list[float]:
    """The order in which Optuna walks a grid of three points."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.GridSampler({"x": [0.0, 0.5, 1.0]}, seed=seed))
    study.optimize(lambda trial: trial.suggest_categorical("x", [0.0, 0.5, 1.0]), n_trials=3)
    return [trial.params["x"] for trial in study.trials]


def test_another_file_wants_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(sweep_file(tmp_path)), "--count", "1", "--out", str(tmp_path / "out")]
    main(arguments)
    assert main([*arguments, "--set", "y=1"]) == 2
    assert "give another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "bayez"}, "'bayez' must be grid, random or bayes"),
        ({"parameters": {"model": {"parameters": {"lr": {"value": 1}}}}}, "parameters.model is nested"),
        ({"parameters": {"betas": {"values": [[0.9, 0.98]]}}}, "as text"),
        ({"parameters": {"x": {"distribution": "q_beta", "min": 0, "max": 1}}}, "'q_beta'"),
        ({"parameters": {"x": {"min": 0.0, "max": 1.0}}}, "a grid needs values"),
        ({"command": ["${env}", "python", "job.py"]}, "${args}"),
        ({"early_terminate": {"type": "envelope"}}, "early_terminate.type must be hyperband"),
        ({"scheduler": {"type": "x"}}, "`scheduler` is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_driver_cannot_do_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as refused:
        read_sweep(sweep_file(tmp_path, **changes))
    assert said in str(refused.value) and "sweep.yaml" in str(refused.value)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_our_files_give_the_command_that_wandb_gives(path: Path) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

    config = load_sweep_config(str(path))
    sweep = read_sweep(path)
    assert config is not None and set(config["parameters"]) == {*sweep.parameters, *sweep.constants}
    values = {name: spec.get("value", spec.get("min", True)) for name, spec in config["parameters"].items()}
    macros = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    macros |= {"interpreter": [sys.executable], "env": []}
    expected: list[str] = []
    for word in create_sweep_command(config["command"]):
        expected += macros[word[2:-1]] if word.startswith("${") else [word]
    assert fill_command(sweep.command, values) == expected
    assert expected[1:4] == ["-m", "cv_lightning", "fit"]


def test_the_agents_own_argument_is_left_out() -> None:
    agent = {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r1"}
    given = ["fit", "--config", "a.yaml", "--_wandb={'x': 1}", "--model.lr=1"]
    kept = ["fit", "--config", "a.yaml", "--model.lr=1"]
    assert agent_arguments(given, agent) == [*kept, "--trainer.default_root_dir=runs/sweeps/s1/r1"]
    own = [*kept, "--trainer.default_root_dir=here"]
    assert agent_arguments(own, agent) == own


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from cv_lightning.commands.sweep import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'optuna', 'matplotlib', 'wandb', 'pandas'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
