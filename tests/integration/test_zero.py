"""ZeRO-3, ZeRO-2 and DDP on two unequally loaded gloo ranks equal one process that takes each step in one batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from module_samples import policy
from rank_runs import Outcome, Run, perform
from safetensors.torch import load_file

from cv_lightning.modules.base import OptimizerConfig
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.modules.sft import SFTModule
from cv_lightning.strategies import CPUDeepSpeedStrategy, ZeroStrategy
from cv_lightning.types import CVLightningError

SCRIPT = Path(__file__).parent / "rank_runs.py"
BAR = 1e-4
"""Largest difference of a curve, relative to its largest value where that is above 1."""
LIMIT_S = 1200.0
"""Time limit, so that a dead-lock fails the tests instead of blocking them."""


def launch(folder: Path, runs: dict[str, Run]) -> dict[str, Outcome]:
    """Train runs on two ranks."""
    (folder / "runs.json").write_text(json.dumps({name: asdict(run) for name, run in runs.items()}))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    command = [sys.executable, *torchrun, str(SCRIPT), str(folder), *runs]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=LIMIT_S)
    finally:
        process.terminate()  # takes the ranks with it
    assert process.returncode == 0, errors[-4000:]
    return {name: Outcome(**torch.load(folder / f"{name}.pt", weights_only=True)) for name in runs}


def alone(run: Run, folder: Path) -> Outcome:
    """The same run in this process, with one micro-batch per step."""
    return perform(replace(run, strategy="auto", recompute=False, resume_at=0), folder)


def assert_same_run(both: Outcome, one: Outcome, names: Iterable[str]) -> None:
    for name in names:
        ours, theirs = torch.tensor(both.metrics[name]), torch.tensor(one.metrics[name])
        assert ours.shape == theirs.shape
        difference = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0)
        assert difference < BAR, f"{name}: {both.metrics[name]} is not {one.metrics[name]}"
    for name, weight in one.weights.items():
        assert (both.weights[name] - weight).abs().max() < BAR, name


SFT_CURVES = ("sft/loss", "sft/grad_norm", "sft/skipped_steps", "sft/lr", "sft/tokens")
GRPO_CURVES = tuple(
    f"policy/{name}"
    for name in (
        "loss pg_loss grad_norm kl_to_reference entropy ratio_mean mismatch_max trajectories skipped_steps lr"
    ).split()
)
STRATEGIES = ("zero3", "zero2", "ddp")


@pytest.fixture(scope="module")
def made(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Outcome], dict[str, Outcome]]:
    """The runs on two ranks, and the runs in one process that they are compared with."""
    folder = tmp_path_factory.mktemp("ranks")
    sft = Run(checkpoint=str(tiny_checkpoint), module="sft", steps=20, freeze_vision=True)
    grpo = Run(checkpoint=str(tiny_checkpoint), steps=10)
    runs = {}
    for name in STRATEGIES:
        runs[f"sft_{name}"] = replace(sft, strategy=name)
        runs[f"grpo_{name}"] = replace(grpo, strategy=name)
    return launch(folder, runs), {"sft": alone(sft, folder), "grpo": alone(grpo, folder)}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sft_on_two_ranks_follows_the_curve_of_one(made: tuple, strategy: str) -> None:
    ranks, one = made
    assert_same_run(ranks[f"sft_{strategy}"], one["sft"], SFT_CURVES)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_grpo_on_two_ranks_follows_the_curve_of_one(made: tuple, strategy: str) -> None:
    ranks, one = made
    assert_same_run(ranks[f"grpo_{strategy}"], one["grpo"], GRPO_CURVES)


def test_the_compared_runs_learn(made: tuple) -> None:
    sft, grpo = made[1]["sft"], made[1]["grpo"]
    assert sft.metrics["sft/loss"][-1] < sft.metrics["sft/loss"][0] - 0.5
    assert max(sft.metrics["sft/grad_norm"]) > 2 * 0.5, "gradients are clipped"
    assert max(grpo.metrics["policy/kl_to_reference"]) > 10 * BAR
    moved = {name for name, weight in sft.weights.items() if not torch.equal(weight, sft.loaded[name])}
    assert moved and not any(".visual." in name for name in moved), "vision tower and projector are frozen"
    assert len(moved) == sum(".visual." not in name for name in sft.weights)


def test_a_checkpoint_is_sharded_while_it_is_loaded(made: tuple, tiny_checkpoint: Path) -> None:
    zero3 = made[0]["grpo_zero3"]
    assert set(zero3.shapes) == {(0,)}, "both policy and reference are sharded"
    on_disk = load_file(tiny_checkpoint / "model.safetensors")
    assert on_disk.keys() == zero3.loaded.keys()
    assert all(torch.equal(on_disk[name], tensor) for name, tensor in zero3.loaded.items())


# ------------------------------------------------------------------ the rest takes longer
@pytest.fixture(scope="module")
def more(
    tiny_checkpoint: Path, tiny_qwen25: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Outcome], Callable[[str], Outcome]]:
    folder = tmp_path_factory.mktemp("more_ranks")
    run = Run(checkpoint=str(tiny_checkpoint), steps=4)
    runs = {
        "recompute": replace(run, strategy="zero3", recompute=True),
        "lora": replace(run, strategy="zero3", lora=True),
        "tied": replace(run, strategy="zero3", checkpoint=str(tiny_qwen25), steps=2),
        "tied_zero2": replace(run, strategy="zero2", checkpoint=str(tiny_qwen25), steps=2),
        "lora_ddp": replace(run, strategy="ddp", lora=True),
        "offload": replace(run, strategy="zero3_offload"),
        "resumed": replace(run, strategy="zero3", resume_at=2),
        "resumed_zero2": replace(run, strategy="zero2", resume_at=2),
    }
    return folder, launch(folder, runs), lambda name: alone(runs[name], folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["recompute", "lora", "lora_ddp", "tied", "tied_zero2", "offload", "resumed", "resumed_zero2"]
)
def test_two_ranks_follow_the_curve_of_one_with_options(more: tuple, name: str) -> None:
    _, ranks, one = more
    assert_same_run(ranks[name], one(name), GRPO_CURVES)


@pytest.mark.slow
def test_checkpoints_hold_no_reference(more: tuple) -> None:
    folder, _, _ = more
    for name in ("resumed", "resumed_zero2"):
        states = sorted((folder / f"{name}-2" / "saved").rglob("*model_states.pt"))
        assert states
        for path in states:
            state = torch.load(path, weights_only=False)
            names = {*state["module"], *(state["frozen_param_fragments"] or {})}
            assert any(n.startswith("policy.") for n in names)
            assert not any(n.startswith("reference.") for n in names)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "zero3_offload"])
def test_zero_on_a_gpu_follows_a_plain_run(tiny_checkpoint: Path, tmp_path: Path, strategy: str) -> None:
    plain = Run(checkpoint=str(tiny_checkpoint), accelerator="gpu", steps=4)
    assert_same_run(perform(replace(plain, strategy=strategy), tmp_path), perform(plain, tmp_path), GRPO_CURVES)


# ------------------------------------------------------------------ invalid settings
def test_settings_that_contradict_each_other_are_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"strategy\.stage 1"):
        ZeroStrategy(stage=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="offload_parameters"):
        ZeroStrategy(stage=2, offload_parameters=True)

    strategy = CPUDeepSpeedStrategy()
    strategy.connect(SFTModule(policy(tiny_checkpoint), OptimizerConfig(skip_norm_above=10.0)))
    with pytest.raises(CVLightningError, match="skip_norm_above"):
        strategy._format_config()

    trainer = Trainer(accelerator="cpu", devices=1, precision="bf16-true", strategy=CPUDeepSpeedStrategy())
    trainer.strategy.connect(SFTModule(policy(tiny_checkpoint)))
    with pytest.raises(CVLightningError, match=r"trainer\.precision bf16-true"):
        trainer.strategy._format_config()


def test_lightnings_own_strategy_is_refused(tiny_checkpoint: Path) -> None:
    module = GRPOModule(policy(tiny_checkpoint))
    trainer = Trainer(accelerator="cpu", devices=1, logger=False)
    trainer._accelerator_connector.strategy = DeepSpeedStrategy()
    module.trainer = trainer
    with pytest.raises(CVLightningError, match=r"cv_lightning\.strategies"):
        module.configure_model()
