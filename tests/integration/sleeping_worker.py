"""Simulates the memory that vLLM's GPU worker loses while it sleeps; the CPU build keeps everything."""

from __future__ import annotations

from typing import Any

import torch


class SleepingWorker:
    """`sleep` and `wake_up` of `vllm.LLM`: memory is overwritten with values that are not numbers.

    As vLLM 0.33 does it: level 1 keeps the weights, level 2 keeps named buffers only; the key-value cache is lost at
    both. Qwen3-VL's deepstack inputs are a plain list in the weights' pool, so level 2 loses them.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.asleep: set[str] = set()
        self.level = 0

    def sleep(self, level: int = 1) -> None:
        self.asleep, self.level = {"weights", "kv_cache"}, level

    def wake_up(self, tags: list[str]) -> None:
        for tag in tags:
            assert tag in self.asleep, f"{tag} is awake"
            self.asleep.discard(tag)
            if tag == "weights" and self.level == 2:
                self.llm.collective_rpc(_lose_weights)
            if tag == "kv_cache":
                self.llm.collective_rpc(lose_cache)


@torch.no_grad()
def _lose_weights(worker: Any) -> None:
    model = worker.model_runner.get_model()
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    for buffer in getattr(model, "deepstack_input_embeds", None) or ():
        buffer.fill_(float("nan"))


@torch.no_grad()
def lose_cache(worker: Any) -> None:
    """Zero the key-value cache; runs inside vLLM's worker."""
    for cache in worker.model_runner.kv_caches:
        cache.zero_()
