"""Inference engines behind one small protocol; `build_engine` picks one."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache
from typing import TYPE_CHECKING

from cv_lightning.engines.base import Completion, Engine, EngineConfig, Request, SamplingConfig, ServerConfig
from cv_lightning.types import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cv_lightning.models.adapters import ModelAdapter
    from cv_lightning.models.vision import VisionCache

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "Request",
    "SamplingConfig",
    "ServerConfig",
    "build_engine",
    "engine_kind",
    "vllm_imports",
]


logger = logging.getLogger(__name__)


def engine_kind(config: EngineConfig) -> str:
    """The kind of engine, with `auto` resolved to `vllm` or `transformers`. Imports vLLM for `auto`.

    Raises:
        EngineError: `auto` cannot be vLLM, and ranks share the engine.
    """
    if config.kind != "auto":
        return config.kind
    if vllm_imports():
        return "vllm"
    if config.tensor_parallel_size > 1:
        raise EngineError(
            f"engine.tensor_parallel_size {config.tensor_parallel_size} needs vLLM, which cannot be imported; "
            "install the extra cpu or gpu, or set engine.tensor_parallel_size to 1"
        )
    return "transformers"


@cache
def vllm_imports() -> bool:
    """True if vLLM is installed and can be imported. Logs why an installed one cannot be imported."""
    if importlib.util.find_spec("vllm") is None:
        return False
    try:
        importlib.import_module("cv_lightning.engines.vllm")
    except (ImportError, OSError, RuntimeError) as error:  # a build for another torch or CUDA fails in many ways
        logger.warning(
            "vLLM is installed but cannot be imported (%s); generating with transformers, which is slower", error
        )
        return False
    return True


def build_engine(
    config: EngineConfig,
    path: str,
    *,
    dtype: str,
    seed: int,
    model: PreTrainedModel | None,
    adapter: ModelAdapter,
    images: VisionCache | None = None,
) -> Engine:
    """Build the engine that `config` names, or connect to the server that runs it.

    Args:
        config: Kind and sizes.
        path: Hugging Face folder that vLLM builds its model from.
        dtype: The trainer's parameter type.
        seed: The engine's seed.
        model: The policy, which the transformers engine generates with and SGLang gets its weights from.
        adapter: The policy's adapter, bound to its processor.
        images: The trainer's processed images, for an engine in its process; None: a cache of the engine's own.

    Raises:
        EngineError: vLLM cannot be imported, the engine cannot be built, or no server answers.
    """
    if engine_kind(config) == "vllm":
        try:
            from cv_lightning.engines.vllm import VLLMEngine
        except ImportError as error:
            raise EngineError(
                f"engine.kind is vllm, which cannot be imported ({error}); install the extra cpu or gpu, "
                "or set engine.kind to transformers"
            ) from error

        return VLLMEngine(path, config, adapter, dtype=dtype, seed=seed, images=images)
    if config.kind == "server":
        from cv_lightning.engines.server import ServerEngine

        return ServerEngine(config, adapter)
    if config.kind == "sglang":
        from cv_lightning.engines.sglang import SGLangEngine

        return SGLangEngine(config, adapter, _required(model, config))
    from cv_lightning.engines.hf import TransformersEngine

    return TransformersEngine(_required(model, config), adapter, config, images)


def _required(model: PreTrainedModel | None, config: EngineConfig) -> PreTrainedModel:
    if model is None:
        raise ValueError(f"engine.kind {config.kind} works with the policy: pass `model`")
    return model
