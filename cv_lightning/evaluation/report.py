"""The report: one self-contained HTML page that shows what a run did.

The page needs no network and no server: styles, script, data and pictures are inside. Text of models and data is
escaped by the template and set as text by the script; a content security policy allows the page's own script only.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from cv_lightning import __version__
from cv_lightning.evaluation import content
from cv_lightning.evaluation.ablation import FULL, REDUCED
from cv_lightning.evaluation.content import Evaluated
from cv_lightning.evaluation.curves import chart_groups, compared_charts
from cv_lightning.evaluation.gallery import Gallery, GroupSampler, relative_folder
from cv_lightning.evaluation.metrics import summarise
from cv_lightning.evaluation.runs import Run, load_run, stage_label
from cv_lightning.evaluation.statistics import Rate
from cv_lightning.evaluation.training import training_story
from cv_lightning.trajectory import read_groups
from cv_lightning.trajectory.store import finite

LOG = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "templates"
NONE = "\N{EN DASH}"
"""Stands where nothing was measured, and between the ends of an interval."""
SCRIPTS = ("dom.js", "charts.js", "intervals.js", "gallery.js", "viewer.js", "examples.js")
"""Parts of the page's one script, in order."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """How much the page embeds."""

    max_trajectories: int = 600
    """Trajectories in the gallery, over all stores; a stratified sample beyond. The page says how many of how many."""
    max_image_mb: float = 8.0
    """Pictures embedded, in MB; the page links to the files of the others."""
    thumbnail_px: int = 384
    """Longest side of an embedded picture."""

    def __post_init__(self) -> None:
        if self.max_trajectories < 0 or self.max_image_mb < 0 or self.thumbnail_px < 16:
            raise ValueError(
                "--max_trajectories and --max_image_mb must not be negative and --thumbnail_px at least 16, got "
                f"{self.max_trajectories}, {self.max_image_mb}, {self.thumbnail_px}"
            )


def write_report(folder: str | Path, config: ReportConfig | None = None, out: str | Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        folder: the run.
        config: how much is embedded.
        out: the page; by default `report.html` in the run.

    Returns:
        The page's path.

    Raises:
        DataError: no run there, or one of a newer schema.
    """
    run = load_run(folder)
    page = Path(out) if out is not None else run.folder / "report.html"
    html = render_report(run, config or ReportConfig(), page)
    page.parent.mkdir(parents=True, exist_ok=True)
    temporary = page.with_name(page.name + ".tmp")
    temporary.write_text(html, encoding="utf-8", errors="backslashreplace")
    temporary.replace(page)
    return page


def render_report(run: Run, config: ReportConfig, page: Path) -> str:
    """The page's HTML; `page` is where it will stand, for links to whole pictures."""
    gallery = Gallery(config.thumbnail_px, int(config.max_image_mb * 1e6))
    evaluated, bad_lines = _read_stores(run, config, gallery, page)
    style = (TEMPLATES / "report.css").read_text()
    script = '"use strict";\n' + "".join((TEMPLATES / name).read_text() for name in SCRIPTS)
    ablation = content.ablation(run, evaluated)
    num_total = sum(store["total"] for store in gallery.stores)
    data = {
        "stores": gallery.stores,
        "groups": gallery.groups,
        "trajectories": gallery.trajectories,
        "curves": [
            {"stage": stage, "label": stage_label(stage), "groups": chart_groups(curves)}
            for stage, curves in run.curves.items()
        ],
        "compared": compared_charts(run.curves, (FULL, REDUCED)) if ablation else [],
        "intervals": content.interval_rows(evaluated),
        "examples": content.examples(gallery),
    }
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            run=run,
            name=run.folder.resolve().name,
            version=__version__,
            style=Markup(style),
            script=Markup(script),
            policy=_policy(style, script),
            data=finite(data),
            images=gallery.images,
            gallery=gallery,
            lead=content.lead(run, num_total, len(evaluated)),
            evaluated=evaluated,
            headlines=content.headlines(evaluated),
            comparison=content.comparison(evaluated, ("base", "sft", "rl")),
            ablation=ablation,
            story=training_story(run.configs),
            facts=content.facts(run),
            settings=content.settings(run),
            num_shown=len(gallery.trajectories),
            num_total=num_total,
            bad_lines=bad_lines,
        )
    )


def _read_stores(
    run: Run, config: ReportConfig, gallery: Gallery, page: Path
) -> tuple[list[Evaluated], dict[str, int]]:
    """Read every store once: figures of the evaluations, and the gallery's sample."""
    evaluated, bad_lines = [], {}
    shares = _shares([store.is_evaluation for store in run.stores], config.max_trajectories)
    for store, share in zip(run.stores, shares, strict=True):
        sampler = GroupSampler(share)
        reader = read_groups(store.path)
        if store.is_evaluation:
            evaluated.append(Evaluated(store, summarise(sampler.watch(reader))))
        else:
            for _ in sampler.watch(reader):
                pass
        if reader.bad_lines:
            bad_lines[store.label] = len(reader.bad_lines)
        gallery.add_store(
            store.name, store.label, sampler.chosen(), sampler.num_seen, relative_folder(store.path, page)
        )
    return evaluated, bad_lines


def _shares(is_evaluation: list[bool], total: int) -> list[int]:
    """Trajectories of the gallery by store: half for the evaluations where there is training too, split evenly."""
    counts = {True: sum(is_evaluation), False: len(is_evaluation) - sum(is_evaluation)}
    half = total // 2 if all(counts.values()) else total
    return [half // counts[evaluation] for evaluation in is_evaluation]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["rate"] = _rate
    environment.filters["count"] = "{:,}".format
    environment.filters["share"] = lambda value: NONE if value != value else f"{value:.3f}"
    environment.filters["mean"] = lambda value: NONE if value != value else f"{value:.2f}"
    return environment


def _rate(value: Rate | None) -> Markup:
    if value is None or value.n == 0:
        return Markup('<span class="none">{}</span>').format(NONE)
    interval = f"{value.low:.3f}{NONE}{value.high:.3f}"
    return Markup('<b>{:.3f}</b> <span class="range">{}</span>').format(value.value, interval)


def _policy(style: str, script: str) -> str:
    """Content security policy: this style and this script, pictures from the page itself, nothing else."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
