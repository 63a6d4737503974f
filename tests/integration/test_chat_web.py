"""The playground's page in a real headless Chromium: upload, ask, watch, edit, save; a model's text stays text."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_samples import HOSTILE
from PIL import Image

from cv_lightning.trajectory import pixels_of, read_groups
from cv_lightning.types import CVLightningError

pytest.importorskip("nicegui", reason="no NiceGUI: pip install 'cv-lightning[web]'")
pytest.importorskip("websockets.sync.client", reason="no websockets: pip install websockets")
from report_browser import CHROMIUM, Browser

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def served(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of the page, and the store behind it."""
    store = tmp_path_factory.mktemp("chat")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(HERE / "chat_samples.py"), str(tiny_checkpoint), str(store), str(port)]
    settings = {**os.environ, "NICEGUI_SCREEN_TEST_PORT": str(port)}  # where NiceGUI takes its port from under pytest
    with subprocess.Popen(command, cwd=HERE, env=settings, stdout=subprocess.DEVNULL) as server:
        deadline = time.monotonic() + 120
        while not _answers(port):
            assert server.poll() is None and time.monotonic() < deadline, "the page is not served"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/", store
        server.terminate()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def upload(browser: Browser, path: Path) -> None:
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    field = browser.call("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=field, files=[str(path)])


def press(browser: Browser, text: str) -> None:
    button = f"[...document.querySelectorAll('button')].find((b) => b.textContent === '{text}' && !b.disabled)"
    browser.until(f"{button} !== undefined")
    browser.run(f"{button}.click()")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_upload_ask_watch_edit_and_save(served: tuple[str, Path], tmp_path: Path) -> None:
    address, store = served
    Image.new("RGB", (96, 64), "white").save(tmp_path / "bild ä.png")
    (tmp_path / "no.png").write_text("no image")
    with Browser(tmp_path / "profile") as browser:
        browser.open(address)
        browser.until("document.querySelector('input[type=file]') !== null")
        press(browser, "tall")
        browser.until("document.querySelector('textarea').value === 'How <b>tall</b>?'")
        browser.until("document.body.textContent.includes('40x80 pixels')")
        browser.run("document.querySelector('textarea').select()")
        upload(browser, tmp_path / "no.png")
        browser.until("document.body.textContent.includes('no.png: ')")
        upload(browser, tmp_path / "bild ä.png")
        browser.until("document.body.textContent.includes('96x64 pixels')")
        browser.run("document.querySelector('textarea').focus()")
        browser.call("Input.insertText", text="What is written?")
        press(browser, "Ask")
        browser.until("document.querySelectorAll('.result img').length === 1")  # while the model still thinks
        assert browser.run("document.querySelectorAll('.answer').length") == 0
        (store / "gate").touch()
        browser.until("document.querySelector('.answer') !== null")
        assert HOSTILE in browser.run("document.querySelector('.answer').textContent")
        assert "64x96 pixels (ran: rotate_90" in browser.run("document.body.textContent")

        browser.run("document.querySelector('.cm-content').focus()")
        browser.call("Input.insertText", text="image = image.crop((0, 0, 32, 48))\n")
        press(browser, "Run this code instead")
        browser.until("document.body.textContent.includes('48x32 pixels (ran: crop, rotate_90')")
        browser.until("document.querySelector('.answer') !== null")
        assert "(your code)" in browser.run("document.body.textContent")
        press(browser, "Save")
        browser.until("document.body.textContent.includes('saved in')")
        assert browser.run("document.title") == "cv_lightning playground"
        assert browser.run("document.querySelectorAll('img[src=x]').length") == 0
        assert browser.problems == []
        assert all(url.startswith((address, "about:", "blob:")) for url in browser.requests)
    [group] = read_groups(store)
    call = group.trajectories[0].turns[0].tool_call
    assert call is not None and call.code.startswith("image = image.crop")
    assert pixels_of(group.trajectories[0].images[0].original).size == (96, 64)


def test_a_port_in_use_is_an_error(served: tuple[str, Path]) -> None:
    from cv_lightning.viewer.playground.web import check_port

    with pytest.raises(CVLightningError, match="--port"):
        check_port(int(served[0].rstrip("/").rpartition(":")[2]))
