"""What the report says, from run folders that the real writers made, whole and in parts."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger
from report_samples import Size, resolved, write_run

from cv_lightning.commands.report import main as report_main
from cv_lightning.digits.figures import write_summary
from cv_lightning.digits.report import sections_of
from cv_lightning.digits.rotations import rotations_while_sampling
from cv_lightning.digits.summary import main as summary_main
from cv_lightning.digits.training import reward_formula, training_story
from cv_lightning.evaluation.curves import chart_groups, mean_between, thin
from cv_lightning.evaluation.runs import Curve, mismatch_max, read_curves
from cv_lightning.types import DataError
from cv_lightning.viewer.highlight import highlight
from cv_lightning.viewer.report import TEMPLATES, ReportConfig, write_report

FIGURES = {"accuracy", "tool_use_success", "spurious", "accuracy_upright", "accuracy_tool_off", "by_kind"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = Size(per_kind=5, iterations=28, tasks=4, samples=2, ablation=True)
    return write_run(tmp_path_factory.mktemp("runs") / "quickstart-seed3", size)


def report_of(run: Path, config: ReportConfig | None = None) -> Path:
    return write_report(run, config, sections_of=sections_of)


def page_data(page: Path) -> dict[str, Any]:
    text = page.read_text().split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return json.loads(text)


# ------------------------------------------------------------------------------------------------ summary
def test_the_summary_has_the_main_figures(run: Path) -> None:
    written, _ = write_summary(run)
    stored = json.loads((run / "summary.json").read_text())
    assert stored == written
    stages = {"sft_sampled", "sft", "rl_sampled", "rl"}
    assert {"seed", "minutes", "mismatch_max"} | stages <= stored.keys()
    assert stored.keys() - {"seed", "minutes", "mismatch_max"} - stages == {"rl_accuracy", "rl_accuracy_sampled"}
    assert all(stored[stage].keys() == FIGURES for stage in stages)
    assert stored["seed"] == 0
    assert stored["minutes"] == round((250.0 + 61.5 + 400.0 + 68.5) / 60, 2)  # without install, tiny and the ablation
    mismatches = [float(row) for row in column(run / "rl" / "metrics.csv", "policy/mismatch_max")]
    assert stored["mismatch_max"] == max(mismatches)


def test_a_stage_without_timing_has_no_minutes(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "eval" / "sft_greedy_tool", tmp_path / "eval" / "sft_greedy_tool")
    (tmp_path / "timing.json").write_text('{"sft": 10.0, "rl": 20.0, "sft_eval": 1.0}')
    written, _ = write_summary(tmp_path, seed=4)
    assert (written["seed"], written["minutes"], written["mismatch_max"], written["rl"]) == (4, None, None, None)
    assert written["sft"]["accuracy_tool_off"] is None


def column(path: Path, name: str) -> list[str]:
    header, *rows = (line.split(",") for line in path.read_text().splitlines())
    return [row[header.index(name)] for row in rows if row[header.index(name)]]


# ------------------------------------------------------------------------------------------------ how it was trained
def test_files_of_conversations_have_no_tool_fraction() -> None:
    config = {"data": {"init_args": {"train_files": ["a.json"], "num_steps": 3}}}
    assert training_story({"sft/fit_config.yaml": yaml.safe_dump(config)}) == [
        ("Supervised fine-tuning", ["Conversations of a.json."])
    ]


@pytest.mark.parametrize("text", ["", "null", "[1, 2]", "data: null", "data: {init_args: {}}"])
def test_an_empty_config_gives_no_description(text: str) -> None:
    assert training_story({"sft/fit_config.yaml": text, "rl/fit_config.yaml": text}) == []


def test_the_reward_is_described_by_its_formula() -> None:
    assert reward_formula(resolved("reward_accuracy")) == "accuracy + 0.1 format"
    formula = reward_formula(resolved("reward") | {"emerge": 0.2, "spurious": 0.5, "usage": 0})
    assert formula.startswith("accuracy + 0.1 format + mandatory")
    assert "+ 0.2 emerge" in formula
    assert formula.endswith("\N{MINUS SIGN} 0.5 spurious")


# ------------------------------------------------------------------------------------------------ curves
def test_curves_whose_columns_come_late_are_read(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    logger.log_metrics({"iteration": 1.0, "rollout/spurious": math.nan, "policy/mismatch_max": 2e-5}, 0)
    logger.save()
    logger.log_metrics({"iteration": 2.0, "rollout/spurious": 0.5, "policy/mismatch_max": 1e-5, "new": 1.0}, 3)
    logger.save()
    path = tmp_path / "metrics.csv"
    curves = {curve.name: curve for curve in read_curves(path)}
    assert (curves["rollout/spurious"].steps, curves["rollout/spurious"].values) == ([2.0], [0.5])
    assert curves["new"].steps == [2.0]
    assert mismatch_max(list(curves.values())) == 2e-5
    path.write_text(path.read_text().rstrip("\n")[:-1])  # a kill within the last row
    assert [curve.steps for curve in read_curves(path) if curve.name == "policy/mismatch_max"] == [[1.0]]


def test_unnecessary_rotations_are_the_mean_of_iterations_6_to_25(run: Path) -> None:
    found = rotations_while_sampling(run)
    assert [entry.label for entry in found] == ["with process reward", "without process reward"]
    for stage, entry in zip(("rl", "rl_accuracy"), found, strict=True):
        rows = column(run / stage / "metrics.csv", "rollout/spurious")
        assert len(rows) == 28
        assert entry.mean == pytest.approx(sum(map(float, rows[5:25])) / 20)
        assert entry.num_iterations == 20
    assert found[1].mean > found[0].mean


def test_an_iteration_without_upright_tasks_does_not_count() -> None:
    curve = Curve(name="x", steps=[5.0, 6.0, 25.0, 26.0], values=[9.0, 1.0, 2.0, 9.0])
    assert mean_between([curve], "x", 6, 25) == (1.5, 2)
    mean, count = mean_between([curve], "y", 6, 25)
    assert math.isnan(mean)
    assert count == 0


def test_charts_hold_every_metric_once_with_its_unit_and_list_constant_ones() -> None:
    names = [
        "reward/total",
        "reward/format",
        "rollout/tool_use_success",
        "policy/lr",
        "time/rollout_s",
        "sft/loss",
        "strange",
    ]
    curves = [Curve(name=name, steps=[1.0, 2.0], values=[1.0, 1.0 + ("format" not in name)]) for name in names]
    groups = chart_groups(curves)
    drawn = [series["name"] for group in groups for chart in group["charts"] for series in chart["series"]]
    assert sorted(drawn) == ["loss", "policy/lr", "strange", "time/rollout_s", "tool_use_success", "total"]
    assert (groups[-1]["note"], groups[-1]["charts"], groups[-1]["folded"]) == ("reward/format 1.", [], True)
    assert {chart["unit"] for group in groups for chart in group["charts"]} >= {"reward", "fraction", "seconds"}


def test_thinning_keeps_the_mean() -> None:
    steps, values = thin([float(i) for i in range(1000)], [float(i % 7) for i in range(1000)], 100)
    assert len(steps) == 100
    assert sum(values) / 100 == pytest.approx(sum(i % 7 for i in range(1000)) / 1000)


# ------------------------------------------------------------------------------------------------ the page
def test_the_page_loads_nothing_from_elsewhere(run: Path) -> None:
    page = report_of(run)
    text = page.read_text()
    assert page.stat().st_size < 15e6
    outside = [word for word in text.split('"') if word.startswith(("http://", "https://", "//"))]
    assert set(outside) <= {"http://www.w3.org/2000/svg"}
    for entry in rotations_while_sampling(run):
        assert f"<b>{100 * entry.mean:.1f} %</b>" in text


def test_examples_are_the_same_tasks_chosen_without_their_outcome(run: Path) -> None:
    data = page_data(report_of(run))
    kinds = [example["kind"] for example in data["examples"]]
    assert kinds == ["upright", "turned", "small", "turned_and_small"]
    drawn = []
    for example in data["examples"]:
        before, after = (data["trajectories"][example[when]] for when in ("before", "after"))
        groups = [data["groups"][trajectory["group"]] for trajectory in (before, after)]
        assert groups[0]["task"]["id"] == groups[1]["task"]["id"]
        assert [data["stores"][group["store"]]["name"] for group in groups] == [
            "eval/sft_greedy_tool",
            "eval/rl_greedy_tool",
        ]
        drawn.append(groups[0]["task"]["id"])
    again = run.parent / "again"
    shutil.copytree(run, again)
    for path in again.glob("eval/*/trajectories/*.jsonl"):  # everything right: the same tasks are drawn
        path.write_text(path.read_text().replace('"correct":false', '"correct":true'))
    other = page_data(report_of(again))
    assert drawn == [
        other["groups"][other["trajectories"][e["after"]]["group"]]["task"]["id"] for e in other["examples"]
    ]


def test_the_models_view_is_shown_where_it_is_much_smaller(run: Path) -> None:
    data = page_data(report_of(run))
    for trajectory in data["trajectories"]:
        kind = data["groups"][trajectory["group"]]["task"]["kind"]
        assert ("seen" in trajectory["images"][0]) == ("small" in kind)


def test_any_run_gets_the_same_tables_without_the_words_of_the_quickstart(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("timing.json", "report.html", "summary.json"))
    text = report_of(tmp_path / "run").read_text()
    assert "Side by side, with 95 % intervals" in text and "rl accuracy" in text
    assert not any(words in text for words in ("Before and after", "process reward", "How it was trained"))
    data = page_data(tmp_path / "run" / "report.html")
    assert {row["stage"] for row in data["intervals"]} == {"sft", "rl", "rl_accuracy"}
    assert {entry["stage"]: entry["axis"] for entry in data["curves"]} == {
        "sft": "step",
        "rl": "iteration",
        "rl_accuracy": "iteration",
    }


def test_any_run_says_what_was_trained_on_what_and_how_far_it_got(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    config = {
        "model": {"class_path": "x.GRPOModule", "init_args": {"policy": {"path": "/models/Qwen3-VL-2B"}}},
        "data": {
            "class_path": "x.TaskDataModule",
            "init_args": {"train_files": ["/d/<b>.parquet"], "num_iterations": 9},
        },
        "rollout": {"store": {"share": 0.25}},
    }
    record = {"started": "2026-01-02T03:04:05+0000", "changed": {"rollout": {"num_samples": 4}}}
    record["command"] = ["/usr/bin/python3", "/x/cv_lightning/__main__.py", "fit", "--name", "<i>"]
    rows = "".join(f"{step},{step + 1},16\n" for step in range(3))
    (run / "metrics.csv").write_text(f"step,iteration,rollout/trajectories\n{rows}")
    (run / "fit_config.yaml").write_text(yaml.safe_dump(config))
    (run / "fit_run.json").write_text(json.dumps(record))
    text = report_of(run).read_text()
    assert "<h1>GRPO of models/Qwen3-VL-2B on &lt;b&gt;.parquet</h1>" in text
    assert "3 of 9 iterations" in text and "no end was recorded" in text and "2026-01-02 03:04" in text
    assert "0 of the 48 trajectories rolled out are stored (rollout.store.share 0.25)" in text
    assert (
        "python -m cv_lightning fit --name &#39;&lt;i&gt;&#39;" in text and "<code>rollout.num_samples</code>" in text
    )
    assert '<a href="metrics.csv">' in text and "No evaluation is stored" in text and "Smoke run" not in text
    (run / ".owner-fit.json").write_text("{}")
    assert ">running</span>" in report_of(run).read_text()
    (run / "fit_run.json").write_text(json.dumps(record | {"status": "stopped by SIGTERM"}))
    assert ">stopped by SIGTERM</span>" in report_of(run).read_text()


@pytest.mark.parametrize("smoke", [0, 1])
def test_a_smoke_run_says_so_from_its_record(run: Path, tmp_path: Path, smoke: int) -> None:
    shutil.copytree(run / "sft", tmp_path / "any-name" / "sft")
    (tmp_path / "any-name" / "timing.json").write_text(json.dumps({"seed": 0, "smoke": smoke}))
    assert ("No learning is claimed" in report_of(tmp_path / "any-name").read_text()) == bool(smoke)


def test_parts_of_a_run_make_a_page(run: Path, tmp_path: Path) -> None:
    for name in ("rl", "sft", "eval"):
        shutil.copytree(run / name, tmp_path / name / name)
        assert write_report(tmp_path / name).stat().st_size > 10_000
    (tmp_path / "sft" / "sft" / "trajectories").mkdir()
    assert "0 stored trajectories" in write_report(tmp_path / "sft").read_text()


def test_an_incomplete_line_is_counted_on_the_page(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "eval" / "rl_greedy_tool", tmp_path / "eval" / "rl_greedy_tool")
    (path,) = tmp_path.glob("eval/*/trajectories/*.jsonl")
    path.write_bytes(path.read_bytes()[:-30])
    assert "1 unreadable line in rl, greedy skipped" in write_report(tmp_path).read_text()


def test_images_over_the_limit_are_linked(run: Path, tmp_path: Path) -> None:
    text = report_of(run, ReportConfig(max_image_mb=0.0)).read_text()
    assert "images are loaded from the run's folder" in text
    assert "data:image/png" not in text
    report_of(run)


def test_the_sample_holds_the_same_tasks_of_every_evaluation(run: Path) -> None:
    data = page_data(report_of(run, ReportConfig(max_trajectories=96)))
    assert len(data["trajectories"]) <= 96 + len(data["stores"])
    tasks: dict[str, set[str]] = {}
    for group in data["groups"]:
        name = data["stores"][group["store"]]["name"]
        if name.startswith("eval/"):
            tasks.setdefault(name, set()).add(group["task"]["id"])
    assert len(set.intersection(*tasks.values())) >= 2


def test_missing_images_and_unreadable_lines_are_counted(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "eval" / "rl_greedy_tool", tmp_path / "eval" / "rl_greedy_tool")
    (path,) = tmp_path.glob("eval/*/trajectories/*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line.replace('"schema":2', '"schema":0') for line in lines[:2]) + "".join(lines[2:]))
    files = {image["original"]["file"] for image in json.loads(lines[-1])["trajectories"][0]["images"]}
    for file in files:
        (tmp_path / "eval" / "rl_greedy_tool" / "images" / file).unlink()
    noun = "image is" if len(files) == 1 else "images are"
    for limit in (8.0, 0.0):
        text = write_report(tmp_path, ReportConfig(max_image_mb=limit)).read_text()
        assert re.search(rf"{len(files)} {noun}\s+missing in the run's folder", text)
        assert re.search(r"2 unreadable lines in rl, greedy skipped:\s+of an older schema", text)


def test_text_has_contrast_in_both_colour_schemes() -> None:
    """WCAG 2.1, AA: 4.5 for text; the code's colours stand on the wash, chips on their own."""
    style = (TEMPLATES / "report.css").read_text()
    schemes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(schemes) == 2
    on = {"ink": "paper card wash", "soft": "paper card wash", "accent": "card paper", "accent-ink": "accent"}
    on |= {"good": "good-wash paper", "bad": "bad-wash", "note": "note-wash"}
    on |= {f"c{number}": "wash card" for number in range(4)}
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): #(\w{6})", scheme))
        for text, grounds in on.items():
            for ground in grounds.split():
                lighter, darker = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
                assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, ground)


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.1 of `rrggbb`."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_pieces_of_code_join_to_the_code() -> None:
    code = "for x in range(3):\r\n\timage.crop((0, 1, 2, 3))  # <b>'half\n\x00 '"
    pieces = highlight(code)
    assert "".join(text for _, text in pieces) == code
    assert [text for tone, text in pieces if tone == "fn"] == ["range", "crop"]
    assert [text for tone, text in pieces if tone == "k"] == ["for", "in"]
    assert ("com", "# <b>'half") in pieces


@pytest.mark.parametrize("command", [report_main, summary_main])
def test_a_folder_without_a_run_is_a_message(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command([str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
    assert command([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_the_report_names_the_flag_that_is_out_of_range(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_main([str(run), "--thumbnail_px", "3"]) == 2
    assert "--thumbnail_px" in capsys.readouterr().err


def test_a_cut_off_timing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "timing.json").write_text('{"sft": 1')
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl" / "metrics.csv").write_text("step,reward/total\n1,2\n")
    with pytest.raises(DataError, match=r"timing\.json: not JSON"):
        report_of(tmp_path)
