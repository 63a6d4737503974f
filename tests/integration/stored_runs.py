"""Shared by tests of stored runs: copies of tests/fixtures that commands may write into, and readers of files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from digests import metrics_of
from renames import FIXTURES, renames

from cv_lightning.data.readers import TaskFiles
from cv_lightning.data.rows import ReaderConfig
from cv_lightning.data.sft_json import ConversationFiles

ROOT = Path(__file__).parents[2]
LAST = {"sft": "num_steps", "lora": "num_steps", "zero3": "num_steps", "grpo": "num_iterations"}
"""What says how long a stored run is, all of which have taken two steps."""
TASKS = ("rl.parquet", "built/rl.parquet", "built/robust.parquet")
CONVERSATIONS = ("sft.json", "built/sft.json")


def copied(folder: Path) -> Path:
    """The stored runs in a folder of their own, in which their relative paths hold, with the shipped configs."""
    for name in ("runs", "smoke"):
        shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


def command(folder: Path, *arguments: str) -> str:
    """Run a command of the package in a folder; returns its output.

    Raises:
        AssertionError: it failed.
    """
    paths = [str(ROOT), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "cv_lightning", *arguments]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def resumed(folder: Path, name: str) -> dict[str, Any]:
    """Take a stored run one step further by its own stored config; returns the digest of its metrics."""
    run = ["fit", "--config", f"{name}/fit_config.yaml", "--ckpt_path", "last"]
    said = command(folder, *run, f"--data.init_args.{LAST[name]}", "3")
    wanted = f"{name}/checkpoints/iteration000002.ckpt"
    assert wanted in said, said[-3000:]
    return {"metrics": metrics_of(folder / name)}


def rows_of(file: str) -> list[Any]:
    """The rows of a data file as JSON values, with images replaced by their sizes."""
    path = str(FIXTURES / "data" / file)
    if file in CONVERSATIONS:
        read = ConversationFiles([path], ReaderConfig())
        return [_conversation(read.row(at)) for at in range(len(read))]
    tasks = TaskFiles([path], ReaderConfig())
    return [_task(tasks.row(at)) for at in range(len(tasks))]


def _task(task: Any) -> dict[str, Any]:
    names = ("id", "question", "ground_truth", "data_source", "required_transforms", "box", "metadata")
    found = {name: getattr(task, name) for name in names}
    messages = [[message.role, message.content] for message in task.messages]
    return found | {"messages": messages, "images": [image.size for image in task.images]}


def _conversation(conversation: Any) -> dict[str, Any]:
    turns = [
        {
            "text": turn.text,
            "code": turn.call and turn.call.code,
            "image": turn.result_image and turn.result_image.size,
            "response": turn.response_text,
            "learn": turn.learn,
        }
        for turn in conversation.turns
    ]
    return {"task": _task(conversation.task), "turns": turns}


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config by dotted names: of a class in a list by its name, `trainer.callbacks.RolloutCallback.num_samples`."""
    return {
        name: renames().of("class_paths", str(value)) if name.endswith("class_path") else value
        for name, value in _settings(config, "")
    }


def _settings(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key in value:
            yield from _settings(value[key], f"{name}.{key}".lstrip("."))
    elif (
        isinstance(value, list) and value and all(isinstance(item, Mapping) and "class_path" in item for item in value)
    ):
        for item in value:
            own = f"{name}.{str(item['class_path']).rpartition('.')[2]}"
            yield f"{own}.class_path", item["class_path"]
            yield from _settings(item.get("init_args") or {}, own)
    else:
        yield name, value


def read_yaml(path: Path) -> Any:
    """The config in a file, unchanged."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))
