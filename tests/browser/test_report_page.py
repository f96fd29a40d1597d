"""The report in a real browser: it loads nothing, complains about nothing, and fits a screen, a phone and paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.report.page import write_report
from tests.browser.chromium import DESKTOP, PHONE, Page, chromium
from tests.report.test_report import make_run

pytestmark = pytest.mark.browser
FIGURES = ("course", "forgetting", "routing", "similarity", "losses")


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
    assert (
        desktop.script("[...document.querySelectorAll('nav a')].map(a => document.querySelector(a.hash) !== null)")
        == [True] * 7
    )


def test_a_phone_scrolls_figures_and_tables_but_not_the_page_sideways(report: Path) -> None:
    with chromium(*PHONE) as page:
        page.open(report.as_uri())
        assert page.script("document.documentElement.scrollWidth") <= PHONE[0]
        # Letters in a figure stay readable: at least 60 % of the 13 pixels that 10 points are.
        for name in FIGURES:
            svg = f"document.querySelector('#{name} svg')"
            drawn, natural = f"{svg}.getBoundingClientRect().width", f"{svg}.viewBox.baseVal.width * 4 / 3"
            assert page.script(f"{drawn} / ({natural})") >= 0.6, name


def test_the_page_prints_on_a_few_sheets_with_every_figure(desktop: Page) -> None:
    pdf = desktop.pdf()
    assert pdf.startswith(b"%PDF")
    assert 2 <= pdf.count(b"/Type /Page\n") <= 9
