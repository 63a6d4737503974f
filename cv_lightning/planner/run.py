"""Facts about a run that its memory and time depend on, read from its configs without building model or engine."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, fields
from pkgutil import resolve_name
from typing import Any, NoReturn, TypeVar

import jsonargparse
import torch

from cv_lightning.callbacks.rollout import RolloutCallback
from cv_lightning.cli import ConfigOnly, ShortErrorParser
from cv_lightning.cli import main as fit
from cv_lightning.engines import EngineConfig
from cv_lightning.environment import num_devices
from cv_lightning.models.loading import PolicyConfig
from cv_lightning.models.shapes import empty_policy
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.modules.sft import SFTModule
from cv_lightning.planner.footprint import Shape, Sharding, shape_of
from cv_lightning.rl.algorithm import AlgorithmConfig
from cv_lightning.strategies import ZeroStrategy
from cv_lightning.types import CVLightningError
from cv_lightning.verbs import PROGRAM

Built = TypeVar("Built")
LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts of a run that memory and time depend on; the defaults are those of SFT."""

    shape: Shape
    policy: PolicyConfig
    sharding: Sharding
    on_gpu: bool
    gpus_per_node: int
    tokens_per_row: int
    """Token budget of a packed row."""
    sequences_per_step: int
    """Conversations or trajectories of all ranks in one batch of Lightning's."""
    num_batches: int
    allowed_tokens: int
    """Largest number of tokens of a conversation, or of a trajectory by the limits of the agent."""
    engine: EngineConfig | None = None
    """None: SFT."""
    deterministic: bool = False
    """`agent.deterministic`."""
    has_reference: bool = False
    """A frozen copy of the policy is loaded."""
    extra_forwards: float = 0.0
    """Forward passes without gradient over all trained tokens of an iteration."""

    @property
    def sequences_per_rank(self) -> int:
        """Sequences of one rank in one batch, rounded up."""
        return -(-self.sequences_per_step // self.sharding.ranks)

    @property
    def longest(self) -> int:
        """Largest number of tokens of a conversation or trajectory."""
        return min(self.allowed_tokens, self.engine.max_model_len) if self.engine else self.allowed_tokens


class PlanParser(ShortErrorParser):
    """The parser of fit, whose errors name the verb that was typed."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with 2."""
        for parser in (self, getattr(ex, "subcommand_parser", None) or self):
            parser.prog = f"{PROGRAM} plan"
        super().error(message, ex)


def read_run(args: list[str]) -> RunFacts:
    """Read the command line that follows `fit`.

    Raises:
        CVLightningError: The model's architecture is not known, or the config is not one of SFT or GRPO.
        ValueError: A config refuses its values.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
        config = fit(["fit", *args], ConfigOnly, PlanParser).config["fit"]
    trainer, model, data = config.trainer, config.model.init_args, config.data.init_args
    kind = resolve_name(config.model.class_path)
    if not issubclass(kind, (GRPOModule, SFTModule)):
        raise CVLightningError(f"model.class_path {config.model.class_path}: plan knows SFTModule and GRPOModule")
    callback = _build(RolloutCallback, config.rollout) if issubclass(kind, GRPOModule) else None
    policy = _build(PolicyConfig, model.policy)
    devices = num_devices(trainer.devices)
    if not devices:
        LOG.warning("trainer.devices %s: planned for one GPU; give the number with --trainer.devices", trainer.devices)
    if callback:
        rollout = _rollout_facts(callback, _build(AlgorithmConfig, model.algorithm), policy)
        sequences, num_batches = data.tasks_per_iteration * callback.num_samples, data.num_iterations
    else:
        rollout = {"allowed_tokens": model.max_tokens_per_row}
        sequences, num_batches = data.conversations_per_step, data.num_steps
    on_gpu = trainer.accelerator in ("gpu", "cuda")
    return RunFacts(
        shape=shape_of(empty_policy(policy), policy.adapter),
        policy=policy,
        sharding=_sharding(trainer.strategy, max(1, devices) * int(trainer.num_nodes or 1)),
        on_gpu=torch.cuda.is_available() if trainer.accelerator == "auto" else on_gpu,
        gpus_per_node=max(1, devices),
        tokens_per_row=model.max_tokens_per_row,
        sequences_per_step=sequences,
        num_batches=num_batches,
        **rollout,
    )


def _rollout_facts(callback: RolloutCallback, algorithm: AlgorithmConfig, policy: PolicyConfig) -> dict[str, Any]:
    """Fields of `RunFacts` that rollouts determine."""
    kl, agent = algorithm.kl, callback.agent
    is_own = policy.lora is not None and kl.reference_path in (None, policy.path)  # the policy without its adapters
    has_old_pass = algorithm.old_logprobs == "trainer" and algorithm.num_minibatches > 1
    return {
        "allowed_tokens": agent.max_prompt_tokens + agent.max_response_tokens,
        "engine": callback.engine_config,
        "deterministic": agent.deterministic,
        "has_reference": kl.weight > 0 and not is_own,
        "extra_forwards": (1 / kl.every if kl.weight > 0 else 0.0) + has_old_pass,
    }


def _build(kind: type[Built], arguments: jsonargparse.Namespace) -> Built:
    """An object from its parsed arguments."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "built")
    built: Built = parser.instantiate(jsonargparse.Namespace(built=arguments)).built  # type: ignore[no-untyped-call]
    return built


def _sharding(strategy: Any, ranks: int) -> Sharding:
    """Sharding of `ZeroStrategy` and its subclasses; other strategies shard nothing."""
    kind = resolve_name(strategy.class_path) if isinstance(strategy, jsonargparse.Namespace) else object
    if not issubclass(kind, ZeroStrategy):
        return Sharding(ranks=ranks)
    given = dict(strategy.get("init_args") or {})
    known = {field.name: given[field.name] for field in fields(Sharding) if field.name in given}
    return Sharding(ranks=ranks, zero_stage=given.get("stage", 3), **known)
