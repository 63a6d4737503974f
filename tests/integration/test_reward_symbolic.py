"""Comparing formulas by math-verify: equal ones, tricks, and formulas that never end."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from reward_samples import Recorder, group, task

from cv_lightning.rewards import RewardConfig, RewardModule
from cv_lightning.rewards.symbolic import SymbolicComparer

pytest.importorskip("math_verify", reason="the extra `math` is not installed")


@pytest.fixture(scope="module")
def comparer() -> Iterator[SymbolicComparer]:
    found = SymbolicComparer(timeout_s=5.0)
    yield found
    found.close()


@pytest.mark.parametrize(
    ("answer", "truth", "equal"),
    [
        ("2x+1", "1+2x", True),
        ("\\frac{x}{2}", "0.5x", True),
        ("\\sqrt{8}", "2\\sqrt{2}", True),
        ("(x-1)(x+1)", "x^2-1", True),
        ("y = 42", "42", True),
        ("f(x) = 2x", "2x", True),
        ("x+1", "x+2", False),
        ("3.14", "\\pi", False),
        # what math-verify alone considers equal
        ("der", "red", False),
        ("41 = 42", "42", False),
        ("5 or \\boxed{42}", "42", False),
        # several values
        ("41, 42", "42", False),
        ("\\{41, 42\\}", "42", False),
        ("[41, 43]", "42", False),
        ("x = 41 or x = 42", "42", False),
        ("", "42", False),
        ("a", "A", False),
    ],
)
def test_formulas_are_equal_only_where_proven(comparer: SymbolicComparer, answer: str, truth: str, equal: bool) -> None:
    assert comparer(answer, truth) is equal


def test_a_formula_that_never_ends_is_not_equal_and_the_next_one_is_compared() -> None:
    comparer = SymbolicComparer(timeout_s=1.0)
    assert comparer("2x+1", "1+2x")  # started
    assert comparer._process is not None
    assert os.getpgid(comparer._process.pid) != os.getpgid(0), "Ctrl-C in a terminal would end it"
    begun = time.perf_counter()
    assert not comparer("9^{9^{9^{9}}}", "7")
    assert not comparer("9^{9^{9^{9}}}", "7")  # known by now
    assert time.perf_counter() - begun < 3
    assert comparer("x+x", "2x")
    comparer.close()


def test_event_loop_stays_responsive_while_formulas_are_compared() -> None:
    """A formula that takes an hour is given up on a thread, and its answer is wrong, not unscored."""
    module = RewardModule(RewardConfig(mathematics=True))
    subject = task(box=None, truth="1+2x")
    scored = group(*(Recorder(subject).answer(text) for text in ("2x+1", "9^{9^{9^{9}}}", "2x+2")))

    async def run() -> float:
        worst, done = 0.0, asyncio.gather(*(module.score_answer(t) for t in scored.trajectories))
        while not done.done():
            begun = time.perf_counter()
            await asyncio.sleep(0.01)
            worst = max(worst, time.perf_counter() - begun)
        await done
        return worst

    assert asyncio.run(run()) < 0.5
    module.score_group(scored)
    module.close()
    assert [t.reward.correct for t in scored.trajectories if t.reward] == [True, False, False]
    plain = RewardModule()
    plain.score_group(scored)
    assert [t.reward.correct for t in scored.trajectories if t.reward] == [False] * 3


def test_a_missing_package_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"reward.mathematics needs.*math-verify"):
        RewardModule(RewardConfig(mathematics=True))
