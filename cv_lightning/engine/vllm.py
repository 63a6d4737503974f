"""vLLM inside the trainer's process: one engine per rank, stepped by the agent loop.

The only file that imports vllm. See traps T5, T16, T18, T22-T30 for what each argument prevents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind

from cv_lightning.engine.base import Completion, EngineConfig, Request
from cv_lightning.model.tokens import LOGIT_BAN
from cv_lightning.types import EngineError

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput


class VLLMEngine:
    """The in-process engine. Build it before `deepspeed.initialize` and outside any zero.Init (T39, T49)."""

    def __init__(self, path: str, config: EngineConfig, *, dtype: str, seed: int = 0) -> None:
        """
        Args:
            path: Hugging Face folder of the policy; its weights are replaced at the first update.
            config: sizes and memory.
            dtype: `float32`, `bfloat16` or `float16`, the trainer's.
            seed: engine seed; requests carry their own.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        on_cpu = not torch.cuda.is_available()
        self.llm = LLM(
            model=path,
            dtype=dtype,
            seed=seed,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            enforce_eager=config.enforce_eager or on_cpu,
            gpu_memory_utilization=config.gpu_memory_utilization,
            limit_mm_per_prompt={"image": config.max_images, "video": 0},
            skip_mm_profiling=on_cpu,
            mm_processor_cache_gb=config.processor_cache_gb,
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            tensor_parallel_size=1,
            distributed_executor_backend="external_launcher" if distributed else None,
            disable_log_stats=True,
        )
        self.engine = self.llm.llm_engine
        self.max_model_len = config.max_model_len
        self.weight_version = -1

    def add_request(self, request: Request) -> None:
        """Queue a request; see `Engine`."""
        params = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            logit_bias=dict.fromkeys(request.banned_ids, LOGIT_BAN),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = TokensPrompt(prompt_token_ids=list(request.prompt_ids))
        if request.images:
            prompt["multi_modal_data"] = {"image": list(request.images)}
            prompt["multi_modal_uuids"] = {"image": list(request.image_hashes)}
        try:
            self.engine.add_request(request.id, prompt, params)
        except ValueError as error:
            raise EngineError(f"vLLM refused request {request.id} ({len(request.prompt_ids)} ids): {error}") from error

    def step(self) -> list[Completion]:
        """Advance by one scheduler step; see `Engine`."""
        return [_completion(output) for output in self.engine.step() if output.finished]

    def has_unfinished(self) -> bool:
        """True while any request is queued or running."""
        return self.engine.has_unfinished_requests()

    def abort(self, ids: Sequence[str]) -> None:
        """Forget requests."""
        self.engine.abort_request(list(ids))

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Load whole tensors by Hugging Face name and drop every cache that depends on weights (T23, T25)."""
        # The iterator is handed over as it is: under ZeRO-3 it gathers one tensor at a time.
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named_tensors)})
        self.llm.reset_prefix_cache()
        self.llm.reset_mm_cache()
        self.engine.reset_encoder_cache()
        self.weight_version = version

    def close(self) -> None:
        """Shut the engine core down."""
        core = getattr(self, "engine", None)
        if core is not None:
            with contextlib.suppress(AttributeError):
                core.engine_core.shutdown()
            del self.engine, self.llm


def _completion(output: RequestOutput) -> Completion:
    sample = output.outputs[0]
    ids = list(sample.token_ids)
    logprobs = list(sample.logprobs.logprobs) if sample.logprobs is not None else []
    if len(logprobs) != len(ids):
        raise EngineError(f"vLLM returned {len(logprobs)} log-probabilities for {len(ids)} tokens")
    return Completion(
        id=output.request_id,
        token_ids=ids,
        logprobs=logprobs,
        stopped=sample.finish_reason == "stop",
        prompt_ids=list(output.prompt_token_ids) if output.prompt_token_ids is not None else None,
    )
