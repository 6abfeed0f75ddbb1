"""The page: small, nothing from elsewhere, no markup from texts; its functions in node, the whole in a headless Chromium.

The browser is what `SPECL_TEST_CHROMIUM` names, or a chromium on the path, driven by playwright; without them that part is skipped.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from specl.shared.messaging.outbox import Outbox
from tests.harness.records import fill
from tests.harness.waiting import wait_until

STATIC = Path(__file__).resolve().parents[2] / "daemons" / "gateway" / "static"
SCREENSHOT = os.environ.get("SPECL_TEST_SCREENSHOT")


def test_script_is_small_and_self_contained():
    assert (STATIC / "app.js").stat().st_size < 60_000
    for path in STATIC.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|@import|url\(", text), path.name


def test_text_never_becomes_markup():
    script, page = (STATIC / "app.js").read_text(), (STATIC / "index.html").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script)
    assert not re.search(r"<script>|\son\w+=|\sstyle=|<style", page)


def test_addresses_are_relative_to_the_page():
    page, script = (STATIC / "index.html").read_text(), (STATIC / "app.js").read_text()
    assert not re.findall(r'(?:href|src|action)="/', page) and not re.findall(r"""["'`]/[a-z]""", script)


@pytest.mark.process
@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_pages_functions_in_node():
    done = subprocess.run(["node", str(Path(__file__).parent / "page.cjs")], capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    named = os.environ.get("SPECL_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-headless-shell")
    if named is None:
        pytest.skip("no chromium here")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=named, args=["--no-sandbox"])
        yield started
        started.close()


NASTY = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def filled(running):
    """An instance with answers to look at, one of them hostile."""
    instance = running.instance
    fill(Outbox(instance.paths.outbox("inference"), 1 << 30), ["nasty"], text=NASTY)
    for number in range(6):
        instance.ask(f"what is {number} and {number}?", max_tokens=16)
    instance.settle()
    return running


@pytest.mark.parametrize("scheme, size", [("light", (1100, 900)), ("dark", (390, 844))])
def test_the_page_is_live_escapes_and_fits(filled, browser, scheme, size):
    context = browser.new_context(color_scheme=scheme, viewport={"width": size[0], "height": size[1]})
    page = context.new_page()
    complaints = []
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(filled.url)
    page.wait_for_selector("#link.live", timeout=10_000)
    page.wait_for_selector("#answers article")
    page.wait_for_selector("#speed circle")
    before = page.locator("#tiles").inner_text()
    filled.instance.ask("one more", max_tokens=8)
    wait_until(lambda: page.locator("#tiles").inner_text() != before, 10, "a new answer is seen")
    assert page.title() == "SpecLoRA" and page.locator("#answers img, #answers script").count() == 0
    assert NASTY in page.locator("#answers").text_content()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.click("#train")
    page.click("#ask button[value=no]")
    assert page.locator("#said").inner_text() == ""
    page.click("#train")
    page.click("#yes")
    wait_until(lambda: "trainer" in page.locator("#said").inner_text(), 5, "what became of it is said")
    assert [line for line in complaints if "503" not in line] == []
    if SCREENSHOT and scheme == "light":
        page.screenshot(path=SCREENSHOT, full_page=True)
    context.close()
