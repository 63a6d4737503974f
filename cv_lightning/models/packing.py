"""Packing: many sequences with many images in one `[1, T]` batch.

Positions restart at 0 for every sequence and attention never crosses sequences (`attention.py`). An image that several
sequences show is encoded once, and so is the prompt that the trajectories of a group share.
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
class TrainSequence:
    """One sequence to train on."""

    token_ids: list[int]
    """Images are expanded: one image token per feature."""
    loss_mask: list[bool]
    """True where the token was sampled and is learned; the first token never is."""
    vision: list[ImageInputs] = field(default_factory=list)
    """One per image, in the order of their tokens."""
    rollout_logprobs: list[float] | None = None
    """The engine's log-probability of every token; needed in RL only."""
    advantage: float = 0.0
    """The trajectory's advantage; needed in RL only."""
    number: int | None = None
    """Number of its trajectory among those that are packed together; None for a dummy sequence and in SFT."""

    @property
    def prompt_len(self) -> int:
        """Number of tokens before the first learned one; all tokens if none is learned."""
        return self.loss_mask.index(True) if True in self.loss_mask else len(self.loss_mask)


@dataclass(slots=True, kw_only=True)
class PackedBatch(PackedInputs):
    """Packed sequences, the input of one micro-batch. `N` is the number of loss positions."""

    loss_positions: torch.Tensor
    """[N] Positions in T whose *next* token is learned."""
    targets: torch.Tensor
    """[N] The tokens that follow the loss positions."""
    sequence_index: torch.Tensor
    """[N] Place among the packed sequences of the one that each target belongs to."""
    rollout_logprobs: torch.Tensor
    """[N] float32; 0 for sequences without them."""
    advantages: torch.Tensor
    """[N] float32: the trajectory's advantage at each target."""
    adapter: ModelAdapter
    """Adapter of the model that the batch was made for."""
    old_logprobs: torch.Tensor | None = None
    """[N] Log-probabilities that the ratio is taken against, if not the engine's."""
    reference_logprobs: torch.Tensor | None = None
    """[N] Log-probabilities of the reference policy."""

    @property
    def num_loss_tokens(self) -> int:
        """N."""
        return self.targets.numel()

    @property
    def num_trained(self) -> int:
        """Number of sequences with a loss position."""
        return int(torch.unique(self.sequence_index).numel())

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on a device; the same object if it is there already."""
        if self.input_ids.device == device:
            return self
        tensors: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in tensors.items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


def prompt_groups(
    sequences: Sequence[TrainSequence], config: PretrainedConfig, adapter: ModelAdapter
) -> list[list[int]]:
    """Indices of the sequences that begin with the same prompt, so that it is computed once for all of them.

    A prompt is everything before the first learned token; two are the same if their tokens are equal and their images
    are the same objects. If the model's attention cannot share a prefix, every sequence is a group of its own.
    """
    if not adapter.shares_prefix(config):
        return [[index] for index in range(len(sequences))]
    found: dict[Any, list[int]] = {}
    for index, sequence in enumerate(sequences):
        length = sequence.prompt_len
        alone = length in (0, len(sequence.token_ids))
        images = sequence.vision[: _images_within(sequence, length, adapter)]
        key = index if alone else (tuple(sequence.token_ids[:length]), tuple(map(id, images)))
        found.setdefault(key, []).append(index)
    return list(found.values())


def bounded_prompt_groups(
    sequences: Sequence[TrainSequence], config: PretrainedConfig, adapter: ModelAdapter, budget: int
) -> list[list[TrainSequence]]:
    """Prompt groups, split where they would exceed the token budget of a micro-batch.

    A sequence that is longer than the budget is a group of its own.
    """
    bounded: list[list[TrainSequence]] = []
    for group in prompt_groups(sequences, config, adapter):
        part: list[TrainSequence] = []
        for sequence in (sequences[index] for index in group):
            if part and packed_length([*part, sequence]) > budget:
                bounded.append(part)
                part = []
            part.append(sequence)
        bounded.append(part)
    return bounded


def packed_length(group: Sequence[TrainSequence]) -> int:
    """Number of tokens that the sequences of one prompt group take together."""
    return sum(len(sequence.token_ids) for sequence in group) - (len(group) - 1) * group[0].prompt_len


def _images_within(sequence: TrainSequence, num_tokens: int, adapter: ModelAdapter) -> int:
    """Number of images among a sequence's first tokens."""
    left, count = sequence.token_ids[:num_tokens].count(adapter.image_id), 0
    while left > 0 and count < len(sequence.vision):
        left, count = left - sequence.vision[count].num_tokens, count + 1
    return count


def pack_sequences(sequences: Sequence[TrainSequence], config: PretrainedConfig, adapter: ModelAdapter) -> PackedBatch:
    """Concatenate sequences, those of a prompt group side by side. The loss positions are in that order.

    Args:
        sequences: At least one.
        config: The model's config; its attention decides whether prompts are shared.
        adapter: The model's adapter, bound to its processor.

    Raises:
        DataError: A sequence's image tokens and image features differ in number or order, or its lists in length.
    """
    distinct: dict[int, ImageInputs] = {}
    order: list[int] = []
    parts: list[dict[str, np.ndarray]] = []
    offset = 0
    for group in prompt_groups(sequences, config, adapter):
        start = offset
        for place in group:
            sequence = sequences[place]
            shared = sequence.prompt_len if place != group[0] else 0
            parts.append(_sequence_arrays(place, sequence, adapter, start=start, offset=offset, shared=shared))
            offset += len(sequence.token_ids) - shared
            shown = sequence.vision[_images_within(sequence, shared, adapter) :]
            distinct |= {id(vision): vision for vision in shown}
            order += map(id, shown)
    packed = {name: torch.from_numpy(np.concatenate([part[name] for part in parts], -1)) for name in parts[0]}
    rows = {key: row for row, key in enumerate(distinct)}
    return PackedBatch(
        input_ids=packed.pop("token_ids")[None],
        position_ids=packed.pop("positions")[:, None],
        images=tuple(distinct.values()),
        image_index=torch.tensor([rows[key] for key in order]) if order else None,
        adapter=adapter,
        **packed,
    )


def _sequence_arrays(
    place: int, sequence: TrainSequence, adapter: ModelAdapter, *, start: int, offset: int, shared: int
) -> dict[str, np.ndarray]:
    """Fields of a packed batch for one sequence.

    Args:
        place: The sequence's place among those that are packed.
        sequence: The sequence.
        adapter: The model's adapter.
        start: Position in T of its first `shared` tokens, which an earlier sequence of the group has brought.
        offset: Position in T of its token `shared`, the first that it adds.
        shared: Number of tokens that it shares.
    """
    logprobs = sequence.rollout_logprobs
    lengths = {len(part) for part in (sequence.token_ids, sequence.loss_mask, logprobs) if part is not None}
    if len(lengths) != 1 or not sequence.token_ids:
        raise DataError(
            f"sequence {place}: token ids, loss mask and log-probabilities have lengths {sorted(lengths)}; they must "
            "agree"
        )
    token_ids = np.array(sequence.token_ids, dtype=np.int64)
    is_image = token_ids == adapter.image_id
    features, tokens = sum(image.num_tokens for image in sequence.vision), int(is_image.sum())
    if features != tokens:
        raise DataError(
            f"sequence {place}: {tokens} image tokens but {features} image features of {len(sequence.vision)} images"
        )
    learned = np.flatnonzero(np.array(sequence.loss_mask, dtype=bool)[1:])  # position i predicts token i + 1
    rollout = np.zeros(len(token_ids)) if logprobs is None else np.array(logprobs)
    return {
        "token_ids": token_ids[shared:],
        "positions": adapter.positions(is_image, sequence.vision)[:, shared:],
        "loss_positions": learned + np.where(learned < shared, start, offset - shared),
        "targets": token_ids[learned + 1],
        "sequence_index": np.full(len(learned), place, dtype=np.int64),
        "rollout_logprobs": rollout[learned + 1].astype(np.float32),
        "advantages": np.full(len(learned), sequence.advantage, dtype=np.float32),
    }
