"""Many trajectories with many images in one `[1, T]` row.

Positions start anew for every row, attention never crosses rows (`attention.py`), an image that
several rows share is encoded once, and so is the prompt that the trajectories of a group share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cv_lightning.models.adapters.base import ImageInputs, ModelAdapter, PackedInputs
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
    vision: list[ImageInputs] = field(default_factory=list)
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
class PackedBatch(PackedInputs):
    """One packed row. `N` is the number of loss positions, `R` the number of rows in it."""

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
    adapter: ModelAdapter
    """Of the model that the row was made for"""
    old_logprobs: torch.Tensor | None = None
    """[N]: what the ratio is taken against, if not the engine's"""
    reference_logprobs: torch.Tensor | None = None
    """[N]: of the reference policy"""

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


def families(rows: Sequence[TrainRow], config: PretrainedConfig, adapter: ModelAdapter) -> list[list[int]]:
    """Numbers of the rows that begin with the same prompt, the trajectories of a group: each prompt is computed once.

    A prompt is what stands before the first learned token; its tokens and the very image objects have to be the same.
    Where sequences cannot share a prefix, every row is a family of its own.
    """
    if not adapter.shares_prefix(config):
        return [[number] for number in range(len(rows))]
    found: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        given = row.num_given
        alone = given in (0, len(row.token_ids))
        images = _images_within(row, given, adapter)
        key = number if alone else (tuple(row.token_ids[:given]), tuple(map(id, row.vision[:images])))
        found.setdefault(key, []).append(number)
    return list(found.values())


def prefix_units(
    rows: Sequence[TrainRow], config: PretrainedConfig, adapter: ModelAdapter, budget: int
) -> list[list[TrainRow]]:
    """Rows that are best kept in one micro-batch: families, cut where they would leave the budget.

    Args:
        rows: in any order.
        config: of the model.
        adapter: of the model.
        budget: tokens of one micro-batch. A row longer than that is a unit of its own.
    """
    units: list[list[TrainRow]] = []
    for family in families(rows, config, adapter):
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


def _images_within(row: TrainRow, num_tokens: int, adapter: ModelAdapter) -> int:
    """Images among a row's first tokens."""
    pads, count = row.token_ids[:num_tokens].count(adapter.image_id), 0
    while pads > 0 and count < len(row.vision):
        pads, count = pads - row.vision[count].num_tokens, count + 1
    return count


def pack_rows(rows: Sequence[TrainRow], config: PretrainedConfig, adapter: ModelAdapter) -> PackedBatch:
    """Concatenate rows, families together. The loss positions are in that order; `row_index` tells whose they are.

    Args:
        rows: at least one.
        config: of the model: its attention decides what is shared.
        adapter: of the model, bound to its processor.

    Raises:
        DataError: a row's image tokens and image features differ in number or order, or its lists in length.
    """
    distinct: dict[int, ImageInputs] = {}
    order: list[int] = []
    parts: list[_PackedRow] = []
    offset = 0
    for family in families(rows, config, adapter):
        start = offset
        for number in family:
            row = rows[number]
            shared = row.num_given if number != family[0] else 0
            parts.append(_pack_row(number, row, adapter, start=start, offset=offset, shared=shared))
            offset += len(row.token_ids) - shared
            shown = row.vision[_images_within(row, shared, adapter) :]
            distinct |= {id(vision): vision for vision in shown}
            order += map(id, shown)
    packed = {f.name: np.concatenate([getattr(part, f.name) for part in parts], -1) for f in fields(_PackedRow)}
    places = {key: place for place, key in enumerate(distinct)}
    return PackedBatch(
        input_ids=torch.from_numpy(packed["token_ids"])[None],
        position_ids=torch.from_numpy(packed["positions"])[:, None],
        images=tuple(distinct.values()),
        image_index=torch.tensor([places[key] for key in order]) if order else None,
        loss_positions=torch.from_numpy(packed["loss_positions"]),
        targets=torch.from_numpy(packed["targets"]),
        row_index=torch.from_numpy(packed["row_index"]),
        engine_logprobs=torch.from_numpy(packed["engine_logprobs"]),
        advantages=torch.from_numpy(packed["advantages"]),
        num_rows=len(rows),
        adapter=adapter,
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


def _pack_row(number: int, row: TrainRow, adapter: ModelAdapter, *, start: int, offset: int, shared: int) -> _PackedRow:
    """One row: from its token `shared` on it stands at `offset`, and its first ones at `start`."""
    _check_lengths(number, row)
    token_ids = np.array(row.token_ids, dtype=np.int64)
    is_image = token_ids == adapter.image_id
    features, tokens = sum(image.num_tokens for image in row.vision), int(is_image.sum())
    if features != tokens:
        raise DataError(
            f"row {number}: {tokens} image tokens but {features} image features of {len(row.vision)} images"
        )
    learned = np.flatnonzero(np.array(row.loss_mask, dtype=bool)[1:])  # position i predicts token i + 1
    given = np.zeros(len(token_ids)) if row.engine_logprobs is None else np.array(row.engine_logprobs)
    return _PackedRow(
        token_ids=token_ids[shared:],
        positions=adapter.positions(is_image, row.vision)[:, shared:],
        loss_positions=learned + np.where(learned < shared, start, offset - shared),
        targets=token_ids[learned + 1],
        row_index=np.full(len(learned), number, dtype=np.int64),
        engine_logprobs=given[learned + 1].astype(np.float32),
        advantages=np.full(len(learned), row.advantage, dtype=np.float32),
    )


def _check_lengths(number: int, row: TrainRow) -> None:
    given = row.token_ids if row.engine_logprobs is None else row.engine_logprobs
    lengths = {len(row.token_ids), len(row.loss_mask), len(given)}
    if len(lengths) != 1 or not row.token_ids:
        raise DataError(
            f"row {number}: token ids, loss mask and log-probabilities have lengths {sorted(lengths)}; they must agree"
        )
