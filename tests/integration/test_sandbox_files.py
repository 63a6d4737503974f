"""What a snippet can read: library folders, never a project, in every layout of interpreter and project."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECRET = "the answer is 42"
PROBE = """
import json, sys
from PIL import Image
from cv_lightning.sandbox import Sandbox, SandboxConfig
project, private_root = sys.argv[1], sys.argv[2] == "private"
reads = [f"open({project + '/' + name!r}).read()" for name in (".env", "data/train.jsonl", "package/code.py")]
reads += [f"np.fromfile({project + '/.env'!r}, np.uint8)", f"__import__('os').listdir({project!r})"]
reads += [f"__import__('os').listdir({project + '/data'!r})", f"Image.open({project + '/image.png'!r}).load()"]
code = "got = []\\nfor read in %r:\\n    try: got.append(repr(eval(read)))\\n    except OSError: pass\\n" % reads
benign = "import sqlite3, unicodedata, wave\\nImageFont.load_default(20)\\nresult = image.rotate(90)"
with Sandbox(SandboxConfig(plan_tier=False, private_root=private_root)) as sandbox:
    image = Image.new("RGB", (64, 64))
    leaked = sandbox.run_sync(image, code + "raise RuntimeError('LEAK' + str(got) if got else 'closed')")
    works = sandbox.run_sync(image, benign)
    print(json.dumps({"leaked": leaked.error, "works": works.error, "layers": sandbox.layers}))
"""


def copy_of_the_interpreter(prefix: Path) -> Path:
    """An interpreter with this prefix: its program copied, its library linked to."""
    (prefix / "bin").mkdir(parents=True)
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    python = prefix / "bin" / name
    shutil.copy2(os.path.realpath(sys.executable), python)
    (prefix / "lib").mkdir()
    for library in Path(sys.base_prefix, "lib").glob("*"):
        if library.name == name or ".so" in library.name:
            (prefix / "lib" / library.name).symlink_to(library)
    return python


@pytest.mark.parametrize(
    ("prefix", "project", "files"),
    [
        ("opt/py", "opt/py-project", "landlock"),
        ("usr", "usr/src/app", "landlock"),
        ("opt/conda", "opt/conda/lib/app", "private"),
    ],
)
def test_redteam_project_files_are_closed_in_every_layout(
    prefix: str, project: str, files: str, tmp_path: Path
) -> None:
    python, home = copy_of_the_interpreter(tmp_path / prefix), tmp_path / project
    for name in (".env", "data/train.jsonl", "package/code.py", "image.png"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(SECRET)
    shutil.copytree(ROOT / "cv_lightning", home / "cv_lightning", ignore=shutil.ignore_patterns("__pycache__"))
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join([str(home), *packages])}
    done = subprocess.run(
        [str(python), "-c", PROBE, str(home), files],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert "closed" in shown["leaked"] and SECRET not in done.stdout, shown
    assert not shown["works"], shown
