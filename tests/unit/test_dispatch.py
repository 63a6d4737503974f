"""The light dispatcher: what it answers, how fast, and what it leaves unimported."""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import pytest

from cv_lightning import command_line
from cv_lightning.__main__ import main
from cv_lightning.command_help import flags_of, help_text, is_switch, values
from cv_lightning.command_line import spelled_out
from cv_lightning.environment import prepare_environment, remove_stale_locks
from cv_lightning.verbs import HINTS, VERBS, Verb, commands

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


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["fitt"], ["chat", "--help"], ["plan", "--help"]], ids=" ".join
)
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


# ------------------------------------------------------------------------------------------------ verbs
COMMANDS = dict(commands())
OWN = [name for name, verb in COMMANDS.items() if not verb.lightning]
"""Commands whose parser is built here; fit, validate and test are LightningCLI's."""


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code and output of a command line."""
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as ended:
        code = int(ended.code or 0)
    found = capsys.readouterr()
    return code, found.out, found.err


@pytest.fixture(scope="module")
def parsers() -> dict[str, Any]:
    """The parser of each command, as its main function builds it."""
    found: dict[str, Any] = {}
    build = command_line.verb_parser

    class Built(BaseException):
        pass

    def catch(component: Any, name: str, takes_config: bool = True) -> NoReturn:
        found[name] = build(component, name, takes_config)
        raise Built

    for name in OWN:
        importlib.import_module(COMMANDS[name].target.partition(":")[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "verb_parser", catch)
        patch.setattr("cv_lightning.commands.plan.verb_parser", catch)
        for name in OWN:
            with pytest.raises(Built):
                COMMANDS[name].load()([])
    return found


def test_unknown_verb_suggests_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(["docter"], capsys)
    assert code == 2 and "did you mean 'doctor'?" in err and len(err.splitlines()) <= 3


def test_unknown_verb_without_a_close_match_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(["zzz"], capsys)
    assert code == 2 and all(name in err for name in VERBS)


@pytest.mark.parametrize("group", [name for name, verb in VERBS.items() if verb.verbs])
def test_missing_and_unknown_sub_verbs_name_those_there_are(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said([group], capsys)
    assert code == 2 and all(f"{group} {name}" in out or f"  {name} " in out for name in VERBS[group].verbs)
    code, _, err = said([group, "zzz"], capsys)
    assert code == 2 and all(name in err for name in VERBS[group].verbs)


def test_words_that_people_try_first_say_what_to_use(capsys: pytest.CaptureFixture[str]) -> None:
    for word, hint in HINTS.items():
        code, _, err = said([word], capsys)
        assert code == 2 and hint in err and len(err.splitlines()) <= 3, word
        for named in re.findall(r"`cv-lightning (\w[\w-]*(?: [a-z][\w-]*)?)", hint):
            assert named in COMMANDS or named.split()[0] in COMMANDS, f"{word}: {named}"
    assert not set(HINTS) & set(VERBS)


@pytest.mark.parametrize(("typed", "verb"), [("train", "fit"), ("eval", "test"), ("evaluate", "test")])
def test_other_names_run_the_verb(typed: str, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(Verb, "load", lambda self: asked.append)
    monkeypatch.setattr("cv_lightning.commands.settings.check_command", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["cv-lightning", typed, "--config", "x.yaml", "--quiet"])
    monkeypatch.setenv("CVL_VERBOSITY", "")
    assert main([typed, "--ckpt_path", "last"]) == 0
    assert asked == [[verb, "--ckpt_path", "last"]]
    assert main(sys.argv[1:]) == 0
    assert sys.argv[1:] == [verb, "--config", "x.yaml"], "ranks that Lightning starts read it, too"


def test_missing_verb_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said([], capsys)
    assert code == 2 and "doctor" in out


def test_help_lists_every_command_by_job_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(["--help"], capsys)
    assert code == 0 and len(out.splitlines()) <= 40
    listed = [re.split(r"  +|, ", line.strip())[0] for line in out.splitlines() if line.startswith("  ")]
    hidden = {name for name, verb in VERBS.items() if not verb.job}
    assert listed == [name for name in COMMANDS if name not in hidden] and hidden == {"quickstart-summary"}


# ------------------------------------------------------------------------------------------------ help and flags
@pytest.mark.parametrize("name", OWN)
def test_help_of_a_verb_is_short_and_explains_every_flag(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, parsers: dict[str, Any]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, short, _ = said([*name.split(), "--help"], capsys)
    assert code == 0 and short.startswith(f"usage: cv-lightning {name}") and len(short.splitlines()) <= 60
    whole = help_text(parsers[name], everything=True)
    assert whole.startswith(f"usage: cv-lightning {name}")
    flags = list(flags_of(parsers[name]))
    assert [flag.name for flag in flags if not flag.text] == [], "flags without a help text"
    positional = COMMANDS[name].positional
    assert set(positional) | set(COMMANDS[name].shown) <= {flag.name for flag in flags}
    for flag in flags:
        word = positional.get(flag.name, f"--{flag.name}")
        assert word in whole and ("." in flag.name or word in short or f"{word}.*" in short), flag.name


def test_help_all_is_asked_for_in_both_spellings(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help-all", "--help_all"):
        code, whole, _ = said(["judge", flag], capsys)
        assert code == 0 and "--judge.max_tokens N" in whole


@pytest.mark.parametrize("name", OWN)
def test_flags_have_two_spellings_and_switches_no_value(name: str, parsers: dict[str, Any]) -> None:
    parser, verb = parsers[name], COMMANDS[name]
    for flag in (f"--{found.name}" for found in flags_of(parser)):
        assert "-" not in flag[2:], "documented with underscores"
        switch = is_switch(parser._option_string_actions.get(flag))
        words = [flag] if switch else [flag, "x"]
        meant = spelled_out(words, parser, verb)
        assert meant == spelled_out(["--" + flag[2:].replace("_", "-"), *words[1:]], parser, verb)
        if switch:
            assert meant == [f"{flag}=true"] == spelled_out([f"{flag}=True"], parser, verb)
            no = [] if flag.startswith("--no_") else [spelled_out([f"--no-{flag[2:]}"], parser, verb)]
            assert all(found == [f"{flag}=false"] for found in [spelled_out([flag, "false"], parser, verb), *no])


def test_json_takes_a_file_in_every_verb_that_has_it(parsers: dict[str, Any]) -> None:
    found = {name: parser._option_string_actions.get("--json") for name, parser in parsers.items()}
    having = {name: values(action) for name, action in found.items() if action is not None}
    assert set(having.values()) == {"FILE"} and {"doctor", "judge", "plan", "sandbox", "data check"} <= set(having)


def test_fit_takes_dashes_and_a_switch_without_value() -> None:
    class Fit(command_line.ShortErrors, jsonargparse.ArgumentParser):
        pass

    parser = Fit()
    parser.add_argument("--take_over", type=bool, default=False)
    parser.add_argument("--ckpt_path", type=str)
    parser.add_argument("--task_types", type=dict[str, str])
    found = parser.parse_args(["--take-over", "--ckpt-path", "last", "--task_types.my-source", "ocr"])
    assert (found.take_over, found.ckpt_path, found.task_types) == (True, "last", {"my-source": "ocr"})
    assert parser.parse_args(["--take_over", "false"]).take_over is False


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("report", "RUN is missing"),
        ("report --rum x", "there is no flag --rum; did you mean --run?"),
        ("report a b", "unexpected 'b': cv-lightning report takes RUN"),
        ("report nowhere", "nowhere"),
        ("view nowhere", "nowhere: no such folder"),
        ("compare a", "B is missing"),
        ("compare nowhere nowhere2", "nowhere"),
        ("export", "RUN and --out are missing"),
        ("export nowhere --out x", "nowhere"),
        ("export RUN --out", "--out needs a value: FOLDER"),
        ("doctor --jsn -", "did you mean --json?"),
        ("doctor --json", "--json needs a value: FILE"),
        ("doctor --timeout_s soon", "--timeout_s soon: a number is wanted"),
        ("doctor --timeout_s -3", "--timeout_s -3: must be above 0"),
        ("chat nowhere/at/all x.png", "MODEL nowhere/at/all: no such folder"),
        ("chat --ckpt nowhere", "--ckpt nowhere: no such file"),
        ("sandbox --run nowhere.py a.png", "nowhere.py: no such file"),
        ("doctor now", "unexpected 'now': cv-lightning doctor takes flags only"),
        ("quickstart --ranks 3", "--ranks 3: one of 1, 2, 4, 8 is wanted"),
        ("quickstart --seed x", "--seed x: a whole number is wanted"),
        ("quickstart --smok", "did you mean --smoke?"),
        ("judge", "--check"),
        ("judge --check maybe", "unexpected 'maybe'"),
        ("chat", "MODEL"),
        ("chat --web true", "MODEL"),
        ("chat m i --max-pixels few", "--max_pixels few: a whole number is wanted"),
        ("plan --strikt", "did you mean --strict?"),
        ("plan --config x --gpu h1000", "--gpu h1000: one of"),
        ("plan", "--config"),
        ("data check", "FILES is missing"),
        ("data check nowhere.parquet", "no such file: nowhere.parquet"),
        ("data show x.json", "--processor is missing"),
        ("data build-sft t.csv", "--out is missing"),
        ("data corrupt --sute x", "did you mean --suite?"),
        ("data export", "OUT is missing"),
        ("sweep nowhere.yaml", "nowhere.yaml: no such file"),
        ("rescore STORE", "--out is missing"),
        ("sandbox", "--self_test"),
        ("sandbox --run a.py", "--run CODE.py IMAGE"),
        ("tiny", "FOLDER is missing"),
        ("trajectories export nowhere", "nowhere"),
        ("config migrate nowhere.yaml", "nowhere.yaml"),
        ("ablations --arms fool", "--arms fool: not one of"),
        ("ablations --seeds 0 x", "--seeds"),
        ("doctor --config nowhere.yaml", "no such file"),
    ],
)
def test_a_mistake_is_one_short_error(
    line: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = said(line.split(), capsys)
    assert code == 2 and out == "" and message in err, err
    assert len(err.strip().splitlines()) <= 3 and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


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
    arguments = [sys.executable, "-m", "cv_lightning", "fit", "--help-all"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "--trainer.max_epochs" in done.stdout
    assert "args parameter" not in done.stderr
