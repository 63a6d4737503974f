"""The engine protocol: what the agent loop asks of an inference engine, and the config of one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from PIL import Image

from cv_lightning.endpoint.config import EndpointConfig
from cv_lightning.types import EngineError

if TYPE_CHECKING:
    import torch

    from cv_lightning.images import ImageRule
    from cv_lightning.models.adapters import ModelAdapter


GPU_PROCESSOR_CACHE_GB, CPU_PROCESSOR_CACHE_GB = 4.0, 0.25
"""Cache of processed images of one engine, where the config names no size."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig(EndpointConfig):
    """A server that runs the engine."""

    flag: ClassVar[str] = "engine.server"

    api_key_env: str = "ENGINE_API_KEY"
    """Environment variable that holds the key; unset means no key. The key itself is never part of a config."""
    api: Literal["chat", "tokens"] = "chat"
    """Of kind `server`: `chat`, messages and text, which every server speaks; `tokens`, ids to vLLM's
    `/inference/v1/generate` (`vllm serve --enable-scale-out`)."""
    weights_folder: str = "weights"
    """Of kind `sglang`: folder for the policy's weights, which trainer and server see under the same path."""
    timeout_s: float = 600.0
    """Most seconds that one request may take as a whole: a turn, queueing at the server included."""
    give_up_s: float = 1800.0
    """Most seconds that a turn may take with all its tries and pauses; then its trajectory ends as an engine error."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the engine inside the trainer is built."""

    kind: Literal["auto", "vllm", "transformers", "sglang", "server"] = "auto"
    """`vllm`; `transformers` (generate on the policy itself); `auto`: vLLM wherever it imports; `sglang`: a server that
    takes the policy's weights; `server`: any served model, for evaluations. docs/engines.md tells them apart."""
    server: ServerConfig | None = None
    """Where the server is; for `sglang` and `server`."""
    max_model_len: int = 32768
    """Longest sequence in tokens, images expanded: prompt and response."""
    max_num_seqs: int = 128
    """Requests decoded at once."""
    max_images: int = 16
    """Images in one request; at least 1 + the agent's number of tool calls."""
    gpu_memory_utilization: float = 0.45
    """Share of a GPU's memory for the engine; the rest is the trainer's."""
    enforce_eager: bool = False
    """No CUDA graphs. Ignored on a CPU, where there are none."""
    processor_cache_gb: float | None = None
    """Processed images that a rank keeps for later turns and for the update, in GB of main memory; null: 4 on a GPU (an
    image of one megapixel takes 0.024), 0.25 on a CPU. Beyond it an image is processed again when it is needed, which
    `policy/image_passes` counts. During an update all of its images are kept."""
    background_rendering: Literal["auto", "always", "never"] = "auto"
    """Process images on a separate thread while the engine decodes. The speed of that thread then decides which
    requests share a batch, so runs with `agent.deterministic` do not use it. `auto`: on GPUs, with an engine of one
    rank."""
    async_scheduling: bool | None = None
    """Schedule vLLM's next step while the last one runs; null: what vLLM chooses (on GPUs, yes)."""
    sync_bucket_gb: float = 0.5
    """GB of weights that a weight sync gathers at once under ZeRO-3."""
    sleep: Literal["auto", "always", "never"] = "auto"
    """Give the GPU's memory back between rollouts. `auto`: where engine and trainer would not fit side by side, see
    `must_sleep`. Not available on a CPU. An SGLang server on the trainer's GPUs does so only with `always`
    (`--enable-memory-saver`)."""
    sleep_level: Literal[1, 2] = 1
    """While asleep, 1 keeps the engine's weights in pinned host memory (on each rank as much as the weights take, up to
    twice that by the allocator's rounding); 2 keeps nothing, since every weight sync brings all weights anyway."""
    tensor_parallel_size: int = 1
    """Ranks that share one engine, for models too large for one GPU; neighbours of one node."""

    def __post_init__(self) -> None:
        if self.is_remote != (self.server is not None):
            raise ValueError(
                f"engine.kind {self.kind}: engine.server names the server of kinds sglang and server, and of no other"
            )
        if self.kind == "server" and not self.server_config.model:
            raise ValueError("engine.server.model is empty: name the model that the server serves")
        if self.max_model_len < 16 or self.max_num_seqs < 1 or self.max_images < 1:
            raise ValueError(
                "engine.max_model_len must be at least 16, engine.max_num_seqs and engine.max_images at least 1"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"engine.gpu_memory_utilization must be in (0, 1], not {self.gpu_memory_utilization}")
        if self.sync_bucket_gb <= 0 or self.tensor_parallel_size < 1:
            raise ValueError(
                f"engine.sync_bucket_gb {self.sync_bucket_gb} must be above 0 and engine.tensor_parallel_size "
                f"{self.tensor_parallel_size} at least 1"
            )
        if self.tensor_parallel_size > 1 and self.kind == "transformers":
            raise ValueError("engine.tensor_parallel_size above 1 needs engine.kind vllm")
        if self.processor_cache_gb is not None and not 0 <= self.processor_cache_gb < math.inf:
            raise ValueError(f"engine.processor_cache_gb {self.processor_cache_gb} must be a number of GB, 0 or more")
        if self.tensor_parallel_size > 1 and self.background_rendering == "always":
            raise ValueError(
                f"engine.background_rendering always does not work with engine.tensor_parallel_size "
                f"{self.tensor_parallel_size}: ranks that share an engine must add the same requests before the same "
                "step. Set it to auto or never"
            )

    def renders_in_background(self, *, on_gpu: bool) -> bool:
        """True if images are processed on a thread of their own."""
        if self.background_rendering == "auto":
            return on_gpu and self.tensor_parallel_size == 1
        return self.background_rendering == "always"

    def cache_of_images_gb(self, *, on_gpu: bool) -> float:
        """Size of the cache of processed images on each rank, in GB."""
        if self.processor_cache_gb is None:
            return GPU_PROCESSOR_CACHE_GB if on_gpu else CPU_PROCESSOR_CACHE_GB
        return self.processor_cache_gb

    @property
    def is_remote(self) -> bool:
        """True if a server runs the engine."""
        return self.kind in ("sglang", "server")

    @property
    def keeps_own_weights(self) -> bool:
        """True if the engine samples from a model that is not the policy: it can be evaluated, not trained."""
        return self.kind == "server"

    @property
    def server_config(self) -> ServerConfig:
        """`server` of a remote kind."""
        assert self.server is not None
        return self.server


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn."""

    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    """Keep at 1 in training: a truncated distribution biases the ratio."""
    seed: int = 0
    """Run seed; every request's own seed is derived from it."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.temperature must be >= 0 and sampling.top_p in (0, 1]; got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One turn to generate."""

    id: str
    prompt_ids: Sequence[int]
    """Everything so far, one image token per image."""
    images: Sequence[Image.Image]
    """Model-sized images in the order of their pads; the engine resizes nothing."""
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    banned_ids: Sequence[int]
    """Ids that must not be sampled: `LOGIT_BAN` is added to their logits, and the trainer does the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished request."""

    id: str
    token_ids: list[int]
    """Sampled ids, end of turn included where it was sampled."""
    logprobs: list[float] | None
    """Log-probability of each sampled id under the distribution it was drawn from; None: the server tells none, and the
    ids are its text tokenised anew. They are not trained on."""
    stopped: bool
    """True: ended by the end of turn (or another end token of the checkpoint); False: cut at `max_tokens`."""
    prompt_ids: list[int] | None
    """The prompt as the engine expanded it, where the engine tells."""
    error: str = ""
    """Why there is no completion: the request failed for good, the others go on."""


def failed(id: str, error: str) -> Completion:
    """The completion of a request that failed for good."""
    return Completion(id=id, token_ids=[], logprobs=None, stopped=False, prompt_ids=None, error=error)


class Engine(Protocol):
    """A stepping inference engine; one thread owns it."""

    policy_version: int
    """Version of the weights it samples from; -1 before the first update."""
    max_model_len: int

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises:
            EngineError: with its images expanded and its `max_tokens`, longer than `max_model_len`; too many images; or
                refused by the library behind.
        """

    def step(self) -> list[Completion]:
        """Advance all requests by one step (or more) and return those that finished."""

    def has_unfinished(self) -> bool:
        """True while any request is queued or running."""

    def abort(self, ids: Sequence[str]) -> None:
        """Forget requests; unknown ids are ignored."""

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take over the policy's weights (Hugging Face names, whole tensors) and drop every cache that depends on them.

        Wakes the engine. The iterable is exhausted, as collectives under ZeRO-3 need it.

        Raises:
            EngineError: a request is unfinished, a parameter of the engine got no tensor, or a tensor fits
                none.
        """

    def sleep(self) -> bool:
        """Give the accelerator's memory back until the next update, where the engine was built to.

        Returns:
            True if it did; requests are taken again after an update.
        """

    def close(self) -> None:
        """Free the engine's memory and processes."""


TRAINER_BYTES = 18
"""Bytes a parameter of mixed-precision AdamW: 16-bit weights, float32 copy and two moments, gradients."""
ACTIVATIONS_SHARE = 0.25
"""Of a GPU's memory: what the trainer needs besides."""


def must_sleep(config: EngineConfig, *, memory: float, num_parameters: int, num_ranks: int) -> bool:
    """True if the engine has to give its memory back while the trainer works.

    Args:
        config: `sleep` decides, unless it is `auto`.
        memory: of one GPU, in bytes.
        num_parameters: of the policy; its states count as sharded over all ranks. 0: not known, and so too many.
        num_ranks: of the run.
    """
    if config.sleep != "auto":
        return config.sleep == "always"
    if not num_parameters:
        return True
    trainer = TRAINER_BYTES * num_parameters / num_ranks + ACTIVATIONS_SHARE * memory
    return trainer > (1 - config.gpu_memory_utilization) * memory


def check_length(request: Request, rule: ImageRule, max_model_len: int, max_images: int) -> None:
    """Refuse what no engine can take, before the library behind it stops the whole batch.

    Args:
        request: to be queued.
        rule: how many tokens an image takes.
        max_model_len: of the engine.
        max_images: of the engine.

    Raises:
        EngineError: says by how much it is too long, and which setting to change.
    """
    features = sum(rule.num_tokens(image.size) for image in request.images)
    length = len(request.prompt_ids) - len(request.images) + features
    if request.max_tokens < 1 or length + request.max_tokens > max_model_len:
        raise EngineError(
            f"request {request.id}: {length} tokens of prompt and {request.max_tokens} to sample do not fit into "
            f"engine.max_model_len {max_model_len}"
        )
    if len(request.images) > max_images:
        raise EngineError(f"request {request.id}: {len(request.images)} images, engine.max_images is {max_images}")


def expanded(request: Request, adapter: ModelAdapter) -> list[int]:
    """The prompt's ids with one image token per feature of each image, as training has them."""
    counts = iter(adapter.image_rule.num_tokens(image.size) for image in request.images)
    pad = adapter.image_id
    return [i for token in request.prompt_ids for i in ([token] * next(counts) if token == pad else [token])]


def check_idle(engine: Engine) -> None:
    """Refuse new weights in the middle of a request: half of its tokens would come from another policy.

    Raises:
        EngineError: a request is unfinished.
    """
    if engine.has_unfinished():
        raise EngineError("weights cannot change while requests are unfinished; finish or abort them first")


def check_weights(missing: Iterable[str]) -> None:
    """Refuse an update that left parameters of the engine as they were.

    Args:
        missing: names of parameters that got no tensor.

    Raises:
        EngineError: there are any; names the first of them.
    """
    names = sorted(missing)
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise EngineError(
            f"the update brought no weights for {len(names)} of the engine's parameters: {shown}. The policy is "
            "another model than policy.path, or its parameter names do not map to the engine's"
        )
