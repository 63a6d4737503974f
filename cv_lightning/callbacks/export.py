"""Write the policy as a Hugging Face folder when training ends."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning.pytorch as pl

from cv_lightning.agent.prompt import chat_template
from cv_lightning.callbacks.weights import whole_tensors
from cv_lightning.modules.base import PolicyModule


class ExportCallback(pl.Callback):
    """`<run>/<folder>` holds safetensors, config, processor and our chat template: what `policy.path` takes.

    Args:
        folder: under the run's folder.
    """

    def __init__(self, folder: str = "model") -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather on all ranks, write on the first; the folder appears whole or not at all."""
        assert isinstance(pl_module, PolicyModule)
        export_policy(pl_module, Path(trainer.default_root_dir) / self.folder, trainer.is_global_zero)
        trainer.strategy.barrier("export")


def export_policy(module: PolicyModule, folder: Path, write: bool) -> None:
    """Write a policy as a Hugging Face folder.

    Args:
        module: its weights may be sharded: call it on every rank.
        folder: replaced as a whole.
        write: True on the one rank that writes.
    """
    assert module.policy is not None
    state = {}
    for name, tensor in whole_tensors(module.policy):
        if write:
            state[name] = tensor.cpu()
    if not write:
        return
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    module.policy.save_pretrained(temporary, state_dict=state)
    module.processor.chat_template = chat_template()
    module.processor.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
