"""Which engine is built, and what an engine refuses before the library behind it sees it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator

import pytest
from PIL import Image

import cv_lightning.engines as engine_package
from cv_lightning.engines import (
    EngineConfig,
    Request,
    SamplingConfig,
    ServerConfig,
    build_engine,
    engine_kind,
    vllm_imports,
)
from cv_lightning.engines.base import check_length, check_weights
from cv_lightning.images import ImageLimits
from cv_lightning.types import EngineError


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    vllm_imports.cache_clear()
    yield
    vllm_imports.cache_clear()


def break_vllm(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(engine_package.importlib, "import_module", refuse)


def test_auto_is_transformers_where_vllm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert engine_kind(EngineConfig(kind="auto")) == "transformers"


@pytest.mark.parametrize(
    "error", [ImportError("libcudart.so.13"), RuntimeError("operator torchvision::nms"), OSError("x")]
)
def test_auto_falls_back_from_a_broken_vllm_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    break_vllm(monkeypatch, error)
    with caplog.at_level(logging.WARNING):
        assert engine_kind(EngineConfig(kind="auto")) == "transformers"
    assert str(error) in caplog.text


def test_ranks_that_share_an_engine_do_not_fall_back_from_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"engine\.tensor_parallel_size 2 needs vLLM"):
        engine_kind(EngineConfig(tensor_parallel_size=2))


def test_an_engine_that_was_asked_for_is_not_replaced() -> None:
    assert engine_kind(EngineConfig(kind="vllm")) == "vllm"
    assert engine_kind(EngineConfig(kind="transformers")) == "transformers"


def test_the_transformers_engine_needs_the_policy() -> None:
    with pytest.raises(ValueError, match="pass `model`"):
        build_engine(EngineConfig(kind="transformers"), "", dtype="float32", seed=0, model=None, adapter=None)  # type: ignore[arg-type]


def request(num_ids: int, sizes: list[tuple[int, int]], max_tokens: int) -> Request:
    images = [Image.new("RGB", size) for size in sizes]
    return Request(
        id="r",
        prompt_ids=range(num_ids),
        images=images,
        max_tokens=max_tokens,
        temperature=1.0,
        top_p=1.0,
        seed=0,
        banned_ids=(),
    )


RULE = ImageLimits(factor=32, min_pixels=1, max_pixels=10**6)


def test_length_counts_expanded_images_and_what_is_to_be_sampled() -> None:
    fits = request(20, [(96, 96), (64, 32)], max_tokens=11)  # 18 ids of text, 9 + 2 features, 11 to sample
    check_length(fits, rule=RULE, max_model_len=40, max_images=2)
    with pytest.raises(EngineError, match=r"29 tokens of prompt and 11 to sample .* engine\.max_model_len 39"):
        check_length(fits, rule=RULE, max_model_len=39, max_images=2)
    with pytest.raises(EngineError, match=r"2 images, engine\.max_images is 1"):
        check_length(fits, rule=RULE, max_model_len=40, max_images=1)
    with pytest.raises(EngineError, match="0 to sample"):
        check_length(request(20, [], max_tokens=0), rule=RULE, max_model_len=40, max_images=1)


def test_missing_weights_are_named() -> None:
    check_weights([])
    with pytest.raises(EngineError, match="7 of the engine's parameters: w0, w1, w2, w3, w4 and 2 more"):
        check_weights(f"w{index}" for index in range(7))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"max_model_len": 3}, "max_model_len"),
        ({"max_images": 0}, "max_images"),
        ({"gpu_memory_utilization": 1.5}, "gpu"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(settings: dict[str, float], key: str) -> None:
    with pytest.raises(ValueError, match=f"engine.{key}"):
        EngineConfig(**settings)  # type: ignore[arg-type]


def test_sampling_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="sampling"):
        SamplingConfig(temperature=-1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "server"}, r"engine\.server names the server"),
        ({"kind": "vllm", "server": ServerConfig(model="m")}, r"engine\.server names the server"),
        ({"kind": "server", "server": ServerConfig()}, r"engine\.server\.model is empty"),
    ],
)
def test_kind_and_server_go_together(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"base_url": "localhost:8000"}, r"engine\.server\.base_url 'localhost:8000' must begin with http"),
        ({"base_url": "http://me:secret@host/v1"}, "must not hold a user or password"),
        ({"api_key_env": "sk-123"}, "never put the key itself there"),
        ({"max_parallel": 0}, r"engine\.server\.max_parallel is 0; it must be at least 1"),
        ({"timeout_s": 0.0}, r"engine\.server\.timeout_s is 0\.0; it must be above 0"),
        ({"extra_fields": {"model": "x"}}, "the client fills them"),
    ],
)
def test_servers_that_cannot_be_are_refused_by_name(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ServerConfig(**settings)
