"""`python -m cv_lightning ablations`: which part of reward and recipe does what, on handwritten digits.

Every arm is the quickstart's GRPO with one thing changed, from the SFT checkpoint of its seed, tested on the same
held-out scenes. Each seed has a folder and a `timing.json` of its own: an interrupted study goes on where it was cut
off, and seeds can run side by side.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

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
from cv_lightning.files import write_text
from cv_lightning.types import CVLightningError


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
KINDS = ("upright", "turned", "small", "turned_and_small")


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


def main(args: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(prog="ablations", description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="default runs/ablations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default all")
    parser.add_argument("--iterations", type=int, help="of RL (default the quickstart's 100)")
    parser.add_argument("--per-kind", type=int, help="held-out scenes of each kind (default the quickstart's)")
    parser.add_argument("--no-tests", action="store_true", help="train only: figures of the last iterations")
    parser.add_argument("--smoke", action="store_true", help="every stage once, small; nothing can be learned from it")
    parser.add_argument("--table", action="store_true", help="only write the table of what is finished")
    given = parser.parse_args(args)
    for name in ("iterations", "per_kind"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(given, name)} must be at least 1")
    if not CONFIGS.is_dir():
        parser.error(f"{CONFIGS} is not here; run it in the project's folder")
    try:
        for seed in [] if given.table else given.seeds:
            if code := _run_seed(given, seed):
                return code
        sys.stdout.write(f"\n{write_table(given.out)}\nwritten to {given.out}/ablations.md, .json and .png\n")
    except CVLightningError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stdout.write("\nstopped; the same command goes on with the stage that was cut off\n")
        return 130
    return 0


def _run_seed(given: argparse.Namespace, seed: int) -> int:
    run: Path = given.out / f"seed{seed}"
    run.mkdir(parents=True, exist_ok=True)
    timing = Timing(run)
    for name, value in (("seed", seed), ("iterations", given.iterations or 0), ("per_kind", given.per_kind or 0)):
        if timing.values.get(name, value) != value:
            raise CVLightningError(
                f"{run} was made with --{name.replace('_', '-')} {timing.values[name]:.0f}, not {value} (0: the "
                "quickstart's); arms that are to be compared need the same, so choose another --out"
            )
        timing.set(name, value)
    wanted = stages(
        run,
        seed=seed,
        arms=given.arms,
        iterations=given.iterations,
        per_kind=given.per_kind,
        smoke=given.smoke,
        tests=not given.no_tests,
    )
    return run_stages(run, wanted, timing)
