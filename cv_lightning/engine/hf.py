"""transformers `generate` as an engine: the fallback where vLLM is not installed.

It samples from the policy module itself, so weights are always in step. `step` runs one batch of requests to its
end; requests that arrive meanwhile wait. Slow next to vLLM, the same distribution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from cv_lightning.engine.base import Completion, EngineConfig, Request
from cv_lightning.model.tokens import END_OF_TURN, LOGIT_BAN
from cv_lightning.model.vision import process_images
from cv_lightning.types import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


class TransformersEngine:
    """Generates with the policy module; one process, unsharded weights."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, config: EngineConfig) -> None:
        """
        Args:
            model: the policy; it must hold whole tensors (no ZeRO-3).
            processor: its processor.
            config: `max_model_len` and `max_num_seqs` are used.
        """
        self.model, self.processor = model, processor
        self.max_model_len = config.max_model_len
        self.max_num_seqs = config.max_num_seqs
        self.weight_version = -1
        self.queue: list[Request] = []
        tokenizer = processor.tokenizer
        self.pad_id, self.end_id = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self.image_id = model.config.image_token_id
        self.merge = model.config.vision_config.spatial_merge_size

    def add_request(self, request: Request) -> None:
        """Queue a request; see `Engine`."""
        if len(request.prompt_ids) + request.max_tokens > self.max_model_len:
            raise EngineError(f"request {request.id}: more than {self.max_model_len} tokens")
        self.queue.append(request)

    def step(self) -> list[Completion]:
        """Generate one batch of requests that share their sampling settings."""
        if not self.queue:
            return []
        settings = _settings(self.queue[0])
        batch = [request for request in self.queue if _settings(request) == settings][: self.max_num_seqs]
        taken = {request.id for request in batch}
        self.queue = [request for request in self.queue if request.id not in taken]
        return self._generate(batch)

    def has_unfinished(self) -> bool:
        """True while any request is queued."""
        return bool(self.queue)

    def abort(self, ids: Sequence[str]) -> None:
        """Forget requests."""
        self.queue = [request for request in self.queue if request.id not in set(ids)]

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Only the version changes: the engine samples from the policy itself."""
        del named_tensors
        self.weight_version = version

    def close(self) -> None:
        """Nothing to free."""

    @torch.no_grad()
    def _generate(self, batch: list[Request]) -> list[Completion]:
        rows, images = [], []
        for request in batch:
            vision = process_images(self.processor, request.images) if request.images else None
            counts = iter([] if vision is None else (vision.grid_thw.prod(-1) // self.merge**2).tolist())
            rows.append([i for t in request.prompt_ids for i in ([t] * next(counts) if t == self.image_id else [t])])
            images += [] if vision is None else [vision]
        width = max(map(len, rows))
        device = self.model.device
        ids = torch.tensor([[self.pad_id] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        visual = {}
        if images:
            visual["pixel_values"] = torch.cat([v.pixel_values for v in images]).to(device, self.model.dtype)
            visual["image_grid_thw"] = torch.cat([v.grid_thw for v in images]).to(device)
        first = batch[0]
        torch.manual_seed(_batch_seed(batch))
        sampled = first.temperature > 0
        was_training = self.model.training
        self.model.eval()
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=(ids == self.image_id).long(),
            **visual,
            max_new_tokens=max(request.max_tokens for request in batch),
            do_sample=sampled,
            temperature=first.temperature if sampled else None,
            top_p=first.top_p if sampled else None,
            top_k=0 if sampled else None,
            logits_processor=LogitsProcessorList([_Ban(first.banned_ids)]),
            eos_token_id=self.end_id,
            pad_token_id=self.pad_id,
            return_dict_in_generate=True,
            output_scores=True,
        )
        self.model.train(was_training)
        tokens = output.sequences[:, width:]
        scores = torch.log_softmax(torch.stack(output.scores, 1).float(), -1)
        logprobs = scores.gather(-1, tokens[..., None])[..., 0].tolist()
        pairs = zip(batch, rows, tokens.tolist(), logprobs, strict=True)
        return [self._completion(request, row, ids, lps) for request, row, ids, lps in pairs]

    def _completion(self, request: Request, prompt: list[int], ids: list[int], logprobs: list[float]) -> Completion:
        length = ids.index(self.end_id) + 1 if self.end_id in ids else len(ids)
        length = min(length, request.max_tokens)
        return Completion(
            id=request.id,
            token_ids=ids[:length],
            logprobs=logprobs[:length],
            stopped=ids[length - 1] == self.end_id,
            prompt_ids=prompt,
        )


class _Ban(LogitsProcessor):
    """Adds the ban to the logits, before temperature, as vLLM's logit_bias does."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores[:, self.ids] += LOGIT_BAN
        return scores


def _settings(request: Request) -> tuple[float, float, tuple[int, ...]]:
    return request.temperature, request.top_p, tuple(request.banned_ids)


def _batch_seed(batch: Sequence[Request]) -> int:
    digest = hashlib.blake2b(repr([request.seed for request in batch]).encode(), digest_size=6)
    return int.from_bytes(digest.digest(), "big")
