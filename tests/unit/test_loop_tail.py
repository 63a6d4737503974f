"""Early stop of a rollout's long tail: bounded, counted, off by default."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from test_loop import ANSWER, TURN, Hanging, ScriptedEngine, task

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.driver import Rollout, RolloutProgress
from cv_lightning.agent.request import RolloutRequest
from cv_lightning.background import Background
from cv_lightning.callbacks import rollout as rollout_callback
from cv_lightning.callbacks.rollout import RolloutCallback
from cv_lightning.engines.base import SamplingConfig
from cv_lightning.rewards import AnsweredGroup, RewardConfig, RewardModule, RewardTerm
from cv_lightning.rollout.collector import Collector, rollout_metrics
from cv_lightning.types import EndState, Group


@pytest.fixture
def background() -> Iterator[Background]:
    thread = Background()
    yield thread
    thread.close()


def test_stragglers_are_stopped_once_the_share_has_finished(encoder: DialogueEncoder, background: Background) -> None:
    """Two of eight hang in the sandbox for ever: a share of three quarters ends without them, unscored."""
    names = ["hung-1", *"abcdef", "hung-2"]
    engine = ScriptedEngine(encoder, lambda _, turn: (TURN, ANSWER)[turn])
    config = AgentConfig(early_stop_fraction=0.75, deadline_s=60, tool_deadline_s=60)
    rollout = Rollout(engine, Hanging("hung"), encoder, background, config, banned_ids=())
    trajectories = rollout.run([RolloutRequest(task(name), 0) for name in names], SamplingConfig())
    states = {t.task.id: t.end_state for t in trajectories}
    assert [name for name, state in states.items() if state is EndState.TRUNCATED] == ["hung-1", "hung-2"]
    assert all(states[name] is EndState.ANSWERED for name in "abcdef")
    assert "early_stop_fraction" in trajectories[0].error and trajectories[0].end_state.is_error
    groups = [Group(task=t.task, trajectories=[t]) for t in trajectories]
    assert rollout_metrics(groups, 1.0)["rollout/end_stopped_frac"] == 0.25
    assert not engine.has_unfinished()


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"agent\.early_stop_fraction"):
        AgentConfig(early_stop_fraction=share)
    assert AgentConfig().early_stop_fraction == 1.0


class Silent(RewardTerm):
    """Never replies about one task."""

    async def values(self, group: AnsweredGroup) -> list[float | None]:
        if group.task.id == "silent":
            await asyncio.sleep(60)
        return [1.0] * len(group.trajectories)


def test_a_term_that_never_replies_ends_with_the_rollouts_deadline(
    encoder: DialogueEncoder, background: Background
) -> None:
    engine = ScriptedEngine(encoder, lambda *_: ANSWER)
    config = AgentConfig(deadline_s=1.5)
    rollout = Rollout(engine, Hanging(), encoder, background, config, banned_ids=())
    collector = Collector(rollout, RewardModule(RewardConfig(terms=[Silent("silent", 1.0)])))
    quick: list[RolloutProgress] = []
    collector.roll_out([task("other"), task("quick")], 2, SamplingConfig(), progress=quick.append)
    waiting: list[RolloutProgress] = []
    begun = time.monotonic()
    groups = collector.roll_out([task("silent"), task("quick")], 2, SamplingConfig(), progress=waiting.append)
    assert time.monotonic() - begun < 15
    assert len(waiting) >= len(quick) + 3, "a watchdog must see that the run only waits"
    states = [[t.end_state for t in group.trajectories] for group in groups]
    assert states == [[EndState.ERROR_JUDGE] * 2, [EndState.ANSWERED] * 2]
    assert [t.reward is None for group in groups for t in group.trajectories] == [True, True, False, False]


def test_a_collective_timeout_below_the_longest_rollout_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rollout_callback, "collective_timeout_s", lambda: 150.0)
    for deadline_s, warned in ((100.0, True), (70.0, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            callback = RolloutCallback(agent=AgentConfig(deadline_s=deadline_s))
            callback._check_deadline(SimpleNamespace(world_size=2))  # type: ignore[arg-type]
        assert ("deadline_s" in caplog.text) is warned
