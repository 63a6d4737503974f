"""Answer rules on cases that the golden files do not have."""

from __future__ import annotations

import pytest

from cv_lightning.rewards.answer import are_answers_equivalent, normalise, rule_score


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("I choose B", "B"),
        ("It must be B", "B"),
        ("So B.", "B"),
        ("B is correct", "B"),
        ("Therefore, B", "B"),
        ("option b", "B"),
        ("(B) red", "B"),
        ("B, because A is wrong", "B"),
        ("B. A cat", "B"),
        ("(B) A red car", "B"),
        ("**B: A dog**", "B"),
        ("C. I am happy", "C"),
        ("B. E-mail", "B"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("I think the answer is (D).", "D"),
        ("x = 7", "7"),
        ("1e3", "1000"),
        ("1000", "1e3"),
        ("10 m\u00b2", "10"),
        ("1\u00bd", "1.5"),
        ("x\u00b2", "x^2"),
        ("**$\\boxed{42}$**.", "42"),
        ("$42$.", "42"),
        ("40 + 2 = 42", "42"),
        ("Table 3 (42)", "42"),
        ("42 (forty-two)", "42"),
        ("$5", "5"),
    ],
)
def test_equivalent_answers_are_accepted(answer: str, truth: str) -> None:
    assert are_answers_equivalent(answer, truth)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("vitamin C", "C"),
        ("Hepatitis B", "B"),
        ("A) 17 B) 42", "A"),
        ("A. 17\nB. 42\nC. 3", "A"),
        ("B) red or C) blue", "B"),
        ("A) or B", "A"),
        ("(A) and (B)", "A"),
        ("A, B", "A"),
        ("A, B or C", "A"),
        ("A. B", "A"),
        ("(A)(B)", "A"),
        ("A: B or C", "A"),
        ("A: B, C, D", "A"),
        ("A. B and C", "A"),
        ("A) B, C, D", "A"),
        ("A - B or C", "A"),
        ("(A) B or C", "A"),
        ("A: B/C/D", "A"),
        ("-$5", "5"),
        ("5\u00b2", "52"),
        ("5\u00b2", "5"),
        ("1\u00bd", "5.5"),
        ("10\u00b2\u00b3", "10"),
        ("3:45", "45"),
        ("3/4", "4"),
        ("1e400", "inf"),
        ("\\boxed{41} \\boxed{42}", "42"),
        ("5 or \\boxed{42}", "42"),
        ("(41) or (42)", "42"),
        ("**41**, **42**", "42"),
        ("41 cats or maybe 42 dogs", "42"),
    ],
)
def test_different_answers_are_refused(answer: str, truth: str) -> None:
    assert not are_answers_equivalent(answer, truth)


@pytest.mark.parametrize("text", ["5\u00b2 is $x$", "**\\boxed{42}**", " 1\u00bd. ", "\uff15\uff0e", "$\\frac{1}{2}$"])
def test_normalisation_is_idempotent(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_symbolic_comparison_comes_last_with_normalised_texts() -> None:
    asked: list[tuple[str, str]] = []

    def symbolic(answer: str, truth: str) -> bool:
        asked.append((answer, truth))
        return True

    assert rule_score("42", "42", symbolic=symbolic).value == 1.0
    assert rule_score("", "42", symbolic=symbolic).value == 0.0
    question = "What is 2x + 1 for every x that there is?"
    assert rule_score(question, "2x+1", question, symbolic=symbolic).value == 0.0
    assert asked == []
    assert rule_score("$1+2x$.", "2x+1", symbolic=symbolic).value == 1.0
    assert asked == [("1+2x", "2x+1")]
