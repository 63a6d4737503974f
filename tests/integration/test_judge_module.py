"""The reward module with a judge on the agent's background thread: overlap, masking, the stop above a failure rate."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from judge_server import JudgeServer, respond

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from reward_samples import Recorder, group, task

from cv_lightning.background import Background
from cv_lightning.rewards import JudgeConfig, RewardConfig, RewardModule
from cv_lightning.rewards.metrics import means, reward_sums
from cv_lightning.types import EndState, Group, JudgeError


def answers(*texts: str) -> Group:
    subject = task(box=None, truth="stop sign")
    return group(*(Recorder(subject).answer(text) for text in texts))


def config_of(server: JudgeServer, **changes: object) -> RewardConfig:
    values = {"base_url": server.url, "timeout_s": 1.0, "max_attempts": 2, "max_backoff_s": 0.1, "give_up_s": 3.0}
    return RewardConfig(judge=JudgeConfig(**(values | changes)))


def score_all(module: RewardModule, background: Background, scored: Group) -> None:
    futures = [background.submit(module.score_answer(trajectory)) for trajectory in scored.trajectories]
    for future in futures:
        future.result(timeout=20)
    module.score_group(scored)


def test_the_rule_comes_first_and_the_judge_only_where_it_says_no() -> None:
    scored = answers("stop sign", "Stop sign, a red one", "yield", "")
    background = Background()
    with JudgeServer() as server:
        module = RewardModule(config_of(server))
        score_all(module, background, scored)
        metrics = means(reward_sums([scored])) | module.judge_metrics()
        module.close()
    background.close()
    rewards = [trajectory.reward for trajectory in scored.trajectories]
    assert [(reward.correct, reward.scored_by) for reward in rewards if reward] == [
        (True, "rule"),
        (True, "judge"),
        (False, "judge"),
        (False, "rule"),
    ]
    assert len(server.requests) == 2
    assert metrics["judge/requests"] == 2
    assert metrics["judge/latency_mean_s"] > 0


def test_trajectories_without_a_verdict_are_unscored() -> None:
    async def broken_for_yield(number: int, writer: object, prompt: str) -> bool:
        if "yield" not in prompt:
            return False
        await respond(writer, b"", "500 Internal Server Error")  # type: ignore[arg-type]
        return True

    scored = answers("stop sign here", "yield", "stop sign")
    background = Background()
    with JudgeServer(broken_for_yield) as server:
        module = RewardModule(config_of(server))
        score_all(module, background, scored)
        module.close()
    background.close()
    good, failed, ruled = scored.trajectories
    assert good.reward is not None
    assert good.reward.correct
    assert ruled.reward is not None
    assert failed.reward is None
    assert failed.end_state is EndState.ERROR_JUDGE
    assert "HTTP 500" in failed.error


def test_the_run_stops_above_the_failure_rate() -> None:
    background = Background()
    with JudgeServer() as server:
        url = server.url
    config = RewardConfig(
        judge=JudgeConfig(base_url=url, max_attempts=1, give_up_s=2.0, failure_window=20, breaker_pause_s=0.1)
    )
    module = RewardModule(config)
    score_all(module, background, answers("a", "b"))  # too few to tell
    with pytest.raises(JudgeError, match=r"100% of the last 6 verdicts failed.*max_failed_frac.*" + url):
        score_all(module, background, answers("c", "d", "e", "f"))
    module.close()
    background.close()


def test_judging_starts_with_each_trajectory() -> None:
    """Verdicts of the first half are in while the second half still rolls out; the benchmark takes the time."""
    latency_s = 0.3
    scored = answers(*(f"stop sign number {n}" for n in range(128)))
    background = Background()
    with JudgeServer(latency_s=latency_s) as server:
        module = RewardModule(config_of(server, max_parallel=64, timeout_s=20.0, give_up_s=40.0))
        futures = [background.submit(module.score_answer(trajectory)) for trajectory in scored.trajectories[:64]]
        for future in futures:
            future.result(timeout=40)
        assert len(server.answered) == 64  # half of the group is missing
        begun = time.perf_counter()
        futures = [background.submit(module.score_answer(trajectory)) for trajectory in scored.trajectories[64:]]
        for future in futures:
            future.result(timeout=40)
        module.score_group(scored)
        added = time.perf_counter() - begun
        module.close()
    background.close()
    assert all(trajectory.reward is not None for trajectory in scored.trajectories)
    assert len(server.requests) == 128
    assert server.most_parallel > 16
    assert added < 64 * latency_s / 2  # one after another takes twice that


def test_a_module_works_on_successive_event_loops() -> None:
    with JudgeServer() as server:
        module = RewardModule(config_of(server))
        for text in ("stop sign one", "stop sign two"):
            background, scored = Background(), answers(text)
            score_all(module, background, scored)
            assert scored.trajectories[0].reward is not None
            assert scored.trajectories[0].reward.correct
            background.close()
        module.close()
