"""Findings about runs that do not learn: planted histories, and near misses and healthy runs that are no finding."""

from __future__ import annotations

import gzip
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cv_lightning.callbacks.progress import headline
from cv_lightning.callbacks.summary import RunSummary
from cv_lightning.evaluation.health import find
from cv_lightning.evaluation.runs import read_rows, read_settings
from cv_lightning.rollout.collector import chance_accuracy
from cv_lightning.viewer.report import write_report

FIXTURES = Path(__file__).parents[1] / "fixtures"
SETTINGS = {
    "rollout.num_samples": 8,
    "rollout.agent.tool": True,
    "rollout.agent.max_turn_tokens": 48,
    "rollout.engine.max_model_len": 512,
    "model.init_args.algorithm.mask.over_length": True,
    "model.init_args.algorithm.num_minibatches": 2,
}
EQUAL: dict[str, Any] = {"rollout/reward_variance_frac": 0.0}
CUT = {"rollout/end_over_length_frac": 0.97, "rollout/sampled_tokens_mean": 48.0} | EQUAL
UNJUDGED = {"rollout/unscored_frac": 1.0, "rollout/masked_frac": 0.0, "rollout/end_error_judge_frac": 0.9}


def grpo(**changed: float) -> dict[str, float]:
    """Metrics of a healthy iteration of 32 trajectories."""
    row = {
        "rollout/trajectories": 32.0,
        "rollout/reward_variance_frac": 0.6,
        "rollout/tool_used_frac": 0.5,
        "rollout/unscored_frac": 0.0,
        "rollout/masked_frac": 0.1,
        "rollout/end_over_length_frac": 0.1,
        "rollout/sampled_tokens_mean": 40.0,
        "rollout/turns_mean": 1.0,
        "rollout/length_max": 200.0,
        "rollout/chance_accuracy": 0.25,
        "reward/total": 0.5,
        "reward/answer_accuracy": 0.3,
        "policy/trajectories": 30.0,
        "policy/grad_norm": 0.5,
        "policy/skipped_steps": 0.0,
        "policy/lr": 1e-6,
        "policy/loss": 0.1,
        "policy/clip_frac": 0.02,
    }
    return row | {"rollout/tool_success": math.nan} | changed


def sft(**changed: float) -> dict[str, float]:
    return {"sft/loss": 0.8, "sft/grad_norm": 1.0, "sft/lr": 1e-5, "sft/skipped_steps": 0.0} | changed


def numbered(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [row | {"iteration": number + 1.0} for number, row in enumerate(rows)]


PLANTED: list[tuple[str, dict[str, float], str]] = [
    ("no_variance", grpo(**EQUAL, **{"policy/grad_norm": 0.0}), "--rollout.num_samples (now 8)"),
    ("turns_cut", grpo(**CUT), "--rollout.agent.max_turn_tokens (now 48)"),
    ("turns_cut", grpo(**CUT | {"rollout/length_max": 511.0}), "--rollout.engine.max_model_len (now 512)"),
    ("prompts_too_long", grpo(**CUT | {"rollout/sampled_tokens_mean": 0.0}), "--rollout.agent.max_prompt_tokens"),
    ("no_tool_call", grpo(**{"rollout/tool_used_frac": 0.0}), "--rollout.agent.tool false"),
    ("all_masked", grpo(**EQUAL | {"rollout/masked_frac": 1.0}), "--model.init_args.algorithm.mask.over_length"),
    ("nothing_scored", grpo(**EQUAL | UNJUDGED), "judge --check"),
    ("learning_rate_zero", grpo(**{"policy/lr": 0.0}), "--model.init_args.optimizer.total_steps"),
    ("no_gradient", grpo(**{"policy/grad_norm": 0.0}), "policy.freeze_vision"),
    ("all_clipped", grpo(**{"policy/clip_frac": 0.97}), "--model.init_args.optimizer.lr"),
    ("steps_skipped", grpo(**{"policy/skipped_steps": 2.0}), "--model.init_args.optimizer.skip_norm_above"),
    ("loss_not_finite", sft(**{"sft/loss": math.nan}), "--model.init_args.optimizer.lr"),
    ("nothing_supervised", sft(**{"sft/loss": 0.0, "sft/grad_norm": 0.0}), "data show"),
    ("no_gradient", sft(**{"sft/grad_norm": 0.0}), "policy.freeze_vision"),
]


@pytest.mark.parametrize(("name", "row", "setting"), PLANTED, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(PLANTED)])
def test_a_run_that_cannot_learn_gets_one_finding_with_the_setting(
    name: str, row: dict[str, float], setting: str
) -> None:
    (found,) = find(numbered([row] * 12), SETTINGS)
    assert (found.name, found.first, found.last, found.is_whole) == (name, 1, 12, True)
    assert setting in found.remedy and "{" not in found.verdict()
    healthy = grpo() if "policy/lr" in row else sft()
    (later,) = find(numbered([healthy] * 3 + [row] * 12), SETTINGS, ended=False)
    assert (later.name, later.first, later.is_whole) == (name, 4, False)
    assert not find(numbered([row] * 20 + [healthy]), SETTINGS), "it was over before the run's end"
    assert not find(numbered([row] * 2), SETTINGS), "two iterations are too few"


def test_the_verdict_tells_a_run_that_never_learned_from_one_that_stopped() -> None:
    dead = grpo(**EQUAL)
    (whole,), (part,) = find(numbered([dead] * 3)), find(numbered([grpo()] * 5 + [dead] * 9))
    assert whole.verdict().startswith("this run did not learn: the rewards within every group are equal")
    assert part.verdict().startswith("this run stopped learning at iteration 6: ")
    (silent,) = find(numbered([grpo(**{"rollout/tool_used_frac": 0.0})] * 9))
    assert silent.verdict().startswith("check this run: "), "it may still learn to answer"
    (cut,) = find(numbered([grpo(**CUT)] * 5), SETTINGS)
    assert cut.blocks, "with equal rewards as its effect"


def test_settings_without_a_number_do_not_stop_the_findings() -> None:
    broken: dict[str, Any] = dict.fromkeys([*SETTINGS, "rollout.sampling.temperature"])
    for name, row, _ in PLANTED:
        assert [found.name for found in find(numbered([row] * 12), broken)] == [name]


def test_near_misses_are_no_findings() -> None:
    for misses in (
        {"rollout/reward_variance_frac": 0.01},
        EQUAL | {"reward/answer_accuracy": 0.97},  # solved
        EQUAL | {"rollout/trajectories": 4.0},  # few small groups
        {"rollout/end_over_length_frac": 0.9},
        {"rollout/tool_used_frac": 0.002},
        {"rollout/masked_frac": 0.95},
        {"rollout/unscored_frac": 0.9, "rollout/masked_frac": 0.0},
        {"policy/clip_frac": 0.6},
        {"policy/skipped_steps": 1.0},
    ):
        assert not find(numbered([grpo(**misses)] * 5), SETTINGS, ended=False), misses
    silent = [grpo(**{"rollout/tool_used_frac": 0.0})] * 9
    assert not find(numbered(silent), SETTINGS | {"rollout.agent.tool": False}), "the tool is off on purpose"
    mixed = [grpo(**EQUAL), grpo()] * 6
    assert not find(numbered(mixed), SETTINGS)
    assert not find([{"greedy/accuracy": 0.0}], SETTINGS) and not find([])


# ------------------------------------------------------------------ trends
def trend(reward: float, accuracy: float, chance: float | None = 0.25, size: int = 60) -> list[dict[str, float]]:
    """Metrics that change linearly by so much, with noise, from a reward and an accuracy of 0.25."""
    rng, rows = random.Random(0), []
    for number in range(size):
        done = number / size
        values = {"reward/total": 0.25 + reward * done + rng.gauss(0, 0.03)}
        values["reward/answer_accuracy"] = 0.25 + accuracy * done + rng.gauss(0, 0.03)
        rows.append(grpo(**values, **{"rollout/chance_accuracy": math.nan if chance is None else chance}))
    return numbered(rows)


def test_reward_that_rises_at_chance_is_reported_with_what_is_compared() -> None:
    (found,) = find(trend(reward=0.6, accuracy=0.0))
    assert found.name == "reward_without_accuracy" and not found.blocks
    assert "giving another question's answer would reach 0.25" in found.text
    (unknown,) = find(trend(reward=0.6, accuracy=0.0, chance=None))
    assert "accuracy did not (0.2" in unknown.text and "another question" not in unknown.text
    assert not find(trend(reward=0.6, accuracy=0.3)), "it learns"
    assert not find(trend(reward=0.0, accuracy=0.0)), "neither rises"
    assert not find(trend(reward=0.6, accuracy=0.0, chance=0.05)), "above chance: it may learn other things first"
    assert not find(trend(reward=0.6, accuracy=0.0), ended=False), "a run under way may still improve"


def test_an_sft_loss_that_rises_is_reported() -> None:
    rng = random.Random(0)
    for slope, names in ((0.02, ["loss_rose"]), (0.0, []), (-0.02, [])):
        rows = [sft(**{"sft/loss": 3 + slope * step + rng.gauss(0, 0.2)}) for step in range(60)]
        assert [found.name for found in find(numbered(rows))] == names


def test_chance_is_how_often_two_tasks_share_an_answer() -> None:
    assert chance_accuracy(["A", "a ", "B"]) == pytest.approx(1 / 3)
    assert chance_accuracy(["1", "2", "3"]) == 0 and chance_accuracy(["x"] * 4) == 1
    assert math.isnan(chance_accuracy(["7"]))


# ------------------------------------------------------------------ stored runs
def test_recorded_and_healthy_runs_have_no_findings() -> None:
    for folder in (FIXTURES / "smoke" / "rl", *(FIXTURES / "runs" / name for name in ("grpo", "sft", "lora", "zero3"))):
        rows, settings = read_rows(folder / "metrics.csv"), read_settings((folder / "fit_config.yaml").read_text())
        assert len(rows) > 1 and settings
        assert not find(rows, settings), folder


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_quickstart_has_no_finding_wherever_it_ends(stage: str) -> None:
    columns = json.loads(gzip.decompress((FIXTURES / "quickstart.json.gz").read_bytes()))[stage]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    assert len(rows) >= 100
    for length in range(1, len(rows) + 1, 7):
        assert not find(rows[:length], SETTINGS) and not find(rows[:length], SETTINGS, ended=False), length


def test_the_report_shows_the_finding_that_the_run_warned_of(tmp_path: Path) -> None:
    rows = numbered([grpo(**EQUAL)] * 6)
    (tmp_path / "fit_config.yaml").write_text("rollout: {num_samples: 8}\n")
    table = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    (tmp_path / "metrics.csv").write_text("\n".join(table) + "\n")
    (found,) = find(rows, {"rollout.num_samples": 8})
    page = write_report(tmp_path).read_text()
    assert found.remedy in page and "this run did not learn" in page and "Constant:" not in page
    (tmp_path / "metrics.csv").write_text("\n".join(table[:3]) + "\n")
    assert "Problems in training" not in write_report(tmp_path).read_text()


def test_the_report_marks_the_commands_of_a_remedy_as_code(tmp_path: Path) -> None:
    rows = numbered([grpo(**EQUAL | UNJUDGED)] * 6)
    table = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    (tmp_path / "metrics.csv").write_text("\n".join(table) + "\n")
    page = write_report(tmp_path).read_text()
    assert "See <code>cv-lightning judge --check</code>." in page


def test_a_resumed_run_that_is_complete_says_that_nothing_was_left_to_train(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(default_root_dir=str(tmp_path), callbacks=[])
    module: Any = SimpleNamespace(iteration=100, trains_on_rollouts=True)
    assert list(RunSummary()._made(trainer, module)) == ["nothing left to train after iteration 100"]


def test_a_line_leaves_out_tool_use_success_where_no_task_needs_the_tool() -> None:
    metrics = {"reward/total": 0.5, "rollout/tool_use_success": math.nan, "policy/mismatch_max": math.nan}
    trainer: Any = SimpleNamespace(callback_metrics=metrics)
    assert headline(trainer) == "reward 0.5  mismatch nan"
    metrics["rollout/tool_use_success"] = 0.25
    assert headline(trainer) == "reward 0.5  tool-use success 0.25  mismatch nan"


def test_rows_keep_what_is_not_finite_and_leave_out_a_torn_row(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("iteration,sft/loss,greedy/accuracy\n1.0,nan,\n2.0,inf,0.5\n3.0,0.12")
    first, second = read_rows(file)
    assert math.isnan(first["sft/loss"]) and "greedy/accuracy" not in first
    assert second == {"iteration": 2.0, "sft/loss": math.inf, "greedy/accuracy": 0.5}
    assert read_settings("a: {b: 1}\n") == {"a.b": 1} and read_settings("a: [") == read_settings("") == {}
