"""Export of a policy to a Hugging Face folder, from training or from a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import lightning.pytorch as pl
import torch
from transformers import GenerationConfig

from cv_lightning.checkpoints.reader import CheckpointReader
from cv_lightning.evaluation.model_card import model_card
from cv_lightning.models.export import (
    SHARD_BYTES,
    atomic_folder,
    check_shapes,
    write_adapter,
    write_config_and_processor,
    write_processor,
    write_weights,
)
from cv_lightning.models.gather import gather_full_params
from cv_lightning.models.loading import PolicyConfig, load_adapter
from cv_lightning.models.shapes import empty_policy
from cv_lightning.models.verify import check_same, folder_logits, probe, reference_logits
from cv_lightning.modules.base import PolicyModule
from cv_lightning.types import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ExportCallback(pl.Callback):
    """Writes the trained policy to `<run>/<folder>`, a Hugging Face folder that `policy.path` accepts.

    Args:
        folder: Name under the run's folder; None writes nothing.
    """

    def __init__(self, folder: str | None = "model") -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather weights on all ranks and write on the first; the folder appears whole or not at all."""
        if self.folder is None or not isinstance(pl_module, PolicyModule):
            return
        run = Path(trainer.default_root_dir)
        export_policy(pl_module, run / self.folder, trainer.is_global_zero, run)
        trainer.strategy.barrier("export")


def export_policy(module: PolicyModule, folder: Path, write: bool, run: Path | None = None) -> None:
    """Write a policy as a Hugging Face folder, which is replaced as a whole. `run` is named in the model card.

    Call this on every rank, because weights may be sharded; `write` is True on the one rank that writes.
    """
    assert module.policy is not None
    tensors = gather_full_params(module.policy)
    if not write:
        for _ in tensors:
            pass
        return
    with atomic_folder(folder) as temporary:
        write_config_and_processor(temporary, module.policy, module.adapter)
        write_weights(temporary, tensors, module.policy)
        config = module.policy_config
        (temporary / "README.md").write_text(
            model_card(config.path, config.dtype, run, f"iteration {module.iteration}")
        )


@dataclass(frozen=True)
class CheckpointExport:
    """Export of one checkpoint."""

    source: CheckpointReader
    policy: PolicyConfig
    """Config of training; `path` is the folder that it began with, `dtype` the type that is written."""
    run: Path | None
    """The run's folder, for the model card."""
    lora: Literal["merged", "separate"] = "merged"
    """Whether adapters are added to the weights or written alone."""
    shard_bytes: int = SHARD_BYTES

    def write(self, folder: Path) -> int:
        """Write into an existing folder; returns the bytes of the weights.

        Raises:
            CheckpointError: The checkpoint does not fit the model, or `separate` is set and it holds no adapters.
        """
        self._check_adapters()
        policy = self.policy
        model, adapter = self._model(), load_adapter(replace(policy, min_pixels=None, max_pixels=None))
        tied = self._tied(model)
        given = {name: shape for name, shape in self.source.merged_shapes.items() if name not in tied}
        wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
        remedy = "give the folder that the run began with as --base"
        check_shapes(given, wanted, model.config.model_type, f"--ckpt {self.source.path}", remedy)
        if self.lora == "separate":
            assert policy.lora is not None
            size = write_adapter(folder, self.source.factors(), policy.lora, adapter, policy.path)
            write_processor(folder, adapter.processor, adapter.chat_template())
        else:
            write_config_and_processor(folder, model, adapter)
            size = write_weights(folder, self._tensors(tied), model, self.shard_bytes)
        (folder / "README.md").write_text(model_card(policy.path, policy.dtype, self.run, self.source.path.name))
        return size

    def verify(self, folder: Path) -> float:
        """Largest difference over the largest logit between a written folder and the checkpoint's own tensors.

        Raises:
            CheckpointError: The difference is larger than rounding explains.
        """
        policy, inputs = self.policy, probe(folder, self.policy.adapter)
        model = self._model()
        tensors = self._tensors(self._tied(model))
        expected = reference_logits(tensors, model.config, getattr(torch, policy.dtype), inputs)
        found = folder_logits(folder, policy.dtype, policy.path, inputs)
        return check_same(expected, found, policy.dtype, self.lora == "separate")

    def _check_adapters(self) -> None:
        if self.source.has_adapters and self.policy.lora is None:
            raise CheckpointError(
                f"--ckpt {self.source.path} holds adapters, but the config trains none: give the run's own "
                "fit_config.yaml with --config"
            )
        if self.lora == "separate" and not self.source.has_adapters:
            raise CheckpointError(f"--lora separate: {self.source.path} holds no adapters; leave it out")

    def _model(self) -> PreTrainedModel:
        """The model with its config, without weights."""
        model = empty_policy(replace(self.policy, lora=None))
        with contextlib.suppress(OSError):  # some of our own folders have none; the default stays
            model.generation_config = GenerationConfig.from_pretrained(self.policy.path)
        return model

    def _tied(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Names in the checkpoint that the model ties to other tensors."""
        own, all_names = {name for name, _ in model.named_parameters()}, model.state_dict().keys()
        return tuple(name for name in self.source.merged_shapes if name in all_names and name not in own)

    def _tensors(self, tied: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
        return self.source.tensors(getattr(torch, self.policy.dtype), self.policy.lora, tied)
