"""What a fit's configs say about memory and time, read by fit's own parser; no model, engine or data is built."""

from __future__ import annotations

import importlib
import logging
import warnings
from dataclasses import dataclass, fields
from typing import Any, NoReturn, TypeVar

import jsonargparse

from cv_lightning.agent.config import AgentConfig
from cv_lightning.callbacks.rollout import RolloutCallback
from cv_lightning.cli import ConfigOnly, ShortErrorParser
from cv_lightning.cli import main as fit
from cv_lightning.data.modules import SFTDataModule, TaskDataModule
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

Built = TypeVar("Built")
LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RolloutFacts:
    """Of RL."""

    agent: AgentConfig
    engine: EngineConfig
    num_samples: int
    has_reference: bool
    """A frozen copy of the policy is loaded."""
    extra_forwards: float
    """Passes without gradient over all trained tokens, in an iteration."""

    @property
    def longest(self) -> int:
        """Tokens of the longest trajectory that is allowed."""
        return min(self.agent.max_prompt_tokens + self.agent.max_response_tokens, self.engine.max_model_len)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run is, as far as memory and time depend on it."""

    shape: Shape
    policy: PolicyConfig
    sharding: Sharding
    on_gpu: bool
    gpus_per_node: int
    tokens_per_row: int
    """Budget of a packed row."""
    sequences_per_step: int
    """Conversations or trajectories of all ranks, in one batch of Lightning's."""
    num_batches: int
    rollout: RolloutFacts | None
    """None: SFT."""


class PlanParser(ShortErrorParser):
    """The parser of fit, whose errors name the verb that was typed."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with 2."""
        self.prog = self.prog.replace(" fit", " plan")
        super().error(message, ex)


def read_run(args: list[str]) -> RunFacts:
    """Read a fit's command line.

    Args:
        args: what `fit` would be given.

    Raises:
        CVLightningError: the model's architecture is not known, or the config is no SFT or GRPO run.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
        cli = fit(["fit", *args], ConfigOnly, PlanParser)
    assert isinstance(cli, ConfigOnly)
    config = cli.as_dict()
    trainer, model, data = config["trainer"], config["model"], config["data"]
    given = model["init_args"]
    policy = _build(PolicyConfig, given["policy"])
    devices, nodes = _num_devices(trainer["devices"]), int(trainer.get("num_nodes") or 1)
    kind = _class(model["class_path"])
    rollout = None
    if issubclass(kind, GRPOModule):
        rollout = _rollout(config["rollout"], given, policy)
        tasks = _build_class(TaskDataModule, data, "data")
        sequences, batches = tasks.tasks_per_iteration * rollout.num_samples, tasks.num_iterations
    elif issubclass(kind, SFTModule):
        conversations = _build_class(SFTDataModule, data, "data")
        sequences, batches = conversations.conversations_per_step, conversations.num_steps
    else:
        raise CVLightningError(f"model.class_path {model['class_path']}: plan knows SFTModule and GRPOModule")
    return RunFacts(
        shape=shape_of(empty_policy(policy), policy.adapter),
        policy=policy,
        sharding=_sharding(trainer["strategy"], devices * nodes),
        on_gpu=_on_gpu(trainer["accelerator"]),
        gpus_per_node=devices,
        tokens_per_row=given["max_tokens_per_row"],
        sequences_per_step=sequences,
        num_batches=batches,
        rollout=rollout,
    )


def _rollout(rollout: dict[str, Any], given: dict[str, Any], policy: PolicyConfig) -> RolloutFacts:
    spec = {"class_path": "cv_lightning.callbacks.rollout.RolloutCallback", "init_args": rollout}
    callback = _build_class(RolloutCallback, spec, "rollout")
    algorithm = _build(AlgorithmConfig, given.get("algorithm") or {})
    kl = algorithm.kl
    own = policy.lora is not None and kl.reference_path in (None, policy.path)
    forwards = 1 / kl.every if kl.weight > 0 else 0.0
    forwards += algorithm.old_logprobs == "trainer" and algorithm.num_minibatches > 1
    return RolloutFacts(
        agent=callback.agent,
        engine=callback.engine_config,
        num_samples=callback.num_samples,
        has_reference=kl.weight > 0 and not own,
        extra_forwards=forwards,
    )


def _build(kind: type[Built], value: Any) -> Built:
    """An object from the parsed form of its arguments."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    built: Built = parser.instantiate(parser.parse_object({"value": value})).value
    return built


def _build_class(kind: type[Built], spec: dict[str, Any], where: str) -> Built:
    try:
        return _build(kind, spec)
    except (jsonargparse.ArgumentError, ValueError) as error:
        raise CVLightningError(f"{where}: {error}") from error


def _class(path: str) -> type:
    module, name = path.rsplit(".", 1)
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, type)
    return found


def _on_gpu(accelerator: str) -> bool:
    """What `auto` means is this machine's to say."""
    if accelerator != "auto":
        return accelerator in ("gpu", "cuda")
    import torch

    return torch.cuda.is_available()


def _num_devices(given: Any) -> int:
    """GPUs of a node; one where the machine that runs it would say."""
    count = num_devices(given)
    if not count:
        LOG.warning("trainer.devices %s: planned for one GPU; name the number with --trainer.devices", given)
    return count or 1


def _sharding(strategy: Any, ranks: int) -> Sharding:
    """What a strategy shards; a plain one nothing."""
    if not isinstance(strategy, dict) or not issubclass(_class(strategy["class_path"]), ZeroStrategy):
        return Sharding(ranks=ranks)
    given = strategy.get("init_args") or {}
    names = {field.name for field in fields(Sharding)} - {"ranks", "zero_stage"}
    known = {name: given[name] for name in names & given.keys()}
    return Sharding(ranks=ranks, zero_stage=given.get("stage", 3), **known)
