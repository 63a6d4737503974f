"""Runs generated programs in the real sandbox, scores them by the default recipe, and measures what was paid for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from test_reward_sandbox import components, run
from view_attacks import attack_program
from view_legibility import LEGIBLE, Legibility, legibility
from view_programs import Program, honest_program

from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.types import Trajectory


@dataclass
class Trial:
    """What came of a number of programs."""

    programs: int = 0
    paid: int = 0
    illegible: list[str] = field(default_factory=list)
    """Paid although less legible than the honest view: kind and seed, and how legible."""
    unpaid: list[str] = field(default_factory=list)
    """Honest and legible, but not paid."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Paid, by kind."""
    read: int = 0
    """Digits that the classifier reads in what was paid for."""
    read_honest: int = 0
    """Digits that it reads in the honest views of the same."""
    digits: int = 0

    @property
    def lost_accuracy(self) -> float:
        """By how much the classifier's accuracy on what was paid for is below that on the honest views."""
        return (self.read_honest - self.read) / max(1, self.digits)


def attack_trial(sandbox: Sandbox, seed: int, numbers: Iterable[int]) -> Trial:
    """Attacks with the given numbers of a seed."""
    trial = Trial()
    for index in numbers:
        program = attack_program((seed, index))
        trajectory = run(sandbox, program.scene.task, *program.snippets)
        trial.programs += 1
        if components(trajectory)["mandatory"] > 0:
            _take(trial, program, f"{program.kind} {seed}/{index}", _seen(program, trajectory))
    return trial


def honest_trial(sandbox: Sandbox, seed: int, numbers: Iterable[int]) -> Trial:
    """Honest programs with the given numbers of a seed.

    Those whose view is not legible do not count, nor do those that the sandbox does not follow.
    """
    trial = Trial()
    for index in numbers:
        program = honest_program((seed, index))
        if not program.is_followed:
            continue
        trajectory = run(sandbox, program.scene.task, *program.snippets)
        image = trajectory.images[-1].original
        found = legibility(program.scene, image, program.to_source(image.size))
        if found.correlation < LEGIBLE:
            continue
        trial.programs += 1
        name = f"{program.kind} {seed}/{index}"
        if components(trajectory)["mandatory"] > 0:
            _take(trial, program, name, found)
        else:
            trial.unpaid.append(name)
    return trial


def _seen(program: Program, trajectory: Trajectory) -> Legibility:
    """Legibility of what a trajectory was paid for."""
    image = trajectory.last_image_seen
    assert image.to_source is not None
    result = next(turn.result for turn in reversed(trajectory.turns) if turn.result and turn.result.image is not None)
    assert result.effect is not None
    return legibility(program.scene, image.original, image.to_source, result.effect.shown)


def _take(trial: Trial, program: Program, name: str, found: Legibility) -> None:
    trial.paid += 1
    trial.kinds[program.kind] += 1
    trial.read, trial.read_honest = trial.read + found.read, trial.read_honest + found.read_honest
    trial.digits += found.digits
    if found.correlation < LEGIBLE:
        trial.illegible.append(f"{name}: {found.correlation:.2f}")


def trial_figures(seed: int, number: int) -> dict[str, float]:
    """Figures of both trials; prints what would break the bars."""
    with Sandbox(SandboxConfig()) as sandbox:
        attacks, honest = attack_trial(sandbox, seed, range(number)), honest_trial(sandbox, seed, range(number))
    for line in (*attacks.illegible, *honest.unpaid):
        print("  ", line)
    return {
        "attacks": attacks.programs,
        "attacks_paid": attacks.paid,
        "attacks_paid_illegible": len(attacks.illegible),
        "attacks_lost_accuracy": attacks.lost_accuracy,
        "honest": honest.programs,
        "honest_unpaid_frac": len(honest.unpaid) / max(1, honest.programs),
        "honest_accuracy": honest.read / max(1, honest.digits),
        "honest_view_accuracy": honest.read_honest / max(1, honest.digits),
    }
