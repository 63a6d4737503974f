"""transformers' `generate` as an engine, for machines without vLLM.

It samples from the policy module itself, so it needs no weight sync. `step` runs one batch of requests to its end, and
new requests wait until then. It is slower than vLLM and samples from the same distribution.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from cv_lightning.engines.base import (
    Completion,
    EngineConfig,
    Request,
    check_idle,
    check_length,
    check_weights,
    expanded,
)
from cv_lightning.models.adapters.base import LOGIT_BAN, ModelAdapter
from cv_lightning.models.vision import VisionCache
from cv_lightning.types import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersEngine:
    """Generates with the policy module; needs unsharded weights."""

    def __init__(
        self, model: PreTrainedModel, adapter: ModelAdapter, config: EngineConfig, images: VisionCache | None = None
    ) -> None:
        """Prepare to generate with a policy.

        Args:
            model: The policy; its tensors must be whole.
            adapter: The policy's adapter, bound to its processor.
            config: `max_model_len`, `max_num_seqs`, `max_images` and `processor_cache_gb` are used.
            images: The trainer's processed images; None: a cache of the engine's own.

        Raises:
            EngineError: The policy's parameters are sharded.
        """
        _require_whole(model)
        self.model, self.adapter = model, adapter
        self.images = images or VisionCache(adapter)
        self.images.max_bytes = config.cache_of_images_gb(on_gpu=model.device.type == "cuda") * 1e9
        self.max_model_len = config.max_model_len
        self.max_num_seqs = config.max_num_seqs
        self.max_images = config.max_images
        self.policy_version = -1
        self.queue: list[Request] = []
        self.stop_ids = [adapter.end_id, *_as_list(model.generation_config.eos_token_id)]
        padding = adapter.tokenizer.pad_token_id
        self.pad_id: int = adapter.end_id if padding is None else padding

    def add_request(self, request: Request) -> None:
        """Queue a request; see `Engine`."""
        check_length(request, self.adapter.image_rule, self.max_model_len, self.max_images)
        self.queue.append(request)

    def step(self) -> list[Completion]:
        """Generate one batch of requests that share their sampling settings."""
        if not self.queue:
            return []
        settings = _settings(self.queue[0])
        batch = [request for request in self.queue if _settings(request) == settings][: self.max_num_seqs]
        completions = self._generate(batch)
        taken = {request.id for request in batch}
        self.queue = [request for request in self.queue if request.id not in taken]
        return completions

    def has_unfinished(self) -> bool:
        """True while any request is queued."""
        return bool(self.queue)

    def abort(self, ids: Sequence[str]) -> None:
        """Remove requests; see `Engine`."""
        dropped = set(ids)
        self.queue = [request for request in self.queue if request.id not in dropped]

    @torch.no_grad()
    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Copy weights into the model, unless they are its own tensors; see `Engine`."""
        check_idle(self)
        _require_whole(self.model)
        own = dict(self.model.named_parameters(remove_duplicate=False))
        covered = set()
        for name, tensor in named_tensors:
            parameter = own.get(name)
            if parameter is None or parameter.shape != tensor.shape:
                known = "no such parameter" if parameter is None else f"its shape is {tuple(parameter.shape)}"
                raise EngineError(
                    f"weight {name} of shape {tuple(tensor.shape)} does not fit the engine's model: {known}"
                )
            if tensor.data_ptr() != parameter.data_ptr():
                parameter.copy_(tensor)
            covered.add(id(parameter))
        check_weights(name for name, parameter in self.model.named_parameters() if id(parameter) not in covered)
        self.policy_version = version

    def sleep(self) -> bool:
        """Return False: the weights are the policy's."""
        return False

    def close(self) -> None:
        """Remove all requests; the policy stays the trainer's."""
        self.queue.clear()

    @torch.no_grad()
    def _generate(self, batch: list[Request]) -> list[Completion]:
        device = self.model.device
        rows = [expanded(request, self.adapter) for request in batch]
        images = [self.images.of(image) for request in batch for image in request.images]
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad_id] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        longest = max(request.max_tokens for request in batch)
        sampler = _Sampler(batch, longest)
        with _generating(self.model, self.stop_ids, self.pad_id):
            generate: Any = self.model.generate
            sequences = generate(
                **self.adapter.plain_inputs(ids, mask, images),
                max_new_tokens=longest,
                logits_processor=LogitsProcessorList([sampler]),
            )
        tokens = sequences[:, width:].tolist()
        logprobs = torch.stack(sampler.logprobs, 1).tolist()
        return [self._completion(*parts) for parts in zip(batch, rows, tokens, logprobs, strict=True)]

    def _completion(self, request: Request, prompt: list[int], ids: list[int], logprobs: list[float]) -> Completion:
        ends = [index for index, token in enumerate(ids) if token in self.stop_ids]
        length = min(ends[0] + 1 if ends else len(ids), request.max_tokens)
        return Completion(
            id=request.id,
            token_ids=ids[:length],
            logprobs=logprobs[:length],
            stopped=ids[length - 1] in self.stop_ids,
            prompt_ids=prompt,
        )


class _Sampler(LogitsProcessor):
    """Samples each request's token with the request's own generator, so that other requests do not change it.

    Records the token's log-probability and sets all other scores to minus infinity, so that `generate` takes the token.
    Keeping the scores instead would take steps x requests x vocabulary of memory.
    """

    def __init__(self, batch: Sequence[Request], num_steps: int) -> None:
        first = batch[0]
        self.temperature, self.top_p, self.banned = first.temperature, first.top_p, list(first.banned_ids)
        seeds = [torch.Generator().manual_seed(request.seed) for request in batch]
        self.uniforms = torch.stack([torch.rand(num_steps, generator=g, dtype=torch.float64) for g in seeds])
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Replace `scores`, [requests, vocabulary], by 0 at the sampled tokens and minus infinity elsewhere."""
        logits = scores.float()
        logits[:, self.banned] += LOGIT_BAN
        logprobs = torch.log_softmax(logits / (self.temperature or 1.0), -1)
        if self.top_p < 1:
            logprobs = torch.log_softmax(_nucleus(logprobs, self.top_p), -1)
        if self.temperature:
            cumulative = logprobs.double().exp().cumsum(-1)
            point = self.uniforms[:, len(self.logprobs), None].to(scores.device) * cumulative[:, -1:]
            chosen = torch.searchsorted(cumulative, point, right=True).clamp_(max=scores.shape[-1] - 1)
        else:
            chosen = logits.argmax(-1, keepdim=True)
        self.logprobs.append(logprobs.gather(-1, chosen)[:, 0])
        forced = torch.full_like(scores, float("-inf"))
        return forced.scatter_(-1, chosen, 0.0)  # type: ignore[return-value]


def _nucleus(logprobs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Set log-probabilities to minus infinity outside the smallest set of most likely tokens that holds `top_p`."""
    ordered, order = logprobs.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    outside = torch.zeros_like(logprobs, dtype=torch.bool).scatter_(-1, order, before >= top_p)
    return logprobs.masked_fill(outside, float("-inf"))


@contextmanager
def _generating(model: PreTrainedModel, stop_ids: list[int], pad_id: int) -> Iterator[None]:
    """Context manager: evaluation mode, without the checkpoint's own sampling settings (some penalise repetition)."""
    training, config = model.training, model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=stop_ids, pad_token_id=pad_id)
    model.eval()
    try:
        yield
    finally:
        model.generation_config = config
        model.train(training)


def _require_whole(model: PreTrainedModel) -> None:
    sharded = [
        name for name, parameter in model.named_parameters() if hasattr(parameter, "ds_id") or not parameter.numel()
    ]
    if sharded:
        raise EngineError(
            f"the transformers engine needs whole parameters, but {len(sharded)} are sharded ({sharded[0]}, ...); "
            "use engine.kind vllm, or ZeRO stage 2 or below"
        )


def _settings(request: Request) -> tuple[float, float, tuple[int, ...]]:
    return request.temperature, request.top_p, tuple(request.banned_ids)


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
