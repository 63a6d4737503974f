"""Estimates of a run's memory and time, and what to change where it does not fit."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from cv_lightning.planner.footprint import activation_bytes, forward_flops, states, step_bytes, training_flops

if TYPE_CHECKING:
    from cv_lightning.planner.run import RolloutFacts, RunFacts

GB = 1e9


class Gpu(NamedTuple):
    """Data sheet of a GPU: memory in GB, dense 16-bit TFLOP/s, and memory bandwidth in TB/s."""

    memory_gb: float
    teraflops: float
    bandwidth: float


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
"""Fraction of the memory's bandwidth that decoding reaches."""
SYNC_BYTES_PER_S = 8e9
"""Weight sync: 6-7 s for 30 B parameters over a good network (verl's checkpoint engine)."""
ENGINE_WORK_GB = 3.0
"""vLLM's own activations, CUDA graphs and image features."""
GRAPHS_GB = 1.0
"""CUDA graphs of an engine, which vLLM copies to main memory while the engine sleeps."""
PINNED_ROUNDING = 2.0
"""torch's allocator of pinned memory rounds every allocation up to a power of two, so at most twice its size."""
SECONDS_PER_PIXEL = 54e-9
"""Processing of an image for the engine on one thread: 345 ms for 6.4 megapixels, measured on a server CPU."""
USABLE = 0.97
"""Fraction of a GPU's memory that a run can use."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Assumptions about a run that its configs do not state."""

    gpu: Literal["b200", "h200", "h100", "a100", "a100-40", "l40s", "a6000", "rtx4090", "rtx3090"] = "h100"
    """Kind of GPU."""
    memory_gb: float | None = None
    """Memory of one GPU, or of the machine for a run on the CPU, in GB; null: the kind's."""
    mfu: float = 0.35
    """Fraction of the peak that training and prefill reach."""
    decode_tokens_per_s: float | None = None
    """Tokens that one GPU samples a second, over all its trajectories; null: from the memory's bandwidth."""
    tokens_per_sequence: int | None = None
    """Mean length of a conversation or trajectory; null: 8,192, or the longest allowed where that is shorter."""
    sampled_tokens: int = 600
    """Mean number of tokens of a trajectory that the policy samples; the rest is prompt, images and tool responses."""
    image_share: float = 0.5
    """Fraction of the tokens that are image tokens."""
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
class Engine:
    """The engine in the trainer's process: bytes on one GPU."""

    weights: float = 0.0
    cache: float
    """Key-value cache."""
    work: float = 0.0
    token_bytes: float
    """Key-value cache of one token."""
    sleeps: bool = False
    """Its memory is given back while the trainer works."""
    host: float = 0.0
    """Main memory on each rank: pinned copies while it sleeps, and processed images."""

    def fits(self, tokens: int) -> int:
        """Number of trajectories of `tokens` tokens whose cache fits at once."""
        return int(max(self.cache, 0.0) // (tokens * self.token_bytes))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes on one GPU (or on the machine, for a run on the CPU) and seconds of a batch."""

    lasting: dict[str, float]
    """Weights, reference, gradients, optimizer, buffers, and what CUDA takes (overhead)."""
    activations: float
    step_work: float
    engine: Engine | None
    memory: float
    """Memory that is available."""
    host: float
    """Main memory of one node."""
    mean_length: int
    """Mean tokens of a conversation or trajectory."""
    seconds: dict[str, float]
    """Rollout, sync and update of one batch; empty on a CPU, whose speed is not known."""
    problems: list[str] = field(default_factory=list)
    """Reasons why the run cannot work; each names the setting to change."""
    hints: list[str] = field(default_factory=list)
    """Settings that work, but not as the config seems to mean them."""

    @property
    def engine_bytes(self) -> float:
        """Bytes of the engine while it samples."""
        return 0.0 if self.engine is None else self.engine.weights + self.engine.cache + self.engine.work

    @property
    def training(self) -> float:
        """Peak while the policy is trained."""
        asleep = self.engine is not None and self.engine.sleeps
        work = max(self.activations, self.step_work)
        return sum(self.lasting.values()) + work + (0.0 if asleep else self.engine_bytes)

    @property
    def sampling(self) -> float:
        """Peak while trajectories are sampled; 0 for SFT."""
        return 0.0 if self.engine is None else sum(self.lasting.values()) + self.engine_bytes


def make_plan(run: RunFacts, given: Assumptions) -> Plan:
    """Estimate memory and time of a run."""
    gpu, rollout = GPUS[given.gpu], run.rollout
    machine_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    memory = (given.memory_gb or (gpu.memory_gb if run.on_gpu else machine_gb)) * GB
    lasting = states(run.shape, run.sharding, rollout is not None and rollout.has_reference)
    host = lasting.pop("host")
    row = max(run.tokens_per_row, run.longest)  # a trajectory beyond the budget of a row gets one of its own
    images, checkpointing = round(row * given.image_share), run.policy.gradient_checkpointing
    engine = None if rollout is None else _engine(run, rollout, memory)
    length = given.tokens_per_sequence or min(8192, run.longest)
    plan = Plan(
        lasting=lasting | {"overhead": given.overhead_gb * GB * run.on_gpu},
        activations=activation_bytes(run.shape, row, images, checkpointing),
        step_work=step_bytes(run.shape, run.sharding) if run.on_gpu else 0.0,
        engine=engine,
        memory=memory,
        host=(host + (engine.host if engine else 0.0)) * run.gpus_per_node,
        mean_length=length,
        seconds=_seconds(run, given, engine, length) if run.on_gpu else {},
    )
    plan.problems.extend(_problems(run, plan))
    plan.hints.extend(_hints(run, plan))
    return plan


def _engine(run: RunFacts, rollout: RolloutFacts, memory: float) -> Engine | None:
    """The engine in the trainer's process; None where a server samples."""
    from cv_lightning.engines.base import must_sleep  # not above: --help reads this file for its options

    config, shape = rollout.engine, run.shape
    if config.kind not in ("auto", "vllm", "transformers"):
        return None
    token = shape.key_value_bytes / config.tensor_parallel_size
    if config.kind == "transformers":  # samples with the policy itself
        sequences = min(config.max_num_seqs, run.sequences_per_rank)
        return Engine(cache=sequences * rollout.longest * token, token_bytes=token)
    adapters = 0 if run.policy.lora is None else shape.trained
    weights = (shape.parameters - adapters) * shape.dtype_bytes / config.tensor_parallel_size
    if not run.on_gpu:
        cache = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")) * 2**30
        return Engine(weights=weights, cache=cache, token_bytes=token)
    ranks = run.sharding.ranks if run.sharding.zero_stage else 1
    sleeps = must_sleep(config, memory=memory, num_parameters=shape.parameters, num_ranks=ranks)
    pinned = (weights if config.sleep_level == 1 else 0.0) + (0.0 if config.enforce_eager else GRAPHS_GB * GB)
    return Engine(
        weights=weights,
        cache=config.gpu_memory_utilization * memory - weights - ENGINE_WORK_GB * GB,
        work=ENGINE_WORK_GB * GB,
        sleeps=sleeps,
        token_bytes=token,
        host=config.cache_of_images_gb(on_gpu=True) * GB + PINNED_ROUNDING * pinned * sleeps,
    )


def _seconds(run: RunFacts, given: Assumptions, engine: Engine | None, length: int) -> dict[str, float]:
    """Seconds of the parts of one batch, on GPUs that work side by side."""
    gpu, tokens, rollout = GPUS[given.gpu], run.sequences_per_rank * length, run.rollout
    peak = gpu.teraflops * 1e12 * given.mfu
    forward = forward_flops(run.shape, tokens, length, tokens * given.image_share)
    update = training_flops(run.shape, forward, run.policy.gradient_checkpointing)
    if rollout is None:
        return {"update": update / peak}
    found = {"update": (update + forward * rollout.extra_forwards) / peak}
    if engine is not None:
        # A step of decoding reads the weights once, and every trajectory's cache.
        at_once = max(1, min(engine.fits(length), rollout.engine.max_num_seqs, run.sequences_per_rank))
        step_s = (engine.weights + at_once * length * engine.token_bytes) / (gpu.bandwidth * 1e12 * DECODE_EFFICIENCY)
        rate = given.decode_tokens_per_s or at_once / step_s
        sampling = run.sequences_per_rank * given.sampled_tokens / rate + forward / peak
        images = tokens * given.image_share * run.shape.pixels_per_token * SECONDS_PER_PIXEL
        is_hidden = rollout.engine.renders_in_background(on_gpu=True) and not rollout.agent.deterministic
        found["rollout"] = max(sampling, images) if is_hidden else sampling + images
        found["sync"] = engine.weights / SYNC_BYTES_PER_S
    return found


# ------------------------------------------------------------------------------------------------ what to change
def _problems(run: RunFacts, found: Plan) -> list[str]:
    """Reasons why the run cannot work, one line each, with the setting to change; empty where it fits."""
    lines = []
    peak = max(found.training, found.sampling)
    if peak > USABLE * found.memory:
        when = "training" if found.training >= found.sampling else "sampling"
        lines.append(f"does not fit: {when} takes {peak / GB:.1f} of {found.memory / GB:.1f} GB. {_remedy(run, found)}")
    engine = found.engine
    longest = 0 if run.rollout is None else run.rollout.engine.max_model_len
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


def _hints(run: RunFacts, found: Plan) -> list[str]:
    """Settings that work, but not as the config seems to mean them."""
    rollout, engine = run.rollout, found.engine
    lines: list[str] = []
    if rollout is None:
        return lines
    allowed = rollout.agent.max_prompt_tokens + rollout.agent.max_response_tokens
    if allowed > rollout.engine.max_model_len:
        lines.append(
            f"agent.max_prompt_tokens and max_response_tokens allow {allowed} tokens, engine.max_model_len only "
            f"{rollout.engine.max_model_len}: longer trajectories end as over_length"
        )
    if engine is None:
        return lines
    at_once, mean = min(rollout.engine.max_num_seqs, run.sequences_per_rank), found.mean_length
    fit = engine.fits(mean)
    if 1 <= fit < at_once:
        share = (engine.weights + engine.work + at_once * mean * engine.token_bytes) / found.memory
        room = f", or engine.gpu_memory_utilization to {share:.2f} if that fits" if share <= USABLE else ""
        lines.append(
            f"the key-value cache holds {fit} trajectories of {mean} tokens at once, {at_once} are to run: the "
            f"others wait or are computed again. Set engine.max_num_seqs to about {fit}{room}"
        )
    return lines


def _remedy(run: RunFacts, found: Plan) -> str:
    """The settings that reduce what is largest at the peak, without those that are set."""
    trains, sharding, policy = found.training >= found.sampling, run.sharding, run.policy
    is_asleep = trains and (found.engine is None or found.engine.sleeps)
    longest = "agent.max_response_tokens" if run.rollout and run.longest >= run.tokens_per_row else "max_tokens_per_row"
    states = {
        "ZeroStrategy with stage 3": sharding.zero_stage == 3 or sharding.ranks == 1,
        "trainer.strategy.offload_optimizer true": sharding.offload_optimizer or not sharding.zero_stage,
        "policy.lora": policy.lora is not None,
        "more ranks": False,
    }
    activations = {"policy.gradient_checkpointing true": policy.gradient_checkpointing, f"a smaller {longest}": False}
    engine = {"engine.sleep always": not trains, "a lower engine.gpu_memory_utilization": False}
    options = [
        (sum(found.lasting.values()), states),
        (found.activations * trains, activations),
        (0.0 if is_asleep else found.engine_bytes, engine),
    ]
    options.sort(key=lambda option: -option[0])
    texts = [
        f"{' or '.join(name for name, is_set in settings.items() if not is_set)} ({size / GB:.1f} GB)"
        for size, settings in options
        if size > 0
    ]
    return f"Change, largest first: {'; '.join(texts)}"
