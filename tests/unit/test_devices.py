"""Device lists on a fake machine: policy and engine use the same GPUs, and lists that cannot work are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cv_lightning.devices import APPLIED, VISIBLE, Gpus, use_named_devices
from cv_lightning.engines.process import engine_device_index
from cv_lightning.rollout.engine_group import check_engine_device
from cv_lightning.types import CVLightningError

FOUR = Gpus(count=4, in_use=False)


@pytest.mark.parametrize(
    ("devices", "visible", "left", "then_visible"),
    [
        ([3], None, 1, "3"),
        ([2, 3], None, 2, "2,3"),
        ("3,", None, 1, "3"),
        ("[2,3]", None, 2, "2,3"),
        ("3,1", None, 2, "3,1"),
        ([1, 3], "4,5,6,7", 2, "5,7"),
        ([1], "GPU-aa, GPU-bb,GPU-cc,GPU-dd", 1, "GPU-bb"),
        ([0], None, 1, None),
        ([0, 1], "6,7,4,5", 2, "6,7,4,5"),
        (2, None, 2, None),
        ("auto", None, "auto", None),
        (-1, "1,2,3,0", -1, "1,2,3,0"),
    ],
)
def test_the_named_gpus_become_the_only_visible_ones(
    devices: Any, visible: str | None, left: Any, then_visible: str | None
) -> None:
    environment = {} if visible is None else {VISIBLE: visible}
    assert use_named_devices(devices, "auto", FOUR, environment) == left
    assert environment.get(VISIBLE) == then_visible


def test_ranks_started_by_a_rank_keep_its_gpus() -> None:
    """Lightning starts the other ranks with the same command line and this process's environment."""
    environment = {VISIBLE: "4,5,6,7"}
    assert use_named_devices([2, 3], "gpu", FOUR, environment) == 2
    assert environment[VISIBLE] == "6,7"
    assert use_named_devices([2, 3], "gpu", Gpus(count=2, in_use=False), environment) == 2
    assert environment[VISIBLE] == "6,7"


def test_another_list_in_a_started_process_chooses_among_what_it_sees() -> None:
    environment: dict[str, str] = {}
    use_named_devices([2, 3], "gpu", FOUR, environment)
    assert use_named_devices([1], "gpu", Gpus(count=2, in_use=False), environment) == 1
    assert environment[VISIBLE] == "3"
    environment[VISIBLE] = "0,1,2,3"  # a user's own choice later on
    assert use_named_devices([1], "gpu", FOUR, environment) == 1
    assert environment[VISIBLE] == "1" and environment[APPLIED]


@pytest.mark.parametrize(
    ("devices", "accelerator", "gpus", "said"),
    [
        ([4], "gpu", FOUR, r"no GPU 4; this process sees 4 GPU\(s\)"),
        ([-1, 0], "gpu", FOUR, "no GPU -1"),
        ([1, 1], "gpu", FOUR, "twice"),
        ([], "gpu", FOUR, "names no GPU"),
        ("[a,b]", "gpu", FOUR, "give numbers of GPUs"),
        ([2, 3], "cpu", FOUR, r"accelerator is cpu: give a number of processes, --trainer\.devices 2"),
        ([3], "auto", Gpus(0, False), "this machine has none"),
        ([0], "gpu", Gpus(0, False), r"accelerator gpu .*sees no GPU.*--trainer\.accelerator cpu"),
        (1, "cuda", Gpus(0, False), r"accelerator cuda .*sees no GPU"),
        ("auto", "gpu", Gpus(0, False), r"accelerator gpu .*sees no GPU"),
        (8, "gpu", FOUR, r"--trainer\.devices 8: this process sees 4"),
        (0, "gpu", FOUR, "at least one device"),
        ("two", "gpu", FOUR, "how many GPUs"),
        ([3], "gpu", Gpus(4, True), r"CUDA_VISIBLE_DEVICES=3 before Python starts"),
    ],
)
def test_a_device_list_that_cannot_work_is_refused(devices: Any, accelerator: str, gpus: Gpus, said: str) -> None:
    environment: dict[str, str] = {}
    with pytest.raises(ValueError, match=said) as refused:
        use_named_devices(devices, accelerator, gpus, environment)
    assert "--trainer.devices" in str(refused.value) and not environment


@pytest.mark.parametrize(("index", "world", "local_rank", "fits"), [
    (0, 1, None, True), (3, 1, None, False), (1, 2, "1", True), (3, 2, "1", False), (0, 1, "3", True),
])  # fmt: skip
def test_a_trainer_whose_gpu_is_not_the_engines_is_refused(
    monkeypatch: pytest.MonkeyPatch, index: int, world: int, local_rank: str | None, fits: bool
) -> None:
    """A trainer built in Python may have a device list that the command line never saw."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cuda", index)), world_size=world, num_devices=world
    )
    assert (engine_device_index(world) == index) == fits
    if fits:
        return check_engine_device(trainer)
    with pytest.raises(CVLightningError, match=rf"policy is on cuda:{index}.*CUDA_VISIBLE_DEVICES"):
        check_engine_device(trainer)
