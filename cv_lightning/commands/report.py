"""`cv-lightning report RUN`: one self-contained page, RUN/report.html."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from cv_lightning.command_line import run_verb
from cv_lightning.digits.report import sections_of
from cv_lightning.viewer.report import ReportConfig, write_report


def report(
    run: Path, out: Path | None = None, max_trajectories: int = 5000, max_image_mb: float = 8.0, thumbnail_px: int = 384
) -> None:
    """Write a page that shows what a run did: results, curves, and trajectories with their images.

    Args:
        run: The run's folder.
        out: The page; by default report.html in the run.
        max_trajectories: Most trajectories of the page; of more it shows a stratified sample and their number.
        max_image_mb: Most megabytes of embedded images; the page loads the others from the run's folder.
        thumbnail_px: Longest side of an embedded image.
    """
    config = ReportConfig(max_trajectories=max_trajectories, max_image_mb=max_image_mb, thumbnail_px=thumbnail_px)
    page = write_report(run, config, out, sections_of)
    print(f"{page.resolve().as_uri()}  ({page.stat().st_size / 1e6:.1f} MB)")


main = partial(run_verb, report, name="report")
