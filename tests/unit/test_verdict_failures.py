"""A failing judge stops the run, also in small tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from reward_samples import Recorder, group, task

from cv_lightning.callbacks.rollout import failed_fractions
from cv_lightning.rewards import JudgeConfig, RewardConfig, RewardModule
from cv_lightning.rewards.module import MIN_FAILED
from cv_lightning.rollout.collector import rollout_metrics
from cv_lightning.rollout.evaluation_state import keep_good
from cv_lightning.trajectory import TrajectoryWriter, read_groups
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


def unscored_group(*ends: EndState) -> Group:
    return group(*(Recorder(task()).answer("7", end=end) for end in ends))


def test_what_the_judge_left_unscored_counts_as_failed_whatever_its_end_state() -> None:
    ends = [EndState.ERROR_JUDGE, EndState.MAX_TURNS, EndState.TRUNCATED, EndState.ERROR_TASK]
    found = failed_fractions(rollout_metrics([unscored_group(*ends)], 1.0))
    assert found == {"rollout/end_error_judge_frac": 0.25, "rollout/unscored_frac": 0.25}


def test_a_repeated_evaluation_asks_again_what_the_judge_left_unscored(tmp_path: Path) -> None:
    scored, broken = unscored_group(EndState.ANSWERED, EndState.MAX_TURNS), unscored_group(EndState.ERROR_TASK)
    RewardModule().score_group(scored)
    with TrajectoryWriter(tmp_path) as writer:
        for each in (scored, broken, unscored_group(EndState.MAX_TURNS), unscored_group(EndState.ERROR_JUDGE)):
            writer.write_group(each, 0)
    keep_good(tmp_path)
    kept = [[t.end_state for t in each.trajectories] for each in read_groups(tmp_path)]
    assert kept == [[EndState.ANSWERED, EndState.MAX_TURNS], [EndState.ERROR_TASK]]
