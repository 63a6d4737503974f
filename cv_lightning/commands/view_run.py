"""`cv-lightning view RUN`: the report of a run in the browser, while the run continues."""

from __future__ import annotations

import os
import webbrowser
from functools import partial
from pathlib import Path

from cv_lightning.command_line import run_verb
from cv_lightning.types import DataError


def view(run: Path, port: int = 8765, no_browser: bool = False, max_trajectories: int = 5000) -> None:
    """Show a run in the browser, also one that is still training; only this machine can reach the page.

    Args:
        run: The run's folder.
        port: Port of the page; the next free one if it is taken; 0: any.
        no_browser: Do not open a browser.
        max_trajectories: Most trajectories of the page; of more it shows a stratified sample.
    """
    from cv_lightning.digits.report import sections_of
    from cv_lightning.viewer.live import LiveReport, serve_report
    from cv_lightning.viewer.report import ReportConfig

    if not 0 <= port <= 65535:
        raise DataError(f"--port {port}: must be between 0 and 65535")
    if not run.is_dir():
        raise DataError(f"{run}: no such folder; give the one that fit or test writes (runs/...)")
    config = ReportConfig(max_trajectories=max_trajectories, max_image_mb=0.0)
    can_open = not no_browser and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    serve_report(LiveReport(run, config, sections_of), port, webbrowser.open if can_open else None)


main = partial(run_verb, view, name="view")
