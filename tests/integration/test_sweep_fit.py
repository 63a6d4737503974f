"""Our sweep files drive the real training command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from cv_lightning.cli import main as fit
from cv_lightning.commands.sweep import fill_command, read_sweep
from cv_lightning.commands.sweep import main as sweep

pytest.importorskip("optuna", reason="no Optuna: pip install 'cv-lightning[sweep]'")
ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_parameter_is_a_flag_of_fit(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    file = read_sweep(path)
    values = {name: next(iter(_some(domain))) for name, domain in file["searched"].items()}
    command = fill_command(file["command"], {**values, **file["constants"]})
    with pytest.raises(SystemExit) as stopped:
        fit([*command[3:], "--print_config"])
    assert not stopped.value.code, capsys.readouterr().err
    printed = capsys.readouterr().out
    for name, value in values.items():
        assert f"{name.rpartition('.')[2]}: {json.dumps(value)}" in printed, name


def _some(domain: object) -> list[object]:
    """A value of a distribution that is nobody's default."""
    low, high = getattr(domain, "low", None), getattr(domain, "high", None)
    return [low + 0.37 * (high - low)] if low is not None and high is not None else list(domain.choices)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_three_trials_of_real_training(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    few = {
        "model.init_args.policy.path": tiny_checkpoint,
        "data.init_args.num_iterations": 2,
        "data.init_args.tasks_per_iteration": 2,
        "data.init_args.val_tasks": '{"upright": 2, "small": 2}',
        "trainer.val_check_interval": 1,
        "rollout.num_samples": 2,
        "rollout.engine.kind": "transformers",
    }
    sets = [word for name, value in few.items() for word in ("--set", f"{name}={value}")]
    out = tmp_path / "sweep"
    code = sweep([str(ROOT / "configs/sweeps/lr_and_clip.yaml"), "--count", "3", "--out", str(out), *sets])
    with (out / "sweep.csv").open() as file:
        found = list(csv.DictReader(file))
    assert code == 0 and [row["state"] for row in found] == ["COMPLETE"] * 3, capsys.readouterr()
    assert len({row["params_model.init_args.optimizer.lr"] for row in found}) == 3
    for row in found:
        config = (out / f"trial-{int(row['number']):03d}" / "fit_config.yaml").read_text()
        assert f"lr: {row['params_model.init_args.optimizer.lr']}" in config
        assert 0 <= float(row["value"]) <= 1
    assert "greedy/accuracy" in capsys.readouterr().out
