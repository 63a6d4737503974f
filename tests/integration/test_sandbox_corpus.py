"""The packaged cases, contained as this user and as one without privileges; the judge itself."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cv_lightning.commands.sandbox import main
from cv_lightning.sandbox import Sandbox
from cv_lightning.sandbox.cases import PACKAGED, Case, load_cases, surroundings
from cv_lightning.types import DataError

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
REACHABLE = "import os, sys; sys.exit(not os.access(sys.executable, os.X_OK))"
CORPORA = (PACKAGED, ROOT / "tests/escape_corpus.json", ROOT / "tests/redteam.json")
NEED_A_PRIVATE_ROOT = ["rt_readlink_outside_denied", "rt_stat_outside_denied"]
"""Landlock covers neither `stat` nor `readlink`."""


def self_test(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, object]]:
    code = main(["--self-test", "--json", "-", *arguments])
    shown = json.loads(capsys.readouterr().out)
    assert set(shown) == {"layers", "passed", "failed", "cases"}
    assert all(set(case) == {"name", "ok", "got"} for case in shown["cases"])
    assert shown["passed"] + shown["failed"] == len(shown["cases"])
    return code, shown


def corpus(folder: Path, *cases: tuple[str, str, str]) -> str:
    rows = [{"name": name, "category": "test", "code": code, "expect": expect} for name, code, expect in cases]
    path = folder / "corpus.json"
    path.write_text(json.dumps({"about": "test", "cases": rows}), encoding="utf-8")
    return str(path)


def test_packaged_cases_are_contained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cases = load_cases(PACKAGED)
    names = [case.name for case in cases]
    assert len(names) == len(set(names)) >= 100
    code, shown = self_test(capsys, "--timeout-s", "0.5")
    slow = [case for case in cases if "TimeoutError" in failed_cases(shown).get(case.name, "")]
    if slow:  # on a busy machine; they are judged again with a generous limit
        again = corpus(tmp_path, *((case.name, case.code, case.expect) for case in slow))
        code, repeated = self_test(capsys, "--timeout-s", "20", "--corpus", again)
        assert code == 0, failed_cases(repeated)
    assert set(failed_cases(shown)) == {case.name for case in slow} and code == 0, failed_cases(shown)
    assert [case["name"] for case in shown["cases"]] == names  # type: ignore[attr-defined]
    required = ("clean_exec", "no_new_privs", "rlimits", "pdeathsig", "seccomp", "files")
    assert all(shown["layers"][name].startswith("active") for name in required)  # type: ignore[index]


def test_the_self_test_fails_cases_that_are_not_contained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Cases whose expectation is wrong, so that a judge that always agrees is seen."""
    canary = tmp_path / "canary"
    canary.write_text("x")
    tmp_path.chmod(0o755)
    wrong = corpus(
        tmp_path,
        ("fast", "result = image", "timeout"),
        ("slow", "while True: pass", "ok_image"),
        ("right", "result = 1", "ok_image"),
        ("no_error", "result = image", "error:PermissionError"),
        ("other_error", "1 / 0", "error:PermissionError"),
        ("random", "import time\nresult = Image.new('L', (9, 9), time.time_ns() // 9**6 % 256)", "ok_image:same twice"),
        ("secret", "raise ValueError('s3' + 'cr3t')", "error;no_leak"),
        ("unknown", "result = image", "ok_images"),
        ("fine", "result = image.rotate(3)", "ok_image"),
    )  # fmt: skip
    code, shown = self_test(capsys, "--corpus", wrong)
    verdicts = {case["name"]: case["ok"] for case in shown["cases"]}  # type: ignore[attr-defined]
    assert code == 1 and verdicts.pop("fine") is True and not any(verdicts.values()), verdicts


def test_a_side_effect_is_detected(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "made"
    seen = corpus(tmp_path, ("writes", "result = image", f"no_side_effect:{path}"))
    original = Sandbox.run_sync
    with pytest.MonkeyPatch.context() as patch:

        def run_and_write(self: Sandbox, *args: object, **kwargs: object) -> object:
            path.write_text("x")
            return original(self, *args, **kwargs)  # type: ignore[arg-type]

        patch.setattr(Sandbox, "run_sync", run_and_write)
        code, shown = self_test(capsys, "--corpus", seen)
    assert code == 1 and "exists" in shown["cases"][0]["got"]  # type: ignore[index]


@pytest.mark.parametrize("text", ["", "[]", '{"cases": [{"name": "x"}]}', '{"cases": 3}'])
def test_an_invalid_corpus_file_is_an_error(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"bad\.json"):
        load_cases(path)
    assert main(["--self-test", "--corpus", str(path)]) == 2 and "bad.json" in capsys.readouterr().err


def _python_for_everybody() -> str | None:
    """An interpreter that an unprivileged user can reach."""
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        run = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", python, "-c", REACHABLE]
        if os.path.exists(python) and subprocess.run(run, capture_output=True, check=False).returncode == 0:
            return python
    return None


def run_as_nobody(*arguments: str) -> dict[str, object]:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("changing the user needs root and setpriv")
    python = _python_for_everybody()
    if python is None:
        pytest.skip("no interpreter that an unprivileged user can reach")
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join([*packages, str(ROOT)]), "HOME": "/nonexistent"}
    who = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    command = [*who, python, "-m", "cv_lightning", "sandbox", "--self-test", "--json", "-", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode in (0, 1), done.stderr
    return {**json.loads(done.stdout), "code": done.returncode}


QUICK = "file_read socket_udp fork execve kill_parent ptrace_parent io_uring_setup prlimit_raise fd_all_closed benign"


def test_an_unprivileged_user_contains_the_same(tmp_path: Path) -> None:
    rows = [case for case in load_cases(PACKAGED) if case.name in QUICK.split()]
    for folder in (tmp_path, *tmp_path.parents):
        if os.stat(folder).st_uid == os.geteuid() and folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o755)
    shown = run_as_nobody("--corpus", corpus(tmp_path, *((case.name, case.code, case.expect) for case in rows)))
    assert shown["code"] == 0 and shown["failed"] == 0 and shown["passed"] == len(QUICK.split()), shown
    assert "not root" in shown["layers"]["uid"]  # type: ignore[index]


def test_redteam_cases_are_contained(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = self_test(capsys, "--timeout-s", "1.5", "--corpus", str(ROOT / "tests/redteam.json"))
    expected = [] if "active" in shown["layers"]["private_root"] else NEED_A_PRIVATE_ROOT  # type: ignore[index]
    assert sorted(failed_cases(shown)) == expected, failed_cases(shown)
    assert code == bool(expected) and shown["passed"] >= 146  # type: ignore[operator]


def failed_cases(shown: dict[str, object]) -> dict[str, str]:
    return {case["name"]: case["got"] for case in shown["cases"] if not case["ok"]}  # type: ignore[attr-defined]


def test_root_that_may_not_mount_is_contained_in_a_user_namespace(tmp_path: Path) -> None:
    """As in a container: root by number, without CAP_SYS_ADMIN, and the user cannot be changed."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("dropping a capability needs root and setpriv")
    rows = [case for case in load_cases(PACKAGED) if case.name in QUICK.split()]
    cases = corpus(tmp_path, *((case.name, case.code, case.expect) for case in rows))
    drop = ["setpriv", "--bounding-set=-sys_admin", sys.executable]
    command = [*drop, "-m", "cv_lightning", "sandbox", "--self-test", "--json", "-", "--corpus", cases]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    shown = json.loads(done.stdout)
    assert done.returncode == 0 and not failed_cases(shown), shown
    if shown["layers"]["private_root"].startswith("active"):
        assert "user and mount namespace" in shown["layers"]["private_root"]
        assert "no capabilities" in shown["layers"]["uid"]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["--text", ""])
@pytest.mark.parametrize("root", ["--no-private-root", ""])
@pytest.mark.parametrize("user", ["this", "nobody"])
@pytest.mark.parametrize("file", CORPORA, ids=lambda file: file.stem)
def test_redteam_and_every_other_corpus(
    user: str, root: str, text: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--corpus", str(file), *filter(None, [root, text])]
    shown = self_test(capsys, *arguments)[1] if user == "this" else run_as_nobody(*arguments)
    known = NEED_A_PRIVATE_ROOT if root and file.stem == "redteam" else []
    assert sorted(failed_cases(shown)) == known, failed_cases(shown)


def test_a_signal_that_reaches_the_victim_is_detected() -> None:
    with surroundings() as around:
        victim = Case(name="a", category="", code="kill(VICTIM_PID)", expect="any")
        first = int(around.victim.code_for(victim)[5:-1])
        assert around.victim.is_alive()
        os.kill(first, signal.SIGSTOP)
        time.sleep(0.05)
        assert not around.victim.is_alive()
        os.kill(first, signal.SIGKILL)
        time.sleep(0.05)
        second = int(around.victim.code_for(victim)[5:-1])
        assert around.victim.is_alive() and second != first
    assert not os.path.exists(f"/proc/{second}")
