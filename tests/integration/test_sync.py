"""Several ranks, one rollout: weights in sync, an engine on each, unequal ranks, trouble that is named and ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_samples import Policy, worst_gap

from cv_lightning.engines import EngineConfig
from cv_lightning.models.gather import gather_full_params
from cv_lightning.models.loading import PolicyConfig, load_adapter
from cv_lightning.types import EngineError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TOLERANCE = 1e-4
TROUBLE = ("fine", "slow", "stuck", "killed", "first_killed", "raises", "stopped")
SETTINGS = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
SETTINGS |= {"TORCH_COMPILE_DISABLE": "1"}  # of which vLLM has one small function, and half a minute goes into it


def rolled_out(checkpoint: Path, folder: Path, ranks: int, tensor_parallel: int = 1) -> list[list[dict[str, Any]]]:
    """What each rank saw in each iteration."""
    command = [sys.executable, str(HERE / "rank_rollout.py"), str(checkpoint), str(folder), str(ranks)]
    # A dead-lock fails the test instead of holding it up.
    done = subprocess.run(
        [*command, str(tensor_parallel)], env=SETTINGS, capture_output=True, text=True, timeout=600, check=False
    )
    said = [(folder / f"rank{rank}.txt").read_text()[-3000:] for rank in range(ranks)]
    assert done.returncode == 0, "\n".join([done.stderr[-1000:], *said])
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def trajectories(iteration: dict[str, Any]) -> dict[tuple[str, int], list[int]]:
    """Tokens by task and sample."""
    return {(t["task"], n): t["tokens"] for group in iteration["groups"] for n, t in enumerate(group)}


# ------------------------------------------------------------------------------------------------ one rollout
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(tiny_checkpoint: Path, folder: Path) -> list[list[dict[str, Any]]]:
    """Two iterations and a validation on two ranks under ZeRO-3."""
    return rolled_out(tiny_checkpoint, folder, ranks=2)


@pytest.fixture(scope="module")
def one(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same on one."""
    return rolled_out(tiny_checkpoint, tmp_path_factory.mktemp("one"), ranks=1)[0]


def test_every_group_is_whole_on_one_rank(two: list[list[dict[str, Any]]]) -> None:
    for first, second in zip(*two, strict=True):
        tasks = [{t["task"] for t in group} for rank in (first, second) for group in rank["groups"]]
        assert all(len(group) == 1 for group in tasks) and len(set.union(*tasks)) == len(tasks) == 4
        assert [len(group) for rank in (first, second) for group in rank["groups"]] == [3] * 4


def test_both_engines_sample_from_the_weights_of_the_iteration(two: list[list[dict[str, Any]]]) -> None:
    for rank in two:
        for number, iteration in enumerate(rank):
            assert {t["version"] for group in iteration["groups"] for t in group} == {number}
            assert iteration["metrics"]["policy/mismatch_max"] <= TOLERANCE, "the largest of both ranks"


def test_metrics_cover_all_ranks_and_are_equal_on_each(two: list[list[dict[str, Any]]]) -> None:
    own = ("time/update_s", "time/store_s", "policy/tokens_per_s")  # how long the rank's own update and storing took
    first, second = ({k: v for k, v in rank[-1]["metrics"].items() if k not in own} for rank in two)
    assert first == second
    assert first["rollout/trajectories"] == 12 and first["policy/trajectories"] == 8, "the middle one is the mean"
    lengths = [[len(t["tokens"]) for group in rank[-1]["groups"] for t in group] for rank in two]
    assert first["rollout/length_max"] == max(map(max, lengths))
    assert first["rollout/length_mean"] == pytest.approx(sum(map(sum, lengths)) / 12)
    assert max(lengths[0]) > max(lengths[1]), "the ranks were to be unequal"


def test_samples_do_not_depend_on_the_number_of_ranks(
    two: list[list[dict[str, Any]]], one: list[dict[str, Any]]
) -> None:
    alone, second = trajectories(one[0]), trajectories(two[1][0])
    assert second and all(alone[key] == tokens for key, tokens in second.items())
    # Rank 0 had longer turns: they begin alike.
    for key, tokens in trajectories(two[0][0]).items():
        assert tokens[: len(alone[key])] == alone[key]


def test_a_rank_without_a_task_does_not_block_an_evaluation(two: list[list[dict[str, Any]]], folder: Path) -> None:
    (found,) = (folder / "eval").glob("*/metrics.json")
    stored = [
        [json.loads(line) for line in path.open()] for path in sorted((found.parent / "trajectories").glob("*.jsonl"))
    ]
    assert [len(lines) for lines in stored] == [1, 0]
    calls = Counter(len(t["turns"]) for t in stored[0][0]["trajectories"])
    assert calls == {2: 2}, "rank 0 called the tool in every first turn"
    assert json.loads(found.read_text())["turns_mean"] == 2.0


@pytest.mark.slow
def test_an_engine_shared_by_two_ranks_gives_the_same_samples(
    tiny_checkpoint: Path, tmp_path: Path, one: list[dict[str, Any]]
) -> None:
    for left in Path("/dev/shm").glob("*-cpushm_[01]"):
        left.unlink()  # vLLM's CPU build names it the same in every run, and refuses one that a killed run has left
    shared = rolled_out(tiny_checkpoint, tmp_path, ranks=2, tensor_parallel=2)
    together = trajectories(shared[0][0]) | trajectories(shared[1][0])
    assert together == trajectories(one[0])
    for rank in shared:
        assert len(trajectories(rank[0])) == 6, "each rank trains on its own tasks"
        assert all(iteration["metrics"]["policy/mismatch_max"] <= TOLERANCE for iteration in rank)


# ------------------------------------------------------------------------------------------------ trouble
@pytest.fixture(scope="module")
def trouble(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[tuple[int, bool]]]]:
    """What the ranks said, and how they ended."""
    out = tmp_path_factory.mktemp("trouble")
    command = [sys.executable, str(HERE / "rank_watchdog.py"), str(out), *TROUBLE]
    done = subprocess.run(command, env=SETTINGS, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, json.loads(done.stdout.splitlines()[-1])


def test_ranks_that_make_progress_are_not_stopped(trouble: tuple[Path, dict[str, list[tuple[int, bool]]]]) -> None:
    out, ended = trouble
    assert [code for code, _ in ended["fine"]] == [0, 0]
    assert [code for code, _ in ended["slow"]] == [0, 0], "longer than the time-out, but with progress"
    assert not list(out.glob("fine/watchdog*")) + list(out.glob("slow/watchdog*"))


@pytest.mark.parametrize(
    ("mode", "teller", "said"),
    [
        ("stuck", 0, r"rank 1 (*) has made no progress in 'rollout 2' for * s: rank 0 (*) waits in 'training step 2'"),
        ("stuck", 1, r"rank 1 (*) has made no progress in 'rollout 2'"),
        ("stopped", 0, r"rank 1 (*) has sent no report for * s, last in 'training step 2'"),
    ],
)
def test_the_watchdog_names_the_rank_and_its_place(
    trouble: tuple[Path, dict[str, list[tuple[int, bool]]]], mode: str, teller: int, said: str
) -> None:
    out, ended = trouble
    text = (out / f"{mode}.rank{teller}.txt").read_text()
    at = 0
    for part in said.split("*"):
        assert part in text[at:], text
        at = text.index(part, at) + len(part)
    assert list(ended[mode][teller]) == [75, False], "with its children"
    trace = (out / mode / f"watchdog.rank{teller}.txt").read_text()
    assert "Thread" in trace and "rank_watchdog.py" in trace


@pytest.mark.parametrize("mode", ["killed", "first_killed", "raises"])
def test_a_dead_rank_ends_the_other(trouble: tuple[Path, dict[str, list[tuple[int, bool]]]], mode: str) -> None:
    assert all(code != 0 for code, _ in trouble[1][mode])


# ------------------------------------------------------------------------------------------------ sleep
@pytest.fixture(scope="module")
def sleepless(tiny_checkpoint: Path) -> Iterator[tuple[Policy, Any]]:
    """A policy and the real vLLM engine."""
    from cv_lightning.engines.vllm import VLLMEngine

    policy = Policy.load(tiny_checkpoint)
    engine = VLLMEngine(
        str(tiny_checkpoint),
        EngineConfig(max_model_len=256, max_num_seqs=32, max_images=4),
        policy.adapter,
        dtype="float32",
    )
    yield policy, engine
    engine.close()


def test_waking_syncing_and_sleeping_are_in_order(
    sleepless: tuple[Policy, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's CPU worker takes the calls but has nothing to give back: only that is not real here."""
    policy, engine = sleepless
    calls: list[str] = []

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            shown = args or tuple(kwargs.values())
            calls.append(f"{name}{list(shown[0]) if name == 'wake_up' else ''}")
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    monkeypatch.setattr(engine, "sleeps", True)
    for name in ("wake_up", "sleep", "collective_rpc", "reset_prefix_cache"):
        watch(engine.llm, name)
    watch(engine.engine, "reset_encoder_cache")
    engine.update_weights(policy.model.named_parameters(), version=1)
    caches = ["reset_prefix_cache", "reset_encoder_cache"]
    assert calls == ["collective_rpc", *caches], "it was awake"
    calls.clear()
    assert engine.sleep() and engine.sleep(), "once is enough"
    assert calls == ["reset_encoder_cache", "sleep"]
    calls.clear()
    policy.perturb(seed=5)
    engine.update_weights(policy.model.named_parameters(), version=2)
    assert calls == ["wake_up['weights']", "collective_rpc", *caches, "wake_up['kv_cache']"]
    assert worst_gap(policy, engine) <= TOLERANCE and engine.policy_version == 2


def test_an_engine_that_cannot_sleep_or_be_shared_is_refused(tiny_checkpoint: Path) -> None:
    from cv_lightning.engines.vllm import VLLMEngine

    adapter = load_adapter(PolicyConfig(path=str(tiny_checkpoint)))
    for config, said in (
        (EngineConfig(tensor_parallel_size=2), r"tensor_parallel_size 2 does not divide the 1 rank"),
        (EngineConfig(sleep="always"), r"engine\.sleep always needs a GPU"),
    ):
        with pytest.raises(EngineError, match=said):
            VLLMEngine(str(tiny_checkpoint), config, adapter, dtype="float32")


@pytest.mark.gpu
@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_slept_samples_from_the_new_weights(tiny_checkpoint: Path, level: int) -> None:
    """The second engine of the process finds the memory pool free that the first one slept with."""
    from cv_lightning.engines.vllm import VLLMEngine

    policy = Policy.load(tiny_checkpoint)
    sizes = EngineConfig(max_model_len=256, max_num_seqs=32, max_images=4, gpu_memory_utilization=0.3)
    config = replace(sizes, sleep="always", sleep_level=level)  # type: ignore[arg-type]
    engine = VLLMEngine(str(tiny_checkpoint), config, policy.adapter, dtype="float32")
    for version in (1, 2):
        engine.update_weights(gather_full_params(policy.model), version)
        assert worst_gap(policy, engine) <= 1e-3
        awake = torch.cuda.mem_get_info()[0]
        assert engine.sleep()
        assert torch.cuda.mem_get_info()[0] - awake > 1e9, "the key-value cache is gone"
        policy.perturb(seed=version)
    engine.close()


# ------------------------------------------------------------------------------------------------ the whole path
@pytest.mark.slow
def test_the_quickstart_on_two_ranks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "cv_lightning", "quickstart", "--smoke", "--ranks", "2", "--out", str(run)]
    done = subprocess.run(command, cwd=ROOT, env=SETTINGS, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    summary = json.loads((run / "summary.json").read_text())
    for stage in ("sft", "rl"):
        assert set(summary[stage]["by_kind"]) == {"upright", "turned", "small", "turned_and_small"}
    assert (run / "report.html").is_file()
    stored = list((run / "rl" / "trajectories").glob("*.jsonl"))
    assert len(stored) == 2 and all(sum(1 for _ in path.open()) == 4 for path in stored)
