"""The page in headless Chromium, at a desk's and a phone's width: nothing is wrong, fetched, cut off or too small."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import page as report
from tests.benchmarks import chromium
from tests.benchmarks.test_report import ABOUT, folder_of, records

LEAST_TEXT = 12  # pixels
SIZES = [(1280, 900), (390, 844)]
# What is hidden at first is opened. Text inside pictures is as large as they are drawn.
MEASURED = """(async () => {
  document.querySelectorAll('details').forEach(part => part.open = true);
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  const sizes = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode())
    if (texts.currentNode.data.trim())
      sizes.push(parseFloat(getComputedStyle(texts.currentNode.parentElement).fontSize));
  const images = [...document.images], inside = [];
  for (const image of images.filter(image => image.src.startsWith('data:image/svg+xml'))) {
    const bytes = Uint8Array.from(atob(image.src.split(',')[1]), c => c.charCodeAt(0));
    const svg = new DOMParser().parseFromString(new TextDecoder().decode(bytes), 'image/svg+xml').documentElement;
    const scale = image.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    for (const text of svg.querySelectorAll('text, tspan')) {
      const size = /([\\d.]+)px/.exec(text.getAttribute('style') || '');
      if (size) inside.push(parseFloat(size[1]) * scale);
    }
  }
  return {
    loaded: images.every(image => image.complete && image.naturalWidth > 0), images: images.length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    texts: sizes.length, smallest: Math.min(...sizes), inside: inside.length, smallestInside: Math.min(...inside),
    scrolls: [...document.querySelectorAll('.scroll')].some(box => box.scrollWidth > box.clientWidth),
    background: getComputedStyle(document.body).backgroundColor,
  };
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Page]:
    program = chromium.found()
    if program is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with chromium.browser(program) as page:
        yield page


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, browser: chromium.Page) -> Path:
    content = {"environment": ABOUT, "records": records()}
    return report.write(folder_of(tmp_path_factory.mktemp("results"), cpu=content), tmp_path_factory.mktemp("page"))


def looked_at(browser: chromium.Page, path: Path, size: tuple[int, int], dark: bool = False) -> dict[str, Any]:
    browser.open(path, *size, dark=dark)
    found: dict[str, Any] = browser.evaluate(MEASURED)
    return found


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_page(browser: chromium.Page, path: Path, size: tuple[int, int]) -> None:
    found = looked_at(browser, path, size)
    assert not browser.reported("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    asked = {request["request"]["url"] for request in browser.reported("Network.requestWillBeSent")}
    assert {url for url in asked if not url.startswith("data:")} == {path.resolve().as_uri()}
    assert found["images"] > 10 and found["loaded"]
    assert found["overflow"] == 0
    assert found["texts"] > 100 and found["smallest"] >= LEAST_TEXT
    assert found["inside"] > 100 and found["smallestInside"] >= LEAST_TEXT


def test_dark_and_narrow(browser: chromium.Page, path: Path) -> None:
    """Wide tables scroll in boxes of their own, and a dark theme is followed, by the pictures too."""
    light, dark = (looked_at(browser, path, SIZES[1], dark=dark) for dark in (False, True))
    assert light["scrolls"] and light["background"] != dark["background"]
    assert browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")


def test_faults_are_seen(browser: chromium.Page, tmp_path: Path) -> None:
    """The checks above can fail: a broken picture, a wide and small text, a script's error, a request."""
    svg = (
        b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 90 9" width="90"><text style="font:9px x">a</text></svg>'
    )
    picture = f"data:image/svg+xml;base64,{b64encode(svg).decode()}"
    faulty = tmp_path / "faulty.html"
    faulty.write_text(
        f"<!doctype html><p style='width:2000px;font-size:9px'>small</p><img src='{picture}'>"
        "<img src='data:image/png;base64,AAAA'><link rel=stylesheet href='missing.css'><script>throw 1</script>"
    )
    found = looked_at(browser, faulty, SIZES[0])
    assert not found["loaded"] and found["overflow"] > 0 and found["smallest"] == found["smallestInside"] == 9
    assert browser.reported("Runtime.exceptionThrown")
    assert any("missing.css" in r["request"]["url"] for r in browser.reported("Network.requestWillBeSent"))
