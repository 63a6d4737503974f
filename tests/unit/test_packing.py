"""Packed sequences have the positions, log-probabilities, loss and gradients of single sequences."""

from __future__ import annotations

import copy
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText, PreTrainedModel

from cv_lightning.images import to_model_image
from cv_lightning.models.adapters.base import LOGIT_BAN, ModelAdapter, joined
from cv_lightning.models.loading import PolicyConfig, load_adapter, load_policy, load_processor
from cv_lightning.models.logprobs import packed_logprobs
from cv_lightning.models.packing import TrainSequence, pack_sequences, packed_length, prompt_groups
from cv_lightning.models.vision import VisionCache
from cv_lightning.types import CheckpointError, DataError


@pytest.fixture(scope="module", params=["tiny_checkpoint", "tiny_qwen25"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """Checkpoints of Qwen3-VL and Qwen2.5-VL."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    return load_policy(PolicyConfig(path=str(checkpoint), dtype="float32"))


@pytest.fixture(scope="module")
def stock(checkpoint: Path) -> PreTrainedModel:
    """The same weights in transformers' own model."""
    return AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="float32", attn_implementation="sdpa")


@pytest.fixture(scope="module")
def adapter(checkpoint: Path) -> ModelAdapter:
    return load_adapter(PolicyConfig(path=str(checkpoint)))


def random_sequences(model: PreTrainedModel, adapter: ModelAdapter, seed: int, count: int = 6) -> list[TrainSequence]:
    """Sequences with 0 to 3 images of several sizes, some of them shared."""
    rng = random.Random(seed)
    limits, cache = adapter.image_rule, VisionCache(adapter)
    sizes = [(96, 96), (64, 128), (384, 384), (50, 40)]
    pool = [to_model_image(Image.effect_noise(rng.choice(sizes), 90).convert("RGB"), limits) for _ in range(4)]
    merge, pad = model.config.vision_config.spatial_merge_size, model.config.image_token_id
    sequences = []
    for _ in range(count):
        ids: list[int] = [rng.randrange(200) for _ in range(rng.randint(2, 9))]
        vision = cache.get([rng.choice(pool) for _ in range(rng.randint(0, 3))])
        for image in vision:
            ids += [pad] * (int(image.tensors["image_grid_thw"].prod()) // merge**2) + [
                rng.randrange(200) for _ in range(rng.randint(1, 9))
            ]
        mask = [token != pad and rng.random() < 0.6 for token in ids]
        mask[-1] = True
        sequences.append(TrainSequence(token_ids=ids, loss_mask=mask, vision=vision))
    return sequences


def one_by_one(model: PreTrainedModel, sequence: TrainSequence, banned: list[int]) -> torch.Tensor:
    """Log-probabilities by transformers' own forward of one sequence, with its own positions and SDPA."""
    ids = torch.tensor([sequence.token_ids])
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        **joined(sequence.vision),
    ).logits[0]
    logits[:, banned] += LOGIT_BAN
    logprobs = torch.log_softmax(logits[:-1].float(), -1).gather(-1, ids[0, 1:, None])[:, 0]
    return logprobs[torch.tensor(sequence.loss_mask[1:])]


@pytest.mark.parametrize("seed", range(4))
def test_packed_equals_one_by_one(
    model: PreTrainedModel, stock: PreTrainedModel, adapter: ModelAdapter, seed: int
) -> None:
    sequences = random_sequences(model, adapter, seed)
    banned = list(adapter.vision_ids)
    weights = [0.5 + number for number in range(len(sequences))]  # a loss in which every sequence counts differently
    batch = pack_sequences(sequences, model.config, adapter)

    model.zero_grad()
    packed = packed_logprobs(model, batch, banned_ids=banned, chunk_tokens=7).logprobs
    loss = (packed * torch.tensor(weights)[batch.sequence_index]).sum()
    loss.backward()

    stock.zero_grad()
    single = [one_by_one(stock, sequence, banned) for sequence in sequences]
    reference = sum(weight * part.sum() for weight, part in zip(weights, single, strict=True))
    reference.backward()
    torch.testing.assert_close(packed, torch.cat(single), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, reference, atol=1e-5, rtol=1e-5)
    assert float(packed.detach().std()) > 0.01  # a model that says the same everywhere would agree with anything
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    largest = max(float(parameter.grad.abs().max()) for parameter in stock.parameters() if parameter.grad is not None)
    for name, parameter in stock.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                gradients[name] / largest, parameter.grad / largest, atol=1e-5, rtol=1e-4, msg=name
            )


def grouped_sequences(model: PreTrainedModel, adapter: ModelAdapter, seed: int) -> list[TrainSequence]:
    """Groups of trajectories with one prompt each and their own tool images, and a sequence without a group."""
    rng = random.Random(seed)
    sequences = []
    for prompt in random_sequences(model, adapter, seed, count=3):
        for answer in random_sequences(model, adapter, rng.randrange(1000), count=rng.randint(1, 4)):
            given = [False] * len(prompt.token_ids)
            mask = [True, *answer.loss_mask[1:]]  # the first token after the prompt was sampled
            ids, vision = prompt.token_ids + answer.token_ids, [*prompt.vision, *answer.vision]
            sequences.append(TrainSequence(token_ids=ids, loss_mask=given + mask, vision=vision))
    rng.shuffle(sequences)
    return [*sequences, *random_sequences(model, adapter, seed + 50, count=1)]


@pytest.mark.parametrize("seed", range(4))
def test_a_shared_prompt_is_computed_once_and_changes_nothing(
    model: PreTrainedModel, stock: PreTrainedModel, adapter: ModelAdapter, seed: int
) -> None:
    sequences = grouped_sequences(model, adapter, seed)
    banned = list(adapter.vision_ids)
    batch = pack_sequences(sequences, model.config, adapter)
    groups = prompt_groups(sequences, model.config, adapter)
    assert batch.input_ids.shape[1] == sum(packed_length([sequences[i] for i in group]) for group in groups)
    assert batch.input_ids.shape[1] < sum(len(sequence.token_ids) for sequence in sequences)

    model.zero_grad()
    packed = packed_logprobs(model, batch, banned_ids=banned).logprobs
    (packed * (1.0 + batch.sequence_index)).sum().backward()
    stock.zero_grad()
    single = [one_by_one(stock, sequence, banned) for sequence in sequences]
    for number, alone in enumerate(single):
        torch.testing.assert_close(packed[batch.sequence_index == number], alone, atol=1e-5, rtol=1e-5)
    torch.stack([(1.0 + number) * part.sum() for number, part in enumerate(single)]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    largest = max(float(parameter.grad.abs().max()) for parameter in stock.parameters() if parameter.grad is not None)
    for name, parameter in stock.named_parameters():
        if parameter.grad is not None:
            # Rounding reaches 1.7e-5 with tiny_qwen25, whose weights are large; two positions shifted by one cost 9e-3.
            torch.testing.assert_close(
                gradients[name] / largest, parameter.grad / largest, atol=5e-5, rtol=1e-4, msg=name
            )


def test_prompts_with_different_images_are_not_shared(model: PreTrainedModel, adapter: ModelAdapter) -> None:
    """Prompts share a prefix only if their images are the same objects, and never under SDPA."""
    limits, pad = adapter.image_rule, model.config.image_token_id
    views = [to_model_image(Image.new("RGB", (64, 64), colour), limits) for colour in ("red", "blue", "red")]
    first, other, _ = VisionCache(adapter).get(views)
    pads = [pad] * (first.num_tokens)
    ids = [5, *pads, 6, 7]
    mask = [False] * (len(ids) - 1) + [True]
    sequences = [TrainSequence(token_ids=ids, loss_mask=mask, vision=[image]) for image in (first, other, first)]
    assert prompt_groups(sequences, model.config, adapter) == [[0, 2], [1]]
    plain = copy.copy(model.config)
    plain._attn_implementation = "sdpa"
    assert prompt_groups(sequences, plain, adapter) == [[0], [1], [2]]


def test_positions_equal_the_models_own(model: PreTrainedModel, adapter: ModelAdapter) -> None:
    for sequence in random_sequences(model, adapter, seed=9):
        ids = torch.tensor([sequence.token_ids])
        grids = joined(sequence.vision).get("image_grid_thw")
        kinds = (ids == model.config.image_token_id).int()
        expected, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=grids, attention_mask=torch.ones_like(ids))
        ours = torch.from_numpy(adapter.positions(kinds[0].numpy() == 1, sequence.vision))
        assert torch.equal(ours[1:], expected[:, 0])
        assert ours[0].tolist() == list(range(len(sequence.token_ids)))


def test_entropy_is_that_of_the_sampling_distribution(model: PreTrainedModel, adapter: ModelAdapter) -> None:
    batch = pack_sequences(random_sequences(model, adapter, seed=3, count=2), model.config, adapter)
    hot = packed_logprobs(model, batch, temperature=2.0, entropy="value")
    cold = packed_logprobs(model, batch, temperature=0.5, entropy="value")
    assert hot.entropy is not None and cold.entropy is not None
    assert (hot.entropy > cold.entropy).all() and (cold.entropy > 0).all()


def test_a_shared_image_is_encoded_once(model: PreTrainedModel, adapter: ModelAdapter) -> None:
    sequences = random_sequences(model, adapter, seed=5)
    batch = pack_sequences(sequences, model.config, adapter)
    shown = [id(v) for sequence in sequences for v in sequence.vision]
    assert len(batch.images) == len(set(shown)) < len(shown) == batch.image_index.numel()


def test_processing_does_not_resize_a_model_image(adapter: ModelAdapter) -> None:
    limits = adapter.image_rule
    for size in ((96, 96), (384, 384), (30, 900), (999, 50), (1, 1), (64, 64)):
        image = to_model_image(Image.effect_noise(size, 50).convert("RGB"), limits)
        grid = adapter.process_images([image])[0].tensors["image_grid_thw"][0].tolist()
        patch = adapter.processor.image_processor.patch_size
        assert grid == [1, image.height // patch, image.width // patch]
        assert to_model_image(image, limits).size == image.size


def test_sequences_without_images_or_learned_tokens(
    model: PreTrainedModel, stock: PreTrainedModel, adapter: ModelAdapter
) -> None:
    text = TrainSequence(token_ids=[5, 6, 7, 8], loss_mask=[True, True, False, True])
    silent = TrainSequence(token_ids=[9, 10, 11], loss_mask=[False] * 3)
    both = packed_logprobs(model, pack_sequences([silent, text, silent], model.config, adapter)).logprobs
    torch.testing.assert_close(both, one_by_one(stock, text, []), atol=1e-5, rtol=1e-5)
    nothing = packed_logprobs(model, pack_sequences([silent], model.config, adapter)).logprobs
    assert nothing.shape == (0,)
    nothing.sum().backward()  # ranks without tokens take part in the backward pass


class LiveBytes(TorchDispatchMode):
    """Current and peak bytes of the tensors that operations have made; views of `given` tensors do not count."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, int] = {tensor.untyped_storage().data_ptr(): 0 for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage().data_ptr()) not in self.known:
                self.known[key] = size = tensor.untyped_storage().nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self._freed, key)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.known.pop(key, 0)


def test_logits_of_all_tokens_are_never_in_memory_at_once(
    model: PreTrainedModel, adapter: ModelAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peak memory with the released models' vocabulary, compared with that of full logits."""
    vocabulary, tokens, width = 151_936, 128, model.config.text_config.hidden_size
    head = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(
        False
    )  # its gradient is as large on both sides
    monkeypatch.setattr(model, "get_output_embeddings", lambda: head)
    monkeypatch.setattr(model.config.get_text_config(), "vocab_size", vocabulary)
    sequence = TrainSequence(token_ids=[5] * (tokens + 1), loss_mask=[True] * (tokens + 1))
    batch = pack_sequences([sequence], model.config, adapter)
    states = torch.randn(1, tokens + 1, width, requires_grad=True)
    monkeypatch.setattr(adapter, "packed_hidden", lambda *_: states, raising=False)
    with LiveBytes(head.weight) as ours:
        packed_logprobs(model, batch, temperature=0.7, chunk_tokens=8).logprobs.sum().backward()
    with LiveBytes(head.weight) as full:
        logits = head(states[0, :-1]).float() / 0.7
        torch.log_softmax(logits, -1).gather(-1, batch.targets[:, None]).sum().backward()
    assert full.peak > 2 * tokens * vocabulary * 4
    assert ours.peak <= 0.2 * full.peak


def test_patch_projection_equals_the_convolution(model: PreTrainedModel, stock: PreTrainedModel) -> None:
    ours, theirs = model.model.visual.patch_embed.proj, stock.model.visual.patch_embed.proj
    assert type(theirs) is torch.nn.Conv3d and type(ours) is not torch.nn.Conv3d
    patches = torch.randn(10, 3, *ours.kernel_size, dtype=torch.float64)
    torch.testing.assert_close(copy.deepcopy(ours).double()(patches), copy.deepcopy(theirs).double()(patches))
    assert set(model.state_dict()) == set(stock.state_dict())


def test_an_image_whose_tokens_are_interrupted_is_refused(model: PreTrainedModel, adapter: ModelAdapter) -> None:
    (image,) = VisionCache(adapter).get([to_model_image(Image.new("RGB", (96, 96)), adapter.image_rule)])
    pad = model.config.image_token_id
    ids = [pad] * (image.num_tokens - 1) + [3] + [pad]
    with pytest.raises(DataError, match="interrupted"):
        pack_sequences(
            [TrainSequence(token_ids=ids, loss_mask=[False] * len(ids), vision=[image])], model.config, adapter
        )


def test_images_that_do_not_fit_the_tokens_are_refused(model: PreTrainedModel, adapter: ModelAdapter) -> None:
    pad = model.config.image_token_id
    with pytest.raises(DataError, match="1 image tokens but 0"):
        pack_sequences([TrainSequence(token_ids=[1, pad, 2], loss_mask=[False, False, True])], model.config, adapter)


def test_a_folder_without_a_processor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no processor"):
        load_processor(str(tmp_path))
    with pytest.raises(CheckpointError, match="no such folder"):
        load_processor(str(tmp_path / "nowhere"))


def test_kernels_that_need_a_gpu_are_refused_without_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CheckpointError, match=r"policy\.kernels liger: there is no GPU"):
        load_policy(PolicyConfig(path=str(checkpoint), dtype="float32", kernels="liger"))


@pytest.mark.gpu
def test_fused_kernels_compute_the_same(checkpoint: Path, adapter: ModelAdapter) -> None:
    pytest.importorskip("liger_kernel")
    found = []
    for kernels in ("torch", "liger"):
        model = load_policy(PolicyConfig(path=str(checkpoint), dtype="float32", kernels=kernels)).cuda()
        batch = pack_sequences(random_sequences(model, adapter, seed=1), model.config, adapter).to(torch.device("cuda"))
        found.append(packed_logprobs(model, batch).logprobs)
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
