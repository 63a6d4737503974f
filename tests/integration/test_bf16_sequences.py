"""Long, packed and shared-prefix sequences in bfloat16 compared with transformers' own forward of each sequence."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from cv_lightning.callbacks.start_check import FORWARD_MEAN
from cv_lightning.commands.tiny import TinyCheckpoint, write
from cv_lightning.images import to_model_image
from cv_lightning.models.adapters import ModelAdapter
from cv_lightning.models.adapters.tiny import TinyModelConfig
from cv_lightning.models.loading import PolicyConfig, load_adapter, load_policy
from cv_lightning.models.logprobs import packed_logprobs
from cv_lightning.models.packing import TrainSequence, pack_sequences, packed_length
from cv_lightning.models.reference_forward import plain_logprobs
from cv_lightning.models.vision import VisionCache
from cv_lightning.rollout.mismatch import exceeds

LENGTH = 4_200


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def policy(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, ModelAdapter]:
    """A model for long sequences in which every part affects the log-probabilities."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    sizes = TinyModelConfig(family=request.param, num_layers=2, max_positions=8192, initializer_range=0.2)
    write(TinyCheckpoint(out=folder, model=sizes))
    return load_policy(PolicyConfig(path=str(folder), dtype="bfloat16")), load_adapter(PolicyConfig(path=str(folder)))


def images_of(adapter: ModelAdapter, count: int) -> list[Image.Image]:
    """Images of different noise, at model size."""
    noise = [Image.effect_noise((96, 96), 30 + 20 * number).convert("RGB") for number in range(count)]
    return [to_model_image(image, adapter.image_rule) for image in noise]


def sequence_of(
    policy: tuple[PreTrainedModel, ModelAdapter],
    images: list[Image.Image],
    cache: VisionCache,
    length: int,
    seed: int,
) -> TrainSequence:
    """Images spread over random text, of which the last quarter is learned."""
    model, rng = policy[0], random.Random(seed)
    ids: list[int] = []
    vision = cache.get(images)
    for item in vision:
        ids += [rng.randrange(200) for _ in range(length // (len(images) + 2))]
        ids += [model.config.image_token_id] * item.num_tokens
    ids += [rng.randrange(200) for _ in range(length - len(ids))]
    return TrainSequence(token_ids=ids, loss_mask=[n >= 3 * length // 4 for n in range(length)], vision=vision)


@torch.no_grad()
def gap(
    policy: tuple[PreTrainedModel, ModelAdapter], sequences: list[TrainSequence], images: list[list[Image.Image]]
) -> torch.Tensor:
    """Packed log-probabilities minus those of transformers' own forward of each sequence, [learned tokens]."""
    model, adapter = policy
    packed = pack_sequences(sequences, model.config, adapter)
    ours = packed_logprobs(model, packed).logprobs
    parts = []
    for number, (sequence, own) in enumerate(zip(sequences, images, strict=True)):
        plain = plain_logprobs(model, adapter, sequence.token_ids, sequence.loss_mask, own, [])
        parts.append(ours[packed.sequence_index == number] - plain)
    return torch.cat(parts)


@torch.no_grad()
def rounded_rotary(policy: tuple[PreTrainedModel, ModelAdapter], sequence: TrainSequence) -> torch.Tensor:
    """Log-probabilities with rotary frequencies rounded to bfloat16 minus the correct ones, [learned tokens]."""
    model, packed = policy[0], pack_sequences([sequence], policy[0].config, policy[1])
    exact = {name: buffer.clone() for name, buffer in model.named_buffers()}
    right = packed_logprobs(model, packed).logprobs
    try:
        for buffer in model.buffers():
            buffer.data = buffer.data.bfloat16().float()
        return packed_logprobs(model, packed).logprobs - right
    finally:
        for name, buffer in model.named_buffers():
            buffer.data = exact[name]


def siblings(first: TrainSequence, count: int, seed: int) -> list[TrainSequence]:
    """Sequences with the same prompt and different learned tokens."""
    rng, prompt = random.Random(seed), first.prompt_len
    return [
        TrainSequence(
            token_ids=first.token_ids[:prompt] + [rng.randrange(200) for _ in first.token_ids[prompt:]],
            loss_mask=first.loss_mask,
            vision=first.vision,
        )
        for _ in range(count)
    ]


def test_bf16_sequence_of_4200_tokens_with_four_images_equals_the_plain_model(
    policy: tuple[PreTrainedModel, ModelAdapter],
) -> None:
    images, cache = images_of(policy[1], 4), VisionCache(policy[1])
    sequence = sequence_of(policy, images, cache, LENGTH, seed=0)
    found = gap(policy, [sequence], [images])
    assert len(found) == LENGTH // 4 and not exceeds(found, "bfloat16", 0.0, FORWARD_MEAN), float(found.abs().mean())
    fault = rounded_rotary(policy, sequence)
    assert exceeds(fault, "bfloat16", 0.0, FORWARD_MEAN), "rounded rotary frequencies would show at this length"


def test_bf16_packed_sequences_with_shared_prefixes_equal_the_plain_model(
    policy: tuple[PreTrainedModel, ModelAdapter],
) -> None:
    images, cache = images_of(policy[1], 4), VisionCache(policy[1])
    first = sequence_of(policy, images[:2], cache, 300, seed=1)
    group = [first, *siblings(first, 3, seed=5)]
    other = sequence_of(policy, images[2:], cache, 200, seed=2)
    assert packed_length(group) == 300 + 3 * 75, "the prompt is packed once"
    found = gap(policy, [*group, other], [images[:2]] * 4 + [images[2:]])
    assert len(found) == 4 * 75 + 50 and not exceeds(found, "bfloat16", 0.0, FORWARD_MEAN), float(found.abs().mean())
