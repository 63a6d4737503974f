"""Packed rows give what one-by-one gives: positions, logits, loss and gradients."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from cv_lightning.images import to_model_image
from cv_lightning.model.attention import NAME, use_attention
from cv_lightning.model.loading import PolicyConfig, image_limits, load_policy, load_processor, vision_token_ids
from cv_lightning.model.logprobs import packed_logprobs
from cv_lightning.model.packing import TrainRow, pack_rows, rope_positions
from cv_lightning.model.tokens import LOGIT_BAN
from cv_lightning.model.vision import VisionCache, process_images
from cv_lightning.types import CheckpointError, DataError


@pytest.fixture(scope="module", params=["tiny_checkpoint", "tiny_qwen25"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """Qwen3-VL, then Qwen2.5-VL."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    return load_policy(PolicyConfig(path=str(checkpoint), dtype="float32"))


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> ProcessorMixin:
    return load_processor(str(checkpoint))


def random_rows(model: PreTrainedModel, processor: ProcessorMixin, seed: int, num_rows: int = 6) -> list[TrainRow]:
    """Rows with 0 to 3 images of several sizes, some of them shared."""
    rng = random.Random(seed)
    limits, cache = image_limits(processor), VisionCache(processor)
    sizes = [(96, 96), (64, 128), (384, 384), (50, 40)]
    pool = [to_model_image(Image.effect_noise(rng.choice(sizes), 90).convert("RGB"), limits) for _ in range(4)]
    merge, pad = model.config.vision_config.spatial_merge_size, model.config.image_token_id
    rows = []
    for _ in range(num_rows):
        ids: list[int] = [rng.randrange(200) for _ in range(rng.randint(2, 9))]
        vision = cache.get([rng.choice(pool) for _ in range(rng.randint(0, 3))])
        for image in vision:
            ids += [pad] * (int(image.grid_thw.prod()) // merge**2) + [rng.randrange(200) for _ in range(rng.randint(1, 9))]
        mask = [token != pad and rng.random() < 0.6 for token in ids]
        mask[-1] = True
        rows.append(TrainRow(token_ids=ids, loss_mask=mask, vision=vision))
    return rows


def one_by_one(model: PreTrainedModel, row: TrainRow, banned: list[int]) -> torch.Tensor:
    """Independent computation: transformers' own forward of one unpacked sequence with its own positions and SDPA."""
    ids = torch.tensor([row.token_ids])
    visual = {}
    if row.vision:
        visual = {
            "pixel_values": torch.cat([v.pixel_values for v in row.vision]),
            "image_grid_thw": torch.cat([v.grid_thw for v in row.vision]),
        }
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        **visual,
    ).logits[0]
    logits[:, banned] += LOGIT_BAN
    logprobs = torch.log_softmax(logits[:-1].float(), -1).gather(-1, ids[0, 1:, None])[:, 0]
    return logprobs[torch.tensor(row.loss_mask[1:])]


@pytest.mark.parametrize("seed", range(4))
def test_packed_equals_one_by_one(model, processor, seed):
    rows = random_rows(model, processor, seed)
    banned = vision_token_ids(processor.tokenizer)
    batch = pack_rows(rows, model.config)

    model.zero_grad()
    packed = packed_logprobs(model, batch, banned_ids=banned, chunk_tokens=7).logprobs
    packed.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    use_attention(model, "sdpa")
    single = torch.cat([one_by_one(model, row, banned) for row in rows])
    single.sum().backward()
    use_attention(model, NAME)
    torch.testing.assert_close(packed, single, atol=1e-5, rtol=1e-5)
    assert float(packed.detach().std()) > 0.01  # a model that says the same everywhere would agree with anything
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = max(1.0, float(parameter.grad.abs().max()))
            torch.testing.assert_close(gradients[name] / scale, parameter.grad / scale, atol=2e-5, rtol=1e-4, msg=name)


def test_positions_equal_the_models_own(model, processor):
    for row in random_rows(model, processor, seed=9):
        ids = torch.tensor([row.token_ids])
        grids = torch.cat([v.grid_thw for v in row.vision]) if row.vision else None
        kinds = (ids == model.config.image_token_id).int()
        expected, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=grids, attention_mask=torch.ones_like(ids))
        merge = model.config.vision_config.spatial_merge_size
        ours = rope_positions(row.token_ids, [v.grid_thw[0] for v in row.vision], model.config.image_token_id, merge)
        assert torch.equal(ours[1:], expected[:, 0])
        assert ours[0].tolist() == list(range(len(row.token_ids)))


def test_entropy_is_that_of_the_sampling_distribution(model, processor):
    batch = pack_rows(random_rows(model, processor, seed=3, num_rows=2), model.config)
    hot = packed_logprobs(model, batch, temperature=2.0, with_entropy=True)
    cold = packed_logprobs(model, batch, temperature=0.5, with_entropy=True)
    assert hot.entropy is not None and cold.entropy is not None
    assert (hot.entropy > cold.entropy).all() and (cold.entropy > 0).all()


def test_a_shared_image_is_encoded_once(model, processor):
    rows = random_rows(model, processor, seed=5)
    batch = pack_rows(rows, model.config)
    shown = [id(v) for row in rows for v in row.vision]
    assert batch.image_grid_thw.shape[0] == len(set(shown)) < len(shown) == batch.image_index.numel()


def test_processing_a_model_image_resizes_nothing(processor):
    limits = image_limits(processor)
    for size in ((96, 96), (384, 384), (30, 900), (999, 50), (1, 1), (64, 64)):
        image = to_model_image(Image.effect_noise(size, 50).convert("RGB"), limits)
        grid = process_images(processor, [image]).grid_thw[0].tolist()
        patch = processor.image_processor.patch_size
        assert grid == [1, image.height // patch, image.width // patch]
        assert to_model_image(image, limits).size == image.size


def test_a_row_whose_images_do_not_fit_its_tokens_is_refused(model):
    pad = model.config.image_token_id
    with pytest.raises(DataError, match="1 image tokens but 0"):
        pack_rows([TrainRow(token_ids=[1, pad, 2], loss_mask=[False, False, True])], model.config)


def test_a_folder_without_a_processor_says_what_to_do(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no processor"):
        load_processor(str(tmp_path))
    with pytest.raises(CheckpointError, match="no such folder"):
        load_processor(str(tmp_path / "nowhere"))
