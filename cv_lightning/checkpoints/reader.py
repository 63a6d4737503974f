"""The policy's weights as a checkpoint holds them, read tensor by tensor.

Files are mapped into memory, not read into it, and opened anew for every bucket, so that the pages of the last one are
given back. A checkpoint is a pickle: open your own only.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cv_lightning.checkpoints.damage import damage
from cv_lightning.checkpoints.folder import FOLDER, last_checkpoint
from cv_lightning.models.lora import ADAPTER, BASE, FACTORS, LoraConfig
from cv_lightning.types import CheckpointError

PREFIX = "policy."
"""Before the names of the policy's parameters in a checkpoint of a module."""
TAG = "checkpoint"
"""Lightning's name of the part of a DeepSpeed folder that holds the shards."""
BUCKET_BYTES = 1_000_000_000


def find_stored(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of a run's folder.

    Raises:
        CheckpointError: there is none.
    """
    if not path.exists():
        raise CheckpointError(f"--ckpt {path}: no such file or folder")
    if path.is_file() or is_deepspeed(path):
        if reason := damage(path):
            raise CheckpointError(
                f"--ckpt {path} is not a checkpoint that can be read: {reason}. Give another one, or the run's folder, "
                "whose newest whole one is taken"
            )
        return path
    if (path / "config.json").is_file():
        raise CheckpointError(f"--ckpt {path} is a Hugging Face folder already: nothing is to be exported")
    found = last_checkpoint(path)
    if found is None:
        made = f"; its exported model is {path / 'model'}" if (path / "model" / "config.json").is_file() else ""
        raise CheckpointError(
            f"--ckpt {path}: not a checkpoint, and no checkpoint in {path / FOLDER}{made}. Give a .ckpt file, a "
            "DeepSpeed folder, or a run's folder"
        )
    return found


def is_deepspeed(path: Path) -> bool:
    """True for a folder that DeepSpeed wrote through Lightning."""
    return any(path.glob(f"{TAG}/*_model_states.pt"))


@dataclass(frozen=True)
class CheckpointReader:
    """The policy in one checkpoint."""

    path: Path
    """A Lightning file, or a DeepSpeed folder."""

    def _open(self) -> dict[str, Any]:
        """Parameter name to something with `shape`, `dtype` and `contiguous()`; nothing is read yet.

        Raises:
            CheckpointError: not a checkpoint of ours.
        """
        try:
            state = _open_shards(self.path) if self.path.is_dir() else _open_file(self.path)
        except (OSError, ValueError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"--ckpt {self.path}: not a checkpoint that can be read ({error})") from error
        own = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
        if not own:
            raise CheckpointError(
                f"--ckpt {self.path} holds no policy: {len(state)} tensors, none of which is named {PREFIX}*"
            )
        return own

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Of every parameter, adapters apart."""
        return {name: value.shape for name, value in self._open().items()}

    @property
    def has_adapters(self) -> bool:
        """True if it was trained with LoRA."""
        return any(mark in name for name in self.shapes for mark in FACTORS)

    @property
    def merged_shapes(self) -> dict[str, torch.Size]:
        """Of every parameter once adapters are merged: what the model without LoRA has."""
        return {name.replace(BASE, "."): shape for name, shape in self.shapes.items() if not _is_factor(name)}

    def factors(self) -> dict[str, torch.Tensor]:
        """The adapters' own parameters."""
        return {name: value.contiguous() for name, value in self._open().items() if _is_factor(name)}

    def tensors(
        self, dtype: torch.dtype, lora: LoraConfig | None, skip: tuple[str, ...] = ()
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter, adapters merged. Keep them for as long as a shard takes: they hold their file open.

        Args:
            dtype: of the result.
            lora: how the adapters were trained, where there are any.
            skip: names to leave out.
        """
        bucket: list[str] = []
        size = 0
        for name, shape in self.shapes.items():
            if _is_factor(name) or name in skip:
                continue
            bucket.append(name)
            size += shape.numel() * dtype.itemsize
            if size > BUCKET_BYTES:
                yield from self._read(bucket, dtype, lora)
                bucket, size = [], 0
        yield from self._read(bucket, dtype, lora)

    def _read(
        self, names: list[str], dtype: torch.dtype, lora: LoraConfig | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        state = self._open()
        for name in names:
            tensor = state[name].contiguous().to(dtype)
            if BASE in name:
                assert lora is not None
                down, up = (
                    state[name.replace(f"{BASE}weight", f"{mark}{ADAPTER}.weight")].contiguous() for mark in FACTORS
                )
                tensor = tensor + (up @ down * (lora.alpha / lora.rank)).to(dtype)
            yield name.replace(BASE, "."), tensor


def _is_factor(name: str) -> bool:
    return any(mark in name for mark in FACTORS)


def _open_file(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise ValueError("torch writes zip archives, and it is none; was it cut short?")
    loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    if not isinstance(loaded, dict) or not isinstance(loaded.get("state_dict"), dict):
        raise ValueError("it has no state_dict")
    state: dict[str, Any] = loaded["state_dict"]
    return state


def _open_shards(path: Path) -> dict[str, Any]:
    """Float32 copies of what was trained, and frozen parameters; of ZeRO-3 joined over ranks as they are read."""
    from deepspeed.utils import zero_to_fp32

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        state: dict[str, Any] = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(path), TAG, lazy_mode=True)
    return {name.removeprefix("_forward_module."): value for name, value in state.items()}
