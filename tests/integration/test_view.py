"""`view` serves a run under way: new groups appear, and nothing but the run can be read."""

from __future__ import annotations

import http.client
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))
from trajectory_samples import KINDS, Policy, digit_task, group

from cv_lightning.commands.view_run import main as view_main
from cv_lightning.trajectory import TrajectoryWriter
from cv_lightning.viewer.live import LiveReport, ReportServer, open_server
from cv_lightning.viewer.report import ReportConfig

CONFIG = ReportConfig(max_image_mb=0.0)


def add(run: Path, start: int, count: int) -> None:
    with TrajectoryWriter(run / "rl") as writer:
        for index in range(start, start + count):
            item = group(digit_task(index, KINDS[index % 4]), 4, Policy(turn=1, crop=1), iteration=index)
            writer.write_group(item, index)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ReportServer]:
    run = tmp_path / "ein Lauf, größer"
    run.mkdir()
    with ReportServer(LiveReport(run, CONFIG), 0) as started:
        threading.Thread(target=started.serve_forever, daemon=True).start()
        yield started
        started.shutdown()


def get(server: ReportServer, path: str, host: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", path, headers={"Host": host} if host else {})
    reply = connection.getresponse()
    return reply.status, reply.read()


def test_an_empty_folder_waits_and_a_run_is_read_when_it_grows(server: ReportServer) -> None:
    run = server.report.folder
    assert b"Waiting for the run" in get(server, "/")[1]
    add(run, 0, 2)
    status, page = get(server, "/")
    assert (status, b'id="cards"' in page) == (200, True)
    data = json.loads(get(server, "/data.json")[1])
    assert len(data["trajectories"]) == 8
    assert get(server, f"/data.json?have={data['state']}") == (204, b"")
    add(run, 2, 1)
    server.report._rest_until = 0.0
    assert len(json.loads(get(server, f"/data.json?have={data['state']}")[1])["trajectories"]) == 12


def test_only_images_of_the_run_can_be_read(server: ReportServer) -> None:
    run = server.report.folder
    add(run, 1, 1)
    (run.parent / "images").mkdir()
    name = next((run / "rl" / "images").iterdir()).name
    shutil.copy(run / "rl" / "images" / name, run.parent / "images" / name)
    (run / "secret.txt").write_text("secret")
    assert get(server, f"/rl/images/{name}")[1] == (run / "rl" / "images" / name).read_bytes()
    assert get(server, f"/rl/images/{name}?size=7x9")[1][16:24] == bytes([0, 0, 0, 7, 0, 0, 0, 9])
    for path in (
        "/secret.txt",
        f"/../images/{name}",
        f"/rl/../../images/{name}",
        f"/%2e%2e/images/{name}",
        "/rl/images/..%2f..%2fsecret.txt",
        "/rl/trajectories/groups.rank0.jsonl",
        "/rl/images/" + "0" * 32 + ".png",
        f"//{quote(str(run))}/rl/images/{name}",
    ):
        assert get(server, path) == (404, b"not here"), path
    assert get(server, "/", host="evil.example:80")[0] == 403
    assert server.server_address[0] == "127.0.0.1"


def test_a_taken_port_gives_the_next_one(server: ReportServer, tmp_path: Path) -> None:
    with open_server(server.report, server.server_port) as other:
        assert server.server_port < other.server_port <= server.server_port + 20


def test_a_bad_folder_or_port_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([str(tmp_path / "nothing")], [str(tmp_path), "--port", "70000"]):
        assert view_main(arguments) == 2
    error = capsys.readouterr().err
    assert "nothing: no such folder" in error
    assert "--port 70000: must be between" in error


def test_new_groups_appear_in_a_page_that_is_open(server: ReportServer, tmp_path: Path) -> None:
    pytest.importorskip("websockets.sync.client", reason="no websockets: pip install websockets")
    from report_browser import CHROMIUM, Browser

    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    run = server.report.folder
    add(run, 0, 2)
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{server.server_port}/#outcome=right")
        right = browser.run("document.querySelectorAll('.tile').length")
        browser.run("document.getElementById('cards').scrollIntoView()")
        browser.until("[...document.querySelectorAll('.tile img')].some((i) => i.naturalWidth > 0)")
        browser.run("document.querySelector('.tile').focus()")
        first = browser.run("document.activeElement.textContent")
        add(run, 2, 3)
        server.report._rest_until = 0.0
        browser.until("document.getElementById('total-count').textContent === '20'")
        assert browser.run("document.querySelectorAll('.tile').length") > right
        assert browser.run("[...document.querySelectorAll('.tile')].every((t) => t.textContent.includes('right'))")
        assert browser.run("document.activeElement.textContent") == first
        small = "all.find((i) => i.task.kind === 'small' && i.trajectory.images.length > 1).index"
        browser.run(f"openViewer({small})")
        browser.until("document.querySelectorAll('#viewer .seen img').length > 0")
        browser.until("[...document.querySelectorAll('#viewer img')].every((i) => i.complete && i.naturalWidth > 0)")
        assert browser.problems == []
