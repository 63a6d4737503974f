"""`cv-lightning ablations`: the effect of parts of reward and recipe, on handwritten digits.

Every arm is the quickstart's GRPO with one change, from the SFT checkpoint of its seed, tested on the same held-out
scenes. Each seed has its own folder and `timing.json`: an interrupted study continues where it was cut off, and seeds
can run side by side.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jsonargparse.typing import PositiveInt

from cv_lightning.command_line import run_verb
from cv_lightning.digits.quickstart import (
    SMOKE_RL,
    SMOKE_SFT,
    Stage,
    Timing,
    fit_stage,
    run_stages,
    seed_flags,
    smoke_test,
    test_stage,
    tiny_stage,
)
from cv_lightning.digits.scenes import KINDS
from cv_lightning.files import write_json, write_text
from cv_lightning.types import DataError


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One variant of the quickstart's RL."""

    title: str
    reward: str | None = None
    """Reward config; None: the quickstart's."""
    sft: str | None = "sft"
    """Name in `SFTS` of the checkpoint that RL starts from; None: random weights."""


ARMS = {
    "full": Arm(title="quickstart's reward"),
    "no_process": Arm(title="no process reward", reward="configs/ablations/no_process.yaml"),
    "no_penalty": Arm(title="no penalty", reward="configs/ablations/no_penalty.yaml"),
    "no_sft": Arm(title="RL without SFT", sft=None),
    "paper": Arm(title="paper's reward", reward="configs/reward/paper.yaml"),
    "reference": Arm(title="released code's reward", reward="configs/reward/reference.yaml"),
    "rare": Arm(title="quickstart's reward after SFT that rarely shows the tool", sft="sft_rare"),
    "rare_no_process": Arm(
        title="no process reward after SFT that rarely shows the tool",
        reward="configs/ablations/no_process.yaml",
        sft="sft_rare",
    ),
    "needless": Arm(title="quickstart's reward after SFT with unnecessary rotations", sft="sft_needless"),
    "needless_no_penalty": Arm(
        title="no penalty after SFT with unnecessary rotations",
        reward="configs/ablations/no_penalty.yaml",
        sft="sft_needless",
    ),
}
SFTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sft": ("SFT", ()),
    "sft_rare": ("SFT that rarely shows the tool", ("--data.init_args.demonstrations.tool_share", "0.05")),
    "sft_needless": ("SFT with unnecessary rotations", ("--data.init_args.demonstrations.needless_share", "0.5")),
}
"""Title and options of each SFT.

The quickstart's SFT shows the tool in a third of the tasks that need it, so that correct answers alone lead to it, and
has no unnecessary calls, so that a penalty has no effect. The second shows the tool in a twentieth. The third rotates
half of the upright images first, without need.
"""


def stages(
    run: Path,
    *,
    seed: int,
    arms: list[str],
    iterations: int | None = None,
    per_kind: int | None = None,
    smoke: bool = False,
    tests: bool = True,
) -> list[Stage]:
    """The stages of one seed, in order.

    Args:
        run: The seed's folder.
        seed: Seed of weights, training scenes and samples; the held-out scenes are the same for all seeds.
        arms: Names of `ARMS`.
        iterations: Iterations of RL; None: the quickstart's number.
        per_kind: Held-out scenes of each kind; None: the quickstart's numbers.
        smoke: A few steps of each.
        tests: Test every model on held-out scenes.
    """
    rl = [*seed_flags(seed), "--rollout.sampling.seed", str(seed), *(SMOKE_RL if smoke else [])]
    if iterations is not None:
        rl += ["--data.init_args.num_iterations", str(iterations)]
    test = smoke_test() if smoke else []
    if per_kind is not None:
        test = ["--data.init_args.test_tasks", json.dumps(dict.fromkeys(KINDS, per_kind))]
    trained = []
    for sft, (title, options) in SFTS.items():
        if sft in {ARMS[name].sft for name in arms}:
            extra = [*seed_flags(seed), *(SMOKE_SFT if smoke else []), *options]
            trained.append(fit_stage(sft, title, run, "tiny", extra))
    for name in arms:
        arm = ARMS[name]
        start = f"{arm.sft}/model" if arm.sft else "tiny"
        reward = ["--rollout.reward", arm.reward] if arm.reward else []
        trained.append(fit_stage(name, f"GRPO: {arm.title}", run, start, [*rl, *reward], config="grpo"))
    found = [tiny_stage(run, seed)]
    for stage in trained:
        found += [stage, test_stage(stage.name, run, seed, test)] if tests else [stage]
    return found


def write_table(out: Path) -> str:
    """Write `ablations.json`, `.md` and `.png` over all seeds that `out` holds.

    Returns:
        The table.
    """
    from cv_lightning.digits.study import markdown, study, to_json, training_curves
    from cv_lightning.evaluation.plots import plot_study

    def label(name: str) -> str:
        return ARMS[name].title if name in ARMS else f"{SFTS[name][0]} alone"

    found = study(out, [*SFTS, *ARMS])
    table = markdown(found, label)
    if curves := training_curves(out, ARMS, label):
        plot_study(curves, out / "ablations.png")
    write_json(out / "ablations.json", to_json(found))
    write_text(out / "ablations.md", table)
    return table


def ablations(
    out: Path = Path("runs/ablations"),
    seeds: list[int] | None = None,
    arms: list[str] | None = None,
    iterations: PositiveInt | None = None,
    per_kind: PositiveInt | None = None,
    no_tests: bool = False,
    smoke: bool = False,
    table: bool = False,
) -> int:
    """Train the quickstart without parts of reward and recipe, and compare.

    Args:
        out: Folder of the study.
        seeds: By default 0 1 2.
        arms: By default all.
        iterations: Iterations of RL; by default the quickstart's 100.
        per_kind: Held-out scenes of each kind; by default the quickstart's.
        no_tests: Train only; the table has figures of the last iterations.
        smoke: Run every stage once, small; the models learn nothing.
        table: Only write the table of the finished arms.
    """
    arms = arms or list(ARMS)
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise DataError(f"--arms {unknown[0]}: not one of {', '.join(ARMS)}")
    for seed in [] if table else seeds or [0, 1, 2]:
        run = out / f"seed{seed}"
        timing = Timing(run, seed=seed, iterations=iterations or 0, per_kind=per_kind or 0)  # 0: the quickstart's
        wanted = stages(
            run, seed=seed, arms=arms, iterations=iterations, per_kind=per_kind, smoke=smoke, tests=not no_tests
        )
        if code := run_stages(wanted, timing):
            return code
    print(f"\n{write_table(out)}\nwritten to {out}/ablations.md, .json and .png")
    return 0


main = partial(run_verb, ablations, name="ablations")
