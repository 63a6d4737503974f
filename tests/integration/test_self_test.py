"""The start-up self-test refuses an engine whose image caches outlive a weight update, on every engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from embedding_cache import EmbeddingCache
from model_server import ModelServer
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.callbacks.rollout import RolloutCallback
from cv_lightning.digits.modules import DigitTaskDataModule
from cv_lightning.engines import EngineConfig, ServerConfig
from cv_lightning.engines.hf import TransformersEngine
from cv_lightning.models.loading import PolicyConfig, load_policy
from cv_lightning.modules.base import OptimizerConfig
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.types import MismatchError

AGENT = AgentConfig(max_turns=2, max_turn_tokens=12, max_images=2, prompt=PromptConfig(system="none", state_size=False))


def engine_config(kind: str, folder: Path, url: str = "") -> EngineConfig:
    server = ServerConfig(base_url=url, weights_folder=str(folder / "weights")) if url else None
    return EngineConfig(kind=kind, max_model_len=512, max_num_seqs=16, max_images=2, server=server)


def fit(checkpoint: Path, folder: Path, engine: EngineConfig, num_iterations: int = 1, **policy: object) -> GRPOModule:
    """A run of GRPO with the self-test; its module afterwards."""
    module = GRPOModule(PolicyConfig(path=str(checkpoint), dtype="float32", **policy), OptimizerConfig(lr=1e-3))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RolloutCallback(agent=AGENT, engine=engine, num_samples=2)],
    )
    trainer.fit(module, datamodule=DigitTaskDataModule(tasks_per_iteration=2, num_iterations=num_iterations))
    return module


def keep_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transformers engine, and it alone, generates behind an embedding cache."""
    real, caches = TransformersEngine._generate, {}

    def generate(engine: TransformersEngine, batch: list) -> list:
        with caches.setdefault(engine.model, EmbeddingCache(engine.model)):
            return real(engine, batch)

    monkeypatch.setattr(TransformersEngine, "_generate", generate)


def keep_encoder_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM forgets them neither in its scheduler nor in its worker, which also does so on a reload."""
    monkeypatch.setattr(LLMEngine, "reset_encoder_cache", lambda self: None)
    monkeypatch.setattr(GPUModelRunner, "reset_encoder_cache", lambda self: None)


@pytest.mark.parametrize(
    ("kind", "fault"), [("transformers", keep_embeddings), ("vllm", keep_encoder_outputs)], ids=["transformers", "vllm"]
)
def test_an_engine_with_stale_image_embeddings_is_refused(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    fault: Callable[[pytest.MonkeyPatch], None],
) -> None:
    fault(monkeypatch)
    with pytest.raises(MismatchError, match=r"seen before a weight update .* freeze vision tower and projector"):
        fit(tiny_checkpoint, tmp_path, engine_config(kind, tmp_path))


def test_a_server_with_a_live_embedding_cache_is_refused_with_the_setting(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with (
        ModelServer(tiny_checkpoint, keeps_embeddings=True) as server,
        pytest.raises(MismatchError, match=r"SGLANG_VLM_CACHE_SIZE_MB=0"),
    ):
        fit(tiny_checkpoint, tmp_path, engine_config("sglang", tmp_path, server.root))


def test_a_frozen_vision_tower_trains_on_a_server_with_a_live_embedding_cache(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with ModelServer(tiny_checkpoint, keeps_embeddings=True) as server:
        engine = engine_config("sglang", tmp_path, server.root)
        fit(tiny_checkpoint, tmp_path, engine, 2, freeze_vision=True, freeze_projector=True)
        assert server.weight_version == "1"


def test_the_self_test_leaves_the_policy_unchanged(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """On the engine that generates with the policy itself: the first batch sees the checkpoint's own bits."""
    before: dict[str, torch.Tensor] = {}

    class Look(RolloutCallback):
        def _collect(self, trainer: pl.Trainer, module: GRPOModule, *args: object) -> object:
            before.update({name: tensor.clone() for name, tensor in module.policy.state_dict().items()})
            return super()._collect(trainer, module, *args)

    module = GRPOModule(PolicyConfig(path=str(tiny_checkpoint), dtype="float32"), OptimizerConfig(lr=1e-3))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Look(agent=AGENT, engine=engine_config("transformers", tmp_path), num_samples=2)],
    )
    trainer.fit(module, datamodule=DigitTaskDataModule(tasks_per_iteration=2, num_iterations=1))
    fresh = load_policy(PolicyConfig(path=str(tiny_checkpoint), dtype="float32")).state_dict()
    assert before.keys() == fresh.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.items())
