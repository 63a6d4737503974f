"""Tiny checkpoints: loaded by the ordinary classes, with a tokenizer that fits the task."""

from __future__ import annotations

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

from cv_lightning.agent.prompt import PromptConfig, chat_template
from cv_lightning.commands.tiny import TinyCheckpoint, main, write
from cv_lightning.data.demonstrations import tokenizer_corpus
from cv_lightning.data.digits import DigitsConfig
from cv_lightning.images import ImageLimits, model_size
from cv_lightning.model.tiny import (
    CONTROL_TOKENS,
    MARKUP_TOKENS,
    TinyModelConfig,
    train_byte_pairs,
    write_tiny_checkpoint,
)

ROTATE = (
    '<think>turned</think><tool_call>\n{"name": "code_image_tool", "arguments": '
    '{"code": "result = image.rotate(270, expand=True)", "image_index": 0}}\n</tool_call>'
)
CROP = ROTATE.replace("rotate(270, expand=True)", "crop((64, 128, 128, 192))")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    write(TinyCheckpoint(out=out))
    return out


@pytest.fixture(scope="module")
def processor(folder: Path) -> ProcessorMixin:
    return AutoProcessor.from_pretrained(folder)


def test_the_real_architecture_has_two_and_a_half_million_parameters(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(2.5e6, rel=0.03)
    assert model.dtype == torch.float32
    assert config.text_config.rope_parameters["mrope_section"] == [8, 4, 4]
    assert model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()
    assert model.generation_config.eos_token_id == [AutoTokenizer.from_pretrained(folder).eos_token_id]


@pytest.mark.parametrize("side", [64, 96, 384])
def test_the_model_reads_a_square_image_as_nine_tokens(folder: Path, processor: ProcessorMixin, side: int) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "What number is written?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor(text=[text], images=[Image.new("RGB", (side, side), "white")], return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [[1, 6, 6]]
    assert (batch["input_ids"] == processor.image_token_id).sum() == 9
    assert batch["pixel_values"].abs().max() == 0
    logits = AutoModelForImageTextToText.from_pretrained(folder)(**batch).logits
    assert torch.isfinite(logits).all()


def test_few_images_need_a_second_resize() -> None:
    config = TinyModelConfig()
    limits = ImageLimits(factor=32, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    sizes = [(w, h) for w in range(8, 385, 7) for h in range(8, 385, 7) if max(w, h) <= 8 * min(w, h)]
    assert all(model_size(*model_size(w, h, limits), limits) == model_size(w, h, limits) for w, h in sizes)


def test_calls_take_few_tokens_and_digits_stand_alone(processor: ProcessorMixin) -> None:
    tokenizer = processor.tokenizer
    for text, most in ((ROTATE, 13), (CROP, 24)):
        pieces = [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]]
        assert len(pieces) <= most
        assert "".join(pieces) == text
        assert all(len(piece) == 1 for piece in pieces if re.search(r"\d", piece))


def test_markup_is_single_tokens_that_decoding_keeps(processor: ProcessorMixin) -> None:
    tokenizer = processor.tokenizer
    for token in (*CONTROL_TOKENS, *MARKUP_TOKENS, "<|im_end|>", "<|endoftext|>"):
        assert len(tokenizer(token)["input_ids"]) == 1, token
    ids = tokenizer(ROTATE + "<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == ROTATE


@given(st.text(max_size=60))
def test_every_text_survives_the_tokenizer(text: str) -> None:
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


def test_weights_depend_on_the_seed_and_leave_the_callers_alone(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "head_dim": 16, "num_key_value_heads": 2, "num_layers": 2, "vision_depth": 2}
    small |= {"deepstack_layers": (0,)}
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(7)
        config = TinyModelConfig(**small, seed=seed)
        write_tiny_checkpoint(tmp_path / name, config, corpus=[ROTATE], chat_template=chat_template())
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))
        weights.append(AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict())
    same = [all(torch.equal(weights[0][key], other[key]) for key in weights[0]) for other in weights[1:]]
    assert same == [True, False]


def test_the_command_writes_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--model.hidden_size=32", "--model.num_key_value_heads=1", "--model.num_layers=2"]
    assert main(["--out", str(tmp_path / "made"), "--seed", "3", *sizes]) == 0
    assert (tmp_path / "made" / "model.safetensors").is_file()
    assert "M parameters" in capsys.readouterr().out
    assert AutoProcessor.from_pretrained(tmp_path / "made").chat_template == chat_template()


def test_the_command_names_a_flag_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        ({"min_pixels": 20000}, "--min_pixels"),
        ({"vocabulary": 100}, "--vocabulary"),
    ],
)
def test_sizes_that_cannot_be_name_their_flag(arguments: dict, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        TinyModelConfig(**arguments)
