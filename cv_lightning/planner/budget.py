"""From a run's facts and stated assumptions to gigabytes, seconds and what to change."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from cv_lightning.planner.footprint import (
    FLOAT32,
    STEP_ELEMENTS,
    States,
    activation_bytes,
    forward_flops,
    states,
    training_flops,
)

if TYPE_CHECKING:
    from cv_lightning.planner.run import RolloutFacts, RunFacts

GB = 1e9


class Gpu(NamedTuple):
    """A kind of GPU: figures of its data sheet."""

    memory_gb: float
    teraflops: float
    """Dense, 16 bits."""
    bandwidth: float
    """Of its memory, TB/s."""


GPUS = {
    "b200": Gpu(180, 2250, 8.0),
    "h200": Gpu(141, 989, 4.8),
    "h100": Gpu(80, 989, 3.35),
    "a100": Gpu(80, 312, 2.04),
    "a100-40": Gpu(40, 312, 1.56),
    "l40s": Gpu(48, 362, 0.86),
    "a6000": Gpu(48, 155, 0.77),
    "rtx4090": Gpu(24, 165, 1.01),
    "rtx3090": Gpu(24, 71, 0.94),
}
DECODE_EFFICIENCY = 0.6
"""Share of the memory's bandwidth that decoding reaches."""
SYNC_BYTES_PER_S = 8e9
"""Weight sync: 6-7 s for 30 B parameters over a good network (verl's checkpoint engine)."""
ENGINE_WORK_GB = 3.0
"""vLLM's own activations, CUDA graphs and image features."""
GRAPHS_GB = 1.0
"""CUDA graphs of an engine, which vLLM copies to main memory while the engine sleeps."""
PINNED_ROUNDING = 2.0
"""torch's allocator of pinned memory rounds every allocation up to a power of two, so at most twice its size."""
STEP_COPIES = 2
"""Temporary tensors of PyTorch's AdamW on a GPU, each as large as the parameters that are stepped at once."""
PIXELS_PER_TOKEN = 32**2
"""Pixels of an image token; families with smaller patches have up to a quarter less."""
SECONDS_PER_PIXEL = 54e-9
"""Processing of an image for the engine on one thread: 345 ms for 6.4 megapixels, measured on a server CPU."""
USABLE = 0.97
"""Of a GPU's memory."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What no config says."""

    gpu: Literal["b200", "h200", "h100", "a100", "a100-40", "l40s", "a6000", "rtx4090", "rtx3090"] = "h100"
    """Kind of GPU."""
    memory_gb: float | None = None
    """Memory of one GPU, or of the machine for a run on the CPU, in GB; null: the kind's."""
    mfu: float = 0.35
    """Share of the peak that training and prefill reach."""
    decode_tokens_per_s: float | None = None
    """Tokens that one GPU samples a second, over all its trajectories; null: from the memory's bandwidth."""
    tokens_per_sequence: int | None = None
    """Mean length of a conversation or trajectory; null: 8,192, or the longest allowed where that is shorter."""
    sampled_tokens: int = 600
    """Tokens of a trajectory that the policy samples, on average; the rest is prompt, images and tool responses."""
    image_share: float = 0.5
    """Share of the tokens that are images'."""
    overhead_gb: float = 4.0
    """CUDA context, NCCL's buffers and fragmentation on each GPU."""

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1 or not 0 <= self.image_share < 1:
            raise ValueError(f"--mfu {self.mfu} must be in (0, 1] and --image_share {self.image_share} in [0, 1)")
        for name in ("memory_gb", "decode_tokens_per_s", "tokens_per_sequence", "sampled_tokens"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name} {value} must be above 0")


@dataclass(frozen=True, kw_only=True)
class EngineBudget:
    """The engine's share of one GPU."""

    weights: float
    cache: float
    """Key-value cache, bytes."""
    work: float
    sleeps: bool
    """Its memory is given back while the trainer works."""
    token_bytes: float
    """Key-value cache of one token."""
    host: float = 0.0
    """Main memory that it takes on each rank: pinned copies while it sleeps, and processed images."""

    @property
    def total(self) -> float:
        """Bytes while it samples."""
        return self.weights + self.cache + self.work

    def fits(self, tokens: int) -> int:
        """Trajectories of so many tokens whose cache fits at once."""
        return int(max(self.cache, 0.0) // (tokens * self.token_bytes))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a run takes on one GPU (or on the machine, on a CPU), in bytes and seconds."""

    states: States
    activations: float
    engine: EngineBudget | None
    overhead: float
    memory: float
    """What there is."""
    host: float
    """In one node's main memory."""
    step_work: float
    """Temporary tensors of an optimizer step on the GPU, when no activations are alive."""
    seconds: dict[str, float]
    """Of one batch: rollout, sync, update. Empty on a CPU, whose speed nobody states."""

    @property
    def lasting(self) -> float:
        """What is there in training and in rollouts."""
        held = self.states
        return self.overhead + held.weights + held.reference + held.optimizer + held.gradients + held.buffers

    @property
    def training(self) -> float:
        """Peak while the policy is trained."""
        awake = 0.0 if self.engine is None or self.engine.sleeps else self.engine.total
        return self.lasting + max(self.activations, self.step_work) + awake

    @property
    def sampling(self) -> float:
        """Peak while trajectories are sampled; 0 for SFT."""
        return 0.0 if self.engine is None else self.lasting + self.engine.total

    @property
    def peak(self) -> float:
        """The larger of the two."""
        return max(self.training, self.sampling)


def budget(run: RunFacts, given: Assumptions) -> Budget:
    """Work out memory and time."""
    gpu = GPUS[given.gpu]
    memory = (given.memory_gb or (gpu.memory_gb if run.on_gpu else machine_memory_gb())) * GB
    held = states(run.shape, run.sharding, run.rollout is not None and run.rollout.has_reference)
    row = longest_row(run)
    activations = activation_bytes(run.shape, row, round(row * given.image_share), run.policy.gradient_checkpointing)
    engine = None if run.rollout is None else _engine(run, run.rollout, memory)
    host = held.host * run.gpus_per_node
    if engine is not None:
        host += engine.host * run.gpus_per_node
    return Budget(
        states=held,
        activations=activations,
        engine=engine,
        overhead=given.overhead_gb * GB * run.on_gpu,
        memory=memory,
        host=host,
        step_work=_step_work(run),
        seconds=_seconds(run, given, gpu, engine) if run.on_gpu else {},
    )


def longest_row(run: RunFacts) -> int:
    """Tokens of the largest micro-batch: a trajectory beyond the budget gets one of its own."""
    return run.tokens_per_row if run.rollout is None else max(run.tokens_per_row, run.rollout.longest)


def machine_memory_gb() -> float:
    """Main memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB


def _engine(run: RunFacts, rollout: RolloutFacts, memory: float) -> EngineBudget | None:
    from cv_lightning.engines.base import must_sleep  # not above: --help reads this file for its options

    config, shape = rollout.engine, run.shape
    if config.kind not in ("auto", "vllm", "transformers"):
        return None  # it samples elsewhere
    share = config.tensor_parallel_size
    token = shape.key_value_bytes / share
    if config.kind == "transformers":  # samples with the policy itself
        cache = min(config.max_num_seqs, _per_rank(run)) * rollout.longest * token
        return EngineBudget(weights=0.0, cache=cache, work=0.0, sleeps=False, token_bytes=token)
    weights = (shape.parameters - _adapters(run)) * shape.dtype_bytes / share
    if not run.on_gpu:
        cache = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")) * 2**30
        return EngineBudget(weights=weights, cache=cache, work=0.0, sleeps=False, token_bytes=token)
    work = ENGINE_WORK_GB * GB
    cache = config.gpu_memory_utilization * memory - weights - work
    ranks = run.sharding.ranks if run.sharding.zero_stage else 1
    sleeps = must_sleep(config, memory=memory, num_parameters=shape.parameters, num_ranks=ranks)
    host = config.cache_of_images_gb(on_gpu=True) * GB
    if sleeps:
        host += PINNED_ROUNDING * (weights if config.sleep_level == 1 else 0.0)
        host += PINNED_ROUNDING * (0.0 if config.enforce_eager else GRAPHS_GB * GB)
    return EngineBudget(weights=weights, cache=cache, work=work, sleeps=sleeps, token_bytes=token, host=host)


def _step_work(run: RunFacts) -> float:
    """Bytes of AdamW's temporary tensors on a GPU."""
    sharding, shape = run.sharding, run.shape
    if not run.on_gpu or sharding.offload_optimizer:
        return 0.0
    if not sharding.zero_stage:
        return STEP_COPIES * shape.trained * shape.trained_bytes
    return STEP_COPIES * FLOAT32 * min(STEP_ELEMENTS, shape.trained / sharding.ranks)


def _adapters(run: RunFacts) -> int:
    return 0 if run.policy.lora is None else run.shape.trained


def _per_rank(run: RunFacts) -> int:
    return -(-run.sequences_per_step // run.sharding.ranks)


def mean_length(run: RunFacts, given: Assumptions) -> int:
    """Tokens of a conversation or trajectory, on average."""
    longest = run.tokens_per_row if run.rollout is None else run.rollout.longest
    return given.tokens_per_sequence or min(8192, longest)


def _seconds(run: RunFacts, given: Assumptions, gpu: Gpu, engine: EngineBudget | None) -> dict[str, float]:
    """Of one batch of Lightning's, on GPUs that work side by side."""
    length, sequences = mean_length(run, given), _per_rank(run)
    peak = gpu.teraflops * 1e12 * given.mfu
    forward = forward_flops(run.shape, sequences * length, length, sequences * length * given.image_share)
    update = training_flops(run.shape, forward, run.policy.gradient_checkpointing)
    if run.rollout is None:
        return {"update": update / peak}
    update += forward * run.rollout.extra_forwards
    found = {"update": update / peak}
    if engine is not None:
        rate = given.decode_tokens_per_s or decode_rate(run, engine, gpu, length)
        found["rollout"] = sequences * given.sampled_tokens / rate + forward / peak
        images = sequences * length * given.image_share * PIXELS_PER_TOKEN * SECONDS_PER_PIXEL
        if run.rollout.engine.renders_in_background(on_gpu=True) and not run.rollout.agent.deterministic:
            found["rollout"] = max(found["rollout"], images)
        else:
            found["rollout"] += images
        found["sync"] = engine.weights / SYNC_BYTES_PER_S
    return found


def decode_rate(run: RunFacts, engine: EngineBudget, gpu: Gpu, length: int) -> float:
    """Tokens that one GPU samples a second: a step reads the weights once, and every trajectory's cache."""
    assert run.rollout is not None
    at_once = max(1, min(engine.fits(length), run.rollout.engine.max_num_seqs, _per_rank(run)))
    step_bytes = engine.weights + at_once * length * engine.token_bytes
    return at_once / (step_bytes / (gpu.bandwidth * 1e12 * DECODE_EFFICIENCY))


# ------------------------------------------------------------------------------------------------ what to change
def problems(run: RunFacts, found: Budget) -> list[str]:
    """Why the run cannot be, one line each, with the setting to change; empty where it fits."""
    lines = []
    if found.peak > USABLE * found.memory:
        when = "training" if found.training >= found.sampling else "sampling"
        lines.append(
            f"does not fit: {when} takes {found.peak / GB:.1f} of {found.memory / GB:.1f} GB. {_remedy(run, found)}"
        )
    rollout, engine = run.rollout, found.engine
    longest = 0 if rollout is None else rollout.engine.max_model_len
    if engine is not None and engine.fits(longest) < 1:
        lines.append(
            f"the engine has {engine.cache / GB:.1f} GB for its key-value cache, but one sequence of "
            f"engine.max_model_len {longest} takes {longest * engine.token_bytes / GB:.1f}: raise "
            "engine.gpu_memory_utilization, or lower max_model_len"
        )
    if run.sequences_per_step % run.sharding.ranks:
        lines.append(
            f"{run.sequences_per_step} sequences cannot be shared by {run.sharding.ranks} ranks: make "
            "data.tasks_per_iteration (SFT: conversations_per_step) a multiple of their number"
        )
    return lines


def hints(run: RunFacts, found: Budget, given: Assumptions) -> list[str]:
    """What works, but not as the config seems to mean it."""
    rollout, engine = run.rollout, found.engine
    lines: list[str] = []
    if rollout is None:
        return lines
    wanted = rollout.agent.max_prompt_tokens + rollout.agent.max_response_tokens
    if wanted > rollout.engine.max_model_len:
        lines.append(
            f"agent.max_prompt_tokens and max_response_tokens allow {wanted} tokens, engine.max_model_len only "
            f"{rollout.engine.max_model_len}: longer trajectories end as over_length"
        )
    if engine is not None:
        at_once = min(rollout.engine.max_num_seqs, _per_rank(run))
        mean = mean_length(run, given)
        fit = engine.fits(mean)
        if 1 <= fit < at_once:
            share = (engine.weights + engine.work + at_once * mean * engine.token_bytes) / found.memory
            room = f", or engine.gpu_memory_utilization to {share:.2f} if that fits" if share <= USABLE else ""
            lines.append(
                f"the key-value cache holds {fit} trajectories of {mean} tokens at once, {at_once} are to run: the "
                f"others wait or are computed again. Set engine.max_num_seqs to about {fit}{room}"
            )
    return lines


def _remedy(run: RunFacts, found: Budget) -> str:
    """The settings that help most where the peak is."""
    held, engine = found.states, found.engine
    lasting = held.weights + held.reference + held.gradients + held.optimizer + held.buffers
    options = [(found.activations if found.training >= found.sampling else 0.0, _fewer_activations(run))]
    options.append((lasting, _fewer_states(run)))
    if engine is not None and (found.sampling > found.training or not engine.sleeps):
        sleep = "engine.sleep always, or " if found.training > found.sampling and not engine.sleeps else ""
        options.append((engine.total, f"{sleep}a lower engine.gpu_memory_utilization"))
    options.sort(key=lambda option: -option[0])
    return "Change, largest first: " + "; ".join(f"{text} ({size / GB:.1f} GB)" for size, text in options if size > 0)


def _fewer_activations(run: RunFacts) -> str:
    if not run.policy.gradient_checkpointing:
        return "model.policy.gradient_checkpointing true"
    if run.rollout is not None and run.rollout.longest >= run.tokens_per_row:
        return "shorter trajectories: agent.max_response_tokens, agent.max_prompt_tokens"
    return "a smaller model.max_tokens_per_row"


def _fewer_states(run: RunFacts) -> str:
    if run.sharding.ranks > 1 and run.sharding.zero_stage < 3:
        return "trainer.strategy ZeroStrategy with stage 3"
    if run.policy.lora is None and run.sharding.ranks == 1:
        return "model.policy.lora"
    if run.sharding.zero_stage and not run.sharding.offload_optimizer:
        return "more ranks, or trainer.strategy.offload_optimizer true"
    return "more ranks, or a smaller model"
