"""The project agrees with the golden cases: input/output pairs of the reference, of PIL and of autograd.

Questionable cases may differ on purpose: docs/rewards.md lists those of answers, format, tool calls and reward, each
with its reason, and a test holds it to that.
"""

from __future__ import annotations

import importlib.util
import json
import re
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


def test_the_docs_list_every_case_that_differs(compare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parents[1])
    spec = importlib.util.spec_from_file_location("golden_adapter", FOLDER / "adapter.py")
    assert spec is not None and spec.loader is not None
    adapter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(adapter)
    differ = set()
    for topic in ("answers", "format", "images", "reward", "toolcalls"):
        for case in json.loads((FOLDER / f"{topic}.public.json").read_text())["cases"]:
            if not all(agrees for _, agrees, *_ in compare.judge(topic, case, adapter.call)):
                differ.add(case["id"])
    text = (FOLDER.parents[1] / "docs" / "rewards.md").read_text()
    listed = set(re.findall(r"^\| ((?:answers|format|images|reward|toolcalls)-p\d+) ", text, re.MULTILINE))
    assert listed == differ


def test_comparison_notices_a_difference(compare: ModuleType) -> None:
    case = {"id": "x", "kind": "k", "fn": "extract_answer", "input": {"text": "a"}, "expected": "b"}
    rows = compare.judge("answers", case, lambda topic, seen: "a")
    assert [agrees for _, agrees, *_ in rows] == [False]
    assert "expected" not in compare.SEEN
    assert sys.modules.get("golden_compare") is None
