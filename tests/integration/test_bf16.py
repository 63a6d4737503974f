"""What is proven in float32, again in bfloat16, with tolerances that docs/benchmarks.md lists beside planted faults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rank_runs import Outcome, Run, perform
from test_zero import launch

from cv_lightning.commands.tiny import TinyCheckpoint, write
from cv_lightning.models.adapters.tiny import TinyModelConfig
from cv_lightning.models.loading import PolicyConfig, load_policy

GRADIENT = 2e-3
"""Largest error of a gradient of 48 micro-batches, relative to its norm."""
STAGES = ("zero2", "zero3")


def gradient_error(outcome: Outcome) -> float:
    """Norm of the error of all gradients over the norm of the exact ones."""
    assert outcome.gradients.keys() == outcome.exact_gradients.keys()
    exact = torch.cat([gradient.flatten() for gradient in outcome.exact_gradients.values()])
    found = torch.cat([outcome.gradients[name].double().flatten() for name in outcome.exact_gradients])
    return float((found - exact).norm() / exact.norm())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL with as few layers as it can have: 48 micro-batches take a while under ZeRO-3."""
    folder = tmp_path_factory.mktemp("small")
    sizes = TinyModelConfig(num_layers=1, vision_depth=1, deepstack_layers=(0,), hidden_size=64, num_key_value_heads=2)
    write(TinyCheckpoint(out=folder, model=sizes))
    return folder


@pytest.fixture(scope="module")
def loaded(tiny_qwen25: Path, small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """One step of each family, and one of many micro-batches, on two ranks."""
    first = Run(checkpoint=str(tiny_qwen25), dtype="bfloat16", steps=1, strategy="zero3")
    runs = {"qwen2_5_vl": first}
    many = replace(first, checkpoint=str(small), module="sft", micro_batches=48)
    runs |= {stage: replace(many, strategy=stage) for stage in STAGES}
    runs["rounded"] = replace(many, strategy="zero2", accumulation="policy")
    runs["dropped"] = replace(many, micro_batches=8, fault="dropped_micro_batch")
    runs["rotary"] = replace(first, checkpoint=str(small), module="sft", fault="rotary")
    runs["grpo"] = replace(many, module="grpo", micro_batches=8)
    runs["grpo_dropped"] = replace(runs["grpo"], fault="dropped_micro_batch")
    runs["checked"] = replace(first, module="sft", start_check=True)
    runs["shifted"] = replace(runs["checked"], fault="shifted_position")
    return launch(tmp_path_factory.mktemp("bf16"), runs)


@pytest.mark.parametrize(("run", "folder"), [("grpo", "small"), ("qwen2_5_vl", "tiny_qwen25")])
def test_bf16_buffers_under_zero3_are_those_of_a_plain_float32_load(
    loaded: dict[str, Outcome], run: str, folder: str, request: pytest.FixtureRequest
) -> None:
    found = loaded[run].buffers
    plain = load_policy(PolicyConfig(path=str(request.getfixturevalue(folder)), dtype="float32"))
    for which in ("policy", "reference"):
        for name, buffer in plain.named_buffers():
            assert found[f"{which}.{name}"].dtype == torch.float32
            assert torch.equal(found[f"{which}.{name}"], buffer), name
    assert len(found) == 2 * len(list(plain.buffers())) >= 8


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_gradients_of_48_micro_batches_are_summed_in_float32(loaded: dict[str, Outcome], stage: str) -> None:
    assert gradient_error(loaded[stage]) <= GRADIENT
    assert gradient_error(loaded["rounded"]) > 2 * GRADIENT, "else the bound would not show sums in bfloat16"


# ------------------------------------------------------------------ planted faults; tests of the others: _faults.py
def test_bf16_a_dropped_micro_batch_exceeds_the_bound_of_the_gradient(loaded: dict[str, Outcome]) -> None:
    assert gradient_error(loaded["dropped"]) > 10 * GRADIENT
    assert gradient_error(loaded["grpo"]) <= GRADIENT and gradient_error(loaded["grpo_dropped"]) > 10 * GRADIENT


def test_bf16_sft_start_check_under_zero3_judges_alike_where_a_rank_has_nothing(loaded: dict[str, Outcome]) -> None:
    assert not loaded["checked"].error and loaded["checked"].metrics["sft/loss"]
    said = loaded["shifted"].error
    assert "other log-probabilities than transformers' own" in said and not loaded["shifted"].metrics


def test_bf16_rotary_frequencies_rounded_by_zero_init_are_refused_at_the_start(loaded: dict[str, Outcome]) -> None:
    said = loaded["rotary"].error
    assert "rotary_emb.inv_freq is bfloat16, not float32" in said and not loaded["rotary"].metrics


# ------------------------------------------------------------------ whole runs, against one process
CURVES = {"sft": {"sft/loss": 5e-3, "sft/grad_norm": 0.05}, "grpo": {"policy/loss": 0.03, "policy/grad_norm": 0.12}}
"""Largest accepted difference of a curve over its largest value, or over 1 where that is larger.

At the seed of these runs, gradient norms of GRPO separate honest runs from a dropped micro-batch by a factor of 4; at
another seed they do not (docs/benchmarks.md). The gradient of one step does at every seed, and has tests above.
"""
MOVED = {"sft": 0.15, "grpo": 0.33}
"""Largest accepted norm of the difference of all weights over how far they moved."""
STRATEGIES = ("zero3", "zero2", "ddp")
CASES = ("qwen3_vl-sft", "qwen3_vl-grpo", "qwen2_5_vl-sft", "qwen2_5_vl-grpo")


@pytest.fixture(scope="module", params=CASES)
def whole(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Outcome], dict[str, Outcome]]:
    """SFT or GRPO; runs of several steps on two ranks, and in one process that takes everything in one micro-batch.

    A Qwen2.5-VL of the usual small weights: with large ones GRPO in bfloat16 is chaotic.
    """
    family, kind = request.param.split("-")
    folder, checkpoint = tmp_path_factory.mktemp("whole"), tiny_checkpoint
    if family == "qwen2_5_vl":
        checkpoint = folder / "tied"
        write(TinyCheckpoint(out=checkpoint, model=TinyModelConfig(family="qwen2_5_vl", tie_embeddings=True)))
    run = Run(checkpoint=str(checkpoint), dtype="bfloat16")
    if kind == "sft":
        run = replace(run, module="sft", steps=20, freeze_vision=True)
    runs = {strategy: replace(run, strategy=strategy) for strategy in STRATEGIES}
    runs["dropped"] = replace(run, strategy="zero3", fault="dropped_micro_batch")
    ones = {"zero": replace(run, float32_copies=True), "ddp": run}
    if family == "qwen3_vl":
        runs["lora"] = replace(runs["zero3"], lora=True)
        ones["lora"] = replace(ones["zero"], lora=True)
    return kind, launch(folder, runs), {name: perform(one, folder) for name, one in ones.items()}


def distances(found: Outcome, expected: Outcome, kind: str) -> dict[str, float]:
    """How far apart two runs are: curves over their largest value or 1, all weights over how far they moved."""
    apart = {}
    for name in CURVES[kind]:
        ours, theirs = torch.tensor(found.metrics[name]), torch.tensor(expected.metrics[name])
        apart[name] = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))
    pairs = [(found.weights[n].float(), expected.weights[n].float(), w.float()) for n, w in expected.loaded.items()]
    gap = sum(float((ours - theirs).square().sum()) for ours, theirs, _ in pairs)
    moved = sum(float((theirs - start).square().sum()) for _, theirs, start in pairs)
    return apart | {"weights": (gap / moved) ** 0.5}


def excess(found: Outcome, expected: Outcome, kind: str) -> list[str]:
    """What is further apart than accepted."""
    bounds = CURVES[kind] | {"weights": MOVED[kind]}
    return [f"{name} {gap:.2g}" for name, gap in distances(found, expected, kind).items() if not gap <= bounds[name]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:model.policy.dtype bfloat16")
def test_bf16_runs_on_two_ranks_follow_one_process(
    whole: tuple[str, dict[str, Outcome], dict[str, Outcome]],
) -> None:
    kind, ranks, ones = whole
    wrong = {name: excess(ranks[name], ones[name if name in ones else "zero"], kind) for name in ranks}
    assert wrong.pop("dropped"), "the bounds would not show that a micro-batch is dropped"
    assert len(wrong) >= len(STRATEGIES) and not any(wrong.values()), wrong
