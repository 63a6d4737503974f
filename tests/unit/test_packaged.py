"""Configs by name, and the folders that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from cv_lightning.command_line import short_parser
from cv_lightning.packaged import close_configs, config_names, packaged_folder, resolve_config, resolve_words

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs/grpo/qwen3_vl_8b.yaml"


def test_every_config_of_the_checkout_has_a_name() -> None:
    files = {path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in ROOT.glob("configs/**/*.yaml")}
    assert set(config_names()) == files


@pytest.mark.parametrize(
    "name", ["grpo/qwen3_vl_8b", "grpo/qwen3_vl_8b.yaml", "configs/grpo/qwen3_vl_8b", "./configs/grpo/qwen3_vl_8b.yaml"]
)
def test_a_packaged_config_is_found_from_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_config(name) == RECIPE


def test_a_file_of_the_current_folder_comes_before_a_packaged_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = Path("configs/grpo/qwen3_vl_8b.yaml")
    own.parent.mkdir(parents=True)
    own.write_text("seed_everything: 1\n")
    assert resolve_config(own) == own
    Path("grpo/lora").mkdir(parents=True)  # a folder is no config
    assert resolve_config("grpo/lora") == ROOT / "configs/grpo/lora.yaml"


@pytest.mark.parametrize(
    "name", ["grpo/qwen3_vl_9b", "../pyproject", "qwen3_vl_8b", "", "{seed: 1}", "x" * 5000, "grpo"]
)
def test_other_names_stand_for_no_config(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_config(name) is None


def test_a_wrong_name_has_close_ones() -> None:
    assert close_configs("grpo/qwen3vl_8b.yaml")[0] == "grpo/qwen3_vl_8b"
    assert close_configs("qwen3_vl_8b")[:2] == ["grpo/qwen3_vl_8b", "sft/qwen3_vl_8b"]
    assert close_configs("configs/eval/mvtoolbenhc.yaml")[0] == "eval/mvtoolbench"
    assert close_configs("/no/such/folder/of/mine.yaml") == []


def test_words_of_a_command_line_that_name_configs_become_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reward = str(ROOT / "configs/reward/paper.yaml")
    words = "fit --config grpo/qwen3_vl_8b --rollout.reward reward/paper --rollout.reward=configs/reward/paper.yaml"
    assert resolve_words(words.split()) == [
        *("fit", "--config", str(RECIPE), "--rollout.reward", reward, f"--rollout.reward={reward}"),
    ]


@pytest.mark.parametrize("words", ["--out grpo/lora.yaml", "--model grpo/lora", "data grpo/lora", "--force grpo/lora"])
def test_words_that_are_no_configs_stay(words: str) -> None:
    assert resolve_words(words.split()) == words.split()


def test_a_parser_of_a_verb_takes_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parser = short_parser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--accuracy", type=float)
    parser.add_argument("--format", type=float)
    for key in ("mandatory", "necessity", "exact", "emerge", "usage", "spurious"):
        parser.add_argument(f"--{key}", type=float)
    parser.add_argument("--gate", type=bool)
    assert parser.parse_args(["--config", "reward/accuracy"]).accuracy == 1.0


def test_folders_are_found_in_the_checkout() -> None:
    assert [packaged_folder(name) for name in ("configs", "notebooks", "scripts")] == [
        *(ROOT / name for name in ("configs", "notebooks", "scripts")),
    ]
