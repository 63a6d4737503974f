"""The files of a finished evaluation: JSON with everything that reproduces it, a Markdown page, a figure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cv_lightning.evaluation.breakdown import breakdown
from cv_lightning.evaluation.metrics import summarise_outcomes
from cv_lightning.evaluation.outcome import Outcome
from cv_lightning.evaluation.paired import PairedSummary, pair_outcomes, summarise_pairs
from cv_lightning.evaluation.published import published_on
from cv_lightning.evaluation.tables import (
    Evaluated,
    Grid,
    corruption_table,
    main_table,
    published_table,
    split_table,
    tool_table,
    transform_table,
)
from cv_lightning.files import write_text

WHOLE_BYTES = 16 << 20
"""Files up to this size are read as a whole for their fingerprint."""
NUM_PIECES, PIECE_BYTES = 512, 16 << 10
"""Number and size of the evenly spread pieces that are read of larger files: adapters on a few layers change neither
the first nor the last weights of a file."""
FINGERPRINTED = (".safetensors", ".json", ".jinja", ".pt", ".bin", ".ckpt")
"""Files of a checkpoint's folder that its results depend on."""


def evaluated(outcomes: Sequence[Outcome]) -> Evaluated:
    """All figures of an evaluation; the order of the outcomes does not matter."""
    ordered = sorted(outcomes, key=lambda outcome: (outcome.task_id, outcome.sample))
    return Evaluated(summarise_outcomes(ordered), breakdown(ordered))


def tool_pairs(outcomes: Mapping[str, Sequence[Outcome]], without: Mapping[str, str]) -> dict[str, PairedSummary]:
    """The same questions with and without the tool, by the name of the evaluation with it.

    Args:
        outcomes: Outcomes by name of the evaluation.
        without: Name of the evaluation without the tool, by that of the same with it.
    """
    return {name: summarise_pairs(pair_outcomes(outcomes[other], outcomes[name])) for name, other in without.items()}


def tables(found: Mapping[str, Evaluated], pairs: Mapping[str, PairedSummary], note: str = "") -> list[Grid]:
    """Every table that is not empty; the note goes under the first."""
    sources = list(dict.fromkeys(source for entry in found.values() for source in entry.breakdown.by_source))
    grids = [
        main_table(found, note),
        transform_table(found),
        corruption_table(found),
        split_table(found, "by_source", "By data source"),
        split_table(found, "by_category", "By category"),
        tool_table(pairs),
        *(published_table(source, found) for source in sources),
    ]
    return [grid for grid in grids if grid is not None]


def write_results(
    folder: Path,
    prefix: str,
    found: Mapping[str, Evaluated],
    pairs: Mapping[str, PairedSummary],
    config_fingerprint: Mapping[str, Any],
    note: str = "",
) -> list[Grid]:
    """Write `<prefix>results.json`, `.md` and `.png` into a folder.

    Args:
        folder: `<run>/eval`.
        prefix: Prefix of the names.
        found: Figures by name of the evaluation.
        pairs: Comparisons with and without the tool.
        config_fingerprint: Model, data, settings, config and versions that reproduce the evaluation.
        note: A note on the data for the page.

    Returns:
        The tables of the Markdown page.
    """
    from cv_lightning.evaluation.plots import plot_results

    sources = dict.fromkeys(source for entry in found.values() for source in entry.breakdown.by_source)
    published = [entry for source in sources for entry in published_on(source)]
    value = {
        "about": dict(config_fingerprint),
        "evaluations": {
            name: entry.summary.to_json() | {"breakdown": entry.breakdown.to_json()} for name, entry in found.items()
        },
        "tool": {name: entry.to_json() for name, entry in pairs.items()},
        "published": [asdict(entry) for entry in published],
    }
    grids = tables(found, pairs, note)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{prefix}results.json", json.dumps(value, indent=1, default=repr) + "\n")
    write_text(folder / f"{prefix}results.md", "\n".join(grid.markdown() for grid in grids))
    plot_results(found, folder / f"{prefix}results.png")
    return grids


def fingerprint(path: Path) -> dict[str, str]:
    """Hashes, by name, of a file, or of the weights and configs in a folder; of large files, a sample is hashed."""
    if path.is_file():
        return {path.name: _fingerprint_of_file(path)}
    files = sorted(file for file in path.rglob("*") if file.suffix in FINGERPRINTED and file.is_file())
    return {str(file.relative_to(path)): _fingerprint_of_file(file) for file in files}


def _fingerprint_of_file(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            for number in range(NUM_PIECES):
                file.seek((size - PIECE_BYTES) * number // (NUM_PIECES - 1))  # the last piece ends with the file
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()
