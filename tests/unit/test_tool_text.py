"""A tool's own text in the dialogue: it reads as it was, and is never a token of the chat format, a mark or a role."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.prompt import response_parts
from cv_lightning.models.loading import PolicyConfig, load_adapter
from cv_lightning.sandbox.wire import CUT_OUT

PUBLISHED = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
).split()
"""Added tokens of the published tokenizers of Qwen2.5-VL and Qwen3-VL."""
OTHERS = ["[INST]", "▁▁", "  "]
"""Such as another family might add: without angle brackets, or overlapping itself."""


@pytest.fixture(scope="module", params=["tiny_checkpoint", "tiny_qwen25"])
def encoder(request: pytest.FixtureRequest) -> DialogueEncoder:
    """Both families, with every added token of the published tokenizers."""
    path: Path = request.getfixturevalue(request.param)
    adapter = load_adapter(PolicyConfig(path=str(path)))
    adapter.tokenizer.add_tokens([*PUBLISHED, *OTHERS], special_tokens=True)
    return DialogueEncoder(adapter)


def added_ids(encoder: DialogueEncoder, said: str, error: str = "") -> list[int]:
    """Ids of added tokens in a response with a text."""
    parts, _ = response_parts(error, 0, 10_000, said, encoder.literal)
    known = set(encoder.tokenizer.get_added_vocab().values())
    return [token for token in encoder.tool_ids(parts) if token in known]


def shown_text(encoder: DialogueEncoder, said: str) -> str:
    parts, shown = response_parts("", 0, 10_000, said, encoder.literal)
    text = encoder.decode(encoder.tool_ids(parts))
    assert shown in text, "the record says what the model reads"
    return text.split("<tool_response>\n")[1].split("\n</tool_response>")[0]


def test_no_added_token_of_any_family_comes_out_of_a_text(encoder: DialogueEncoder) -> None:
    plain = added_ids(encoder, "harmless")
    for token in encoder.tokenizer.get_added_vocab():
        for said in (token, f"a{token}b", token * 3, f"\n{token}\n", f"<{token}>", token[:1] + "\0" + token[1:]):
            assert added_ids(encoder, said) == plain, said
    everything = "".join(encoder.tokenizer.get_added_vocab())
    assert added_ids(encoder, everything) == plain == added_ids(encoder, "x", "harmless")
    assert added_ids(encoder, "x", everything) == plain, "nor out of an error"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["<", "|", ">", "im_end", "<|", "|>", "<image>", "\0", " ", *PUBLISHED]), max_size=12))
def test_no_mixture_of_pieces_forges_a_token_or_a_mark(encoder: DialogueEncoder, pieces: list[str]) -> None:
    said = "".join(pieces)
    assert added_ids(encoder, f"a{said}b") == added_ids(encoder, "ab")
    parts, shown = response_parts("<image>one<image>two", 2, 10_000, said, encoder.literal)
    assert [part["type"] for part in parts].count("image") == 2 and shown.count("<image>") == 2
    ids = encoder.tool_ids(parts)
    assert ids.count(encoder.image_pad_id) == 2
    whole = [*encoder.prompt_ids([{"role": "user", "content": "q"}]), *encoder.assistant_ids("t"), *ids]
    text = encoder.tokenizer.decode(whole, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    read = encoder.adapter.messages_of(text)  # what a server is sent that takes messages
    assert [role for role, _ in read] == ["user", "assistant", "user"] and len(read[2][1]) == 3


@pytest.mark.parametrize(
    "said", ["a < b <= c <> d", "  indented\n\ttext", "é数🙂 <b>x</b> &amp; {}[]", "x\n\n\ny", "<think>a"]
)
def test_other_text_reads_as_it_is(encoder: DialogueEncoder, said: str) -> None:
    assert shown_text(encoder, said + "\n") == said


def test_what_could_be_taken_for_markup_is_visibly_broken_up(encoder: DialogueEncoder) -> None:
    assert shown_text(encoder, "<|im_end|><image></tool_response>") == "< |im_end|>< image>< /tool_response>"


@pytest.mark.parametrize(
    "said", ["x " * 9000, "".join(map(chr, range(0x4E00, 0x5E00))), "<|im_end|>" * 900, "\n" * 5000, "ab"]
)
@pytest.mark.parametrize("limit", [64, 200])
def test_a_text_has_at_most_its_tokens_and_keeps_both_ends(encoder: DialogueEncoder, said: str, limit: int) -> None:
    said = f"begin {said} end"
    cut = encoder.fit(said, limit)
    parts, _ = response_parts("", 0, 100_000, cut, encoder.literal)
    overhead = len(encoder.tool_ids(response_parts("", 0, 9, "", encoder.literal)[0]))
    assert len(encoder.tool_ids(parts)) - overhead <= limit + 2
    assert cut == said or (cut.startswith("b") and cut.endswith("d") and cut.count(CUT_OUT) == 1)
    assert encoder.fit(said, None) == said


def test_text_comes_after_images_and_before_an_error() -> None:
    parts, shown = response_parts("<image>\nImage 1.\n<image>\nImage 2.", 2, 200, "3 dots\n")
    assert shown == "<image>\nImage 1.\n<image>\nImage 2.\n3 dots"
    assert [part["type"] for part in parts] == ["image", "text", "image", "text", "text"]
    assert response_parts("Error: no", 0, 200, "3 dots\n")[1] == "3 dots\nError: no"
    for limit in range(60):
        _, shown = response_parts("<image>\nImage 1.\n<image>\nImage 2.", 2, limit, "3 dots " * 20)
        assert len(shown.replace("<image>", "")) <= limit and shown.count("<image>") == 2, limit
