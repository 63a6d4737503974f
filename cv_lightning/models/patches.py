"""Operations of the model replaced by faster ones that compute the same; parameters and their names stay."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from cv_lightning.types import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PatchProjection(torch.nn.Conv3d):
    """The patch projection of the vision tower as the matrix product that it is.

    Qwen-VL cuts images into patches beforehand and then applies a `Conv3d` whose kernel and stride are one whole patch.
    Convolution kernels are slow at that: on a CPU they take two fifths of a training step of the tiny model.
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
    """Make the model's patch projection a matrix product. Its class changes, its parameters and hooks stay."""
    projection = model.model.visual.patch_embed.proj
    if type(projection) is torch.nn.Conv3d and projection.stride == projection.kernel_size:
        projection.__class__ = PatchProjection


LIGER_PARTS = {
    "qwen2_5_vl": {"rms_norm": True, "swiglu": True, "rope": False},
    "qwen3_vl": {"rms_norm": True, "swiglu": False, "rope": True},
}
"""The parts of liger-kernel that run in a family. Its rotary function for Qwen2.5-VL replaces one that transformers no
longer calls, and it has no gated unit for Qwen3-VL."""


def use_liger(model: PreTrainedModel, *, required: bool = False) -> None:
    """Replace operations by liger-kernel's fused ones, where there is a GPU that runs them.

    RMS norms in both families, gated units in Qwen2.5-VL, rotary embeddings in Qwen3-VL. Its fused losses are left out:
    ours computes log-probabilities at the loss positions only.

    Args:
        model: Qwen2.5-VL or Qwen3-VL.
        required: Raise if they are not available.

    Raises:
        CheckpointError: they are required and there is no GPU, or no liger-kernel.
    """
    missing = "no GPU" if not torch.cuda.is_available() else ""
    if not missing and importlib.util.find_spec("liger_kernel") is None:
        missing = "no liger-kernel (pip install liger-kernel)"
    if missing and required:
        raise CheckpointError(f"policy.kernels liger: there is {missing}; take auto or torch")
    if missing:
        return
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2_5_vl, apply_liger_kernel_to_qwen3_vl

    apply = {"qwen2_5_vl": apply_liger_kernel_to_qwen2_5_vl, "qwen3_vl": apply_liger_kernel_to_qwen3_vl}
    family = model.config.model_type
    apply[family](cross_entropy=False, fused_linear_cross_entropy=False, model=model, **LIGER_PARTS[family])
