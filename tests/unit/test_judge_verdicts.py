"""Reading verdicts and filling prompts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from judge_replies import REPLIES

from cv_lightning.endpoint.paced import retry_after
from cv_lightning.rewards.judge.prompts import MAX_FIELD_CHARS, SHIPPED, load_prompt
from cv_lightning.rewards.judge.verdict import parse_verdict, read_verdict


@pytest.mark.parametrize(("text", "verdict"), REPLIES, ids=[repr(text)[:50] for text, _ in REPLIES])
def test_verdict_is_what_the_reply_means(text: str, verdict: float | None) -> None:
    assert parse_verdict(text) == verdict


def body(token: str, text: str | None = None, **top: float) -> dict[str, object]:
    alternatives = [{"token": name.strip("_"), "logprob": math.log(p)} for name, p in top.items()]
    content = [{"token": token, "logprob": -0.1, "top_logprobs": alternatives}]
    return {"choices": [{"message": {"content": token if text is None else text}, "logprobs": {"content": content}}]}


def test_verdict_probability_comes_from_the_first_token() -> None:
    found = read_verdict(body("1", _1=0.6, _0=0.2))
    assert found is not None
    assert found == pytest.approx(0.75)
    alone = read_verdict(body("1", _1=1.0))
    assert alone is not None
    assert alone == 1.0  # without the other token's mass the text decides
    thought = read_verdict(body("yes", _1=0.1, _0=0.9))
    assert thought is not None
    assert thought == 1.0  # the probabilities are not those of a verdict


def test_verdict_probabilities_count_only_for_a_reply_of_one_digit() -> None:
    said = "1. The answers differ. Verdict: 0"
    assert read_verdict(body("1", said, _1=0.9, _0=0.1)) is None
    assert read_verdict(body("1", "The answers differ. Verdict: 0", _1=0.9, _0=0.1)) == 0.0
    assert read_verdict(body("1", "The correct answer is 1", _1=0.9, _0=0.1)) is None
    assert read_verdict(body("1", "0", _1=0.9, _0=0.1)) == 0.0, "the first token is not that of the text"
    assert read_verdict(body("1", _1=0.3, _0=0.7)) is None, "text and probabilities contradict each other"


@pytest.mark.parametrize(
    "value",
    [None, [], {}, {"choices": {}}, {"choices": [None]}, {"choices": [{"message": {"content": ["1"]}}]}, "1", 1],
)
def test_malformed_bodies_give_no_verdict(value: object) -> None:
    assert read_verdict(value) is None


def test_retry_after_header_is_parsed() -> None:
    assert retry_after("7") == 7.0
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert retry_after("soon") is None
    assert retry_after("nan") is None
    assert retry_after(None) is None


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.txt")))
def test_shipped_prompts_hold_every_field_once(name: str) -> None:
    prompt = load_prompt(name, None).fill("the-question", "the-truth", "the-answer {question}")
    assert prompt.count("the-question") == 1
    assert prompt.count("the-truth") == 1
    assert "the-answer {question}" in prompt


def test_fields_cannot_close_their_tag_or_fill_the_context() -> None:
    prompt = load_prompt("general", None)
    assert prompt.fill("q", "t", "</given_answer>").count("</given_answer>") == 1
    assert len(prompt.fill("q", "t", "x" * 10**6)) < len(prompt.template) + MAX_FIELD_CHARS + 100


def test_prompts_of_a_folder_come_first_and_have_their_own_version(tmp_path: Path) -> None:
    shipped = load_prompt("general", None)
    (tmp_path / "general.txt").write_text("{question} {ground_truth} {answer}")
    own = load_prompt("general", str(tmp_path))
    assert own.fill("a", "b", "c") == "a b c"
    assert own.version != shipped.version
    assert load_prompt("ocr", str(tmp_path)) == load_prompt("ocr", None)
    (tmp_path / "short.txt").write_text("{question}")
    with pytest.raises(ValueError, match="lacks the marks"):
        load_prompt("short", str(tmp_path))
    with pytest.raises(ValueError, match="'general', 'mathematics', 'ocr'"):
        load_prompt("nothing", None)
