"""Reading the policy's weights from a checkpoint, tensor by tensor.

Files are mapped into memory and opened again for every bucket, so that the pages of the last one are released. A
checkpoint is a pickle: open only your own.
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
from cv_lightning.models.gather import batched_by_size
from cv_lightning.models.lora import ADAPTER, BASE, FACTORS, LoraConfig, is_factor
from cv_lightning.types import CheckpointError

PREFIX = "policy."
"""Prefix of the policy's parameters in a module's checkpoint."""
TAG = "checkpoint"
"""Lightning's name for the subfolder of a DeepSpeed checkpoint that holds the shards."""
BUCKET_BYTES = 1_000_000_000


def find_stored(path: Path) -> Path:
    """The checkpoint at a path, or the newest intact one if the path is a run's folder.

    Raises:
        CheckpointError: There is none, or the one at the path is damaged.
    """
    if not path.exists():
        raise CheckpointError(f"--ckpt {path}: no such file or folder")
    if path.is_file() or is_deepspeed(path):
        if reason := damage(path):
            raise CheckpointError(
                f"--ckpt {path} cannot be read as a checkpoint: {reason}. Give another one, or the run's folder, "
                "whose newest intact checkpoint is used"
            )
        return path
    if (path / "config.json").is_file():
        raise CheckpointError(f"--ckpt {path} is a Hugging Face folder already: there is nothing to export")
    found = last_checkpoint(path)
    if found is None:
        made = f"; its exported model is {path / 'model'}" if (path / "model" / "config.json").is_file() else ""
        raise CheckpointError(
            f"--ckpt {path}: not a checkpoint, and no checkpoint in {path / FOLDER}{made}. Give a .ckpt file, a "
            "DeepSpeed folder, or a run's folder"
        )
    return found


def is_deepspeed(path: Path) -> bool:
    """True if a folder was written by DeepSpeed through Lightning."""
    return any(path.glob(f"{TAG}/*_model_states.pt"))


@dataclass(frozen=True)
class CheckpointReader:
    """The policy's weights in one checkpoint."""

    path: Path
    """Lightning file or DeepSpeed folder."""

    def _open(self) -> dict[str, Any]:
        """Parameters by name, as objects with `shape`, `dtype` and `contiguous()`; no value is read yet.

        Raises:
            CheckpointError: It is not a checkpoint of this project.
        """
        try:
            state = _open_shards(self.path) if self.path.is_dir() else _open_file(self.path)
        except (OSError, ValueError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"--ckpt {self.path} cannot be read as a checkpoint ({error})") from error
        own = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
        if not own:
            raise CheckpointError(
                f"--ckpt {self.path} holds no policy: {len(state)} tensors, none of which is named {PREFIX}*"
            )
        return own

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every parameter by name; adapters are not merged."""
        return {name: value.shape for name, value in self._open().items()}

    @property
    def has_adapters(self) -> bool:
        """True if the policy was trained with LoRA."""
        return any(map(is_factor, self.shapes))

    @property
    def merged_shapes(self) -> dict[str, torch.Size]:
        """Shape of every parameter by name after merging the adapters, as in a model without LoRA."""
        return {name.replace(BASE, "."): shape for name, shape in self.shapes.items() if not is_factor(name)}

    def factors(self) -> dict[str, torch.Tensor]:
        """The adapters' own parameters by name."""
        return {name: value.contiguous() for name, value in self._open().items() if is_factor(name)}

    def tensors(
        self, dtype: torch.dtype, lora: LoraConfig | None, skip: tuple[str, ...] = ()
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) of every parameter with adapters merged. A tensor holds its file open while it is kept.

        Args:
            dtype: Type of the result.
            lora: Config that the adapters were trained with; None without adapters.
            skip: Names to leave out.
        """
        names = [name for name in self.shapes if not is_factor(name) and name not in skip]
        for bucket in batched_by_size(names, lambda name: self.shapes[name].numel() * dtype.itemsize, BUCKET_BYTES):
            state = self._open()
            for name in bucket:
                tensor = state[name].contiguous().to(dtype)
                if BASE in name:
                    assert lora is not None
                    down, up = (
                        state[name.replace(f"{BASE}weight", f"{mark}{ADAPTER}.weight")].contiguous() for mark in FACTORS
                    )
                    tensor = tensor + (up @ down * (lora.alpha / lora.rank)).to(dtype)
                yield name.replace(BASE, "."), tensor


def _open_file(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not a zip archive, as torch writes; was it cut short?")
    loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    if not isinstance(loaded, dict) or not isinstance(loaded.get("state_dict"), dict):
        raise ValueError("it has no state_dict")
    state: dict[str, Any] = loaded["state_dict"]
    return state


def _open_shards(path: Path) -> dict[str, Any]:
    """Float32 copies of trained parameters, and frozen parameters; ZeRO-3 shards are joined when they are read."""
    from deepspeed.utils import zero_to_fp32

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        state: dict[str, Any] = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(path), TAG, lazy_mode=True)
    return {name.removeprefix("_forward_module."): value for name, value in state.items()}
