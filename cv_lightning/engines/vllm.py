"""vLLM inside the trainer's process: one engine per rank, stepped by the agent loop.

The only file that imports vllm. `tests/integration/test_gpu_contract.py` looks up every name that is used here in the
source of the pinned GPU build.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import safe_open
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.inputs import mm_input, tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.multimodal.inputs import (
    BaseMultiModalField,
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.sampling_params import RequestOutputKind

from cv_lightning.engines.base import (
    Completion,
    EngineConfig,
    Request,
    check_idle,
    check_length,
    check_weights,
    failed,
    must_sleep,
)
from cv_lightning.engines.process import (
    has_process_group,
    join_launched_ranks,
    keep_process_group,
    keep_threads,
    threads,
)
from cv_lightning.images import content_hash
from cv_lightning.models.adapters.base import LOGIT_BAN, ImageInputs, ModelAdapter
from cv_lightning.models.vision import VisionCache
from cv_lightning.types import EngineError

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

CPU_STEP_TOKENS = 65536
"""Maximum tokens that one step of the CPU build processes; its buffers grow with it."""
IN_FLIGHT_STEPS = 100
"""Number of steps after which an engine without requests must have ended its last batch; two are usual."""


class VLLMEngine:
    """The in-process engine. Build it before `deepspeed.initialize` and outside any zero.Init."""

    def __init__(
        self,
        path: str,
        config: EngineConfig,
        adapter: ModelAdapter,
        *,
        dtype: str,
        seed: int = 0,
        images: VisionCache | None = None,
    ) -> None:
        """Build the engine and load the checkpoint's weights.

        Args:
            path: Hugging Face folder of the policy; its weights are replaced at the first update.
            config: Sizes and memory.
            adapter: The trainer's adapter, with its image rule; the one in the folder may be another.
            dtype: The trainer's `float32`, `bfloat16` or `float16`.
            seed: The engine's seed; requests have their own.
            images: The trainer's processed images; None: a cache of the engine's own.

        Raises:
            EngineError: The ranks of the run cannot have the engine that `config` asks for, or vLLM itself processes
                images differently.
        """
        self.owns_process_group = not has_process_group()
        num_ranks = join_launched_ranks()
        if num_ranks % config.tensor_parallel_size:
            raise EngineError(
                f"engine.tensor_parallel_size {config.tensor_parallel_size} does not divide the {num_ranks} rank(s) of "
                "the run (trainer.devices x trainer.num_nodes)"
            )
        self.sleeps = _sleeps(path, config, num_ranks)
        self.sleep_level = config.sleep_level
        self.asleep = False
        _check_memory_pool(self.sleeps)
        with keep_threads():
            self.llm = LLM(**_arguments(path, config, adapter, dtype, seed, num_ranks, self.sleeps))
            self.num_threads = torch.get_num_threads()
        self.engine = self.llm.llm_engine
        # Above 1 every step would be a collective of all ranks, which take different numbers of them.
        parallel = self.engine.vllm_config.parallel_config.data_parallel_size
        if parallel != 1:
            raise EngineError(f"the engine's data-parallel size is {parallel}, not 1: unset VLLM_DP_SIZE")
        self.max_model_len, self.max_images = config.max_model_len, config.max_images
        self.policy_version = -1
        self.adapter = adapter
        on_gpu = torch.cuda.is_available()
        self.images = images or VisionCache(adapter)
        self.images.max_bytes = config.cache_of_images_gb(on_gpu=on_gpu) * 1e9
        self.image_fields: dict[str, BaseMultiModalField] = {}
        """How vLLM batches each tensor of an image."""
        self._check_processing(min(2, config.max_images))
        in_background = config.renders_in_background(on_gpu=on_gpu)
        self.thread = ThreadPoolExecutor(1, "images") if in_background else None
        """Processes the images of requests while the engine decodes; None: that is done in `add_request`."""
        self.preparing: dict[str, tuple[SamplingParams, Future[Any]]] = {}
        """Requests whose images are being processed: sampling parameters and the prompt to be."""

    def add_request(self, request: Request) -> None:
        """Queue a request; see `Engine`."""
        check_length(request, self.adapter.image_rule, self.max_model_len, self.max_images)
        params = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop_token_ids=[self.adapter.end_id],
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            logit_bias=dict.fromkeys(request.banned_ids, LOGIT_BAN),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        if self.thread is not None and request.images:
            self.preparing[request.id] = params, self.thread.submit(self._prompt, request.prompt_ids, request.images)
            return
        try:
            self.engine.add_request(request.id, self._prompt(request.prompt_ids, request.images), params)
        except ValueError as error:
            raise EngineError(f"vLLM refused request {request.id} ({len(request.prompt_ids)} ids): {error}") from error

    def _prompt(self, prompt_ids: Sequence[int], images: Sequence[Image.Image]) -> Any:
        """A prompt as vLLM takes it after its own processing: ids expanded, images processed.

        Raises:
            ValueError: An image cannot be processed.
        """
        if not images:
            return tokens_input(list(prompt_ids))
        try:
            processed = list(map(self.images.of, images))
        except Exception as error:  # of whatever kind: it ends this request, not the rollout
            raise ValueError(f"its images cannot be processed ({type(error).__name__}: {error})") from error
        remaining = iter(processed)
        ids: list[int] = []
        places: list[PlaceholderRange] = []
        for token in prompt_ids:
            count = 1
            if token == self.adapter.image_id:
                count = next(remaining).num_tokens
                places.append(PlaceholderRange(offset=len(ids), length=count))
            ids += [token] * count
        items: MultiModalKwargsItems = MultiModalKwargsItems({"image": list(map(self._item, processed))})
        return mm_input(ids, items, {"image": list(map(content_hash, images))}, {"image": places})

    def _item(self, image: ImageInputs) -> MultiModalKwargsItem:
        """An image as vLLM takes it: of a tensor that vLLM stacks without its first dimension, which is 1."""
        parts = {}
        for name, tensor in image.tensors.items():
            field = self.image_fields[name]
            data = tensor[0] if isinstance(field, MultiModalBatchedField) else tensor
            parts[name] = MultiModalFieldElem(data=data, field=field)
        return MultiModalKwargsItem(parts)

    def _check_processing(self, num_images: int) -> None:
        """Compare vLLM's own processing of the largest and the smallest image with ours; learn how it batches tensors.

        Engine and trainer get the same tensors, so nothing later would show that the two differ.

        Raises:
            EngineError: The prompt's ids, the places of its images, or their tensors differ.
        """
        rng, rule = np.random.default_rng(0), self.adapter.image_rule
        side = math.isqrt(rule.max_pixels // 2)
        while side > 1 and rule.num_tokens(rule.model_size(2 * side, side)) > self.max_model_len // 2:
            side //= 2  # a prompt must have room for both
        sizes = [rule.model_size(2 * side, side), rule.model_size(1, 1)][:num_images]
        noise = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]
        images = list(map(Image.fromarray, noise))
        ids = [self.adapter.end_id, *[self.adapter.image_id, self.adapter.end_id] * num_images]
        prompt = TokensPrompt(prompt_token_ids=ids)
        prompt["multi_modal_data"] = {"image": images}
        prompt["multi_modal_uuids"] = {"image": list(map(content_hash, images))}
        (rendered,) = cast("list[Any]", self.llm.renderer.render_cmpl([cast(Any, prompt)]))
        theirs = rendered["mm_kwargs"]["image"]
        self.image_fields = {name: part.field for name, part in theirs[0].items()}
        different = {
            name for image in images for name in self.images.of(image).tensors.keys() ^ self.image_fields.keys()
        }
        if not different:
            ours = self._prompt(ids, images)
            different = {key for key in ("prompt_token_ids", "mm_placeholders") if ours[key] != rendered[key]}
            pairs = zip(ours["mm_kwargs"]["image"], theirs, strict=True)
            for own, other in pairs:
                different |= {name for name in own if not _equal(own[name].data, other[name].data)}
        self.images.clear()
        if different:
            raise EngineError(
                f"vLLM's image processing differs from the trainer's in {', '.join(sorted(different))}: "
                f"{type(self.adapter).__name__}.engine_arguments and process_images do not agree, or this is another "
                "vLLM or transformers version than this project pins"
            )

    def _admit(self) -> list[Completion]:
        """Hand vLLM the requests whose images are processed; wait for the first if vLLM has nothing else to do.

        Returns:
            A completion with an error for every request that was refused.
        """
        if self.preparing and not self.engine.has_unfinished_requests():
            wait([future for _, future in self.preparing.values()], return_when=FIRST_COMPLETED)
        refused = []
        for id in [id for id, (_, future) in self.preparing.items() if future.done()]:
            params, future = self.preparing.pop(id)
            try:
                self.engine.add_request(id, future.result(), params)
            except ValueError as error:
                refused.append(failed(id, f"vLLM refused request {id}: {error}"))
        return refused

    def step(self) -> list[Completion]:
        """Advance by one scheduler step; see `Engine`."""
        refused = self._admit()
        if refused and not self.engine.has_unfinished_requests():
            return refused
        with threads(self.num_threads):  # compiled code is valid for the number of threads that it was compiled with
            outputs = self.engine.step()
        return refused + [_completion(cast("RequestOutput", output)) for output in outputs if output.finished]

    def has_unfinished(self) -> bool:
        """True while any request is being prepared, queued or running."""
        return bool(self.preparing) or self.engine.has_unfinished_requests()

    def abort(self, ids: Sequence[str]) -> None:
        """Remove requests; see `Engine`."""
        for _, future in [self.preparing.pop(id) for id in ids if id in self.preparing]:
            future.cancel()
        self.engine.abort_request(list(ids))

    def _settle(self) -> None:
        """Finish the batch that may still run on the GPU after the last request, under async scheduling.

        Raises:
            EngineError: A request is unfinished, or the batch does not end.
        """
        check_idle(self)
        core = cast(Any, self.engine.engine_core).engine_core
        for _ in range(IN_FLIGHT_STEPS):
            if not getattr(core, "batch_queue", None):
                return
            self.engine.step()
        raise EngineError(f"vLLM has a batch under way after {IN_FLIGHT_STEPS} steps without requests")

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Load weights; see `Engine`."""
        self._settle()
        if self.asleep:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # waking needs what torch keeps of the trainer's memory
            self.llm.wake_up(["weights"])
            if self.sleep_level == 2:
                self.llm.collective_rpc(_clear_unnamed_buffers, args=(self.adapter.unsaved_engine_buffers,))
        try:
            (missing,) = self.llm.collective_rpc(_reload, args=(iter(named_tensors),))
        except (ValueError, KeyError, AttributeError) as error:
            raise EngineError(f"vLLM cannot take the policy's weights: {error}") from error
        check_weights(missing)
        if not self.llm.reset_prefix_cache():
            raise EngineError("vLLM kept its prefix cache, whose entries belong to the previous weights")
        self.engine.reset_encoder_cache()
        if self.asleep:  # only now, so that weights being gathered and the cache never need memory at once
            self.llm.wake_up(["kv_cache"])
            self.asleep = False
        self.policy_version = version

    def sleep(self) -> bool:
        """Release the GPU's memory; see `Engine`.

        The key-value cache is dropped. Level 1 copies the weights to pinned host memory. Level 2 drops them, since the
        next weight sync brings all of them; vLLM itself saves named buffers.
        """
        if self.sleeps and not self.asleep:
            self._settle()
            self.engine.reset_encoder_cache()  # sleeping does not free it
            self.llm.sleep(level=self.sleep_level)
            self.asleep = True
        return self.asleep

    def close(self) -> None:
        """Shut the engine core down and free its memory, so that another engine can be built in this process."""
        core = getattr(self, "engine", None)
        if core is None:
            return
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)
        with contextlib.nullcontext() if self.owns_process_group else keep_process_group():
            with contextlib.suppress(AttributeError):
                core.engine_core.shutdown()
            del core, self.engine, self.llm
            gc.collect()  # vLLM's pool for sleeping serves one engine a process, and cycles keep the last one alive


def _arguments(
    path: str, config: EngineConfig, adapter: ModelAdapter, dtype: str, seed: int, num_ranks: int, sleeps: bool
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`."""
    on_cpu = not torch.cuda.is_available()
    eager = config.enforce_eager or on_cpu
    return {
        "model": path,
        "dtype": dtype,
        "seed": seed,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "enforce_eager": eager,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        **adapter.engine_arguments(config.max_images),
        "skip_mm_profiling": on_cpu,
        # Images come processed, normalised too, from the cache that the trainer reads as well.
        "mm_processor_cache_gb": 0,
        "mm_device_do_normalize": False,
        "enable_prefix_caching": True,
        **(_whole_prompts(config) if on_cpu else {}),
        "logprobs_mode": "processed_logprobs",
        "enable_sleep_mode": sleeps,
        "sleep_mode_offload_cudagraph": sleeps and not eager,  # else CUDA graphs stay on the GPU while asleep
        "tensor_parallel_size": config.tensor_parallel_size,
        "distributed_executor_backend": "external_launcher" if num_ranks > 1 else None,
        "disable_log_stats": True,
        "use_tqdm_on_load": sys.stderr.isatty(),
        **({} if config.async_scheduling is None else {"async_scheduling": config.async_scheduling}),
    }


def _check_memory_pool(sleeps: bool) -> None:
    """Refuse a second engine while an earlier one holds vLLM's memory pool for sleeping, which a process has once.

    Raises:
        EngineError: The pool is in use.
    """
    if not sleeps:
        return
    from vllm.device_allocator.cumem import CuMemAllocator

    used = CuMemAllocator.instance.get_current_usage() if CuMemAllocator.instance is not None else 0
    if used:
        raise EngineError(
            f"an earlier engine of this process still holds {used / 1e9:.1f} GB: close() it and drop every reference "
            "to it, set engine.sleep to never, or start a new process"
        )


def _clear_unnamed_buffers(worker: Any, names: Sequence[str]) -> None:
    """Zero the tensors that level 2 loses and no weight sync brings; runs inside vLLM's worker.

    vLLM saves named buffers, but not tensors that a model keeps in a plain list, such as inputs of a step that are
    added to the hidden states and hold zeros between steps.
    """
    model = worker.model_runner.get_model()
    for name in names:
        for buffer in getattr(model, name, None) or ():
            buffer.zero_()


def _sleeps(path: str, config: EngineConfig, num_ranks: int) -> bool:
    if not torch.cuda.is_available():
        if config.sleep == "always":
            raise EngineError("engine.sleep always needs a GPU; on a CPU set it to auto or never")
        return False
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return must_sleep(config, memory=memory, num_parameters=_num_parameters(path), num_ranks=num_ranks)


def _num_parameters(path: str) -> int:
    """Number of parameters of a checkpoint (folder or name on the hub), from its files' headers; 0 without files."""
    count, folder = 0, Path(path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"], local_files_only=True))
        except (OSError, ValueError):
            return 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return count


def _reload(worker: Any, named_tensors: Iterator[tuple[str, torch.Tensor]]) -> list[str]:
    """Reload the weights of vLLM's worker; runs inside it.

    Args:
        worker: vLLM's worker.
        named_tensors: An iterator, because under ZeRO-3 it gathers bucket by bucket.

    Returns:
        Names, after vLLM's mapping, of the parameters that got no tensor.
    """
    model = worker.model_runner.get_model()
    expected = _checkpoint_names(model)
    given: set[str] = set()

    def noted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named_tensors:
            given.add(model.hf_to_vllm_mapper.map_name(name) or name)
            yield name, tensor

    worker.reload_weights(weights_iterator=noted())
    _repack_tied_head(model)
    return sorted(expected - given)


def _checkpoint_names(model: Any) -> set[str]:
    """Names of the tensors that fill all parameters, after vLLM's mapping; fused parameters count by their parts.

    `load_weights` names a fused parameter as loaded when only one of its parts came.
    """
    tied = {"lm_head"} if _tied_head(model) is not None else set()
    names: set[str] = set()
    for name, _ in model.named_parameters():
        parts = name.split(".")
        fused = next((part for part in parts if part in model.packed_modules_mapping), None)
        if fused is None:
            names |= {name} if not tied & set(parts) else set()
            continue
        at = parts.index(fused)
        names |= {".".join([*parts[:at], shard, *parts[at + 1 :]]) for shard in model.packed_modules_mapping[fused]}
    return names


def _tied_head(model: Any) -> Any:
    """The output head if it shares the word embeddings, else None."""
    whole = getattr(model.config, "tie_word_embeddings", False)  # published configs say it in either place
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", whole):
        return None
    return getattr(model.language_model, "lm_head", None)


def _repack_tied_head(model: Any) -> None:
    """Pack a tied output head again: the CPU build packs after loading, and a tied head loads nothing."""
    head = _tied_head(model)
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


def _whole_prompts(config: EngineConfig) -> dict[str, Any]:
    """Arguments that prevent prefill in pieces, which vLLM's CPU build cannot do for seeded requests.

    After a piece it rewinds the request's generator by an offset that CPU generators do not have, and fails. A prompt
    that does not fit into a step waits for the next; images have the same budget as tokens.
    """
    room = min(config.max_num_seqs * config.max_model_len, CPU_STEP_TOKENS)
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(room, config.max_model_len)}


def _completion(output: RequestOutput) -> Completion:
    sample = output.outputs[0]
    ids = list(sample.token_ids)
    logprobs = list(cast(FlatLogprobs, sample.logprobs).logprobs) if sample.logprobs is not None else []
    if len(logprobs) != len(ids):
        raise EngineError(f"vLLM returned {len(logprobs)} log-probabilities for {len(ids)} tokens")
    return Completion(
        id=output.request_id,
        token_ids=ids,
        logprobs=logprobs,
        stopped=sample.finish_reason == "stop",
        prompt_ids=list(output.prompt_token_ids) if output.prompt_token_ids is not None else None,
    )


def _equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """True if vLLM has the same values, perhaps in the model's 16-bit type."""
    return ours.shape == theirs.shape and torch.equal(ours.to(theirs.dtype), theirs)
