"""Whole tensors of a possibly sharded policy, by Hugging Face name: for the engine and for export."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def whole_tensors(model: torch.nn.Module, bucket_bytes: int = 500_000_000) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, whole tensor) of every parameter; under ZeRO-3 gathered bucket by bucket, on all ranks.

    Every rank must exhaust the iterator (trap T37). Gathered tensors are copies: a view would dangle once its bucket
    is sharded again (trap T36). Without ZeRO-3 they are the parameters themselves.

    Args:
        model: the policy; parameters may be ZeRO-3 shards.
        bucket_bytes: how much is gathered at once.
    """
    named = list(model.named_parameters())
    if not any(hasattr(parameter, "ds_id") for _, parameter in named):
        for name, parameter in named:
            yield name, parameter.detach()
        return
    import deepspeed

    for bucket in _buckets(named, bucket_bytes):
        with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket]):
            for name, parameter in bucket:
                yield name, parameter.detach().clone()


def _buckets(
    named: list[tuple[str, torch.nn.Parameter]], bucket_bytes: int
) -> Iterator[list[tuple[str, torch.nn.Parameter]]]:
    bucket: list[tuple[str, torch.nn.Parameter]] = []
    size = 0
    for name, parameter in named:
        count = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if bucket and size + count > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, parameter))
        size += count
    if bucket:
        yield bucket
