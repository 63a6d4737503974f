"""A failing judge stops the run, also in small tests."""

from __future__ import annotations

import pytest
from reward_samples import Recorder, group, task

from cv_lightning.rewards import JudgeConfig, RewardConfig, RewardModule
from cv_lightning.rewards.module import MIN_FAILED
from cv_lightning.types import EndState, Group, JudgeError


def failed_group(count: int) -> Group:
    members = []
    for _ in range(count):
        member = Recorder(task()).answer("7")
        member.end_state, member.error = EndState.ERROR_JUDGE, "HTTP 500"
        members.append(member)
    return group(*members)


@pytest.fixture
def module() -> RewardModule:
    return RewardModule(RewardConfig(judge=JudgeConfig(base_url="http://127.0.0.1:9/v1")))


def test_verdict_failures_count_from_the_first_ones(module: RewardModule) -> None:
    assert module.config.judge is not None and module.config.judge.failure_window == 200
    module.score_group(failed_group(MIN_FAILED - 1))
    with pytest.raises(JudgeError, match=rf"100% of the last {MIN_FAILED} verdicts failed.*HTTP 500"):
        module.score_group(failed_group(1))
    module.close()


def test_verdict_failures_of_a_whole_test_are_always_checked(module: RewardModule) -> None:
    module.check_verdicts(module.verdicts)
    module.score_group(failed_group(1))
    with pytest.raises(JudgeError, match="100% of the last 1 verdicts failed"):
        module.check_verdicts(module.verdicts)
    module.check_verdicts([*module.verdicts, *[False] * 9])  # with those of the other ranks: 10 %, as allowed
    module.close()
