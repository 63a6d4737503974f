"""`cv-lightning judge` and the check that `doctor` makes, against a real server."""

from __future__ import annotations

import json

import pytest
from judge_server import JudgeServer, completion, respond

from cv_lightning.callbacks.rollout import warn_of_judge
from cv_lightning.commands.judge import main
from cv_lightning.rewards import JudgeConfig
from cv_lightning.rewards.judge.check import check_endpoint


def test_judge_command_prints_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--question", "Which sign?", "--ground-truth", "STOP", "--answer=stop sign", "--json", "-"]
    with JudgeServer() as server:
        assert main([*asked, "--judge.base-url", server.url]) == 0
    assert json.loads(capsys.readouterr().out) == {"rule": False, "judge": True, "score": 1.0}


def test_a_missing_server_gives_an_exit_code_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with JudgeServer() as server:
        url = server.url
    asked = ["--ground_truth", "a", "--answer", "b", "--judge.base_url", url, "--judge.max_attempts", "1"]
    assert main(asked) == 1
    assert url in capsys.readouterr().err


def test_wrong_flags_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ground_truth", "a"]) == 2
    assert "--answer" in capsys.readouterr().err


def test_check_detects_a_judge_that_always_says_yes() -> None:
    async def honest(number: int, writer: object, prompt: str) -> bool:
        await respond(writer, completion("1" if "four" in prompt else "0"))  # type: ignore[arg-type]
        return True

    async def yes(number: int, writer: object, prompt: str) -> bool:
        await respond(writer, completion("1"))  # type: ignore[arg-type]
        return True

    with JudgeServer(honest) as server:
        assert check_endpoint(JudgeConfig(base_url=server.url)).ok
        assert (
            main(["--check", "--judge.base-url", server.url]) == 0 == main(["--check", "--judge.base_url", server.url])
        )
        assert main(["--json", "-", "--judge.base-url", server.url, "--check"]) == 0
    with JudgeServer(yes) as server:
        report = check_endpoint(JudgeConfig(base_url=server.url))
    assert not report.ok
    assert "'seven' with 1.00" in report.message


def test_a_training_run_warns_at_its_start_of_an_unreachable_judge(caplog: pytest.LogCaptureFixture) -> None:
    async def honest(number: int, writer: object, prompt: str) -> bool:
        await respond(writer, completion("1" if "four" in prompt else "0"))  # type: ignore[arg-type]
        return True

    with JudgeServer(honest) as server:
        warn_of_judge(JudgeConfig(base_url=server.url))
    assert not caplog.records
    warn_of_judge(JudgeConfig(base_url=server.url))  # which is closed by now
    [record] = caplog.records
    assert record.levelname == "WARNING" and server.url in record.getMessage()
