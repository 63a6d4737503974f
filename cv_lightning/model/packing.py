"""Many trajectories with many images in one `[1, T]` row.

Positions start anew for every row (traps T12, T13), attention never crosses rows (`attention.py`), and an image
that several rows share is encoded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import torch

from cv_lightning.model.vision import VisionInputs
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


@dataclass(slots=True, kw_only=True)
class PackedBatch:
    """One packed row. `N` is the number of loss positions, `R` the number of rows in it."""

    input_ids: torch.Tensor
    """[1, T]"""
    position_ids: torch.Tensor
    """[4, 1, T]: the text row, restarting at 0 for every row, then temporal, height and width."""
    mm_token_type_ids: torch.Tensor
    """[1, T]: 1 at image tokens"""
    pixel_values: torch.Tensor | None
    """[patches, dim] of the distinct images"""
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
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in moved.items()})


def pack_rows(rows: Sequence[TrainRow], config: PretrainedConfig) -> PackedBatch:
    """Concatenate rows.

    Args:
        rows: at least one.
        config: of the model: image token, merge size, patch size.

    Raises:
        DataError: a row's image tokens and image features differ in number, or its lists in length.
    """
    merge = config.vision_config.spatial_merge_size
    ids, kinds, positions, loss_positions, row_index, engine, advantages = [], [], [], [], [], [], []
    distinct: dict[int, int] = {}
    images: list[VisionInputs] = []
    order: list[int] = []
    offset = 0
    for number, row in enumerate(rows):
        _check_row(number, row, config.image_token_id, merge)
        ids += row.token_ids
        kinds += [int(token == config.image_token_id) for token in row.token_ids]
        positions.append(rope_positions(row.token_ids, [v.grid_thw[0] for v in row.vision], config.image_token_id, merge))
        learned = [i for i, mask in enumerate(row.loss_mask) if mask and i > 0]
        loss_positions += [offset + i - 1 for i in learned]
        row_index += [number] * len(learned)
        engine += [row.engine_logprobs[i] for i in learned] if row.engine_logprobs is not None else [0.0] * len(learned)
        advantages += [row.advantage] * len(learned)
        for vision in row.vision:
            if id(vision) not in distinct:
                distinct[id(vision)] = len(images)
                images.append(vision)
            order.append(distinct[id(vision)])
        offset += len(row.token_ids)
    input_ids = torch.tensor([ids])
    where = torch.tensor(loss_positions, dtype=torch.long)
    return PackedBatch(
        input_ids=input_ids,
        position_ids=torch.cat(positions, -1)[:, None],
        mm_token_type_ids=torch.tensor([kinds]),
        pixel_values=torch.cat([v.pixel_values for v in images]) if images else None,
        image_grid_thw=torch.cat([v.grid_thw for v in images]) if images else None,
        image_index=torch.tensor(order) if images else None,
        loss_positions=where,
        targets=input_ids[0, where + 1],
        row_index=torch.tensor(row_index, dtype=torch.long),
        engine_logprobs=torch.tensor(engine, dtype=torch.float32),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        num_rows=len(rows),
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
    pieces: list[torch.Tensor] = []
    start, next_position = 0, 0
    remaining = iter(grids)
    length = len(token_ids)
    while start < length:
        if token_ids[start] == image_token_id:
            _, height, width = (int(v) for v in next(remaining))
            height, width = height // merge, width // merge
            rows = torch.arange(height).repeat_interleave(width)
            columns = torch.arange(width).repeat(height)
            pieces.append(torch.stack([torch.zeros_like(rows), rows, columns]) + next_position)
            next_position += max(height, width)
            start += height * width
        else:
            end = start
            while end < length and token_ids[end] != image_token_id:
                end += 1
            pieces.append((torch.arange(end - start) + next_position).expand(3, -1))
            next_position += end - start
            start = end
    return torch.cat([torch.arange(length)[None], torch.cat(pieces, 1)])


def _check_row(number: int, row: TrainRow, image_token_id: int, merge: int) -> None:
    lengths = {len(row.token_ids), len(row.loss_mask), len(row.engine_logprobs or row.token_ids)}
    if len(lengths) != 1 or not row.token_ids:
        raise DataError(f"row {number}: token ids, loss mask and log-probabilities have lengths {sorted(lengths)}; they must agree")
    features = sum(int(v.grid_thw.prod()) // merge**2 for v in row.vision)
    tokens = row.token_ids.count(image_token_id)
    if features != tokens:
        raise DataError(f"row {number}: {tokens} image tokens but {features} image features of {len(row.vision)} images")
