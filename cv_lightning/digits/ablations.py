"""`python -m cv_lightning ablations`: which part of reward and recipe does what, on handwritten digits.

Every arm is the quickstart's GRPO with one thing changed, from the SFT checkpoint of its seed, tested on the same
held-out scenes. Each seed has a folder and a `timing.json` of its own: an interrupted study goes on where it was cut
off, and seeds can run side by side.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from jsonargparse.typing import PositiveInt

from cv_lightning.command_line import run_verb
from cv_lightning.digits.quickstart import (
    CONFIGS,
    SMOKE_RL,
    SMOKE_SFT,
    SMOKE_TEST,
    Stage,
    Timing,
    fit_stage,
    run_stages,
    test_stage,
)
from cv_lightning.digits.scenes import KINDS
from cv_lightning.files import write_text
from cv_lightning.types import DataError


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One variant of the quickstart's RL."""

    title: str
    reward: str | None = None
    """Reward config; None: the quickstart's."""
    sft: str | None = "sft"
    """Name in `SFTS` of what RL starts from; None: random weights."""


ARMS = {
    "full": Arm(title="quickstart's reward"),
    "no_process": Arm(title="no process reward", reward="configs/ablations/no_process.yaml"),
    "no_penalty": Arm(title="no penalty", reward="configs/ablations/no_penalty.yaml"),
    "no_sft": Arm(title="RL without SFT", sft=None),
    "paper": Arm(title="paper's reward", reward="configs/reward/paper.yaml"),
    "reference": Arm(title="released code's reward", reward="configs/reward/reference.yaml"),
    "rare": Arm(title="quickstart's reward after SFT that seldom shows the tool", sft="sft_rare"),
    "rare_no_process": Arm(
        title="no process reward after SFT that seldom shows the tool",
        reward="configs/ablations/no_process.yaml",
        sft="sft_rare",
    ),
    "needless": Arm(title="quickstart's reward after SFT with needless turns", sft="sft_needless"),
    "needless_no_penalty": Arm(
        title="no penalty after SFT with needless turns", reward="configs/ablations/no_penalty.yaml", sft="sft_needless"
    ),
}
SFTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sft": ("SFT", ()),
    "sft_rare": ("SFT that seldom shows the tool", ("--data.init_args.demonstrations.tool_share", "0.05")),
    "sft_needless": ("SFT with needless turns", ("--data.init_args.demonstrations.needless_share", "0.5")),
}
"""Title and options of each SFT. The quickstart's own shows the tool in a third of the tasks that need it, so that
right answers alone lead to it, and never calls without need, so that a penalty has nothing to do. The second shows it
in a twentieth; the third turns half of the upright pictures first, for no reason."""


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
        run: the seed's folder.
        seed: of weights, training scenes and samples; the held-out scenes are the same for all.
        arms: names of `ARMS`.
        iterations: of RL; None: the quickstart's number.
        per_kind: held-out scenes of each kind; None: the quickstart's numbers.
        smoke: a few steps of each.
        tests: test every arm on held-out scenes, too.
    """
    digits = ["--seed_everything", str(seed), "--data.init_args.digits.seed", str(seed)]
    rl = ["--rollout.sampling.seed", str(seed), *(SMOKE_RL if smoke else [])]
    if iterations is not None:
        rl += ["--data.init_args.num_iterations", str(iterations)]
    test = list(SMOKE_TEST) if smoke else []
    if per_kind is not None:
        test = ["--data.init_args.test_tasks", json.dumps(dict.fromkeys(KINDS, per_kind))]
    tiny = ["tiny", "--out", f"{run}/tiny", "--seed", str(seed), "--prompt", f"{CONFIGS}/prompt.yaml"]
    found = [
        Stage(name="tiny", title="a tiny model with random weights", arguments=tiny, writes=[run / "tiny"]),
    ]
    for sft, (title, options) in SFTS.items():
        if sft not in {ARMS[name].sft for name in arms}:
            continue
        found.append(fit_stage(sft, title, run, "tiny", [*digits, *(SMOKE_SFT if smoke else []), *options]))
        found += [test_stage(sft, run, seed, test)] if tests else []
    for name in arms:
        arm = ARMS[name]
        start = f"{arm.sft}/model" if arm.sft else "tiny"
        reward = ["--rollout.reward", arm.reward] if arm.reward else []
        found.append(fit_stage(name, f"GRPO: {arm.title}", run, start, [*digits, *rl, *reward], config="grpo"))
        found += [test_stage(name, run, seed, test)] if tests else []
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
    for name, text in (("ablations.json", json.dumps(to_json(found), indent=1) + "\n"), ("ablations.md", table)):
        write_text(out / name, text)
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
    """Train the quickstart with parts of reward and recipe taken away, and compare.

    Args:
        out: folder of the study.
        seeds: by default 0 1 2.
        arms: by default all.
        iterations: of RL; by default the quickstart's 100.
        per_kind: held-out scenes of each kind; by default the quickstart's.
        no_tests: train only: figures of the last iterations.
        smoke: every stage once, small; nothing can be learned from it.
        table: only write the table of what is finished.
    """
    arms = arms or list(ARMS)
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise DataError(f"--arms {unknown[0]}: not one of {', '.join(ARMS)}")
    if not CONFIGS.is_dir():
        raise DataError(f"{CONFIGS} is not here; run it in the project's folder")
    try:
        for seed in [] if table else seeds or [0, 1, 2]:
            run = out / f"seed{seed}"
            wanted = stages(
                run,
                seed=seed,
                arms=arms,
                iterations=iterations,
                per_kind=per_kind,
                smoke=smoke,
                tests=not no_tests,
            )
            if code := run_stages(run, wanted, _timing(run, seed, iterations, per_kind)):
                return code
        sys.stdout.write(f"\n{write_table(out)}\nwritten to {out}/ablations.md, .json and .png\n")
    except KeyboardInterrupt:
        sys.stdout.write("\nstopped; the same command continues with the stage that was cut off\n")
        return 130
    return 0


def main(args: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    return run_verb(ablations, args, prog="cv_lightning ablations", failed=1)


def _timing(run: Path, seed: int, iterations: int | None, per_kind: int | None) -> Timing:
    """The timing of a seed's folder, which must have been made with the same settings."""
    run.mkdir(parents=True, exist_ok=True)
    timing = Timing(run)
    for name, value in (("seed", seed), ("iterations", iterations or 0), ("per_kind", per_kind or 0)):
        if timing.values.get(name, value) != value:
            raise DataError(
                f"{run} was made with --{name.replace('_', '-')} {timing.values[name]:.0f}, not {value} (0: the "
                "quickstart's); arms that are to be compared need the same, so choose another --out"
            )
        timing.set(name, value)
    return timing
