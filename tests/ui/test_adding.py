"""The start of `add`: what the form asks for, the commands that are run, their output, and their end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.ui import jobs as module
from pipeline.ui.jobs import Job, Jobs
from tests.ui.made import Browser, fault_of, run_with_pictures

WAIT_S = 60.0
# Stands for `python -m pipeline`: says what it was given, and waits for a signal where the task's name says so.
PROGRAM = """
import signal, sys, time
print("given", *sys.argv[1:], flush=True)
if "waits" in sys.argv[-1]:
    signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(75)))
    if "deaf" in sys.argv[-1]:
        signal.signal(signal.SIGTERM, lambda *_: print("heard", flush=True))
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
sys.exit(2 if "wrong" in sys.argv[-1] else 0)
"""


def run_by_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the program above run the commands of pages."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    popen = module.subprocess.Popen

    def instead(words: list[str], **options: Any) -> Any:
        assert words[:3] == [sys.executable, "-m", "pipeline"]
        return popen([sys.executable, str(program), *words[3:]], **options)

    monkeypatch.setattr(module.subprocess, "Popen", instead)


@pytest.fixture
def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Browser]:
    """A page whose commands are run by the program above."""
    run_by_the_program(tmp_path, monkeypatch)
    for name in ("photos", "own/instructions/Shelf", "own/instructions/waits", "own/instructions/waits_deaf"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "own" / "instructions" / "wrong").mkdir()
    (tmp_path / "shelf.csv").write_text("image,question,answer\n")
    browser = Browser(run_with_pictures(tmp_path))
    yield browser
    browser.site.close()


def until(condition: Any) -> None:
    end = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def job_of(browser: Browser, reply: Any) -> Job:
    assert reply.status_code == 303, reply.text
    return browser.site.jobs.get(int(reply.headers["location"].removeprefix("/job/")))


def ended(job: Job) -> tuple[str, int | None, str]:
    until(lambda: job.state != "running")
    return job.state, job.code, job.read(0)[0]


def add(browser: Browser, folder: Path, **fields: str) -> Any:
    return browser.send("/run/small-s3/add", **{"root": str(folder / "own"), "what": "foretell", **fields})


def test_a_task_of_a_folder_is_made_foretold_and_then_learned(browser: Browser, tmp_path: Path) -> None:
    images, table = str(tmp_path / "photos"), str(tmp_path / "shelf.csv")
    fields = {"task": "New", "images": images, "table": table, "metric": "contains", "gate": "0.05"}
    fields |= {"columns": "image=Photo,question=What to ask", "sheet": "first"}
    job = job_of(browser, add(browser, tmp_path, **fields))
    state, code, text = ended(job)
    root, run = tmp_path / "own", tmp_path / "small-s3"
    assert (state, code) == ("done", 0)
    assert [line for line in text.splitlines() if line.startswith("given")] == [
        f"given new-task --images={images} --samples={table} --columns=image=Photo,question=What to ask --sheet=first "
        f"--root={root} --metric=contains -- New",
        f"given add --root={root} --gate=0.05 --dry-run -- {run} New",
    ]
    page = browser.page(f"/job/{job.number}")
    assert "Learn New" in page and 'name="gate" value="0.05"' in page and 'name="what" value="learn"' in page
    learned = job_of(browser, add(browser, tmp_path, task="Shelf", what="learn"))
    assert ended(learned)[2].splitlines()[-1] == f"given add --root={root} -- {run} Shelf"
    assert "foretell New</a>: done" in browser.page("/run/small-s3/add")


def test_what_follows_a_command_that_failed_is_not_run(browser: Browser, tmp_path: Path) -> None:
    job = job_of(browser, add(browser, tmp_path, task="wrong", what="learn"))
    assert ended(job)[:2] == ("failed", 2) and "exit code 2" in browser.page(f"/job/{job.number}")
    fields = {"task": "wrong", "images": str(tmp_path / "photos"), "table": str(tmp_path / "shelf.csv")}
    foretold = job_of(browser, add(browser, tmp_path, **fields))
    assert "given add" not in ended(foretold)[2]
    page = browser.page(f"/job/{foretold.number}")
    assert "Back to the form" in page and "Learn wrong" not in page


def test_a_job_is_stopped_and_its_output_can_be_followed(browser: Browser, tmp_path: Path) -> None:
    job = job_of(browser, add(browser, tmp_path, task="waits", what="learn"))
    until(lambda: "ready" in job.read(0)[0])
    headers = {"accept": "application/json"}
    first = browser.client.get(f"/job/{job.number}", headers=headers).json()
    assert first["state"] == "running" and first["text"].endswith("ready\n")
    other = add(browser, tmp_path, task="Shelf", what="learn")
    assert other.status_code == 409 and "is still running" in other.text
    assert browser.send(f"/job/{job.number}/stop", what="stop").status_code == 303
    assert ended(job)[:2] == ("stopped", 75)
    rest = browser.client.get(f"/job/{job.number}?from={first['next']}", headers=headers).json()
    assert (rest["text"], rest["state"], rest["code"]) == ("saved\n", "stopped", 75)
    assert "Go on with waits" in browser.page(f"/job/{job.number}")


def test_a_command_that_does_not_stop_can_be_ended(browser: Browser, tmp_path: Path) -> None:
    job = job_of(browser, add(browser, tmp_path, task="waits_deaf", what="learn"))
    until(lambda: "ready" in job.read(0)[0])
    assert "End it at once" not in browser.page(f"/job/{job.number}")
    browser.send(f"/job/{job.number}/stop", what="stop")
    until(lambda: "heard" in job.read(0)[0])
    assert "End it at once" in browser.page(f"/job/{job.number}")
    browser.send(f"/job/{job.number}/stop", what="kill")
    assert ended(job)[0] == "stopped"


def test_the_end_of_the_page_stops_its_commands(tmp_path: Path, browser: Browser) -> None:
    job = job_of(browser, add(browser, tmp_path, task="waits", what="learn"))
    until(lambda: "ready" in job.read(0)[0])
    browser.site.jobs.close()
    assert (job.state, job.code) == ("stopped", 75) and not job.output.exists()
    assert job.process is not None
    with pytest.raises(ProcessLookupError):
        os.kill(job.process.pid, 0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"task": ""}, "'' cannot name a task; expected letters"),
        ({"task": "--help"}, "'--help' cannot name a task"),
        ({"task": "../x"}, "'../x' cannot name a task"),
        ({"task": "Absent"}, "Absent' does not exist; give a folder of images and a table"),
        ({"task": "New", "images": "/photos"}, "one of folder of images and table is missing"),
        ({"task": "New", "images": "/absent", "table": "shelf.csv"}, "'/absent' is no folder"),
        ({"task": "New", "images": "/", "table": "/absent.csv"}, "'/absent.csv' is no file"),
        ({"task": "Shelf", "gate": "--share"}, "gate is '--share'; expected a number, or nothing."),
        ({"task": "Shelf", "root": "~nobody-here/x"}, "begins with the home folder of a user"),
        ({"task": "Shelf", "what": "remove"}, "expected foretell or learn"),
    ],
)
def test_a_wrong_form_is_refused_with_a_sentence_and_starts_nothing(
    browser: Browser, tmp_path: Path, fields: dict[str, str], expected: str
) -> None:
    reply = add(browser, tmp_path, **fields)
    assert reply.status_code in (400, 422) and expected in fault_of(reply.text)
    assert not browser.site.jobs.of("small-s3")


def test_there_is_no_job_that_was_not_started(browser: Browser) -> None:
    assert "there is no job 7" in browser.fault("/job/7", 404)


def test_an_output_is_read_in_whole_characters(tmp_path: Path) -> None:
    job = Job(1, "run", "title", [], {}, "button", False, output=tmp_path / "output")
    content = ("é€😀" * 9 + "\n").encode()
    job.output.write_bytes(content)
    found, at = "", 0
    for size in range(1, len(content) + 4):
        job.output.write_bytes(content[:size])
        text, at = job.read(at)
        found += text
    assert found.encode() == content and at == len(content)
    job.output.write_bytes(b"\xff\xfe broken")
    assert job.read(0) == ("\ufffd\ufffd broken", 9)


def test_jobs_of_two_runs_run_side_by_side() -> None:
    jobs = Jobs()
    first, second = (jobs.start(Job(0, run, "t", [], {}, "b", True)) for run in ("a", "b"))
    until(lambda: first.state != "running" != second.state)
    assert [job.number for job in (first, second)] == [1, 2] and jobs.of("b") == [second]
    jobs.close()
