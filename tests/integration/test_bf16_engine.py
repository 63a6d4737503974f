"""vLLM and trainer in bfloat16 agree after every sync, and planted faults exceed the limit of the start-up check."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_samples import Policy, finish, request_of
from module_samples import fit
from PIL import Image
from test_bf16_faults import FAULTS, plant

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.callbacks import rollout
from cv_lightning.callbacks.rollout import RolloutCallback
from cv_lightning.commands.tiny import TinyCheckpoint, write
from cv_lightning.engines import EngineConfig
from cv_lightning.engines.base import Engine
from cv_lightning.models.adapters import ImageInputs
from cv_lightning.models.adapters.qwen_vl import QwenVLAdapter
from cv_lightning.models.adapters.tiny import TinyModelConfig
from cv_lightning.models.loading import PolicyConfig
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.rollout.mismatch import ENGINE_MEAN, exceeds
from cv_lightning.types import CVLightningError, Iteration, Task

pytestmark = pytest.mark.filterwarnings("ignore:model.policy.dtype bfloat16")  # steps on 16-bit weights: one is enough

SHAPES = [[(96, 96)], [(96, 96), (96, 96)], [(96, 96), (96, 64), (64, 160)], [(200, 90)]]
"""Sizes of the images of every prompt."""
FAMILIES = ["qwen3_vl", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)]
CONFIG = EngineConfig(kind="vllm", max_model_len=256, max_num_seqs=32, max_images=4)
AGENT = AgentConfig(max_turns=2, max_turn_tokens=24, max_images=4, prompt=PromptConfig(system="none", state_size=False))
STEP = 0.01
"""Standard deviation of a change of all weights, a twentieth of their own."""


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Policy, Engine]]:
    """A policy whose every part shows in its log-probabilities, and vLLM with the same weights."""
    from cv_lightning.engines.vllm import VLLMEngine

    folder: Path = tmp_path_factory.mktemp(request.param)
    write(TinyCheckpoint(out=folder, model=TinyModelConfig(family=request.param, initializer_range=0.2)))
    policy = Policy.load(folder, dtype="bfloat16")
    engine = VLLMEngine(str(folder), CONFIG, policy.adapter, dtype="bfloat16")
    yield policy, engine
    engine.close()


def sync(policy: Policy, engine: Engine, version: int, stale: Iterable[str] = ()) -> None:
    """Give the engine the policy's weights, some of them as they were when the test began."""
    old = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters() if name in stale}
    policy.perturb(seed=version, scale=STEP)
    engine.update_weights(((n, old.get(n, p)) for n, p in policy.model.named_parameters()), version)


def differences(
    policy: Policy, engine: Engine, seed: int, shapes: Sequence[Sequence[tuple[int, int]]] = SHAPES, swap: bool = False
) -> torch.Tensor:
    """Trainer minus engine log-probability of sampled tokens. Shape [tokens]."""
    dialogues = {f"p{i}": policy.dialogue(sizes, seed=10 * seed + i) for i, sizes in enumerate(shapes)}
    requests = [request_of(d, policy.banned, name=n, seed=seed, tokens=24) for n, d in dialogues.items()]
    parts = []
    for name, done in finish(engine, requests).items():
        seen = copy.copy(dialogues[name])
        seen.images = seen.images[::-1] if swap else seen.images
        parts.append(policy.logprobs(seen, done) - torch.tensor(done.logprobs))
    return torch.cat(parts)


def test_bf16_engine_and_trainer_agree_after_every_sync(both: tuple[Policy, Engine]) -> None:
    for version in (1, 2):
        sync(*both, version)
        found = differences(*both, seed=version)
        assert not exceeds(found, "bfloat16", 0.0, ENGINE_MEAN), f"mean {found.abs().mean()}, max {found.abs().max()}"
        assert len(found) > 50 and exceeds(found, "float32", 1e-4, ENGINE_MEAN), "rounding shows"


def test_bf16_a_stale_weight_bucket_exceeds_the_limit(both: tuple[Policy, Engine]) -> None:
    names = [name for name, _ in both[0].model.named_parameters()]
    sync(*both, 3, stale=names[len(names) // 3 : 2 * len(names) // 3])
    assert exceeds(differences(*both, seed=3), "bfloat16", 0.0, ENGINE_MEAN)


def test_bf16_swapped_images_exceed_the_limit(both: tuple[Policy, Engine]) -> None:
    sync(*both, 4)
    assert exceeds(differences(*both, seed=4, shapes=SHAPES[1:2], swap=True), "bfloat16", 0.0, ENGINE_MEAN)


def test_bf16_shifted_positions_exceed_the_limit(both: tuple[Policy, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    sync(*both, 5)
    positions = QwenVLAdapter.positions

    def shifted(adapter: QwenVLAdapter, is_image: np.ndarray, images: Sequence[ImageInputs]) -> np.ndarray:
        found = positions(adapter, is_image, images)
        found[1:, int(is_image.argmax()) :] += 1
        return found

    monkeypatch.setattr(QwenVLAdapter, "positions", shifted)
    assert exceeds(differences(*both, seed=5), "bfloat16", 0.0, ENGINE_MEAN)


# ------------------------------------------------------------------ faults at the start of a run of GRPO on this engine
def late_bucket(engine: Engine, vision: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the weights of the vision tower, or of the language model, reach the engine one sync late."""
    update, last = engine.update_weights, {}

    def late(weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        def told() -> Iterator[tuple[str, torch.Tensor]]:
            for number, (name, tensor) in enumerate(weights):
                kept = last.get(name, tensor)
                last[name] = tensor.detach().clone()
                yield name, kept if (".visual." in name) == vision and number % 3 == 0 else tensor

        update(told(), version)

    monkeypatch.setattr(engine, "update_weights", late)


@pytest.fixture
def start(both: tuple[Policy, Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Takes one iteration of GRPO on tasks of two images or one, from the checkpoint's weights."""
    policy, engine = both
    monkeypatch.setattr(rollout, "build_engine", lambda *_, **__: engine)  # built once for all tests
    monkeypatch.setattr(type(engine), "close", lambda _: None)
    pictures = [[Image.effect_noise((96, 96), 40 + 20 * n).convert("RGB") for n in (i, i + 1)] for i in range(2)]

    def run(num_images: int = 2) -> None:
        tasks = [
            Task(id=f"t{n}", question="Read both.", images=tuple(images[:num_images]), ground_truth="1")
            for n, images in enumerate(pictures)
        ]
        module = GRPOModule(PolicyConfig(path=str(policy.path), dtype="bfloat16"))
        callback = RolloutCallback(agent=AGENT, engine=CONFIG, num_samples=2)
        fit(module, lambda step: Iteration(step, tasks), 1, callbacks=[callback], default_root_dir=tmp_path)

    return run


@pytest.mark.parametrize("num_images", [2, 1])
def test_bf16_grpo_starts_where_nothing_is_wrong(
    start: Callable[..., None], num_images: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        start(num_images)
    assert "engine and trainer agree after the first sync" in caplog.text


@pytest.mark.parametrize("fault", [*FAULTS, "late_vision", "late_text"])
def test_bf16_grpo_with_a_planted_fault_does_not_start(
    both: tuple[Policy, Engine], start: Callable[..., None], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault.startswith("late"):
        late_bucket(both[1], fault == "late_vision", monkeypatch)
    else:
        plant(fault, monkeypatch)
    said = "buffers of the policy" if fault == "rotary" else "engine and trainer disagree"
    said = "only after a second sync" if fault.startswith("late") else said
    with pytest.raises(CVLightningError, match=said):
        start()


def test_bf16_grpo_with_swapped_images_does_not_start_on_tasks_of_one_image(
    start: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant("swapped_image", monkeypatch)
    with pytest.raises(CVLightningError, match="engine and trainer disagree"):
        start(1)
