"""The patch projection of the vision tower as the matrix product that it is.

Qwen-VL cuts images into patches beforehand and then applies a `Conv3d` whose kernel and stride are one whole patch.
Convolution kernels are slow at that: on a CPU they take two fifths of a training step of the tiny model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PatchProjection(torch.nn.Conv3d):
    """A `Conv3d` on single patches; the same parameters under the same names."""

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
