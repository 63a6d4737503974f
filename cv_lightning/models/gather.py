"""Whole tensors of a possibly sharded policy, by Hugging Face name: for the engine and for export."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cv_lightning.models.lora import ADAPTER, BASE, FACTORS, adapter_layers


@dataclass(frozen=True, slots=True)
class Weight:
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


def gather_full_params(model: torch.nn.Module, bucket_bytes: int = 500_000_000) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, whole tensor) of every parameter; under ZeRO-3 gathered bucket by bucket, on all ranks.

    Every rank must exhaust the iterator (docs/decisions.md, "every rank gathers"). Nothing is copied: DeepSpeed shards
    a bucket again by releasing the gathered memory, which a tensor that is kept holds (vLLM keeps the parts of a fused
    weight until it has all of them). Without ZeRO-3 they are the parameters themselves. Adapters are merged into the
    weights that they adapt, one weight at a time.

    Args:
        model: the policy; parameters may be ZeRO-3 shards.
        bucket_bytes: how much is gathered at once.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        for weight in _weights(model):
            yield weight.name, weight.tensor()
        return
    import deepspeed

    for bucket in buckets_of(model, bucket_bytes):
        with deepspeed.zero.GatheredParameters([p for weight in bucket for p in weight.parameters]):
            for weight in bucket:
                yield weight.name, weight.tensor()


def _weights(model: torch.nn.Module) -> list[Weight]:
    layers = adapter_layers(model)
    weights = []
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in FACTORS) and name.split(FACTORS[0])[0].split(FACTORS[1])[0] in layers:
            continue
        layer = layers.get(name.removesuffix(f"{BASE}weight"))
        factors: tuple[torch.nn.Parameter, ...] = ()
        if layer is not None:
            factors = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
        weights.append(Weight(name.replace(BASE, "."), (parameter, *factors), layer))
    return weights


def buckets_of(model: torch.nn.Module, bucket_bytes: int) -> Iterator[list[Weight]]:
    """The weights of a model in order, as many at a time as fit; at least one.

    Args:
        model: the policy.
        bucket_bytes: of whole tensors.
    """
    bucket: list[Weight] = []
    size = 0
    for weight in _weights(model):
        if bucket and size + weight.num_bytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(weight)
        size += weight.num_bytes
    if bucket:
        yield bucket
