"""--quiet and --verbose: what is said where."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from cv_lightning.__main__ import main
from cv_lightning.environment import FILE_ONLY, VERBOSITY, StderrHandler, log_to, set_up_logging, take_verbosity


@pytest.fixture(autouse=True)
def loggers_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(VERBOSITY, "")
    root, own = logging.getLogger(), logging.getLogger("cv_lightning")
    before = root.level, own.level
    yield
    for handler in [handler for handler in root.handlers if isinstance(handler, StderrHandler)]:
        root.removeHandler(handler)
    root.setLevel(before[0])
    own.setLevel(before[1])


@pytest.mark.parametrize(
    ("flags", "heard"),
    [
        ([], ["ours info", "ours warning", "theirs warning"]),
        (["--quiet"], ["ours warning", "theirs warning"]),
        (["--verbose"], ["ours debug", "ours info", "ours warning", "theirs info", "theirs warning"]),
    ],
)
def test_verbosity_flags_filter_messages(
    flags: list[str], heard: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert take_verbosity(["--config", "a.yaml", *flags, "--x", "1"]) == ["--config", "a.yaml", "--x", "1"]
    set_up_logging()
    set_up_logging()  # twice is once
    handler = log_to(tmp_path / "log.txt")
    try:
        for name, who in (("cv_lightning.agent", "ours"), ("a_library", "theirs")):
            logger = logging.getLogger(name)
            for level in ("debug", "info", "warning"):
                logger.log(getattr(logging, level.upper()), "%s %s", who, level)
        logging.getLogger("cv_lightning").info("for the file", extra={FILE_ONLY: True})
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    assert capsys.readouterr().err.split("\n")[:-1] == heard
    log = (tmp_path / "log.txt").read_text()
    assert "INFO ours info" in log, "the log of a quiet run, too"
    assert "INFO for the file" in log


def test_every_verb_accepts_the_verbosity_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--quiet", str(tmp_path / "nothing")]) == 2
    assert "nothing: no such run folder" in capsys.readouterr().err
