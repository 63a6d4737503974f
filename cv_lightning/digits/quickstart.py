"""`cv-lightning quickstart`: train a random tiny model until it uses the tool, and write the report.

Every stage is a command of its own, shown before it runs. `timing.json` lists the finished stages, so that an
interrupted quickstart continues with the stage that was cut off: training from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from cv_lightning.command_line import run_verb
from cv_lightning.digits.scenes import KINDS, MEASURE_KINDS
from cv_lightning.files import write_json
from cv_lightning.models.adapters import adapter_for, known_types
from cv_lightning.models.adapters.tiny import TinyModelConfig
from cv_lightning.types import DataError

CONFIGS = Path("configs/quickstart")
SEVERAL_RANKS = Path("configs/hardware/cpu2.yaml")
"""What `--ranks` adds to the configs: ZeRO-3 among CPU ranks."""
SMOKE_SFT = ["--data.init_args.num_steps", "6"]
SMOKE_RL = ["--data.init_args.num_iterations", "2", "--data.init_args.tasks_per_iteration", "4"]
SMOKE_RL += ["--rollout.store.share", "1.0"]  # so few groups that a tenth may be none
DEFAULT_MODEL = "qwen3_vl"
Task = Literal["digits", "measure"]
DEFAULT_TASK: Task = "digits"
TASK_KINDS = {"digits": KINDS, "measure": MEASURE_KINDS}
IMAGES_ONLY = ["--config", f"{CONFIGS}/measure_images.yaml"]
"""What takes the text away from the tool of the measuring task."""


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
    """Arguments after `cv-lightning`."""
    writes: list[Path] = field(default_factory=list)
    """Removed before the stage runs: leftovers of an interrupted try."""
    always: bool = False
    """Run although it ran before."""


def stages(
    run: Path,
    *,
    seed: int,
    smoke: bool,
    ablation: bool,
    family: str = DEFAULT_MODEL,
    ranks: int = 1,
    task: Task = DEFAULT_TASK,
) -> list[Stage]:
    """The stages of a quickstart, in order.

    Args:
        run: The run's folder.
        seed: Seed of weights, training scenes and samples; the held-out scenes are the same for all seeds.
        smoke: A few steps of each.
        ablation: Also train with accuracy and format only; of the measuring task, with a tool that returns images only.
        family: Architecture.
        ranks: Processes that train and test together.
        task: What the model learns: to read rotated and small digits, or to measure.
    """
    scenes = scene_flags(family, "data.init_args.")
    if ranks > 1:
        scenes += ["--config", str(SEVERAL_RANKS), "--trainer.devices", str(ranks)]
    sft = [*_overlay(task, "sft"), *seed_flags(seed), *scenes, *(SMOKE_SFT if smoke else [])]
    rl = [*_overlay(task, "grpo"), *seed_flags(seed), *scenes, "--rollout.sampling.seed", str(seed)]
    rl += SMOKE_RL if smoke else []
    test = [*_overlay(task, "eval"), *scenes, *(smoke_test(task) if smoke else [])]
    reward = "process reward" if task == "digits" else "accuracy and format reward"
    found = [
        tiny_stage(run, seed, family, task),
        fit_stage("sft", "supervised fine-tuning", run, "tiny", sft),
        test_stage("sft", run, seed, test),
        fit_stage("rl", f"GRPO with the {reward}", run, "sft/model", rl, config="grpo"),
        test_stage("rl", run, seed, test),
    ]
    if ablation and task == "measure":
        sft += ["--data.init_args.demonstrations.measure_with", "image"]
        found += [
            fit_stage("sft_images", "the same fine-tuning with images only", run, "tiny", sft),
            test_stage("sft_images", run, seed, [*test, *IMAGES_ONLY]),
            fit_stage("rl_images", "the same GRPO", run, "sft_images/model", [*rl, *IMAGES_ONLY], config="grpo"),
            test_stage("rl_images", run, seed, [*test, *IMAGES_ONLY]),
        ]
    elif ablation:
        rl += ["--rollout.reward", f"{CONFIGS}/reward_accuracy.yaml"]
        title = "the same GRPO with accuracy and format only"
        found.append(fit_stage("rl_accuracy", title, run, "sft/model", rl, config="grpo"))
        found.append(test_stage("rl_accuracy", run, seed, test))
    summary = ["quickstart-summary", str(run)]
    found.append(Stage(name="summary", title="what it learned", arguments=summary, always=True))
    found.append(Stage(name="report", title="the report", arguments=["report", str(run)], always=True))
    return found


def _overlay(task: Task, config: str) -> list[str]:
    """The config that a task adds to one of the quickstart's."""
    return [] if task == DEFAULT_TASK else ["--config", f"{CONFIGS}/{task}_{config}.yaml"]


def smoke_test(task: Task = DEFAULT_TASK) -> list[str]:
    """Two scenes of each kind."""
    return ["--data.init_args.test_tasks", json.dumps(dict.fromkeys(TASK_KINDS[task], 2))]


def seed_flags(seed: int) -> list[str]:
    """Flags of `fit` that seed the run and its scenes."""
    return ["--seed_everything", str(seed), "--data.init_args.digits.seed", str(seed)]


def tiny_stage(run: Path, seed: int, family: str = DEFAULT_MODEL, task: Task = DEFAULT_TASK) -> Stage:
    """Write a checkpoint with random weights into `run/tiny`."""
    arguments = ["tiny", "--out", f"{run}/tiny", "--seed", str(seed), "--prompt", f"{CONFIGS}/prompt.yaml"]
    arguments += [*([] if family == DEFAULT_MODEL else ["--family", family]), *scene_flags(family, "")]
    if task != DEFAULT_TASK:
        arguments += ["--digits.kind_shares", json.dumps(dict.fromkeys(TASK_KINDS[task], 1.0))]
    title = f"a tiny {adapter_for(family).title or family} with random weights"
    return Stage(name="tiny", title=title, arguments=arguments, writes=[run / "tiny"])


def fit_stage(name: str, title: str, run: Path, start: str, extra: list[str], config: str = "sft") -> Stage:
    """Train the weights `run/start` in `run/name`, which exports `run/name/model`; an interrupted training resumes."""
    arguments = ["fit", "--config", f"{CONFIGS}/{config}.yaml", "--trainer.default_root_dir", f"{run}/{name}"]
    arguments += ["--model.init_args.policy.path", f"{run}/{start}", "--ckpt_path", "auto", *extra]
    return Stage(name=name, title=title, arguments=arguments)


def test_stage(stage: str, run: Path, seed: int, extra: list[str]) -> Stage:
    """Test `run/stage/model` into `run/eval/<stage>_<greedy|sampled>_<tool|notool>`."""
    arguments = ["test", "--config", f"{CONFIGS}/eval.yaml", "--trainer.default_root_dir", str(run)]
    arguments += ["--model.init_args.policy.path", f"{run}/{stage}/model", "--rollout.eval_prefix", f"{stage}_"]
    arguments += ["--rollout.sampling.seed", str(seed), *extra]
    names = [f"{stage}_{mode}_{tool}" for mode in ("greedy", "sampled") for tool in ("tool", "notool")]
    title = f"test of {stage} on held-out digits, with and without the tool"
    writes = [run / "eval" / name for name in names]
    return Stage(name=f"{stage}_eval", title=title, arguments=arguments, writes=writes)


class Timing:
    """`timing.json` of a run: seconds by finished stage, and the settings that all its stages share.

    Args:
        run: The run's folder; made if absent.
        settings: Settings by name.

    Raises:
        DataError: The run was made with another setting.
    """

    def __init__(self, run: Path, **settings: int | str) -> None:
        self.path = run / "timing.json"
        self.values: dict[str, float | str] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        for name, value in settings.items():
            known = self.values.get(name, DEFAULT_TASK if name == "task" and self.values else value)
            if known != value:
                flag = f"--{name.replace('_', '-')}"
                raise DataError(f"{run} was made with {flag} {known}, not {value}; choose another --out")
        for name, value in settings.items():
            self.set(name, value)

    def set(self, name: str, value: float | str) -> None:
        """Store a value on disk."""
        self.values[name] = value
        write_json(self.path, self.values)


def run_stages(wanted: list[Stage], timing: Timing) -> int:
    """Run what is not finished yet.

    Returns:
        Exit code of the first stage that failed; 0 if none did; 130 after Ctrl-C.
    """
    # Trainer, engine and sandbox take turns on the same cores: threads that wait must not spin.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    for number, stage in enumerate(wanted, 1):
        heading = f"[{number}/{len(wanted)}] {stage.title}"
        if stage.name in timing.values and not stage.always:
            print(f"\n{heading}: done before, in {float(timing.values[stage.name]):.0f} s", flush=True)
            continue
        for path in stage.writes:
            shutil.rmtree(path, ignore_errors=True)
        print(f"\n{heading}\n$ cv-lightning {shlex.join(stage.arguments)}", flush=True)
        begun = time.perf_counter()
        try:
            code = subprocess.run([sys.executable, "-m", "cv_lightning", *stage.arguments], env=environment).returncode
        except KeyboardInterrupt:
            print("\nstopped; the same command continues with the stage that was cut off")
            return 130
        if code:
            print(f"{stage.name} failed (exit code {code}), see above. The same command continues with this stage.")
            return code
        timing.set(stage.name, round(time.perf_counter() - begun, 2))
    return 0


def quickstart(
    task: Task = DEFAULT_TASK,
    model: str = DEFAULT_MODEL,
    seed: int = 0,
    smoke: bool = False,
    ablation: bool = False,
    out: Path | None = None,
    force: bool = False,
    ranks: Literal[1, 2, 4, 8] = 1,
) -> int:
    """Train and test a tiny model on handwritten digits. The same command continues a run that was interrupted.

    Args:
        task: What it learns: digits (read rotated and small numbers), or measure (answer with what its code prints).
        model: Architecture: qwen3_vl or qwen2_5_vl.
        seed: Seed of the model, the scenes and the samples.
        smoke: Run every stage once, small; the model learns nothing.
        ablation: Also run RL with accuracy and format only, shown beside it; with --task measure, SFT and RL with a
            tool that returns images and no text.
        out: Folder; by default runs/quickstart-seedN, with --smoke runs/quickstart-smoke.
        force: Start from scratch; otherwise finished stages are kept.
        ranks: Processes that train and test together, under ZeRO-3.
    """
    if model not in known_types():
        raise DataError(f"--model {model}: not one of {', '.join(known_types())}")
    parts = [name for name, usual in ((task, DEFAULT_TASK), (model, DEFAULT_MODEL)) if name != usual]
    parts += [f"ranks{ranks}"] if ranks > 1 else []
    run = out or Path("runs", "-".join(["quickstart", *parts, "smoke" if smoke else f"seed{seed}"]))
    if force:
        shutil.rmtree(run, ignore_errors=True)
    config = run / "tiny" / "config.json"
    other = json.loads(config.read_text())["model_type"] if config.is_file() else model
    if other != model:
        raise DataError(f"{run} was made with --model {other}; choose another --out, or --force")
    timing = Timing(run, seed=seed, ranks=ranks, smoke=int(smoke), task=task)
    wanted = stages(run, seed=seed, smoke=smoke, ablation=ablation, family=model, ranks=ranks, task=task)
    code = run_stages(wanted, timing)
    if code == 0:
        print(f"\nopen {(run / 'report.html').resolve()} in a browser; figures: {run / 'summary.json'}")
    return code


main = partial(run_verb, quickstart, name="quickstart")
