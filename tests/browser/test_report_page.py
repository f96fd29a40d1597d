"""The report in a real browser: it loads nothing, complains about nothing, and fits a screen, a phone and paper."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.clip.benchmark.report import write_benchmark_report
from pipeline.config.paths import PROJECT
from pipeline.report.compared import ComparedMethod
from pipeline.report.compared_page import write_comparison
from pipeline.report.page import write_report
from pipeline.runs.folder import read_run
from tests.browser.chromium import DESKTOP, PHONE, Page, chromium
from tests.report.test_report import make_run

pytestmark = pytest.mark.browser
FIGURES = ("course", "forgetting", "routing", "similarity", "losses")
KEPT = PROJECT / "tests" / "compat" / "kept"
WIDE = (1440, 1000)
# The relative luminance of a CSS colour, as WCAG defines it. A canvas gives the colour of any notation in bytes.
LUMINANCE = """(colour => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255);
  const [r, g, b] = parts.map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
})(%s)"""
# For every visible text but dashes: its contrast with the nearest background, and its beginning.
TEXTS = """(() => {
  const known = new Map(), of = colour => {
    if (!known.has(colour)) known.set(colour, LUMINANCE);
    return known.get(colour);
  };
  const found = [], walker = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    if (!text || text === '–' || element.closest('svg, style') || !element.checkVisibility()) continue;
    let ground = element;
    while (ground && getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
    const both = [of(getComputedStyle(element).color), of(getComputedStyle(ground ?? document.body).backgroundColor)];
    found.push([(Math.max(...both) + 0.05) / (Math.min(...both) + 0.05), text.slice(0, 40)]);
  }
  return found;
})()""".replace("LUMINANCE", LUMINANCE % "colour")
# For everything that may scroll sideways: whether it does, and whether it says so.
HINTS = """[...document.querySelectorAll('.wide')].filter(e => e.checkVisibility()).map(
  e => [e.scrollWidth > e.clientWidth, e.querySelector('.hint').getBoundingClientRect().height > 5])"""
# The right edge of every legend of a figure, before anything was scrolled.
LEGENDS = """[...document.querySelectorAll('figure svg [id*="legend"]')].map(e => e.getBoundingClientRect().right)"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return write_report(make_run(folder / "one"), [make_run(folder / "two"), make_run(folder / "three", stages=2)])


@pytest.fixture(scope="module")
def desktop(report: Path) -> Iterator[Page]:
    with chromium(*DESKTOP) as page:
        page.open(report.as_uri())
        yield page


def test_the_page_asks_for_itself_alone_and_the_console_stays_empty(desktop: Page, report: Path) -> None:
    assert desktop.requests() == [report.as_uri()]
    assert desktop.console() == []


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_and_says_what_it_shows(desktop: Page, name: str) -> None:
    figure = f"document.querySelector('#{name} svg')"
    assert desktop.script(f"{figure}.getBoundingClientRect().height") > 150
    assert desktop.script(f"{figure}.querySelectorAll('path').length") > 5
    assert len(desktop.script(f"{figure}.getAttribute('aria-label')")) > 20


def test_links_of_the_page_lead_to_its_headings(desktop: Page) -> None:
    found = desktop.script("[...document.querySelectorAll('nav a')].map(a => document.querySelector(a.hash) !== null)")
    assert found == [True] * 9


@pytest.mark.parametrize("size", [PHONE, DESKTOP, WIDE])
def test_the_contents_stay_in_view(desktop: Page, size: tuple[int, int]) -> None:
    desktop.resize(*size)
    desktop.driver.execute_script("document.querySelector('#examples').scrollIntoView()")
    box = "document.querySelector('nav').getBoundingClientRect()"
    assert desktop.script(f"{box}.top >= 0 && {box}.bottom <= innerHeight")
    beside = desktop.script(f"{box}.right <= document.querySelector('main').getBoundingClientRect().left")
    assert beside == (size == WIDE)  # a column at the side where there is room for one
    desktop.resize(*DESKTOP)


def test_the_first_screen_shows_the_headline_on_a_phone_too(desktop: Page) -> None:
    for size in (DESKTOP, PHONE):
        desktop.resize(*size)
        desktop.driver.execute_script("scrollTo(0, 0)")
        assert desktop.script("document.querySelectorAll('#tiles div').length") == 7
        tiles = "document.querySelector('#tiles').getBoundingClientRect()"
        assert desktop.script(f"{tiles}.bottom") <= size[1]
    desktop.resize(*DESKTOP)


def test_dark_mode_is_dark_and_every_letter_stands_out_from_it(desktop: Page) -> None:
    try:
        for scheme, dark in (("light", False), ("dark", True)):
            desktop.prefer(scheme)
            assert (desktop.script(LUMINANCE % "getComputedStyle(document.body).backgroundColor") < 0.1) == dark
            faint = desktop.script(TEXTS)
            assert len(faint) > 200 and min(entry[0] for entry in faint) >= 4.5, min(faint)
    finally:
        desktop.prefer("light")


def test_a_phone_scrolls_figures_and_tables_but_not_the_page_sideways(desktop: Page) -> None:
    try:
        desktop.resize(*PHONE)
        assert desktop.script("document.documentElement.scrollWidth") <= PHONE[0]
        # Letters in a figure stay readable: at least 60 % of the 13 pixels that 10 points are.
        for name in FIGURES:
            svg = f"document.querySelector('#{name} svg')"
            drawn, natural = f"{svg}.getBoundingClientRect().width", f"{svg}.viewBox.baseVal.width * 4 / 3"
            assert desktop.script(f"{drawn} / ({natural})") >= 0.6, name
        said = desktop.script(HINTS)
        assert len(said) >= 10 and {hinted for _, hinted in said} == {True, False}
        assert all(scrolls == hinted for scrolls, hinted in said)
        legends = desktop.script(LEGENDS)
        assert len(legends) >= 3 and all(right <= PHONE[0] for right in legends)
    finally:
        desktop.resize(*DESKTOP)


def test_a_keyboard_reaches_what_scrolls(desktop: Page) -> None:
    assert desktop.script("[...document.querySelectorAll('.wide')].every(e => e.tabIndex === 0 && e.ariaLabel)")


def test_the_page_prints_on_a_few_sheets_with_every_figure(desktop: Page) -> None:
    pdf = desktop.pdf()
    assert pdf.startswith(b"%PDF")
    assert 2 <= pdf.count(b"/Type /Page\n") <= 12


@pytest.mark.parametrize("kind", ["benchmark", "comparison"])
def test_the_other_pages_are_as_quiet_dark_and_narrow(kind: str, tmp_path: Path) -> None:
    path = {"benchmark": benchmark_page, "comparison": comparison_page}[kind](tmp_path)
    with chromium(*PHONE) as page:
        page.prefer("dark")
        page.open(path.as_uri())
        assert page.requests() == [path.as_uri()] and page.console() == []
        assert page.script("document.documentElement.scrollWidth") <= PHONE[0]
        faint = page.script(TEXTS)
        assert len(faint) > 20 and min(entry[0] for entry in faint) >= 4.5, min(faint)


def benchmark_page(folder: Path) -> Path:
    """The page of a kept benchmark."""
    run = folder / "benchmark"
    shutil.copytree(KEPT / "runs" / "benchmark", run)
    shutil.copy(KEPT / "finished" / "benchmark" / "results.json", run / "results.json")
    return write_benchmark_report(run)


def comparison_page(folder: Path) -> Path:
    """The page of a comparison of two methods."""
    methods = [ComparedMethod(name, [read_run(make_run(folder / name))]) for name in ("one", "two")]
    return write_comparison(folder / "compared", "small", methods, {"recipe": "small"})
