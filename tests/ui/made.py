"""A made run with pictures and boxes, and a browser's client of its page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from starlette.testclient import TestClient

from data_prep.shards import write_shards
from pipeline.config.paths import PROJECT
from pipeline.data.sample import Sample
from pipeline.ui.app import Site
from pipeline.ui.server import app_of, site_of
from tests import tiny
from tests.report.test_report import TASKS, make_run

TOKEN = "the-token"
PORT = 80
BOX, MOVED = "[10,20,60,70]", "[90,90,100,100]"  # percent of the sides; pictures have fewer pixels


def run_with_pictures(folder: Path, name: str = "small-s3", **changes: Any) -> Path:
    """A finished run whose test data is here; in `boxes` answers are boxes, and its first sample is misrouted."""
    prepared = folder / f"data-{name}"
    for number, task in enumerate(TASKS):
        boxes = task == "boxes"
        samples = [
            Sample(f"{task}-{n}", tiny.png((60 * n, 90 * number, 200), 32), f"question {n}", BOX if boxes else "red")
            for n in range(4)
        ]
        write_shards(partial(_from, samples), prepared / task / "test", 10, "made", task, "test")
    run = make_run(folder / name, prepared=str(prepared), **{"status": "done", **changes})
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["tasks"] = [{"name": task, "metric": "iou" if task == "boxes" else "exact"} for task in TASKS]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    change_lines(
        run / "eval" / "after-03" / "boxes.jsonl",
        lambda n, line: {
            **line,
            "answer": BOX,
            "prediction": MOVED if n == 0 else BOX,
            "similarity": [0.8, 0.1, 0.4] if n == 0 else line["similarity"],
        },
    )
    return run


def _from(samples: Sequence[Sample], start: int) -> Iterator[Sample]:
    return iter(samples[start:])


def change_lines(path: Path, change: Any) -> None:
    """Rewrite a file of predictions, line by line."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(change(number, line)) for number, line in enumerate(lines)) + "\n")


class Browser:
    """A client that has opened the printed address, and sends the forms of its pages."""

    def __init__(self, *runs: Path, site: Site | None = None) -> None:
        self.site = site or site_of(runs)
        self.client = TestClient(
            app_of(self.site, TOKEN, PORT), base_url="http://127.0.0.1", raise_server_exceptions=False
        )
        assert self.client.get(f"/?token={TOKEN}").status_code == 200

    @property
    def csrf(self) -> str:
        found = re.search(r'name="csrf" content="([^"]+)"', self.page("/"))
        assert found is not None
        return found[1]

    def page(self, address: str, status: int = 200) -> str:
        """The text of a page, which has to have this status."""
        reply = self.client.get(address)
        assert reply.status_code == status, reply.text
        return reply.text

    def fault(self, address: str, status: int) -> str:
        """The sentence of a refused page."""
        return fault_of(self.page(address, status))

    def send(self, address: str, **fields: str) -> Any:
        """Send a form with its token; redirects are not followed."""
        return self.client.post(address, data={"csrf": self.csrf, **fields}, follow_redirects=False)

    def ask(self, run: str, **fields: Any) -> Any:
        """Send a question as the script does."""
        headers = {"x-csrf-token": self.csrf, "accept": "application/json"}
        return self.client.post(f"/run/{run}/chat", json=fields, headers=headers)


def fault_of(text: str) -> str:
    found = re.search(r'<p class="fault" role="alert">(.*?)</p>', text, re.DOTALL)
    assert found is not None, text
    return found[1].replace("&#39;", "'").replace("&lt;", "<").replace("&gt;", ">")


@contextmanager
def other_process_holds(lock: Path) -> Iterator[int]:
    """Another process holds a lock; yields its id."""
    program = (
        "import sys; from pathlib import Path; from pipeline.files.lock import FileLock\n"
        "lock = FileLock(Path(sys.argv[1])); assert lock.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(lock)],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process.pid
    finally:
        process.communicate()
