"""Tiny checkpoints: loaded by the ordinary classes, with a tokenizer that fits the task."""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.commands.tiny import TinyCheckpoint, main, write
from cv_lightning.digits.demonstrations import tokenizer_corpus
from cv_lightning.digits.quickstart import scene_sizes
from cv_lightning.digits.scenes import GLYPH_SIDE, GLYPHS, KINDS, LAYOUT, DigitsConfig, Kind, digit_task
from cv_lightning.digits.tiny import MARKUP_TOKENS, train_byte_pairs, write_tiny_checkpoint
from cv_lightning.images import ImageLimits
from cv_lightning.models.adapters import adapter_for, known_types
from cv_lightning.models.adapters.tiny import TinyModelConfig
from cv_lightning.types import ImageError

ROTATE = (
    '<think>turned</think><tool_call>\n{"name": "code_image_tool", "arguments": '
    '{"code": "result = image.rotate(270, expand=True)", "image_index": 0}}\n</tool_call>'
)
CROP = ROTATE.replace("rotate(270, expand=True)", "crop((64, 128, 128, 192))")


@pytest.fixture(scope="module", params=known_types())
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def scenes(family: str) -> DigitsConfig:
    """The digits as the quickstart shows them to this family."""
    return DigitsConfig(**scene_sizes(family))


@pytest.fixture(scope="module")
def folder(family: str, scenes: DigitsConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    write(TinyCheckpoint(out=out, model=TinyModelConfig(family=family), digits=scenes))
    return out


@pytest.fixture(scope="module")
def processor(folder: Path) -> ProcessorMixin:
    return AutoProcessor.from_pretrained(folder)


def test_the_real_architecture_has_about_two_and_a_half_million_parameters(family: str, folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    name, parameters, mrope = {
        "qwen3_vl": ("Qwen3VLForConditionalGeneration", 2.5e6, [8, 4, 4]),
        "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", 2.3e6, [4, 6, 6]),
    }[family]
    assert type(model).__name__ == name and config.model_type == family
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.03)
    assert model.dtype == torch.float32
    assert config.text_config.rope_parameters["mrope_section"] == mrope
    assert model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()
    assert model.generation_config.eos_token_id == [AutoTokenizer.from_pretrained(folder).eos_token_id]


def test_processor_class_is_that_of_the_family(family: str, processor: ProcessorMixin) -> None:
    names = {"qwen3_vl": "Qwen3VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}
    assert type(processor).__name__ == names[family]
    assert processor.chat_template == adapter_for(family).chat_template()
    assert adapter_for(family).bind(processor).image_rule.factor == {"qwen3_vl": 32, "qwen2_5_vl": 28}[family]


@torch.no_grad()
def test_qwen25_mixes_windows_only_in_full_attention_blocks(tmp_path: Path) -> None:
    write(TinyCheckpoint(out=tmp_path, model=TinyModelConfig(family="qwen2_5_vl")))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    patches = torch.randn(2, 36, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    patches[1, :32] = patches[0, :32]  # two images that differ in the last of their 3x3 tokens alone
    grids = torch.tensor([[1, 6, 6]] * 2)
    assert model.config.vision_config.fullatt_block_indexes == [1, 3]
    for full_attention, spreads in (([1, 3], True), ([], False)):
        model.model.visual.fullatt_block_indexes = full_attention
        left, right = model.model.get_image_features(patches.flatten(0, 1), grids, return_dict=True).pooler_output
        differs = (left - right).abs().amax(-1) > 1e-7
        assert differs[8] and differs[:8].tolist() == [spreads] * 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_digit_of_the_quickstart_lies_within_one_vision_token(
    family: str, scenes: DigitsConfig, processor: ProcessorMixin, kind: Kind
) -> None:
    limits = adapter_for(family).bind(processor).image_rule
    task = digit_task(scenes, "held_out", 0, kind)
    shown = [task.images[0].size]
    if task.metadata["cell"]:
        left, top, right, bottom = task.metadata["cell"]
        shown.append((right - left, bottom - top))
    sides = {limits.model_size(*size) for size in shown}
    assert sides == {(3 * limits.factor, 3 * limits.factor)}
    if kind in ("upright", "turned"):
        assert task.images[0].size in sides  # not even resized
    scale = 3 * limits.factor / LAYOUT
    tokens = []
    for corner in GLYPHS:
        first = [int(start * scale) // limits.factor for start in corner]
        assert first == [int((start + GLYPH_SIDE) * scale - 1) // limits.factor for start in corner]
        tokens.append(first)
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize("side", [56, 64, 84, 96, 336, 384])
def test_the_model_reads_a_square_image_as_nine_tokens(folder: Path, processor: ProcessorMixin, side: int) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "What number is written?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor(text=[text], images=[Image.new("RGB", (side, side), "white")], return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [[1, 6, 6]]
    assert (batch["input_ids"] == processor.image_token_id).sum() == 9
    assert batch["pixel_values"].abs().max() == 0
    logits = AutoModelForImageTextToText.from_pretrained(folder)(**batch).logits
    assert torch.isfinite(logits).all()


def test_few_images_need_a_second_resize(family: str, processor: ProcessorMixin) -> None:
    limits = adapter_for(family).bind(processor).image_rule
    sizes = [(w, h) for w in range(8, 385, 7) for h in range(8, 385, 7) if max(w, h) <= 8 * min(w, h)]
    assert all(limits.model_size(*limits.model_size(w, h)) == limits.model_size(w, h) for w, h in sizes)


@pytest.mark.parametrize("factor", [28, 32])
def test_every_resized_image_is_accepted_by_the_processor(factor: int) -> None:
    """Strips with the aspect ratio just below the limit, and any other size: refused at once or never again."""
    limits = ImageLimits(factor=factor, min_pixels=3136, max_pixels=1_003_520)
    rng, num_refused = random.Random(factor), 0
    for _ in range(20_000):
        short = rng.randrange(1, 400)
        width, height = rng.sample((short, min(12_000, int(short * rng.uniform(1, 200)) or 1)), 2)
        try:
            seen = limits.model_size(width, height)
        except ImageError:
            num_refused += 1
            continue
        smart_resize(*seen, factor, limits.min_pixels, limits.max_pixels)  # raises for a view of 200 to 1
        assert max(seen) < 200 * min(seen)
    assert num_refused
    with pytest.raises(ImageError, match="crop it first"):
        limits.model_size(7680, 40)  # 192 to 1 before it is rounded to patches


def test_calls_take_few_tokens_and_digits_are_single_tokens(processor: ProcessorMixin) -> None:
    tokenizer = processor.tokenizer
    for text, most in ((ROTATE, 13), (CROP, 24)):
        pieces = [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]]
        assert len(pieces) <= most
        assert "".join(pieces) == text
        assert all(len(piece) == 1 for piece in pieces if re.search(r"\d", piece))


def test_markup_is_single_tokens_that_decoding_keeps(family: str, processor: ProcessorMixin) -> None:
    tokenizer = processor.tokenizer
    for token in (*adapter_for(family).control_tokens, *MARKUP_TOKENS, "<|im_end|>", "<|endoftext|>"):
        assert len(tokenizer(token)["input_ids"]) == 1, token
    ids = tokenizer(ROTATE + "<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == ROTATE


@given(st.text(max_size=60))
def test_every_text_round_trips_through_the_tokenizer(text: str) -> None:
    tokenizer = _byte_pairs()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@cache
def _byte_pairs() -> Tokenizer:
    return train_byte_pairs(TinyModelConfig(), tokenizer_corpus(DigitsConfig(), PromptConfig()))


def test_word_merges_take_more_tokens() -> None:
    words = train_byte_pairs(
        TinyModelConfig(tokenizer_merges="words"), tokenizer_corpus(DigitsConfig(), PromptConfig())
    )
    inner = re.sub(r"<[^>]*>", "", CROP)
    assert 30 <= len(words.encode(inner).ids) <= 50
    assert words.decode(words.encode(inner).ids) == inner


def test_weights_depend_on_the_seed_and_keep_the_callers_random_state(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "head_dim": 16, "num_key_value_heads": 2, "num_layers": 2, "vision_depth": 2}
    small |= {"deepstack_layers": (0,)}
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(7)
        config = TinyModelConfig(**small, seed=seed)
        write_tiny_checkpoint(tmp_path / name, config, corpus=[ROTATE])
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))
        weights.append(AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict())
    same = [all(torch.equal(weights[0][key], other[key]) for key in weights[0]) for other in weights[1:]]
    assert same == [True, False]


def test_tiny_command_writes_a_checkpoint(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--model.hidden_size=32", "--model.num_key_value_heads=1", "--model.num_layers=2"]
    assert main(["--out", str(tmp_path / "made"), "--family", family, "--seed", "3", *sizes]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "made").model_type == family
    config = TinyModelConfig(family=family, hidden_size=32, num_key_value_heads=1, num_layers=2, seed=3)
    write(TinyCheckpoint(out=tmp_path / "same", model=config))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("made", "same")]
    assert weights[0] == weights[1]
    assert "M parameters" in capsys.readouterr().out
    assert AutoProcessor.from_pretrained(tmp_path / "made").chat_template == adapter_for(family).chat_template()


def test_tiny_command_names_an_invalid_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "none"), "--digits.cell=70"]) == 2
    assert "--cell 70" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ({"hidden_size": 100}, "--hidden_size"),
        ({"num_key_value_heads": 3}, "--num_key_value_heads"),
        ({"head_dim": 4}, "--head_dim"),
        ({"deepstack_layers": (4,)}, "--deepstack_layers"),
        ({"num_layers": 1}, "--deepstack_layers"),
        ({"min_tokens": 13}, "--min_tokens"),
        ({"min_tokens": 0}, "--min_tokens"),
        ({"family": "qwen2_5_vl", "head_dim": 8}, "--head_dim"),
        ({"family": "qwen2_5_vl", "full_attention_every": 5}, "--full_attention_every"),
        ({"family": "qwen2_5_vl", "window_tokens": 0}, "--window_tokens"),
        ({"vocabulary": 100}, "--vocabulary"),
        ({"family": "no_such_vl"}, "--family no_such_vl is not known; there are qwen2_5_vl, qwen3_vl"),
    ],
)
def test_invalid_sizes_name_their_flag(arguments: dict, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        TinyModelConfig(**arguments)
