"""Full parameters of a policy that may be sharded, by Hugging Face name: for the engine and for export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from cv_lightning.models.lora import ADAPTER, BASE, adapter_layers, is_factor

T = TypeVar("T")


def batched_by_size(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Consecutive items in batches of at most `limit` in total, or of one larger item."""
    batch: list[T] = []
    total = 0
    for item in items:
        if batch and total + size(item) > limit:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size(item)
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the policy as a checkpoint has it."""

    name: str
    parameters: tuple[torch.nn.Parameter, ...]
    """Parameters that it is made of."""
    adapted: Any = None
    """Layer whose low-rank adapter is merged into it."""

    @torch.no_grad()
    def tensor(self) -> torch.Tensor:
        """The full tensor: the parameter itself, or a new tensor with the adapter merged."""
        own = self.parameters[0].detach()
        return own if self.adapted is None else own + self.adapted.get_delta_weight(ADAPTER).to(own.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of its parameters when gathered."""
        return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in self.parameters)


def gather_full_params(model: torch.nn.Module, bucket_bytes: int = 500_000_000) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, full tensor) of every parameter; under ZeRO-3 they are gathered bucket by bucket, on all ranks.

    Every rank must exhaust the iterator (docs/decisions.md, "every rank gathers"). Nothing is copied: DeepSpeed shards
    a bucket again by releasing the gathered memory, which a tensor that is kept still holds (vLLM keeps the parts of a
    fused weight until it has all of them). Without ZeRO-3 the tensors are the parameters themselves. Adapters are
    merged into the weights that they adapt, one weight at a time.

    Args:
        model: The policy; its parameters may be ZeRO-3 shards.
        bucket_bytes: Most bytes that are gathered at once.
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


def buckets_of(model: torch.nn.Module, bucket_bytes: int) -> Iterator[list[Weight]]:
    """The weights of a model in order, in buckets of at most `bucket_bytes`."""
    return batched_by_size(_weights(model), lambda weight: weight.num_bytes, bucket_bytes)


def _weights(model: torch.nn.Module) -> list[Weight]:
    layers = adapter_layers(model)
    weights = []
    for name, parameter in model.named_parameters():
        if is_factor(name):
            continue
        layer = layers.get(name.removesuffix(f"{BASE}weight"))
        factors: tuple[torch.nn.Parameter, ...] = ()
        if layer is not None:
            factors = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
        weights.append(Weight(name.replace(BASE, "."), (parameter, *factors), layer))
    return weights
