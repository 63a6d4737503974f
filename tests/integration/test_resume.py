"""A run that is killed and resumed equals an uninterrupted one bit for bit in trajectories, losses and weights."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch
from digests import assert_recorded, run_digest
from export_samples import fit_in_process
from resume_samples import (
    EVERY,
    Run,
    assert_same_run,
    figures,
    random_moment,
    rows,
    state,
    write_grpo,
    write_sft,
)

from cv_lightning.checkpoints.folder import last_checkpoint

ITERATIONS, STEPS = 5, 8
ZERO = ["--trainer.strategy", "{class_path: cv_lightning.strategies.CPUDeepSpeedStrategy}", "--trainer.devices", "2"]
DDP = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
BF16 = ["--model.init_args.policy.dtype", "bfloat16"]


@pytest.fixture(scope="module")
def grpo(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config of a GRPO run."""
    return write_grpo(tmp_path_factory.mktemp("grpo") / "grpo.yaml", tiny_checkpoint, iterations=ITERATIONS)


@pytest.fixture(scope="module")
def straight(grpo: Path) -> Path:
    """Folder of an uninterrupted GRPO run."""
    folder = grpo.with_name("straight")
    Run(grpo, folder).finish()
    return folder


def killed_and_resumed(config: Path, folder: Path, moment: float, *flags: str) -> None:
    Run(config, folder, *flags).kill_at(moment)
    Run(config, folder, "--ckpt_path", "auto", *flags).finish()


# ---------------------------------------------------------------------------------------------- GRPO
def test_the_run_learns_and_uses_dynamic_sampling(straight: Path) -> None:
    """The run has the parts that the tests below compare."""
    training = [row for row in rows(straight) if row["iteration"]]
    assert [float(row["iteration"]) for row in training] == [1, 2, 3, 4, 5]
    assert len(rows(straight)) == ITERATIONS + 1, "one validation, after the fourth"
    assert float(training[-1]["policy/kl_to_reference"]) > 1e-3, "the weights move"
    assert any(float(row["policy/pg_loss"]) for row in training)
    assert any(float(row["rollout/tasks_waiting"]) for row in training), "dynamic sampling leaves tasks over"
    kept = state(straight)
    assert not any(name.startswith("reference") for name in kept["state_dict"])
    assert "hyper_parameters" not in kept, "Lightning would let them override flags"
    names = sorted(path.name for path in (straight / "checkpoints").iterdir())
    assert names == ["iteration000004.ckpt", "iteration000005.ckpt"], "only the newest two"


def test_the_run_has_the_recorded_values(straight: Path) -> None:
    """The run's rewards differ, so that policy loss, KL and entropy all move the weights."""
    assert_recorded({"resume": run_digest(straight, state(straight)["state_dict"])})


def test_a_resumed_run_equals_an_uninterrupted_one(grpo: Path, straight: Path, tmp_path: Path) -> None:
    killed_and_resumed(grpo, tmp_path / "run", random_moment(ITERATIONS))
    assert_same_run(straight, tmp_path / "run")


def test_bf16_resume_after_sigkill_is_bitwise(grpo: Path, tmp_path: Path) -> None:
    Run(grpo, tmp_path / "straight", *BF16).finish()
    killed_and_resumed(grpo, tmp_path / "run", random_moment(ITERATIONS), *BF16)
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    kept = state(tmp_path / "run")["state_dict"]
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("kill", range(5))
def test_a_run_killed_at_any_moment_resumes(grpo: Path, straight: Path, tmp_path: Path, kill: int) -> None:
    killed_and_resumed(grpo, tmp_path / "run", random_moment(ITERATIONS))
    assert_same_run(straight, tmp_path / "run")


def test_the_folder_of_another_run_is_left_unchanged(grpo: Path, straight: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()}
    said = Run(grpo, straight).finish(expect=1)
    assert "--ckpt_path last continues it" in said and "iteration 5" in said
    assert before == {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()}
    other = straight / "checkpoints/iteration000004.ckpt"
    (tmp_path / "used/checkpoints").mkdir(parents=True)
    mine = tmp_path / "used/checkpoints/iteration000009.ckpt"
    mine.write_bytes(other.read_bytes())
    said = Run(grpo, tmp_path / "used", "--ckpt_path", str(other)).finish(expect=1)
    assert "iteration 9" in said and mine.is_file(), "another run's checkpoint does not permit clearing this folder"
    said = Run(grpo, tmp_path / "new", "--ckpt_path", "last").finish(expect=1)
    assert f"no checkpoint in {tmp_path / 'new' / 'checkpoints'}" in said and "Traceback" not in said


def test_flags_override_hyper_parameters_after_a_resume(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rate = "--model.init_args.optimizer."
    fit_in_process(tiny_checkpoint, tmp_path, f"{rate}schedule=constant", f"{rate}warmup_steps=0", f"{rate}lr=0.001")
    changed = [f"{rate}schedule=constant", f"{rate}warmup_steps=0", f"{rate}lr=0.00001", f"{rate}weight_decay=0.5"]
    fit_in_process(tiny_checkpoint, tmp_path, *changed, "--data.init_args.num_steps=4", "--ckpt_path=last")
    assert [float(row["sft/lr"]) for row in rows(tmp_path)] == pytest.approx([1e-3, 1e-3, 1e-5, 1e-5])
    groups = torch.load(last_checkpoint(tmp_path), weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-5, 0.5), (1e-5, 0.0)]


# ---------------------------------------------------------------------------------------------- SFT
def test_sft_resumes_after_a_kill_while_saving(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = write_sft(tmp_path / "sft.yaml", tiny_checkpoint, steps=STEPS)
    straight, folder = tmp_path / "straight", tmp_path / "run"
    Run(config, straight).finish()
    run = Run(config, folder)
    unfinished = folder / "checkpoints" / f".unfinished-iteration{2 * EVERY:06d}.ckpt"
    while not unfinished.exists():
        assert run.exit_code is None, run.log.read_text()[-3000:]
        time.sleep(0.001)
    run.kill()
    assert unfinished.exists() and not unfinished.with_name("iteration000004.ckpt").exists()
    assert state(folder)["iteration"] == EVERY, "the earlier checkpoint is unchanged"
    said = Run(config, folder, "--ckpt_path", "last").finish()
    assert "iteration000002.ckpt" in said and not unfinished.exists()
    assert_same_run(straight, folder)
    # Killed after its last checkpoint, it has nothing left to do but the export.
    shutil.rmtree(folder / "model")
    Run(config, folder, "--ckpt_path", "last").finish()
    assert figures(folder) == figures(straight)
    weights = [run / "model" / "model.safetensors" for run in (straight, folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    # A longer run continues where the shorter one ended.
    Run(config, folder, "--ckpt_path", "last", "--data.init_args.num_steps", str(STEPS + 2)).finish()
    assert [float(row["iteration"]) for row in rows(folder)] == list(range(1, STEPS + 3))
    assert figures(folder)[:STEPS] == figures(straight)


# ---------------------------------------------------------------------------------------------- several ranks
@pytest.mark.slow
@pytest.mark.parametrize("flags", [DDP, ZERO, ZERO + BF16], ids=["ddp", "zero3", "zero3_bf16"])
def test_two_ranks(tiny_checkpoint: Path, tmp_path: Path, flags: list[str]) -> None:
    engine = "transformers" if flags is DDP else "vllm"
    config = write_grpo(tmp_path / "grpo.yaml", tiny_checkpoint, iterations=ITERATIONS, engine=engine)
    straight, folder = tmp_path / "straight", tmp_path / "run"
    Run(config, straight, *flags).finish()
    for _ in range(5 if flags is DDP else 2):
        shutil.rmtree(folder, ignore_errors=True)
        killed_and_resumed(config, folder, random_moment(ITERATIONS), *flags)
        assert_same_run(straight, folder)
    longer = ["--ckpt_path", "last", "--data.init_args.num_iterations", str(ITERATIONS + 1)]
    if flags is DDP:
        said = Run(config, folder, *longer).finish()
        assert "written by 2 ranks" in said
        assert float(rows(folder)[-1]["iteration"]) == ITERATIONS + 1
    else:
        said = Run(config, folder, *longer).finish(expect=1)
        assert "folder of DeepSpeed" in said
