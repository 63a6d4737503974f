"""No text that a model may send raises in the caller or is lost: generated code, as a plan and in a child."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest
from sandbox_samples import NOISE

from cv_lightning.sandbox import Sandbox, SandboxConfig, plan
from cv_lightning.sandbox.config import MAX_CODE_CHARS
from cv_lightning.types import ToolStatus

NESTED = {
    "parentheses": ("(", "1", ")"), "lists": ("[", "1", "]"), "dicts": ("{1:", "1", "}"), "calls": ("int(", "1", ")"),
    "minus": ("-", "1", ""), "not": ("not ", "1", ""), "plus": ("1+", "1", ""), "power": ("1**", "1", ""),
    "if_else": ("1 if 1 else ", "1", ""), "lambda": ("lambda:", "1", ""), "subscripts": ("", "image.size", "[0]"),
    "attributes": ("", "image", ".a"), "methods": ("", "image", ".copy()"), "compare": ("1<", "1", ""),
    "or": ("1 or ", "1", ""), "tuples": ("(1,", "", ")"), "strings": ("'a' ", "'b'", ""),
    "f_strings": ("f'{", "1", "}'"),
    "sizes": ("min(image.width,", "1", ")"), "enhance": ("ImageEnhance.Color(", "image", ").enhance(1)"),
    "crops": ("", "image", ".crop((0,0,9,9))"), "walrus": ("(a:=", "1", ")"), "starred": ("*", "image", ""),
    "comprehensions": ("[0 for _ in ", "[]", "]"), "bytes": ("b'", "1", "'"), "matmul": ("1@", "1", ""),
}  # fmt: skip
STATEMENTS = (
    "a=",
    "if 1:\n",
    "@a\n",
    "global a\n",
    "a;",
    "x=1\n",
    "#\n",
    "\n",
    "\\\n",
    "\t",
    "\x0c",
    "try:\n",
    "del a,",
    "import os;",
    "a:int=1\n",
    "async ",
    "yield\n",
    "w,h=image.size\n",
    "image=image.rotate(90)\n",
    "image=image.crop((0,0,1e9,1e9))\n",
)
NUMBERS = (
    "9" * 4000,
    "9" * 5000,
    "0x" + "f" * 20000,
    "1e999",
    "-1e999",
    "1e-999",
    "0b" + "1" * 9000,
    "1_0" * 900,
    "1j",
    "float('nan')",
    "10**400",
    "2**2**30",
    "1/0",
    "0//0",
    "1%0",
    "1e308*10",
    "'" + "é" * 9000 + "'",
    "'\\x00'",
    "None",
    "math.sqrt(-1)",
    "math.inf",
    "int(1e400)",
    "round(1e308)",
    "min()",
    "abs(-0.0)",
    "True",
    "1e15",
    "-1",
    "0.5",
)
TEXTS = (
    "",
    "\0",
    "a\0b",
    "\ufeffresult=image",
    "\ud800",
    "result=image\x00",
    "\u202eresult = image",
    "\uff52esult=image.rotate(\uff190)",
    "résultat = image",
    "# -*- coding: utf-7 -*-\nresult=+AGkAbQBhAGcAZQ-",
    "result\u2028=\u2029image",
    "\x1a",
    "\x7f" * 99,
    "'''" + "a" * 9000,
    "result = image #" + "\U0001f600" * 8000,
    "\U0001d42b\U0001d41e\U0001d42c\U0001d42e\U0001d425\U0001d42d = image",
    "\r" * 20000,
    "$?`",
    "print(" * 2000,
    "(" * 31999,
    "result=image.rotate(90)" + " " * 31000,
    "1\n" * 15000,
    "\n" * 100_000,
    "x" * 32_001,
    "'\\N{DIGIT ONE}'*9",
    "result = '\\d'",
    "result = 1 is 1",
    "assert (1, 2)",
    "x=1\n" * 7999,
    "raise",
    "return 1",
    "\N{NO-BREAK SPACE}result=image",
)
TOKENS = (
    "image result = ( ) [ ] { } , . : ; + - * ** / // % @ < > == 1 0 0.5 -1 1e9 'a' None True lambda if else for in "
    "not and or crop rotate resize size ImageOps mirror Image np array \n \t def class return import from as with try"
).split(" ")


def programs() -> Iterator[str]:
    for depth in (40, 190, 500, 950, 4000, 16000):
        for before, middle, after in NESTED.values():
            count = min(depth, (MAX_CODE_CHARS - 30) // max(1, len(before + after)))
            expression = before * count + middle + after * count
            yield f"x = {expression}\nresult = image"
            yield f"result = {expression}"
    for statement in STATEMENTS:
        for count in (30, 1500):
            yield (statement * count)[:MAX_CODE_CHARS]
        yield "".join(" " * i + statement for i in range(95))
    for number in NUMBERS:
        for call in ("x={}\nresult=image", "result=image.rotate({})", "result=image.crop((0,0,{},9))",
                     "result=image.resize(({},9))", "result=ImageEnhance.Color(image).enhance({})"):  # fmt: skip
            yield call.replace("{}", number)
    yield from TEXTS
    rng = random.Random(5)
    for _ in range(60):
        yield " ".join(rng.choices(TOKENS, k=rng.randrange(2, 60)))
        yield "".join(
            chr(rng.choice([rng.randrange(128), rng.randrange(0x3000)])) for _ in range(rng.randrange(1, 200))
        )


@pytest.mark.parametrize("sample", [150, pytest.param(None, marks=pytest.mark.slow)])
def test_redteam_no_code_raises_in_the_caller_or_is_lost(sample: int | None) -> None:
    codes = list(dict.fromkeys(programs()))
    assert len(codes) >= 600
    if sample is not None:
        codes = random.Random(6).sample(codes, sample)
    lost = []
    config = SandboxConfig(plan_budget_ms=1e6, max_code_chars=MAX_CODE_CHARS, timeout_s=20, cpu_s=1)
    with Sandbox(config) as sandbox:
        for code in codes:
            result = sandbox.run_sync(NOISE, code, owner="fuzz")
            if result.status is ToolStatus.INFRASTRUCTURE_ERROR:
                lost.append(code[:60])
        assert lost == [] and sandbox.stats["restarts"] == 0 and sandbox.stats["resent"] == 0


def test_redteam_deep_code_does_not_break_a_thread_with_a_small_stack() -> None:
    """Executor threads have what the platform gives them, for instance 2 MB."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for code in programs():
                if len(code) <= MAX_CODE_CHARS and "\ud800" not in code:
                    plan.run(NOISE, code, SandboxConfig(max_code_chars=MAX_CODE_CHARS))
        except BaseException as error:
            errors.append(error)

    before = threading.stack_size(1 << 20)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert errors == []
