"""The files of a finished evaluation: one JSON with all that reproduces it, one Markdown page, one figure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
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
"""Files up to this size are read whole for their fingerprint."""
NUM_PIECES, PIECE_BYTES = 512, 16 << 10
"""Of larger files so many pieces of so many bytes are read, evenly spread: adapters on a few layers change neither the
first nor the last weights of a file."""
FINGERPRINTED = (".safetensors", ".json", ".jinja", ".pt", ".bin", ".ckpt")
"""Files of a checkpoint's folder that make its numbers."""


def evaluated(outcomes: Sequence[Outcome]) -> Evaluated:
    """All figures; the same for the same outcomes in any order."""
    ordered = sorted(outcomes, key=lambda outcome: (outcome.task_id, outcome.sample))
    return Evaluated(summarise_outcomes(ordered), breakdown(ordered))


def tool_pairs(outcomes: Mapping[str, Sequence[Outcome]], without: Mapping[str, str]) -> dict[str, PairedSummary]:
    """What the tool brings, by the name of the evaluation with it.

    Args:
        outcomes: by name of the evaluation.
        without: name of the evaluation without the tool, by that of the same with it.
    """
    return {name: summarise_pairs(pair_outcomes(outcomes[other], outcomes[name])) for name, other in without.items()}


def tables(found: Mapping[str, Evaluated], pairs: Mapping[str, PairedSummary], note: str = "") -> list[Grid]:
    """Every table that has something to say; the note goes under the first."""
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
    about: Mapping[str, Any],
    note: str = "",
) -> list[Grid]:
    """Write `<prefix>results.json`, `.md` and `.png` into a folder.

    Args:
        folder: `<run>/eval`.
        prefix: of the names.
        found: figures by name of the evaluation.
        pairs: what the tool brings.
        about: model, data, settings, config and versions: what somebody needs to do it again.
        note: what the page must say of the data.

    Returns:
        The tables of the Markdown page.
    """
    from cv_lightning.evaluation.plots import plot_results

    sources = dict.fromkeys(source for entry in found.values() for source in entry.breakdown.by_source)
    published = [entry for source in sources for entry in published_on(source)]
    value = {
        "about": dict(about),
        "evaluations": {
            name: entry.summary.to_json() | {"breakdown": entry.breakdown.to_json()} for name, entry in found.items()
        },
        "tool": {name: entry.to_json() for name, entry in pairs.items()},
        "published": [{name: getattr(entry, name) for name in entry.__slots__} for entry in published],
    }
    grids = tables(found, pairs, note)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{prefix}results.json", json.dumps(value, indent=1, default=repr) + "\n")
    write_text(folder / f"{prefix}results.md", "\n".join(grid.markdown() for grid in grids))
    plot_results(found, folder / f"{prefix}results.png")
    return grids


def fingerprint(path: Path) -> dict[str, str]:
    """Hash of a file, or of the weights and configs in a folder, by name; of large files by a sample of their bytes."""
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
