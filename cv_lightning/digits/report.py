"""Sections that the report adds for a run of the quickstart."""

from __future__ import annotations

from collections.abc import Sequence

from cv_lightning.digits.rotations import LABELS, unnecessary_rotations
from cv_lightning.digits.scenes import ALL_KINDS
from cv_lightning.digits.stages import FULL, NOT_SECONDS, REDUCED, STAGES, read_timing, training_minutes
from cv_lightning.digits.training import training_story
from cv_lightning.evaluation.curves import compared_charts
from cv_lightning.evaluation.runs import Run
from cv_lightning.viewer.content import SMOKE, EvaluatedStore, RunSections, Section, stage_table


def sections_of(run: Run) -> RunSections:
    """Sections of a run: the quickstart's if there is a `timing.json`, else those of any run."""
    return QuickstartSections(run) if (run.folder / "timing.json").is_file() else RunSections(run)


class QuickstartSections(RunSections):
    """Training of SFT and RL, and the same RL without process reward for comparison."""

    stages = STAGES
    kinds = ALL_KINDS
    apart = (REDUCED,)
    data_names = dict.fromkeys(("DigitTaskDataModule", "DigitSFTDataModule"), "handwritten digits")
    settings = (
        *("tool_share", "direct_turned", "direct_small", "needless_share"),
        *("warm_up_share", "warm_up_conversations_per_step"),
    )

    def title(self) -> str:
        """What the quickstart trains on what."""
        return "Quickstart: SFT and GRPO of a tiny model on handwritten digits"

    def banner(self) -> str:
        """A smoke run says so: `timing.json` has the flag."""
        return SMOKE.format("quickstart --smoke") if read_timing(self.run.folder).get("smoke") else super().banner()

    def lead(self) -> list[str]:
        """Seed and minutes."""
        timing = read_timing(self.run.folder)
        found = [f"Seed {timing['seed']:.0f}."] if "seed" in timing else []
        if (minutes := training_minutes(timing)) is not None:
            found.append(f"SFT, RL and their evaluations took {minutes:.1f} minutes.")
        return found

    def facts(self) -> list[tuple[str, str]]:
        """Time by stage, and ranks."""
        timing = read_timing(self.run.folder)
        seconds = {name: value for name, value in timing.items() if name not in NOT_SECONDS}
        parts = [f"{name.replace('_', ' ')} {_duration(value)}" for name, value in seconds.items()]
        found = [("time", ", ".join(parts))] if parts else []
        return found + ([("ranks", f"{timing['ranks']:.0f}")] if timing.get("ranks") else [])

    def sections(self, evaluated: Sequence[EvaluatedStore]) -> list[Section]:
        """Training and ablation, where there are any."""
        story = training_story(self.run.configs)
        found = [Section(id="training", title="How it was trained", texts=story)] if story else []
        curves = self.run.curves
        table = stage_table(evaluated, (FULL, REDUCED), self)
        has_table = table is not None and any(column.stage == REDUCED for column in table.columns)
        if has_table or REDUCED in curves:
            found.append(
                Section(
                    id="ablation",
                    title="With and without process reward",
                    lead="The same RL from the same SFT model, once more with the accuracy and format reward only.",
                    table=table if has_table else None,
                    rows_title="Unnecessary rotations on upright images while sampling for training",
                    rows=[
                        (entry.label, f"{100 * entry.mean:.1f} %", entry.note)
                        for entry in unnecessary_rotations(curves)
                    ],
                    charts=compared_charts({self.label(stage): curves.get(stage, []) for stage in LABELS}),
                )
            )
        return found


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
