from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from builder_samples import read, table

from cv_lightning.agent.config import AgentConfig
from cv_lightning.commands.data_build import build_rl as command
from cv_lightning.commands.data_build import corrupt
from cv_lightning.data.readers import TaskFiles
from cv_lightning.data.rows import ReaderConfig
from cv_lightning.engines import EngineConfig
from cv_lightning.factory.build_rl import BuildRL, build_rl
from cv_lightning.factory.difficulty import DifficultyConfig
from cv_lightning.models.loading import PolicyConfig
from cv_lightning.types import DataError


def difficulty(checkpoint: Path, samples: int = 2) -> DifficultyConfig:
    return DifficultyConfig(
        policy=PolicyConfig(path=str(checkpoint), dtype="float32"),
        samples=samples,
        engine=EngineConfig(kind="transformers", max_model_len=4096),
        agent=AgentConfig(max_turns=2, max_turn_tokens=8),
        tasks_at_once=3,
    )


def test_tasks_are_selected_by_measured_pass_rates(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Random weights answer nothing right: every task is all wrong, and that is what is said and kept for later."""
    config = BuildRL(files=[table(tmp_path, 4)], out=tmp_path / "rl.parquet", difficulty=difficulty(tiny_checkpoint))
    with pytest.raises(DataError, match=r"no task is left: \{'all wrong': 4\}"):
        build_rl(config)
    rates = tmp_path / "rl.pass_rates.jsonl"
    entries = [json.loads(line) for line in rates.read_text().split("\n")[1:] if line]
    assert [(e["id"], e["right"], e["scored"]) for e in entries] == [(f"vqa:{at}", 0, 2) for at in range(4)]
    # what was measured before is not measured again: a rate that is changed by hand decides
    lines = rates.read_text().split("\n")
    lines[2] = lines[2].replace('"right": 0', '"right": 1')
    rates.write_text("\n".join(lines))
    report = build_rl(config)
    assert report["kept"] == 1 and report["dropped"]["all wrong"]["count"] == 3
    task = TaskFiles([str(config.out)], ReaderConfig()).row(0)
    assert task.metadata["source_id"] == "vqa:1" and task.metadata["pass_rate"] == 0.5


def test_the_commands_write_files_that_match_their_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rl, robust = tmp_path / "rl.parquet", tmp_path / "robust.parquet"
    assert command([table(tmp_path, 12), "--out", str(rl), "--plan.turned_share", "1"]) == 0
    assert read(tmp_path / "rl.report.json")["kept"] == 12
    assert "12 tasks of 12 rows" in capsys.readouterr().out
    arguments = ["--suite.orientations", "[identity,rotate_180]", "--suite.corruptions", "[none,fog]", "--limit", "3"]
    assert corrupt([str(rl), "--out", str(robust), *arguments]) == 0
    assert len(TaskFiles([str(robust)], ReaderConfig())) == 12
    assert "rotate_180/fog_3" in capsys.readouterr().out
    assert corrupt([str(rl), "--out", str(robust), "--suite.corruptions", "[sleet]"]) == 2
    assert "sleet" in capsys.readouterr().err
