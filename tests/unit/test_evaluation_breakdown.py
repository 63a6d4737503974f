"""Breakdown and paired figures: rule and judge, image variants, pass@k, crops; gain and harm."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest
from trajectory_samples import Policy, digit_task, group

from cv_lightning.data.benchmark import Metric, scored_by
from cv_lightning.data.corruptions import CorruptionConfig, Variant, apply_variant
from cv_lightning.data.probe import ProbeConfig, ProbeRows
from cv_lightning.evaluation.breakdown import breakdown
from cv_lightning.evaluation.metrics import summarise_outcomes
from cv_lightning.evaluation.outcome import Outcome, outcomes
from cv_lightning.evaluation.paired import pair_outcomes, summarise_pairs
from cv_lightning.evaluation.results import evaluated
from cv_lightning.evaluation.statistics import bootstrap, paired_difference, pass_at_k, rate, wilson
from cv_lightning.evaluation.tables import corruption_table, main_table, p_value
from cv_lightning.orientations import ORIENTATIONS
from cv_lightning.types import EndState, Task

PERFECT = Policy(turn=1, crop=1, needless=0, error=0, read=1)


def forms(num: int, config: CorruptionConfig) -> list[Outcome]:
    """Outcomes of upright digits in the forms of a robustness test, all right."""
    tasks = [digit_task(index, "upright") for index in range(num)]
    return outcomes([group(apply_variant(task, variant), 1, PERFECT) for task in tasks for variant in config.variants])


def set_score(outcome: Outcome, right: bool) -> Outcome:
    return outcome._replace(correct=right, right=right, score=float(right))


UNJUDGED = {"correct": None, "right": None, "score": None, "scored_by": "", "end_state": EndState.ERROR_JUDGE}
"""What is not known of an answer that the judge failed on."""


def test_columns_of_a_robustness_table_and_both_means() -> None:
    found = forms(8, CorruptionConfig())
    assert {o.variant.cluster for o in found} == {f"{digit_task(i, 'upright').id}" for i in range(8)}
    # Source always right, quarter turns in half of the questions, the rest never
    found = [
        set_score(
            o, o.variant.orientation == "identity" or (o.variant.orientation in ("rotate_90", "rotate_270") and at < 24)
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
    assert breakdown([o for o in found if o.variant.orientation != "flip_vertical"]).mean_of_six.n == 0


def test_mean_of_columns_with_one_variant_per_question() -> None:
    config = CorruptionConfig(mode="one")
    table = breakdown([set_score(o, o.variant.orientation != "rotate_180") for o in forms(12, config)])
    assert table.by_transform["rotate_180"].value == 0
    assert table.mean_of_six.value == pytest.approx(5 / 6)
    assert table.mean_of_six.low < 5 / 6 < table.mean_of_six.high


def test_scores_by_severity() -> None:
    config = CorruptionConfig(orientations=("identity",), corruptions=("none", "fog"), severities=(1, 5))
    found = [set_score(o, o.variant.severity < 5) for o in forms(4, config)]
    by = breakdown(found).by_corruption
    assert {level: rate.value for level, rate in by["fog"].items()} == {0: 1.0, 1: 1.0, 5: 0.0}
    assert set(by) == {"fog"}
    grid = corruption_table({"greedy": evaluated(found)})
    assert grid is not None and grid.headings[2:] == ["uncorrupted", "severity 1", "severity 5"]
    # what the suite changed is of no kind that the data set has
    assert {o.variant.severity: o.kind for o in found} == {0: "upright", 1: "", 5: ""}
    kinds = summarise_outcomes(found).by_kind
    assert list(kinds) == ["upright"] and kinds["upright"].n == 4


def test_rule_and_judge_are_reported_separately_and_a_failed_judge_is_not_a_wrong_answer() -> None:
    base = outcomes([group(digit_task(index, "upright"), 1, PERFECT) for index in range(10)])
    found = [
        *base[:4],  # right by rule
        *(o._replace(scored_by="judge") for o in base[4:6]),  # right by judge
        *(set_score(o, False)._replace(scored_by="judge") for o in base[6:8]),  # the judge says no
        *(o._replace(**UNJUDGED) for o in base[8:]),  # the judge was down
    ]
    table = breakdown(found)
    assert (table.accuracy_rule.value, table.accuracy_rule.n) == (0.4, 10)
    assert (table.accuracy_judged.value, table.accuracy_judged.n) == (0.75, 8)
    assert (table.num_judged, table.num_unjudged) == (4, 2)
    assert table.score_bounds == pytest.approx((0.6, 0.8)), (
        "the scored answers are not a fair sample: 0.75 is not the score"
    )
    assert any(row[:2] == ["... with the unjudged wrong - right", "60.0 - 80.0"] for row in main_table(
        {"greedy": evaluated(found)}
    ).rows)  # fmt: skip
    assert (breakdown(base).accuracy_judged.n, breakdown(base).score_bounds) == (0, None)


def test_tool_use_counts_although_the_judge_failed() -> None:
    base = outcomes([group(digit_task(index, "turned"), 1, PERFECT) for index in range(4)])
    summary = summarise_outcomes([*base[:2], *(o._replace(**UNJUDGED) for o in base[2:])])
    assert (summary.tool_use_success.value, summary.tool_use_success.n, summary.num_errors, summary.num_unscored) == (
        1.0,
        4,
        0,
        2,
    )
    failed = summarise_outcomes([*base[:2], *(o._replace(end_state=EndState.ERROR_SANDBOX) for o in base[2:])])
    assert (failed.tool_use_success.n, failed.num_errors) == (2, 2)


def test_a_trajectory_without_an_answer_that_the_judge_left_unscored_is_counted_and_is_no_success() -> None:
    rolled = group(digit_task(0, "turned"), 2, PERFECT)
    rolled.trajectories[1].end_state, rolled.trajectories[1].reward = EndState.MAX_TURNS, None
    summary, table = summarise_outcomes(outcomes([rolled])), breakdown(outcomes([rolled]))
    assert (summary.tool_use_success.value, summary.num_errors, summary.num_unscored) == (0.5, 0, 1)
    assert (table.num_unjudged, table.score.n, table.accuracy_rule.value) == (1, 1, 0.5)
    assert table.score_bounds == (0.5, 1.0)


def test_a_benchmarks_own_metric_needs_no_judge_and_decides_what_is_right() -> None:
    task = replace(digit_task(0, "upright"), metadata={"metric": "anls", "accepted_answers": ["10 May", "May 10"]})
    rolled = group(task, 3, PERFECT)
    states = EndState.ANSWERED, EndState.ERROR_JUDGE, EndState.ERROR_ENGINE
    for trajectory, state in zip(rolled.trajectories, states, strict=True):
        trajectory.turns[-1].text = "<think>read</think>\n<answer>May 10</answer>"
        assert trajectory.reward is not None
        wrong = replace(trajectory.reward, answer="May 10", correct=False)
        trajectory.reward = wrong if state is EndState.ANSWERED else None
        trajectory.end_state = state
    judged, unjudged, failed = outcomes([rolled])
    assert (judged.score, judged.right, judged.correct) == (1.0, True, False)
    assert (unjudged.score, unjudged.right, unjudged.correct) == (1.0, True, None)
    assert (failed.score, failed.right) == (None, None)
    assert judge_free_pairs([judged], [judged._replace(score=0.0, right=False)]) == (1.0, -1.0)


def judge_free_pairs(first: list[Outcome], second: list[Outcome]) -> tuple[float, float]:
    found = summarise_pairs(pair_outcomes(first, second))
    return found.harm.value, found.score.value


def test_questions_about_one_image_are_resampled_together() -> None:
    tasks = [
        replace(digit_task(at, "upright"), metadata={"picture": f"picture-{at // 4}"}) for at in range(80)
    ]  # four questions per image
    found = [set_score(o, (at // 4) % 2 == 0) for at, o in enumerate(outcomes([group(t, 1, PERFECT) for t in tasks]))]
    alone = [o._replace(variant=o.variant._replace(cluster=o.task_id)) for o in found]
    together, apart = breakdown(found).score, breakdown(alone).score
    assert together.value == apart.value == 0.5
    assert together.high - together.low > 1.5 * (apart.high - apart.low)
    gains = [summarise_pairs(pair_outcomes([set_score(o, False) for o in side], side)).score for side in (found, alone)]
    assert gains[0].high - gains[0].low > 1.5 * (gains[1].high - gains[1].low)


def test_corrupted_images_are_in_no_orientation_column() -> None:
    config = CorruptionConfig(orientations=("identity", "rotate_90"), corruptions=("none", "fog"))
    table = breakdown([set_score(o, o.variant.corruption == "none") for o in forms(4, config)])
    assert {name: rate.value for name, rate in table.by_transform.items()} == {"identity": 1.0, "rotate_90": 1.0}
    assert (table.score.value, [rate.value for rate in table.as_given.values()]) == (0.5, [1.0])


def test_a_failed_sample_excludes_its_question_only_where_needed() -> None:
    found = outcomes([group(digit_task(index, "upright"), 4, PERFECT) for index in range(6)])
    lost = [o._replace(end_state=EndState.ERROR_ENGINE) if at in (1, 2, 3) else o for at, o in enumerate(found)]
    assert {k: rate.n for k, rate in breakdown(lost).pass_at_k.items()} == {1: 6, 2: 5, 4: 5}
    shown = forms(8, CorruptionConfig())
    half = [set_score(o, at % 2 == 0) for at, o in enumerate(shown)]
    whole = breakdown(half).mean_of_six
    partly = breakdown([o._replace(end_state=EndState.ERROR_ENGINE) if at % 9 == 0 else o for at, o in enumerate(half)])
    assert partly.mean_of_six.n == whole.n == 8
    assert partly.mean_of_six.value == pytest.approx(np.mean([r.value for r in partly.by_transform.values()]))


def test_the_suite_rotates_all_images_of_a_task() -> None:
    upright = digit_task(0, "upright")
    task = replace(upright, images=(upright.images[0], digit_task(1, "upright").images[0]))
    turned = apply_variant(task, Variant("rotate_90"))
    lazy = group(turned, 1, replace(PERFECT, turn=0, crop=0))
    given = lazy.trajectories[0].images
    given.append(replace(given[0], original=turned.images[1], model_image=turned.images[1], source=1))
    (found,) = outcomes([lazy])
    assert (found.fixed, found.tool_use_success) == (False, False)


@pytest.mark.parametrize(
    ("transforms", "orientation", "fixed"),
    [((), "identity", None), (("rotate_90",), "rotate_90", False), (("rotate_45",), "other", None),
     (("rotate_90", "flip_vertical"), "other", False)],
)  # fmt: skip
def test_orientation_of_a_variant(transforms: tuple[str, ...], orientation: str, fixed: bool | None) -> None:
    task = replace(digit_task(0, "upright"), required_transforms=transforms)
    (found,) = outcomes([group(task, 1, replace(PERFECT, turn=0, crop=0))])
    assert (found.variant.orientation, found.fixed) == (orientation, fixed)
    (again,) = outcomes([group(apply_variant(task, Variant()), 1, replace(PERFECT, turn=0, crop=0))])
    assert again.variant == found.variant, "the form that changes nothing is the task itself"


def test_probe_tasks_are_neither_upright_nor_unnecessarily_rotated() -> None:
    class Rows:
        def __len__(self) -> int:
            return 10

        def row(self, position: int) -> Task:
            return digit_task(position, "upright")

    asked = ProbeRows(Rows(), ProbeConfig(num_images=10))
    found = outcomes([group(asked.row(at), 1, replace(PERFECT, needless=1)) for at in range(10)])
    assert {o.variant.orientation for o in found} == set(ORIENTATIONS)
    summary, table = summarise_outcomes(found), breakdown(found)
    assert (summary.spurious.n, summary.accuracy_upright.n, table.tool_on_upright.n) == (0, 0, 0)
    assert summary.accuracy_all.n == 10 and table.orientation_fixed.n == 10


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


def test_multinomial_bootstrap_agrees_with_the_plain_one() -> None:
    rng = np.random.default_rng(5)
    values = rng.integers(0, 2, 400).astype(float)
    fast = bootstrap(values.tolist(), range(400))  # two looks
    plain = np.percentile(values[rng.integers(0, 400, (4000, 400))].mean(axis=1), [2.5, 97.5])
    assert fast == pytest.approx(plain.tolist(), abs=0.01)


def test_gain_harm_and_exact_mcnemar() -> None:
    base = outcomes([group(digit_task(index, "turned"), 1, PERFECT) for index in range(40)])
    first = [set_score(o, at < 10) for at, o in enumerate(base)]
    second = [set_score(o, 4 <= at < 30) for at, o in enumerate(base)]
    found = summarise_pairs(pair_outcomes(first, second[::-1]))
    assert (found.num_pairs, found.gain.value, found.harm.value) == (40, 20 / 40, 4 / 40)
    assert found.accuracy.value == pytest.approx(16 / 40)
    assert found.accuracy.test == "mcnemar"
    assert found.accuracy.p == pytest.approx(binomtest(20, 24).pvalue)
    assert found.accuracy.low < 0.4 < found.accuracy.high


def test_pairs_exclude_questions_unscored_on_either_side() -> None:
    base = outcomes([group(digit_task(index, "turned"), 1, PERFECT) for index in range(3)])
    broken = [base[0]._replace(end_state=EndState.ERROR_ENGINE), base[1]._replace(**UNJUDGED), base[2]]
    pairs = pair_outcomes(base, broken)
    assert [pair.task_id for pair in pairs if pair.scored] == [base[2].task_id]
    found = summarise_pairs(pairs)
    assert (found.num_pairs, found.num_unscored) == (1, 1)
    assert p_value(found) == "-", "what a judge left unscored is not missing at random"
    assert p_value(summarise_pairs(pair_outcomes(base, base))) == "1"


def test_equal_clusters_give_the_interval_of_their_number() -> None:
    several = [f"question-{at // 4}" for at in range(80)]
    assert rate([1.0] * 80, several).low == pytest.approx(wilson(20, 20)[0])
    assert rate([0.0] * 80, several).high == pytest.approx(wilson(0, 20)[1])
    low, high = rate([1.0, 0.0] * 40, several)[1:3]
    assert low < 0.5 < high and high - low == pytest.approx(wilson(0, 20)[1])
    none = paired_difference([0.0] * 5, range(5), (-1, 1))
    assert none.high == -none.low == pytest.approx(wilson(0, 5)[1])
    assert paired_difference([1.0, 1.0], range(2), (-1, 1)).low < 0


def test_rounding_errors_are_not_a_difference() -> None:
    changes = [2 / 3 - 1, 1 / 3 - 0] * 20
    assert paired_difference(changes, [at // 2 for at in range(40)]).p == 1.0


def test_paired_difference_of_equal_and_of_no_values() -> None:
    assert paired_difference([0.0] * 5, range(5)).p == 1.0
    assert math.isnan(paired_difference([], []).value)
    assert paired_difference([0.5, 0.25, 1.0, 0.75, 0.5, 1.0], range(6)).test == "wilcoxon"


def test_unrelated_metadata_is_not_a_variant() -> None:
    own = {"orientation": "landscape", "corruption": "low", "severity": "very", "metric": "accuracy"}
    (found,) = outcomes([group(replace(digit_task(0, "upright"), metadata=own), 1, PERFECT)])
    assert (found.variant.orientation, found.variant.severity, found.metric) == ("identity", 0, "")


class Number(Metric):
    """Expects a number and checks nothing, as a user's metric may."""

    def score(self, answer: str, metadata: Mapping[str, Any]) -> float:
        return float(answer)


def test_an_answer_on_which_a_users_metric_raises_is_unscored_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    rolled = group(replace(digit_task(0, "upright"), metadata=scored_by(Number(), ["1"])), 3, PERFECT)
    for trajectory, answer in zip(rolled.trajectories, ("1", "about 1", "about 2"), strict=True):
        assert trajectory.reward is not None
        trajectory.reward = replace(trajectory.reward, answer=answer)
    found = outcomes([rolled])
    assert [(o.score, o.right, o.metric) for o in found] == [(1.0, True, "Number"), *[(None, None, "Number")] * 2]
    table = breakdown(found)
    assert (table.num_unjudged, table.score.n, table.accuracy_judged.n) == (2, 1, 0)
    assert table.score_bounds == pytest.approx((1 / 3, 1.0))
    assert [record.exc_info is not None for record in caplog.records] == [True], "once, with the error"
    assert "about 1" in caplog.text
