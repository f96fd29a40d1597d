"""The start of `add`: a form, what the new task is foretold to do, and the output of the commands."""

from __future__ import annotations

import re
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from pipeline.config.base import NAME_LETTERS, NAME_PATTERN
from pipeline.files.paths import expanded
from pipeline.metrics.scoring import metric_names
from pipeline.ui.app import Site
from pipeline.ui.forms import FORETELL, GO_ON, LEARN, choices_of, learning, refuse_in_use
from pipeline.ui.jobs import Job, stop
from pipeline.ui.last_task import look_at
from pipeline.ui.web import JSON, PageError

ROOT = "data/own"  # as `new-task` and `add` have it


class Adding:
    """The pages of `add`."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def routes(self) -> list[Route]:
        return [
            Route("/run/{name}/add", self.page),
            Route("/run/{name}/add", self.start, methods=["POST"]),
            Route("/job/{number:int}", self.job),
            Route("/job/{number:int}/stop", self.stop, methods=["POST"]),
        ]

    def page(self, http: Request) -> Response:
        """The form."""
        entry, run = self.site.entry(http), self.site.run(http)
        return self.site.templates.page(
            "add.html.j2",
            title=f"Add a task to {entry.name}",
            name=entry.name,
            run=run,
            writer=entry.writer,
            jobs=self.site.jobs.of(entry.name),
            root=ROOT,
            metrics=metric_names(),
            last=look_at(run.path),
            letters=NAME_LETTERS,
            pattern=NAME_PATTERN.removeprefix("^").removesuffix("$"),
        )

    async def start(self, http: Request) -> Response:
        """Start the commands that a form asks for, and go to their page."""
        fields = await self.site.templates.form(http)
        job = await run_in_threadpool(self._start, http, fields)
        return RedirectResponse(f"/job/{job.number}", 303)

    def _start(self, http: Request, fields: dict[str, str]) -> Job:
        entry, run = self.site.entry(http), self.site.run(http)
        learns = learning(fields)
        refuse_in_use(entry)
        task, root = fields.get("task", ""), expanded(fields.get("root") or ROOT)
        if not re.fullmatch(NAME_PATTERN, task):
            raise PageError(f"'{task}' cannot name a task; expected {NAME_LETTERS}.", 422)
        choices = choices_of(fields)
        options = [f"--root={root}", *(f"--{name}={value}" for name, value in choices.items())]
        add = ["add", *options, *([] if learns else ["--dry-run"]), "--", str(run.path), task]
        commands = [*_new_task(fields, task, root), add]
        title = f"{LEARN if learns else FORETELL} {task}"
        form, button = {"task": task, "root": root, **choices, "what": LEARN}, f"{GO_ON if learns else 'Learn'} {task}"
        return self.site.jobs.start(Job(0, entry.name, title, commands, form, button, learns))

    def job(self, http: Request) -> Response:
        """The output so far as a page, or from a byte on as JSON."""
        job, start = self.site.jobs.get(http.path_params["number"]), http.query_params.get("from", "0")
        if http.headers.get("accept", "").startswith(JSON):
            state, code = job.state, job.code  # before the output, whose end may be written in between
            text, following = job.read(int(start) if start.isdecimal() and len(start) < 16 else 0)
            return JSONResponse({"text": text, "next": following, "state": state, "code": code})
        state, code = job.state, job.code
        text, following = job.read(0)
        return self.site.templates.page(
            "job.html.j2",
            title=f"{job.title}: {job.run}",
            job=job,
            text=text,
            following=following,
            state=state,
            code=code,
        )

    async def stop(self, http: Request) -> Response:
        """Ask the command of a job to stop, or kill it."""
        fields = await self.site.templates.form(http)
        job = self.site.jobs.get(http.path_params["number"])
        await run_in_threadpool(stop, job, fields.get("what") == "kill")
        return RedirectResponse(f"/job/{job.number}", 303)


def _new_task(fields: dict[str, str], task: str, root: str) -> list[list[str]]:
    """The command that makes the task of a folder and a table; none where the form names neither."""
    images, table = fields.get("images", ""), fields.get("table", "")
    if not images and not table:
        folder = Path(root) / "instructions" / task
        if not folder.is_dir():
            raise PageError(
                f"'{folder}' does not exist; give a folder of images and a table to make the task of, or the root of "
                "one that `new-task` has made.",
                422,
            )
        return []
    if not (images and table):
        raise PageError(
            "one of folder of images and table is missing; expected both, or neither for a task that is there.", 422
        )
    images, table = expanded(images), expanded(table)
    if not Path(images).is_dir():
        raise PageError(f"'{images}' is no folder; expected the one that the table's image paths start at.", 422)
    if not Path(table).is_file():
        raise PageError(f"'{table}' is no file; expected a table with image, question and answer.", 422)
    metric = fields.get("metric") or "exact_ci"
    named = [f"--{name}={fields[name]}" for name in ("columns", "sheet") if fields.get(name)]
    options = [f"--images={images}", f"--samples={table}", *named, f"--root={root}", f"--metric={metric}"]
    return [["new-task", *options, "--", task]]
