"""Speed of scoring: a batch without a judge, and the time that a judge adds after the last trajectory has finished.

    python scripts/bench/rewards.py [--json FILE] [--check]

Without a judge: 64 groups of 8 trajectories with two real tool calls each, on one core. With one: a local server that
answers after 300 ms, 64 requests at a time, 512 trajectories that finish over the seconds of a rollout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "unit")]

from judge_server import JudgeServer  # noqa: E402 - the tests' server and trajectories
from reward_samples import BOX, Recorder, group, task  # noqa: E402

from cv_lightning.rewards import JudgeConfig, RewardConfig, RewardModule  # noqa: E402
from cv_lightning.rewards.metrics import means, reward_sums  # noqa: E402
from cv_lightning.types import Group, Trajectory  # noqa: E402

NUM_GROUPS, GROUP_SIZE = 64, 8
LATENCY_S = 0.3
TARGET_MS_PER_100 = 50.0
TARGET_LATENCIES = 1.2


def wrong_answer(index: int, count: int) -> tuple[str, str, str]:
    """Question, truth and a wrong answer that was not given before: in turn a text, a number, an option, a date."""
    options = "Which colour has the car?\nA. red\nB. blue\nC. dark green\nD. none of these"
    return (
        ("What is written?", f"word {index}", f"word {index} indeed {count}"),
        ("How many are there?", str(index), f"I count {index + count + 1} of them"),
        (options, "A", f"The answer is B, since {count} are blue"),
        ("When was it?", "May 1, 2024", f"on 2 May {count}"),
    )[index % 4]


def batch(first: int = 0) -> list[Group]:
    """64 groups of 8: turned and small tasks, two calls each, thoughts of some 2,000 characters, wrong answers.

    Args:
        first: number of the first answer; batches of different answers share nothing that scoring could remember.
    """
    thought = "<think>" + "the sign is turned by a quarter " * 60 + "</think>"
    groups = []
    for index in range(NUM_GROUPS):
        members = []
        question, truth, _ = wrong_answer(index, 0)
        subject = task("rotate_180", "crop", truth=truth, question=question)
        for sample in range(GROUP_SIZE):
            recorder = Recorder(subject).call("rotate_180", "contrast_up").call(BOX)
            for turn in recorder.turns:
                turn.text = thought + "<tool_call>" + json.dumps({"code": "x = 1\n" * 60}) + "</tool_call>"
            answer = wrong_answer(index, first + index * GROUP_SIZE + sample)[2]
            members.append(recorder.answer(raw=f"{thought}<answer>{answer}</answer>"))
        groups.append(group(*members))
    return groups


def without_judge(repeats: int = 7) -> float:
    """Milliseconds per 100 trajectories, `score_group` and `metrics` together, median of as many different batches."""
    module, seconds = RewardModule(), []
    for repeat in range(repeats):
        groups = batch(repeat * NUM_GROUPS * GROUP_SIZE)
        begun = time.process_time()
        for each in groups:
            module.score_group(each)
        means(reward_sums(groups))
        seconds.append(time.process_time() - begun)
    return median(seconds) * 1000 / (NUM_GROUPS * GROUP_SIZE) * 100


def with_judge(rollout_s: float) -> dict[str, float]:
    """Seconds from the end of the last trajectory until everything is scored.

    Args:
        rollout_s: trajectories finish at random moments of this span, the last one at its end.
    """
    groups = batch()
    trajectories = [t for each in groups for t in each.trajectories]

    async def finish(module: RewardModule, trajectory: Trajectory, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await module.score_answer(trajectory)

    async def rollout(module: RewardModule) -> float:
        rng = random.Random(0)
        moments = [rng.uniform(0, rollout_s) for _ in trajectories[1:]] + [rollout_s]
        begun = time.perf_counter()
        await asyncio.gather(*(finish(module, t, at) for t, at in zip(trajectories, moments, strict=True)))
        return time.perf_counter() - begun - rollout_s

    with JudgeServer(latency_s=LATENCY_S) as server:
        config = RewardConfig(judge=JudgeConfig(base_url=server.url, max_parallel=64))
        module = RewardModule(config)
        added = asyncio.run(rollout(module))
        begun = time.perf_counter()
        for each in groups:
            module.score_group(each)
        added += time.perf_counter() - begun
        judged = sum(t.reward is not None and t.reward.scored_by == "judge" for t in trajectories)
        module.close()
        return {"added_s": added, "judged": float(judged), "requests": float(len(server.requests))}


def main() -> int:
    """Run both; with --check the exit code says whether the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a target is missed")
    parser.add_argument("--rollout-s", type=float, default=5.0, help="length of the pretended rollout")
    options = parser.parse_args()
    found = {"score_ms_per_100": without_judge(), **with_judge(options.rollout_s)}
    found["added_latencies"] = found["added_s"] / LATENCY_S
    print(
        f"scoring without judge: {found['score_ms_per_100']:.2f} ms per 100 trajectories (target {TARGET_MS_PER_100:g})"
    )
    print(
        f"judge of {LATENCY_S * 1000:.0f} ms, 64 parallel, "
        f"{found['requests']:.0f} requests over {options.rollout_s:g} s: "
        f"{found['added_latencies']:.2f} latencies after the last trajectory (target {TARGET_LATENCIES:g})"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    met = found["score_ms_per_100"] <= TARGET_MS_PER_100 and found["added_latencies"] <= TARGET_LATENCIES
    return int(options.check and not met)


if __name__ == "__main__":
    sys.exit(main())
