"""The page of runs in a real browser: keys, phone, dark, print, the chat, and a command with its output."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from pipeline.ranks.environment import free_port
from pipeline.runs.folder import read_run
from pipeline.ui import jobs
from pipeline.ui.app import Site
from pipeline.ui.jobs import Job
from pipeline.ui.server import app_of, site_of
from tests.browser.chromium import DESKTOP, PHONE, Page, chromium
from tests.browser.test_labelling_page import press, until
from tests.sequence.made import two_stages
from tests.ui.made import TOKEN, run_with_pictures
from tests.ui.test_chat import Said

pytestmark = pytest.mark.browser
PAGES = ("/", "/run/small-s3/", "/run/small-s3/examples", "/run/small-s3/chat", "/run/small-s3/add")


@dataclass
class Served:
    """A served page of two made runs."""

    address: str
    site: Site
    said: Said

    def open(self, page: Page, path: str = "/") -> None:
        """Open a page as the printed address does."""
        page.open(f"{self.address}{path}{'&' if '?' in path else '?'}token={TOKEN}")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [run_with_pictures(folder), run_with_pictures(folder, "another run with a rather long name & signs")]
    site, said = site_of(runs), Said(answer="[10,20,60,70]")
    site = Site(site.runs, site.templates, answering=said)
    with serving(site) as address:
        yield Served(address, site, said)


@contextmanager
def serving(site: Site) -> Iterator[str]:
    """Serve a page; yields its address."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app_of(site, TOKEN, port), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def desktop(served: Served) -> Iterator[Page]:
    with chromium(*DESKTOP) as page:
        served.open(page)
        yield page


def ready(page: Page) -> bool:
    """Whether all pictures that are in view have arrived."""
    near = "[...document.images].filter(i => i.getAttribute('src') && i.getBoundingClientRect().top < innerHeight)"
    return bool(page.script(f"{near}.every(i => i.complete && i.naturalWidth > 0)"))


def focused(page: Page, expression: str = "document.activeElement") -> Any:
    return page.script(f"{expression}.getAttribute('aria-label') || {expression}.textContent.trim()")


def test_pages_ask_this_server_alone_and_the_console_stays_empty(served: Served, desktop: Page) -> None:
    for path in PAGES:
        desktop.open(served.address + path)
        until(lambda: ready(desktop))
    assert desktop.console() == []
    assert all(address.startswith(served.address) for address in desktop.requests())


def test_a_keyboard_skips_to_the_content_and_sees_where_it_is(served: Served, desktop: Page) -> None:
    desktop.open(served.address + "/run/small-s3/examples")
    press(desktop, "Tab")
    assert focused(desktop) == "Skip to the content"
    assert desktop.script("document.activeElement.getBoundingClientRect().left") >= 0
    press_enter(desktop)
    until(lambda: desktop.script("document.activeElement.id") == "content")
    press(desktop, "Tab")
    assert desktop.script("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    order = [focused(desktop)]
    for _ in range(3):
        press(desktop, "Tab")
        order.append(focused(desktop))
    assert order == ["Overview", "Examples", "Ask", "Add a task"]


def press_enter(page: Page) -> None:
    """Press Enter so that it follows a link, for which Chromium wants its text."""
    for kind in ("keyDown", "keyUp"):
        event = {"type": kind, "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        page.driver.execute_cdp_cmd(
            "Input.dispatchKeyEvent", {**event, **({"text": "\r"} if kind == "keyDown" else {})}
        )


def test_keys_go_from_example_to_example_and_from_page_to_page(served: Served, desktop: Page) -> None:
    desktop.open(served.address + "/run/small-s3/examples")
    press(desktop, "j", "j", "j", "k")
    assert focused(desktop).startswith("colour, colour-1, right")
    press(desktop, "n")
    until(lambda: desktop.script("location.search") == "?page=2")
    press(desktop, "j", "j")
    assert focused(desktop).startswith("boxes, boxes-3")
    press(desktop, "ArrowLeft")
    until(lambda: desktop.script("location.search") != "?page=2")
    press(desktop, "/")
    assert desktop.script("document.activeElement.name") == "text"
    press(desktop, *"jn")  # typed, not followed
    assert desktop.script("document.activeElement.value") == "jn" and desktop.script("location.search") == "?page=1"
    assert desktop.console() == []


def test_boxes_lie_on_their_picture(served: Served, desktop: Page) -> None:
    desktop.open(served.address + "/run/small-s3/examples?task=boxes")
    until(lambda: ready(desktop))
    inside = "(b => [b.left, b.top, b.width, b.height])(document.querySelector('{}').getBoundingClientRect())"
    left, top, width, height = desktop.script(inside.format(".card img"))
    box = desktop.script(inside.format(".card rect.expected"))
    assert box == pytest.approx([left + 0.1 * width, top + 0.2 * height, width / 2, height / 2], abs=1.5)


@pytest.mark.parametrize("path", PAGES)
def test_a_phone_scrolls_tables_and_curves_but_not_the_page_sideways(served: Served, path: str) -> None:
    with chromium(*PHONE) as page:
        served.open(page, path)
        until(lambda: ready(page))
        assert page.script("document.documentElement.scrollWidth") <= PHONE[0]
        buttons = "[...document.querySelectorAll('button')].filter(b => b.checkVisibility())"
        assert all(height >= 40 for height in page.script(f"{buttons}.map(b => b.getBoundingClientRect().height)"))
        assert page.console() == []


def test_dark_screens_get_dark_pages_with_readable_text(served: Served) -> None:
    with chromium(*DESKTOP) as page:
        features = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        for path in PAGES[1:3]:
            served.open(page, path)
            paper = page.script("getComputedStyle(document.body).backgroundColor")
            for place in ("h1", "a[href]", ".note", "td.own", ".wrong .verdict"):
                ink = page.script(f"(e => e && getComputedStyle(e).color)(document.querySelector('{place}'))")
                if ink:
                    behind = page.script(f"getComputedStyle(document.querySelector('{place}')).backgroundColor")
                    assert contrast(ink, paper if behind == "rgba(0, 0, 0, 0)" else behind) >= 4.5, place
            assert luminance(paper) < 0.05


def luminance(colour: str) -> float:
    """The relative luminance of a computed colour, as WCAG defines it."""
    numbers = [float(part) for part in colour[colour.index("(") + 1 : -1].replace("srgb", "").replace(",", " ").split()]
    parts = [part if colour.startswith("color(") else part / 255 for part in numbers[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("path", PAGES[:3])
def test_pages_print_on_a_few_sheets(served: Served, desktop: Page, path: str) -> None:
    desktop.open(served.address + path)
    until(lambda: ready(desktop))
    pdf = desktop.pdf()
    assert pdf.startswith(b"%PDF") and 1 <= pdf.count(b"/Type /Page\n") <= 5


def test_a_question_is_asked_by_key_about_a_chosen_picture(served: Served, desktop: Page, tmp_path: Path) -> None:
    desktop.open(served.address + "/run/small-s3/chat")
    picture = tmp_path / "picture.png"
    picture.write_bytes(served_picture(served))
    desktop.driver.find_element("css selector", "#file").send_keys(str(picture))
    until(lambda: desktop.script("document.querySelector('#preview').naturalWidth") == 32)
    desktop.script("(e => { e.value = 'boxes'; })(document.querySelector('#task'))")
    desktop.script("document.querySelector('#question').focus()")
    press(desktop, *"where?")
    press_enter(desktop)
    until(lambda: desktop.script("document.querySelectorAll('#answers .card').length") == 1)
    assert served.said.asked[-1] == ("small-s3", "where?", picture.read_bytes(), "boxes")
    text = desktop.script("document.querySelector('#answers .card').innerText")
    assert "[10,20,60,70]" in text and "boxes chosen by hand" in text and "0.900" in text
    assert desktop.script("document.querySelectorAll('#answers rect.predicted').length") == 1
    desktop.script("document.querySelector('#clear').click()")
    assert not desktop.script("document.querySelector('#preview').checkVisibility()")
    assert desktop.console() == []
    picture.write_bytes(b"no picture")
    desktop.driver.find_element("css selector", "#file").send_keys(str(picture))
    until(lambda: "not readable" in desktop.script("document.querySelector('#busy').textContent"))
    (refused,) = desktop.console()  # the browser's own line about the refused request
    assert "415" in refused


def served_picture(served: Served) -> bytes:
    """The file of a test sample's picture."""
    sample = served.site.samples.sample(read_run(served.site.runs["small-s3"]), "boxes", 1, "boxes-1")
    assert sample is not None and sample.image is not None
    return sample.image


def test_nothing_is_taken_back_without_the_tick(desktop: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = two_stages(tmp_path / "run")
    (run / "matrix.json").write_text('{"tasks": ["Colours", "Count"], "accuracy": [[90.0, null], [80.0, 85.0]]}')
    site = site_of([run])
    steps = tmp_path / "go-on"
    steps.touch()
    follow_program(monkeypatch, "print('done')", steps)
    with serving(site) as address:
        desktop.open(f"{address}/run/run/add?token={TOKEN}")
        press_button = "document.querySelector('button[value=undo]').click()"
        desktop.script(press_button)
        assert desktop.script("document.querySelector('.sure:invalid') !== null")
        assert desktop.script("location.pathname") == "/run/run/add" and not site.jobs.of("run")
        desktop.script("document.querySelector('.sure').click()")
        desktop.script(press_button)
        until(lambda: str(desktop.script("location.pathname")).startswith("/job/"))
        until(lambda: site.jobs.of("run")[0].state == "done")
    assert desktop.console() == []


def test_the_output_of_a_command_appears_while_it_runs(
    served: Served, desktop: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = tmp_path / "go-on"
    program = (
        "import sys, time; from pathlib import Path; print('first <b>line</b>', flush=True)\n"
        "while not Path(sys.argv[1]).exists(): time.sleep(0.05)\n"
        "print('last line', flush=True)"
    )
    follow_program(monkeypatch, program, steps)
    job = served.site.jobs.start(Job(0, "small-s3", "learn New", [["add"]], {}, "Go on with New", True))
    desktop.open(f"{served.address}/job/{job.number}")
    shown: Callable[[], str] = lambda: desktop.script("document.querySelector('#output').textContent")  # noqa: E731
    until(lambda: "first <b>line</b>" in shown())
    assert desktop.script("document.querySelector('#state').textContent") == "running"
    steps.touch()
    until(lambda: "last line" in shown())
    until(lambda: desktop.script("document.querySelector('#state').textContent") == "done")
    assert desktop.console() == []


def follow_program(monkeypatch: pytest.MonkeyPatch, program: str, steps: Path) -> None:
    """Let jobs run a Python program in place of `python -m pipeline`."""
    popen = jobs.subprocess.Popen
    monkeypatch.setattr(
        jobs.subprocess, "Popen", lambda words, **options: popen([sys.executable, "-c", program, str(steps)], **options)
    )
