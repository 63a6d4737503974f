"""What was stored by an earlier version is still read: stores, evaluations, checkpoints, data files and configs.

The files lie in tests/fixtures; its README says what they are and how they were made.
"""

from __future__ import annotations

import csv
import json
import logging
import pickletools
import zipfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from digests import ABSOLUTE, RELATIVE, assert_recorded, lines_of, read_json
from renames import FIXTURES, differences, flatten, renames
from safetensors.torch import load_file
from stored_runs import CONVERSATIONS, LAST, TASKS, command, copied, read_yaml, resumed, rows_of, settings

from cv_lightning.checkpoints.reader import CheckpointReader
from cv_lightning.checkpoints.recipe import check_recipe, read_recipe, settings_of
from cv_lightning.cli import ConfigOnly
from cv_lightning.cli import main as run_cli
from cv_lightning.digits.quickstart import Timing
from cv_lightning.evaluation.outcome import outcomes
from cv_lightning.evaluation.results import evaluated
from cv_lightning.evaluation.runs import load_run
from cv_lightning.models.lora import LoraConfig
from cv_lightning.rollout.evaluation_state import differences as differences_of_state
from cv_lightning.rollout.evaluation_state import read_state
from cv_lightning.trajectory import pixels_of, read_groups
from cv_lightning.trajectory.codec import encode_group

RUNS, SMOKE = FIXTURES / "runs", FIXTURES / "smoke"
STORES = sorted(str(path.parent.relative_to(FIXTURES)) for path in FIXTURES.glob("**/trajectories"))
EVALUATIONS = sorted(str(path.parent.relative_to(FIXTURES)) for path in FIXTURES.glob("**/metrics.json"))
CONFIGS = sorted(str(path.relative_to(FIXTURES)) for path in FIXTURES.glob("**/*_config.yaml"))
FOREIGN = {"collections", "deepspeed", "torch"}
"""Packages whose classes a checkpoint's pickle may name."""
LORA = LoraConfig(rank=2, alpha=4.0)


# ---------------------------------------------------------------------------------------------- stores
@pytest.mark.parametrize("name", STORES)
def test_every_field_of_a_stored_line_is_read(name: str) -> None:
    """What is read, written again by today's code, holds every recorded value, under its new name where it has one."""
    files = sorted((FIXTURES / name / "trajectories").glob("*.jsonl"))
    stored = [json.loads(line) for path in files for line in path.open(encoding="utf-8")]
    tokens = "token_ids" in stored[0]["trajectories"][0]
    read = [json.loads(encode_group(group, tokens=tokens)) for group in read_groups(FIXTURES / name)]
    assert stored and len(read) == len(stored)
    for old, new in zip(stored, read, strict=True):
        said = differences(renames().flat("stored_fields", flatten(old)), flatten(new), 0.0, 0.0)
        assert not said, "\n".join(said)


@pytest.mark.parametrize("name", STORES)
def test_every_stored_image_is_found(name: str) -> None:
    images = [image for group in read_groups(FIXTURES / name) for t in group.trajectories for image in t.images]
    assert images
    for image in images:
        assert pixels_of(image.original).size == image.original.size


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_stored_evaluation_gives_the_same_metrics(name: str) -> None:
    stored = renames().flat("metrics", flatten(json.loads((FIXTURES / name / "metrics.json").read_text())))
    again = evaluated(outcomes(read_groups(FIXTURES / name)))
    found = json.loads(json.dumps(again.summary.to_json() | {"breakdown": again.breakdown.to_json()}))
    said = differences(stored, flatten(found), RELATIVE, ABSOLUTE)
    assert not said, "\n".join(said)


def test_an_evaluation_of_an_earlier_version_is_the_same_evaluation() -> None:
    """The stored settings of the agent have old names; an interrupted evaluation is continued anyway."""
    stored = read_state(FIXTURES / EVALUATIONS[0])
    assert stored is not None and "finish_share" in stored["identity"]["agent"]
    today = deepcopy(stored["identity"])
    today["agent"]["early_stop_fraction"] = today["agent"].pop("finish_share")
    assert differences_of_state(FIXTURES / EVALUATIONS[0], today) == []
    today["agent"]["early_stop_fraction"] = 0.5
    assert differences_of_state(FIXTURES / EVALUATIONS[0], today) == ["agent.early_stop_fraction"]


def test_the_report_shows_a_whole_stored_run() -> None:
    run = load_run(SMOKE)
    assert len(run.stores) == len([name for name in STORES if name.startswith("smoke/")]) > 2
    assert run.curves and Timing(SMOKE).values["seed"] == 3


# ---------------------------------------------------------------------------------------------- checkpoints
def checkpoint(name: str) -> Path:
    return RUNS / name / "checkpoints" / "iteration000002.ckpt"


@pytest.mark.parametrize("name", LAST)
def test_the_policy_of_a_checkpoint_is_read(name: str) -> None:
    stored, base = CheckpointReader(checkpoint(name)), load_file(RUNS / "base" / "model.safetensors")
    assert stored.has_adapters == (name == "lora")
    assert stored.merged_shapes == {tensor: value.shape for tensor, value in base.items()}
    tensors = dict(stored.tensors(torch.float32, LORA))
    changed = [tensor for tensor, value in tensors.items() if not torch.equal(value, base[tensor])]
    assert len(changed) > 10, "it was trained"
    if name == "sft":
        exported = load_file(RUNS / "sft" / "model" / "model.safetensors")
        assert all(torch.equal(value, exported[tensor]) for tensor, value in tensors.items())


def parsed(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stored config as fit or test reads it today."""
    monkeypatch.chdir(folder)
    cli = run_cli([path.name.split("_")[0], "--config", str(path)], ConfigOnly)
    assert isinstance(cli, ConfigOnly)
    return cli.as_dict()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAST)
def test_a_checkpoint_fits_its_config(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing counts as changed by a user, where only names have."""
    found = settings_of(parsed(RUNS / name / "fit_config.yaml", RUNS, monkeypatch))
    recipe = read_recipe(checkpoint(name))
    assert len(recipe["settings"]) > 30
    classes = {part: found[f"{key}.class_path"].rpartition(".")[2] for part, key in PARTS.items()}
    with caplog.at_level(logging.WARNING):
        check_recipe(checkpoint(name), classes, found)
    assert "changed settings" not in caplog.text, caplog.text


PARTS = {"module": "model", "data": "data"}


def named_classes(path: Path) -> Iterator[str]:
    """Modules and names that a pickle imports."""
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        texts: list[str] = []
        for code, argument, _ in pickletools.genops(archive.read(name)):
            if code.name == "GLOBAL":
                yield str(argument).replace(" ", ".")
            elif code.name == "STACK_GLOBAL":
                yield ".".join(texts[-2:])
            elif "UNICODE" in code.name:
                texts.append(str(argument))


def test_checkpoints_name_no_class_of_the_package() -> None:
    """So that every class of ours may move without a checkpoint becoming unreadable."""
    files = [checkpoint(name) for name in LAST if checkpoint(name).is_file()]
    files += sorted(checkpoint("zero3").glob("checkpoint/*.pt"))
    assert len(files) == 7
    for path in files:
        named = set(named_classes(path))
        assert "torch._utils._rebuild_tensor_v2" in named, "the pickle was read"
        assert {name.partition(".")[0] for name in named} <= FOREIGN, (path.name, named)


# ---------------------------------------------------------------------------------------------- data files, configs
@pytest.mark.parametrize("file", [*TASKS, *CONVERSATIONS])
def test_data_files_are_read_with_the_same_values(file: str) -> None:
    recorded = read_json(FIXTURES / "data" / "rows.json.gz")[file]
    found = json.loads(json.dumps(rows_of(file)))
    assert recorded and len(found) == len(recorded)
    assert not differences(flatten(recorded), flatten(found), 0.0, 0.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_stored_config_keeps_its_meaning(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = renames().flat("config_keys", settings(read_yaml(FIXTURES / name)))
    found = settings(parsed(FIXTURES / name, RUNS, monkeypatch))
    # null stood for defaults, which now stand there
    stored = {k: v for k, v in stored.items() if v is not None or not any(n.startswith(f"{k}.") for n in found)}
    stored = {k: v for k, v in stored.items() if v is not None or ".algorithm.loss.init_args." not in k}
    assert len(stored) > 50
    said = differences(stored, found, 0.0, 0.0)
    assert not said, "\n".join(said)


# ---------------------------------------------------------------------------------------------- commands
@pytest.fixture
def work(tmp_path: Path) -> Path:
    return copied(tmp_path / "work")


@pytest.mark.slow
@pytest.mark.parametrize("name", LAST)
def test_a_stored_run_resumes(name: str, work: Path) -> None:
    assert_recorded({name: resumed(work, name)}, "resumed.json.gz")
    assert [float(row["iteration"] or 3) for row in csv.DictReader((work / name / "metrics.csv").open())][-1] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", LAST)
def test_a_stored_checkpoint_is_exported_and_tested(name: str, work: Path) -> None:
    command(work, "export", "--ckpt", name, "--out", "exported")
    exported = load_file(work / "exported" / "model.safetensors")
    stored = dict(CheckpointReader(checkpoint(name)).tensors(torch.float32, LORA))
    assert all(torch.equal(exported[tensor], value) for tensor, value in stored.items())
    if name == "sft":
        test = ["test", "--config", "tested/test_config.yaml", "--trainer.default_root_dir", "again"]
        command(work, *test, "--model.init_args.policy.path", "exported")
        for evaluation in ("tool", "notool"):
            old, new = (work / run / "eval" / evaluation for run in ("tested", "again"))
            metrics = [flatten(json.loads((folder / "metrics.json").read_text())) for folder in (old, new)]
            assert not differences(renames().flat("metrics", metrics[0]), metrics[1], RELATIVE, ABSOLUTE)


def test_a_stored_evaluation_is_rescored_and_reported(work: Path) -> None:
    store = "eval/rl_greedy_tool"
    command(work, "rescore", store, "--reward", "configs/quickstart/reward.yaml", "--out", "rescored")
    totals = [
        [t["reward"]["total"] for line in lines_of(work / name) for t in line["trajectories"]]
        for name in (store, "rescored")
    ]
    assert totals[0] == totals[1] and len(totals[0]) == 8
    command(work, "report", ".")
    assert (work / "report.html").stat().st_size > 20_000
    command(work, "trajectories", "export", "rl", "--out", "rl.parquet")
    assert (work / "rl.parquet").is_file()
