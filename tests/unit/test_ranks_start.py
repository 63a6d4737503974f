"""Checks before and while several ranks start: environment, agreement, and the diagnosis of hung ranks."""

from __future__ import annotations

import pytest

from cv_lightning.callbacks.watchdog import RankReport, diagnose
from cv_lightning.distributed import differences
from cv_lightning.environment import check_launch
from cv_lightning.settings import flatten

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "16", "MASTER_ADDR": "127.0.0.1"}
SRUN = {"SLURM_NTASKS": "16", "SLURM_PROCID": "3", "SLURM_JOB_NAME": "train"}


# ------------------------------------------------------------------------------------------------ environment
def test_ranks_are_counted_from_the_environment() -> None:
    assert check_launch(1, 1, {}) == 1
    assert check_launch(8, 2, TORCHRUN) == check_launch("8", 2, SRUN) == 16
    assert check_launch([0, 1], 1, {}) == check_launch("0,1", 1, {}) == 2
    assert check_launch("auto", 2, TORCHRUN) == check_launch(-1, 1, {}) == 0, "not known yet"
    assert check_launch(2, 1, SRUN | {"SLURM_JOB_NAME": "bash"}) == 2, "an interactive job starts one process"
    own = {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert check_launch(2, 1, own) == 2, "as Lightning starts its ranks"


@pytest.mark.parametrize(
    ("devices", "nodes", "environment", "message"),
    [
        (4, 2, TORCHRUN, r"WORLD_SIZE is 16 .*trainer.devices 4 x trainer.num_nodes 2 = 8"),
        (8, 1, SRUN, r"SLURM_NTASKS is 16 .*trainer.devices 8 x trainer.num_nodes 1 = 8"),
        (8, 2, {}, r"num_nodes is 2, but nothing says where the ranks meet"),
        (2, 1, {"RANK": "two", "WORLD_SIZE": "2"}, r"RANK is 'two'"),
        (2, 1, {"RANK": "2", "WORLD_SIZE": "2"}, r"RANK 2 is not below WORLD_SIZE 2"),
        (8, 2, {"TORCHELASTIC_RUN_ID": "x", "RANK": "1"}, r"RANK, LOCAL_RANK and WORLD_SIZE are not all set"),
        (8, 2, {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29500"}, r"MASTER_ADDR no-such-host.invalid"),
        (8, 2, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}, r"MASTER_PORT 99999"),
    ],
)
def test_ranks_that_would_not_meet_are_refused(
    devices: int, nodes: int, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_launch(devices, nodes, environment)


# ------------------------------------------------------------------------------------------------ agreement
def test_ranks_with_other_versions_or_settings_are_named() -> None:
    first = flatten({"commit": "a", "versions": {"torch": "2.13", "vllm": "0.32"}, "config": {"lr": 0.1}})
    other = flatten({"commit": "a", "versions": {"torch": "2.12"}, "config": {"lr": 0.1}})
    assert differences([("node0", first), ("node1", first)]) == []
    assert differences([("node0", first), ("node0", first), ("node1", other)]) == [
        "versions.torch is 2.13 on rank 0 (node0), 2.12 on rank 2 (node1)",
        "versions.vllm is 0.32 on rank 0 (node0), absent on rank 2 (node1)",
    ]


# ------------------------------------------------------------------------------------------------ watchdog
def report(rank: int, place: str, *, waits: bool, idle_s: float, silent_s: float = 1.0) -> RankReport:
    return RankReport(rank, f"node{rank}, process 1", place, waits, idle_s, silent_s, False)


def test_ranks_that_make_progress_are_not_diagnosed() -> None:
    waiting = report(0, "end of rollout 3", waits=True, idle_s=5000)
    assert diagnose([waiting, report(1, "rollout 3", waits=False, idle_s=2)], 60, 60) == ""
    both = [report(rank, "training step 3", waits=True, idle_s=idle) for rank, idle in ((0, 5000.0), (1, 3.0))]
    assert diagnose(both, 60, 60) == "", "the second has just come"


def test_a_stuck_rank_is_named() -> None:
    ranks = [report(0, "end of rollout 3", waits=True, idle_s=50), report(1, "rollout 3", waits=False, idle_s=61)]
    found = diagnose(ranks, 60, 60)
    assert "rank 1 (node1, process 1) has made no progress in 'rollout 3' for 61 s" in found
    assert "rank 0 (node0, process 1) waits in 'end of rollout 3'" in found


def test_ranks_that_wait_for_each_other_are_named() -> None:
    ranks = [report(0, "weight sync", waits=True, idle_s=70), report(1, "training step 2", waits=True, idle_s=61)]
    found = diagnose(ranks, 60, 60)
    assert "every rank waits" in found and "'weight sync' for 70 s" in found and "'training step 2' for 61 s" in found


def test_a_silent_rank_is_named_with_its_last_place() -> None:
    ranks = [
        report(0, "end of rollout 3", waits=True, idle_s=9),
        report(1, "rollout 3", waits=False, idle_s=1, silent_s=61),
    ]
    assert "rank 1 (node1, process 1) has sent no report for 61 s, last in 'rollout 3'" in diagnose(ranks, 60, 60)
