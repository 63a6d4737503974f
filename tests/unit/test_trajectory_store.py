"""The trajectory store: what is written comes back, whatever happens in between."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
import time
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw
from trajectory_samples import KINDS, Policy, digit_task, group

from cv_lightning.commands.trajectories import main as export_main
from cv_lightning.images import content_hash, decode_image
from cv_lightning.trajectory import (
    StoreConfig,
    TrajectoryWriter,
    path_of,
    pixels_of,
    read_groups,
    to_dataframe,
    write_parquet,
)
from cv_lightning.trajectory.store import drop_after, encode_image, last_groups
from cv_lightning.types import (
    SCHEMA_VERSION,
    Affine,
    CVLightningError,
    DataError,
    Effect,
    EndState,
    Group,
    ImageTrace,
    Message,
    Operation,
    RewardBreakdown,
    Task,
    ToolCall,
    ToolResult,
    ToolStatus,
    Trajectory,
    TrajectoryImage,
    Turn,
)


def write(folder: Path, groups: list[Group], config: StoreConfig | None = None, **options: object) -> Path:
    with TrajectoryWriter(folder, config, **options) as writer:  # type: ignore[arg-type]
        for item in groups:
            writer.write_group(item, item.iteration)
    return writer.path


def sample_groups(count: int = 4, size: int = 3) -> list[Group]:
    return [group(digit_task(index, KINDS[index % 4]), size, iteration=index) for index in range(count)]


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_what_is_written_comes_back_with_the_same_pixels(tmp_path: Path, image_format: str) -> None:
    groups = sample_groups()
    write(tmp_path, groups, StoreConfig(image_format=image_format, tokens=True))  # type: ignore[arg-type]
    read = list(read_groups(tmp_path))
    for found, given in zip(read, groups, strict=True):
        for got, live in zip(found.trajectories, given.trajectories, strict=True):
            for stored, image in zip(got.images, live.images, strict=True):
                assert np.array_equal(pixels_of(stored.original), image.original)
                assert np.array_equal(pixels_of(stored.model_image), image.original.resize((96, 96)))
            assert replace(got, turns=[], images=[]) == replace(live, turns=[], images=[])
            assert got.operations == live.operations
        assert found.task == given.task


def populated_group() -> Group:
    """A group in which no field has its default value."""
    image, seen = (Image.effect_noise((40, 30), 50).convert("RGB").resize(size) for size in ((40, 30), (20, 15)))
    here = Affine(0.0, -1.0, 30.0, 1.0, 0.0, 0.0)
    task = Task(
        id="t",
        question="How many?",
        images=(image,),
        ground_truth="7",
        data_source="charts",
        required_transforms=("rotate_90",),
        box=(1.0, 2.0, 3.5, 4.0),
        messages=(Message(role="user", content="<image>How many?"),),
        metadata={"kind": "bars", "accepted_answers": ["7", "seven"], "nested": {"a": [1, None, 2.5]}},
    )
    operation = Operation(
        name="crop", call="PIL.Image.crop", arguments={"box": [1, 2]}, input_size=(4, 3), output_size=(2, 1), used=False
    )
    effect = Effect(
        to_input=here,
        core=("crop",),
        crop_box=(0.0, 0.0, 2.0, 1.0),
        fidelity=0.5,
        shown=(0.0, 0.0, 1.0, 1.0),
        turned=("rotate_90",),
    )
    result = ToolResult(
        status=ToolStatus.TIMEOUT,
        text="said",
        error="too slow",
        error_kind="timeout",
        operations=(operation,),
        effect=effect,
        traces=(ImageTrace(effect, (0,)), ImageTrace(None, ())),
        executor="process",
        elapsed_s=0.125,
    )
    turn = Turn(
        text="text",
        num_tokens=2,
        tool_call=ToolCall(name="grid", arguments={"rows": 2}),
        parse_error="not JSON",
        result=result,
        image_index=1,
        num_images=2,
        response_text="seen",
        generate_s=0.25,
        tool_s=0.5,
    )
    trajectory = Trajectory(
        task=task,
        sample=3,
        token_ids=[5, 6, 7],
        loss_mask=[False, True, True],
        logprobs=[0.0, -0.5, -1.5],
        num_prompt_tokens=1,
        images=[TrajectoryImage(original=image, model_image=seen, source=1, parent=2, to_source=here)],
        turns=[turn],
        end_state=EndState.MAX_IMAGES,
        error="one too many",
        policy_version=4,
        dialect="another",
        reward=RewardBreakdown(components={"accuracy": 1.0}, total=1.5, correct=True, answer="7", scored_by="judge"),
        advantage=0.75,
        total_s=2.5,
    )
    return Group(task=task, trajectories=[trajectory], iteration=9)


def with_defaults(value: Any) -> list[str]:
    """Fields of a dataclass and of those below it that have their default value."""
    if isinstance(value, list | tuple):
        return [name for item in value for name in with_defaults(item)]
    if not is_dataclass(value):
        return []
    found = []
    for field in fields(value):
        item = getattr(value, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        found += [f"{type(value).__name__}.{field.name}"] if item == default else with_defaults(item)
    return found


def test_every_field_of_every_type_comes_back(tmp_path: Path) -> None:
    """A field that is added to one of the types is stored, too, unless this test says why not."""
    given = populated_group()
    not_stored = {"ToolResult.images", "Task.recorded_digest", "Trajectory.token_summary", "Trajectory.partial_score"}
    assert set(with_defaults(given)) == not_stored, "give new fields another value than their default here"
    write(tmp_path, [given], StoreConfig(tokens=True))
    (found,) = read_groups(tmp_path)
    (trajectory,), (live,) = found.trajectories, given.trajectories
    (image,), (known,) = trajectory.images, live.images
    assert image.original == known.original and image.model_image.size == known.model_image.size
    assert replace(image, original=known.original, model_image=known.model_image) == known
    assert replace(trajectory, images=live.images) == live
    assert replace(found, trajectories=given.trajectories) == given
    assert (found.task.digest, trajectory.tokens) == (given.task.digest, live.tokens)


def test_a_stored_image_is_known_without_its_pixels(tmp_path: Path) -> None:
    given = populated_group()
    write(tmp_path, [given])
    image = next(read_groups(tmp_path)).trajectories[0].images[0].original
    assert content_hash(image) == content_hash(given.task.images[0])
    changed = given.task.images[0].copy()
    changed.putpixel((0, 0), (1, 2, 3))
    assert content_hash(changed) != content_hash(image), "a copy has a hash of its own"
    path = path_of(image)
    assert path is not None
    path.unlink()
    assert image.size == (40, 30) and image == given.task.images[0] and image != changed
    with pytest.raises(DataError, match="missing"):
        image.getpixel((0, 0))


def test_tokens_that_are_not_kept_leave_their_summary(tmp_path: Path) -> None:
    given = populated_group()
    write(tmp_path, [given])
    (trajectory,) = next(read_groups(tmp_path)).trajectories
    assert (trajectory.token_ids, trajectory.loss_mask, trajectory.logprobs) == ([], [], [])
    assert trajectory.tokens == given.trajectories[0].tokens
    assert trajectory.tokens.num_tokens == 3 and trajectory.tokens.logprob is not None
    assert trajectory.tokens.logprob.mean == -1.0


def test_an_image_is_written_once_and_read_only_when_asked(tmp_path: Path) -> None:
    task = digit_task(1, "turned")
    write(tmp_path, [group(task, 8, Policy(turn=1, error=0))])
    files = sorted((tmp_path / "images").iterdir())
    assert len(files) == 2  # the task's image and the one upright result, which eight rollouts made
    for file in files:
        file.unlink()
    (record,) = read_groups(tmp_path)
    with pytest.raises(DataError, match=r"\.png: missing"):
        record.trajectories[0].images[0].original.load()


def test_a_kill_at_any_byte_costs_at_most_the_last_line(tmp_path: Path) -> None:
    path = write(tmp_path, sample_groups(3, size=1))
    data = path.read_bytes()
    lengths = np.cumsum([len(line) for line in data.splitlines(keepends=True)])
    for cut in [*range(0, len(data), 97), *(int(end) + step for end in lengths for step in (-2, -1, 0))]:
        path.write_bytes(data[:cut])
        reader = read_groups(tmp_path)
        complete = int(np.sum(lengths - 1 <= cut))  # all but its newline is a whole line
        assert len(list(reader)) == complete
        assert len(reader.bad_lines) == int(cut not in (0, *lengths, *(lengths - 1)))


def test_a_new_writer_appends_after_a_torn_line(tmp_path: Path) -> None:
    groups = sample_groups(4, size=1)
    path = write(tmp_path, groups[:2])
    path.write_bytes(path.read_bytes()[:-40])
    write(tmp_path, groups[2:])
    reader = read_groups(tmp_path)
    assert [found.task.id for found in reader] == [groups[i].task.id for i in (0, 2, 3)]
    assert [bad.line for bad in reader.bad_lines] == [2]


def test_a_writer_killed_by_a_signal_leaves_a_readable_store(tmp_path: Path) -> None:
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from trajectory_samples import digit_task, group
from cv_lightning.trajectory import TrajectoryWriter
writer = TrajectoryWriter({str(tmp_path)!r})
for index in range(100000):
    writer.write_group(group(digit_task(index, "turned"), 2), 0)
    print(index, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= 5:
                break
        child.kill()
    read = list(read_groups(tmp_path))
    assert len(read) >= 6
    for found in read:  # images come before the line that names them
        assert pixels_of(found.trajectories[0].images[-1].original).mode == "RGB"


def test_ranks_write_side_by_side(tmp_path: Path) -> None:
    groups = sample_groups(2)
    write(tmp_path, groups[:1], rank=0)
    write(tmp_path, groups[1:], rank=1)
    assert [found.task.id for found in read_groups(tmp_path)] == [given.task.id for given in groups]
    assert [path.name for path in read_groups(tmp_path).files] == ["groups.rank0.jsonl", "groups.rank1.jsonl"]


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, sample_groups(1))
    data = json.loads(path.read_text())
    data["schema"] = SCHEMA_VERSION + 1
    path.write_text(json.dumps(data) + "\n")
    with pytest.raises(DataError, match=rf"line 1: trajectories of schema {SCHEMA_VERSION + 1}.*update cv_lightning"):
        list(read_groups(tmp_path))


def test_share_is_the_same_choice_everywhere_and_about_right(tmp_path: Path) -> None:
    groups = [group(digit_task(index, "upright"), 1) for index in range(200)]
    first = write(tmp_path / "a", groups, StoreConfig(share=0.3))
    second = write(tmp_path / "b", groups[::-1], StoreConfig(share=0.3), rank=1)
    kept = {found.task.id for found in read_groups(first)}
    assert kept == {found.task.id for found in read_groups(second)}
    assert 40 <= len(kept) <= 80
    assert list(read_groups(write(tmp_path / "c", groups, StoreConfig(share=0.0)))) == []


def test_size_cap_stops_the_store_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with TrajectoryWriter(tmp_path, StoreConfig(max_gb=20e-6)) as writer:
        for item in sample_groups(40):
            writer.write_group(item, 0)
    num_stored = len(list(read_groups(tmp_path)))
    assert 0 < num_stored < 40
    assert sum("max_gb" in message for message in caplog.messages) == 1
    caplog.clear()
    with TrajectoryWriter(tmp_path, StoreConfig(max_gb=20e-6)) as writer:  # a run that is resumed
        writer.write_group(sample_groups(41)[-1], 0)
    assert len(list(read_groups(tmp_path))) == num_stored
    assert sum("max_gb" in message for message in caplog.messages) == 1


def test_in_the_background_all_is_there_after_the_context(tmp_path: Path) -> None:
    groups = sample_groups(40)
    write(tmp_path / "at_once", groups)
    write(tmp_path / "later", groups, background=True)
    read = [list(read_groups(tmp_path / name)) for name in ("at_once", "later")]
    assert [g.task.id for g in read[0]] == [g.task.id for g in read[1]] == [g.task.id for g in groups]
    names = [sorted(path.name for path in (tmp_path / name / "images").iterdir()) for name in ("at_once", "later")]
    assert names[0] == names[1]


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_told(tmp_path: Path, background: bool) -> None:
    lines = tmp_path / "trajectories/groups.rank0.jsonl"
    lines.parent.mkdir()
    lines.symlink_to("/dev/full")
    with (
        pytest.raises(CVLightningError, match=rf"{tmp_path}: No space left on device.*store\.max_gb"),
        TrajectoryWriter(tmp_path, background=background) as writer,
    ):
        for item in sample_groups(3):
            writer.write_group(item, 0)


def test_awkward_values_survive(tmp_path: Path) -> None:
    item = group(digit_task(0, "turned"), 1)
    trajectory = item.trajectories[0]
    text = "</script>\n\u2028 \x85 \ud83d lone surrogate, \N{GRINNING FACE}, \x00"
    trajectory.turns[-1].text = text
    trajectory.turns[-1].tool_call = ToolCall(name="code", arguments={"huge": 10**40})
    assert trajectory.reward is not None
    trajectory.reward.components["accuracy"] = math.nan
    item.task.metadata["size"] = np.int64(3)
    write(tmp_path, [item])
    (found,) = read_groups(tmp_path)
    assert found.trajectories[0].turns[-1] == trajectory.turns[-1]
    assert math.isnan(found.trajectories[0].reward.components["accuracy"])  # type: ignore[union-attr]
    assert found.task.metadata["size"] == 3


def test_a_table_holds_lone_surrogates_in_their_backslash_form(tmp_path: Path) -> None:
    item = group(digit_task(0, "turned"), 1)
    item.trajectories[0].turns[0].tool_call = ToolCall(name="code", arguments={"code": "'\ud800'"})
    write(tmp_path, [item])
    assert "'\\ud800'" in to_dataframe(read_groups(tmp_path))["code"][0]


def test_images_that_webp_cannot_hold_are_stored_as_png(tmp_path: Path) -> None:
    item = group(digit_task(0, "upright"), 1, Policy(needless=0, error=0))
    pixels = np.random.default_rng(0).integers(0, 255, (2, 16384, 3), np.uint8)
    item.task = replace(item.task, images=(Image.fromarray(pixels),))
    write(tmp_path, [item], StoreConfig(image_format="webp"))
    (image,) = next(read_groups(tmp_path)).task.images
    path = path_of(image)
    assert path is not None and path.suffix == ".png" and np.array_equal(image, pixels)


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_a_grey_image_with_a_transparent_colour_is_stored(image_format: Literal["png", "webp"]) -> None:
    image = Image.new("RGB", (4, 4), (7, 7, 7))
    image.info["transparency"] = (7, 7, 7)
    assert decode_image(encode_image(image, image_format)).tobytes() == image.tobytes()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda image: pickle.loads(pickle.dumps(image))])
def test_a_copy_of_a_stored_image_is_a_handle_of_the_same_file(tmp_path: Path, duplicate: Any) -> None:
    write(tmp_path, [group(digit_task(0, "upright"), 1)])
    stored = next(read_groups(tmp_path)).trajectories[0].images[0]
    for image in (stored.original, stored.model_image):
        same = duplicate(image)
        assert same is not image and path_of(same) == path_of(image) and same.size == image.size
        assert same.tobytes() == image.tobytes() and content_hash(same) == content_hash(image)


def test_an_image_changed_in_place_has_another_hash(tmp_path: Path) -> None:
    write(tmp_path, [group(digit_task(0, "upright"), 1)])
    for image in (Image.new("RGB", (8, 8)), next(read_groups(tmp_path)).task.images[0]):
        before = content_hash(image)
        ImageDraw.Draw(image).line((0, 0, 7, 7), fill="red")
        assert content_hash(image) == content_hash(image.copy()) != before


@pytest.mark.parametrize("outside", ["../secret.png", "{folder}/secret.png"])
def test_an_image_outside_the_store_is_not_read(tmp_path: Path, outside: str) -> None:
    path = write(tmp_path, [group(digit_task(0, "upright"), 1)])
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    line = json.loads(path.read_bytes())
    line["task"]["images"][0]["file"] = outside.format(folder=tmp_path)
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"images/secret\.png: missing"):
        next(read_groups(tmp_path)).task.images[0].tobytes()


@pytest.mark.parametrize("junk", ["[" * 100_000, '{"iteration": 1e999}'])
def test_lines_that_cannot_be_decoded_are_skipped_from_either_end(tmp_path: Path, junk: str) -> None:
    path = write(tmp_path, [group(digit_task(0, "upright"), 1, iteration=3)])
    with path.open("a") as file:
        file.write(junk + "\n")
    reader = read_groups(tmp_path)
    assert len(list(reader)) == len(reader.bad_lines) == 1
    assert last_groups(path) == (3, 1)
    assert drop_after(tmp_path, 2) == {path: 1}


def test_colours_and_greys_keep_their_pixels(tmp_path: Path) -> None:
    item = group(digit_task(0, "upright"), 1, Policy(needless=0, error=0))
    rng = np.random.default_rng(0)
    almost = np.full((40, 50, 3), 200, np.uint8)
    almost[33, 17, 2] = 199  # grey but for one pixel
    for pixels in (rng.integers(0, 255, (40, 50, 3), np.uint8), almost):
        item.task = replace(item.task, images=(Image.fromarray(pixels),))
        write(tmp_path, [item])
        assert np.array_equal(list(read_groups(tmp_path))[-1].task.images[0], pixels)


def test_a_wrong_path_says_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "rl", sample_groups(1))
    with pytest.raises(DataError, match="it holds the stores rl: name one of them"):
        read_groups(tmp_path)
    with pytest.raises(DataError, match=r"expected trajectories/\*.jsonl"):
        read_groups(tmp_path / "nothing")


def test_dataframe_has_a_row_a_trajectory(tmp_path: Path) -> None:
    write(tmp_path, sample_groups(4, size=3))
    frame = to_dataframe(read_groups(tmp_path))
    assert len(frame) == 12
    assert frame["reward/accuracy"].mean() == frame["correct"].mean()
    assert set(frame["kind"]) == set(KINDS)


def test_parquet_holds_what_the_store_holds(tmp_path: Path) -> None:
    groups = sample_groups(4, size=3)
    groups[1].trajectories[0].turns[-1].text = "half a \ud83d pair"
    write(tmp_path / "run" / "rl", groups[:2], StoreConfig(tokens=True))
    write(tmp_path / "run" / "eval" / "greedy", groups[2:])
    gone = next((tmp_path / "run" / "rl" / "images").iterdir())
    gone.unlink()
    out = tmp_path / "a folder" / "trajectories.parquet"
    assert export_main([str(tmp_path / "run"), "--out", str(out)]) == 0

    rows = pq.read_table(out).to_pylist()
    stored = [
        (g, t) for name in ("eval/greedy", "rl") for g in read_groups(tmp_path / "run" / name) for t in g.trajectories
    ]
    assert [row["store"] for row in rows] == ["eval/greedy"] * 6 + ["rl"] * 6
    for row, (record, trajectory) in zip(rows, stored, strict=True):
        assert row["question"] == record.task.question
        assert trajectory.reward is not None
        assert row["reward/accuracy"] == trajectory.reward.components["accuracy"]
        assert [turn["code"] for turn in row["turns"]] == [
            t.tool_call.code if t.tool_call else None for t in trajectory.turns
        ]
        assert [operation for turn in row["turns"] for operation in turn["operations"]] == [
            op.name for op in trajectory.operations
        ]
        assert (row["token_ids"] or [], row["loss_mask"] or []) == (trajectory.token_ids, trajectory.loss_mask)
        for image, record_image in zip(row["images"], trajectory.images, strict=True):
            path = path_of(record_image.original)
            assert path is not None
            if path.name == gone.name:
                assert image == {"bytes": None, "path": gone.name}
            else:
                assert np.array_equal(decode_image(image["bytes"]), record_image.original)
    assert any(turn["text"] == "half a \\ud83d pair" for row in rows for turn in row["turns"])


def test_datasets_reads_the_pictures_of_the_export(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="no datasets: pip install datasets")
    groups = sample_groups(2, size=2)
    write(tmp_path / "rl", groups)
    write_parquet({"rl": tmp_path / "rl"}, tmp_path / "x.parquet")
    found = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "x.parquet"), split="train", cache_dir=str(tmp_path)
    )
    assert len(found) == 4
    given = groups[1].trajectories[1]
    for picture, image in zip(found[3]["images"], given.images, strict=True):
        assert np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(image.original))


def test_an_export_of_nothing_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.parquet"
    assert export_main([str(tmp_path), "--out", str(out)]) == 2
    write(tmp_path / "rl", [])
    assert export_main([str(tmp_path), "--out", str(out)]) == 2
    assert export_main([str(tmp_path), "--out", str(out), "--stores", "[sft]"]) == 2
    messages = capsys.readouterr().err.splitlines()
    assert "no trajectories/*.jsonl" in messages[0]
    assert "the stores are empty" in messages[1]
    assert "--stores sft: not in" in messages[2]
    assert not out.exists()


def test_lines_of_an_older_schema_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, sample_groups(3, size=1))
    lines = path.read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace(f'"schema":{SCHEMA_VERSION}', '"schema":0')
    path.write_text("".join(lines))
    reader = read_groups(tmp_path)
    assert len(list(reader)) == 2
    assert [(bad.line, "schema 0" in bad.reason) for bad in reader.bad_lines] == [(2, True)]


def test_an_iteration_is_written_in_a_tenth_of_a_second(tmp_path: Path) -> None:
    rounds = [[group(digit_task(16 * r + i, KINDS[i % 4]), 8) for i in range(16)] for r in range(3)]
    spent = []
    with TrajectoryWriter(tmp_path) as writer:
        for groups in rounds:
            start = time.process_time()  # of this process: other work on the machine does not count
            for item in groups:
                writer.write_group(item, 0)
            spent.append(time.process_time() - start)
    assert min(spent) < 0.1, spent


@pytest.mark.parametrize("bad", [{"share": 1.5}, {"share": -0.1}, {"max_gb": 0.0}])
def test_config_names_the_flag(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"store\."):
        StoreConfig(**bad)  # type: ignore[arg-type]
