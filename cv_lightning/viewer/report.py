"""The report: one self-contained HTML page with the results, curves and trajectories of a run.

The page needs no network and no server: it holds styles, script, data and images (images beyond a limit are loaded from
the run's folder). Text of models and data is escaped by the template and set as text by the script; a content security
policy allows the page's own script only.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import jinja2
from markupsafe import Markup

from cv_lightning.evaluation.curves import chart_groups
from cv_lightning.evaluation.metrics import EvalSummary, summarise
from cv_lightning.evaluation.runs import Curve, Run, Store, load_run
from cv_lightning.evaluation.statistics import Rate
from cv_lightning.files import write_text
from cv_lightning.ranges import NonNegativeFloat, NonNegativeInt, Range, check_ranges
from cv_lightning.trajectory import BadLine, read_groups
from cv_lightning.trajectory.codec import finite
from cv_lightning.trajectory.store import LINES
from cv_lightning.types import Group
from cv_lightning.viewer import content
from cv_lightning.viewer.content import EvaluatedStore, RunSections
from cv_lightning.viewer.findings import findings_of
from cv_lightning.viewer.gallery import Gallery, GroupSampler, relative_folder
from cv_lightning.viewer.overview import files_of, parts_of, settings_table, stored_text, title_of
from cv_lightning.viewer.pages import TEMPLATES, environment, render

LOG = logging.getLogger(__name__)
NONE = "\N{EN DASH}"
"""Sign for a missing value, and between the ends of an interval."""
SCRIPTS = ("dom.js", "charts.js", "intervals.js", "gallery.js", "viewer.js", "examples.js", "live.js", "start.js")
"""Parts of the page's script, in order."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Limits on what the page embeds."""

    max_trajectories: NonNegativeInt = 5000
    """Trajectories in the gallery over all stores; a stratified sample if there are more."""
    max_image_mb: NonNegativeFloat = 8.0
    """Embedded images in MB; the page loads the others from the run's folder when they are shown."""
    thumbnail_px: Annotated[int, Range(at_least=16)] = 384
    """Longest side of an embedded image."""

    def __post_init__(self) -> None:
        check_ranges(self)


def write_report(
    folder: str | Path,
    config: ReportConfig | None = None,
    out: str | Path | None = None,
    sections_of: Callable[[Run], RunSections] = RunSections,
) -> Path:
    """Write the report of a run, by default to `report.html` in its folder; returns the page's path.

    `sections_of` makes an application's additions.

    Raises:
        DataError: The folder holds no run, or one of a newer schema.
    """
    run = load_run(folder)
    page = Path(out) if out is not None else run.folder / "report.html"
    html = Report(run, config or ReportConfig(), page, sections_of(run)).html()
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, html, errors="backslashreplace")
    return page


@dataclass(slots=True, kw_only=True)
class StoreContent:
    """The content of one store on the page."""

    figures: EvalSummary | None
    """Figures of an evaluation; None for a store of training."""
    groups: list[Group]
    """The gallery's sample."""
    num_seen: int
    """Trajectories that the sample was drawn from."""
    bad_lines: list[BadLine]


@dataclass(slots=True)
class StoreCache:
    """Content of stores by the state of their files, so that a live page reads only changed stores."""

    _known: dict[Path, tuple[object, StoreContent]] = field(default_factory=dict)

    def read(self, store: Store, most: int) -> StoreContent:
        """The content of a store, with a sample of at most `most` trajectories."""
        state = (most, file_state((store.path / LINES).glob("*.jsonl")))
        known = self._known.get(store.path)
        if known is None or known[0] != state:
            known = self._known[store.path] = (state, _read_store(store, most))
        return known[1]


def file_state(paths: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """Name, size and modification time of files; one that was removed meanwhile is left out."""
    found = []
    for path in sorted(paths):
        with suppress(FileNotFoundError):
            status = path.stat()
            found.append((str(path), status.st_size, status.st_mtime_ns))
    return tuple(found)


def _read_store(store: Store, most: int) -> StoreContent:
    sampler = GroupSampler(most)
    reader = read_groups(store.path)
    figures = summarise(sampler.watch(reader)) if store.is_evaluation else None
    if figures is None:
        for _ in sampler.watch(reader):
            pass
    return StoreContent(figures=figures, groups=sampler.chosen(), num_seen=sampler.num_seen, bad_lines=reader.bad_lines)


class Report:
    """The page of a run, as HTML and as the data that its script draws.

    `page` is its path, from which images that are not embedded are linked; `cache` holds content that was read before.
    A live page asks its server for new data.
    """

    def __init__(
        self,
        run: Run,
        config: ReportConfig,
        page: Path,
        app: RunSections,
        cache: StoreCache | None = None,
        *,
        is_live: bool = False,
    ) -> None:
        self.run = run
        self.app = app
        self.page = page
        self.is_live = is_live
        self.parts = parts_of(run, app.data_names)
        self.title = app.title() or title_of(self.parts, run.folder.resolve().name)
        self.gallery = Gallery(config.thumbnail_px, int(config.max_image_mb * 1e6))
        self.evaluated: list[EvaluatedStore] = []
        self.bad_lines: dict[str, Counter[str]] = {}
        found = _read_stores(run.stores, config.max_trajectories, cache or StoreCache())
        for store in sorted(run.stores, key=self._order):
            self._add(store, found[store.path], page)
        self.sections = app.sections(self.evaluated)
        self.findings = findings_of(run, ended=not any(part.status == "running" for part in self.parts))

    def _order(self, store: Store) -> tuple[Any, ...]:
        """Sort key: evaluations first, greedy before sampled, then by stage, with the tool before without."""
        return (
            not store.is_evaluation,
            store.is_evaluation and not store.mode,
            store.mode == "sampled",
            self.app.stage_order(store.stage if store.is_evaluation else store.name),
            not store.tool,
        )

    def _add(self, store: Store, found: StoreContent, page: Path) -> None:
        label = store.label_with(self.app.stages)
        if found.figures is not None:
            self.evaluated.append(EvaluatedStore(store, found.figures, label))
        if found.bad_lines:
            self.bad_lines[label] = Counter(_why(line) for line in found.bad_lines)
        folder = relative_folder(store.path, page)
        self.gallery.add_store(store.name, label, found.groups, found.num_seen, folder)

    @cached_property
    def num_total(self) -> int:
        """Trajectories in all stores."""
        return sum(store["total"] for store in self.gallery.stores)

    def _label(self, stage: str) -> str:
        """Name of a training for people; the only one of a run is named by its method."""
        methods = [part.method for part in self.parts if (part.stage, part.verb) == (stage, "fit")]
        return methods[0] if methods and stage == "run" else self.app.label(stage)

    def _stored(self) -> list[str]:
        """How many trajectories each training stored, of how many that were rolled out."""
        stored = {store["name"]: store["total"] for store in self.gallery.stores}
        rolled = [part for part in self.parts if part.rolled_out]
        return [
            stored_text(part, self._label(part.stage), stored.get("." if part.stage == "run" else part.stage, 0))
            for part in rolled
        ]

    @cached_property
    def data(self) -> dict[str, Any]:
        """JSON values that the page's script draws."""
        curves = self.run.curves
        found = {
            "stores": self.gallery.stores,
            "groups": self.gallery.groups,
            "trajectories": self.gallery.trajectories,
            "codes": self.gallery.codes,
            "curves": [
                {
                    "stage": stage,
                    "label": self.app.label(stage),
                    "axis": _axis(curves[stage]),
                    "groups": chart_groups(curves[stage]),
                }
                for stage in sorted(curves, key=self.app.stage_order)
            ],
            "compared": [chart for section in self.sections for chart in section.charts],
            "intervals": content.interval_rows(self.evaluated, self.app),
            "examples": content.examples(self.gallery, self.evaluated, self.app),
            "lead": content.lead(self.run, self.num_total, len(self.evaluated), self.app),
            "stored": self._stored(),
            "progress": [[part.progress, part.status] for part in self.parts],
            "live": self.is_live,
        }
        # The script does not draw these parts; a page has to be loaded again when they change.
        written = [found["intervals"], found["examples"], self.bad_lines, bool(self.num_total), bool(curves)]
        written.append({stage: [each.name for each in listed] for stage, listed in self.findings.items()})
        written += [[part.status, part.started] for part in self.parts]
        found["fixed"] = hashlib.sha256(json.dumps(written, default=str).encode()).hexdigest()[:16]
        cleaned: dict[str, Any] = finite(found)
        return cleaned

    def html(self) -> str:
        """The whole page."""
        run, gallery = self.run, self.gallery
        return render(
            _environment().get_template("report.html.jinja"),
            kind="report",
            title=self.title,
            script='"use strict";\n' + "".join((TEMPLATES / name).read_text() for name in SCRIPTS),
            policy="connect-src 'self'; " if self.is_live else "",
            run=run,
            banner=self.app.banner(),
            parts=self.parts,
            labels={part.stage: self.app.label(part.stage) for part in self.parts},
            data=self.data,
            images=gallery.images,
            gallery=gallery,
            evaluated=self.evaluated,
            headlines=content.headlines(self.evaluated, self.app),
            comparison=content.stage_table(self.evaluated, self.app.main_stages(self.evaluated), self.app),
            sections=self.sections,
            findings={self._label(stage): found for stage, found in self.findings.items()},
            facts=content.facts(run, self.app),
            settings=content.settings(run, self.app) if not any(part.changed for part in self.parts) else [],
            changed=settings_table(self.parts, {part.stage: self.app.label(part.stage) for part in self.parts}),
            files=files_of(run, None if self.is_live else relative_folder(run.folder, self.page)),
            num_shown=len(gallery.trajectories),
            num_total=self.num_total,
            bad_lines=self.bad_lines,
        )


def _axis(curves: Sequence[Curve]) -> str:
    """Name of the horizontal axis of a training's curves."""
    return "iteration" if any(curve.name.startswith("rollout/") for curve in curves) else "step"


def _why(line: BadLine) -> str:
    """Reason of an unreadable line, for people."""
    return "of an older schema" if "older than" in line.reason else "torn or damaged"


def _read_stores(stores: Sequence[Store], most: int, cache: StoreCache) -> dict[Path, StoreContent]:
    """Contents by path. If there are evaluations, training gets at most half of the sample."""
    training = [store for store in stores if not store.is_evaluation]
    evaluations = [store for store in stores if store.is_evaluation]
    half = most // 2 if evaluations else most
    found = {store.path: cache.read(store, half // len(training)) for store in training}
    left = most - sum(len(group.trajectories) for content in found.values() for group in content.groups)
    return found | {store.path: cache.read(store, max(0, left) // len(evaluations)) for store in evaluations}


def _environment() -> jinja2.Environment:
    templates = environment()
    templates.filters["rate"] = _rate
    templates.filters["count"] = "{:,}".format
    templates.filters["share"] = lambda value: NONE if value != value else f"{value:.3f}"
    templates.filters["mean"] = lambda value: NONE if value != value else f"{value:.2f}"
    return templates


def _rate(value: Rate | None) -> Markup:
    if value is None or value.n == 0:
        return Markup('<span class="none">{}</span>').format(NONE)
    interval = f"{value.low:.3f}{NONE}{value.high:.3f}"
    return Markup('<b>{:.3f}</b> <span class="range">{}</span>').format(value.value, interval)
