"""The report: one self-contained HTML page that shows what a run did.

The page needs no network and no server: styles, script, data and pictures are inside. Text of models and data is
escaped by the template and set as text by the script; a content security policy allows the page's own script only.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cv_lightning import __version__
from cv_lightning.evaluation.curves import chart_groups
from cv_lightning.evaluation.gallery import Gallery, GroupSampler, relative_folder
from cv_lightning.evaluation.metrics import EvalSummary, summarise
from cv_lightning.evaluation.runs import EVALUATION_NAME, Run, Store, load_run, parity_max
from cv_lightning.evaluation.statistics import Rate
from cv_lightning.trajectory import read_groups
from cv_lightning.trajectory.store import finite

LOG = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("dom.js", "charts.js", "gallery.js", "viewer.js")
"""Parts of the page's one script, in order."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """How much the page embeds."""

    max_trajectories: int = 600
    """Trajectories in the gallery, over all stores; a stratified sample beyond. The page says how many of how many."""
    max_image_mb: float = 16.0
    """Pictures embedded, in MB; the page links to the files of the others."""
    thumbnail_px: int = 384
    """Longest side of an embedded picture."""

    def __post_init__(self) -> None:
        if self.max_trajectories < 0 or self.max_image_mb < 0 or self.thumbnail_px < 16:
            raise ValueError(
                "--max_trajectories and --max_image_mb must not be negative and --thumbnail_px must be at least 16, got "
                f"{self.max_trajectories}, {self.max_image_mb}, {self.thumbnail_px}"
            )


@dataclass(slots=True)
class Evaluated:
    """One evaluation of the run, for the tables."""

    store: Store
    figures: EvalSummary

    @property
    def key(self) -> tuple[str, str, str]:
        """(stage, mode, tool) of a quickstart evaluation; the store's name otherwise."""
        match = EVALUATION_NAME.fullmatch(self.store.name.removeprefix("eval/"))
        return (match["stage"], match["mode"], match["tool"]) if match else (self.store.name, "", "tool")


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
    data = {
        "stores": gallery.stores,
        "groups": gallery.groups,
        "trajectories": gallery.trajectories,
        "curves": {stage: chart_groups(curves) for stage, curves in run.curves.items()},
        "intervals": _interval_rows(evaluated),
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
            evaluated=evaluated,
            headlines=_headlines(evaluated),
            facts=_facts(run),
            settings=_settings(run),
            num_shown=len(gallery.trajectories),
            num_total=sum(store["total"] for store in gallery.stores),
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
    environment.filters["share"] = lambda value: "–" if value != value else f"{value:.3f}"
    environment.filters["mean"] = lambda value: "–" if value != value else f"{value:.2f}"
    return environment


def _rate(value: Rate) -> Markup:
    if value.n == 0:
        return Markup('<span class="none">–</span>')
    return Markup('<b>{:.3f}</b> <span class="range">{:.3f}–{:.3f}</span>').format(value.value, value.low, value.high)


def _policy(style: str, script: str) -> str:
    """Content security policy: this style and this script, pictures from the page itself, nothing else."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


# ------------------------------------------------------------------------------------------------ content
def _headlines(evaluated: list[Evaluated]) -> list[dict[str, Any]]:
    """Before and after: the greedy (else sampled) figures of SFT and of RL, where both were evaluated."""
    by_key = {entry.key: entry.figures for entry in evaluated}
    for mode in ("greedy", "sampled"):
        before, after = by_key.get(("sft", mode, "tool")), by_key.get(("rl", mode, "tool"))
        if before and after:
            off = by_key.get(("rl", mode, "notool"))
            tasks = f"{after.accuracy.n} held-out tasks that need the tool, {mode}"
            return [
                {
                    "title": "Uses the tool as needed",
                    "before": before.must_use,
                    "after": after.must_use,
                    "note": f"must-use: answered on an upright image after a fitting crop; {tasks}",
                },
                {
                    "title": "Accuracy",
                    "before": before.accuracy,
                    "after": after.accuracy,
                    "note": f"{tasks}" + (f"; with the tool switched off {off.accuracy.value:.3f}" if off else ""),
                },
                {
                    "title": "Turns upright images for nothing",
                    "before": before.spurious,
                    "after": after.spurious,
                    "note": f"share of {after.spurious.n} upright tasks, {mode}",
                },
            ]
    return []


def _interval_rows(evaluated: list[Evaluated]) -> list[dict[str, Any]]:
    """By kind and evaluation: the numbers of the interval charts."""
    rows = []
    for entry in evaluated:
        stage, mode, tool = entry.key
        for kind, figures in entry.figures.by_kind.items():
            for name in ("accuracy", "must_use"):
                found: Rate = getattr(figures, name)
                if found.n and (name == "accuracy" or tool == "tool"):
                    rows.append(
                        {
                            "metric": name,
                            "kind": kind,
                            "label": entry.store.label,
                            "stage": stage,
                            "mode": mode,
                            "off": tool == "notool",
                            "rate": found,
                        }
                    )
    return rows


def _facts(run: Run) -> list[tuple[str, str]]:
    """What the run was, in a line each."""
    facts = []
    if run.timing:
        parts = [f"{name} {seconds / 60:.1f} min" for name, seconds in run.timing.items() if name != "seed"]
        facts.append(("time", ", ".join(parts)))
    for curves in run.curves.values():
        if (parity := parity_max(curves)) is not None:
            facts.append(("engine versus trainer, largest difference of log-probabilities", f"{parity:.1e}"))
    record = next(iter(run.records.values()), {})
    for name in ("commit", "started", "python", "devices"):
        if record.get(name):
            value = record[name]
            facts.append((name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    if isinstance(record.get("versions"), dict):
        facts.append(("versions", ", ".join(f"{name} {number}" for name, number in record["versions"].items())))
    return facts


SETTING = re.compile(
    r"^\s*(tool_share|direct_turned|direct_small|needless_share|warm_up_\w+|temperature|num_samples|lr|seed_everything"
    r"|total_seconds|max_seconds|kl_weight|num_minibatches|weights):\s*(\S.*)$"
)


def _settings(run: Run) -> list[tuple[str, str, str]]:
    """(config file, key, value) of the settings a reader asks for first; the whole files stand below them."""
    found = []
    for path, text in run.configs.items():
        for line in text.splitlines():
            if (match := SETTING.match(line)) and match[2] not in ("null", "{}"):
                found.append((path, match[1], match[2]))
    return list(dict.fromkeys(found))
