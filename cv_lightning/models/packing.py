"""Many trajectories with many images in one `[1, T]` row.

Positions start anew for every row (traps T12, T13), attention never crosses rows (`attention.py`), an image that
several rows share is encoded once, and so is the prompt that the trajectories of a group share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cv_lightning.models.attention import NAME
from cv_lightning.models.vision import VisionInputs
from cv_lightning.types import DataError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(slots=True, kw_only=True)
class TrainRow:
    """One sequence to train on."""

    token_ids: list[int]
    """Images expanded: one pad per feature."""
    loss_mask: list[bool]
    """True where the token was sampled and is learned from; the first token never is."""
    vision: list[VisionInputs] = field(default_factory=list)
    """One per image, in the order of their pads."""
    engine_logprobs: list[float] | None = None
    """The engine's log-probability of every token; needed for RL only."""
    advantage: float = 0.0
    """Of the trajectory; needed for RL only."""

    @property
    def num_given(self) -> int:
        """Tokens before the first learned one; all, where none is learned."""
        return self.loss_mask.index(True) if True in self.loss_mask else len(self.loss_mask)


@dataclass(slots=True, kw_only=True)
class PackedBatch:
    """One packed row. `N` is the number of loss positions, `R` the number of rows in it."""

    input_ids: torch.Tensor
    """[1, T]"""
    position_ids: torch.Tensor
    """[4, 1, T]: the text row, then temporal, height and width. The text row restarts at 0 for every row, and at n for
    a row of which the first n tokens are those of the row before."""
    mm_token_type_ids: torch.Tensor
    """[1, T]: 1 at image tokens"""
    pixels: tuple[torch.Tensor, ...]
    """[patches, dim] of each distinct image, in main memory: all rows of an iteration share them with the cache that
    made them, and only the row that is computed has a copy, see `pixel_values`"""
    image_grid_thw: torch.Tensor | None
    """[distinct images, 3]"""
    image_index: torch.Tensor | None
    """[images]: which of the distinct images each shown image is"""
    loss_positions: torch.Tensor
    """[N]: positions in T whose *next* token is learned from"""
    targets: torch.Tensor
    """[N]: the tokens that follow them"""
    row_index: torch.Tensor
    """[N]: which row each target belongs to"""
    engine_logprobs: torch.Tensor
    """[N] float32; 0 where the rows bring none"""
    advantages: torch.Tensor
    """[N] float32: the trajectory's advantage at each target"""
    num_rows: int
    old_logprobs: torch.Tensor | None = None
    """[N]: what the ratio is taken against, if not the engine's"""
    reference_logprobs: torch.Tensor | None = None
    """[N]: of the reference policy"""

    @property
    def pixel_values(self) -> torch.Tensor | None:
        """[patches, dim] of all distinct images, on the batch's device; made anew at every call."""
        return torch.cat(self.pixels).to(self.input_ids.device) if self.pixels else None

    @property
    def num_loss_tokens(self) -> int:
        """N."""
        return self.targets.numel()

    @property
    def num_trained(self) -> int:
        """Rows with any loss position."""
        return int(torch.unique(self.row_index).numel())

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on a device; itself where it is there already."""
        if self.input_ids.device == device:
            return self
        tensors: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in tensors.items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


def families(rows: Sequence[TrainRow], config: PretrainedConfig) -> list[list[int]]:
    """Numbers of the rows that begin with the same prompt, the trajectories of a group: each prompt is computed once.

    A prompt is what stands before the first learned token; its tokens and the very image objects have to be the same.
    Only `packed` attention can do it: with any other every row is a family of its own.
    """
    if getattr(config, "_attn_implementation", None) != NAME:
        return [[number] for number in range(len(rows))]
    found: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        given = row.num_given
        alone = given in (0, len(row.token_ids))
        images = _images_within(row, given, config)
        key = number if alone else (tuple(row.token_ids[:given]), tuple(map(id, row.vision[:images])))
        found.setdefault(key, []).append(number)
    return list(found.values())


def prefix_units(rows: Sequence[TrainRow], config: PretrainedConfig, budget: int) -> list[list[TrainRow]]:
    """Rows that are best kept in one micro-batch: families, cut where they would leave the budget.

    Args:
        rows: in any order.
        config: of the model.
        budget: tokens of one micro-batch. A row longer than that is a unit of its own.
    """
    units: list[list[TrainRow]] = []
    for family in families(rows, config):
        unit: list[TrainRow] = []
        for row in (rows[number] for number in family):
            if unit and packed_length([*unit, row]) > budget:
                units.append(unit)
                unit = []
            unit.append(row)
        units.append(unit)
    return units


def packed_length(rows: Sequence[TrainRow]) -> int:
    """Tokens that rows of one family take together."""
    return sum(len(row.token_ids) for row in rows) - (len(rows) - 1) * rows[0].num_given


def _images_within(row: TrainRow, num_tokens: int, config: PretrainedConfig) -> int:
    """Images among a row's first tokens."""
    merge = config.vision_config.spatial_merge_size
    pads, count = row.token_ids[:num_tokens].count(config.image_token_id), 0
    while pads > 0 and count < len(row.vision):
        height, width = _merged_shape(row.vision[count].grid_thw[0], merge)
        pads, count = pads - height * width, count + 1
    return count


def pack_rows(rows: Sequence[TrainRow], config: PretrainedConfig) -> PackedBatch:
    """Concatenate rows, families together. The loss positions are in that order; `row_index` tells whose they are.

    Args:
        rows: at least one.
        config: of the model: image token, merge size, patch size, attention.

    Raises:
        DataError: a row's image tokens and image features differ in number or order, or its lists in length.
    """
    pad = config.image_token_id
    distinct: dict[int, VisionInputs] = {}
    order: list[int] = []
    parts: list[_PackedRow] = []
    offset = 0
    for family in families(rows, config):
        start = offset
        for number in family:
            row = rows[number]
            shared = row.num_given if number != family[0] else 0
            parts.append(_pack_row(number, row, config, start=start, offset=offset, shared=shared))
            offset += len(row.token_ids) - shared
            shown = row.vision[_images_within(row, shared, config) :]
            distinct |= {id(vision): vision for vision in shown}
            order += map(id, shown)
    packed = {f.name: np.concatenate([getattr(part, f.name) for part in parts], -1) for f in fields(_PackedRow)}
    input_ids = torch.from_numpy(packed["token_ids"])[None]
    images, places = list(distinct.values()), {key: place for place, key in enumerate(distinct)}
    return PackedBatch(
        input_ids=input_ids,
        position_ids=torch.from_numpy(packed["positions"])[:, None],
        mm_token_type_ids=(input_ids == pad).long(),
        pixels=tuple(v.pixel_values for v in images),
        image_grid_thw=torch.cat([v.grid_thw for v in images]) if images else None,
        image_index=torch.tensor([places[key] for key in order]) if images else None,
        loss_positions=torch.from_numpy(packed["loss_positions"]),
        targets=torch.from_numpy(packed["targets"]),
        row_index=torch.from_numpy(packed["row_index"]),
        engine_logprobs=torch.from_numpy(packed["engine_logprobs"]),
        advantages=torch.from_numpy(packed["advantages"]),
        num_rows=len(rows),
    )


@dataclass(frozen=True, slots=True)
class _PackedRow:
    """One row's share of a packed batch, as arrays."""

    token_ids: np.ndarray
    positions: np.ndarray
    loss_positions: np.ndarray
    targets: np.ndarray
    row_index: np.ndarray
    engine_logprobs: np.ndarray
    advantages: np.ndarray


def _pack_row(
    number: int, row: TrainRow, config: PretrainedConfig, *, start: int, offset: int, shared: int
) -> _PackedRow:
    """One row: from its token `shared` on it stands at `offset`, and its first ones at `start`."""
    _check_lengths(number, row)
    token_ids = np.array(row.token_ids, dtype=np.int64)
    shapes = [_merged_shape(v.grid_thw[0], config.vision_config.spatial_merge_size) for v in row.vision]
    is_image = token_ids == config.image_token_id
    features, tokens = sum(height * width for height, width in shapes), int(is_image.sum())
    if features != tokens:
        raise DataError(
            f"row {number}: {tokens} image tokens but {features} image features of {len(row.vision)} images"
        )
    learned = np.flatnonzero(np.array(row.loss_mask, dtype=bool)[1:])  # position i predicts token i + 1
    given = np.zeros(len(token_ids)) if row.engine_logprobs is None else np.array(row.engine_logprobs)
    return _PackedRow(
        token_ids=token_ids[shared:],
        positions=_positions(is_image, shapes)[:, shared:],
        loss_positions=learned + np.where(learned < shared, start, offset - shared),
        targets=token_ids[learned + 1],
        row_index=np.full(len(learned), number, dtype=np.int64),
        engine_logprobs=given[learned + 1].astype(np.float32),
        advantages=np.full(len(learned), row.advantage, dtype=np.float32),
    )


def rope_positions(
    token_ids: Sequence[int], grids: Sequence[torch.Tensor], image_token_id: int, merge: int
) -> torch.Tensor:
    """Positions of one sequence: its text row, then Qwen-VL's temporal, height and width rows.

    Text counts up by one in all rows. An image's tokens share one temporal position and count rows and columns of
    its merged grid from there; text goes on after the largest of them. Equals the models' `get_rope_index` for still
    images (tested).

    Args:
        token_ids: images expanded.
        grids: (temporal, height, width) in patches, one per image.
        image_token_id: the pad.
        merge: patches a side that become one token.

    Returns:
        [4, tokens], long.
    """
    is_image = np.array(token_ids) == image_token_id
    return torch.from_numpy(_positions(is_image, [_merged_shape(grid, merge) for grid in grids]))


def _merged_shape(grid: torch.Tensor, merge: int) -> tuple[int, int]:
    """Rows and columns of an image's tokens."""
    _, height, width = grid.tolist()
    return height // merge, width // merge


def _positions(is_image: np.ndarray, shapes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Positions of one row, see `rope_positions`; long, [4, tokens]."""
    length = len(is_image)
    pads = np.flatnonzero(is_image)
    positions = np.empty((4, length), dtype=np.int64)
    positions[0] = np.arange(length)
    start, position, used = 0, 0, 0
    for height, width in shapes:
        first = int(pads[used])
        end = first + height * width
        used += height * width
        if int(pads[used - 1]) != end - 1:
            raise DataError(f"the {height * width} tokens of an image, from token {first} on, are interrupted by text")
        positions[1:, start:first] = np.arange(position, position + first - start)
        position += first - start
        positions[1:, first:end] = _grid(height, width) + position
        position += max(height, width)
        start = end
    positions[1:, start:] = np.arange(position, position + length - start)
    return positions


@lru_cache(maxsize=4096)
def _grid(height: int, width: int) -> np.ndarray:
    """Temporal, row and column position of an image's tokens from its first on; [3, height * width]."""
    rows, columns = np.divmod(np.arange(height * width), width)
    return np.stack([np.zeros_like(rows), rows, columns])


def _check_lengths(number: int, row: TrainRow) -> None:
    given = row.token_ids if row.engine_logprobs is None else row.engine_logprobs
    lengths = {len(row.token_ids), len(row.loss_mask), len(given)}
    if len(lengths) != 1 or not row.token_ids:
        raise DataError(
            f"row {number}: token ids, loss mask and log-probabilities have lengths {sorted(lengths)}; they must agree"
        )
