"""doctor: rows for what works, what is absent and what breaks; the exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cv_lightning.commands import doctor
from cv_lightning.commands.doctor import (
    Check,
    Probe,
    can_train,
    check_judge,
    check_op,
    check_versions,
    conclusion,
    describe_layers,
    import_probe,
)


def test_working_import_shows_its_version() -> None:
    probe = Probe("json", "import json; print('noise'); found = json.__name__ + ' 1.0'", "pip install json")
    check = import_probe(probe, timeout_s=30)
    assert (check.status, check.detail, check.fix) == ("ok", "json 1.0", "")


def test_absent_package_shows_the_command_that_installs_it() -> None:
    probe = Probe("no_such_package", "import no_such_package; found = ''", "pip install it", required=True)
    check = import_probe(probe, timeout_s=30)
    assert (check.status, check.fix, check.required) == ("absent", "pip install it", True)
    assert "no_such_package" in check.detail


def test_broken_package_shows_its_error() -> None:
    probe = Probe("broken", "raise RuntimeError('operator torchvision::nms does not exist')", "repair it")
    check = import_probe(probe, timeout_s=30)
    assert check.status == "failed"
    assert "nms does not exist" in check.detail


def test_crashing_import_is_a_failed_row() -> None:
    check = import_probe(Probe("crash", "import os; os.abort()", "repair it"), timeout_s=30)
    assert check.status == "failed"
    assert check.detail


def test_hanging_import_is_told_from_a_broken_one() -> None:
    check = import_probe(Probe("hang", "import time; time.sleep(60)", "repair it", required=True), timeout_s=1)
    assert check.status == "no answer" and "1 s" in check.detail
    assert "--timeout_s 3" in check.fix and "repair" not in check.fix
    assert not can_train([check]) and conclusion([check]).startswith("not known yet")
    assert conclusion([check, check._replace(status="failed")]) == "training cannot work here yet"


def test_inactive_layers_are_named_with_what_they_mean() -> None:
    layers = {"seccomp": "active", "namespaces": "off", "landlock": "unavailable (kernel without Landlock)"}
    said = describe_layers(layers)
    assert said.startswith("1 of 3") and "does not offer landlock" in said and "namespaces: off by default" in said


def test_only_required_parts_decide_whether_training_works() -> None:
    fine = Check(name="torch", status="ok", detail="", required=True)
    extra = Check(name="vllm", status="failed", detail="")
    assert can_train([fine, extra])
    assert not can_train([fine._replace(status="absent"), extra])


def test_versions_of_an_uninstalled_package() -> None:
    check = check_versions("no-such-distribution")
    assert (check.status, check.fix) == ("absent", "bash scripts/install.sh --force")


def test_versions_that_violate_pins_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "made_up-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    needs = ("pytest>=999", "pip", "no-such-distribution==1", "torch<0; extra == 'gpu'")
    metadata.write_text(
        "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n" + "".join(f"Requires-Dist: {n}\n" for n in needs)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    check = check_versions("made-up")
    assert check.status == "failed"
    assert "pytest>=999" in check.detail and "no-such-distribution==1 (here: none)" in check.detail
    assert "pip " not in check.detail and "torch" not in check.detail


def test_built_operator_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert check_op(on_gpu=False).status == "absent"
    built = tmp_path / "deepspeed_shm_comm" / "deepspeed_shm_comm.so"
    built.parent.mkdir()
    built.touch()
    assert check_op(on_gpu=False).status == "ok"


def test_judge_that_does_not_answer_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CVL_JUDGE_URL", raising=False)
    assert check_judge().status == "ok"
    monkeypatch.setenv("CVL_JUDGE_URL", "http://127.0.0.1:9/v1")  # the discard port, where nothing listens
    check = check_judge()
    assert (check.status, check.fix) == ("failed", "bash scripts/serve_judge.sh")


def test_json_output_and_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The real checks with two light imports: the sandbox starts, and a required part that is absent gives code 1."""
    monkeypatch.setattr(doctor, "prepare_environment", lambda: None)
    light = Probe("sys", "import sys; found = sys.version.split()[0]", "none", required=True)
    monkeypatch.setattr(doctor, "PROBES", (light,))
    assert doctor.main(["--json", "-"]) == 0
    said = json.loads(capsys.readouterr().out)
    rows = {check["name"]: check for check in said["checks"]}
    assert said["can_train"] and rows["sys"]["detail"] == sys.version.split()[0]
    assert rows["sandbox"]["status"] == "ok" and rows["memory"]["detail"]
    absent = Probe("absent", "import no_such_package; found = ''", "pip install it", required=True)
    monkeypatch.setattr(doctor, "PROBES", (light, absent))
    assert doctor.main([]) == 1
    assert "absent: pip install it" in capsys.readouterr().out
