"""The report in a real headless Chromium: it opens, filters, shows a trajectory, and nothing complains."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "unit"))
from report_samples import Size, write_run
from trajectory_samples import KINDS, digit_task, group

from cv_lightning.digits.report import sections_of
from cv_lightning.trajectory import TrajectoryWriter
from cv_lightning.viewer.report import ReportConfig, write_report

pytest.importorskip("websockets.sync.client", reason="no websockets: pip install websockets")
from report_browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
HOSTILE = "</script><img src=x onerror=document.title='owned'><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run with späces") / "quickstart-seed0"
    write_run(run, Size(per_kind=6, iterations=8, tasks=4, samples=8, ablation=True))
    with TrajectoryWriter(run / "rl", name="hostile") as writer:
        for iteration in range(1, 7):
            item = group(digit_task(iteration, KINDS[iteration % 4]), 8, iteration=iteration)
            item.trajectories[0].turns[-1].text = f"<answer>{HOSTILE}</answer>"
            assert item.trajectories[0].reward is not None
            item.trajectories[0].reward.answer = HOSTILE
            writer.write_group(item, iteration)
    return write_report(run, sections_of=sections_of)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as started:
        yield started


def browser_store(page: Path, label: str) -> int:
    """Number of a set of trajectories in the page."""
    text = page.read_text().split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return [store["label"] for store in json.loads(text)["stores"]].index(label)


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
    browser.until("!document.getElementById('count').textContent.startsWith(String(all.length))")
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


def test_results_and_examples_are_on_the_page(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    assert browser.run("document.querySelectorAll('.headlines li').length") == 3
    assert browser.run("document.querySelectorAll('#example-list article').length") == 4
    browser.run(
        """(async () => { for (const image of document.querySelectorAll('#example-list img')) {
        image.scrollIntoView({ behavior: 'instant' });
        await new Promise(requestAnimationFrame); await new Promise(requestAnimationFrame); } })()"""
    )
    browser.until("[...document.querySelectorAll('#example-list img')].every((i) => i.naturalWidth > 0)")
    assert browser.run("document.querySelectorAll('#example-list polygon.truth').length") == 4
    assert browser.run("document.querySelectorAll('#example-list .seen').length") >= 2
    browser.until("document.querySelectorAll('#compared path').length >= 8")
    before = browser.run("document.querySelector('#intervals circle title').textContent")
    browser.run("document.querySelector('#results .tabs button:last-child').click()")
    browser.until(f"document.querySelector('#intervals circle title')?.textContent !== {json.dumps(before)}")
    browser.run("document.querySelector('#charts details summary').click()")
    browser.until("document.querySelectorAll('#charts details[open] svg path').length > 3")
    assert [url for url in browser.requests if url != "about:blank"] == [page.as_uri()]
    assert browser.problems == []


def test_crops_are_outlined_at_their_place(browser: Browser, page: Path) -> None:
    """The outline of a crop, in the pixels of the drawn source image, lies around the ground-truth box."""
    browser.open(page.as_uri())
    found = browser.run(
        """(() => { const item = all.find((i) => i.trajectory.must === true && i.task.kind === 'turned_and_small');
        openViewer(item.index); const box = (node) => { const r = node.getBoundingClientRect();
        return [r.left, r.top, r.right, r.bottom]; };
        const source = document.querySelector('#viewer .source');
        return { truth: box(source.querySelector('.truth')), image: box(source.querySelector('img')),
        crop: box(source.querySelector('polygon.s1')), box: item.task.box, size: item.task.images[0].size }; })()"""
    )
    scale = (found["image"][2] - found["image"][0]) / found["size"][0]
    for edge in range(4):
        expected = found["image"][edge % 2] + scale * found["box"][edge]
        assert found["truth"][edge] == pytest.approx(expected, abs=4)
        outside = found["crop"][edge] - found["truth"][edge]
        assert (outside <= 1) if edge < 2 else (outside >= -1)


def test_images_are_decoded_only_when_shown(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    assert browser.run("[...document.querySelectorAll('.tile img')].filter((i) => i.hasAttribute('src')).length") == 0
    browser.run("document.getElementById('cards').scrollIntoView()")
    browser.until("[...document.querySelectorAll('.tile img')].some((i) => i.naturalWidth > 0)")


def test_the_keyboard_reaches_everything(browser: Browser, page: Path) -> None:
    training = browser_store(page, "RL training")
    browser.open(f"{page.as_uri()}#store={training}")
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


def test_tabs_answer_to_arrows_and_focus_shows(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    browser.press("Tab")
    assert browser.run("document.activeElement.className") == "skip"
    browser.run("document.querySelector('#stages [aria-selected=true]').focus()")
    browser.press("ArrowRight")
    browser.until("document.activeElement.dataset.stage === 'rl_accuracy'")
    assert browser.run("document.activeElement.getAttribute('aria-selected')") == "true"
    browser.run("document.querySelector('#charts svg.plot').focus()")
    browser.press("ArrowRight")
    browser.until("[...document.querySelectorAll('#charts .tip')].some((tip) => !tip.hidden)")
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert browser.problems == []


def test_what_a_model_wrote_is_text(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri() + "#search=onerror")
    count = browser.run("document.getElementById('count').textContent")
    assert 1 <= int(count.split()[0]) <= 6
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
    for stage in browser.run("data.curves.map((entry) => entry.stage)"):
        browser.run(f"showStage({json.dumps(stage)})")
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


@pytest.mark.slow
def test_five_thousand_trajectories_open_within_a_second(browser: Browser, tmp_path: Path) -> None:
    with TrajectoryWriter(tmp_path / "run" / "rl") as writer:
        for index in range(625):
            writer.write_group(group(digit_task(index, KINDS[index % 4]), 8, iteration=index // 8), index // 8)
    page = write_report(tmp_path / "run", ReportConfig(max_trajectories=5000))
    seconds = min(browser.open(page.as_uri() + fragment) for fragment in ("", "#outcome=wrong", "#sort=reward"))
    assert visible_cards(browser) == 24
    assert browser.run("[all.length, document.getElementById('total-count').textContent]") == [5000, "5,000"]
    assert seconds < 1.0, seconds
    assert browser.problems == []


def test_images_that_are_not_embedded_are_loaded_from_the_run(browser: Browser, page: Path, tmp_path: Path) -> None:
    run = tmp_path / "a rün"
    shutil.copytree(page.parent / "rl", run / "rl")
    small = write_report(run, ReportConfig(max_image_mb=0.0))
    gone = json.loads(next((run / "rl" / "trajectories").iterdir()).read_text().splitlines()[0])["task"]["images"][0]
    (run / "rl" / "images" / gone["file"]).unlink()
    browser.open(small.as_uri())
    browser.run("document.getElementById('cards').scrollIntoView()")
    browser.until("[...document.querySelectorAll('.tile img')].filter((i) => i.naturalWidth > 0).length > 3")
    browser.run(f"openViewer(all.find((i) => i.trajectory.images[0].file === {json.dumps(gone['file'])}).index)")
    browser.until("document.querySelector('#viewer .source .none')?.textContent === 'image not found'")
    assert all(url.startswith("file://") for url in browser.requests if url != "about:blank")

    browser.open(write_report(run, ReportConfig(max_image_mb=0.0)).as_uri())
    assert "missing in the run's folder" in " ".join(browser.run("document.querySelector('.lead').textContent").split())
    browser.run("openViewer(all.find((i) => i.trajectory.images[0].missing).index)")
    assert "image missing in the run" in browser.run("document.querySelector('#viewer .source').textContent")
