"""The labelling page in a real browser: keys, buttons, undo, progress, and nothing lost when it is closed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from PIL import Image

from pipeline.clip.active.ask_files import Question, read_answers, remove_question, write_question
from pipeline.clip.labelling.answers import Answers
from pipeline.clip.labelling.app import LabellingPage
from pipeline.ranks.environment import free_port
from tests.browser.chromium import DESKTOP, PHONE, Page, chromium

pytestmark = pytest.mark.browser
CLASSES = ("red_square", "a class with a rather long name that has to be broken", "blue", "green")
IMAGES = tuple(f"100APPLE/IMG_{number:04d}.JPG" for number in range(6))
QUESTION = Question("coop-photos-s1", 1, 3, "photos", CLASSES, IMAGES)
WAIT_S = 20.0


@dataclass
class Desk:
    """A served run folder."""

    run: Path
    address: str
    done: list[bool]

    def answers(self) -> list[str | None]:
        return read_answers(self.run, QUESTION)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    pictures = [Image.new("RGB", (640, 480), (40 * n, 90, 200 - 30 * n)) for n in range(len(IMAGES))]
    write_question(tmp_path, QUESTION, pictures)
    port, done = free_port(), list[bool]()
    page = LabellingPage(Answers(tmp_path), "token", lambda: done.append(True))
    server = uvicorn.Server(uvicorn.Config(page.app(), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield Desk(tmp_path, f"http://127.0.0.1:{port}/token/", done)
    server.should_exit = True
    thread.join(WAIT_S)


def until(condition: Callable[[], bool], seconds: float = WAIT_S) -> None:
    """Wait until something is so; the assertion fails where it does not come."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def press(page: Page, *keys: str) -> None:
    """Press keys as a person does, one after the other."""
    for key in keys:
        for kind in ("keyDown", "keyUp"):
            event = {"type": kind, "key": key, **({"text": key} if len(key) == 1 and kind == "keyDown" else {})}
            page.driver.execute_cdp_cmd("Input.dispatchKeyEvent", event)


def opened(page: Page, desk: Desk) -> None:
    page.open(desk.address)
    until(lambda: page.script("document.querySelectorAll('#classes button').length") == len(CLASSES))
    until(lambda: page.script("document.querySelector('#picture').naturalWidth") == 640)


def shown(page: Page) -> str:
    return page.script("document.querySelector('#file').textContent")


def test_keys_label_undo_and_go_back_and_the_file_follows(desk: Desk) -> None:
    with chromium(*DESKTOP) as page:
        opened(page, desk)
        assert shown(page) == f"1. {IMAGES[0]}"
        press(page, "1", "3", "0")
        until(lambda: desk.answers()[:3] == ["red_square", "blue", "-"])
        assert page.script("document.querySelector('#count').textContent") == "3 of 6 labelled"
        press(page, "u", "u")
        until(lambda: desk.answers() == ["red_square", *[None] * 5])
        assert shown(page) == f"2. {IMAGES[1]}"
        press(page, "ArrowRight", "4", "ArrowLeft", "ArrowLeft", "5")  # there is no fifth class
        until(lambda: desk.answers() == ["red_square", None, "green", *[None] * 3])
        assert not page.script("document.querySelector('#done').checkVisibility()")
        assert page.console() == []
        assert all(address.startswith(desk.address) for address in page.requests())


def test_buttons_label_on_a_phone_and_nothing_is_lost_when_the_page_is_closed(desk: Desk) -> None:
    with chromium(*PHONE) as page:
        opened(page, desk)
        assert page.script("document.documentElement.scrollWidth") <= PHONE[0]
        assert page.script("document.documentElement.scrollHeight") <= PHONE[1]
        buttons = "[...document.querySelectorAll('button')].filter(b => b.checkVisibility())"
        assert page.script(f"Math.min(...{buttons}.map(b => b.getBoundingClientRect().height))") >= 40
        assert page.script(f"Math.max(...{buttons}.map(b => b.getBoundingClientRect().bottom))") <= PHONE[1]
        for place in (0, 1):
            page.script(f"document.querySelectorAll('#classes button')[{place}].click()")
        until(lambda: desk.answers()[:2] == [CLASSES[0], CLASSES[1]])
    with chromium(*PHONE) as page:
        opened(page, desk)
        assert shown(page) == f"3. {IMAGES[2]}"
        for _ in range(4):
            page.script("document.querySelectorAll('#classes button')[2].click()")
        until(lambda: desk.answers() == [CLASSES[0], CLASSES[1], *["blue"] * 4])
        until(lambda: page.script("document.querySelector('#done').checkVisibility()"))
        assert not desk.done
        page.script("document.querySelector('#done').click()")
        until(lambda: desk.done == [True])


def test_the_next_round_appears_by_itself(desk: Desk) -> None:
    with chromium(*DESKTOP) as page:
        opened(page, desk)
        press(page, *"111111")
        until(lambda: None not in desk.answers())
        page.script("document.querySelector('#done').click()")
        until(lambda: bool(desk.done))
        remove_question(desk.run)
        following = Question("coop-photos-s1", 2, 3, "photos", CLASSES, ("later.jpg", "latest.jpg"))
        write_question(desk.run, following, [Image.new("RGB", (100, 300)) for _ in range(2)])
        until(lambda: shown(page) == "1. later.jpg")
        assert page.script("document.querySelector('#title').textContent") == "Round 2 of 3"
        press(page, "2")
        until(lambda: read_answers(desk.run, following) == [CLASSES[1], None])


def test_many_classes_are_searched_by_typing(desk: Desk) -> None:
    many = Question("coop-photos-s1", 1, 3, "photos", tuple(f"kind {n}" for n in range(60)), ("a.jpg",))
    remove_question(desk.run)
    write_question(desk.run, many, [Image.new("RGB", (64, 64))])
    with chromium(*PHONE) as page:
        page.open(desk.address)
        until(lambda: page.script("document.querySelectorAll('#classes button').length") == 60)
        assert page.script("document.documentElement.scrollHeight") <= PHONE[1]
        page.script("document.querySelector('#filter').focus()")
        press(page, *"kind 47", "Enter")
        until(lambda: read_answers(desk.run, many) == ["kind 47"])
        assert page.script("document.querySelector('#filter').value") == ""
