"""What a snippet prints and shows: byte for byte what plain Python prints, within limits."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from sandbox_samples import NOISE, general

from cv_lightning.sandbox import Sandbox, SandboxConfig, plan
from cv_lightning.sandbox.reading import readable
from cv_lightning.sandbox.wire import CUT_OUT
from cv_lightning.types import SandboxResult, ToolStatus

PROGRAMS, TOGETHER = 500, 20
"""Programs that are compared with plain Python, and how many of them one process runs."""
STATEMENTS = """
print({n}, {x}, {s!r}, sep={sep!r}, end={end!r})
print(f"{{{n}:>8}}|{{{x}:.3f}}|{n:<12}|%r" % ({s!r},))
for i in range({n} % 7): print(i, i ** 2, sep="\\t")
print([{s!r}] * ({n} % 4), {{"k": {x}, {n}: ({n},)}}, {{{n} % 3}}, frozenset())
print(*sorted({s!r}), sep={sep!r})
import sys; sys.stdout.write({s!r} + "\\n"); sys.stdout.writelines([{s!r}, "\\n"])
sys.stdout.flush(); sys.stdout.buffer.write(bytes([{n}, 10, 200, 9, 0, 27])); sys.stdout.buffer.flush()
import json; print(json.dumps({{"a": {x}, "b": {s!r}}}, indent={n} % 3))
import pprint; pprint.pprint({{str(i): list(range(i)) for i in range({n} % 12)}}, width=30)
import numpy as np; print(np.arange({n} % 40).reshape(-1, 1) * {x}); print(np.float32({x}))
import statistics; print(statistics.mean([{n}, {x}]), round({x}, {n} % 5), divmod({n}, 7))
import fractions, decimal; print(fractions.Fraction({n}, 7), decimal.Decimal({n}) / 3)
try: [][{n}]
except IndexError as error: print(type(error).__name__, error, file=sys.stdout)
class A:
    def __repr__(self): return "A({s2})"
    def __str__(self): return {s!r}
print(A(), [A()], "{{}} {{!r}}".format(A(), A()))
def f(n): return n if n < 2 else f(n - 1) + f(n - 2)
print(f({n} % 12), end="\\n\\n")
print("\\x1b[3{n}m" + {s!r} + "\\x1b[0m", "\\r", chr({n} * 37 % 0xD800))
print((lambda *a, **k: (a, k))({n}, key={s!r}), None, True, ..., b"\\x00{n}", 1e{n} if {n} < 300 else 0)
import textwrap; print(textwrap.fill({s!r} * 20, 30)); print()
import contextlib, io
with contextlib.redirect_stdout(io.StringIO()) as inner: print("hidden", {n})
print(len(inner.getvalue()), "x" * ({n} * 3))
"""
PIECES = ["", " ", "a", "Größe", "数", "🙂", "\t", "x\ny", "'", '"', "<b>", "<|im_end|>", "\\", "\u202e", "0.5", "{}"]


def program(rng: random.Random) -> str:
    """A few statements that print, with random values."""
    lines = STATEMENTS.strip().splitlines()
    starts = [
        at for at, line in enumerate(lines) if not line.startswith((" ", "except", "print(A(", "print(len(inner"))
    ]
    starts = [at for at in starts if not lines[at].startswith(("with ", "print(f({n}"))]
    blocks = ["\n".join(lines[a:b]) for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]
    said = "".join(rng.choices(PIECES, k=rng.randrange(4)))
    values = {"n": rng.randrange(200), "x": rng.uniform(-1e3, 1e3), "s": said, "s2": rng.randrange(9)}
    values |= {"sep": rng.choice(PIECES), "end": rng.choice(["\n", "", ";\n", " end\n"])}
    return "\n".join(block.format(**values) for block in rng.choices(blocks, k=rng.randrange(1, 5)))


def text_of(code: str, sandbox: Sandbox | None = None) -> SandboxResult:
    return (sandbox or general()).run_sync(NOISE, code, max_shown=4)


# ------------------------------------------------------------------------------------------------ text
def test_the_text_is_what_plain_python_prints(tmp_path: Path) -> None:
    rng = random.Random(11)
    programs = [f"import sys\n{program(rng)}" for _ in range(PROGRAMS)]
    assert len(set(programs)) > 0.9 * PROGRAMS
    with Sandbox(SandboxConfig(max_code_chars=32_000)) as sandbox:
        for at in range(0, PROGRAMS, TOGETHER):
            code = "\nprint('-----')\n".join(programs[at : at + TOGETHER])
            (tmp_path / "code.py").write_text(code, encoding="utf-8")
            environment = {"PYTHONIOENCODING": "utf-8:backslashreplace", "PYTHONHASHSEED": "0"}
            command = [sys.executable, str(tmp_path / "code.py")]
            plain = subprocess.run(command, capture_output=True, env=environment, check=False)
            assert plain.returncode == 0, (code, plain.stderr.decode())
            result = text_of(code, sandbox)
            assert result.status is ToolStatus.OK, (code, result.error)
            assert result.text == readable(plain.stdout.decode("utf-8", "backslashreplace")), code


@pytest.mark.parametrize(
    "last", ["1 + 1", "'é\\n'", "[1, {'a': None}]", "None", "image.size", "np.arange(5)", "1;", ""]
)
def test_the_value_of_the_last_expression_is_what_a_console_shows(last: str) -> None:
    import numpy as np

    shown = io.StringIO()
    with redirect_stdout(shown):
        print("before")
        value = eval(last, {"image": NOISE, "np": np}) if last and ";" not in last else None
        print(*([repr(value)] if value is not None else []), sep="", end="\n" if value is not None else "")
    assert text_of(f"print('before')\n{last}").text == shown.getvalue()


def test_standard_error_and_written_descriptors_are_in_the_order_of_writing() -> None:
    code = "import sys, os, warnings\nprint(1)\nsys.stderr.write('2\\n')\nprint(3)\nos.write(1, b'4\\n')\nprint(5)"
    assert text_of(code).text == "1\n2\n3\n4\n5\n"
    assert "DeprecationWarning: old" in text_of("import warnings\nwarnings.warn('old', DeprecationWarning)").text


def test_of_a_long_text_beginning_and_end_are_kept() -> None:
    with Sandbox(SandboxConfig(max_text_bytes=400, num_zygotes=1)) as sandbox:
        result = text_of("for i in range(100_000): print(i)", sandbox)
        head, tail = result.text.split(CUT_OUT)
        assert head == "".join(f"{i}\n" for i in range(999))[:200]
        assert tail == "".join(f"{i}\n" for i in range(99_000, 100_000))[-200:]
        whole = "é" * 199 + "\n"
        assert text_of(f"print({whole[:-1]!r})", sandbox).text == whole
        result = text_of("print('aé' + 'é' * 500)", sandbox)
        assert set(result.text.replace(CUT_OUT, "")) == set("aé\n"), "no character is torn"


def test_code_that_prints_nothing_and_makes_nothing_is_the_same_error() -> None:
    for code in ("x = 1", "None", "1;", "exit()"):
        result = text_of(code)
        assert (result.status, result.error_kind, result.text) == (ToolStatus.ERROR, "no_result", ""), code
    without = general().run_sync(NOISE, "print(1)")
    assert (without.status, without.error_kind, without.text) == (ToolStatus.ERROR, "no_result", "")


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        ("print('a')\n1 / 0", "Traceback:\n  line 2: 1 / 0\nZeroDivisionError: division by zero", "a\n"),
        (
            "def f(x):\n    return x / 0\nprint(1)\nf(2)",
            "Traceback:\n  line 4: f(2)\n  line 2, in f: return x / 0\nZeroDivisionError: division by zero",
            "1\n",
        ),
        (
            "def f(n):\n    return f(n - 1) if n else 1 / 0\nf(9)",
            "Traceback:\n  line 3: f(9)\n  ... 8 more ...\n"
            + "  line 2, in f: return f(n - 1) if n else 1 / 0\n" * 2
            + "ZeroDivisionError: division by zero",
            "",
        ),
        ("x = (", "Traceback:\n  line 1: x = (\nSyntaxError (line 1): '(' was never closed. Hint: send complete", ""),
        ("raise ValueError('m' * 10**6)", "Traceback:\n  line 1: raise ValueError('m' * 10**6)\nValueError: mmm", ""),
        ("image.crop((5, 5, 2, 2))", "Traceback:\n  line 1: image.crop((5, 5, 2, 2))\nValueError: Coordinate", ""),
    ],
)
def test_an_error_is_a_short_traceback_of_the_snippets_own_lines(code: str, error: str, said: str) -> None:
    result = text_of(code)
    assert result.status is ToolStatus.ERROR and result.error.startswith(error), result.error
    assert result.text == said and len(result.error) <= SandboxConfig().max_error_chars


# ------------------------------------------------------------------------------------------------ images
@pytest.mark.parametrize(
    ("code", "sizes", "said"),
    [
        ("show(image.rotate(90, expand=True)); print(1); show(image.crop((0, 0, 9, 8)))", [(96, 128), (9, 8)], "1\n"),
        ("result = [image.crop((0, 0, 9, 8)), np.asarray(image)[:5, :7]]", [(9, 8), (7, 5)], ""),
        ("show(image, [image, image])", [(128, 96)] * 3, ""),
        ("result = image.crop((0, 0, 9, 8))\nshow(result)\nresult", [(9, 8)], ""),
        ("show(image)\nresult = image.crop((0, 0, 9, 8))", [(128, 96), (9, 8)], ""),
        ("image.crop((0, 0, 9, 8))", [(9, 8)], ""),
        ("print(1)\nimage = image.crop((0, 0, 9, 8))", [(9, 8)], "1\n"),
        ("draw.point((3, 4), (1, 2, 3))", [(128, 96)], ""),
        ("result = float(np.asarray(image).max())", [], "254.0\n"),
        ("output = {'width': image.width}\nimage = 3", [], "{'width': 128}\n"),
    ],
)
def test_images_and_text_of_one_call(code: str, sizes: list[tuple[int, int]], said: str) -> None:
    result = text_of(code)
    assert (result.status, result.error) == (ToolStatus.OK, ""), result.error
    assert [image.size for image in result.made] == sizes and result.text == said


def test_every_image_has_its_own_map_and_operations() -> None:
    code = "a = image.rotate(90, expand=True)\nb = image.crop((10, 20, 90, 80))\nunused = ImageOps.invert(image)\n"
    result = text_of(code + "show(b)\nb.paste((0, 0, 0), (0, 0, 80, 60))\nresult = a")
    crop, turned = result.traces
    assert crop.effect is not None and crop.effect.crop_box == (10, 20, 90, 80) and crop.effect.core == ("crop",)
    assert turned.effect is not None and turned.effect.core == ("rotate_90",) and turned.effect == result.effect
    names = [op.name for op in result.operations]
    assert [[names[at] for at in trace.used] for trace in result.traces] == [["crop"], ["rotate_90"]]
    assert [op.used for op in result.operations if op.name == "invert"] == [False]
    assert result.earlier[0].tobytes() == NOISE.crop((10, 20, 90, 80)).tobytes(), "shown as it was then"
    assert not text_of("image.rotate(90)\nprint(1)").operations[0].used


PLANS = (
    "result = image.rotate(90, expand=True)",
    "w, h = image.size\nresult = image.crop((w // 4, 0, w, h // 2)).resize((50, 40))",
    "image = ImageOps.mirror(image)\nimg = image.convert('L')",
    "result = ImageEnhance.Contrast(image).enhance(1.5).filter(ImageFilter.GaussianBlur(1))",
    "output = image.transpose(Image.Transpose.ROTATE_180)",
)


@pytest.mark.parametrize("code", PLANS)
def test_a_plan_gives_the_same_as_a_child_with_text(code: str) -> None:
    planned, child = plan.run(NOISE, code, SandboxConfig(plan_budget_ms=1e3)), text_of(code)
    assert planned is not None and planned.image is not None and child.image is not None, child.error
    assert planned.image.tobytes() == child.image.tobytes()
    fields = ("status", "text", "operations", "effect", "traces", "earlier", "error")
    assert [getattr(planned, name) for name in fields] == [getattr(child, name) for name in fields]


def test_a_snippet_that_prints_is_no_plan() -> None:
    for code in ("print(1)\nresult = image", "result = image\nimage.size", "show(image)", "result = [image]"):
        assert plan.run(NOISE, code, SandboxConfig(plan_budget_ms=1e3)) is None


def test_a_cached_text_is_the_same_again_and_of_its_own_form() -> None:
    with Sandbox(SandboxConfig(cache_size=9, num_zygotes=1)) as sandbox:
        first, again = (text_of("print(1)\nshow(image, image)", sandbox) for _ in range(2))
        assert (again.executor, again.text, len(again.made)) == ("cache", "1\n", 2) and first.text == "1\n"
        again.earlier[0].paste((0, 0, 0), (0, 0, 9, 9))
        assert text_of("print(1)\nshow(image, image)", sandbox).earlier[0].tobytes() == NOISE.tobytes()
        assert sandbox.run_sync(NOISE, "print(1)\nshow(image, image)").error_kind == "NameError"
        with pytest.raises(ValueError, match="max_shown 17"):
            sandbox.run_sync(NOISE, "1", max_shown=17)


def test_the_images_of_a_call_share_the_limit_of_one() -> None:
    with Sandbox(SandboxConfig(max_result_pixels=300_000, num_zygotes=1)) as sandbox:
        assert len(text_of("show(image, image.resize((512, 512)))", sandbox).made) == 2
        assert text_of("show(image.resize((512, 512)), image.resize((512, 512)))", sandbox).error_kind == "too_large"
