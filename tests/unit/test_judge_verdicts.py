"""Reading verdicts and filling prompts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from cv_lightning.endpoint.client import retry_after
from cv_lightning.rewards.judge.prompts import MAX_FIELD_CHARS, SHIPPED, load_prompt
from cv_lightning.rewards.judge.verdict import parse_verdict, read_verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("1", 1.0),
        (" 0\n", 0.0),
        ("1.0", 1.0),
        ("Correct.", 1.0),
        ("**Incorrect**", 0.0),
        ("yes", 1.0),
        ('{"verdict": 1}', 1.0),
        ('```json\n{"correct": false}\n```', 0.0),
        ("<think>maybe 1, maybe not</think>\n0", 0.0),
        ("no opening tag, 1</think>1", 1.0),
        ("They are the same city.\nVerdict: 1", 1.0),
        ("Final answer is **0**.", 0.0),
        ("<think>never ends 1", None),
        ("1 or 0", None),
        ("10", None),
        ("I think it is right because it says so", None),
        ('{"verdict": "unsure"}', None),
        ('{"reason": 1}', None),
        ("{" * 10_000, None),
        ("", None),
    ],
)
def test_text(text: str, verdict: float | None) -> None:
    assert parse_verdict(text) == verdict


def body(token: str, **top: float) -> dict[str, object]:
    alternatives = [{"token": name.strip("_"), "logprob": math.log(p)} for name, p in top.items()]
    content = [{"token": token, "logprob": -0.1, "top_logprobs": alternatives}]
    return {"choices": [{"message": {"content": token}, "logprobs": {"content": content}}]}


def test_probabilities() -> None:
    found = read_verdict(body("1", _1=0.6, _0=0.2))
    assert found is not None
    assert found == pytest.approx(0.75)
    alone = read_verdict(body("1", _1=1.0))
    assert alone is not None
    assert alone == 1.0  # without the other token's mass the text decides
    thought = read_verdict(body("yes", _1=0.1, _0=0.9))
    assert thought is not None
    assert thought == 1.0  # the probabilities are not those of a verdict


@pytest.mark.parametrize(
    "value",
    [None, [], {}, {"choices": {}}, {"choices": [None]}, {"choices": [{"message": {"content": ["1"]}}]}, "1", 1],
)
def test_bodies_of_any_shape(value: object) -> None:
    assert read_verdict(value) is None


def test_retry_after() -> None:
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


def test_fields_can_neither_close_their_tag_nor_fill_the_context() -> None:
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
