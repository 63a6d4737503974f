"""SGLang as it is: a real server on a CPU, and our requests through its own request classes. See docs/engines.md."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from engine_samples import Policy, finish, request_of, worst_gap
from model_server import SAMPLING, ModelServer
from sglang_server import sglang_environment, sglang_python, sglang_server
from test_self_test import engine_config, fit
from test_sglang_engine import TOLERANCE, config_of, connect

from cv_lightning.engines.sglang import SGLangEngine
from cv_lightning.models.loading import PolicyConfig, load_adapter
from cv_lightning.types import EngineError, MismatchError

pytestmark = pytest.mark.slow
PARTS = (".visual.blocks.", "merger", "language_model")
"""Vision tower, projector and language model, by their names."""
PARSE = """
import dataclasses, json, sys
import pydantic
from sglang.srt.entrypoints.api_contract import generate_contract_error
from sglang.srt.entrypoints.openai.protocol import TokenizeRequest
from sglang.srt.managers.io_struct import GenerateReqInput, UpdateWeightFromDiskReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

known = {"GenerateReqInput": {field.name for field in dataclasses.fields(GenerateReqInput)},
         "SamplingParams": set(SamplingParams.__struct_fields__),
         "UpdateWeightFromDiskReqInput": set(UpdateWeightFromDiskReqInput.__struct_fields__),
         "TokenizeRequest": set(TokenizeRequest.model_fields)}
unknown, errors = [], []
for path, body in json.load(sys.stdin):
    if path == "/generate":
        errors += filter(None, [generate_contract_error(body)])
        request = pydantic.TypeAdapter(GenerateReqInput).validate_python(body)
        request.normalize_batch_and_arguments()
        SamplingParams(**body["sampling_params"]).verify(vocab_size=200000)
        unknown += body.keys() - known["GenerateReqInput"]
        unknown += body["sampling_params"].keys() - known["SamplingParams"]
    elif path == "/update_weights_from_disk":
        UpdateWeightFromDiskReqInput(**body)
        unknown += body.keys() - known["UpdateWeightFromDiskReqInput"]
    elif path == "/tokenize":
        TokenizeRequest.model_validate(body)
        unknown += body.keys() - known["TokenizeRequest"]
print(json.dumps({"unknown": sorted(unknown), "errors": errors, "sampling": sorted(known["SamplingParams"])}))
"""


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server as docs/engines.md starts it."""
    with sglang_server(tiny_checkpoint, tmp_path_factory.mktemp("sglang") / "log", embedding_cache_mb=0) as address:
        yield address


@pytest.fixture(scope="module")
def caching_url(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the embedding cache that SGLang has by default."""
    with sglang_server(tiny_checkpoint, tmp_path_factory.mktemp("sglang") / "log", embedding_cache_mb=100) as address:
        yield address


@pytest.fixture
def policy(tiny_checkpoint: Path) -> Policy:
    return Policy.load(tiny_checkpoint)


@pytest.fixture
def engine(url: str, policy: Policy, tmp_path: Path) -> Iterator[SGLangEngine]:
    running = connect(replace(config_of(url, tmp_path), max_model_len=4096), policy)
    running.update_weights(iter(policy.model.named_parameters()), version=0)
    yield running
    running.close()


def move(policy: Policy, part: str, seed: int) -> None:
    """Change all parameters of a part by 0.05."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if part in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def loads(url: str) -> dict[str, Any]:
    return httpx.get(f"{url}/v1/loads", trust_env=False).json()["loads"][0]


def test_repeated_images_agree_over_weight_updates(
    engine: SGLangEngine, caching_url: str, policy: Policy, tmp_path: Path
) -> None:
    """With and without SGLang's embedding cache, over the same three updates of vision tower, projector and language
    model; without the cache what is stale is only what has not been synced yet."""
    caching = connect(config_of(caching_url, tmp_path / "caching"), policy)
    agreement, unsynced, stale = [], [], []
    for each in (engine, caching):
        each.update_weights(iter(policy.model.named_parameters()), version=1)
        agreement.append(worst_gap(policy, each))
    for version in (2, 3, 4):
        for number, part in enumerate(PARTS):
            move(policy, part, seed=10 * version + number)
        unsynced.append(worst_gap(policy, engine))
        for each in (engine, caching):
            each.update_weights(iter(policy.model.named_parameters()), version=version)
        agreement.append(worst_gap(policy, engine))
        agreement.append(worst_gap(policy, engine, temperature=0.6))
        stale.append(worst_gap(policy, caching))
    caching.close()
    print(f"agreement {max(agreement):.1e}, weights not synced {min(unsynced):.1e}, stale embeddings {min(stale):.1e}")
    assert max(agreement) <= TOLERANCE
    assert min(unsynced) > 100 * TOLERANCE and min(stale) > 100 * TOLERANCE


def test_turns_end_and_bans_hold(engine: SGLangEngine, policy: Policy, url: str) -> None:
    dialogue, end = policy.dialogue([(96, 96)]), policy.encoder.end_id
    requests = [request_of(dialogue, policy.banned, name=str(seed), tokens=40, seed=seed) for seed in range(16)]
    sampled = [token for done in finish(engine, requests).values() for token in done.token_ids]
    assert sampled and not set(sampled) & set(policy.banned)
    pad = policy.adapter.processor.tokenizer.pad_token_id
    capped = finish(engine, [request_of(dialogue, [*policy.banned, end, pad], tokens=5)])["r"]
    assert (len(capped.token_ids), capped.stopped) == (5, False)
    others = [token for token in range(policy.model.config.text_config.vocab_size) if token != end]
    ended = finish(engine, [request_of(dialogue, others, tokens=5)])["r"]
    assert (ended.token_ids, ended.stopped) == ([end], True)
    if httpx.get(f"{url}/server_info", trust_env=False).json()["enable_deterministic_inference"]:  # no CPU has it
        again = [request_of(dialogue, policy.banned, name=name, seed=11) for name in ("a", "b")]
        assert len({tuple(done.token_ids) for done in finish(engine, again).values()}) == 1


def test_aborted_requests_end_and_an_update_waits_for_them(engine: SGLangEngine, policy: Policy, url: str) -> None:
    endless = [*policy.banned, policy.encoder.end_id, policy.adapter.processor.tokenizer.pad_token_id]
    engine.add_request(request_of(policy.dialogue([(96, 96)]), endless, tokens=3500, name="long"))
    wait_for(lambda: loads(url)["num_running_reqs"] == 1)
    with pytest.raises(EngineError, match="unfinished"):
        engine.update_weights(iter(policy.model.named_parameters()), version=1)
    engine.abort(["long"])
    policy.perturb(seed=3)
    engine.update_weights(iter(policy.model.named_parameters()), version=2)
    assert not engine.has_unfinished() and loads(url)["num_running_reqs"] == 0
    assert worst_gap(policy, engine) <= TOLERANCE


def test_an_update_waits_for_requests_of_others(engine: SGLangEngine, policy: Policy, url: str) -> None:
    ids = list(policy.dialogue([(96, 96)]).engine_ids[:5])
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 600, "ignore_eos": True}}
    found: list[dict[str, Any]] = []
    other = threading.Thread(
        target=lambda: found.append(httpx.post(f"{url}/generate", json=body, trust_env=False, timeout=300).json())
    )
    other.start()
    wait_for(lambda: loads(url)["num_running_reqs"] == 1)
    policy.perturb(seed=4)
    engine.update_weights(iter(policy.model.named_parameters()), version=3)
    other.join()
    assert len(found[0]["output_ids"]) == 600 and found[0]["meta_info"]["weight_version"] == "0"
    assert worst_gap(policy, engine) <= TOLERANCE


def test_memory_is_released_and_taken_back(url: str, policy: Policy, tmp_path: Path) -> None:
    """The calls and their order; on a CPU they free nothing."""
    engine = connect(replace(config_of(url, tmp_path), sleep="always"), policy)
    for version in (1, 2):
        policy.perturb(seed=version)
        engine.update_weights(iter(policy.model.named_parameters()), version=version)
        assert worst_gap(policy, engine) <= TOLERANCE
        assert engine.sleep()
    engine.close()
    again = connect(config_of(url, tmp_path), policy)
    again.update_weights(iter(policy.model.named_parameters()), version=1)
    assert worst_gap(policy, again) <= TOLERANCE
    again.close()


def test_a_server_with_another_tokenizer_is_refused(url: str, policy: Policy, tmp_path: Path) -> None:
    adapter = load_adapter(PolicyConfig(path=str(policy.path)))
    adapter.tokenizer.add_tokens(["<|mine|>"], special_tokens=True)
    with pytest.raises(EngineError, match="tokenizer is not the policy's"):
        connect(config_of(url, tmp_path), replace(policy, adapter=adapter))


def test_a_server_with_other_pixel_limits_is_refused(url: str, policy: Policy, tmp_path: Path) -> None:
    """Training sees images above the largest size of the server's processor."""
    largest = policy.adapter.processor.image_processor.size["longest_edge"]
    larger = Policy.load(policy.path, max_pixels=4 * largest)
    engine = connect(config_of(url, tmp_path), larger)
    side = int((3 * largest) ** 0.5)
    done = finish(engine, [request_of(larger.dialogue([(side, side)]), larger.banned, tokens=2)])["r"]
    engine.close()
    assert "resizes images otherwise" in done.error


def test_a_server_with_a_live_embedding_cache_is_refused(
    caching_url: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match="SGLANG_VLM_CACHE_SIZE_MB=0"):
        fit(tiny_checkpoint, tmp_path, engine_config("sglang", tmp_path, caching_url))


def test_grpo_trains_from_the_command_line(url: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    rollout = {
        "agent": {"max_turns": 3, "max_turn_tokens": 24, "max_images": 3, "prompt": {"system": "none"}},
        "engine": {
            "kind": "sglang",
            "server": {"base_url": url, "weights_folder": str(tmp_path / "weights")},
            "max_model_len": 1024,
            "max_images": 3,
        },
        "num_samples": 4,
    }
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "default_root_dir": str(tmp_path / "run"),
            "enable_checkpointing": False,
        },
        "rollout": rollout,
        "model": {
            "class_path": "cv_lightning.modules.grpo.GRPOModule",
            "init_args": {
                "policy": {"path": str(tiny_checkpoint), "dtype": "float32"},
                "optimizer": {"lr": 1.0e-3},
            },
        },
        "data": {
            "class_path": "cv_lightning.digits.modules.DigitTaskDataModule",
            "init_args": {"tasks_per_iteration": 4, "num_iterations": 3},
        },
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    logger = Path(__file__).parents[2] / "configs/logger/csv.yaml"
    command = [sys.executable, "-m", "cv_lightning", "fit", "--config", str(file), "--config", str(logger)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    with next((tmp_path / "run").rglob("metrics.csv")).open() as table:
        rows = [row for row in csv.DictReader(table) if row.get("policy/mismatch_max")]
    gaps = [float(row["policy/mismatch_max"]) for row in rows]
    print(f"largest gap of {len(gaps)} iterations: {max(gaps):.1e}")
    assert len(gaps) == 3 and max(gaps) <= TOLERANCE
    assert all(float(row["rollout/trajectories"]) == 16 for row in rows)
    assert not any(float(value or 0) for row in rows for name, value in row.items() if "/end_error" in name)


def test_requests_are_what_sglangs_own_classes_take(tiny_checkpoint: Path, policy: Policy, tmp_path: Path) -> None:
    """A misspelt field would be ignored by FastAPI, or refuse every request."""
    python = sglang_python()
    with ModelServer(tiny_checkpoint) as server:
        engine = connect(config_of(server.root, tmp_path), policy)
        engine.update_weights(iter(policy.model.named_parameters()), version=1)
        worst_gap(policy, engine, temperature=0.6)
        engine.close()
        sent = server.requests
    assert {"/generate", "/update_weights_from_disk", "/tokenize"} <= {path for path, _ in sent}
    command = [python, "-W", "ignore", "-c", PARSE]
    ended = subprocess.run(
        command, input=json.dumps(sent), capture_output=True, text=True, env=sglang_environment(), check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert (found["unknown"], found["errors"]) == ([], [])
    assert set(found["sampling"]) >= SAMPLING, "the server of the other tests knows no more than the real one"


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
