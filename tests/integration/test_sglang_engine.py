"""SGLang as a rollout engine, against a server that speaks its native protocol with real weights behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
from engine_samples import Policy, finish, request_of, worst_gap
from model_server import ModelServer

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.callbacks.rollout import RolloutCallback
from cv_lightning.data.modules import TaskDataModule
from cv_lightning.engine import EngineConfig, ServerConfig, build_engine
from cv_lightning.engine.sglang import SGLangEngine
from cv_lightning.model.loading import PolicyConfig
from cv_lightning.modules.base import OptimizerConfig
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.types import EngineError

TOLERANCE = 1e-4


def config_of(url: str, folder: Path, **changes: object) -> EngineConfig:
    server = ServerConfig(base_url=url, weights_folder=str(folder / "weights"), max_backoff_s=0.2, max_attempts=2)
    return EngineConfig(kind="sglang", max_model_len=256, max_images=4, server=replace(server, **changes))


def connect(config: EngineConfig, policy: Policy) -> SGLangEngine:
    engine = build_engine(
        config, str(policy.path), dtype="float32", seed=0, model=policy.model, processor=policy.processor
    )
    assert isinstance(engine, SGLangEngine)
    return engine


@pytest.fixture(scope="module")
def server(tiny_qwen25: Path) -> Iterator[ModelServer]:
    with ModelServer(tiny_qwen25) as running:
        yield running


@pytest.fixture(scope="module")
def policy(tiny_qwen25: Path) -> Policy:
    return Policy.load(tiny_qwen25)


@pytest.fixture
def engine(server: ModelServer, policy: Policy, tmp_path: Path) -> Iterator[SGLangEngine]:
    running = connect(config_of(server.root, tmp_path), policy)
    yield running
    server.misbehave = lambda number, path: 0
    running.close()


def test_weights_reach_the_server_and_only_by_a_sync(
    engine: SGLangEngine, server: ModelServer, policy: Policy, tmp_path: Path
) -> None:
    policy.perturb(seed=3)
    assert worst_gap(policy, engine) > 100 * TOLERANCE
    engine.update_weights(iter(policy.model.named_parameters()), version=4)
    assert engine.weight_version == 4 and server.weight_version == "4"
    assert worst_gap(policy, engine) <= TOLERANCE
    assert worst_gap(policy, engine, temperature=0.6) <= TOLERANCE
    policy.perturb(seed=4)
    engine.update_weights(iter(policy.model.named_parameters()), version=5)
    assert worst_gap(policy, engine) <= TOLERANCE
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["weights0", "weights1"]


def test_a_weight_that_is_left_out_is_named(engine: SGLangEngine, policy: Policy) -> None:
    some = ((name, tensor) for name, tensor in policy.model.named_parameters() if not name.endswith("norm1.weight"))
    with pytest.raises(EngineError, match=r"norm1\.weight"):
        engine.update_weights(some, version=9)
    assert next(some, None) is None, "the iterator is exhausted, as ZeRO-3 needs it"
    assert engine.weight_version != 9


def test_turns_end_seeds_repeat_and_bans_hold(engine: SGLangEngine, policy: Policy) -> None:
    dialogue, end = policy.dialogue([(96, 96)]), policy.encoder.end_id
    same = [request_of(dialogue, policy.banned, name=name, seed=11) for name in ("a", "b")]
    other = request_of(dialogue, policy.banned, name="c", seed=12)
    done = finish(engine, [*same, other])
    assert done["a"].token_ids == done["b"].token_ids != done["c"].token_ids
    pad = policy.processor.tokenizer.pad_token_id
    capped = finish(engine, [request_of(dialogue, [*policy.banned, end, pad], tokens=5)])["r"]
    assert (len(capped.token_ids), capped.stopped) == (5, False)
    others = [token for token in range(policy.model.config.text_config.vocab_size) if token != end]
    ended = finish(engine, [request_of(dialogue, others, tokens=5)])["r"]
    assert (ended.token_ids, ended.stopped) == ([end], True)


def test_a_request_that_fails_is_its_own_error(engine: SGLangEngine, server: ModelServer, policy: Policy) -> None:
    first = len(server.requests)
    server.misbehave = lambda number, path: 422 if number == first else 503 if number == first + 1 else 0
    requests = [request_of(policy.dialogue([(96, 96)]), policy.banned, name=name) for name in ("a", "b", "c")]
    done = finish(engine, requests)
    failed = [each for each in done.values() if each.error]
    assert len(done) == 3 and len(failed) == 1, "the 503 was repeated, the 422 was not"
    assert "422" in failed[0].error and failed[0].logprobs is None


def test_a_prompt_that_the_server_expands_otherwise_is_refused(
    engine: SGLangEngine, server: ModelServer, policy: Policy
) -> None:
    server.resizes = True
    done = finish(engine, [request_of(policy.dialogue([(96, 96)]), policy.banned)])["r"]
    server.resizes = False
    assert "resizes images otherwise" in done.error


def test_no_server_is_told_at_once(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"engine\.server\.base_url"):
        connect(config_of("http://127.0.0.1:9", tmp_path), policy)


def test_grpo_trains_through_the_server(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Two iterations with the start-up self-test; the server begins with weights of its own."""
    with ModelServer(tiny_checkpoint) as server:
        server.policy.perturb(seed=1)
        agent = AgentConfig(max_turns=2, max_turn_tokens=12, max_images=2, prompt=PromptConfig(system="none"))
        rollout = RolloutCallback(agent=agent, engine=config_of(server.root, tmp_path), num_samples=2)
        module = GRPOModule(PolicyConfig(path=str(tiny_checkpoint), dtype="float32"), OptimizerConfig(lr=1e-3))
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[rollout],
        )
        trainer.fit(module, datamodule=TaskDataModule(tasks_per_iteration=2, num_iterations=2))
        assert server.weight_version == "1"
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert 0 <= metrics["policy/parity_max"] <= TOLERANCE
    assert metrics["rollout/trajectories"] == 4
    assert not any(value for name, value in metrics.items() if name.startswith("rollout/end_error"))


@pytest.mark.skipif("CVL_SGLANG_URL" not in os.environ, reason="set CVL_SGLANG_URL and CVL_SGLANG_MODEL (its folder)")
def test_a_real_sglang_server(tmp_path: Path) -> None:
    """A server with the float32 model of CVL_SGLANG_MODEL, which sees the same disk as this test."""
    real = Policy.load(Path(os.environ["CVL_SGLANG_MODEL"]))
    engine = connect(replace(config_of(os.environ["CVL_SGLANG_URL"], tmp_path), max_model_len=4096), real)
    try:
        real.perturb(seed=3, scale=1e-3)
        engine.update_weights(iter(real.model.named_parameters()), version=1)
        assert worst_gap(real, engine) <= TOLERANCE
    finally:
        engine.close()
