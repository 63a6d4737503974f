"""`python -m cv_lightning plan`: what a fit would take on each GPU, and whether it fits, before anything is loaded.

    python -m cv_lightning plan --config configs/grpo/qwen3_vl_8b.yaml --config configs/hardware/8gpu.yaml --gpu h200

Everything that `fit` takes is taken; the options below are assumptions that no config states. Of the model only its
config.json is read; for the models of the recipes not even that is needed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cv_lightning.command_line import short_parser
from cv_lightning.files import write_text
from cv_lightning.types import CVLightningError

if TYPE_CHECKING:
    from cv_lightning.planner.budget import Assumptions, Budget
    from cv_lightning.planner.run import RunFacts

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What is known of a run before it starts."""

    run: RunFacts
    given: Assumptions
    budget: Budget
    problems: list[str] = field(default_factory=list)
    """Why it cannot run; each names the setting to change."""
    hints: list[str] = field(default_factory=list)


def make_plan(args: list[str], given: Assumptions) -> RunPlan:
    """Read the configs and work everything out.

    Args:
        args: what `fit` would be given.
        given: assumptions.
    """
    from cv_lightning.planner.budget import budget, hints, problems
    from cv_lightning.planner.run import read_run

    run = read_run(args)
    found = budget(run, given)
    return RunPlan(run=run, given=given, budget=found, problems=problems(run, found), hints=hints(run, found, given))


def main(args: list[str] | None = None) -> int:
    """Command line entry.

    Returns:
        0; with --strict 1 where the run does not fit; 2 where the command line is wrong.
    """
    from cv_lightning.planner.budget import Assumptions

    parser = short_parser(prog="python -m cv_lightning plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("--strict", action="store_true", help="exit with 1 where the run cannot fit")
    parser.add_argument("--json", type=Path, help="write the figures, in bytes and seconds, into this file")
    parser.add_class_arguments(Assumptions, as_group=False)
    own, rest = _split(sys.argv[1:] if args is None else args, parser)
    options = parser.parse_args(own)
    from cv_lightning.environment import prepare_environment

    prepare_environment()
    values = {name: options[name] for name in Assumptions.__dataclass_fields__}
    try:
        plan = make_plan(rest, Assumptions(**values))
    except (ValueError, CVLightningError) as error:
        print(error, file=sys.stderr)
        return 2
    print(text_of(plan))
    if options.json:
        write_text(options.json, json.dumps(figures_of(plan), indent=1))
    return int(options.strict and bool(plan.problems))


def _split(args: list[str], parser: Any) -> tuple[list[str], list[str]]:
    """Our own options, with their values, and fit's."""
    flags = {flag: action for action in parser._actions for flag in action.option_strings}
    own: list[str] = []
    rest: list[str] = []
    waiting = 0
    for argument in args:
        name, _, value = argument.partition("=")
        if waiting:
            own.append(argument)
            waiting -= 1
        elif name in flags:
            own.append(argument)
            waiting = int(flags[name].nargs != 0 and not value)
        else:
            rest.append(argument)
    return own, rest


# ------------------------------------------------------------------------------------------------ what is said
def text_of(plan: RunPlan) -> str:
    """The plan for people."""
    parts = [_head(plan), _memory(plan)]
    parts += [part for part in (_cache(plan), _time(plan)) if part]
    parts += [f"WARNING: {line}" for line in plan.problems] + [f"warning: {line}" for line in plan.hints]
    return "\n\n".join(parts)


def _head(plan: RunPlan) -> str:
    run, shape = plan.run, plan.run.shape
    ranks, stage = run.sharding.ranks, run.sharding.zero_stage
    where = f"{ranks} x {plan.given.gpu}" if run.on_gpu else "CPU"
    kind = "SFT" if run.rollout is None else "GRPO"
    adapted = f", LoRA of rank {run.policy.lora.rank}" if run.policy.lora else ""
    return (
        f"{kind} of {run.policy.path}: {shape.parameters / 1e9:.2f} B parameters, {shape.trained / 1e9:.2f} B trained"
        f"{adapted}, {run.policy.dtype}; {where}" + (f", ZeRO-{stage}" if stage else "")
    )


def _memory(plan: RunPlan) -> str:
    found, held = plan.budget, plan.budget.states
    where = "GPU" if plan.run.on_gpu else "machine"
    rows = [
        ("weights", held.weights),
        ("reference policy", held.reference),
        ("gradients", held.gradients),
        ("optimizer", held.optimizer),
        ("ZeRO's buffers", held.buffers),
        ("activations", found.activations),
        ("optimizer step, after", found.step_work),
    ]
    if found.engine is not None:
        rows += [("engine weights", found.engine.weights), ("key-value cache", found.engine.cache)]
        rows += [("engine's own work", found.engine.work)]
    rows += [("CUDA, NCCL, fragments", found.overhead)]
    lines = [f"GB on each {where} of {found.memory / GB:.0f}"]
    lines += [f"  {name:22} {size / GB:7.1f}" for name, size in rows if size]
    asleep = "  (the engine sleeps meanwhile)" if found.engine is not None and found.engine.sleeps else ""
    lines.append(f"  {'peak in training':22} {found.training / GB:7.1f}{asleep}")
    if found.engine is not None:
        lines.append(f"  {'peak in rollouts':22} {found.sampling / GB:7.1f}")
    if found.host:
        line = f"  {'main memory of a node':22} {found.host / GB:7.1f}  at most, for what is kept off the GPUs"
        if found.engine is not None and found.engine.host:
            line += f"; {found.engine.host * plan.run.gpus_per_node / GB:.1f} of them the engines'"
        lines.append(line)
    return "\n".join(lines)


def _cache(plan: RunPlan) -> str:
    from cv_lightning.planner.budget import mean_length

    run, engine = plan.run, plan.budget.engine
    if run.rollout is None or engine is None:
        return ""
    mean, longest = mean_length(run, plan.given), run.rollout.longest
    wanted = -(-run.sequences_per_step // run.sharding.ranks)
    return (
        f"trajectories at once on each engine: {engine.fits(mean)} of {mean} tokens, {engine.fits(longest)} of the "
        f"longest allowed ({longest}); {min(wanted, run.rollout.engine.max_num_seqs)} are to run "
        f"({engine.token_bytes / 1024:.0f} KiB a token)"
    )


def _time(plan: RunPlan) -> str:
    from cv_lightning.planner.budget import mean_length

    seconds, run, given = plan.budget.seconds, plan.run, plan.given
    if not seconds:
        return ""
    total = sum(seconds.values())
    unit = "a step" if run.rollout is None else "an iteration"
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    decoding = (
        f"{given.decode_tokens_per_s:.0f} tokens/s" if given.decode_tokens_per_s else "decoding bound by bandwidth"
    )
    sampled = "" if run.rollout is None else f", {given.sampled_tokens} of them sampled, {decoding}, tools hidden"
    return (
        f"{unit} takes about {total:.0f} s ({parts}); "
        f"{run.num_batches} of them {total * run.num_batches / 3600:.1f} h\n"
        f"  assumed: {run.sequences_per_step} sequences of {mean_length(run, given)} tokens{sampled}; "
        f"MFU {given.mfu:.0%}; no validation, no start-up"
    )


def figures_of(plan: RunPlan) -> dict[str, Any]:
    """The plan for programs: bytes, seconds."""
    found, held = plan.budget, plan.budget.states
    figures: dict[str, Any] = {name: getattr(held, name) for name in type(held).__dataclass_fields__}
    figures |= {"activations": found.activations, "overhead": found.overhead, "host": found.host}
    figures |= {"step_work": found.step_work}
    if found.engine is not None:
        engine = found.engine
        figures |= {"engine_weights": engine.weights, "engine_cache": engine.cache, "engine_work": engine.work}
        figures |= {"engine_host": engine.host}
    figures |= {"training_peak": found.training, "rollout_peak": found.sampling, "memory": found.memory}
    figures |= {f"{name}_s": value for name, value in found.seconds.items()}
    return figures | {"problems": plan.problems, "hints": plan.hints}
