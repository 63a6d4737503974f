"""`cv-lightning plan`: memory and time of a training, and whether it fits, before anything is loaded."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from cv_lightning.command_help import HELP_ALL
from cv_lightning.command_line import closest, put_json, run_verb, split_words, verb_parser
from cv_lightning.planner.assumptions import Assumptions, PlanOptions
from cv_lightning.settings_check import check_command
from cv_lightning.types import CVLightningError

if TYPE_CHECKING:
    from cv_lightning.planner.budget import Plan
    from cv_lightning.planner.run import RunFacts

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
    """Command line entry; returns the exit code."""
    parser = verb_parser(PlanOptions, "plan", takes_config=False)
    own, rest = split_words(list(sys.argv[1:] if args is None else args), parser)
    for flag in (word.partition("=")[0] for word in rest if word.startswith("--") and "." not in word):
        if close := closest(flag, parser):
            parser.error(f"there is no flag {flag}; did you mean {close}?")
    is_help = {"-h", "--help", "--help-all", HELP_ALL} & set(own)
    if not is_help and not any(word.partition("=")[0] in ("--config", "--model") for word in rest):
        parser.error("--config is missing: give the config files of a fit, such as configs/grpo/qwen3_vl_8b.yaml")
    return run_verb(PlanOptions, own, "plan", partial(_plan, rest), takes_config=False)


def _plan(settings: list[str], options: PlanOptions) -> int:
    """Print the plan of `fit` with some settings."""
    from cv_lightning.environment import prepare_environment

    if wrong := check_command("plan", settings):
        raise CVLightningError(wrong)
    prepare_environment()
    from cv_lightning.planner.budget import make_plan
    from cv_lightning.planner.run import read_run

    run = read_run(settings)
    plan = make_plan(run, options)
    if not put_json(options.json, figures_of(plan)):
        print(text_of(plan, run, options))
    return int(options.strict and bool(plan.problems))


def figures_of(plan: Plan) -> dict[str, Any]:
    """The plan for programs: bytes, seconds."""
    seconds = {f"{name}_s": value for name, value in plan.seconds.items()}
    return plan.figures | seconds | {"problems": plan.problems, "hints": plan.hints}


def text_of(plan: Plan, run: RunFacts, given: Assumptions) -> str:
    """The plan for people."""
    shape, stage, engine, mean = run.shape, run.sharding.zero_stage, plan.engine, plan.mean_length
    gigabytes = {name: value / 1e9 for name, value in plan.figures.items()}
    parts = [
        f"{'GRPO' if run.engine else 'SFT'} of {run.policy.path}: {shape.parameters / 1e9:.2f} B parameters, "
        f"{shape.trained / 1e9:.2f} B trained{f', LoRA of rank {run.policy.lora.rank}' if run.policy.lora else ''}, "
        f"{run.policy.dtype}; {f'{run.sharding.ranks} x {given.gpu}' if run.on_gpu else 'CPU'}"
        f"{f', ZeRO-{stage}' if stage else ''}"
    ]
    table = [f"GB on each {'GPU' if run.on_gpu else 'machine'} of {gigabytes['memory']:.0f}"]
    table += [f"  {title:22} {gigabytes[name]:7.1f}" for name, title in TITLES.items() if gigabytes.get(name)]
    if engine and engine.sleeps:
        table[-2] += "  (the engine sleeps meanwhile)"
    if gigabytes["host"]:
        engines = gigabytes.get("engine_host", 0.0) * run.gpus_per_node
        of_engines = f"; {engines:.1f} of them the engines'" if engines else ""
        kept = f"{gigabytes['host']:7.1f}  at most, for what is kept off the GPUs{of_engines}"
        table.append(f"  {'main memory of a node':22} {kept}")
    parts.append("\n".join(table))
    if engine:
        parts.append(
            f"trajectories at once on each engine: {engine.fits(mean)} of {mean} tokens, {engine.fits(run.longest)} "
            f"of the longest allowed ({run.longest}); {engine.to_run} are to run "
            f"({engine.token_bytes / 1024:.0f} KiB a token)"
        )
    if plan.seconds:
        total, rate = sum(plan.seconds.values()), given.decode_tokens_per_s
        seconds = ", ".join(f"{name} {value:.0f} s" for name, value in plan.seconds.items())
        decoding = f"{rate:.0f} tokens/s" if rate else "decoding bound by bandwidth"
        sampled = f", {given.sampled_tokens} of them sampled, {decoding}, tools hidden" if run.engine else ""
        parts.append(
            f"{'an iteration' if run.engine else 'a step'} takes about {total:.0f} s ({seconds}); "
            f"{run.num_batches} of them {total * run.num_batches / 3600:.1f} h\n"
            f"  assumed: {run.sequences_per_step} sequences of {mean} tokens{sampled}; MFU {given.mfu:.0%}; "
            "no validation, no start-up"
        )
    parts += [f"WARNING: {line}" for line in plan.problems] + [f"warning: {line}" for line in plan.hints]
    return "\n\n".join(parts)
