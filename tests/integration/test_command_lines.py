"""Every command line of README.md and docs is accepted by its parser, and none has gone unnoticed. Nothing is run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from command_lines import RECORDED, Parsed, documented, stand_ins, stop_after_parsing, words
from renames import renames
from shell_commands import shown_commands
from torch.distributed.run import get_args_parser

from cv_lightning.__main__ import main
from cv_lightning.planner.assumptions import Assumptions
from cv_lightning.verbs import VERBS

COMMANDS = sorted(set(documented()))


def accept(arguments: list[str]) -> None:
    """Parse a command line as the package does.

    Raises:
        AssertionError: it is refused.
    """
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stop_after_parsing(patch)
        patch.setattr("cv_lightning.settings_check.check_early", lambda *_: None)  # there are no data, models and GPUs
        try:
            code = main(arguments)
        except Parsed:
            return
        except SystemExit as ended:
            code = int(ended.code or 0)
        assert {"--help", "--print_config"} & set(arguments) and code == 0, f"exit code {code}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("reader")
    stand_ins(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(made)  # modules of the reader's own
        yield made


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_command_is_accepted(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    arguments = words(command)
    accept([*arguments, "--help"] if arguments[0] == "data" and len(arguments) == 2 else arguments)  # a mere mention
    if arguments[0] == "plan":  # hands what is not its own on to fit
        own = {f"--{field.name}" for field in fields(Assumptions)}
        given = arguments[1:]
        accept(["fit", *(word for at, word in enumerate(given) if not own & set(given[max(0, at - 1) : at + 1]))])


def test_recorded_commands_are_still_documented() -> None:
    recorded = [renames().text(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]
    gone = sorted(set(recorded) - set(COMMANDS))
    assert not gone, f"no longer in README.md or docs: {gone}; see tests/fixtures/README.md"
    assert {words(command)[0] for command in COMMANDS} <= {*VERBS, "--help"}


def test_options_of_the_launcher_are_torchrun_s() -> None:
    launched = [command.words for command in shown_commands() if command.program == "torchrun"]
    assert launched
    for line in launched:
        options = [word for word in line[1 : line.index("-m")] if word != "..."]
        parsed, unknown = get_args_parser().parse_known_args([*options, "script"])
        assert not unknown and parsed.training_script == "script", line


@pytest.mark.parametrize(
    "command",
    [
        "fit --config configs/quickstart/grpo.yaml --data.init_args.no_such_key 1",
        "fit --config configs/quickstart/grpo.yaml --rollout.num_sample 4",
        "export --ckpt RUN --output FOLDER",
        "trajectories save RUN --out FILE.parquet",
        "data check FILES --tests bench.parquet",
        "fite --config configs/quickstart/grpo.yaml",
    ],
)
def test_wrong_command_is_refused(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above could not fail."""
    monkeypatch.chdir(folder)
    with pytest.raises(AssertionError, match="exit code"):
        accept(words(command))
