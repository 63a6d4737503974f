"""A group as one JSON line and back: the dataclasses of `types.py` as msgspec writes them.

A line leaves out what another part of it says (the task in each trajectory, the tool's image beside the trajectory's)
and, unless asked for, the tokens, of which `Trajectory.token_summary` remains. An image is its file and its size. What
each image shows of its source (`source_box`, in source pixels) is added: figures are made of lines without arithmetic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from cv_lightning.images import source_box
from cv_lightning.trajectory.stored_image import StoredImage, path_of
from cv_lightning.types import SCHEMA_VERSION, DataError, Group, Task, Trajectory

OLDEST_SCHEMA = 1
"""Lines of an older one cannot be read; they are skipped and counted."""
TOKENS = ("token_ids", "loss_mask", "logprobs")
"""Fields of a trajectory that are stored on request."""

ImageNamer = Callable[[Image.Image], str]
"""Gives the file name under which an image is stored."""


# ------------------------------------------------------------------------------------------------ writing
def encode_group(group: Group, *, name_image: ImageNamer | None = None, tokens: bool = False) -> bytes:
    """One UTF-8 line of strict JSON, newline included; NaN and infinity become null, seconds are rounded.

    Args:
        group: Scored or not.
        name_image: Gives each original its file name (the writer stores it on the way). By default the name of its
            file, for groups that were read from a store.
        tokens: Keep token ids, loss mask and log-probabilities.
    """
    task = replace(group.task, recorded_digest=group.task.digest)
    trajectories = [_stored_trajectory(trajectory, tokens) for trajectory in group.trajectories]
    line = {"schema": SCHEMA_VERSION} | _values(group) | {"task": task, "trajectories": trajectories}

    def hook(value: object) -> Any:
        if not isinstance(value, Image.Image):
            return _plain(value)
        path = path_of(value)
        return {"file": name_image(value) if name_image else path.name if path else "", "size": value.size}

    try:
        return msgspec.json.encode(line, enc_hook=hook) + b"\n"
    except (UnicodeEncodeError, OverflowError):  # a lone surrogate or a huge integer, which a model may write
        plain = finite(msgspec.to_builtins(line, enc_hook=hook, str_keys=True))
        text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace") + b"\n"


def _stored_trajectory(trajectory: Trajectory, tokens: bool) -> dict[str, Any]:
    unsaid = ("dialect",) if trajectory.dialect == "hermes" else ()  # as before there was another
    return _values(trajectory, "task", "partial_score", *unsaid, *(() if tokens else TOKENS)) | {
        "token_summary": trajectory.tokens,
        "turns": [
            _values(turn) | {"result": turn.result and _values(turn.result, "images", "image", "earlier")}
            for turn in trajectory.turns
        ],
        "images": [
            _values(image, "model_image") | {"model_size": image.model_image.size, "source_box": source_box(image)}
            for image in trajectory.images
        ],
    }


def _values(value: Any, *hidden: str) -> dict[str, Any]:
    """The fields of a dataclass by name; those in seconds are rounded to microseconds."""
    found = {field.name: getattr(value, field.name) for field in fields(value) if field.name not in hidden}
    return {name: round(item, 6) if name.endswith("_s") else item for name, item in found.items()}


def _plain(value: object) -> Any:
    """NumPy values as JSON values, anything else by its representation."""
    if isinstance(value, np.generic):
        return value.item()
    return value.tolist() if isinstance(value, np.ndarray) else repr(value)


def finite(value: Any) -> Any:
    """The JSON value with every NaN and infinity, which strict JSON lacks, as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return finite(_plain(value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------------------------ reading
def decode_group(line: bytes, folder: Path) -> Group:
    """The inverse of `encode_group`; keys that this version does not know are ignored.

    Args:
        line: One line of a store.
        folder: The store's `images` folder, from which pixels are read when they are needed.

    Raises:
        DataError: The line was written by a newer version.
        KeyError, TypeError, ValueError: The line is not a group.
    """
    try:
        data = msgspec.json.decode(line)
    except msgspec.DecodeError:
        data = json.loads(line)  # reads lone surrogates
    schema = data["schema"]
    if schema < OLDEST_SCHEMA:
        raise ValueError(f"of schema {schema}, older than {OLDEST_SCHEMA}, the oldest that is read")
    if schema > SCHEMA_VERSION:
        raise DataError(
            f"trajectories of schema {schema}, but this cv_lightning reads up to {SCHEMA_VERSION}: update cv_lightning"
        )
    if schema == 1:
        _upgrade(data)

    @cache  # the trajectories of a group share their images
    def handle(file: str, width: int, height: int, is_view: bool) -> StoredImage:
        return StoredImage(folder / Path(file).name, (width, height), is_view=is_view)

    def hook(kind: type, value: dict[str, Any]) -> StoredImage:
        return handle(value["file"], *value["size"], value.get("is_view", False))

    for trajectory in data["trajectories"]:
        _restore_nan(trajectory)
        for image in trajectory["images"]:
            size = image.pop("model_size")
            image["model_image"] = image["original"] | {"size": size, "is_view": size != image["original"]["size"]}
    task = msgspec.convert(data["task"], Task, dec_hook=hook)
    shared = {"task": task} | dict.fromkeys(TOKENS, ())
    members = [shared | trajectory for trajectory in data["trajectories"]]
    return msgspec.convert(data | {"task": task, "trajectories": members}, Group, dec_hook=hook)


def _restore_nan(trajectory: dict[str, Any]) -> None:
    """JSON has no NaN: null stands for it where a value must be a number."""
    if reward := trajectory["reward"]:
        reward["total"] = _number(reward["total"])
        reward["components"] = {name: _number(value) for name, value in reward["components"].items()}
    summary = trajectory["token_summary"]
    if logprob := summary["logprob"]:
        summary["logprob"] = {name: _number(value) for name, value in logprob.items()}
    if "logprobs" in trajectory:
        trajectory["logprobs"] = [_number(value) for value in trajectory["logprobs"]]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _upgrade(data: dict[str, Any]) -> None:
    """Give a line of schema 1 the form of schema 2, in place; some were written before tools had schemas."""
    data["task"]["recorded_digest"] = data["task"].get("digest", "")
    for trajectory in data["trajectories"]:
        trajectory["policy_version"] = trajectory.pop("weight_version")
        trajectory["token_summary"] = {
            name: trajectory.pop(name) for name in ("num_tokens", "num_sampled_tokens", "logprob")
        }
        if "loss_mask" in trajectory:
            trajectory["loss_mask"] = [bool(kept) for kept in trajectory["loss_mask"]]
        for image in trajectory["images"]:
            image["original"] = {"file": image.pop("file"), "size": image.pop("size")}
        for turn in trajectory["turns"]:
            if turn["result"]:
                turn["result"]["executor"] = turn["result"].pop("tier")
            call = turn["tool_call"]
            if call and "arguments" not in call:
                arguments = {name: call[name] for name in call if name != "name"}
                turn["tool_call"] = {"name": call["name"], "arguments": arguments}
