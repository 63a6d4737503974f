"""What the real vLLM engine does to the process that it shares with the trainer, and to requests while it is busy.

In a file of its own: vLLM engines share globals of the process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_samples import Policy, finish, request_of, worst_gap
from PIL import Image
from sleeping_worker import SleepingWorker, lose_cache

from cv_lightning.engines import EngineConfig
from cv_lightning.engines.process import keep_threads
from cv_lightning.engines.vllm import VLLMEngine, _clear_unnamed_buffers
from cv_lightning.models.adapters import ImageInputs
from cv_lightning.types import EngineError

TOLERANCE = 1e-4
TWO_PROMPTS = [[(96, 96)], [(64, 96), (128, 64)]]
"""Sizes of their images; enough to notice lost weights and stale caches."""
ONE_TEXT = [[]]
"""A prompt without images. Only such a step reads the deepstack inputs as the last step left them."""


def built(policy: Policy, **settings: Any) -> VLLMEngine:
    config = EngineConfig(max_model_len=256, max_num_seqs=32, max_images=4, **settings)
    return VLLMEngine(str(policy.path), config, policy.adapter, dtype="float32")


@pytest.fixture(scope="module")
def policy(tiny_checkpoint: Path) -> Policy:
    return Policy.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A trainer's process group, there before the engine."""
    distributed = torch.distributed
    store = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield distributed
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def engine(policy: Policy, process_group: Any) -> Iterator[VLLMEngine]:
    """The second engine of the process, built with two threads of torch; it processes images in the background."""
    first = built(policy)
    first.update_weights(policy.model.named_parameters(), version=1)
    finish(first, [request_of(policy.dialogue([]), policy.banned, tokens=2)])
    first.close()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    second = built(policy, background_rendering="always")
    second.update_weights(policy.model.named_parameters(), version=1)
    yield second
    second.close()
    torch.set_num_threads(before)


def test_torch_keeps_its_threads_when_an_engine_is_built(engine: VLLMEngine) -> None:
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1, "vLLM's CPU build puts a function that does nothing in its place"
    torch.set_num_threads(2)


def test_a_step_of_the_engine_has_the_threads_that_it_was_built_with(
    engine: VLLMEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's GPU worker compiles with one thread; with another number compiled code would be compiled again."""
    seen, step = [], engine.engine.step

    def noted() -> Any:
        seen.append(torch.get_num_threads())
        return step()

    monkeypatch.setattr(engine, "num_threads", 1)
    monkeypatch.setattr(engine.engine, "step", noted)
    finish(engine, [request_of(policy.dialogue([]), policy.banned, tokens=3)])
    assert set(seen) == {1} and torch.get_num_threads() == 2


def test_threads_are_restored_when_building_fails() -> None:
    setter, before = torch.set_num_threads, torch.get_num_threads()
    with pytest.raises(EngineError), keep_threads():
        torch.set_num_threads(1)
        torch.set_num_threads = lambda count: None
        raise EngineError("no room")
    assert (torch.set_num_threads, torch.get_num_threads()) == (setter, before)


def test_closing_an_engine_leaves_the_trainers_process_group(engine: VLLMEngine, process_group: Any) -> None:
    """The fixture has closed an earlier engine."""
    value = torch.ones(2)
    process_group.all_reduce(value)
    assert value.tolist() == [1.0, 1.0]


def test_a_second_engine_of_the_process_agrees_with_the_trainer(engine: VLLMEngine, policy: Policy) -> None:
    assert worst_gap(policy, engine) <= TOLERANCE


def test_images_are_processed_while_other_requests_decode(
    engine: VLLMEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, process = threading.Event(), engine.images.of

    def gated(image: Image.Image) -> ImageInputs:
        assert gate.wait(60)
        return process(image)

    text, seen = policy.dialogue([]), policy.dialogue([(96, 96)])
    engine.add_request(request_of(text, policy.banned, name="text", tokens=8))
    monkeypatch.setattr(engine.images, "of", gated)
    engine.add_request(request_of(seen, policy.banned, name="image", tokens=8))
    done = []
    while not done:
        done = engine.step()
    assert [completion.id for completion in done] == ["text"] and engine.has_unfinished()
    with pytest.raises(EngineError, match="unfinished"):
        engine.update_weights(policy.model.named_parameters(), version=2)
    gate.set()
    while not (done := engine.step()):
        pass
    assert [completion.id for completion in done] == ["image"] and not engine.has_unfinished()
    assert done[0].prompt_ids == seen.token_ids


def test_requests_aborted_while_their_images_are_processed_are_forgotten(
    engine: VLLMEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, gate, process = threading.Event(), threading.Event(), engine.images.of

    def gated(image: Image.Image) -> ImageInputs:
        running.set()
        assert gate.wait(60)
        return process(image)

    monkeypatch.setattr(engine.images, "of", gated)
    dialogue = policy.dialogue([(160, 96)], seed=77)
    for name in ("running", "queued", "kept"):
        engine.add_request(request_of(dialogue, policy.banned, name=name, tokens=6))
    assert running.wait(60)
    engine.abort(["running", "queued", "never heard of"])
    assert engine.has_unfinished()
    gate.set()
    done = []
    while engine.has_unfinished():
        done += engine.step()
    assert [(completion.id, completion.error) for completion in done] == [("kept", "")]
    again = finish(engine, [request_of(dialogue, policy.banned, name="running", tokens=6)])
    assert again["running"].token_ids == done[0].token_ids
    engine.update_weights(policy.model.named_parameters(), version=3)
    assert worst_gap(policy, engine, shapes=TWO_PROMPTS) <= TOLERANCE


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OSError, MemoryError])
def test_an_image_that_cannot_be_processed_ends_its_own_request(
    engine: VLLMEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def refuse(*_: Any) -> Any:
        raise error("no such placeholder")

    dialogue = policy.dialogue([(96, 96)])
    with monkeypatch.context() as broken:
        broken.setattr(engine.images, "of", refuse)
        engine.add_request(request_of(dialogue, policy.banned, name="bad"))
        (done,) = engine.step()
        broken.setattr(engine, "thread", None)
        with pytest.raises(EngineError, match="no such placeholder"):
            engine.add_request(request_of(dialogue, policy.banned, name="bad"))
    assert done.id == "bad" and "no such placeholder" in done.error and not engine.has_unfinished()
    assert not finish(engine, [request_of(dialogue, policy.banned, tokens=2)])["r"].error


@pytest.mark.parametrize("level", [1, 2])
def test_three_sleeps_of_either_level_leave_engine_and_trainer_in_agreement(
    engine: VLLMEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    """Memory is lost by a stand-in, as on a GPU: at level 2 weights and the plain list of deepstack inputs."""
    worker = SleepingWorker(engine.llm)
    monkeypatch.setattr(engine, "sleeps", True)
    monkeypatch.setattr(engine, "sleep_level", level)
    monkeypatch.setattr(engine.llm, "sleep", worker.sleep)
    monkeypatch.setattr(engine.llm, "wake_up", worker.wake_up)
    for cycle in range(3):
        assert engine.sleep() and worker.asleep == {"weights", "kv_cache"}
        policy.perturb(seed=cycle)
        engine.update_weights(policy.model.named_parameters(), version=10 + cycle)
        assert not worker.asleep and worst_gap(policy, engine, shapes=ONE_TEXT) <= TOLERANCE
        assert worst_gap(policy, engine, shapes=TWO_PROMPTS) <= TOLERANCE


def test_level_2_without_clearing_the_deepstack_inputs_is_noticed(
    engine: VLLMEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault that the comparison after waking exists for."""
    worker = SleepingWorker(engine.llm)
    with monkeypatch.context() as faulty:
        faulty.setattr(engine, "sleeps", True)
        faulty.setattr(engine, "sleep_level", 2)
        faulty.setattr(engine.llm, "sleep", worker.sleep)
        faulty.setattr(engine.llm, "wake_up", worker.wake_up)
        faulty.setattr("cv_lightning.engines.vllm._clear_unnamed_buffers", lambda worker, names: None)
        engine.sleep()
        engine.update_weights(policy.model.named_parameters(), version=13)
    with pytest.raises((AssertionError, EngineError, ValueError)):
        assert worst_gap(policy, engine, shapes=ONE_TEXT) <= TOLERANCE
    engine.llm.collective_rpc(_clear_unnamed_buffers, args=(engine.adapter.unsaved_engine_buffers,))
    engine.llm.collective_rpc(lose_cache)  # blocks that are used again hold what the faulty step left
    engine.update_weights(policy.model.named_parameters(), version=14)
    assert worst_gap(policy, engine, shapes=ONE_TEXT) <= TOLERANCE


def test_a_batch_still_running_is_ended_before_the_weights_change(
    engine: VLLMEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Async scheduling: the last request has finished, but its batch is in flight. The CPU build has none."""
    core, steps = engine.engine.engine_core.engine_core, []
    monkeypatch.setattr(core, "batch_queue", ["a batch"], raising=False)

    def step() -> list[Any]:
        steps.append(1)
        core.batch_queue.clear()
        return []

    monkeypatch.setattr(engine.engine, "step", step)
    engine.update_weights(policy.model.named_parameters(), version=20)
    assert steps == [1]
    core.batch_queue.append("a batch that never ends")
    monkeypatch.setattr(engine.engine, "step", lambda: [])
    with pytest.raises(EngineError, match="under way"):
        engine.update_weights(policy.model.named_parameters(), version=21)
    core.batch_queue.clear()


def test_a_prefix_cache_that_stays_is_an_error(
    engine: VLLMEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(EngineError, match="prefix cache"):
        engine.update_weights(policy.model.named_parameters(), version=22)
