"""Whole tensors of a possibly sharded policy, by Hugging Face name: for the engine and for export."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cv_lightning.model.lora import ADAPTER, BASE, FACTORS, adapter_layers


@dataclass(frozen=True, slots=True)
class _Weight:
    """One tensor of the policy as a checkpoint has it."""

    name: str
    parameters: tuple[torch.nn.Parameter, ...]
    """What it is made of."""
    adapted: Any = None
    """The layer whose adapter is merged into it."""

    @torch.no_grad()
    def tensor(self) -> torch.Tensor:
        """The whole tensor: the parameter itself, or a new one with the adapter merged."""
        own = self.parameters[0].detach()
        return own if self.adapted is None else own + self.adapted.get_delta_weight(ADAPTER).to(own.dtype)

    @property
    def num_bytes(self) -> int:
        """Of all its parameters, gathered."""
        return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in self.parameters)


def whole_tensors(model: torch.nn.Module, bucket_bytes: int = 500_000_000) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, whole tensor) of every parameter; under ZeRO-3 gathered bucket by bucket, on all ranks.

    Every rank must exhaust the iterator (trap T37). Gathered tensors are copies: a view would dangle once its bucket
    is sharded again (trap T36). Without ZeRO-3 they are the parameters themselves. Adapters are merged into the
    weights that they adapt (trap T42), one weight at a time.

    Args:
        model: the policy; parameters may be ZeRO-3 shards.
        bucket_bytes: how much is gathered at once.
    """
    weights = _weights(model)
    if not any(hasattr(parameter, "ds_id") for weight in weights for parameter in weight.parameters):
        for weight in weights:
            yield weight.name, weight.tensor()
        return
    import deepspeed

    for bucket in _buckets(weights, bucket_bytes):
        with deepspeed.zero.GatheredParameters([p for weight in bucket for p in weight.parameters]):
            for weight in bucket:
                yield weight.name, weight.tensor().clone()


def _weights(model: torch.nn.Module) -> list[_Weight]:
    layers = adapter_layers(model)
    weights = []
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in FACTORS) and name.split(FACTORS[0])[0].split(FACTORS[1])[0] in layers:
            continue
        layer = layers.get(name.removesuffix(f"{BASE}weight"))
        factors: tuple[torch.nn.Parameter, ...] = ()
        if layer is not None:
            factors = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
        weights.append(_Weight(name.replace(BASE, "."), (parameter, *factors), layer))
    return weights


def _buckets(weights: list[_Weight], bucket_bytes: int) -> Iterator[list[_Weight]]:
    bucket: list[_Weight] = []
    size = 0
    for weight in weights:
        if bucket and size + weight.num_bytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(weight)
        size += weight.num_bytes
    if bucket:
        yield bucket
