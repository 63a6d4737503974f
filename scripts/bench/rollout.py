"""Measures the rollout loop on a real engine: asynchronous against lockstep, every second tool call slow.

    python scripts/bench/rollout.py --json FILE

32 trajectories of 2 to 6 tool calls on the tiny Qwen3-VL. Turns are 4 to 32 tokens long, log-uniform, by a plan that
all loops share, so that they decode exactly the same number of tokens; every second call of the rollout sleeps 0.2 s.
Both lockstep loops wait for every turn before any tool runs, and for every tool before any turn continues: one runs a
round's tools at once, the other, as most trainers do, one after the other. The loops take turns; medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from cv_lightning.environment import prepare_environment  # noqa: E402

prepare_environment()

from PIL import Image  # noqa: E402

from cv_lightning.agent.config import AgentConfig  # noqa: E402
from cv_lightning.agent.dialogue import DialogueEncoder  # noqa: E402
from cv_lightning.agent.driver import Rollout  # noqa: E402
from cv_lightning.agent.prompt import PromptConfig  # noqa: E402
from cv_lightning.agent.request import RolloutRequest  # noqa: E402
from cv_lightning.background import Background  # noqa: E402
from cv_lightning.commands.tiny import TinyCheckpoint, write  # noqa: E402
from cv_lightning.digits.tiny import MARKUP_TOKENS  # noqa: E402
from cv_lightning.engines import Completion, Engine, EngineConfig, Request, SamplingConfig, build_engine  # noqa: E402
from cv_lightning.models.loading import PolicyConfig, load_adapter, load_policy  # noqa: E402
from cv_lightning.types import EndState, SandboxResult, Task, ToolStatus, Trajectory  # noqa: E402

NUM_TRAJECTORIES = 32
SLEEP_S = 0.2
CALLS, TOKENS = (2, 6), (4, 32)
CALL = '<tool_call>\n{"name": "code_image_tool", "arguments": {"code": "result = image.rotate(90)"}}\n</tool_call>'
ANSWER = "<answer>1</answer>"
LOOPS = ("async", "lockstep", "lockstep_serial_tools")
BAR = 0.6


@dataclass
class PlannedEngine:
    """The real engine, told how long every turn is and whether it ends with a call or an answer.

    The policy is random and would never call the tool; what it decodes, and all the work of it, is real.
    """

    engine: Engine
    encoder: DialogueEncoder

    def __post_init__(self) -> None:
        self.call, self.answer = self.encoder.assistant_ids(CALL), self.encoder.assistant_ids(ANSWER)

    @property
    def policy_version(self) -> int:
        """Version of the engine's weights."""
        return self.engine.policy_version

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence."""
        return self.engine.max_model_len

    def add_request(self, request: Request) -> None:
        """Queue a turn of its planned length."""
        plan, turn = plan_of(request.id), len(request.images) - 1
        self.engine.add_request(replace(request, max_tokens=plan[turn]))

    def step(self) -> list[Completion]:
        """Advance, and end what finished as planned."""
        return [self._ended(done) for done in self.engine.step()]

    def _ended(self, done: Completion) -> Completion:
        assert done.prompt_ids is not None
        turn = sum(token == self.encoder.end_id for token in done.prompt_ids) // 2
        ids = self.call if turn < len(plan_of(done.id)) - 1 else self.answer
        return replace(
            done, token_ids=[*done.token_ids, *ids], logprobs=[*done.logprobs, *[0.0] * len(ids)], stopped=True
        )

    def has_unfinished(self) -> bool:
        """True if the engine has requests."""
        return self.engine.has_unfinished()

    def abort(self, ids: Sequence[str]) -> None:
        """Forget requests."""
        self.engine.abort(ids)


def plan_of(run_id: str) -> list[int]:
    """Tokens of every turn of a trajectory; the last one answers."""
    rng = random.Random(run_id)
    low, high = map(math.log, TOKENS)
    return [round(math.exp(rng.uniform(low, high))) for _ in range(rng.randint(*CALLS) + 1)]


class SlowTool:
    """Every second call sleeps; `serial` runs one call at a time."""

    def __init__(self, serial: bool) -> None:
        self.calls = 0
        self.turn = asyncio.Semaphore(1 if serial else NUM_TRAJECTORIES)

    async def run(self, image: Image.Image, code: str, *, owner: str = "", max_shown: int = 0) -> SandboxResult:
        """Turn the image, after a sleep or at once."""
        self.calls += 1
        slow = self.calls % 2 == 0
        async with self.turn:
            await asyncio.sleep(SLEEP_S if slow else 0)
        return SandboxResult(status=ToolStatus.OK, image=image.rotate(90))


class Bench:
    """Engine and tasks, shared by all loops."""

    def __init__(self, folder: Path) -> None:
        write(TinyCheckpoint(out=folder))
        self.adapter = load_adapter(PolicyConfig(path=str(folder)))
        self.policy = load_policy(PolicyConfig(path=str(folder), dtype="float32"))
        self.encoder = DialogueEncoder(self.adapter)
        config = EngineConfig(kind="vllm", max_model_len=1024, max_num_seqs=NUM_TRAJECTORIES)
        self.engine = build_engine(config, str(folder), dtype="float32", seed=0, model=None, adapter=self.adapter)
        tokenizer = self.adapter.tokenizer
        markup = [tokenizer.convert_tokens_to_ids(token) for token in MARKUP_TOKENS]
        ends = [self.encoder.end_id, tokenizer.pad_token_id]
        self.banned = (*self.adapter.vision_ids, *markup, *ends)
        self.tasks = [
            Task(
                id=f"t{i}",
                question="Read it.",
                images=(Image.effect_noise((96, 96), 60 + i).convert("RGB"),),
                ground_truth="1",
            )
            for i in range(NUM_TRAJECTORIES)
        ]

    def rollout(self, loop: str, background: Background) -> tuple[float, list[Trajectory]]:
        """Seconds of one rollout from fresh caches, and its trajectories."""
        self.engine.update_weights(self.policy.named_parameters(), version=0)
        prompt = PromptConfig(system="none", state_size=False)
        config = AgentConfig(deterministic=loop != "async", max_turns=CALLS[1] + 1, prompt=prompt)
        engine, tool = PlannedEngine(self.engine, self.encoder), SlowTool(serial=loop == "lockstep_serial_tools")
        rollout = Rollout(engine, tool, self.encoder, background, config, self.banned)  # type: ignore[arg-type]
        requests = [RolloutRequest(task, 0) for task in self.tasks]
        begun = time.perf_counter()
        trajectories = rollout.run(requests, SamplingConfig(seed=1))
        return time.perf_counter() - begun, trajectories


def measure(repeats: int) -> dict[str, float]:
    """Medians of every loop, and the ratios."""
    background = Background()
    seconds: dict[str, list[float]] = {loop: [] for loop in LOOPS}
    sampled: set[int] = set()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for repeat in range(-1, repeats):
            for loop in LOOPS:
                elapsed, trajectories = bench.rollout(loop, background)
                states = {t.end_state for t in trajectories}
                assert states == {EndState.ANSWERED}, f"{loop}: trajectories ended as {states}"
                sampled.add(sum(sum(t.loss_mask) for t in trajectories))
                if repeat >= 0:  # the first round warms the engine up
                    seconds[loop].append(elapsed)
        calls = sum(t.num_tool_calls for t in trajectories)
        bench.engine.close()
    background.close()
    assert len(sampled) == 1, f"the loops decoded different numbers of tokens: {sampled}"
    medians = {loop: statistics.median(times) for loop, times in seconds.items()}
    return {
        "async_over_lockstep": medians["async"] / medians["lockstep"],
        "async_over_lockstep_serial_tools": medians["async"] / medians["lockstep_serial_tools"],
        **{f"{loop}_s": value for loop, value in medians.items()},
        "tokens": float(sampled.pop()),
        "tool_calls": float(calls),
    }


def main() -> int:
    """Print and write the figures; with --check the exit code says whether the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repeats", type=int, default=5, help="rollouts of each loop")
    parser.add_argument("--check", action="store_true", help="exit code 1 where the bar is missed")
    options = parser.parse_args()
    figures = measure(options.repeats)
    for name, value in figures.items():
        print(f"{name:34} {value:10.3f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return int(options.check and figures["async_over_lockstep"] > BAR)


if __name__ == "__main__":
    sys.exit(main())
