"""The light dispatcher: what it answers, how fast, and what it leaves unimported."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cv_lightning.__main__ import VERBS, main
from cv_lightning.environment import prepare_environment, remove_stale_locks

HEAVY = ("torch", "lightning", "transformers", "vllm", "deepspeed")
LIMIT_S = 1.5
PROBE = """
import json, sys
from cv_lightning.__main__ import main
code = None
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print("MODULES" + json.dumps([code, sorted(set(sys.modules))]))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["fitt"], ["doctor", "--help"]], ids=" ".join)
def test_help_and_errors_import_no_heavy_package(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True)
    code, modules = json.loads(done.stdout.rpartition("MODULES")[2])
    assert code == (2 if arguments == ["fitt"] else 0)
    assert "cv_lightning.__main__" in modules
    assert not set(HEAVY) & set(modules)


@pytest.mark.parametrize("arguments", [["--help"], ["fitt"], ["doctor", "--help"]], ids=" ".join)
def test_help_and_errors_are_fast(arguments: list[str]) -> None:
    def cpu_seconds() -> float:  # not those of the clock: other processes share these cores
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "cv_lightning", *arguments], capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(3)) < LIMIT_S


def test_unknown_verb_suggests_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docter"]) == 2
    assert "did you mean 'doctor'?" in capsys.readouterr().err


def test_unknown_verb_without_a_close_match_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zzz"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in VERBS)


def test_missing_verb_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "doctor" in capsys.readouterr().out


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == list(VERBS)


def test_environment_keeps_what_the_user_set() -> None:
    code = (
        "import os, sys; from cv_lightning.environment import prepare_environment; prepare_environment();"
        "print(os.environ['VLLM_LOGGING_LEVEL'], os.environ['TOKENIZERS_PARALLELISM'],"
        "os.environ['VLLM_ENABLE_V1_MULTIPROCESSING'], os.environ['TORCH_EXTENSIONS_DIR'])"
    )
    given = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "TOKENIZERS_"))}
    given |= {"VLLM_LOGGING_LEVEL": "INFO", "TORCH_EXTENSIONS_DIR": "/tmp/elsewhere"}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["INFO", "false", "0", "/tmp/elsewhere"]


def test_environment_puts_its_programs_first_without_activation() -> None:
    code = (
        "import os; from cv_lightning.environment import prepare_environment as p; p(); p(); print(os.environ['PATH'])"
    )
    given = {**os.environ, "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
    assert done.stdout.strip().split(":") == [str(Path(sys.prefix, "bin")), "/usr/bin"]


def old_lock(folder: Path, age_s: float = 60.0) -> Path:
    lock = folder / "some_op" / "lock"
    lock.parent.mkdir(exist_ok=True)
    lock.touch()
    then = time.time() - age_s
    os.utime(lock, (then, then))
    return lock


def test_stale_build_lock_is_removed(tmp_path: Path) -> None:
    lock = old_lock(tmp_path)
    assert remove_stale_locks(tmp_path) == [lock]
    assert not lock.exists()


def test_lock_of_a_running_build_is_kept(tmp_path: Path) -> None:
    lock = old_lock(tmp_path)
    holder = f"import os, sys; os.open({str(lock)!r}, os.O_RDONLY); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert remove_stale_locks(tmp_path) == []
        assert lock.exists()
        process.communicate("")
    assert remove_stale_locks(tmp_path) == [lock]


def test_recent_lock_is_kept(tmp_path: Path) -> None:
    old_lock(tmp_path, age_s=0.0)
    assert remove_stale_locks(tmp_path) == []


def test_prepare_environment_is_idempotent() -> None:
    before = dict(os.environ)
    try:
        prepare_environment()
        once = dict(os.environ)
        prepare_environment()
        assert dict(os.environ) == once
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_lightning_reads_one_command_line() -> None:
    arguments = [sys.executable, "-m", "cv_lightning", "fit", "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "--trainer.max_epochs" in done.stdout
    assert "args parameter" not in done.stderr
