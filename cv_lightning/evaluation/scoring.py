"""Scores of extracted answers by the benchmarks' own metrics.

A task with a metric names it in `metadata["metric"]`, by name or by class; every other task is scored right or wrong by
the reward module's rule, and by its judge where there is one. Sources: ANLS (Biten et al., 1905.13648), the
evaluation code of OCRBench (Yuliang-Liu/MultimodalOCR), ChartQAPro (vis-nlp/ChartQAPro) and TIR-Bench
(agents-x-project/TIR-Bench).
"""

from __future__ import annotations

import ast
import importlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from cv_lightning.data.benchmark import Metric
from cv_lightning.rewards.answer import are_answers_equivalent
from cv_lightning.types import DataError

logger = logging.getLogger(__name__)
_failed: set[str] = set()
"""Metrics of users that have raised; each is logged once."""

ANLS_THRESHOLD = 0.5
"""Similarity below which an answer earns nothing."""
RELAXED_TOLERANCE = 0.05
"""Relative error of a number that ChartQAPro accepts."""
TIRBENCH_TOLERANCE = 5e-7
"""TIR-Bench's code compares numbers at six decimals."""
MAX_DIGITS = 1000
"""A longer sequence of digits is not read as a number, since Python refuses to convert it."""


Scorer = Callable[[str, Mapping[str, Any]], float]
"""Score in [0, 1] of an answer, from it and the task's metadata."""


def official_score(answer: str | None, metadata: Mapping[str, Any]) -> float | None:
    """The benchmark's own score of an answer.

    Args:
        answer: The extracted answer; None scores 0.
        metadata: The task's: `metric`, `accepted_answers` and whatever else the metric reads.

    Returns:
        In [0, 1]; None where the task names no known metric, and where a user's metric raises, which is logged once.

    Raises:
        DataError: A user's metric cannot be made.
    """
    name = metric_of(metadata)
    if name is None:
        return None
    metric = metadata["metric"]
    score = METRICS[metric] if isinstance(metric, str) else _metric(json.dumps(metric, sort_keys=True)).score
    try:
        return score(answer, metadata) if answer else 0.0
    except Exception as error:  # a user's code, which must not end an evaluation
        if isinstance(metric, str):
            raise
        if name not in _failed:
            _failed.add(name)
            logger.exception(
                "%s raised %r for the answer %r; such answers are unscored and counted", name, error, answer
            )
        return None


def metric_of(metadata: Mapping[str, Any]) -> str | None:
    """Name of the task's own metric, or of its class; None where the task names no known metric."""
    metric = metadata.get("metric")
    if not isinstance(metadata.get("accepted_answers"), list):
        return None
    if isinstance(metric, Mapping) and isinstance(metric.get("class_path"), str):
        return str(metric["class_path"]).rpartition(".")[2]
    return metric if isinstance(metric, str) and metric in METRICS else None


@lru_cache(maxsize=64)
def _metric(spec: str) -> Metric:
    """A user's metric, as a task stores it.

    Raises:
        DataError: Its class cannot be imported, or does not take its arguments.
    """
    path, arguments = str(json.loads(spec)["class_path"]), json.loads(spec).get("init_args") or {}
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)(**arguments)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f"the tasks are scored by {path}, which cannot be made ({error}); put its folder on PYTHONPATH"
        ) from error
    if not isinstance(found, Metric):
        raise DataError(f"the tasks are scored by {path}, which is not a cv_lightning.data.benchmark.Metric")
    return found


# ------------------------------------------------------------------------------------------------ ANLS
def anls(answer: str, truths: Sequence[str]) -> float:
    """1 minus the normalised edit distance to the nearest truth; 0 for a similarity below 0.5.

    As in the script of the Robust Reading Competition (DocVQA, InfographicVQA), case and the amount of white space make
    no distance, but the distance is divided by the length of the texts as they were given.
    """
    return max((_similarity(answer, truth, max(map(_length, (answer, truth)))) for truth in truths), default=0.0)


def _similarity(said: str, truth: str, longest: int) -> float:
    """Similarity of two texts, normalised by the given length; 0 below the threshold."""
    said, truth = " ".join(said.lower().split()), " ".join(truth.lower().split())
    if longest == 0:
        return 1.0
    if abs(len(said) - len(truth)) > ANLS_THRESHOLD * longest:
        return 0.0  # the lengths alone differ too much
    similarity = 1.0 - edit_distance(said, truth) / longest
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def _length(text: str) -> int:
    """Characters in upper case, as the scripts count them: a sharp s is two."""
    return len(text.upper())


def edit_distance(one: str, other: str) -> int:
    """Least number of insertions, deletions and substitutions (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, start=1):
        before, row[0] = row[0], i
        for j, right in enumerate(other, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def _anls(answer: str, metadata: Mapping[str, Any]) -> float:
    return anls(answer, metadata["accepted_answers"])


# ------------------------------------------------------------------------------------------------ OCRBench
def _ocrbench(answer: str, metadata: Mapping[str, Any]) -> float:
    """1 if any truth stands in the answer; formulas (HME100k) are compared without spaces and with their case."""
    said, *truths = (text.strip() for text in (answer, *metadata["accepted_answers"]))
    if metadata.get("dataset") == "HME100k":  # as in the authors' code, tabs stay
        said, *truths = (text.replace("\n", "").replace(" ", "") for text in (said, *truths))
    else:
        said, *truths = (text.lower().replace("\n", " ") for text in (said, *truths))
    return float(any(truth in said for truth in truths))


# ------------------------------------------------------------------------------------------------ ChartQAPro
def _chartqapro(answer: str, metadata: Mapping[str, Any]) -> float:
    """Relaxed correctness, mean over the items of a list.

    As in the released code: years exactly, other numbers within 5 %, text by ANLS. (It also computes an exact match for
    fact checking and multiple choice, but never uses it.) A truth that is a list may lack quotes; an answer that lacks
    them is one text.
    """
    truth = str(metadata["accepted_answers"][-1]).strip(".").strip("\n")
    said = _items(answer.strip(".").strip("\n"))
    truths = _items(_quoted(truth))
    years = [str(flag).upper() == "YES" for flag in metadata.get("year") or ["NO"]]
    if metadata.get("question_type") == "Conversational":
        years = years[-1:]
    if len(years) < len(truths):
        years = years * len(truths)
    size = max(len(truths), len(said))
    scores = [_relaxed(said[i], truths[i], years[i]) for i in range(min(len(truths), len(said)))]
    return sum(scores) / size


def _quoted(truth: str) -> str:
    """A list without quotes with each word in quotes, as in the released code; else the text as it is."""
    match = re.fullmatch(r"\[(.*)\]", truth.strip())
    if match is None:
        return truth
    quoted = "[" + re.sub(r"(?<![\w'])\w[\w']*", lambda word: f"'{word[0]}'", match[1]) + "]"
    return truth if _parsed_list(quoted) is None else quoted


def _items(text: str) -> list[str]:
    """Items of a text that is a Python list; else the text alone: a list without quotes in an answer stays a text."""
    parsed = _parsed_list(text)
    return [str(item).strip(" '") for item in parsed] if parsed else [text]


def _parsed_list(text: str) -> list[Any] | None:
    try:
        parsed = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return parsed if isinstance(parsed, list) else None


def _relaxed(said: str, truth: str, is_year: bool) -> float:
    if is_year:
        return float(said.strip().lower() == truth.strip().lower())
    said, truth = said.strip().strip("%").strip(), truth.strip().strip("%").strip()
    numbers = _float(said), _float(truth)
    if numbers[0] is None or numbers[1] is None:
        # by the package `anls`: the length is that of the collapsed texts, and exactly 0.5 is 0
        collapsed = [" ".join(text.lower().split()) for text in (said, truth)]
        similarity = _similarity(said, truth, max(map(_length, collapsed)))
        return similarity if similarity > ANLS_THRESHOLD else 0.0
    if numbers[1] == 0:
        return float(numbers[0] == 0)
    return float(abs(numbers[0] - numbers[1]) / abs(numbers[1]) <= RELAXED_TOLERANCE)


def _float(text: str) -> float | None:
    try:
        return float(text.strip("%"))
    except ValueError:
        return None


# ------------------------------------------------------------------------------------------------ TIR-Bench
def _tirbench(answer: str, metadata: Mapping[str, Any]) -> float:
    """Score by task, as in the authors' code, which scores what another model extracted from the response.

    Text within the answer (ocr), fraction of right places (jigsaw), overlap of sets (spot_difference), a pair of
    numbers (word_search), several letters in any order; a bare number by value. The project's rule reads an answer in
    words, where the authors' code joins its digits or guesses the nearest letter.
    """
    task, truth = metadata.get("category"), str(metadata["accepted_answers"][0]).strip()
    if task == "ocr":
        return float(truth in answer)
    answer = answer.replace("*", "").strip()
    is_single = re.fullmatch(r"[+-]?\d+", truth) is not None
    if task == "jigsaw":
        wanted = _integers(truth)
        numbers = _run_of_integers(answer, len(wanted))
        return sum(one == other for one, other in zip(numbers, wanted, strict=False)) / max(1, len(wanted))
    if task == "spot_difference" and not is_single:
        said, wanted_set = set(_integers(answer)), set(_integers(truth))
        union = said | wanted_set
        return len(said & wanted_set) / len(union) if union else 1.0
    if task == "word_search" and not is_single:
        pair, cell = _first_pair(answer), _first_pair(truth)
        return float(pair is not None and pair == cell)
    if len(truth) > 1 and truth.isalpha():  # several options, in any order
        return float(sorted(re.sub(r"[\s,]", "", answer)) == sorted(truth))
    if (said_number := _bare_number(answer)) is not None and (wanted_number := _bare_number(truth)) is not None:
        return float(abs(said_number - wanted_number) < TIRBENCH_TOLERANCE)
    return float(are_answers_equivalent(answer, truth))


def _bare_number(text: str) -> float | None:
    match = re.fullmatch(r"[:\s]*([+-]?(?:\d{1,18}(?:\.\d{0,18})?|\.\d{1,18}))[:\s]*", text)
    return float(match[1]) if match else None


def _first_pair(text: str) -> tuple[int, int] | None:
    match = re.search(r"\b(\d{1,18})\s*,\s*(\d{1,18})\b", text)
    return (int(match[1]), int(match[2])) if match else None


def _integers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text) if len(digits) <= MAX_DIGITS]


def _run_of_integers(text: str, count: int) -> list[int]:
    """The first sequence of exactly `count` numbers separated only by blanks and commas; empty without one."""
    runs = (_integers(run) for run in re.findall(r"[\d\s,\uff0c]+", text))
    return next((run for run in runs if len(run) == count), [])


METRICS: dict[str, Scorer] = {
    "anls": _anls,
    "ocrbench": _ocrbench,
    "chartqapro": _chartqapro,
    "tirbench": _tirbench,
}
