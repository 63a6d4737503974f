"""The index of settings is that of the code, and the check before the imports agrees with the parser."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jsonargparse
import pytest
import yaml

from cv_lightning import cli, settings_index
from cv_lightning.settings_check import check_command

ROOT = Path(__file__).resolve().parents[2]
GRPO = ["--config", str(ROOT / "configs" / "quickstart" / "grpo.yaml")]
FORMS = [
    *["--model.policy.path", "x", "--model.algorithm.loss", "DPPO", "--model.algorithm.loss.clip_low", "1e-1"],
    *["--model.init_args.policy.lora", "{rank: 4}", "--model.policy.lora.alpha", "3"],
    *["--model.init_args.optimizer", "{class_path: cv_lightning.modules.base.OptimizerConfig, init_args: {lr: 1e-3}}"],
    *["--trainer.callbacks+", "{class_path: LearningRateMonitor, init_args: {logging_interval: step}}"],
    *[
        "--trainer.callbacks.log_momentum",
        "true",
        "--trainer.strategy",
        "ZeroStrategy",
        "--trainer.strategy.stage",
        "3",
    ],
    *["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "p", "--trainer.max_time.days", "1"],
    *["--trainer.precision", "32", "--trainer.devices", "[0,1]", "--trainer.deterministic", "warn"],
    *["--data.init_args.val_tasks.upright", "3", "--data.train_files+", "a.parquet", "--data.reader.format", "docvqa"],
    *["--data.curriculum", "[{at: 0, kind_shares: {upright: 1}}]", "--seed_everything", "true"],
    *["--rollout.reward", "{judge: {model: x}, terms: []}", "--rollout.reward.judge.task_types.a", "ocr"],
    *["--rollout.agent", "{class_path: cv_lightning.agent.config.AgentConfig, init_args: {max_turns: 1}}"],
    *["--rollout.evaluations+", "{name: x, temperature: 1}", "--rollout.evaluations.name", "y"],
    *[
        "--no-rollout.agent.tool",
        "--rollout.agent.deterministic",
        "--rollout.engine.sleep_level",
        "2",
        "--ckpt_path",
        "null",
    ],
    *["--config", "{rollout.num_samples: 4, model: {init_args: {algorithm: {tis_clip: null}}}}"],
]
"""Forms of values that a parser accepts, which the check must accept too."""


@pytest.fixture
def parser_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI without the check."""
    monkeypatch.setattr(cli, "check_command", lambda *_: None)


def test_index_and_page_are_those_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("settings_script", ROOT / "scripts" / "settings.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    try:
        text = script.text_of(script.Index().make())
    finally:
        jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=False)
    assert text == settings_index.FILE.read_text(encoding="utf-8"), "run python scripts/settings.py"
    assert script.page(settings_index.load()) == script.DOCS.read_text(encoding="utf-8"), (
        "run python scripts/settings.py"
    )


@pytest.mark.usefixtures("parser_alone")
def test_forms_that_the_parser_accepts_are_accepted() -> None:
    assert check_command("fit", [*GRPO, *FORMS]) is None
    config = cli.main(["fit", *GRPO, *FORMS], cli.ConfigOnly).config["fit"]
    assert config.model.init_args.algorithm.loss.init_args.clip_low == 0.1


@pytest.mark.usefixtures("parser_alone")
@pytest.mark.parametrize(
    "flags",
    [
        ["--rollout.num_sample", "4"],
        ["--data.init_args.num_steps", "4"],
        ["--rollout.reward", "{judge: {modle: x}}"],
        ["--trainer.strategy", "ZeroStrategy", "--trainer.strategy.stge", "3"],
        ["--rollout.engine.kind", "vlm"],
    ],
    ids=" ".join,
)
def test_parser_refuses_what_the_check_refuses(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert check_command("fit", [*GRPO, *flags]) is not None
    with pytest.raises(SystemExit):
        cli.main(["fit", *GRPO, *flags], cli.ConfigOnly)


def test_printed_config_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", *GRPO, "--print_config"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["rollout"]["num_samples"] == 8
    (tmp_path / "printed.yaml").write_text(printed)
    assert check_command("fit", ["--config", str(tmp_path / "printed.yaml")]) is None
