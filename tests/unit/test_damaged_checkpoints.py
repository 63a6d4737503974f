"""Checkpoints that a disk has damaged: passed over for older ones, and named. And checkpoints of another recipe."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

import pytest
import torch

from cv_lightning.callbacks.checkpoint import StreamingCheckpointIO
from cv_lightning.checkpoints.damage import damage
from cv_lightning.checkpoints.folder import last_checkpoint
from cv_lightning.checkpoints.reader import CheckpointReader, find_stored
from cv_lightning.checkpoints.recipe import KEY, check_recipe, settings_of
from cv_lightning.cli import find_checkpoint
from cv_lightning.types import CheckpointError, CVLightningError

CASES = ["64 kB in a tensor", "1 MB over an entry", "table of contents", "cut short", "one bit"]


def save(run: Path, iteration: int, **more: object) -> Path:
    path = run / "checkpoints" / f"iteration{iteration:06d}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {f"policy.layer{number}": torch.full((512, 512), float(iteration)) for number in range(3)}
    StreamingCheckpointIO().save_checkpoint({"state_dict": weights, "iteration": iteration, **more}, path)
    return path


def zero(path: Path, start: int, size: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(size))


def start_of(path: Path, record: str) -> int:
    with zipfile.ZipFile(path) as archive:
        return next(info.header_offset for info in archive.infolist() if info.filename.endswith(record))


@pytest.mark.parametrize("case", CASES)
def test_damaged_checkpoint_is_skipped_for_the_earlier_one_on_resume(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    nine, ten = save(tmp_path, 9), save(tmp_path, 10)
    assert damage(nine) == damage(ten) == "" and last_checkpoint(tmp_path) == ten
    size = ten.stat().st_size
    if case == "64 kB in a tensor":
        zero(ten, start_of(ten, "data/1") + 200_000, 65_536)
        assert torch.load(ten)["iteration"] == 10, "loading does not see it"
    elif case == "1 MB over an entry":
        zero(ten, start_of(ten, "data/1") - 1000, 1 << 20)
    elif case == "table of contents":
        zero(ten, size - 200, 200)
    elif case == "cut short":
        ten.write_bytes(ten.read_bytes()[: size // 2])
    else:
        with ten.open("r+b") as file:
            file.seek(start_of(ten, "data/2") + 300_000)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path) == nine
    assert "iteration000010.ckpt is damaged" in caplog.text and "Trying the one before" in caplog.text
    assert find_checkpoint("last", tmp_path) == str(nine)
    assert find_stored(tmp_path) == nine, "an export takes the same one"
    assert {float(t.mean()) for _, t in CheckpointReader(find_stored(tmp_path)).tensors(torch.float32, None)} == {9.0}
    with pytest.raises(CVLightningError, match=r"iteration000010\.ckpt is damaged.*`last` takes"):
        find_checkpoint(str(ten), tmp_path)
    with pytest.raises(CheckpointError, match="whose newest intact checkpoint is used"):
        find_stored(ten)
    zero(nine, 0, nine.stat().st_size)
    with pytest.raises(CVLightningError, match="every checkpoint in"):
        find_checkpoint("auto", tmp_path)


def test_damaged_part_of_a_deepspeed_folder(tmp_path: Path) -> None:
    folder = tmp_path / "iteration000001.ckpt"
    (folder / "checkpoint").mkdir(parents=True)
    parts = [folder / "checkpoint" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
    for part in parts:
        torch.save({"moments": torch.ones(100_000)}, part)
    assert "`latest`" in damage(folder)
    (folder / "latest").write_text("checkpoint")
    assert damage(folder) == ""
    zero(parts[1], 100_000, 65_536)
    assert parts[1].name in damage(folder)


def test_damaged_is_not_said_of_a_checkpoint_from_before_checksums(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(1000)}, tmp_path / "old.ckpt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert damage(tmp_path / "old.ckpt") == ""


# ------------------------------------------------------------------------------------------------ another recipe
CONFIG = {
    "seed_everything": 1,
    "ckpt_path": "last",
    "trainer": {"default_root_dir": "a", "callbacks": [{"class_path": "x.Rollout", "init_args": {"num_samples": 4}}]},
    "model": {"class_path": "m.SFTModule", "init_args": {"optimizer": {"lr": 0.1}}},
    "data": {"class_path": "d.SFTDataModule"},
}


def test_damaged_by_another_recipe_is_refused_with_what_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(CONFIG)
    assert settings["trainer.callbacks.Rollout.init_args.num_samples"] == 4
    assert "ckpt_path" not in settings and "trainer.default_root_dir" not in settings
    classes = {"module": "SFTModule", "data": "SFTDataModule"}
    path = save(tmp_path, 1, **{KEY: {"recipe": classes | {"settings": settings}}})
    check_recipe(path, classes, settings)
    assert not caplog.records
    changed = settings | {"model.init_args.optimizer.lr": 0.5}
    check_recipe(path, classes, changed)
    assert "1 changed settings: model.init_args.optimizer.lr 0.1 -> 0.5" in caplog.text
    with pytest.raises(CheckpointError) as refused:
        check_recipe(path, {"module": "GRPOModule", "data": "TaskDataModule"}, changed)
    said = str(refused.value)
    assert "written by SFTModule on SFTDataModule, this config trains GRPOModule on TaskDataModule" in said
    assert "lr 0.1 -> 0.5" in said and "--model.init_args.policy.path" in said
    check_recipe(save(tmp_path, 2), classes, settings)  # older checkpoints do not say
