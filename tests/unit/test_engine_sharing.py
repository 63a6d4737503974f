"""When an engine gives its memory back, and how several ranks drive one."""

from __future__ import annotations

import queue
import threading

import pytest
from PIL import Image

from cv_lightning.engines import Completion, EngineConfig, Request, ServerConfig
from cv_lightning.engines.base import must_sleep
from cv_lightning.engines.tensor_parallel import EngineCommands, LeaderEngine, run_follower
from cv_lightning.types import EngineError

H100, H200 = 80e9, 141e9


@pytest.mark.parametrize(
    ("memory", "ranks", "sleeps"),
    [(H100, 1, True), (H100, 4, True), (H100, 8, False), (H200, 4, False), (H200, 1, True)],
)
def test_the_engine_sleeps_where_it_and_the_trainer_do_not_fit(memory: float, ranks: int, sleeps: bool) -> None:
    eight_billion = 8_000_000_000
    config = EngineConfig()
    assert must_sleep(config, memory=memory, num_parameters=eight_billion, num_ranks=ranks) is sleeps
    assert must_sleep(config, memory=memory, num_parameters=0, num_ranks=ranks), "what is not known may be too much"
    for mode, expected in (("always", True), ("never", False)):
        config = EngineConfig(sleep=mode)  # type: ignore[arg-type]
        assert must_sleep(config, memory=memory, num_parameters=eight_billion, num_ranks=ranks) is expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tensor_parallel_size": 0}, r"engine\.tensor_parallel_size"),
        ({"tensor_parallel_size": 2, "kind": "transformers"}, r"engine\.kind vllm"),
        ({"tensor_parallel_size": 2, "kind": "sglang", "server": ServerConfig()}, r"engine\.kind vllm"),
        ({"tensor_parallel_size": 2, "kind": "server", "server": ServerConfig(model="m")}, r"engine\.kind vllm"),
        ({"sync_bucket_gb": 0.0}, r"engine\.sync_bucket_gb"),
    ],
)
def test_contradicting_settings_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**setting)  # type: ignore[arg-type]


class Recorder:
    """Finishes a request two steps after it came, and remembers what happened to it in which order."""

    policy_version = 3
    max_model_len = 64

    def __init__(self) -> None:
        self.events: list[str] = []
        self.left: dict[str, int] = {}

    def add_request(self, request: Request) -> None:
        if len(request.prompt_ids) > 3:
            raise EngineError("too long")
        self.events.append(f"add {request.id}")
        self.left[request.id] = 2

    def abort(self, ids: list[str]) -> None:
        self.events.append(f"abort {','.join(ids)}")
        for name in ids:
            self.left.pop(name, None)

    def has_unfinished(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Completion]:
        self.events.append("step")
        self.left = {name: count - 1 for name, count in self.left.items()}
        done = [name for name, count in self.left.items() if not count]
        for name in done:
            del self.left[name]
        return [Completion(id=name, token_ids=[1], logprobs=[0.0], stopped=True, prompt_ids=None) for name in done]


def request(name: str, length: int = 2) -> Request:
    return Request(
        id=name,
        prompt_ids=[0] * length,
        images=[Image.new("RGB", (8, 8))],
        max_tokens=1,
        temperature=1.0,
        top_p=1.0,
        seed=0,
        banned_ids=[],
    )


def test_other_ranks_repeat_the_leaders_commands_in_order() -> None:
    leader, follower = Recorder(), Recorder()
    orders: queue.SimpleQueue[EngineCommands] = queue.SimpleQueue()
    engine = LeaderEngine(leader, orders.put)  # type: ignore[arg-type]
    thread = threading.Thread(target=run_follower, args=(follower, orders.get))
    thread.start()
    engine.add_request(request("a"))
    engine.add_request(request("b"))
    engine.step()
    with pytest.raises(EngineError):
        engine.add_request(request("refused", length=9))
    engine.abort(["b"])
    engine.add_request(request("c"))
    while engine.has_unfinished():
        engine.step()
    engine.abort(["late"])
    engine.finish()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert leader.events == follower.events
    assert (
        leader.events[:6] == ["add a", "add b", "step", "abort b", "add c", "step"]
        and leader.events[-1] == "abort late"
    )
    assert engine.policy_version == 3
