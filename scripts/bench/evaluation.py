"""Measures an evaluation against the bare engine, and the figures of many stored trajectories.

    python scripts/bench/evaluation.py --json FILE [--model FOLDER]

Digit questions, greedy, with the tool: agent, sandbox, scoring, one line a question on disk, figures. Beside it the
engine alone answers the same requests: every turn is handed to it when the one before it is finished, with as many
trajectories under way. The two take turns, each from fresh caches; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from cv_lightning.environment import prepare_environment  # noqa: E402

prepare_environment()


from cv_lightning.agent.config import AgentConfig  # noqa: E402
from cv_lightning.agent.dialogue import DialogueEncoder  # noqa: E402
from cv_lightning.agent.driver import Rollout  # noqa: E402
from cv_lightning.agent.prompt import PromptConfig  # noqa: E402
from cv_lightning.background import Background  # noqa: E402
from cv_lightning.commands.tiny import TinyCheckpoint, write  # noqa: E402
from cv_lightning.digits.scenes import KINDS, DigitsConfig  # noqa: E402
from cv_lightning.digits.sources import HeldOutScenes  # noqa: E402
from cv_lightning.engines import Completion, Engine, EngineConfig, Request, SamplingConfig, build_engine  # noqa: E402
from cv_lightning.evaluation.outcome import Outcome, outcomes  # noqa: E402
from cv_lightning.evaluation.results import evaluated  # noqa: E402
from cv_lightning.models.loading import PolicyConfig, load_adapter, load_policy  # noqa: E402
from cv_lightning.rewards import RewardConfig, RewardModule  # noqa: E402
from cv_lightning.rollout.collector import Collector  # noqa: E402
from cv_lightning.sandbox import Sandbox, SandboxConfig  # noqa: E402
from cv_lightning.trajectory import TrajectoryWriter, read_groups  # noqa: E402
from cv_lightning.types import Group  # noqa: E402

CONFIGS = ROOT / "configs/quickstart"
TRAINED = ROOT / "runs/quickstart-seed0/rl/model"
NUM_STORED = 10_000
BARS = {"eval_over_replay": 0.9, "metrics_of_10k_s": 5.0}


@dataclass
class RecordingEngine:
    """The engine, keeping every request by trajectory."""

    engine: Engine
    requests: dict[str, list[Request]] = field(default_factory=lambda: defaultdict(list))

    @property
    def policy_version(self) -> int:
        """Version of the engine's weights."""
        return self.engine.policy_version

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence."""
        return self.engine.max_model_len

    def add_request(self, request: Request) -> None:
        """Queue a turn."""
        self.requests[request.id].append(request)
        self.engine.add_request(request)

    def step(self) -> list[Completion]:
        """Advance the engine."""
        return self.engine.step()

    def has_unfinished(self) -> bool:
        """True if the engine has requests."""
        return self.engine.has_unfinished()

    def abort(self, ids: Sequence[str]) -> None:
        """Drop requests."""
        self.engine.abort(ids)


class Bench:
    """Engine, sandbox and questions, shared by both."""

    def __init__(self, model: Path, questions: int, folder: Path) -> None:
        self.adapter = load_adapter(PolicyConfig(path=str(model)))
        self.policy = load_policy(PolicyConfig(path=str(model), dtype="float32"))
        self.encoder = DialogueEncoder(self.adapter)
        engine = EngineConfig(**_yaml("engine"))
        self.window = 2 * engine.max_num_seqs
        self.engine = build_engine(engine, str(model), dtype="float32", seed=0, model=None, adapter=self.adapter)
        self.sandbox = Sandbox(SandboxConfig())
        self.sandbox.start()
        self.background = Background()
        self.rewards = RewardModule(RewardConfig(**_yaml("reward")))
        scenes = HeldOutScenes(DigitsConfig(), dict.fromkeys(KINDS, questions // len(KINDS)))
        self.tasks = [scenes.row(position) for position in range(len(scenes))]
        self.folder = folder

    def evaluate(self, number: int) -> tuple[float, dict[str, list[Request]]]:
        """Seconds of an evaluation from fresh caches, figures and files included, and its requests."""
        self.engine.update_weights(self.policy.named_parameters(), version=0)
        agent = _yaml("agent")
        config = AgentConfig(**agent | {"prompt": PromptConfig(**_yaml("prompt"))})
        engine = RecordingEngine(self.engine)
        rollout = Rollout(
            engine,  # type: ignore[arg-type]
            self.sandbox,
            self.encoder,
            self.background,
            config,
            self.adapter.vision_ids,
            score=self.rewards.score_answer,
            window=self.window,
        )
        collector = Collector(rollout, self.rewards)
        found: list[Outcome] = []
        begun = time.perf_counter()
        with TrajectoryWriter(self.folder / str(number), background=True) as writer:

            def keep(group: Group) -> None:
                writer.write_group(group, 0)
                found.extend(outcomes([group]))

            collector.on_group = keep
            collector.roll_out(self.tasks, 1, SamplingConfig(temperature=0.0))
        evaluated(found)
        return time.perf_counter() - begun, engine.requests

    def replay(self, requests: dict[str, list[Request]]) -> float:
        """Seconds of the engine alone for the same requests, from fresh caches."""
        self.engine.update_weights(self.policy.named_parameters(), version=0)
        waiting = deque(deque(turns) for turns in requests.values())
        under_way: dict[str, deque[Request]] = {}
        begun = time.perf_counter()
        while waiting or under_way:
            while waiting and len(under_way) < self.window:
                turns = waiting.popleft()
                under_way[turns[0].id] = turns
                self.engine.add_request(turns.popleft())
            for done in self.engine.step():
                turns = under_way.pop(done.id)
                if turns:
                    under_way[done.id] = turns
                    self.engine.add_request(turns.popleft())
        return time.perf_counter() - begun

    def close(self) -> None:
        """End processes and threads."""
        self.background.close()
        self.rewards.close()
        self.sandbox.close()
        self.engine.close()


def _yaml(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return found


def metrics_seconds(store: Path, folder: Path, repeats: int) -> tuple[float, float]:
    """Median seconds, and processor seconds, of reading and summarising `NUM_STORED` trajectories of a store's kind."""
    lines = [json.loads(line) for path in (store / "trajectories").glob("*.jsonl") for line in path.open()]
    many = folder / "many/trajectories/groups.rank0.jsonl"
    many.parent.mkdir(parents=True)
    with many.open("w") as file:
        for number in range(NUM_STORED):
            line = lines[number % len(lines)]
            line["task"] = line["task"] | {"id": f"question-{number}"}
            file.write(json.dumps(line) + "\n")
    seconds, processor = [], []
    for _ in range(repeats):
        begun, worked = time.perf_counter(), time.process_time()
        figures = evaluated(outcomes(read_groups(folder / "many")))
        seconds.append(time.perf_counter() - begun)
        processor.append(time.process_time() - worked)
        assert figures.summary.num_trajectories == NUM_STORED
    return statistics.median(seconds), statistics.median(processor)


def measure(model: Path | None, questions: int, repeats: int) -> dict[str, float]:
    """Medians and ratios."""
    seconds: dict[str, list[float]] = {"eval": [], "replay": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model is None:
            model = folder / "tiny"
            write(TinyCheckpoint(out=model))
        bench = Bench(model, questions, folder)
        for repeat in range(-1, repeats):
            elapsed, requests = bench.evaluate(repeat)
            alone = bench.replay(requests)
            if repeat >= 0:  # the first round warms the engine up
                seconds["eval"].append(elapsed)
                seconds["replay"].append(alone)
        bench.close()
        ten_thousand, processor = metrics_seconds(folder / "0", folder, repeats)
    medians = {part: statistics.median(times) for part, times in seconds.items()}
    return {
        "eval_over_replay": medians["replay"] / medians["eval"],
        "metrics_of_10k_s": ten_thousand,
        "metrics_of_10k_processor_s": processor,
        "questions_per_s": questions / medians["eval"],
        **{f"{part}_s": value for part, value in medians.items()},
        "turns": float(sum(map(len, requests.values()))),
    }


def main() -> int:
    """Print and write the figures; with --check the exit code says whether the bars are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--model", type=Path, help="default the quickstart's, else a random tiny one")
    parser.add_argument("--questions", type=int, default=1000, help="a multiple of four")
    parser.add_argument("--repeats", type=int, default=5, help="evaluations and replays")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a bar is missed")
    options = parser.parse_args()
    model = options.model or (TRAINED if TRAINED.is_dir() else None)
    figures = measure(model, options.questions, options.repeats)
    for name, value in figures.items():
        print(f"{name:34} {value:10.3f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    missed = figures["eval_over_replay"] < BARS["eval_over_replay"]
    return int(options.check and (missed or figures["metrics_of_10k_s"] > BARS["metrics_of_10k_s"]))


if __name__ == "__main__":
    sys.exit(main())
