"""The page of `tensorllm report` in a real browser: quiet, alone, nothing on top of anything else.

Skips where there is no Chromium; CI has one (.ci/install-system-packages).
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import run

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = (390, 1280)
# What sticks out of the window, and pieces of text that lie on each other, as sentences.
PROBLEMS = """() => {
  const out = [];
  const edge = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > edge) out.push(
    `the page is ${document.documentElement.scrollWidth} wide in a window of ${edge}`);
  const hidden = e => e.closest('title, thead') &&
    getComputedStyle(e.closest('title, thead')).position === 'absolute';
  const pieces = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode, parent = node.parentElement;
    if (!node.data.trim() || !parent.checkVisibility() || hidden(parent)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const r of range.getClientRects()) {
      if (r.width < 1 || r.height < 1) continue;
      if (r.left < -1 || r.right > edge + 1)
        out.push(`"${node.data.trim()}" is at ${r.left} to ${r.right} of ${edge}`);
      const frame = parent.ownerSVGElement && parent.ownerSVGElement.getBoundingClientRect();
      if (frame && (r.left < frame.left - 1 || r.right > frame.right + 1))
        out.push(`"${node.data.trim()}" is cut by its picture`);
      pieces.push({node, r, text: node.data.trim().slice(0, 60)});
    }
  }
  for (let i = 0; i < pieces.length; i++) for (let j = i + 1; j < pieces.length; j++) {
    const [a, b] = [pieces[i], pieces[j]];
    if (a.node === b.node) continue;
    const w = Math.min(a.r.right, b.r.right) - Math.max(a.r.left, b.r.left);
    const h = Math.min(a.r.bottom, b.r.bottom) - Math.max(a.r.top, b.r.top);
    if (w > 2 && h > 0.1 * Math.min(a.r.height, b.r.height))
      out.push(`"${a.text}" lies on "${b.text}"`);
  }
  const cards = [...document.querySelectorAll('.card, .tile')].map(e => e.getBoundingClientRect());
  cards.forEach((a, i) => cards.slice(i + 1).forEach(b => {
    if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1) out.push('two cards overlap');
  }));
  return out;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of each kind, and a comparison."""
    folder = tmp_path_factory.mktemp("report")
    other = folder / "laser"
    compress = ("compress", "--model", "demo", "--mode", "laser", "--limit", 20, "--out", other)
    assert run(*compress) == 0
    pages = {"one": folder / "one.html", "several": folder / "several.html"}
    assert run("report", *runs.values(), "--out", pages["one"]) == 0
    assert run("report", other, runs["compressed"], "--out", pages["several"]) == 0
    return pages


def visit(browser: Any, page: Path, width: int, scheme: str) -> tuple[Any, list[str]]:
    """The page in a window of this width, and what it said and asked for."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    noise: list[str] = []
    tab.on("console", lambda message: noise.append(f"console: {message.text}"))
    tab.on("pageerror", lambda error: noise.append(f"error: {error}"))
    tab.on("request", lambda request: noise.append(f"request: {request.url[:80]}"))
    tab.goto(page.as_uri())
    noise.remove(f"request: {page.as_uri()[:80]}")
    return tab, [line for line in noise if not line.startswith("request: data:")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "several"])
@pytest.mark.parametrize("width", WIDTHS)
def test_page_is_quiet_alone_and_tidy(
    name: str, width: int, pages: dict[str, Path], browser: Any
) -> None:
    tab, noise = visit(browser, pages[name], width, "light")
    assert noise == []
    assert tab.evaluate(PROBLEMS) == []
    tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert tab.evaluate(PROBLEMS) == []
    assert tab.locator("figure svg").count() >= 5
    assert tab.locator("svg.model").count() >= 1
    tab.context.close()


@pytest.mark.slow
def test_plots_take_the_colours_of_the_theme(pages: dict[str, Path], browser: Any) -> None:
    """One drawing in two themes; its text stands out from the card in both."""
    lightness = {}
    for scheme in ("light", "dark"):
        tab, _ = visit(browser, pages["one"], 1280, scheme)
        lightness[scheme] = tab.evaluate(
            """() => {
              const sum = c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0) / 765;
              const figure = document.querySelector('figure.card');
              return [sum(getComputedStyle(figure).backgroundColor),
                      sum(getComputedStyle(figure.querySelector('svg text')).fill)];
            }"""
        )
        tab.context.close()
    for background, text in lightness.values():
        assert abs(background - text) > 0.4
    assert lightness["light"][0] > 0.8 > 0.3 > lightness["dark"][0]


@pytest.mark.slow
def test_the_check_sees_what_it_looks_for(tmp_path: Path, browser: Any) -> None:
    """Text on text, a page too wide, a picture from elsewhere and a script that fails."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<p>one</p><p style='margin-top:-2em'>two</p><div style='width:2000px'>wide</div>"
        "<img src='http://example.invalid/x.png'><script>nothing.at.all()</script>"
    )
    tab, noise = visit(browser, page, 390, "light")
    found = " ".join(tab.evaluate(PROBLEMS))
    assert '"one" lies on "two"' in found
    assert "in a window of 390" in found
    assert any("example.invalid" in line for line in noise)
    assert any(line.startswith("error") for line in noise)
    tab.context.close()
