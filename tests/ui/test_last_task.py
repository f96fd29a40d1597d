"""The last task on the page: learned again, taken back, brought back; each foretold, with the command line's rules."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.runs.layout import LOCK, UNDO
from pipeline.sequence.again import begin_again
from pipeline.sequence.undo import foretold_undo, undo
from tests.sequence.made import contents, two_stages
from tests.ui.made import Browser, fault_of, other_process_holds
from tests.ui.test_adding import ended, job_of, run_by_the_program


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has learned Colours and then Count."""
    run = two_stages(tmp_path / "run")
    scores = {"tasks": ["Colours", "Count"], "accuracy": [[90.0, None], [80.0, 85.0]]}
    (run / "matrix.json").write_text(json.dumps(scores))
    return run


@pytest.fixture
def browser(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Browser]:
    """A page of the run whose commands are run by the program of the tests of adding."""
    run_by_the_program(tmp_path, monkeypatch)
    browser = Browser(run)
    yield browser
    browser.site.close()


def form(browser: Browser, what: str) -> dict[str, str]:
    """The hidden fields of the form with this button on the page of `add`, and the button's value."""
    forms = re.findall(r"<form.*?</form>", browser.page("/run/run/add"), re.DOTALL)
    (found,) = [text for text in forms if f'value="{what}"' in text and 'action="last"' in text]
    hidden = re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', found)
    return {name: html.unescape(value) for name, value in hidden if name != "csrf"} | {"what": what}


def send(browser: Browser, **fields: str) -> Any:
    return browser.send("/run/run/last", **fields)


def given(browser: Browser, reply: Any) -> str:
    """The arguments of the one command that a form has started."""
    (line,) = [line for line in ended(job_of(browser, reply))[2].splitlines() if line.startswith("given")]
    return line.removeprefix("given ")


def test_the_last_task_is_foretold_and_then_learned_again(browser: Browser, run: Path) -> None:
    fields = {**form(browser, "foretell"), "settings": "train.lr_prompt=3e-3\r\n\r\n train.betas=[0.9, 0.99]"}
    fields["gate"] = "0.05"
    options = "--set=train.lr_prompt=3e-3 --set=train.betas=[0.9, 0.99] --gate=0.05"
    foretold = send(browser, **fields)
    assert given(browser, foretold) == f"add --again {options} --dry-run -- {run} Count"
    job = job_of(browser, foretold)
    page = browser.page(f"/job/{job.number}")
    assert "Learn Count again</button>" in page and f'action="/run/run/{job.place}"' in page
    assert given(browser, send(browser, **job.form)) == f"add --again {options} -- {run} Count"


def test_an_attempt_that_is_open_has_its_settings_in_the_form(browser: Browser, run: Path) -> None:
    begin_again(run, "Count", ["train.steps=300"], {"gate": 0.2})
    page = browser.page("/run/run/add")
    assert ">train.steps=300</textarea>" in page and 'name="gate" inputmode="decimal" value="0.2"' in page
    assert "what it has trained so far is lost" in page


def test_undo_is_said_before_and_confirmed(browser: Browser, run: Path) -> None:
    fields, before = form(browser, "undo"), contents(run)
    assert f"After it: {foretold_undo(run).sentence(run)}" in html.unescape(browser.page("/run/run/add"))
    refused = send(browser, **fields)
    assert refused.status_code == 422 and "expected the tick that confirms it" in fault_of(refused.text)
    assert contents(run) == before and not browser.site.jobs.of("run")
    reply = send(browser, **fields, sure="yes")
    assert given(browser, reply) == f"undo -- {run}"
    assert job_of(browser, reply).title == "take back Count"


def test_what_was_taken_back_is_offered_and_brought_back(browser: Browser, run: Path) -> None:
    assert "Bring back" not in browser.page("/run/run/add")
    undo(run)
    (run / "matrix.json").write_text(json.dumps({"tasks": ["Colours"], "accuracy": [[90.0]]}))
    page = browser.page("/run/run/add")
    assert "The last task: Colours" in page and "has one task, Colours, and no run is left without it" in page
    fields = form(browser, "return")
    assert send(browser, **fields).status_code == 422
    assert given(browser, send(browser, **fields, sure="yes")) == f"add --again -- {run} Count"
    (run / "stages" / "01-Colours" / "COMPLETE").write_text("another")
    refused = send(browser, **fields, sure="yes")
    assert refused.status_code == 422 and "nothing of Count that was taken back fits" in fault_of(refused.text)


def test_a_form_that_foretold_something_else_is_refused(browser: Browser, run: Path) -> None:
    begin_again(run, "Count", ["train.steps=300"], {})
    attempt, again = form(browser, "undo"), form(browser, "learn")
    undo(run)  # by another process
    refused = send(browser, **attempt, sure="yes")
    assert refused.status_code == 409
    assert "the run has changed since this form was shown, and now it would be: Count is taken" in fault_of(
        refused.text
    )
    undo(run)
    refused = send(browser, **again, settings="train.steps=300")
    assert refused.status_code == 409 and "is Colours now, not Count" in fault_of(refused.text)
    assert not browser.site.jobs.of("run")


def test_a_stopped_undo_is_completed_and_never_repeated(browser: Browser, run: Path) -> None:
    job = job_of(browser, send(browser, **form(browser, "undo"), sure="yes"))
    ended(job)
    job.state = "stopped"
    assert 'name="what" value="complete"' in browser.page(f"/job/{job.number}")
    assert given(browser, send(browser, **job.form)) == f"evaluate -- {run}"
    (run / UNDO).write_text("{}")
    assert "An undo was interrupted" in browser.page("/run/run/add")
    assert send(browser, what="learn", task="Count", settings="train.steps=9").status_code == 409
    assert given(browser, send(browser, **job.form)) == f"undo -- {run}"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"what": "learn", "task": "Count"}, "Count would be learned as it was"),
        ({"what": "learn", "task": "Count", "settings": "train.budget=5"}, "'train.budget=5' is no setting of how"),
        ({"what": "learn", "task": "Count", "settings": "--json"}, "'--json' is no setting of how"),
        ({"what": "learn", "task": "Count", "gate": "x"}, "gate is 'x'; expected a number, or nothing."),
        ({"what": "remove", "task": "Count"}, "expected foretell or learn"),
    ],
)
def test_a_wrong_form_is_refused_with_a_sentence_and_starts_nothing(
    browser: Browser, fields: dict[str, str], expected: str
) -> None:
    reply = send(browser, **fields)
    assert reply.status_code in (400, 422) and expected in fault_of(reply.text)
    assert not browser.site.jobs.of("run")


def test_a_run_in_use_and_a_form_without_its_token_are_refused(
    browser: Browser, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the process that holds the lock is a real one
    fields = {**form(browser, "undo"), "sure": "yes"}
    with other_process_holds(run / LOCK):
        assert send(browser, **fields).status_code == 409
    assert browser.client.post("/run/run/last", data=fields, follow_redirects=False).status_code == 403
    assert not browser.site.jobs.of("run")
