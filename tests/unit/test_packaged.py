"""Configs by name, and the folders that come with the package."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml

from cv_lightning.__main__ import main
from cv_lightning.command_line import short_parser
from cv_lightning.commands.configs import description
from cv_lightning.environment import use_current_folder
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


# ------------------------------------------------------------------------------------------------ configs list | copy
def test_every_config_is_listed_with_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    described = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert sorted(described) == config_names()
    assert described["reward/accuracy"] == "Outcome only: 1 for a correct answer, 0 for any other."
    assert max(map(len, lines)) <= 120


def test_a_description_is_the_first_sentence_of_the_first_comment() -> None:
    assert description("# A recipe of model v2.5,\n# on two files. Add a third.\nseed: 0\n# no\n") == (
        "A recipe of model v2.5, on two files."
    )
    assert description("seed: 0\n") == ""


def values_of(file: Path) -> object:
    """A config with the configs that it refers to in their places."""

    def filled(value: object) -> object:
        if isinstance(value, dict):
            return {key: filled(part) for key, part in value.items()}
        is_part = isinstance(value, str) and value.endswith(".yaml") and (file.parent / value).is_file()
        return values_of(file.parent / str(value)) if is_part else value

    return filled(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    "name", [name for name in config_names() if name.startswith(("eval/", "quickstart/", "grpo/"))]
)
def test_a_copy_says_what_the_config_says(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = tmp_path / "deep/mine.yaml"
    assert main(["configs", "copy", name, "--out", str(copied)]) == 0
    assert values_of(copied) == values_of(ROOT / "configs" / f"{name}.yaml")
    assert {path.parent for path in tmp_path.rglob("*.*")} == {copied.parent}
    capsys.readouterr()


def test_a_changed_file_is_overwritten_on_request_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "copy", "eval/digits"]) == main(["configs", "copy", "eval/digits"]) == 0  # the same content
    part = Path("reward.yaml")  # digits.yaml refers to it
    part.write_text("accuracy: 2.0\n")
    Path("digits.yaml").unlink()
    assert main(["configs", "copy", "eval/digits"]) == 2
    assert "reward.yaml exists and differs" in capsys.readouterr().err
    assert not Path("digits.yaml").exists()
    assert part.read_text() == "accuracy: 2.0\n"
    assert main(["configs", "copy", "eval/digits", "--force"]) == 0
    assert part.read_text() == (ROOT / "configs/quickstart/reward.yaml").read_text()


def test_a_copy_is_not_named_like_its_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "copy", "eval/digits", "--out", str(tmp_path / "agent.yaml")]) == 2
    assert "refers to a file of that name" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_notebooks_and_scripts_are_copied_as_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "copy", "notebooks"]) == main(["configs", "copy", "scripts"]) == 0
    assert {path.name for path in Path("notebooks").iterdir()} == {p.name for p in ROOT.glob("notebooks/*.ipynb")}
    assert Path("scripts/slurm/grpo.sbatch").is_file() and Path("scripts/environment.sh").is_file()


# ------------------------------------------------------------------------------------------------ own modules
def test_the_installed_command_sees_modules_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/environment/bin", *sys.path])
    use_current_folder()
    use_current_folder()
    assert sys.path[:2] == [os.getcwd(), "/environment/bin"]
