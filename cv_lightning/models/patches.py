"""Faster replacements for operations of the model. Parameters and their names stay."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from cv_lightning.types import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cv_lightning.models.adapters import ModelAdapter


class PatchProjection(torch.nn.Conv3d):
    """The vision tower's patch projection as a matrix product.

    The model applies a `Conv3d` whose kernel and stride are one whole patch. On a CPU the convolution takes two fifths
    of a step of the tiny model.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Project patches.

        Args:
            input: [patches, channels, time, height, width], each exactly one kernel large.

        Returns:
            [patches, out_channels, 1, 1, 1]
        """
        if input.shape[2:] != self.weight.shape[2:]:
            return super().forward(input)
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]


def use_linear_patches(model: PreTrainedModel) -> None:
    """Turn the patch projection into a `PatchProjection`. Its class changes, its parameters and hooks stay."""
    for module in model.modules():
        if type(module) is torch.nn.Conv3d and module.stride == module.kernel_size:
            module.__class__ = PatchProjection


def use_liger(model: PreTrainedModel, adapter: ModelAdapter, *, required: bool = False) -> None:
    """Replace operations by liger-kernel's fused ones that run in the family, if there is a GPU.

    Its fused losses are not used, because ours computes log-probabilities at the loss positions only.

    Raises:
        CheckpointError: The kernels are required and there is no GPU, no liger-kernel, or none for this family.
    """
    missing = "no GPU" if not torch.cuda.is_available() else ""
    if not missing and importlib.util.find_spec("liger_kernel") is None:
        missing = "no liger-kernel (pip install liger-kernel)"
    if not missing and not adapter.liger_function:
        missing = f"none for {type(adapter).__name__}"
    if missing and required:
        raise CheckpointError(f"policy.kernels liger: there is {missing}; take auto or torch")
    if missing:
        return
    import liger_kernel.transformers

    apply = getattr(liger_kernel.transformers, adapter.liger_function)
    apply(cross_entropy=False, fused_linear_cross_entropy=False, model=model, **adapter.liger_parts)
