"""The Hugging Face Hub over real HTTP: `hf://` files and uploads, against a local server that stands for it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

from cv_lightning import hub
from cv_lightning.commands import export as command
from cv_lightning.data.rows import expand_files
from cv_lightning.types import CVLightningError, DataError

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
FILES = {
    name: {"data/one.parquet": b"1" + name.encode(), "data/two.parquet": b"2", "README.md": b"#"} for name in COMMITS
}


class Hub(BaseHTTPRequestHandler):
    """The parts of the Hub's API that are used; `log` lists the requests."""

    log: ClassVar[list[str]] = []
    uploaded: ClassVar[dict[str, bytes]] = {}
    private: ClassVar[bool | None] = None

    def log_message(self, *args: Any) -> None: ...

    def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def _refuse(self, code: str, status: int) -> None:
        self._json({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.log.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            good = self.headers["Authorization"] == "Bearer hf_good"
            self._json({"name": "me"}) if good else self._refuse("InvalidToken", 401)
        elif path.startswith("/api/datasets/"):
            owner, name, *rest = path.removeprefix("/api/datasets/").split("/")
            self._info(f"{owner}/{name}", rest[1] if rest else "main")
        elif path.startswith("/datasets/"):
            owner, name, _, revision, *file = path.removeprefix("/datasets/").split("/")
            self._file(f"{owner}/{name}", revision, "/".join(file))
        else:
            self._refuse("Unknown", 404)

    do_HEAD = do_GET

    def _info(self, repo: str, revision: str) -> None:
        branch = next((name for name, commit in COMMITS.items() if revision in (name, commit)), None)
        if repo not in ("me/digits", "me/gated"):
            self._refuse("RepoNotFound", 404)
        elif branch is None:
            self._refuse("RevisionNotFound", 404)
        else:
            files = [{"rfilename": name} for name in FILES[branch]]
            self._json({"id": repo, "sha": COMMITS[branch], "siblings": files})

    def _file(self, repo: str, commit: str, name: str) -> None:
        if repo == "me/gated":
            return self._refuse("GatedRepo", 403)
        branch = next(branch for branch, known in COMMITS.items() if commit == known)
        body = FILES[branch][name]
        self._send(body, X_Repo_Commit=commit, ETag=f'"{commit[:8]}-{name}"')

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.log.append(f"POST {self.path}")
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            if wanted.get("organization") == "others":
                return self._refuse("Forbidden", 403)
            type(self).private = wanted.get("private", wanted.get("visibility") == "private")
            self._json({"url": f"{constants.ENDPOINT}/me/model"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._json(
                {
                    "commitUrl": f"{constants.ENDPOINT}/me/model/commit/{'1' * 40}",
                    "commitOid": "1" * 40,
                    "success": True,
                }
            )
        else:
            self._json({"errors": [], "warnings": []})


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.log, Hub.uploaded, Hub.private = [], {}, None
    found = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{found.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)  # HF_ENDPOINT, which is read at the import
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    yield Hub
    found.shutdown()
    found.server_close()


# ------------------------------------------------------------------ data sets
def test_files_and_globs_are_read_from_one_commit(server: type[Hub]) -> None:
    one, two, old = expand_files(
        ["hf://datasets/me/digits/data/*.parquet", Path("hf://datasets/me/digits@v1/data/one.parquet")], "--files"
    )
    assert (one.name, two.name) == ("one.parquet", "two.parquet")
    assert (one.read_bytes(), old.read_bytes()) == (b"1main", b"1v1")
    pinned = f"hf://datasets/me/digits@{COMMITS['v1']}/data/one.parquet"
    server.log.clear()
    assert expand_files([pinned], "--files") == [old] and not server.log, "from the cache, without a request"


def test_a_resumed_run_reads_the_commits_of_its_first_start(
    server: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"train_files": ["mine.parquet", "hf://datasets/me/digits/data/*.parquet"], "eval_files": None}
    first, again, fresh = dict(given), dict(given), dict(given)
    hub.pin_files(first, tmp_path / "run", resumes=False)
    files = [f"hf://datasets/me/digits@{COMMITS['main']}/data/{name}.parquet" for name in ("one", "two")]
    assert first == given | {"train_files": ["mine.parquet", *files]}
    monkeypatch.setitem(COMMITS, "main", "c" * 40)
    hub.pin_files(again, tmp_path / "run", resumes=True)
    assert again == first
    hub.pin_files(fresh, tmp_path / "run", resumes=False)
    assert "c" * 40 in fresh["train_files"][1]
    local = {"train_files": ["mine.parquet"]}
    hub.pin_files(local, tmp_path / "other", resumes=False)
    assert local == {"train_files": ["mine.parquet"]} and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("hf://datasets/me/digits/data/onne.parquet", "no such file in the data set; it has data/one.parquet"),
        ("hf://datasets/me/digits/*.csv", "no such file in the data set; it has "),
        ("hf://datasets/me/digitz/data/one.parquet", "the Hub has no data set me/digitz"),
        ("hf://datasets/me/digits@v9/data/one.parquet", "no revision v9"),
        ("hf://datasets/me/gated/data/one.parquet", "is gated; ask for access"),
        ("hf://datasets/digits.parquet", "is not hf://datasets/OWNER/NAME"),
        ("hf://me/model/weights.bin", "is not hf://datasets/OWNER/NAME"),
    ],
)
def test_what_is_not_there_is_one_error_after_few_requests(server: type[Hub], path: str, said: str) -> None:
    with pytest.raises(DataError, match=f"^--data.init_args.train_files: hf://.*{said}") as error:
        expand_files([path], "--data.init_args.train_files")
    assert len(str(error.value).splitlines()) == 1 and len(server.log) <= 2, server.log


def test_without_network_or_in_offline_mode_the_error_says_so(
    server: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9 cannot be read .*and the file is not in the cache"):
        expand_files(["hf://datasets/me/digits/data/one.parquet"], "--files")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        expand_files([f"hf://datasets/me/digits@{'d' * 40}/data/one.parquet"], "--files")


# ------------------------------------------------------------------ uploads
def test_a_model_folder_is_uploaded_with_its_card(server: type[Hub], tmp_path: Path) -> None:
    for name in ("README.md", "config.json"):
        (tmp_path / name).write_text(name)
    hub.check_upload("me/model")
    hub.upload_folder(tmp_path, "me/model", private=True)
    assert server.uploaded["README.md"] == b"README.md" and "config.json" in server.uploaded and server.private


def test_an_upload_that_cannot_work_is_refused_before_the_export(
    server: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CVLightningError, match="the name is OWNER/NAME"):
        hub.check_upload("model")
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    with pytest.raises(CVLightningError, match=r"refuses the token.*\(nothing was written\)"):
        hub.check_upload("me/model")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(CVLightningError, match="no token; set HF_TOKEN"):
        hub.check_upload("me/model")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CVLightningError, match=r"may not write to others.*hf upload others/model"):
        hub.upload_folder(tmp_path, "others/model")
    assert (tmp_path / "config.json").is_file()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CVLightningError, match=r"http://127\.0\.0\.1:9 does not answer"):
        hub.check_upload("me/model")


def test_export_checks_the_upload_first_and_uploads_last(
    server: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def export(request: command.ExportRequest) -> str:
        request.out.mkdir()
        (request.out / "README.md").write_text("the card")
        return "written"

    monkeypatch.setattr(command, "export", export)
    flags = ["--ckpt", str(tmp_path), "--out", str(tmp_path / "model"), "--push_to_hub", "me/model"]
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    assert command.main(flags) == 2 and not (tmp_path / "model").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert command.main([*flags, "--private"]) == 0
    assert server.uploaded["README.md"] == b"the card" and server.private
    assert "/me/model" in capsys.readouterr().out.splitlines()[-1]
    assert command.main([*flags[:4], "--private", "--overwrite"]) == 2, "private belongs to an upload"


def test_fit_stores_the_commit_in_its_config(server: type[Hub], tmp_path: Path) -> None:
    from cv_lightning.cli import ConfigOnly, CVLightningCLI, main

    class UpToTheModel(ConfigOnly):
        before_instantiate_classes = CVLightningCLI.before_instantiate_classes

    files = '["hf://datasets/me/digits/data/*.parquet"]'
    flags = ["--trainer.default_root_dir", str(tmp_path), "--data.init_args.train_files", files]
    flags += ["--data.class_path", "cv_lightning.data.modules.TaskDataModule"]
    resolved = main(["fit", "--config", "configs/quickstart/grpo.yaml", *flags], UpToTheModel).as_dict()
    names = [f"hf://datasets/me/digits@{COMMITS['main']}/data/{name}.parquet" for name in ("one", "two")]
    assert resolved["data"]["init_args"]["train_files"] == names
    assert json.loads((tmp_path / hub.RECORD).read_text()) == {"hf://datasets/me/digits/data/*.parquet": names}
