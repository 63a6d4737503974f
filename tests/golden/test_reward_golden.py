"""The project agrees with the golden cases: input/output pairs of the reference, of PIL and of autograd.

Questionable cases may differ on purpose. Answers, format and tool calls differ where the reference accepts what is no
answer or refuses what is one (reference behaviour and reason stand in each case); one reward case differs because a
mapping's null entry is not wanted; advantages of groups without spread are exactly 0.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent
TOPICS = sorted(path.name.split(".")[0] for path in FOLDER.glob("*.public.json"))


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    """The comparison script beside the cases."""
    spec = importlib.util.spec_from_file_location("golden_compare", FOLDER / "compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_topic_has_cases() -> None:
    assert TOPICS == ["answers", "format", "images", "losses", "reward", "toolcalls", "transforms"]


@pytest.mark.parametrize("topic", TOPICS)
def test_agrees_with_golden_cases(
    topic: str, compare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(FOLDER.parents[1])
    assert compare.main([str(FOLDER / f"{topic}.public.json")]) == 0, capsys.readouterr().out


def test_comparison_notices_a_difference(compare: ModuleType) -> None:
    case = {"id": "x", "kind": "k", "fn": "extract_answer", "input": {"text": "a"}, "expected": "b"}
    rows = compare.judge("answers", case, lambda topic, seen: "a")
    assert [agrees for _, agrees, *_ in rows] == [False]
    assert "expected" not in compare.SEEN
    assert sys.modules.get("golden_compare") is None
