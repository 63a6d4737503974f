"""The report in a real headless Chromium: it opens, filters, shows a trajectory, and nothing complains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))
from trajectory_samples import KINDS, Policy, digit_task, group

from cv_lightning.evaluation.report import ReportConfig, write_report
from cv_lightning.trajectory import TrajectoryWriter

client = pytest.importorskip("websockets.sync.client")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
HOSTILE = "</script><img src=x onerror=document.title='owned'><script>document.title='owned'</script>"


class Browser:
    """Just enough of the DevTools protocol."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 900) -> None:
        assert CHROMIUM is not None
        self.problems: list[str] = []
        self.process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--remote-debugging-port=0",
                f"--user-data-dir={profile}",
                f"--window-size={width},{height}",
                "about:blank",
            ],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(profile)},
        )
        port_file = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 30
        while not (port_file.is_file() and len(port_file.read_text().splitlines()) == 2):
            assert time.monotonic() < deadline, "Chromium did not start"
            time.sleep(0.05)
        port, path = port_file.read_text().splitlines()
        self.socket = client.connect(f"ws://127.0.0.1:{port}{path}", max_size=None)
        self.number = 0
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=10)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        while True:
            reply = json.loads(self.socket.recv(timeout=30))
            self._note(reply)
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                return reply["result"]

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"])[:500])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(params["args"])[:500])

    def run(self, expression: str) -> Any:
        """Value of a JavaScript expression; promises are awaited."""
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def open(self, url: str) -> float:
        """Go to the page; returns seconds until its script has run."""
        start = time.perf_counter()
        self.call("Page.navigate", url=url)
        while self.run("document.readyState + location.href.startsWith('about:')") != "completefalse":
            time.sleep(0.01)
        return time.perf_counter() - start

    def until(self, expression: str) -> None:
        deadline = time.monotonic() + 10
        while not self.run(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        code = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowRight": 39, "ArrowLeft": 37}[key]
        text = {"Enter": "\r"}.get(key)
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **extra)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run with späces")
    for name, policy in {
        "eval/sft_greedy_tool": Policy(0.1, 0.1),
        "eval/rl_greedy_tool": Policy(1, 1),
        "eval/rl_greedy_notool": Policy(0, 0),
    }.items():
        with TrajectoryWriter(run / name) as writer:
            for kind in KINDS:
                for index in range(12):
                    writer.write_group(group(digit_task(index, kind), 1, policy), 0)
    with TrajectoryWriter(run / "rl") as writer:
        for iteration in range(1, 7):
            item = group(digit_task(iteration, KINDS[iteration % 4]), 8, iteration=iteration)
            item.trajectories[0].turns[-1].text = f"<answer>{HOSTILE}</answer>"
            assert item.trajectories[0].reward is not None
            item.trajectories[0].reward.answer = HOSTILE
            writer.write_group(item, iteration)
    (run / "rl" / "metrics.csv").write_text(
        "step,iteration,reward/total,reward/accuracy,policy/entropy\n"
        + "".join(f"{i},{i},{i / 40},{i / 60},{1 - i / 50}\n" for i in range(40))
    )
    return write_report(run)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as started:
        yield started


def visible_cards(browser: Browser) -> int:
    return browser.run("document.querySelectorAll('.tile').length")


def test_the_page_opens_filters_and_shows_a_trajectory(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    assert visible_cards(browser) == 24
    browser.until("document.querySelector('#charts svg path') !== null")
    browser.until("document.querySelectorAll('#intervals circle').length > 10")

    browser.run(
        """(() => { const set = (id, value) => { document.getElementById(id).value = value;
        document.getElementById(id).dispatchEvent(new Event('input', { bubbles: true })); };
        set('f-outcome', 'wrong'); set('f-kind', 'turned'); })()"""
    )
    browser.until("!document.getElementById('count').textContent.startsWith('192')")
    assert browser.run("[...document.querySelectorAll('.tile')].every((t) => t.textContent.includes('✗ wrong'))")
    assert "kind=turned" in browser.run("location.hash")

    browser.run("document.querySelector('.tile').click()")
    browser.until("document.getElementById('viewer').open")
    browser.until("[...document.querySelectorAll('#viewer img')].every((i) => i.complete && i.naturalWidth > 0)")
    assert browser.run("document.querySelectorAll('#viewer img').length") >= 1
    assert browser.run("document.querySelectorAll('#viewer polygon.truth').length") == 1
    browser.press("Escape")
    browser.until("!document.getElementById('viewer').open")
    assert browser.problems == []


def test_pictures_are_decoded_only_when_looked_at(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    assert browser.run("[...document.querySelectorAll('.tile img')].filter((i) => i.hasAttribute('src')).length") == 0
    browser.run("document.getElementById('cards').scrollIntoView()")
    browser.until("[...document.querySelectorAll('.tile img')].some((i) => i.naturalWidth > 0)")


def test_the_keyboard_reaches_everything(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri() + "#store=3")
    browser.run("document.querySelector('.tile').focus()")
    browser.press("Enter")
    browser.until("document.getElementById('viewer').open")
    first = browser.run("location.hash")
    browser.press("ArrowRight")
    browser.until(f"location.hash !== {json.dumps(first)}")
    browser.run(
        "[...document.querySelectorAll('#viewer button')].find((b) => b.textContent === 'Side by side').focus()"
    )
    browser.press("Enter")
    browser.until("document.querySelectorAll('.column').length === 8")
    assert "advantage" in browser.run("document.querySelector('.column').textContent")
    browser.press("Escape")
    browser.until("document.activeElement.classList.contains('tile')")
    assert browser.problems == []


def test_what_a_model_wrote_is_text(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri() + "#search=onerror")
    assert browser.run("document.getElementById('count').textContent").startswith("6 of")
    browser.run("document.querySelector('.tile').click()")
    browser.until("document.getElementById('viewer').open")
    assert "onerror" in browser.run("document.querySelector('#viewer .answer').textContent")
    time.sleep(0.2)
    assert browser.run("document.title").endswith("cv_lightning report")
    assert browser.run("document.querySelectorAll('img[src=x]').length") == 0
    assert browser.problems == []


def test_a_phone_sees_all_of_it(browser: Browser, page: Path) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    browser.open(page.as_uri())
    browser.until("document.querySelector('#charts svg path') !== null")
    assert browser.run("document.documentElement.scrollWidth") <= 390
    browser.run("document.querySelector('.tile').click()")
    browser.until("document.getElementById('viewer').open")
    assert browser.run("document.querySelector('.v-body').scrollWidth") <= 390
    small = browser.run(
        "[...document.querySelectorAll('.v-head button, .filters button, #more')]"
        ".filter((b) => b.offsetParent && b.offsetHeight < 40).length"
    )
    assert small == 0
    assert browser.problems == []


def test_five_thousand_trajectories_open_within_a_second(browser: Browser, tmp_path: Path) -> None:
    with TrajectoryWriter(tmp_path / "run" / "rl") as writer:
        for index in range(625):
            writer.write_group(group(digit_task(index, KINDS[index % 4]), 8, iteration=index // 8), index // 8)
    page = write_report(tmp_path / "run", ReportConfig(max_trajectories=5000))
    assert "holds 5,000 of 5,000 trajectories" in page.read_text()
    seconds = min(browser.open(page.as_uri()), browser.open(page.as_uri() + "#outcome=wrong"))
    assert visible_cards(browser) == 24
    assert seconds < 1.0, seconds
    assert browser.problems == []
