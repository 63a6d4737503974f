"""`python -m cv_lightning plan`: memory and time of a fit, and whether it fits, before anything is loaded.

    python -m cv_lightning plan --config configs/grpo/qwen3_vl_8b.yaml --config configs/hardware/8gpu.yaml --gpu h200

It takes every option of `fit`; the options below are assumptions that no config states. Of the model only its
config.json is read; for the models of the recipes not even that is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cv_lightning.command_line import short_parser
from cv_lightning.environment import prepare_environment
from cv_lightning.files import write_json
from cv_lightning.types import CVLightningError

if TYPE_CHECKING:
    from cv_lightning.planner.budget import Assumptions, Plan
    from cv_lightning.planner.run import RunFacts

GB = 1e9
TITLES = {
    "weights": "weights",
    "reference": "reference policy",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "buffers": "ZeRO's buffers",
    "activations": "activations",
    "step_work": "optimizer step, after",
    "engine_weights": "engine weights",
    "engine_cache": "key-value cache",
    "engine_work": "engine's own work",
    "overhead": "CUDA, NCCL, fragments",
    "training_peak": "peak in training",
    "rollout_peak": "peak in rollouts",
}
"""Memory on a GPU: name in the JSON file, and in the table."""


def main(args: list[str] | None = None) -> int:
    """Command line entry.

    Returns:
        0; with --strict 1 where the run does not fit; 2 where the command line is wrong.
    """
    from cv_lightning.planner.budget import Assumptions, make_plan

    parser = short_parser(prog="python -m cv_lightning plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("--strict", action="store_true", help="exit with 1 where the run cannot fit")
    parser.add_argument("--json", type=Path, help="write the figures, in bytes and seconds, into this file")
    parser.add_class_arguments(Assumptions, as_group=False)
    own, rest = _split(sys.argv[1:] if args is None else args, parser)
    options = parser.parse_args(own)
    prepare_environment()
    from cv_lightning.planner.run import read_run

    try:
        given = Assumptions(**{name: options[name] for name in Assumptions.__dataclass_fields__})
        run = read_run(rest)
    except (ValueError, CVLightningError) as error:
        print(error, file=sys.stderr)
        return 2
    plan = make_plan(run, given)
    print(text_of(plan, run, given))
    if options.json:
        write_json(options.json, figures_of(plan))
    return int(options.strict and bool(plan.problems))


def _split(args: list[str], parser: Any) -> tuple[list[str], list[str]]:
    """Our own options, with their values, and fit's."""
    flags = {flag: action for action in parser._actions for flag in action.option_strings}
    own: list[str] = []
    rest: list[str] = []
    takes_next = False
    for argument in args:
        name, _, value = argument.partition("=")
        if takes_next or name in flags:
            own.append(argument)
            takes_next = not takes_next and flags[name].nargs != 0 and not value
        else:
            rest.append(argument)
    return own, rest


def figures_of(plan: Plan) -> dict[str, Any]:
    """The plan for programs: bytes, seconds."""
    figures: dict[str, Any] = plan.lasting | {"activations": plan.activations, "step_work": plan.step_work}
    if engine := plan.engine:
        figures |= {f"engine_{name}": getattr(engine, name) for name in ("weights", "cache", "work", "host")}
    figures |= {"training_peak": plan.training, "rollout_peak": plan.sampling, "memory": plan.memory, "host": plan.host}
    figures |= {f"{name}_s": value for name, value in plan.seconds.items()}
    return figures | {"problems": plan.problems, "hints": plan.hints}


def text_of(plan: Plan, run: RunFacts, given: Assumptions) -> str:
    """The plan for people."""
    shape, stage, engine, rollout = run.shape, run.sharding.zero_stage, plan.engine, run.rollout
    adapted = f", LoRA of rank {run.policy.lora.rank}" if run.policy.lora else ""
    where = f"{run.sharding.ranks} x {given.gpu}" if run.on_gpu else "CPU"
    head = f"{'GRPO' if rollout else 'SFT'} of {run.policy.path}: {shape.parameters / 1e9:.2f} B parameters, "
    head += f"{shape.trained / 1e9:.2f} B trained{adapted}, {run.policy.dtype}; {where}"
    head += f", ZeRO-{stage}" if stage else ""
    figures = figures_of(plan)
    memory = [f"GB on each {'GPU' if run.on_gpu else 'machine'} of {plan.memory / GB:.0f}"]
    memory += [f"  {title:22} {figures[name] / GB:7.1f}" for name, title in TITLES.items() if figures.get(name)]
    if engine and engine.sleeps:
        memory[-2] += "  (the engine sleeps meanwhile)"
    if plan.host:
        engines = engine.host * run.gpus_per_node / GB if engine else 0.0
        memory.append(f"  {'main memory of a node':22} {plan.host / GB:7.1f}  at most, for what is kept off the GPUs")
        memory[-1] += f"; {engines:.1f} of them the engines'" if engines else ""
    parts = [head, "\n".join(memory)]
    if rollout and engine:
        mean, longest = plan.mean_length, rollout.longest
        parts.append(
            f"trajectories at once on each engine: {engine.fits(mean)} of {mean} tokens, {engine.fits(longest)} of the "
            f"longest allowed ({longest}); {min(run.sequences_per_rank, rollout.engine.max_num_seqs)} are to run "
            f"({engine.token_bytes / 1024:.0f} KiB a token)"
        )
    if plan.seconds:
        parts.append(_time_text(plan, run, given))
    parts += [f"WARNING: {line}" for line in plan.problems] + [f"warning: {line}" for line in plan.hints]
    return "\n\n".join(parts)


def _time_text(plan: Plan, run: RunFacts, given: Assumptions) -> str:
    total, rate = sum(plan.seconds.values()), given.decode_tokens_per_s
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in plan.seconds.items())
    decoding = f"{rate:.0f} tokens/s" if rate else "decoding bound by bandwidth"
    sampled = f", {given.sampled_tokens} of them sampled, {decoding}, tools hidden" if run.rollout else ""
    return (
        f"{'an iteration' if run.rollout else 'a step'} takes about {total:.0f} s ({parts}); "
        f"{run.num_batches} of them {total * run.num_batches / 3600:.1f} h\n"
        f"  assumed: {run.sequences_per_step} sequences of {plan.mean_length} tokens{sampled}; MFU {given.mfu:.0%}; "
        "no validation, no start-up"
    )
