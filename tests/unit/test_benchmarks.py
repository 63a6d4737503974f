"""Public benchmarks: small files in each one's own format, read as the configs say; the orientation probe."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from trajectory_samples import digit_task

from cv_lightning.data.benchmarks import BY_LETTER, task_files
from cv_lightning.data.corruptions import CorruptionConfig
from cv_lightning.data.probe import ProbeConfig, ProbeRows
from cv_lightning.data.rows import FieldNames, ReaderConfig
from cv_lightning.digits.modules import DigitTaskDataModule
from cv_lightning.evaluation.published import plain_name, published_on, published_results
from cv_lightning.orientations import ORIENTATIONS
from cv_lightning.rewards.answer import rule_score
from cv_lightning.types import DataError, Task

CONFIGS = Path(__file__).parents[2] / "configs/eval"


def picture(seed: int = 0, size: tuple[int, int] = (60, 40)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def cell(seed: int = 0) -> dict[str, Any]:
    return {"bytes": picture(seed), "path": None}


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def ocrbench(folder: Path) -> Path:
    row = {"dataset": "IIIT5K", "question": "what is written?", "question_type": "Regular Text Recognition"}
    return parquet(folder / "o.parquet", [row | {"answer": ["CENTRE", "CENTER"], "image": cell()}])


def chartqapro(folder: Path) -> Path:
    row = {
        "Question": ["Which is largest?", "And by how much?"],
        "Answer": ["Spain", "12"],
        "Question Type": "Conversational",
        "Year": ["NO", "NO"],
        "Paragraph": "A report.",
        "image": picture(),
    }
    return parquet(folder / "c.parquet", [row])


def vstar(folder: Path) -> Path:
    (folder / "direct_attributes").mkdir()
    (folder / "direct_attributes/sa_1.png").write_bytes(picture())
    boxes = {"target_object": ["cup", "hat"], "bbox": [[5, 6, 10, 4], [30, 20, 8, 8]]}
    (folder / "direct_attributes/sa_1.json").write_text(json.dumps(boxes))
    line = {
        "image": "direct_attributes/sa_1.png",
        "text": "What colour is the cup?\n(A) red\n(B) blue",
        "category": "direct_attributes",
        "label": "A",
        "question_id": "0",
    }
    path = folder / "test_questions.jsonl"
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | {"image": "direct_attributes/gone.png"}) + "\n")
    return path


def hrbench(folder: Path) -> Path:
    header = ["index", "question", "answer", "category", "A", "B", "C", "D", "cycle_category", "image"]
    row = ["0", '"What does the ""sign""\nsay?"', "B", "single", "Stop", "Go", "Left", "Right", "0"]
    row.append(base64.b64encode(picture()).decode())
    path = folder / "hr_bench_4k.tsv"
    path.write_text("\n".join("\t".join(cells) for cells in (header, row, ["1", *row[1:]])) + "\n")
    return path


def vtcbench(folder: Path) -> Path:
    header = ["index", "id", "category", "image", "question", "answer", "A", "B", "C", "D", "model_tools_gt"]
    lettered = ["1", "chart_1", "chart", "images/chart/chart_1.png", "How high?", "C", "1", "2", "3", "4", '["Crop"]']
    open_ended = ["2", "ocr_1", "ocr", "images/chart/chart_1.png", "What is written?", "STOP", *[""] * 5]
    (folder / "images/chart").mkdir(parents=True)
    (folder / "images/chart/chart_1.png").write_bytes(picture())
    path = folder / "VTC-Bench.tsv"
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([header, lettered, open_ended])
    return path


def tirbench(folder: Path) -> Path:
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(picture())
    base = {"image_1": "a.png", "prompt": "Which pieces go where?", "answer": "[2, 1, 3, 4]", "id": 0}
    items = [
        base | {"task": "jigsaw", "image_2": None, "meta_data": {"difficulty": 2}},
        base | {"task": "spot_difference", "image_2": "b.png", "answer": 4},
    ]
    path = folder / "TIR-Bench.json"
    path.write_text(json.dumps(items))
    return path


def docvqa(folder: Path) -> Path:
    row = {"questionId": "7", "question": "What is the date?", "answers": ["1 May", "May 1"], "image": cell()}
    return parquet(folder / "d.parquet", [row])


def read(path: Path, **reader: Any) -> list[Task]:
    rows = task_files([path], ReaderConfig(**reader))
    return [rows.row(position) for position in range(len(rows))]


def test_ocrbench(tmp_path: Path) -> None:
    [task] = read(ocrbench(tmp_path), format="ocrbench", data_source="ocrbench")
    assert (task.question, task.ground_truth, task.data_source) == ("what is written?", "CENTRE", "ocrbench")
    assert task.metadata["accepted_answers"] == ["CENTRE", "CENTER"]
    assert (task.metadata["metric"], task.metadata["category"]) == ("ocrbench", "Regular Text Recognition")


def test_chartqapro_gives_the_conversation_and_asks_its_last_question(tmp_path: Path) -> None:
    [task] = read(chartqapro(tmp_path), format="chartqapro")
    assert task.question == "A report.\n\nQ: Which is largest?\nA: Spain\n\nAnd by how much?"
    assert (task.ground_truth, task.metadata["year"]) == ("12", ["NO", "NO"])
    assert task.images[0].size == (60, 40)


def test_vstar_has_its_evidence_and_counts_a_missing_image(tmp_path: Path) -> None:
    rows = task_files([vstar(tmp_path)], ReaderConfig(format="vstar"))
    assert len(rows) == 1
    task = rows.row(0)
    assert (task.box, task.ground_truth) == ((5.0, 6.0, 38.0, 28.0), "A")
    assert [problem.kind for problem in rows.problems.problems] == ["unreadable image"]


def test_hrbench_rows_with_quotes_and_line_breaks(tmp_path: Path) -> None:
    one, other = read(hrbench(tmp_path), format="hrbench", data_source="hrbench4k")
    assert one.question.startswith('What does the "sign"\nsay?\nA. Stop\nB. Go\nC. Left\nD. Right\n')
    assert (one.ground_truth, one.metadata["category"], one.images[0].size) == ("B", "single", (60, 40))
    assert one.id != other.id and one.question == other.question
    assert one.metadata["picture"] == other.metadata["picture"], "rotations of a question's options are one cluster"


def test_tirbench_has_one_or_two_images(tmp_path: Path) -> None:
    jigsaw, spot = read(tirbench(tmp_path), format="tirbench")
    assert (len(jigsaw.images), len(spot.images)) == (1, 2)
    assert (spot.ground_truth, spot.metadata["category"]) == ("4", "spot_difference")
    (tmp_path / "ocr").mkdir()
    (tmp_path / "ocr/60.jpg").write_bytes(picture())
    row = {"image_1": "ocr/60.jpg", "prompt": "What is written?", "answer": "mobl", "id": 0, "task": "ocr"}
    (tmp_path / "ocr.json").write_text(json.dumps([row]))
    [mended] = read(tmp_path / "ocr.json", format="tirbench")
    assert mended.ground_truth == "mobi", "as the benchmark's own scoring has it"


def test_vtcbench_has_options_in_columns_or_none_and_never_shows_its_chain(tmp_path: Path) -> None:
    lettered, open_ended = read(vtcbench(tmp_path), format="vtcbench")
    assert lettered.question == f"How high?\nA. 1\nB. 2\nC. 3\nD. 4\n{BY_LETTER}"
    assert (lettered.ground_truth, lettered.metadata["category"], lettered.images[0].size) == ("C", "chart", (60, 40))
    assert lettered.metadata["reference_tools"] == '["Crop"]'
    assert (open_ended.question, open_ended.ground_truth) == ("What is written?", "STOP")
    assert "reference_tools" not in open_ended.metadata


def test_docvqa(tmp_path: Path) -> None:
    [task] = read(docvqa(tmp_path), format="docvqa", data_source="docvqa_turned")
    assert (task.metadata["metric"], task.metadata["accepted_answers"]) == ("anls", ["1 May", "May 1"])
    assert rule_score("May 1", task.accepted).value == 1.0 and rule_score("May 2", task.accepted).value == 0.0


def test_columns_with_other_names(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(picture())
    path = tmp_path / "q.json"
    path.write_text(json.dumps({"data": [{"ask": "Which?", "said": "B", "file": "x.png", "choices": ["one", "two"]}]}))
    names = FieldNames(question="ask", answer="said", image="file", options="choices")
    [task] = read(path, format="fields", fields=names)
    assert task.question.startswith("Which?\nA. one\nB. two\n") and task.ground_truth == "B"


@pytest.mark.parametrize(
    ("write", "given", "message"),
    [
        (ocrbench, "docvqa", "no column answers; it has answer, dataset"),
        (hrbench, "vstar", "no column text, label; it has index, question"),
        (tirbench, "vstar", "no key image, text, label; it has image_1"),
    ],
)
def test_a_file_of_another_schema_names_what_is_missing(
    tmp_path: Path, write: Callable[[Path], Path], given: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path), format=given)


def test_an_unknown_file_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("a,b\n")
    with pytest.raises(DataError, match=r"not from '\.txt'"):
        read(path, format="docvqa")


def test_every_config_names_a_format_and_published_results() -> None:
    known = {plain_name(entry.benchmark) for entry in published_results()}
    for path in sorted(CONFIGS.glob("*.yaml")):
        data = yaml.safe_load(path.read_text())["data"]["init_args"]
        if path.stem == "digits":
            continue
        fields = data["reader"].pop("fields", {})
        config = ReaderConfig(**data["reader"], fields=FieldNames(**fields))
        assert data["eval_files"], path
        assert path.stem == "probe" or plain_name(config.data_source) in known, path


def test_published_rows_agree_with_their_own_columns() -> None:
    columns = ("identity", "rotate_90", "rotate_180", "rotate_270", "flip_horizontal", "flip_vertical")
    rows = [entry for name in ("OCRBench", "chartqapro") for entry in published_on(name) if "rotate_90" in entry.scores]
    assert len(rows) == 30
    for entry in rows:
        scores = [entry.scores[column] for column in columns]
        assert entry.scores["mean_of_six"] == pytest.approx(sum(scores) / 6, abs=0.11), entry
        assert entry.scores["mean_of_transformed"] == pytest.approx(sum(scores[1:]) / 5, abs=0.06), entry
    assert all(entry.base and entry.harness and entry.source for entry in published_results())


SAID = {
    "rotate_90": "counter-clockwise",
    "rotate_180": "180",
    "rotate_270": "90 degrees clockwise",
    "flip_horizontal": "left to right",
    "flip_vertical": "top to bottom",
}


class Upright:
    """Upright digits as rows."""

    def __len__(self) -> int:
        return 30

    def row(self, position: int) -> Task:
        return digit_task(position, "upright")


def test_the_probe_is_balanced_and_its_answers_are_right() -> None:
    rows = ProbeRows(Upright(), ProbeConfig(num_images=20))
    tasks = [rows.row(position) for position in range(len(rows))]
    assert Counter(task.metadata["category"] for task in tasks) == dict.fromkeys(ORIENTATIONS, 4)
    for task in tasks:
        before = digit_task(int(task.id.removesuffix("/probe").rsplit("-", 1)[-1]), "upright").images[0]
        expected = {
            "rotate_90": np.rot90(np.asarray(before)),
            "rotate_180": np.rot90(np.asarray(before), 2),
            "rotate_270": np.rot90(np.asarray(before), 3),
            "flip_horizontal": np.fliplr(np.asarray(before)),
            "flip_vertical": np.flipud(np.asarray(before)),
        }[task.metadata["category"]]
        assert np.array_equal(np.asarray(task.images[0]), expected)
        line = next(line for line in task.question.splitlines() if line.startswith(f"{task.ground_truth}."))
        assert SAID[task.metadata["category"]] in line
    assert [ProbeRows(Upright(), ProbeConfig(num_images=20)).row(i).id for i in range(20)] == [t.id for t in tasks]


def test_the_probe_needs_upright_images() -> None:
    with pytest.raises(ValueError, match=r"--data\.probe turns the images already"):
        DigitTaskDataModule(probe=ProbeConfig(), corruptions=CorruptionConfig())
    data = DigitTaskDataModule(test_tasks={"turned": 2}, probe=ProbeConfig(num_images=2))
    with pytest.raises(DataError, match="not upright"):
        next(iter(data.test_dataloader()))
