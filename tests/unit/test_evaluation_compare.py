"""compare: equal questions, flipped questions, and the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from trajectory_samples import Policy, digit_task, group

from cv_lightning.commands.compare import main
from cv_lightning.evaluation.breakdown import TRANSFORMS
from cv_lightning.evaluation.compare import compare, comparison_tables, load_evaluation, match_questions
from cv_lightning.evaluation.statistics import paired_difference
from cv_lightning.trajectory import TrajectoryWriter
from cv_lightning.types import DataError, Task
from cv_lightning.viewer.compare_page import comparison_page, spans

GOOD, BLIND = Policy(turn=1, crop=1, needless=0, error=0, read=1), Policy(turn=0, crop=0, needless=0, error=0)


def store(folder: Path, tasks: list[Task], policy: Policy, samples: int = 1) -> Path:
    with TrajectoryWriter(folder) as writer:
        for task in tasks:
            writer.write_group(group(task, samples, policy), 0)
    return folder


def test_comparison_of_the_same_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [digit_task(index, "turned") for index in range(6)] + [digit_task(index, "upright") for index in range(3)]
    tasks[0] = replace(tasks[0], question="<script>alert(1)</script> what number?")
    a, b = store(tmp_path / "a", tasks, BLIND), store(tmp_path / "b", tasks, GOOD)
    assert main([str(a), str(b), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "the same 9 questions" in printed
    found = json.loads((tmp_path / "out/compare.json").read_text())
    turned = {task.id for task in tasks[:6]}
    assert set(found["gained"]) <= turned and len(found["gained"]) >= 5 and found["lost"] == []
    assert found["difference"]["gain"]["value"] == pytest.approx(len(found["gained"]) / 9)
    by = found["splits"]["orientation"]
    assert by["identity"]["accuracy"]["value"] == 0 and sum(part["num_pairs"] for part in by.values()) == 9
    page = (tmp_path / "out/compare.html").read_text()
    assert page.count("<details>") == len(found["gained"])
    assert "data:image/png" in page and '<span class="fn">transpose</span>' in page and "&lt;tool_call&gt;" not in page
    assert page.count("<circle") == 1 + sum(map(len, found["splits"].values())) and '<svg class="span right"' in page
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_a_verdict_needs_an_interval_without_zero_and_a_test_that_agrees(tmp_path: Path) -> None:
    tasks = [digit_task(index, "turned") for index in range(12)]
    bad, good = (load_evaluation(store(tmp_path / name, tasks, how)) for name, how in (("a", BLIND), ("b", GOOD)))
    words = [compare(*pair).verdict.word for pair in ((bad, good), (good, bad), (good, good))]
    assert words == ["better", "worse", "not separated"]
    few = [{task.id: side[task.id] for task in tasks[:3]} for side in (bad, good)]
    assert compare(*few).verdict.word == "not separated"
    assert '<h1 class="good">B is better than A</h1>' in comparison_page(compare(bad, good), bad, good, 2)


def test_intervals_are_drawn_on_one_axis_with_zero_on_it() -> None:
    better, worse = paired_difference([1.0] * 30, range(30)), paired_difference([-1.0] * 10 + [0.0] * 10, range(20))
    above, none, below = spans([better, paired_difference([], []), worse])
    assert above and below and none is None
    assert above.zero == below.zero and below.low < below.value < below.high < below.zero < above.value
    assert (above.tone, below.tone) == ("right", "wrong")
    assert below.low > 0 and above.high < 100
    assert spans([]) == []


def test_orientations_are_in_table_order(tmp_path: Path) -> None:
    tasks = [digit_task(index, "turned") for index in range(12)] + [digit_task(0, "upright")]
    side = load_evaluation(store(tmp_path / "a", tasks, GOOD))
    found = compare(side, side)
    names = list(found.splits["orientation"])
    assert names == [name for name in TRANSFORMS if name in names] and len(names) > 3
    grid = next(grid for grid in comparison_tables(found) if grid.title == "By orientation")
    assert grid.rows[0][0] == "Source"


def test_different_question_sets_are_reported_and_paired_where_equal(tmp_path: Path) -> None:
    tasks = [digit_task(index, "turned") for index in range(6)]
    renamed = replace(tasks[3], id="other-name")
    changed = replace(tasks[4], question="Another question?")
    first = load_evaluation(store(tmp_path / "a", tasks, BLIND))
    second = load_evaluation(store(tmp_path / "b", [*tasks[:3], renamed, changed, digit_task(9, "turned")], GOOD))
    matching = match_questions(first, second)
    assert matching.names == {task.id: task.id for task in tasks[:3]} | {"other-name": tasks[3].id}
    assert (matching.num_renamed, matching.num_changed) == (1, 1)
    assert matching.only_first == [tasks[5].id] and matching.only_second == [digit_task(9, "turned").id]
    assert "different question sets: 4 in both (1 under another id), 1 only in A, 1 only in B" in str(matching)
    found = compare(first, second)
    assert found.overall.num_pairs == 4
    assert found.overall.gain.value == 1 and set(found.gained) == {task.id for task in tasks[:4]}


def test_evaluations_without_a_common_question_are_refused(tmp_path: Path) -> None:
    first = load_evaluation(store(tmp_path / "a", [digit_task(0, "turned")], GOOD))
    second = load_evaluation(store(tmp_path / "b", [digit_task(1, "turned")], GOOD))
    with pytest.raises(DataError, match="no question in common"):
        compare(first, second)


def test_several_samples_flip_by_their_mean(tmp_path: Path) -> None:
    tasks = [digit_task(index, "turned") for index in range(4)]
    first = load_evaluation(store(tmp_path / "a", tasks, BLIND, samples=4))
    second = load_evaluation(store(tmp_path / "b", tasks, GOOD, samples=2))
    found = compare(first, second)
    assert found.overall.num_pairs == 4 and len(found.gained) == 4
    assert found.overall.accuracy.test == "mcnemar", "every question flipped whole: there are no shares to rank"


def test_a_folder_without_an_evaluation_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(tmp_path / "run/eval/a", [digit_task(0, "turned")], GOOD)
    assert main([str(tmp_path / "run"), str(tmp_path / "run")]) == 2
    assert "it holds the stores eval/a" in capsys.readouterr().err
