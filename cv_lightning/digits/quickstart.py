"""`python -m cv_lightning quickstart`: from a random tiny model to one that learned to use the tool, and the report.

Every stage is a command of its own, shown before it runs; `timing.json` remembers what is finished, so that an
interrupted quickstart goes on with the stage that was cut off: training from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from cv_lightning.files import write_text
from cv_lightning.models.adapters import known_types
from cv_lightning.models.adapters.tiny import TinyModelConfig

CONFIGS = Path("configs/quickstart")
SEVERAL_RANKS = Path("configs/hardware/cpu2.yaml")
"""What `--ranks` puts on top of the configs: ZeRO-3 among CPU ranks."""
SMOKE_SFT = ["--data.init_args.num_steps", "6"]
SMOKE_RL = ["--data.init_args.num_iterations", "2", "--data.init_args.tasks_per_iteration", "4"]
SMOKE_RL += ["--rollout.store.share", "1.0"]  # so few groups that a tenth may be none
SMOKE_TEST = ["--data.init_args.test_tasks", '{"upright": 2, "turned": 2, "small": 2, "turned_and_small": 2}']


DEFAULT_MODEL = "qwen3_vl"


def scene_sizes(family: str) -> dict[str, int]:
    """Sizes of the scenes in pixels, so that a digit lies within one vision token of a family.

    Returns:
        Fields of `DigitsConfig`; empty where its defaults, for tokens of 32 pixels, are right.
    """
    side = TinyModelConfig(family=family).factor
    return {} if side == 32 else {"model_side": 3 * side, "original_side": 12 * side, "cell": 2 * side}


def scene_flags(family: str, prefix: str) -> list[str]:
    """`scene_sizes` as flags under a prefix."""
    return [word for name, value in scene_sizes(family).items() for word in (f"--{prefix}digits.{name}", str(value))]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of the quickstart."""

    name: str
    """Key in `timing.json`."""
    title: str
    arguments: list[str]
    """After `python -m cv_lightning`."""
    writes: list[Path] = field(default_factory=list)
    """Removed before the stage runs: what a cut-off try may have left."""
    always: bool = False
    """Run although it ran before."""


def stages(
    run: Path, *, seed: int, smoke: bool, ablation: bool, family: str = DEFAULT_MODEL, ranks: int = 1
) -> list[Stage]:
    """The stages of a quickstart, in order.

    Args:
        run: the run's folder.
        seed: of weights, training scenes and samples; the held-out scenes are the same for all seeds.
        smoke: a few steps of each.
        ablation: also train with accuracy and format only.
        family: which architecture.
        ranks: processes that train and test together.
    """
    scenes = scene_flags(family, "data.init_args.")
    if ranks > 1:
        scenes += ["--config", str(SEVERAL_RANKS), "--trainer.devices", str(ranks)]
    rl = ["--rollout.sampling.seed", str(seed), *(SMOKE_RL if smoke else [])]
    digits = ["--seed_everything", str(seed), "--data.init_args.digits.seed", str(seed), *scenes]
    tiny = ["tiny", "--out", f"{run}/tiny", "--seed", str(seed), "--prompt", f"{CONFIGS}/prompt.yaml"]
    tiny += [*([] if family == DEFAULT_MODEL else ["--family", family]), *scene_flags(family, "")]
    test = [*scenes, *(SMOKE_TEST if smoke else [])]
    found = [
        Stage(name="tiny", title=f"a tiny {family} with random weights", arguments=tiny, writes=[run / "tiny"]),
        fit_stage("sft", "supervised fine-tuning", run, "tiny", [*digits, *(SMOKE_SFT if smoke else [])]),
        test_stage("sft", run, seed, test),
        fit_stage("rl", "GRPO with the process reward", run, "sft/model", [*digits, *rl], config="grpo"),
        test_stage("rl", run, seed, test),
    ]
    if ablation:
        reward = ["--rollout.reward", f"{CONFIGS}/reward_accuracy.yaml"]
        title = "the same GRPO with accuracy and format only"
        found.append(fit_stage("rl_accuracy", title, run, "sft/model", [*digits, *rl, *reward], config="grpo"))
        found.append(test_stage("rl_accuracy", run, seed, test))
    summary = ["quickstart-summary", str(run)]
    found.append(Stage(name="summary", title="what it learned", arguments=summary, always=True))
    found.append(Stage(name="report", title="the report", arguments=["report", str(run)], always=True))
    return found


def fit_stage(name: str, title: str, run: Path, start: str, extra: list[str], config: str = "sft") -> Stage:
    """Training from the weights `run/start` into `run/name`, which exports `run/name/model`; one cut off goes on."""
    arguments = ["fit", "--config", f"{CONFIGS}/{config}.yaml", "--trainer.default_root_dir", f"{run}/{name}"]
    arguments += ["--model.init_args.policy.path", f"{run}/{start}", "--ckpt_path", "auto", *extra]
    return Stage(name=name, title=title, arguments=arguments)


def test_stage(stage: str, run: Path, seed: int, extra: list[str]) -> Stage:
    """Test of `run/stage/model` into `run/eval/<stage>_<greedy|sampled>_<tool|notool>`."""
    arguments = ["test", "--config", f"{CONFIGS}/eval.yaml", "--trainer.default_root_dir", str(run)]
    arguments += ["--model.init_args.policy.path", f"{run}/{stage}/model"]
    arguments += ["--rollout.eval_prefix", f"{stage}_"]
    arguments += ["--rollout.sampling.seed", str(seed), *extra]
    names = [f"{stage}_{mode}_{tool}" for mode in ("greedy", "sampled") for tool in ("tool", "notool")]
    writes = [run / "eval" / name for name in names]
    title = f"test of {stage} on held-out digits, with and without the tool"
    return Stage(name=f"{stage}_eval", title=title, arguments=arguments, writes=writes)


class Timing:
    """`timing.json` of a run: seconds by finished stage, since its last start, and the seed."""

    def __init__(self, run: Path) -> None:
        self.path = run / "timing.json"
        self.values: dict[str, float] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def set(self, name: str, value: float) -> None:
        """Remember a value; on disk at once, whole or not at all."""
        self.values[name] = value
        write_text(self.path, json.dumps(self.values, indent=1) + "\n")


def run_stages(run: Path, wanted: list[Stage], timing: Timing) -> int:
    """Run what is not finished yet.

    Returns:
        Exit code of the first stage that failed; 0 if none did.
    """
    for number, stage in enumerate(wanted, 1):
        heading = f"[{number}/{len(wanted)}] {stage.title}"
        if stage.name in timing.values and not stage.always:
            _say(f"\n{heading}: done before, in {timing.values[stage.name]:.0f} s")
            continue
        for path in stage.writes:
            shutil.rmtree(path, ignore_errors=True)
        _say(f"\n{heading}\n$ python -m cv_lightning {shlex.join(stage.arguments)}")
        begun = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", "cv_lightning", *stage.arguments]).returncode
        if code:
            _say(
                f"{stage.name} failed (exit code {code}); the lines above say why. The same command goes on from here."
            )
            return code
        timing.set(stage.name, round(time.perf_counter() - begun, 2))
    return 0


def _family(run: Path) -> str | None:
    """Family of the model that a run began with; None if it has none yet."""
    config = run / "tiny" / "config.json"
    return str(json.loads(config.read_text())["model_type"]) if config.is_file() else None


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(args: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(prog="quickstart", description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument(
        "--model", choices=known_types(), default=DEFAULT_MODEL, help="architecture (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another model, other scenes, other samples (default 0)")
    parser.add_argument("--smoke", action="store_true", help="every stage once, small; no learning claimed")
    parser.add_argument(
        "--ablation", action="store_true", help="also RL with accuracy and format only, shown beside it"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="default runs/quickstart-seedN, with --smoke runs/quickstart-smoke (runs/quickstart-qwen2_5_vl-...)",
    )
    parser.add_argument("--force", action="store_true", help="start anew; else finished stages are kept")
    parser.add_argument(
        "--ranks", type=int, default=1, help="processes that train and test together, under ZeRO-3 (default 1)"
    )
    given = parser.parse_args(args)
    if given.ranks not in (1, 2, 4, 8):
        parser.error(f"--ranks {given.ranks}: 1, 2, 4 or 8, which divide the tasks of a step")
    if not CONFIGS.is_dir():
        parser.error(f"{CONFIGS} is not here; run it in the project's folder")
    run: Path = given.out or Path(
        "runs",
        "quickstart-"
        + ("" if given.model == DEFAULT_MODEL else f"{given.model}-")
        + (f"ranks{given.ranks}-" if given.ranks > 1 else "")
        + ("smoke" if given.smoke else f"seed{given.seed}"),
    )
    if given.force:
        shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)
    timing = Timing(run)
    if timing.values.get("seed", given.seed) != given.seed:
        parser.error(f"{run} was made with --seed {timing.values['seed']:.0f}; choose another --out, or --force")
    other = _family(run)
    if other not in (None, given.model):
        parser.error(f"{run} was made with --model {other}; choose another --out, or --force")
    if timing.values.get("ranks", given.ranks) != given.ranks:
        parser.error(f"{run} was made with --ranks {timing.values['ranks']:.0f}; choose another --out, or --force")
    timing.set("seed", given.seed)
    timing.set("ranks", given.ranks)
    wanted = stages(
        run,
        seed=given.seed,
        smoke=given.smoke,
        ablation=given.ablation,
        family=given.model,
        ranks=given.ranks,
    )
    try:
        code = run_stages(run, wanted, timing)
    except KeyboardInterrupt:
        _say("\nstopped; the same command goes on with the stage that was cut off")
        return 130
    if code == 0:
        _say(f"\nopen {(run / 'report.html').resolve()} in a browser; figures: {run / 'summary.json'}")
    return code
