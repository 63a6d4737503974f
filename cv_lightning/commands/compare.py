"""`cv-lightning compare A B`: two evaluations question by question, as tables, a page and JSON."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from cv_lightning.command_line import run_verb
from cv_lightning.types import CVLightningError


def compare_evaluations(a: Path, b: Path, out: Path | None = None, max_flips: int = 30) -> None:
    """Compare two evaluations of the same questions.

    Args:
        a: Folder of one evaluation, RUN/eval/NAME.
        b: Folder of the other.
        out: Folder of compare.html and compare.json; by default beside B.
        max_flips: Most questions that change from wrong to correct, or back, whose trajectories the page shows.
    """
    from cv_lightning.evaluation.compare import compare, comparison_tables, load_evaluation
    from cv_lightning.evaluation.tables import print_grids
    from cv_lightning.viewer.compare_page import title_of, write_comparison

    if max_flips < 0:
        raise CVLightningError(f"--max_flips {max_flips}: a number of questions, or 0 for none")
    first, second = load_evaluation(a), load_evaluation(b)
    found = compare(first, second, (str(a), str(b)))
    folder = out or b.resolve().parent / f"compare_{a.resolve().name}_{b.resolve().name}"
    write_comparison(found, first, second, folder, max_flips)
    print_grids(
        comparison_tables(found),
        before=f"A: {a}\nB: {b}\n{found.matching}\n{title_of(found)}: {found.verdict.text}",
        after=f"{len(found.gained)} questions gained, {len(found.lost)} lost\n"
        f"{(folder / 'compare.html').resolve().as_uri()}, compare.json beside it",
    )


main = partial(run_verb, compare_evaluations, name="compare")
