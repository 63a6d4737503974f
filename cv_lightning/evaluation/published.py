"""Published results, to be shown beside a user's own. Package data: `published.json`.

Different harnesses measure differently: the table names base model and harness of each row. Means of the transformed
columns are computed from the published columns; no work prints them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FILE = Path(__file__).with_name("published.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One published result."""

    benchmark: str
    """Name of the benchmark, as in `data.reader.data_source`."""
    work: str
    base: str
    """Model that training began with, or that was measured."""
    source: str
    harness: str
    """Evaluation code and conditions, as far as the source gives them."""
    scores: dict[str, float]
    """In percent: `score`, or by column of the robustness table (`identity`, ..., `mean_of_six`)."""


@lru_cache(maxsize=1)
def published_results() -> tuple[Published, ...]:
    """All published results."""
    return tuple(Published(**entry) for entry in json.loads(FILE.read_text(encoding="utf-8")))


def published_on(benchmark: str) -> list[Published]:
    """Results on a benchmark, best last; names are compared by letters and digits only."""
    found = [entry for entry in published_results() if plain_name(entry.benchmark) == plain_name(benchmark)]
    return sorted(found, key=lambda entry: entry.scores.get("mean_of_six", next(iter(entry.scores.values()))))


def plain_name(benchmark: str) -> str:
    """Letters and digits in lower case: `HR-Bench 4K` and `hrbench4k` are one name."""
    return "".join(character for character in benchmark.lower() if character.isalnum())
