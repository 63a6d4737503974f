"""A served model under evaluation: the agent loop, the CLI and the figures, over HTTP and without policy weights."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from engine_samples import Policy, finish, request_of, worst_gap
from model_server import ModelServer
from PIL import Image

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.driver import Rollout
from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.agent.request import RolloutRequest
from cv_lightning.background import Background
from cv_lightning.cli import main
from cv_lightning.engines import EngineConfig, SamplingConfig, ServerConfig, build_engine
from cv_lightning.engines.server import ServerEngine, messages_of
from cv_lightning.rl.groups import is_trainable
from cv_lightning.trajectory.reader import read_groups
from cv_lightning.types import EndState, EngineError, SandboxResult, Task, ToolStatus, Trajectory

CALL = '<tool_call>\n{"name": "code_image_tool", "arguments": {"code": "result = image.rotate(90)"}}\n</tool_call>'


def config_of(url: str, model: str = "tiny", **changes: object) -> EngineConfig:
    values: dict[str, object] = {"max_attempts": 2, "max_backoff_s": 0.2, "give_up_s": 60.0}
    server = ServerConfig(base_url=url, model=model, **(values | changes))
    return EngineConfig(kind="server", server=server, max_model_len=512, max_images=4)


def connect(config: EngineConfig, policy: Policy) -> ServerEngine:
    engine = build_engine(config, "", dtype="float32", seed=0, model=None, adapter=policy.adapter)
    assert isinstance(engine, ServerEngine)
    return engine


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[ModelServer]:
    with ModelServer(tiny_checkpoint) as running:
        yield running


@pytest.fixture
def engine(server: ModelServer) -> Iterator[ServerEngine]:
    running = connect(config_of(server.url), server.policy)
    yield running
    server.misbehave = lambda number, path: 0
    running.close()


class Turning:
    """A tool that turns whatever it gets."""

    async def run(self, image: Image.Image, code: str, *, owner: str = "", max_shown: int = 0) -> SandboxResult:
        return SandboxResult(status=ToolStatus.OK, image=image.rotate(90, expand=True))


def rolled_out(engine: ServerEngine, encoder: DialogueEncoder, count: int, temperature: float) -> list[Trajectory]:
    agent = AgentConfig(max_turns=3, max_turn_tokens=24, prompt=PromptConfig(system="Look.", state_size=False))
    task = Task(id="t", question="Read it.", images=(Image.new("RGB", (96, 64), "red"),), ground_truth="1")
    background = Background()
    try:
        rollout = Rollout(engine, Turning(), encoder, background, agent, banned_ids=())
        return rollout.run(
            [RolloutRequest(task, sample) for sample in range(count)], SamplingConfig(temperature=temperature)
        )
    finally:
        background.close()


def test_messages_are_the_inverse_of_the_template(encoder: DialogueEncoder) -> None:
    given = [
        {"role": "system", "content": [{"type": "text", "text": "Look\ntwice."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a <b> \n"}, {"type": "image"}]},
        {"role": "assistant", "content": f"<think>so</think>\n{CALL}"},
        {"role": "tool", "content": [{"type": "image"}, {"type": "text", "text": "Image 2 is 3x4 pixels."}]},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": [{"type": "text", "text": "Error: no"}]},
    ]
    prompt = encoder.render(given, generation_prompt=True)
    messages = messages_of(encoder.adapter.messages_of(prompt), ["u0", "u1", "u2"])
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    parts = messages[1]["content"]
    assert [part["type"] for part in parts] == ["image_url", "text", "image_url"]
    assert parts[2]["image_url"]["url"] == "u1"
    back = [
        {
            "role": message["role"],
            "content": [p if p["type"] == "text" else {"type": "image"} for p in message["content"]]
            if isinstance(message["content"], list)
            else message["content"],
        }
        for message in messages
    ]
    assert encoder.render(back, generation_prompt=True) == prompt
    with pytest.raises(EngineError, match="not made by the chat template"):
        encoder.adapter.messages_of("Hello")


def test_text_is_on_record_and_never_trained_on(engine: ServerEngine, server: ModelServer) -> None:
    dialogue = server.policy.dialogue([(96, 64), (64, 64)])
    for temperature in (0.0, 1.0):
        first = len(server.requests)
        done = finish(engine, [request_of(dialogue, [], tokens=20, temperature=temperature, seed=5)])["r"]
        path, body = server.requests[first]
        answer = server.chat_completions(body)["choices"][0]
        said = server.policy.encoder.decode(done.token_ids)
        assert path == "/v1/chat/completions" and said == answer["message"]["content"].replace("<|", "< |")
        assert done.stopped == (answer["finish_reason"] == "stop") and done.logprobs is None
        pictures = [part for part in body["messages"][-1]["content"] if part["type"] == "image_url"]
        assert len(pictures) == 2 and (body["max_tokens"], body["temperature"]) == (20, temperature)


def test_the_agent_runs_on_it(engine: ServerEngine, server: ModelServer, encoder: DialogueEncoder) -> None:
    """Every first turn calls the tool; the model sees the result and continues."""
    real = server.chat_completions

    def calling(body: dict[str, object]) -> dict[str, object]:
        answer = real(body)
        if len(body["messages"]) == 2:
            answer["choices"][0] |= {"message": {"role": "assistant", "content": CALL}, "finish_reason": "stop"}
        return answer

    server.posts["/v1/chat/completions"] = calling
    first = len(server.requests)
    try:
        trajectories = rolled_out(engine, encoder, 3, temperature=1.0)
    finally:
        server.posts["/v1/chat/completions"] = real
    for trajectory in trajectories:
        assert trajectory.num_tool_calls >= 1 and trajectory.images[1].original.size == (64, 96)
        assert not any(trajectory.loss_mask) and not any(trajectory.logprobs)
        assert sum(turn.num_tokens for turn in trajectory.turns) > 0
        trajectory.advantage = 1.0
        assert not is_trainable(trajectory)
    later = [body["messages"] for _, body in server.requests[first:] if len(body["messages"]) > 2]
    assert later and all(messages[2] == {"role": "assistant", "content": CALL} for messages in later)
    assert all(any(part["type"] == "image_url" for part in messages[3]["content"]) for messages in later)


def test_a_model_may_say_nothing(engine: ServerEngine, server: ModelServer) -> None:
    for content, reason, ids in ((None, "length", []), ("", "stop", [server.policy.encoder.end_id])):
        choice = {"message": {"role": "assistant", "content": content}, "finish_reason": reason}
        real = server.posts["/v1/chat/completions"]
        server.posts["/v1/chat/completions"] = lambda body, choice=choice: {"choices": [choice]}
        done = finish(engine, [request_of(server.policy.dialogue([(96, 64)]), [])])["r"]
        server.posts["/v1/chat/completions"] = real
        assert (done.token_ids, done.stopped, done.error) == (ids, reason == "stop", "")


def test_a_failed_request_ends_its_own_trajectory(
    engine: ServerEngine, server: ModelServer, encoder: DialogueEncoder
) -> None:
    first = len(server.requests)
    server.misbehave = lambda number, path: {first: 403, first + 1: 500}.get(number, 0)
    trajectories = rolled_out(engine, encoder, 4, temperature=1.0)
    failed = [t for t in trajectories if t.end_state is EndState.ERROR_ENGINE]
    assert len(failed) == 1 and "403" in failed[0].error
    assert engine.client.spent.retries == 1 and engine.client.spent.failed == 1


def test_a_server_that_cannot_be_used_is_told_before_the_run(server: ModelServer) -> None:
    with pytest.raises(EngineError, match=r"'large' is not served at .* which has tiny"):
        connect(config_of(server.url, model="large"), server.policy)
    with pytest.raises(EngineError, match=r"engine\.server\.base_url"):
        connect(config_of("http://127.0.0.1:9/v1"), server.policy)


def test_the_engine_is_evaluated_from_the_command_line(
    server: ModelServer, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`test` on a folder that holds a processor and no weights; `fit` and a checkpoint are refused."""
    folder = tmp_path / "processor"
    folder.mkdir()
    for file in tiny_checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    rollout = {
        "agent": {"max_turns": 2, "max_turn_tokens": 24, "max_images": 2, "prompt": {"system": "none"}},
        "engine": {
            "kind": "server",
            "server": {"base_url": server.url, "model": "tiny"},
            "max_model_len": 512,
            "max_images": 2,
        },
    }
    config = {
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(tmp_path / "run"),
            "logger": False,
            "enable_progress_bar": False,
        },
        "rollout": rollout,
        "model": {
            "class_path": "cv_lightning.modules.grpo.GRPOModule",
            "init_args": {"policy": {"path": str(folder)}, "algorithm": {"kl": {"weight": 0.0}}},
        },
        "data": {
            "class_path": "cv_lightning.digits.modules.DigitTaskDataModule",
            "init_args": {"test_tasks": {"upright": 3, "turned": 2}},
        },
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    cli = main(["test", "--config", str(file)])
    assert cli.model.policy is None
    metrics = json.loads((tmp_path / "run/eval/greedy/metrics.json").read_text())
    groups = list(read_groups(tmp_path / "run/eval/greedy"))
    assert len(groups) == 5 and metrics
    trajectories = [t for group in groups for t in group.trajectories]
    assert all(t.reward is not None and t.tokens.num_sampled_tokens > 0 for t in trajectories), [
        t.error for t in trajectories
    ]
    with pytest.raises(SystemExit) as refused:
        main(["fit", "--config", str(file), "--trainer.default_root_dir", str(tmp_path / "other")])
    assert "engine.kind server" in f"{refused.value.code}{capsys.readouterr().err}"
    torch.save({"state_dict": {}, "pytorch-lightning_version": pl.__version__}, tmp_path / "some.ckpt")
    with pytest.raises(SystemExit) as refused:
        main(["test", "--config", str(file), "--ckpt_path", str(tmp_path / "some.ckpt")])
    assert "a server samples from a model of its own" in str(refused.value.code)


# ------------------------------------------------------------------------------------------------ the real vLLM
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def vllm_server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real `vllm serve` of the tiny model."""
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "log"
    options = {
        "--model": tiny_checkpoint,
        "--served-model-name": "tiny",
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": "float32",
        "--max-model-len": 512,
        "--max-num-seqs": 16,
        "--max-num-batched-tokens": 8192,
        "--limit-mm-per-prompt": '{"image": 4, "video": 0}',
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
    }
    switches = ["--enable-scale-out", "--no-enable-chunked-prefill", "--skip-mm-profiling", "--enforce-eager"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *switches]
    command += [str(part) for pair in options.items() for part in pair]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        try:
            deadline = time.monotonic() + 900
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1.0)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize("api", ["tokens", "chat"])
def test_a_real_vllm_server(vllm_server: str, tiny_checkpoint: Path, encoder: DialogueEncoder, api: str) -> None:
    policy = Policy.load(tiny_checkpoint)
    engine = connect(config_of(vllm_server, api=api, give_up_s=600.0), policy)  # its first request warms it up
    try:
        if api == "tokens":
            assert worst_gap(policy, engine) <= 1e-4
            assert worst_gap(policy, engine, temperature=0.6) <= 1e-4
        trajectories = rolled_out(engine, encoder, 4, temperature=1.0)
    finally:
        engine.close()
    assert not any(t.end_state.is_error for t in trajectories), [t.error for t in trajectories]
    assert all(any(t.loss_mask) == (api == "tokens") for t in trajectories)
