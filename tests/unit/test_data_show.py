"""`data show`: what is trained on, how large images are, and rows that cannot be shown."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from cv_lightning.commands.data_show import ShowData, load, main, pieces, print_shown, print_tokens
from cv_lightning.digits.export import write_digits_parquet
from cv_lightning.digits.scenes import DigitsConfig

CALL = '<tool_call>\n{"name": "code_image_tool", "arguments": {"code": "result = image"}}\n</tool_call>'


@pytest.fixture
def conversation(tmp_path: Path) -> Path:
    """Two images; the model sees the first one reduced."""
    for name, size in (("a.png", (200, 90)), ("b.png", (64, 64))):
        Image.new("RGB", size, "red").save(tmp_path / name)
    turns = [("human", "<image>What is [it]?"), ("gpt", f"<think>turned</think>{CALL}")]
    turns += [("tool", "<image>Look."), ("gpt", "<answer>74</answer>")]
    good = {"conversations": [{"from": who, "value": what} for who, what in turns], "images": ["a.png", "b.png"]}
    path = tmp_path / "data.json"
    path.write_text(json.dumps([good, {"conversations": good["conversations"], "images": ["a.png"]}]))
    return path


def shown_as(config: ShowData, **options: object) -> str:
    out = io.StringIO()
    console = Console(file=out, width=200, **options)
    shown = load(config)
    print_shown(shown, console)
    print_tokens(shown.dialogue, console)
    return out.getvalue()


def test_exactly_the_trained_tokens_are_marked(conversation: Path, tiny_checkpoint: Path) -> None:
    config = ShowData(file=str(conversation), processor=str(tiny_checkpoint))
    dialogue = load(config).dialogue
    found = list(pieces(dialogue))
    assert sum(piece.num_tokens for piece in found) == len(dialogue.token_ids)
    trained = [piece.text for piece in found if piece.trained]
    assert trained == [f"<think>turned</think>{CALL}<|im_end|>", "<answer>74</answer><|im_end|>"]
    pictures = [piece.num_tokens for piece in found if piece.is_image]
    assert pictures == [dialogue.encoder.num_image_tokens(image.size) for image in dialogue.images]
    plain = shown_as(config)
    assert all("{+" + text + "+}" in plain for text in trained) and plain.count("{+") == 2
    assert "What is [it]?" in plain, "brackets of the data are not markup"
    coloured = shown_as(config, force_terminal=True, color_system="standard")
    assert "{+" not in coloured and f"\x1b[1;32m{trained[1]}" in coloured
    seen = dialogue.images[0]
    row = next(line for line in plain.splitlines() if "200x90" in line)
    assert seen.size != (200, 90) and f"{seen.width}x{seen.height}" in row and str(pictures[0]) in row


def test_a_task_shows_its_prompt(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tasks.parquet"
    write_digits_parquet(path, DigitsConfig(), "train", 3)
    assert main([str(path), "--row", "2", "--processor", str(tiny_checkpoint), "--tokens", "true"]) == 0
    printed = capsys.readouterr().out
    assert "0 of them trained on" in printed and "96x96" in printed and "[image 0:" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{file}", "--row", "9"], "has 2 rows"),
        (["{file}", "--row", "1"], "row 1 is skipped in training: 2 <image> marks"),
        (["{file}", "--row", "-1"], "at least 0"),
        (["data.csv"], "a .json, .jsonl or .parquet file is wanted"),
    ],
)
def test_unusable_arguments_of_show_are_refused(
    arguments: list[str], said: str, conversation: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(file=conversation) for argument in arguments]
    assert main([*given, "--processor", str(tiny_checkpoint)]) == 2
    assert said in capsys.readouterr().err
