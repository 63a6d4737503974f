"""Both engines with other image limits than those in the model folder.

In a file of its own: vLLM engines share globals of the process, and closing one ends the others.
"""

from __future__ import annotations

import math

import pytest
from engine_samples import Policy, worst_gap

from cv_lightning.engines import EngineConfig, build_engine
from cv_lightning.models.adapters import ModelAdapter
from cv_lightning.types import EngineError

TOLERANCE = 1e-4


@pytest.fixture(params=["tiny_checkpoint", "tiny_qwen25"])
def policy(request: pytest.FixtureRequest) -> Policy:
    """Qwen3-VL, then Qwen2.5-VL."""
    return Policy.load(request.getfixturevalue(request.param))


@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_image_limits_are_the_trainers_and_not_the_folders(policy: Policy, kind: str) -> None:
    """An SFT writes its own limits into the folder that RL starts from, with others."""
    size = policy.adapter.processor.image_processor.size
    least, most = size["shortest_edge"] // 4, 4 * size["longest_edge"]
    other = Policy.load(policy.path, min_pixels=least, max_pixels=most)
    large, small = math.isqrt(2 * size["longest_edge"]), math.isqrt(size["shortest_edge"]) // 2
    config = EngineConfig(kind=kind, max_model_len=256, max_num_seqs=32, max_images=4)  # type: ignore[arg-type]
    engine = build_engine(config, str(other.path), dtype="float32", seed=0, model=other.model, adapter=other.adapter)
    try:
        assert engine.images.num_images == 0, "those of the start-up check are forgotten"  # type: ignore[attr-defined]
        engine.update_weights(other.model.named_parameters(), version=1)
        assert worst_gap(other, engine, shapes=[[(large, large)], [(small, small), (96, 96)]]) <= TOLERANCE
    finally:
        engine.close()


def test_a_vllm_that_processes_images_differently_is_refused(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the folder's pixel limits. Engine and trainer share tensors, so that nothing later would show it."""
    size = policy.adapter.processor.image_processor.size
    other = Policy.load(policy.path, max_pixels=4 * size["longest_edge"])
    monkeypatch.setattr(type(other.adapter), "engine_arguments", ModelAdapter.engine_arguments)
    config = EngineConfig(kind="vllm", max_model_len=256, max_num_seqs=32, max_images=4)
    with pytest.raises(EngineError, match=r"vLLM's image processing differs .* pixel_values"):
        build_engine(config, str(other.path), dtype="float32", seed=0, model=other.model, adapter=other.adapter)
