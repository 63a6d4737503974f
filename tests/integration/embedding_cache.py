"""The fault that the start-up self-test looks for: vision embeddings that outlive the weights they were made with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel


class EmbeddingCache:
    """Vision embeddings kept by image, whatever happens to the weights: what SGLang has by default.

    `with EmbeddingCache(model):` puts it in front of the model's vision tower, and keeps what it has in between.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.inner, self.real = model.model, model.model.get_image_features
        self.kept: dict[tuple[bytes, bytes], Any] = {}

    def __enter__(self) -> EmbeddingCache:
        self.inner.get_image_features = self.get_image_features
        return self

    def __exit__(self, *error: object) -> None:
        del self.inner.get_image_features

    def get_image_features(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs: Any) -> Any:
        """As the model's own; every image is looked up by its pixels, and computed alone if it is new."""
        found = []
        patches = pixel_values.split(image_grid_thw.prod(-1).tolist())
        for pixels, grid in zip(patches, image_grid_thw, strict=True):
            key = pixels.numpy().tobytes(), grid.numpy().tobytes()
            if key not in self.kept:
                self.kept[key] = self.real(pixels, grid[None], **kwargs)
            found.append(self.kept[key])
        features = copy.copy(found[0])
        features.pooler_output = tuple(part for each in found for part in each.pooler_output)
        if getattr(features, "deepstack_features", None) is not None:
            layers = zip(*(each.deepstack_features for each in found), strict=True)
            features.deepstack_features = [tuple(part for each in layer for part in each) for layer in layers]
        return features
