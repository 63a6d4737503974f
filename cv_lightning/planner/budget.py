"""Estimates of a run's memory and time, and what to change where it does not fit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cv_lightning.planner.assumptions import Assumptions, Gpu
from cv_lightning.planner.footprint import activation_bytes, forward_flops, states, step_bytes

if TYPE_CHECKING:
    from cv_lightning.engines import EngineConfig
    from cv_lightning.planner.run import RunFacts

GB = 1e9
GPUS: dict[Gpu, tuple[int, int, float]] = {
    "b200": (180, 2250, 8.0),
    "h200": (141, 989, 4.8),
    "h100": (80, 989, 3.35),
    "a100": (80, 312, 2.04),
    "a100-40": (40, 312, 1.56),
    "l40s": (48, 362, 0.86),
    "a6000": (48, 155, 0.77),
    "rtx4090": (24, 165, 1.01),
    "rtx3090": (24, 71, 0.94),
}
"""Data sheets: memory in GB, dense 16-bit TFLOP/s, and memory bandwidth in TB/s."""
DECODE_EFFICIENCY = 0.6  # Fraction of the memory's bandwidth that decoding reaches
SYNC_BYTES_PER_S = 8e9  # Weight sync: 6-7 s for 30 B parameters over a good network (verl's checkpoint engine)
ENGINE_WORK_GB = 3.0  # vLLM's own activations, CUDA graphs and image features
GRAPHS_GB = 1.0  # CUDA graphs of an engine, which vLLM copies to main memory while the engine sleeps
PINNED_ROUNDING = 2.0
"""torch's allocator of pinned memory rounds every allocation up to a power of two, so at most twice its size."""
SECONDS_PER_PIXEL = 54e-9
"""Processing of an image for the engine on one thread: 345 ms for 6.4 megapixels, measured on a server CPU."""
USABLE = 0.97  # Fraction of a GPU's memory that a run can use


@dataclass(frozen=True)
class EngineBudget:
    """Bytes on one GPU of an engine in the trainer's process."""

    config: EngineConfig
    to_run: int
    """Trajectories that the run wants to decode at once."""
    token_bytes: float
    """Key-value cache of one token."""
    weights: float
    cache: float
    """Key-value cache."""
    work: float
    host: float
    """Main memory on each rank: pinned copies while it sleeps, and processed images."""
    sleeps: bool
    """It releases its memory while the trainer works."""

    @property
    def total(self) -> float:
        """Bytes while it samples."""
        return self.weights + self.cache + self.work

    def fits(self, tokens: int) -> int:
        """Number of trajectories of `tokens` tokens whose cache fits at once."""
        return int(max(self.cache, 0.0) // (tokens * self.token_bytes))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory and time of a run, and what to change about it."""

    figures: dict[str, float]
    """Bytes on one GPU, or on the machine for a run on the CPU, by their names in the JSON file."""
    seconds: dict[str, float]
    """Update, rollout and sync of one batch; empty on a CPU, whose speed is not known."""
    engine: EngineBudget | None
    mean_length: int
    """Mean tokens of a conversation or trajectory."""
    problems: list[str]
    """Reasons why the run cannot work; each names the setting to change."""
    hints: list[str]
    """Settings that work, but not as the config seems to mean them."""


def make_plan(run: RunFacts, given: Assumptions) -> Plan:
    """Estimate memory and time of a run."""
    machine_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    memory = (given.memory_gb or (GPUS[given.gpu][0] if run.on_gpu else machine_gb)) * GB
    engine, length = _engine(run, memory), given.tokens_per_sequence or min(8192, run.longest)
    figures = states(run.shape, run.sharding, run.has_reference)
    host = figures.pop("host")
    figures["overhead"] = given.overhead_gb * GB * run.on_gpu
    kept = sum(figures.values())
    row = max(run.tokens_per_row, run.longest)  # a trajectory beyond the budget of a row gets one of its own
    images, checkpointing = round(row * given.image_share), run.policy.gradient_checkpointing
    figures["activations"] = activation_bytes(run.shape, row, images, checkpointing)
    figures["step_work"] = step_bytes(run.shape, run.sharding) if run.on_gpu else 0.0
    training, sampling = kept + max(figures["activations"], figures["step_work"]), 0.0
    if engine:
        figures |= {f"engine_{name}": getattr(engine, name) for name in ("weights", "cache", "work", "host")}
        training, sampling = training + engine.total * (not engine.sleeps), kept + engine.total
        host += engine.host
    figures |= {"training_peak": training, "rollout_peak": sampling}
    figures |= {"memory": memory, "host": host * run.gpus_per_node}
    return Plan(
        figures=figures,
        seconds=_seconds(run, given, engine, length) if run.on_gpu else {},
        engine=engine,
        mean_length=length,
        problems=_problems(run, figures, engine, kept),
        hints=_hints(run, engine, length, memory),
    )


def _engine(run: RunFacts, memory: float) -> EngineBudget | None:
    """The engine in the trainer's process; None for SFT, and where a server samples."""
    from cv_lightning.engines.base import must_sleep  # not above: --help reads this file for its options

    config, shape = run.engine, run.shape
    if config is None or config.is_remote:
        return None
    token = 2 * shape.layers * shape.key_width * shape.dtype_bytes / config.tensor_parallel_size
    to_run = min(config.max_num_seqs, run.sequences_per_rank)
    weights, work, host, sleeps = 0.0, 0.0, 0.0, False
    if config.kind == "transformers":  # samples with the policy itself
        cache = to_run * run.longest * token
    else:
        adapters = 0 if run.policy.lora is None else shape.trained
        weights = (shape.parameters - adapters) * shape.dtype_bytes / config.tensor_parallel_size
        cache = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")) * 2**30
    if config.kind != "transformers" and run.on_gpu:
        work = ENGINE_WORK_GB * GB
        cache = config.gpu_memory_utilization * memory - weights - work
        ranks = run.sharding.ranks if run.sharding.zero_stage else 1
        sleeps = must_sleep(config, memory=memory, num_parameters=shape.parameters, num_ranks=ranks)
        pinned = weights * (config.sleep_level == 1) + GRAPHS_GB * GB * (not config.enforce_eager)
        host = config.cache_of_images_gb(on_gpu=True) * GB + PINNED_ROUNDING * pinned * sleeps
    return EngineBudget(config, to_run, token, weights, cache, work, host, sleeps)


def _seconds(run: RunFacts, given: Assumptions, engine: EngineBudget | None, length: int) -> dict[str, float]:
    """Seconds of the parts of one batch, on GPUs that work side by side."""
    (_, teraflops, bandwidth), tokens, shape = GPUS[given.gpu], run.sequences_per_rank * length, run.shape
    peak = teraflops * 1e12 * given.mfu
    forward = forward_flops(shape, tokens, length, tokens * given.image_share)
    backward = 2.0 if shape.trained > shape.parameters / 2 else 1.0  # LoRA has no gradients of weights
    update = forward * (1 + backward + run.policy.gradient_checkpointing)
    found = {"update": (update + forward * run.extra_forwards) / peak}
    if engine is None:
        return found
    # A step of decoding reads the weights once, and every trajectory's cache.
    at_once = max(1, min(engine.fits(length), engine.to_run))
    step_s = (engine.weights + at_once * length * engine.token_bytes) / (bandwidth * 1e12 * DECODE_EFFICIENCY)
    rate = given.decode_tokens_per_s or at_once / step_s
    sampling = run.sequences_per_rank * given.sampled_tokens / rate + forward / peak
    images = tokens * given.image_share * (shape.patch * shape.merge) ** 2 * SECONDS_PER_PIXEL
    is_hidden = engine.config.renders_in_background(on_gpu=True) and not run.deterministic
    found["rollout"] = max(sampling, images) if is_hidden else sampling + images
    return found | {"sync": engine.weights / SYNC_BYTES_PER_S}


# ------------------------------------------------------------------------------------------------ what to change
def _problems(run: RunFacts, figures: dict[str, float], engine: EngineBudget | None, kept: float) -> list[str]:
    """Reasons why the run cannot work, one line each, with the setting to change; empty where it fits."""
    lines = []
    training, sampling, memory = (figures[name] for name in ("training_peak", "rollout_peak", "memory"))
    trains, sharding, policy = training >= sampling, run.sharding, run.policy
    activations = figures["activations"] * trains
    limit = "agent.max_response_tokens" if run.engine and run.longest >= run.tokens_per_row else "max_tokens_per_row"
    in_memory = 0.0 if engine is None or (trains and engine.sleeps) else engine.total
    if max(training, sampling) > USABLE * memory:
        remedies = [  # bytes at the peak, a setting that reduces them, and whether it is left to change
            (kept, "ZeroStrategy with stage 3", sharding.zero_stage != 3 and sharding.ranks > 1),
            (kept, "trainer.strategy.offload_optimizer true", sharding.zero_stage and not sharding.offload_optimizer),
            (kept, "policy.lora", policy.lora is None),
            (kept, "more ranks", True),
            (activations, "policy.gradient_checkpointing true", not policy.gradient_checkpointing),
            (activations, f"a smaller {limit}", True),
            (in_memory, "engine.sleep always", trains),
            (in_memory, "a lower engine.gpu_memory_utilization", True),
        ]
        settings: dict[float, list[str]] = {}
        for size, setting, is_left in sorted(remedies, key=lambda remedy: -remedy[0]):
            if size > 0 and is_left:
                settings.setdefault(size, []).append(setting)
        texts = [f"{' or '.join(names)} ({size / GB:.1f} GB)" for size, names in settings.items()]
        lines.append(
            f"does not fit: {'training' if trains else 'sampling'} takes {max(training, sampling) / GB:.1f} of "
            f"{memory / GB:.1f} GB. Change, largest first: {'; '.join(texts)}"
        )
    if engine and engine.fits(longest := engine.config.max_model_len) < 1:
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


def _hints(run: RunFacts, engine: EngineBudget | None, length: int, memory: float) -> list[str]:
    """Settings that work, but not as the config seems to mean them."""
    lines = []
    if run.engine and run.allowed_tokens > run.engine.max_model_len:
        lines.append(
            f"agent.max_prompt_tokens and max_response_tokens allow {run.allowed_tokens} tokens, engine.max_model_len "
            f"only {run.engine.max_model_len}: longer trajectories end as over_length"
        )
    if engine and 1 <= (fit := engine.fits(length)) < engine.to_run:
        needed = (engine.weights + engine.work + engine.to_run * length * engine.token_bytes) / memory
        room = f", or engine.gpu_memory_utilization to {needed:.2f} if that fits" if needed <= USABLE else ""
        lines.append(
            f"the key-value cache holds {fit} trajectories of {length} tokens at once, {engine.to_run} are to run: the "
            f"others wait or are computed again. Set engine.max_num_seqs to about {fit}{room}"
        )
    return lines
