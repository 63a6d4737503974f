"""SGLang as a rollout engine, against a server that speaks its native protocol with real weights behind it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
from engine_samples import Policy, finish, request_of, worst_gap
from model_server import ModelServer
from transformers import PreTrainedTokenizerBase

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.callbacks.rollout import RolloutCallback
from cv_lightning.digits.modules import DigitTaskDataModule
from cv_lightning.engines import EngineConfig, ServerConfig, build_engine
from cv_lightning.engines.sglang import SGLangEngine
from cv_lightning.engines.sglang_server import check_version
from cv_lightning.models.loading import PolicyConfig, load_adapter, load_processor
from cv_lightning.modules.base import OptimizerConfig
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.types import EngineError

TOLERANCE = 1e-4


def config_of(url: str, folder: Path, **changes: object) -> EngineConfig:
    server = ServerConfig(base_url=url, weights_folder=str(folder / "weights"), max_backoff_s=0.2, max_attempts=2)
    return EngineConfig(kind="sglang", max_model_len=256, max_images=4, server=replace(server, **changes))


def connect(config: EngineConfig, policy: Policy) -> SGLangEngine:
    engine = build_engine(config, str(policy.path), dtype="float32", seed=0, model=policy.model, adapter=policy.adapter)
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
    assert engine.policy_version == 4 and server.weight_version == "4"
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
    assert engine.policy_version != 9


def test_turns_end_seeds_repeat_and_bans_hold(engine: SGLangEngine, policy: Policy) -> None:
    dialogue, end = policy.dialogue([(96, 96)]), policy.encoder.end_id
    same = [request_of(dialogue, policy.banned, name=name, seed=11) for name in ("a", "b")]
    other = request_of(dialogue, policy.banned, name="c", seed=12)
    done = finish(engine, [*same, other])
    assert done["a"].token_ids == done["b"].token_ids != done["c"].token_ids
    pad = policy.adapter.processor.tokenizer.pad_token_id
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
    dialogue = policy.dialogue([(96, 96)])
    server.resizes = True
    done = finish(engine, [request_of(dialogue, policy.banned)])["r"]
    server.resizes = False
    assert "resizes images otherwise" in done.error and "policy.min_pixels" in done.error


def test_a_prompt_that_is_tokenised_again_is_refused(engine: SGLangEngine, server: ModelServer, policy: Policy) -> None:
    """The ids differ where a policy has sampled a text in other pieces than the tokenizer cuts it into."""
    dialogue, tokenizer = policy.dialogue([(96, 96)]), policy.adapter.processor.tokenizer
    whole = tokenizer("image", add_special_tokens=False)["input_ids"]
    pieces = [i for letter in "image" for i in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    assert len(pieces) > len(whole)
    request = request_of(dialogue, policy.banned)
    request = replace(request, prompt_ids=(*request.prompt_ids, *pieces))
    assert not finish(engine, [request])["r"].error
    server.rewrites_prompts = True
    done = finish(engine, [request])["r"]
    server.rewrites_prompts = False
    assert "tokenises text again" in done.error


def test_the_engine_tells_the_prompt_as_the_server_expanded_it(engine: SGLangEngine, policy: Policy) -> None:
    dialogue = policy.dialogue([(64, 96), (128, 64)])
    assert finish(engine, [request_of(dialogue, policy.banned)])["r"].prompt_ids == dialogue.token_ids


def test_weights_of_another_run_are_noticed(engine: SGLangEngine, server: ModelServer, policy: Policy) -> None:
    engine.update_weights(iter(policy.model.named_parameters()), version=3)
    server.weight_version = "default"  # as after a restart
    done = finish(engine, [request_of(policy.dialogue([(96, 96)]), policy.banned)])["r"]
    assert "'default', not '3'" in done.error


def test_no_server_is_told_at_once(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"engine\.server\.base_url"):
        connect(config_of("http://127.0.0.1:9", tmp_path), policy)


@pytest.mark.parametrize(
    ("fact", "message"),
    [
        ({"version": "0.5.12.post1"}, r"SGLang 0\.5\.12\.post1, .* install sglang>=0\.5\.13"),
        ({"version": "0.5.3rc1"}, r"install sglang>=0\.5\.13"),
        ({"version": None}, "is it an SGLang server"),
        ({"context_length": 128}, r"engine\.max_model_len 256 .* --context-length 256"),
        ({"skip_tokenizer_init": True}, "without --skip-tokenizer-init"),
        ({"preferred_sampling_params": {"top_k": 20}}, "without --preferred-sampling-params"),
    ],
)
def test_a_server_that_would_answer_otherwise_is_refused_at_the_start(
    server: ModelServer, policy: Policy, tmp_path: Path, fact: dict[str, object], message: str
) -> None:
    real = server.info
    server.info = real | fact
    try:
        with pytest.raises(EngineError, match=message):
            connect(config_of(server.root, tmp_path), policy)
    finally:
        server.info = real


@pytest.mark.parametrize("version", ["0.5.13", "0.5.23", "0.6.0.dev12+g1a2b3c4", "1.0.0rc1", "0.0.0.dev1"])
def test_versions_from_0_5_13_on_are_taken(version: str) -> None:
    check_version({"version": version})


def swapped(checkpoint: Path, folder: Path, one: str, other: str) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer with two entries in each other's place."""
    copy = shutil.copytree(checkpoint, folder)
    content = (copy / "tokenizer.json").read_text()
    for old, new in ((one, "<|swapped|>"), (other, one), ("<|swapped|>", other)):
        content = content.replace(json.dumps(old), json.dumps(new))
    (copy / "tokenizer.json").write_text(content)
    return load_processor(str(copy)).tokenizer


@pytest.mark.parametrize(("one", "other"), [("<|image_pad|>", "<|video_pad|>"), ("Q", "Z")])
def test_a_server_with_another_checkpoints_tokenizer_is_refused(
    server: ModelServer, policy: Policy, tmp_path: Path, one: str, other: str
) -> None:
    """It would find no image in a prompt and answer without it, or read other words."""
    real, server.tokenizer = server.tokenizer, swapped(policy.path, tmp_path / "other", one, other)
    try:
        with pytest.raises(EngineError, match=r"tokenizer is not the policy's.*--model-path policy\.path"):
            connect(config_of(server.root, tmp_path), policy)
    finally:
        server.tokenizer = real


def test_a_server_that_lacks_a_token_of_the_policy_is_refused(
    server: ModelServer, policy: Policy, tmp_path: Path
) -> None:
    adapter = load_adapter(PolicyConfig(path=str(policy.path)))
    adapter.tokenizer.add_tokens(["<|mine|>"], special_tokens=True)
    with pytest.raises(EngineError, match=r"here .*<\|mine\|>"):
        connect(config_of(server.root, tmp_path), replace(policy, adapter=adapter))


def test_ignored_seeds_are_logged_at_the_start(
    server: ModelServer, policy: Policy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    real = server.info
    for heeds, said in ((True, 0), (False, 1)):
        server.info = real | {"enable_deterministic_inference": heeds}
        caplog.clear()
        connect(config_of(server.root, tmp_path), policy).close()
        warnings = [record.message for record in caplog.records if "ignores the seeds" in record.message]
        assert len(warnings) == said and all("--enable-deterministic-inference" in each for each in warnings)
    server.info = real


def test_an_update_waits_for_requests_that_were_aborted(
    engine: SGLangEngine, server: ModelServer, policy: Policy
) -> None:
    """The server works on for a while; weights that come meanwhile would leave the old key-value cache behind."""
    server.lag_s = 1.0
    engine.add_request(request_of(policy.dialogue([(96, 96)]), policy.banned, name="long"))
    while not server._busy:
        time.sleep(0.01)
    engine.abort(["long"])
    server.lag_s = 0.0
    engine.update_weights(iter(policy.model.named_parameters()), version=8)
    assert server.weight_version == "8"
    assert worst_gap(policy, engine) <= TOLERANCE


def test_a_server_that_stays_busy_is_an_error(
    engine: SGLangEngine, server: ModelServer, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cv_lightning.engines.sglang.IDLE_S", 0.3)
    server._busy += 1
    try:
        with pytest.raises(EngineError, match="does something else use the server"):
            engine.update_weights(iter(policy.model.named_parameters()), version=8)
    finally:
        server._busy -= 1


def test_the_server_gives_its_memory_back_only_where_asked_to(
    server: ModelServer, policy: Policy, tmp_path: Path
) -> None:
    config = config_of(server.root, tmp_path)
    awake = connect(config, policy)
    assert not awake.sleep() and not server.memory_released
    awake.close()
    engine = connect(replace(config, sleep="always"), policy)
    for version in (1, 2):
        engine.update_weights(iter(policy.model.named_parameters()), version=version)
        assert worst_gap(policy, engine) <= TOLERANCE
        assert engine.sleep() and engine.sleep() and server.memory_released
    engine.close()
    assert not server.memory_released, "the next run can use the server"
    real = server.info
    server.info = real | {"device": "cuda"}
    try:
        with pytest.raises(EngineError, match=r"engine\.sleep always: .* --enable-memory-saver"):
            connect(replace(config, sleep="always"), policy)
    finally:
        server.info = real


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
        trainer.fit(module, datamodule=DigitTaskDataModule(tasks_per_iteration=2, num_iterations=2))
        assert server.weight_version == "1"
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert 0 <= metrics["policy/mismatch_max"] <= TOLERANCE
    assert metrics["rollout/trajectories"] == 4
    assert not any(value for name, value in metrics.items() if name.startswith("rollout/end_error"))
