"""Breakdown and paired figures: who scored, forms of a question, tries, crops; gain and harm."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest
from trajectory_samples import Policy, digit_task, group

from cv_lightning.data.corruptions import CorruptionConfig, CorruptionSuite
from cv_lightning.evaluation.breakdown import breakdown
from cv_lightning.evaluation.metrics import summarise_outcomes
from cv_lightning.evaluation.outcome import Outcome, outcomes
from cv_lightning.evaluation.paired import pair_outcomes, summarise_pairs
from cv_lightning.evaluation.statistics import bootstrap, paired_difference, pass_at_k
from cv_lightning.types import EndState

PERFECT = Policy(turn=1, crop=1, needless=0, error=0, read=1)


def forms(num: int, config: CorruptionConfig) -> list[Outcome]:
    """Outcomes of upright digits in the forms of a robustness test, all right."""
    tasks = [digit_task(index, "upright") for index in range(num)]
    return outcomes([group(task, 1, PERFECT) for task in CorruptionSuite(config)(tasks)])


def set_score(outcome: Outcome, right: bool) -> Outcome:
    return outcome._replace(correct=right, score=float(right))


def test_columns_of_a_robustness_table_and_both_means() -> None:
    found = forms(8, CorruptionConfig())
    assert {o.shown.base_id for o in found} == {f"{digit_task(i, 'upright').id}" for i in range(8)}
    # Source always right, quarter turns in half of the questions, the rest never
    found = [
        set_score(
            o, o.shown.orientation == "identity" or (o.shown.orientation in ("rotate_90", "rotate_270") and at < 24)
        )
        for at, o in enumerate(found)
    ]
    table = breakdown(found)
    assert list(table.by_transform) == [
        "identity", "rotate_90", "rotate_180", "rotate_270", "flip_horizontal", "flip_vertical",
    ]  # fmt: skip
    assert [rate.value for rate in table.by_transform.values()] == [1, 0.5, 0, 0.5, 0, 0]
    assert table.mean_of_six.value == pytest.approx(2 / 6)
    assert table.mean_of_transformed.value == pytest.approx(1 / 5)
    assert (table.mean_of_six.n, table.mean_of_six.low < 2 / 6 < table.mean_of_six.high) == (8, True)
    assert breakdown([o for o in found if o.shown.orientation != "flip_vertical"]).mean_of_six.n == 0


def test_one_form_a_question_has_a_mean_too() -> None:
    config = CorruptionConfig(mode="one")
    table = breakdown([set_score(o, o.shown.orientation != "rotate_180") for o in forms(12, config)])
    assert table.by_transform["rotate_180"].value == 0
    assert table.mean_of_six.value == pytest.approx(5 / 6)
    assert table.mean_of_six.low < 5 / 6 < table.mean_of_six.high


def test_severities() -> None:
    config = CorruptionConfig(orientations=("identity",), corruptions=("none", "fog"), severities=(1, 5))
    found = [set_score(o, o.shown.severity < 5) for o in forms(4, config)]
    by = breakdown(found).by_corruption
    assert {level: rate.value for level, rate in by["fog"].items()} == {1: 1.0, 5: 0.0}
    assert set(by) == {"fog"}
    # what the suite changed is of no kind that the data set has
    assert {o.shown.severity: o.kind for o in found} == {0: "upright", 1: "", 5: ""}
    kinds = summarise_outcomes(found).by_kind
    assert list(kinds) == ["upright"] and kinds["upright"].n == 4


def test_rule_and_judge_are_never_mixed_and_a_dead_judge_is_not_wrong() -> None:
    base = outcomes([group(digit_task(index, "upright"), 1, PERFECT) for index in range(10)])
    found = [
        *base[:4],  # right by rule
        *(o._replace(scored_by="judge") for o in base[4:6]),  # right by judge
        *(set_score(o, False)._replace(scored_by="judge") for o in base[6:8]),  # the judge says no
        *(
            o._replace(correct=None, score=None, scored_by="", end_state=EndState.ERROR_JUDGE) for o in base[8:]
        ),  # the judge was down
    ]
    table = breakdown(found)
    assert (table.accuracy_rule.value, table.accuracy_rule.n) == (0.4, 10)
    assert (table.accuracy_judged.value, table.accuracy_judged.n) == (0.75, 8)
    assert (table.num_judged, table.num_unjudged) == (4, 2)
    assert breakdown(base).accuracy_judged.n == 0


def test_crops_and_orientation() -> None:
    right = outcomes([group(digit_task(index, "turned_and_small"), 1, PERFECT) for index in range(5)])
    table = breakdown(right)
    assert (table.orientation_fixed.value, table.crops_faithful.value, table.crops_faithful.n) == (1.0, 1.0, 5)
    assert 0.1 < table.crop_iou.value < 1
    lazy = breakdown(
        outcomes(
            [group(digit_task(index, "turned_and_small"), 1, replace(PERFECT, turn=0, crop=0)) for index in range(5)]
        )
    )
    assert (lazy.orientation_fixed.value, lazy.crops_faithful.n, lazy.crop_iou.n) == (0.0, 0, 0)


def test_pass_at_k_is_the_mean_over_all_choices_of_k() -> None:
    for num, right in itertools.product(range(1, 7), repeat=2):
        if right > num:
            continue
        tries = [True] * right + [False] * (num - right)
        for k in range(1, num + 1):
            expected = np.mean([any(chosen) for chosen in itertools.combinations(tries, k)])
            assert pass_at_k(num, right, k) == pytest.approx(expected)
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)


def test_pass_at_k_of_an_evaluation() -> None:
    found = outcomes([group(digit_task(index, "upright"), 4, PERFECT) for index in range(6)])
    found = [set_score(o, o.sample == 0 and int(o.task_id.rsplit("-", 1)[-1]) % 2 == 0) for o in found]
    table = breakdown(found).pass_at_k
    assert {k: rate.value for k, rate in table.items()} == {1: 0.125, 2: 0.25, 4: 0.5}


def test_the_bootstrap_by_looks_agrees_with_the_plain_one() -> None:
    rng = np.random.default_rng(5)
    values = rng.integers(0, 2, 400).astype(float)
    fast = bootstrap(values.tolist(), range(400))  # two looks
    plain = np.percentile(values[rng.integers(0, 400, (4000, 400))].mean(axis=1), [2.5, 97.5])
    assert fast == pytest.approx(plain.tolist(), abs=0.01)


def test_gain_harm_and_an_exact_test() -> None:
    base = outcomes([group(digit_task(index, "turned"), 1, PERFECT) for index in range(40)])
    first = [set_score(o, at < 10) for at, o in enumerate(base)]
    second = [set_score(o, 4 <= at < 30) for at, o in enumerate(base)]
    found = summarise_pairs(pair_outcomes(first, second[::-1]))
    assert (found.num_pairs, found.gain.value, found.harm.value) == (40, 20 / 40, 4 / 40)
    assert found.accuracy.value == pytest.approx(16 / 40)
    assert found.accuracy.test == "mcnemar"
    assert found.accuracy.p == pytest.approx(binomtest(20, 24).pvalue)
    assert found.accuracy.low < 0.4 < found.accuracy.high


def test_pairs_leave_out_what_either_side_could_not_score() -> None:
    base = outcomes([group(digit_task(index, "turned"), 1, PERFECT) for index in range(3)])
    broken = [base[0]._replace(end_state=EndState.ERROR_ENGINE), base[1]._replace(correct=None), base[2]]
    assert [pair.task_id for pair in pair_outcomes(base, broken)] == [base[2].task_id]


def test_no_difference_and_nothing_to_compare() -> None:
    assert paired_difference([0.0] * 5, range(5)).p == 1.0
    assert math.isnan(paired_difference([], []).value)
    assert paired_difference([0.5, 0.25, 1.0, 0.75, 0.5, 1.0], range(6)).test == "wilcoxon"
