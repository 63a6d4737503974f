"""A benchmark of a user's own, in a file format of its own, and the metric that it is scored by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cv_lightning.data.benchmark import Benchmark, Metric, Question


class Receipts(Benchmark):
    """Lines of `image | amount`: how much was paid?"""

    needed = ("image", "amount")

    def __init__(self, currency: str = "EUR") -> None:
        self.currency = currency

    def rows(self, path: Path) -> Sequence[Mapping[str, Any]]:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [dict(zip(self.needed, map(str.strip, line.split("|")), strict=True)) for line in lines]

    def question(self, row: Mapping[str, Any], folder: Path) -> Question:
        return Question(
            text=f"How much was paid, in {self.currency}?",
            images=[row["image"]],
            answers=[row["amount"]],
            category="large" if float(row["amount"]) >= 100 else "small",
            metadata={"currency": self.currency},
        )


class AmountWithin(Metric):
    """1 for an amount within a relative tolerance, half for one of twice that."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance

    def score(self, answer: str, metadata: Mapping[str, Any]) -> float:
        wanted = float(metadata["accepted_answers"][0])
        try:
            error = abs(float(answer.removesuffix(metadata["currency"])) - wanted) / wanted
        except ValueError:
            return 0.0
        return 1.0 if error <= self.tolerance else 0.5 if error <= 2 * self.tolerance else 0.0
