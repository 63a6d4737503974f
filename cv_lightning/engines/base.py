"""The protocol between the agent loop and inference engines, and the configuration of an engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol

from PIL import Image

from cv_lightning.endpoint.config import EndpointConfig
from cv_lightning.engines.tensors import NamedTensors
from cv_lightning.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Range, check_ranges
from cv_lightning.types import EngineError

if TYPE_CHECKING:
    from cv_lightning.images import ImageRule
    from cv_lightning.models.adapters import ModelAdapter


GPU_PROCESSOR_CACHE_GB, CPU_PROCESSOR_CACHE_GB = 4.0, 0.25
"""Default size of the cache of processed images."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig(EndpointConfig):
    """The server of a remote engine."""

    flag: ClassVar[str] = "rollout.engine.server"

    api_key_env: str = "ENGINE_API_KEY"
    """Environment variable that holds the API key; unset: no key. A config never holds the key itself."""
    api: Literal["chat", "tokens"] = "chat"
    """Protocol of kind `server`: `chat` sends messages and reads text, which every server supports; `tokens`
    sends ids to vLLM's `/inference/v1/generate` (`vllm serve --enable-scale-out`)."""
    weights_folder: str = "weights"
    """Folder for the policy's weights of kind `sglang`; trainer and server see it under the same path."""
    timeout_s: PositiveFloat = 600.0
    """Time limit of one request in seconds, queueing at the server included."""
    give_up_s: PositiveFloat = 1800.0
    """Time limit of one turn in seconds, with all attempts and pauses; its trajectory then ends as an engine error."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Kind, size and memory of the engine."""

    kind: Literal["auto", "vllm", "transformers", "sglang", "server"] = "auto"
    """`vllm`; `transformers` (generate on the policy itself); `auto`: vLLM wherever it imports; `sglang`: a server that
    takes the policy's weights; `server`: any served model, for evaluations. docs/engines.md tells them apart."""
    server: ServerConfig | None = None
    """Address of the server, for `sglang` and `server`."""
    max_model_len: Annotated[int, Range(at_least=16)] = 32768
    """Maximum tokens of a sequence: prompt, expanded images and response."""
    max_num_seqs: PositiveInt = 128
    """Maximum number of requests that are decoded at once."""
    max_images: PositiveInt = 16
    """Maximum images of a request; at least `agent.max_images`."""
    gpu_memory_utilization: Annotated[float, Range(above=0, at_most=1)] = 0.45
    """Fraction of a GPU's memory for the engine; the trainer uses the rest."""
    enforce_eager: bool = False
    """Disable CUDA graphs. A CPU has none."""
    processor_cache_gb: NonNegativeFloat | None = None
    """Processed images that a rank keeps for later turns and for the update, in GB of main memory; null: 4 on a GPU (an
    image of one megapixel takes 0.024), 0.25 on a CPU. Beyond it an image is processed again when it is needed, which
    `policy/image_passes` counts. During an update all of its images are kept."""
    background_rendering: Literal["auto", "always", "never"] = "auto"
    """Process images on a separate thread while the engine decodes. Its speed determines which requests share a
    batch, so runs with `agent.deterministic` do not use it. `auto`: on GPUs, with an engine of one rank."""
    async_scheduling: bool | None = None
    """Schedule vLLM's next step while the last one runs; null: vLLM's default (yes on GPUs)."""
    sync_bucket_gb: PositiveFloat = 0.5
    """Size in GB of the weights that a weight sync gathers at once under ZeRO-3."""
    sleep: Literal["auto", "always", "never"] = "auto"
    """Release the GPU's memory between rollouts. `auto`: if engine and trainer do not fit together, see
    `must_sleep`. Not available on a CPU. An SGLang server on the trainer's GPUs does so only with `always`
    (`--enable-memory-saver`)."""
    sleep_level: Literal[1, 2] = 1
    """While asleep, 1 keeps the engine's weights in pinned host memory (once or, by the allocator's rounding, up to
    twice their size on each rank); 2 keeps nothing, since every weight sync brings all weights."""
    tensor_parallel_size: PositiveInt = 1
    """Number of ranks that share one engine, for models too large for one GPU; consecutive ranks of one node."""

    def __post_init__(self) -> None:
        check_ranges(self, "rollout.engine")
        if self.is_remote != (self.server is not None):
            raise ValueError(
                f"engine.kind {self.kind}: engine.server names the server of kinds sglang and server, and of no other"
            )
        if self.kind == "server" and not self.server_config.model:
            raise ValueError("engine.server.model is empty: name the model that the server serves")
        if self.tensor_parallel_size > 1 and self.kind not in ("auto", "vllm"):
            raise ValueError(f"engine.tensor_parallel_size above 1 needs engine.kind vllm, not {self.kind}")
        if self.tensor_parallel_size > 1 and self.background_rendering == "always":
            raise ValueError(
                f"engine.background_rendering always does not work with engine.tensor_parallel_size "
                f"{self.tensor_parallel_size}: ranks that share an engine must add the same requests before the same "
                "step. Set it to auto or never"
            )

    def renders_in_background(self, *, on_gpu: bool) -> bool:
        """True if images are processed on a separate thread."""
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
        """True if the engine samples from another model than the policy, which can be evaluated but not trained."""
        return self.kind == "server"

    @property
    def server_config(self) -> ServerConfig:
        """The server of a remote kind."""
        assert self.server is not None
        return self.server


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Distribution that tokens are sampled from."""

    temperature: NonNegativeFloat = 1.0
    """Temperature; 0 is greedy."""
    top_p: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Probability mass of nucleus sampling. Keep it at 1 in training: a truncated distribution biases the ratio."""
    seed: int = 0
    """Seed of the run, from which the seed of every request is derived."""

    def __post_init__(self) -> None:
        check_ranges(self, "rollout.sampling")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One turn to generate."""

    id: str
    prompt_ids: Sequence[int]
    """Ids of the conversation so far, one image token per image."""
    images: Sequence[Image.Image]
    """Images at model size, in the order of their tokens; the engine resizes nothing."""
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    banned_ids: Sequence[int]
    """Ids that must not be sampled: engine and trainer add `LOGIT_BAN` to their logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished request."""

    id: str
    token_ids: list[int]
    """Sampled ids, including the end of turn if it was sampled."""
    logprobs: list[float] | None
    """Log-probability of each sampled id under the distribution it was drawn from. None if a server reports none:
    the ids are then its tokenised text, and are not trained on."""
    stopped: bool
    """True if an end token was sampled; False if the turn was cut at `max_tokens`."""
    prompt_ids: list[int] | None
    """The prompt as the engine expanded it; None if the engine does not report it."""
    error: str = ""
    """Why the request failed; other requests continue."""


def failed(id: str, error: str) -> Completion:
    """The completion of a request that failed."""
    return Completion(id=id, token_ids=[], logprobs=None, stopped=False, prompt_ids=None, error=error)


class Engine(Protocol):
    """An inference engine that is advanced step by step, by one thread."""

    policy_version: int
    """Version of the weights that it samples from; -1 before the first update."""
    max_model_len: int

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises:
            EngineError: The request is longer than `max_model_len`, images expanded and `max_tokens` included; it
                has too many images; or the library refuses it.
        """

    def step(self) -> list[Completion]:
        """Advance all requests by one step (or more) and return those that finished."""

    def has_unfinished(self) -> bool:
        """True while any request is queued or running."""

    def abort(self, ids: Sequence[str]) -> None:
        """Remove requests; unknown ids are ignored."""

    def update_weights(self, named_tensors: NamedTensors, version: int) -> None:
        """Load the policy's weights (Hugging Face names, whole tensors) and clear every cache that depends on them.

        Wakes the engine. Exhausts the iterable, because gathering under ZeRO-3 is a collective.

        Raises:
            EngineError: A request is unfinished, a parameter gets no tensor, or a tensor fits no parameter.
        """

    def sleep(self) -> bool:
        """Release the accelerator's memory until the next update, if the engine was built to sleep.

        Returns:
            True if the engine sleeps; it accepts requests again after an update.
        """

    def close(self) -> None:
        """Free the engine's memory and processes."""


TRAINER_BYTES = 18
"""Bytes per parameter of mixed-precision AdamW: 16-bit weights, float32 copy and two moments, gradients."""
ACTIVATIONS_FRACTION = 0.25
"""Fraction of a GPU's memory that the trainer needs for activations."""


def must_sleep(config: EngineConfig, *, memory: float, num_parameters: int, num_ranks: int) -> bool:
    """True if the engine has to release its memory while the trainer works.

    Args:
        config: Its `sleep` decides unless it is `auto`.
        memory: Memory of one GPU in bytes.
        num_parameters: Parameters of the policy, whose optimizer state is sharded over all ranks; 0 if unknown, which
            counts as too many.
        num_ranks: Ranks of the run.
    """
    if config.sleep != "auto":
        return config.sleep == "always"
    if not num_parameters:
        return True
    trainer = TRAINER_BYTES * num_parameters / num_ranks + ACTIVATIONS_FRACTION * memory
    return trainer > (1 - config.gpu_memory_utilization) * memory


def check_length(request: Request, rule: ImageRule, max_model_len: int, max_images: int) -> None:
    """Refuse a request that does not fit, before the engine's library stops the whole batch.

    Args:
        request: The request to be queued.
        rule: Image rule of the model.
        max_model_len: The engine's limit.
        max_images: The engine's limit.

    Raises:
        EngineError: It does not fit; the message names its length and the setting to change.
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
    """The prompt's ids with one image token per image feature, as in training."""
    counts = iter(adapter.image_rule.num_tokens(image.size) for image in request.images)
    pad = adapter.image_id
    return [i for token in request.prompt_ids for i in ([token] * next(counts) if token == pad else [token])]


def check_idle(engine: Engine) -> None:
    """Refuse new weights while requests are unfinished: part of their tokens would come from another policy.

    Raises:
        EngineError: A request is unfinished.
    """
    if engine.has_unfinished():
        raise EngineError("weights cannot change while requests are unfinished; finish or abort them first")


def check_weights(missing: Iterable[str]) -> None:
    """Refuse an update that did not reach all parameters of the engine.

    Args:
        missing: Names of the parameters that got no tensor.

    Raises:
        EngineError: There are any; the message names the first of them.
    """
    names = sorted(missing)
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise EngineError(
            f"the update brought no weights for {len(names)} of the engine's parameters: {shown}. The policy is "
            "another model than policy.path, or its parameter names do not map to the engine's"
        )
