"""Inference engines behind one small protocol; `build_engine` picks one."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from cv_lightning.engine.base import Completion, Engine, EngineConfig, Request, SamplingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

__all__ = ["Completion", "Engine", "EngineConfig", "Request", "SamplingConfig", "build_engine", "engine_kind"]


def engine_kind(config: EngineConfig) -> str:
    """`vllm` or `transformers`: what `auto` means on this machine."""
    if config.kind != "auto":
        return config.kind
    return "vllm" if importlib.util.find_spec("vllm") is not None else "transformers"


def build_engine(
    config: EngineConfig, path: str, *, dtype: str, seed: int, model: PreTrainedModel | None, processor: ProcessorMixin
) -> Engine:
    """Build the engine that `config` names.

    Args:
        config: kind and sizes.
        path: Hugging Face folder (vLLM builds its model from it).
        dtype: the trainer's parameter type.
        seed: engine seed.
        model: the policy itself, which the transformers engine generates with.
        processor: its processor.
    """
    if engine_kind(config) == "vllm":
        from cv_lightning.engine.vllm import VLLMEngine

        return VLLMEngine(path, config, dtype=dtype, seed=seed)
    from cv_lightning.engine.hf import TransformersEngine

    if model is None:
        raise ValueError("the transformers engine generates with the policy: pass `model`")
    return TransformersEngine(model, processor, config)
