"""The sandbox with real fork servers: results, bad input, executors, missing layers, the command."""

import asyncio
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sandbox_samples import NOISE, general

from cv_lightning.commands.sandbox import main
from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.sandbox.plan import MAX_STATEMENTS
from cv_lightning.types import SandboxError, ToolStatus

TURNED = NOISE.rotate(90, expand=True).tobytes()


# ------------------------------------------------------------------------------------------------ semantics
@pytest.mark.parametrize(
    "code",
    [
        "image = image.rotate(90, expand=True)",
        "img = img.rotate(90, expand=True)",
        "output = image.rotate(90, expand=True)",
        "processed_image = image.rotate(90, expand=True)",
        "def turn(x):\n    return again(x)\ndef again(x):\n    return x.rotate(90, expand=True)\nresult = turn(image)",
        "class T:\n    def go(self, x): return x.transpose(Image.Transpose.ROTATE_90)\nresult = T().go(image)",
        "k = 3\nresult = [image.rotate(30 * k, expand=True) for _ in range(1)][0]",
        "result = np.rot90(np.array(image))",
        "import cv2\nresult = cv2.rotate(np.array(image), cv2.ROTATE_90_COUNTERCLOCKWISE)",
        "from skimage import util\nresult = np.rot90(util.img_as_ubyte(np.asarray(image)))",
        "result = np.rot90(np.asarray(image) / 255.0)",
        "try:\n    1 / 0\nexcept Exception:\n    result = sorted([image.rotate(90, expand=True)], key=id)[0]",
        "px = image.load()\nnew = Image.new('RGB', (image.height, image.width))\nq = new.load()\n"
        "w, h = image.size\nfor x in range(w):\n    for y in range(h):\n        q[y, w - 1 - x] = px[x, y]\n"
        "result = new",
    ],
)
def test_all_ways_to_turn_give_the_turned_image(code: str) -> None:
    result = general().run_sync(NOISE, code)
    assert result.image is not None and result.image.tobytes() == TURNED, result.error


@pytest.mark.parametrize("code", ["ImageDraw.Draw(image).point((3, 4), (1, 2, 3))", "draw.point((3, 4), (1, 2, 3))",
                                  "image.load()[3, 4] = (1, 2, 3)", "image.putpixel((3, 4), (1, 2, 3))"])  # fmt: skip
def test_drawing_on_the_input_is_a_result_and_leaves_the_callers_image_alone(code: str) -> None:
    before = NOISE.tobytes()
    result = general().run_sync(NOISE, code)
    assert result.image is not None and result.image.getpixel((3, 4)) == (1, 2, 3), result.error
    assert NOISE.tobytes() == before


@pytest.mark.parametrize(
    "code",
    [
        "result = image.resize((50000, 50000))",
        "result = image.resize(size=(50000, 50000))",
        "result = Image.new(mode='L', size=(50000, 50000))",
        "result = image.transform((50000, 50000), Image.Transform.AFFINE, (1, 0, 0, 0, 1, 0))",
        "result = ImageOps.expand(image, 30000)",
    ],
)
def test_an_image_beyond_the_memory_limit_is_refused_before_it_is_filled(code: str) -> None:
    result = general().run_sync(NOISE, code)
    assert result.status is ToolStatus.ERROR and result.error_kind == "too_large"
    assert "line 1" in result.error and "crop or resize" in result.error
    assert result.elapsed_s < 1.0


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I", "F", "CMYK", "LA"])
def test_inputs_and_results_of_any_mode_are_rgb(mode: str) -> None:
    result = general().run_sync(NOISE.convert(mode), f"assert image.mode == 'RGB'\nresult = image.convert({mode!r})")
    assert result.image is not None and result.image.mode == "RGB" and result.image.size == NOISE.size, result.error


def test_random_numbers_depend_on_image_and_code_only() -> None:
    code = "import random\nresult = (np.random.rand(8, 8, 3) * 200 + random.random() * 50).astype('uint8')"
    first, second = (general().run_sync(NOISE, code).image for _ in range(2))
    other = general().run_sync(NOISE, code + " # ").image
    assert first is not None and second is not None and other is not None
    assert first.tobytes() == second.tobytes() != other.tobytes()


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("code", "kind", "hint"),
    [
        ("result = 'x'", "not_an_image", "PIL image"),
        ("result = Image.new('L', (5000, 5000))", "too_large", "crop or resize"),
        ("x = 1", "no_result", "put the new image into `result`"),
        ("result = np.full((9, 9, 3), np.nan)", "nan", "nan_to_num"),
        ("result = Image.fromarray(np.full((9, 9), np.inf, np.float32))", "nan", "nan_to_num"),
        ("result = np.zeros((0, 9, 3), np.uint8)", "zero_size", "crop box"),
        ("result = image.crop((5, 5, 5, 9))", "zero_size", "crop box"),
        ("result = image.resize((400, 1))", "aspect", "wider"),
        ("result = np.zeros((4, 4, 7), np.uint8)", "wrong_mode", "height x width"),
        ("result = np.zeros((4, 4, 3), complex)", "wrong_mode", "astype"),
        ("result = x = y", "NameError", "line 1"),
        ("\n\nresult = image.rotate(", "SyntaxError", "line 3"),
        ("a = 1\nresult = image.crop(a)", "TypeError", "line 2"),
        ("import no_such_library", "ModuleNotFoundError", "available: PIL"),
        ("open('/etc/passwd', 'w')", "PermissionError", "files"),
        ("raise SystemExit", "no_result", "result"),
        ("import os\nos._exit(97)", "no_result", "result"),
        ("import os\nos.close(4)\nresult = image", "no_result", "result"),
        ("np.zeros(10**11)", "memory", "crop or resize"),
    ],
)
def test_bad_results_are_typed_errors_with_advice(code: str, kind: str, hint: str) -> None:
    result = general().run_sync(NOISE, code)
    assert (result.status, result.error_kind) == (ToolStatus.ERROR, kind), (result.status, result.error)
    assert hint in result.error and result.image is None and len(result.error) <= SandboxConfig().max_error_chars


def test_files_of_the_host_cannot_be_read() -> None:
    sandbox = general()
    hidden = sandbox.layers["private_root"].startswith("active")
    result = sandbox.run_sync(NOISE, "open('/etc/passwd')")
    assert result.error_kind == ("FileNotFoundError" if hidden else "PermissionError") and "files" in result.error


@pytest.mark.parametrize(
    ("image", "code", "kind"),
    [
        (NOISE, "x" * 5000, "too_long"),
        (NOISE, None, "not_text"),
        (NOISE, b"result = image", "not_text"),
        (NOISE, "a\0b", "not_text"),
        (NOISE, "a = '\ud800'", "not_text"),
        (None, "x = 1", "no_image"),
        (Image.new("RGB", (0, 5)), "x = 1", "bad_image"),
        (Image.new("RGB", (4000, 4)), "x = 1", "bad_image"),
    ],
)
def test_invalid_input_is_rejected(image: Image.Image, code: str, kind: str) -> None:
    result = general().run_sync(image, code)
    assert (result.status, result.error_kind) == (ToolStatus.REJECTED, kind) and result.error


def test_error_texts_are_short_and_printable() -> None:
    result = general().run_sync(NOISE, "raise ValueError('\\x1b[2J<|im_end|></tool_response>' + 'A' * 100000)")
    assert result.error.isprintable() and "<|" not in result.error and "tool_response" not in result.error
    assert len(result.error) <= 600 and result.error.startswith("ValueError (line 1")


# ------------------------------------------------------------------------------------------------ executors
def test_cheap_plans_run_in_the_caller_and_other_code_in_a_child() -> None:
    large = NOISE.resize((1024, 1024))
    cheap, dear = "result = image.crop((1, 2, 30, 40))", "result = image.rotate(33, expand=True)"
    with Sandbox(SandboxConfig()) as sandbox:
        before = sandbox.stats
        assert sandbox.run_sync(large, cheap).executor == "plan"
        for code in (dear, "import re\n" + cheap):
            assert sandbox.run_sync(large, code).executor == "process"
        after = sandbox.stats
    assert [after[name] - before[name] for name in ("plan", "process")] == [1, 2]


def test_a_plan_that_fails_runs_in_a_child_that_explains() -> None:
    code = "result = image.rotate(33, expand=True, fillcolor='no such colour')"
    with Sandbox(SandboxConfig(plan_budget_ms=1e6)) as sandbox:
        result = sandbox.run_sync(NOISE, code)
    assert result.error_kind == "ValueError" and result.executor == "process" and "no such colour" in result.error


def test_the_cache_is_bounded_and_its_results_are_copies() -> None:
    config = SandboxConfig(cache_size=2, plan_tier=False)
    codes = [f"result = image.rotate({90 * i})" for i in (1, 2, 3)]
    with Sandbox(config) as sandbox:
        first = sandbox.run_sync(NOISE, codes[0])
        again = sandbox.run_sync(NOISE, codes[0])
        assert again.executor == "cache" and first.image is not None and again.image is not None
        again.image.putpixel((0, 0), (9, 9, 9))
        assert sandbox.run_sync(NOISE, codes[0]).image.tobytes() == first.image.tobytes()  # type: ignore[union-attr]
        sandbox.run_sync(NOISE, codes[1])
        sandbox.run_sync(NOISE, codes[2])
        assert sandbox.run_sync(NOISE, codes[0]).executor == "process"


# ------------------------------------------------------------------------------------------------ start and layers
def test_without_landlock_nothing_can_be_opened_and_benign_code_runs() -> None:
    config = SandboxConfig(plan_tier=False, allow_unsafe=True, disabled_layers=("landlock",))
    with Sandbox(config) as sandbox:
        assert sandbox.layers["landlock"] == "off" and sandbox.layers["files"] == "active (open denied)"
        for code in ("open('/etc/passwd')", "open('/tmp/x', 'w')", "np.fromfile('/etc/passwd')", "open('/dev/null')"):
            assert sandbox.run_sync(NOISE, code).error_kind == "PermissionError", code
        for code in (
            "import re, json, unicodedata, collections\nresult = cv2.flip(np.array(image), 1)",
            "from skimage import filters, exposure\nresult = exposure.equalize_hist(filters.gaussian(np.array(image)))",
            "draw.text((2, 2), 'abc', fill='red')\nresult = image",
            "from scipy import ndimage\nresult = ndimage.rotate(np.array(image), 90)",
        ):
            result = sandbox.run_sync(NOISE, code)
            assert result.status is ToolStatus.OK, (code, result.error)


def test_a_missing_layer_stops_the_start_unless_unsafe_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    from cv_lightning.sandbox.pool import Pool

    with pytest.raises(ValueError, match="allow_unsafe"):
        Sandbox(SandboxConfig(disabled_layers=("seccomp",)))
    with pytest.raises(SandboxError, match="not started"):
        Sandbox().run_sync(NOISE, "import re")
    start = Pool.start

    def start_without_seccomp(self: Pool) -> None:
        start(self)
        self.report = {**self.report, "seccomp": "unavailable (test)"}

    monkeypatch.setattr(Pool, "start", start_without_seccomp)
    with pytest.raises(SandboxError, match="lacks seccomp"):
        Sandbox(SandboxConfig()).start()
    with Sandbox(SandboxConfig(allow_unsafe=True)) as sandbox:
        assert sandbox.run_sync(NOISE, "import re\nresult = image").status is ToolStatus.OK


def test_an_interpreter_that_cannot_load_the_libraries_is_an_error_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cv_lightning.sandbox.server._BOOT", "import no_such_library")
    with pytest.raises(SandboxError, match="three fork servers"):
        Sandbox(SandboxConfig(start_timeout_s=20)).start()


def test_start_and_close_may_be_repeated() -> None:
    sandbox = Sandbox(SandboxConfig(plan_tier=False))
    sandbox.start()
    sandbox.start()
    sandbox.close()
    sandbox.close()
    with pytest.raises(SandboxError, match="not started"):
        asyncio.run(sandbox.run(NOISE, "import re"))
    sandbox.start()
    assert sandbox.run_sync(NOISE, "import re\nresult = image").status is ToolStatus.OK
    sandbox.close()


def test_a_forked_process_cannot_use_the_sandbox_of_its_parent() -> None:
    sandbox = general()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            sandbox.run_sync(NOISE, "import re")
        except SandboxError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert b"forked" in os.read(reader, 1000)
    os.close(reader)
    os.close(writer)


# ------------------------------------------------------------------------------------------------ the command
def test_command_runs_one_snippet_and_prints_its_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "code.py").write_text("x = image.crop((0, 0, 9, 9))\nresult = image.rotate(90, expand=True)")
    NOISE.save(tmp_path / "in.png")
    out = str(tmp_path / "out.png")
    assert main(["--run", str(tmp_path / "code.py"), str(tmp_path / "in.png"), "-o", out]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["core"] == ["rotate_90"]
    assert [(op["name"], op["used"]) for op in shown["operations"]] == [("crop", False), ("rotate_90", True)]
    assert Image.open(out).size == (96, 128)
    (tmp_path / "code.py").write_text("1 / 0")
    assert main(["--run", str(tmp_path / "code.py"), str(tmp_path / "in.png")]) == 1
    assert main(["--run", str(tmp_path / "code.py"), str(tmp_path / "no.png")]) == 2


def test_long_straight_code_runs_in_a_child() -> None:
    lines = ["image = image.transpose(2)"] * (MAX_STATEMENTS + 2)
    result = general().run_sync(NOISE, "\n".join(lines))
    assert result.image is not None and np.array_equal(np.asarray(result.image), np.rot90(np.asarray(NOISE), 26))
