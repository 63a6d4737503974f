"""The report's gallery: a stratified sample of trajectories as JSON values, with images as data URIs."""

from __future__ import annotations

import base64
import hashlib
import heapq
import io
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from cv_lightning.evaluation.outcome import Outcome, outcome_of
from cv_lightning.trajectory import path_of, pixels_of
from cv_lightning.types import DataError, Group, ToolResult, Trajectory, TrajectoryImage, Turn
from cv_lightning.viewer.highlight import highlight

LOG = logging.getLogger(__name__)
MAX_TEXT = 20_000
"""Characters of a turn, a snippet or a tool response that are embedded; the page marks the cut."""


# ------------------------------------------------------------------------------------------------ sample
class _Candidate(NamedTuple):
    priority: int
    order: int
    group: Group


@dataclass(slots=True)
class GroupSampler:
    """A bounded, stratified and repeatable sample of a stream of groups.

    Half of it is taken by kind and a hash of task and iteration, so that evaluations of the same tasks keep the same
    ones. The other half is taken from strata in turn, so that rare cases are included: kind, outcome (all right, mixed,
    all wrong, failed) and whether a tool was used.
    """

    max_trajectories: int
    num_seen: int = 0
    """Trajectories of all groups so far."""
    _strata: dict[tuple[Any, ...], list[_Candidate]] = field(default_factory=dict)

    def watch(self, groups: Iterable[Group]) -> Iterator[Group]:
        """Yield the groups, sampling them on the way."""
        for group in groups:
            self._offer(group)
            yield group

    def _offer(self, group: Group) -> None:
        size = len(group.trajectories)
        self.num_seen += size
        if size == 0 or self.max_trajectories == 0:
            return
        heap = self._strata.setdefault(_stratum(group), [])
        digest = hashlib.blake2b(f"{group.task.id}/{group.iteration}".encode(), digest_size=8).digest()
        entry = _Candidate(-int.from_bytes(digest), self.num_seen, group)  # a heap of the smallest hashes
        if len(heap) * size < self.max_trajectories:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)

    def chosen(self) -> list[Group]:
        """The sample of whole groups, in the order of the stream."""
        strata = sorted(self._strata.items(), key=lambda item: repr(item[0]))
        kinds: dict[str, list[_Candidate]] = {}
        for (kind, *_), heap in strata:
            kinds.setdefault(kind, []).extend(heap)
        found: dict[int, _Candidate] = {}
        _take_in_turn(list(kinds.values()), found, self.max_trajectories // 2)
        _take_in_turn([heap for _, heap in strata], found, self.max_trajectories)
        return [found[order].group for order in sorted(found)]


def _take_in_turn(pools: list[list[_Candidate]], found: dict[int, _Candidate], most: int) -> None:
    """Move the smallest hash of each pool in turn to `found`, up to `most` trajectories in all."""
    queues = [sorted(pool) for pool in pools]
    taken = sum(len(candidate.group.trajectories) for candidate in found.values())
    while taken < most and any(queues):
        for queue in queues:
            while queue and queue[-1].order in found:
                queue.pop()
            if queue and taken < most:
                candidate = queue.pop()
                found[candidate.order] = candidate
                taken += len(candidate.group.trajectories)


def _stratum(group: Group) -> tuple[Any, ...]:
    scored = [trajectory.reward.correct for trajectory in group.trajectories if trajectory.reward]
    outcome = "failed" if not scored else "right" if all(scored) else "mixed" if any(scored) else "wrong"
    return group.task.kind, outcome, any(trajectory.num_tool_calls for trajectory in group.trajectories)


# ------------------------------------------------------------------------------------------------ JSON
class Gallery:
    """Collects the data of the page's script: stores, groups, trajectories and images."""

    def __init__(self, thumbnail_px: int, max_image_bytes: int) -> None:
        self.thumbnail_px = thumbnail_px
        self.max_image_bytes = max_image_bytes
        self.num_image_bytes = 0
        self.left_out: set[str] = set()
        """Files over the size limit, which the page loads from the run's folder."""
        self.missing: set[str] = set()
        """Files of trajectories that do not exist or cannot be decoded."""
        self.images: dict[str, str] = {}
        """Data URIs by file name."""
        self.stores: list[dict[str, Any]] = []
        self.groups: list[dict[str, Any]] = []
        self.trajectories: list[dict[str, Any]] = []
        self.codes: list[list[tuple[str, str]]] = []
        """The different snippets, in coloured pieces."""
        self._code_numbers: dict[str, int] = {}

    def add_store(self, name: str, label: str, groups: list[Group], num_seen: int, folder: str | None) -> None:
        """Add the sample of a store, which was drawn from `num_seen` trajectories.

        `name` is the store's path below the run, `folder` its relative URL from the page; None gives no links to files.
        """
        shown = sum(len(group.trajectories) for group in groups)
        self.stores.append({"name": name, "label": label, "folder": folder, "shown": shown, "total": num_seen})
        for group in groups:
            self._add_group(len(self.stores) - 1, group)

    def _add_group(self, store: int, group: Group) -> None:
        task = group.task
        first = len(self.trajectories)
        given = [
            TrajectoryImage(original=image, model_image=image, source=at, to_source=None)
            for at, image in enumerate(task.images)
        ]
        self.groups.append(
            {
                "store": store,
                "iteration": group.iteration,
                "members": list(range(first, first + len(group.trajectories))),
                "task": {
                    "id": task.id,
                    "question": task.question[:MAX_TEXT],
                    "truth": task.ground_truth,
                    "kind": task.kind,
                    "transforms": task.required_transforms,
                    "box": task.box,
                    "images": [self._image(image) for image in given],
                },
            }
        )
        for trajectory in group.trajectories:
            self.trajectories.append(self._trajectory(outcome_of(task, trajectory), trajectory))

    def _trajectory(self, outcome: Outcome, trajectory: Trajectory) -> dict[str, Any]:
        reward, tokens = trajectory.reward, trajectory.tokens
        return {
            "group": len(self.groups) - 1,
            "sample": trajectory.sample,
            "end": trajectory.end_state.value,
            "error": trajectory.error[:MAX_TEXT],
            "correct": outcome.correct,
            "must": outcome.tool_use_success if outcome.needs_tool else None,
            "spurious": outcome.spurious,
            "answer": trajectory.answer,
            "scoredBy": reward.scored_by if reward else None,
            "reward": reward.total if reward else None,
            "components": reward.components if reward else {},
            "advantage": trajectory.advantage,
            "logprob": tokens.logprob.mean if tokens.logprob else None,
            "tokens": [trajectory.num_prompt_tokens, tokens.num_sampled_tokens, tokens.num_tokens],
            "seconds": trajectory.total_s,
            "version": trajectory.policy_version,
            "turns": [self._turn(turn) for turn in trajectory.turns],
            "images": [self._image(image) for image in trajectory.images],
        }

    def _image(self, image: TrajectoryImage) -> dict[str, Any]:
        path, size, model_size = path_of(image.original), image.original.size, image.model_image.size
        assert path is not None, "read from a store"
        self._embed(path.name, image.original)
        missing = path.name in self.missing
        data: dict[str, Any] = {
            "file": "" if missing else path.name,
            "missing": missing,
            "size": size,
            "model": model_size,
            "parent": image.parent,
            "source": image.source,
            "toSource": image.to_source,
        }
        if 2 * model_size[0] <= size[0] and not missing:
            # The model's view shows what could not be read without the crop.
            data["seen"] = f"{path.name}@{model_size[0]}x{model_size[1]}"
            if path.name in self.images:
                self._embed(data["seen"], image.model_image)
        return data

    def _embed(self, key: str, image: Image.Image) -> None:
        path = path_of(image)
        if key in self.images or path is None or path.name in self.missing:
            return
        if self.num_image_bytes >= self.max_image_bytes:
            if key == path.name:
                (self.left_out if path.is_file() else self.missing).add(path.name)
            return
        try:
            self.images[key] = thumbnail(pixels_of(image), self.thumbnail_px)
        except DataError as error:
            LOG.warning("%s", error)
            self.missing.add(path.name)
            return
        self.num_image_bytes += len(self.images[key])

    def _turn(self, turn: Turn) -> dict[str, Any]:
        call = turn.tool_call
        data: dict[str, Any] = {
            "text": _cut(turn.text),
            "tokens": turn.num_tokens,
            "images": list(turn.image_indices),
            "response": _cut(turn.response_text),
            "parseError": turn.parse_error,
            "seconds": [turn.generate_s, turn.tool_s],
        }
        if call is not None:
            shown = {"image": call.image_index, "description": _cut(call.description)}
            data["call"] = shown | {"code": self._code(call.text)}
        if turn.result is not None:
            data["result"] = _result(turn.result)
        return data

    def _code(self, code: str) -> int:
        """Number of a snippet in `codes`; added on first use."""
        if code not in self._code_numbers:
            self._code_numbers[code] = len(self.codes)
            self.codes.append(highlight(_cut(code)))
        return self._code_numbers[code]


def _result(result: ToolResult) -> dict[str, Any]:
    return {
        "status": result.status.value,
        "error": _cut(result.error),
        "executor": result.executor,
        "seconds": result.elapsed_s,
        "core": result.effect.core if result.effect else (),
        "operations": [
            {
                "name": op.name,
                "call": op.call,
                "arguments": {name: _cut(_compact(value)) for name, value in op.arguments.items()},
                "sizes": [op.input_size, op.output_size],
                "used": op.used,
            }
            for op in result.operations
        ],
    }


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} [... {len(text) - MAX_TEXT} more characters]"


# ------------------------------------------------------------------------------------------------ images
def thumbnail(image: Image.Image, longest_px: int) -> str:
    """Data URI of an image, scaled down to `longest_px`; PNG where that is small, else lossy WebP."""
    small = image.copy()
    small.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    grey = small.convert("L")
    is_grey = grey.convert("RGB").tobytes() == small.convert("RGB").tobytes()
    kind, buffer = "png", io.BytesIO()
    (grey if is_grey else small).save(buffer, "PNG", optimize=True)
    if buffer.tell() > 12_000:
        kind, buffer = "webp", io.BytesIO()
        small.save(buffer, "WEBP", quality=80, method=4)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def relative_folder(store: Path, page: Path) -> str | None:
    """Relative URL of a store from the page; None if the page is outside the run's folder."""
    store, folder = store.resolve(), page.resolve().parent
    return store.relative_to(folder).as_posix() if store.is_relative_to(folder) else None
