"""The check of keys before the imports, the search of settings, and the short help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import RECORDED, documented, stand_ins, words
from renames import renames

from cv_lightning.__main__ import main
from cv_lightning.commands.settings import JOBS, MAX_WIDTH, short_help
from cv_lightning.commands.settings import main as search
from cv_lightning.hub import pin_files
from cv_lightning.settings_check import check_command
from cv_lightning.settings_index import load

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("ablations", "reward", "sweeps")
"""Folders of configs that are not the value of `--config`."""
GRPO = ["--config", str(ROOT / "configs" / "quickstart" / "grpo.yaml")]
PROBE = """
import sys
from cv_lightning.__main__ import main
heavy = {"torch", "lightning", "transformers", "vllm", "jsonargparse"}
print("LOADED", main(sys.argv[1:]), sorted(set(sys.modules) & heavy))
"""


def shipped() -> list[Path]:
    files = (path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name not in PARTS)
    return sorted(path for path in files if "trainer:" in path.read_text() or "model:" in path.read_text())


def test_shipped_configs_are_accepted() -> None:
    assert len(shipped()) > 20
    assert [(path, said) for path in shipped() if (said := check_command("fit", ["--config", str(path)]))] == []


def test_stored_configs_with_old_names_are_accepted() -> None:
    stored = sorted((ROOT / "tests" / "fixtures").glob("**/fit_config.yaml"))
    assert len(stored) > 3
    assert [(path, said) for path in stored if (said := check_command("fit", ["--config", str(path)]))] == []


def test_documented_command_lines_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = {*documented(), *(renames().text(line) for line in RECORDED.read_text().splitlines())}
    commands = [found for line in lines if (found := words(line)) and found[0] in ("fit", "validate", "test", "plan")]
    assert len(commands) > 20
    assert [(command, said) for command in commands if (said := check_command(command[0], command[1:]))] == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rollout.num_sample", "4"], "--rollout.num_sample is not a setting. Did you mean --rollout.num_samples?"),
        (["--rollout.num-sample", "4"], "--rollout.num_sample is not a setting. Did you mean --rollout.num_samples?"),
        (["--rollout.agnt.max_turns", "4"], "Did you mean --rollout.agent.max_turns?"),
        (["--lr", "1e-4"], "--lr is not a setting. Did you mean --model.init_args.optimizer.lr?"),
        (
            ["--model.optimizer.learning_rate", "1"],
            "of OptimizerConfig. Did you mean --model.init_args.optimizer.lr?",
        ),
        (
            ["--data.init_args.num_iteration", "4"],
            "Did you mean --data.init_args.num_iterations?",
        ),
        (
            ["--data.init_args.num_steps", "4"],
            "is a setting of SFTDataModule and DigitSFTDataModule",
        ),
        (
            ["--model.algorithm.loss.ratio_cap", "4"],
            "of DPPO, and model.algorithm.loss.class_path is PPOClip",
        ),
        (["--rollout.reward", "{judge: {modle: x}}"], "Did you mean --rollout.reward.judge.model?"),
        (
            ["--rollout.evaluations", "[{name: a, temprature: 0}]"],
            "rollout.evaluations[0].temprature is not a",
        ),
        (
            ["--rollout.engine.kind", "vlm"],
            "one of auto, vllm, transformers, sglang, server. Did you mean vllm?",
        ),
        (["--rollout.num_samples", "four"], "--rollout.num_samples is 'four'; it must be a whole number"),
        (["--rollout.num_samples", "-2"], "rollout.num_samples is -2; it must be at least 1"),
        (["--model.optimizer.lr", "-1e-3"], "model.init_args.optimizer.lr is -0.001; it must be above 0"),
        (["--rollout.agent.tool", "maybe"], "it must be true or false"),
        (["--rollout.agent", "agnt.yaml"], "--rollout.agent is agnt.yaml: no such file"),
        (["--trainer.callbacks.num_samples", "4"], "--trainer.callbacks.num_samples is now --rollout.num_samples"),
        (["--config", "quickstart/grpoo"], "--config quickstart/grpoo: no such file. Did you mean quickstart/grpo"),
        (["--config", "configs"], "--config configs is a folder"),
    ],
)
def test_mistake_is_said_with_what_was_meant(flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = check_command("fit", [*GRPO, *flags])
    assert text is not None and said in text and len(text.splitlines()) <= 3


def test_mistake_in_a_file_is_said_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("trainer:\n  max_epochz: 1\nrollout:\n  agent: {max_turn: 2}\n  store: {shar: 1}\n")
    lines = (check_command("fit", [*GRPO, "--config", str(file)]) or "").splitlines()
    assert lines[0].startswith(f"{file}, line 2: trainer.max_epochz is not a setting. Did you mean trainer.max_epochs")
    assert lines[1] == f"{file}, line 4: rollout.agent.max_turn is not a setting. Did you mean rollout.agent.max_turns?"
    assert lines[2].startswith("1 more like this; ")
    file.write_text("trainer:\n  max_epochs: 1\n rollout: {\n")
    assert f"{file}, line 3, column 2: this is not YAML" in (check_command("fit", ["--config", str(file)]) or "")


def test_old_key_in_a_file_is_said_with_the_new_one(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.yaml", tmp_path / "part.yaml"
    whole.write_text("rollout:\n  parity_tolerance: 0.1\n")
    part.write_text("parity_tolerance: 0.1\n")
    for flags in (["--config", str(whole)], ["--rollout", str(part)]):
        said = check_command("fit", [*GRPO, *flags])
        assert said is not None and "rollout.parity_tolerance is now rollout.mismatch_tolerance" in said
    assert "config migrate" not in (said or "rewrites whole configs only")


@pytest.mark.parametrize(
    "flags",
    [
        ["--data.class_path", "mine.Tasks", "--data.init_args.anything", "1"],
        ["--data", "mine.Tasks", "--data.anything", "1"],
        ["--rollout.reward.terms+", "{class_path: mine.Term, init_args: {anything: 1}}"],
        ["--trainer.callbacks+", "LearningRateMonitor", "--trainer.callbacks.logging_interval", "step"],
        ["--trainer.logger.class_path", "CSVLogger", "--trainer.logger.save_dir", "x"],
        ["--model.algorithm.loss", "mine.Loss", "--model.algorithm.loss.anything", "1"],
        ["--trainer.max_time.days", "1"],
        ["--model.dict_kwargs.anything", "1"],
        ["--model.init_args.policy", "null"],
        ["--rollout.num-samples", "4", "--rollout.reward.judge.task_types.my-source", "ocr"],
        ["--print_config=skip_default"],
        ["--model.help", "GRPOModule"],
        ["--config", "{rollout: {num_samples: 3}}"],
    ],
    ids=" ".join,
)
def test_what_the_index_does_not_know_is_left_to_the_parser(flags: list[str]) -> None:
    assert check_command("fit", [*GRPO, *flags]) is None


def test_flags_of_plan_are_not_settings() -> None:
    assert check_command("plan", [*GRPO, "--gpu", "h200", "--strict", "--json", "x.json"]) is None
    assert "Did you mean --rollout.num_samples?" in (check_command("plan", [*GRPO, "--rollout.num_sample", "3"]) or "")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["fit", "--config", "no/such"], 2), (["fit", *GRPO, "--lr", "1"], 2), (["test", "--help"], 0)],
    ids=["config", "key", "help"],
)
def test_mistake_and_help_come_before_heavy_imports(arguments: list[str], code: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"LOADED {code} []"
    assert len(done.stderr.splitlines()) <= 3 and ("error: " in done.stderr) is (code == 2)


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_short_help_shows_what_matters_on_one_page(verb: str) -> None:
    lines = short_help(verb).splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= MAX_WIDTH
    for key in (key for keys in JOBS.values() for key in keys):
        assert any(line.startswith(f"  --{key} ") for line in lines), key
    example = lines[-1].split()
    assert check_command(verb, example[2:]) is None


def test_search_ranks_the_key_before_its_mentions(capsys: pytest.CaptureFixture[str]) -> None:
    assert search(["temperature"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("rollout.sampling.temperature  (float;")
    assert "in a config: rollout: {sampling: {temperature: 1.0}}" in shown
    assert "as a flag:   --rollout.evaluations '[{temperature: 0.0}]'" in shown
    assert search(["samplin", "temprature"]) == 0
    assert "no setting has samplin and temprature" in capsys.readouterr().out


def test_search_writes_json(tmp_path: Path) -> None:
    assert search(["clip_low", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"CISPO", "DPPO", "GSPO", "PPOClip"} <= {name for entry in found for name in entry["of_classes"]}
    assert found[0]["default"] is not None and found[0]["doc"]


def test_defaults_of_factories_and_links_are_in_the_index() -> None:
    entries = {entry.key: entry.setting for entry in load().entries}
    assert entries["model.init_args.algorithm.kl.estimator"].default == "k3"
    assert entries["rollout.agent.prompt.coordinates"].default == "original_px"
    assert entries["trainer.num_sanity_val_steps"].default == 0
    assert "model.init_args.temperature" not in entries
    grpo = load().classes["cv_lightning.modules.grpo.GRPOModule"]
    assert grpo.settings["temperature"].set_by == "rollout.sampling.temperature"


def test_dispatcher_runs_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "lr"]) == 0
    assert capsys.readouterr().out.startswith("model.init_args.optimizer.lr ")


def test_config_with_an_endless_alias_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    config = tmp_path / "endless.yaml"
    config.write_text("trainer: &a\n  callbacks: *a\n")

    assert "alias" in (check_command("fit", ["--config", str(config)]) or "")


def test_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "cv_lightning", "settings"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    process.stdout.close()

    assert "Traceback" not in (said := process.stderr.read()) and "Exception ignored" not in said
    process.stderr.close()
    process.wait()


def test_files_of_a_users_class_need_not_be_a_list(tmp_path: Path) -> None:
    arguments = {"train_files": tmp_path / "a.bin", "eval_files": 3}
    pin_files(arguments, tmp_path, resumes=False)

    assert arguments == {"train_files": tmp_path / "a.bin", "eval_files": 3}
