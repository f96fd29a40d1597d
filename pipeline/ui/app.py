"""The web application: its state, its routes, and the pages of runs and examples."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import Route

from pipeline.errors import PipelineError, for_user
from pipeline.runs.folder import RunFolder
from pipeline.runs.layout import REPORT
from pipeline.runs.rows import matrix_rows
from pipeline.sequence.verdict import lines_of
from pipeline.ui import tables
from pipeline.ui.answering import Answering
from pipeline.ui.boxes import frames, unit_of
from pipeline.ui.examples import SHOWN, Evaluation, Wanted
from pipeline.ui.figures import FIGURES, Drawings
from pipeline.ui.guard import Guard
from pipeline.ui.jobs import Jobs
from pipeline.ui.pictures import LARGE, SMALL, Samples, SentPictures, file_for_browser
from pipeline.ui.predictions import Predictions, Unready
from pipeline.ui.runs import Entry, look, sequence_of
from pipeline.ui.web import STATIC, PageError, Templates

HOSTS = ["127.0.0.1", "localhost"]
STATIC_FILES = {"ui.css": "text/css", "ui.js": "text/javascript"}
# The report is one file with its own styles; scripts, which it has none of, would not run.
REPORT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox"
KEPT_BRIEFLY = {"cache-control": "private, max-age=600"}


@dataclass(frozen=True)
class Site:
    """The state of the server: the runs by name, and what was read, drawn, sent, loaded and started so far."""

    runs: Mapping[str, Path]
    templates: Templates
    predictions: Predictions = field(default_factory=Predictions)
    samples: Samples = field(default_factory=Samples)
    drawings: Drawings = field(default_factory=Drawings)
    sent: SentPictures = field(default_factory=SentPictures)
    answering: Answering = field(default_factory=Answering)
    jobs: Jobs = field(default_factory=Jobs)

    def entry(self, http: Request) -> Entry:
        """The run that an address names; PageError where the page has none of that name."""
        name = http.path_params["name"]
        if name not in self.runs:
            raise PageError(f"this page has no run '{name}'; expected one of: {', '.join(self.runs)}.")
        return look(name, self.runs[name])

    def run(self, http: Request) -> RunFolder:
        """The sequence's run that an address names; PageError for anything else."""
        return sequence_of(self.entry(http))

    def evaluation(self, http: Request) -> Evaluation:
        """The evaluation that an address names, by default the last one of the run."""
        return Evaluation(self.run(http), self.predictions, http.query_params.get("stage", ""))

    def close(self) -> None:
        """End what was started."""
        self.jobs.close()
        self.answering.close()
        self.predictions.close()


class Pages:
    """Pages that show something and change nothing; Starlette calls them in threads."""

    def __init__(self, site: Site) -> None:
        self.site, self.templates = site, site.templates

    def routes(self) -> list[Route]:
        return [
            Route("/", self.home),
            Route("/static/{file}", self.static),
            Route("/course/{group:int}.svg", self.course),
            Route("/run/{name}/", self.run),
            Route("/run/{name}", self.with_slash),
            Route("/run/{name}/report", self.report),
            Route("/run/{name}/figure/{figure}.svg", self.figure),
            Route("/run/{name}/examples", self.examples),
            Route("/run/{name}/picture", self.picture),
        ]

    def home(self, http: Request) -> Response:
        """All runs side by side."""
        entries = [look(name, path) for name, path in self.site.runs.items()]
        runs = [entry.run for entry in entries if entry.run is not None]
        return self.templates.page(
            "home.html.j2",
            title="Runs",
            entries=entries,
            groups=[
                {**tables.side_by_side(group), "drawn": self.site.drawings.svg("course", group) is not None}
                for group in tables.comparable(runs)
            ],
            settings=tables.differing({e.name: e.run.config for e in entries if e.run is not None}),
            compared=[entry.name for entry in entries if entry.run is not None],
        )

    def static(self, http: Request) -> Response:
        """The style sheet and the script."""
        name = http.path_params["file"]
        if name not in STATIC_FILES:
            raise PageError(f"there is no file '{name}'.")
        return FileResponse(STATIC / name, media_type=STATIC_FILES[name], headers={"cache-control": "no-cache"})

    def with_slash(self, http: Request) -> Response:
        """`/run/NAME` is meant as `/run/NAME/`, from which the page's links start."""
        self.site.entry(http)
        return RedirectResponse(http.url.path + "/", 307)

    def run(self, http: Request) -> Response:
        """One run: verdict, headline numbers, matrix, curves and routing."""
        entry = self.site.entry(http)
        common: dict[str, Any] = {"title": entry.name, "entry": entry, "report": (entry.path / REPORT).is_file()}
        if entry.run is None:
            return self.templates.page("other_run.html.j2", **common)
        run, waits = entry.run, ""
        evaluation, shares = Evaluation(run, self.site.predictions), dict(run.confusion)
        if not shares:
            try:
                shares = evaluation.confusion()
            except Unready as unready:
                waits = str(unready)
        return self.templates.page(
            "run.html.j2",
            **common,
            run=run,
            waits=waits,
            verdict=lines_of(run),
            tiles=tables.tiles(run),
            facts=tables.facts(run),
            matrix=matrix_rows(run),
            confusion=tables.confusion_rows(run.tasks, run.set_names, shares),
            figures={name: text for name, (_, text) in FIGURES.items() if self.site.drawings.svg(name, [run])},
            tracked=tables.tracked(run),
            has_examples=bool(evaluation.stages),
        )

    def report(self, http: Request) -> Response:
        """The run's report, as `run` has written it."""
        entry = self.site.entry(http)
        if not (entry.path / REPORT).is_file():
            raise PageError(f"{entry.name} has no report yet; `python -m pipeline report {entry.path}` writes it.")
        return FileResponse(entry.path / REPORT, headers={"content-security-policy": REPORT_POLICY})

    def course(self, http: Request) -> Response:
        """The curves of the runs that have one list of tasks."""
        entries = [look(name, path) for name, path in self.site.runs.items()]
        groups = tables.comparable([entry.run for entry in entries if entry.run is not None])
        number = http.path_params["group"]
        return self._svg("course", groups[number] if number < len(groups) else [])

    def figure(self, http: Request) -> Response:
        """A figure of one run."""
        name = http.path_params["figure"]
        if name not in FIGURES:
            raise PageError(f"there is no figure '{name}'; expected one of: {', '.join(FIGURES)}.")
        return self._svg(name, [self.site.run(http)])

    def _svg(self, name: str, runs: list[RunFolder]) -> Response:
        drawn = self.site.drawings.svg(name, runs) if runs else None
        if drawn is None:
            raise PageError("there is nothing to draw yet.")
        policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return Response(drawn, media_type="image/svg+xml", headers=policy)

    def examples(self, http: Request) -> Response:
        """Predictions with filters, a page of them at a time."""
        evaluation, wanted = self.site.evaluation(http), Wanted.of(http.query_params)
        run, content, waits = evaluation.run, None, ""
        try:
            content = evaluation.find(wanted)
        except Unready as unready:
            waits = str(unready)
        except OSError as error:
            raise PageError(
                f"the predictions cannot be read ({error.strerror}); evaluate the run again.", 422
            ) from None
        items = content.items if content else []
        units = {task: unit_of(self.site.samples, run, task) for task in {item["task"] for item in items}}
        for item in items:
            sample = self.site.samples.sample(run, item["task"], item["row"], item["id"])
            item["picture"] = sample is not None and sample.image is not None
            item["frames"] = frames(units[item["task"]], sample, item["prediction"])
        return self.templates.page(
            "examples.html.j2",
            title=f"Examples of {http.path_params['name']}",
            name=http.path_params["name"],
            run=run,
            evaluation=evaluation,
            stage=evaluation.stage,
            wanted=wanted,
            given=wanted.fields(),
            shown=SHOWN,
            found=content,
            waits=waits,
        )

    def picture(self, http: Request) -> Response:
        """The picture of a test sample, small or, with `large`, by itself."""
        evaluation, given = self.site.evaluation(http), http.query_params
        task, row = given.get("task", ""), given.get("row", "")
        if not (row.isascii() and row.isdigit() and len(row) <= 12):
            raise PageError(f"row is '{row[:20]}'; expected a whole number.", 400)
        try:
            item = evaluation.item(task, int(row))
        except Unready as unready:
            raise PageError(f"{unready}; ask again.", 503) from None
        sample = self.site.samples.sample(evaluation.run, task, int(row), item["id"])
        if sample is None or sample.image is None:
            raise PageError("the prepared data of this run is not on this machine, or the sample has no picture.")
        content, kind = file_for_browser(sample.image, LARGE if "large" in given else SMALL)
        return Response(content, media_type=kind, headers=KEPT_BRIEFLY)


def application(site: Site, token: str, cookie: str, routes: list[Route]) -> Starlette:
    """The application for an ASGI server; `routes` are those of the pages that change something."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        site.close()

    def refused(http: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return site.templates.refusal(
                http, f"there is nothing at this address ({error.detail}).", error.status_code
            )
        if isinstance(error, OSError):  # such as a file that was removed while it was read
            return site.templates.refusal(http, f"a file of the run cannot be read ({error.strerror}); try again.", 500)
        shown = for_user(error)
        if shown is None:
            return site.templates.refusal(http, "the page has a fault, which stands in the terminal.", 500)
        return site.templates.refusal(http, str(shown), error.status if isinstance(error, PageError) else 422)

    return Starlette(
        routes=[*Pages(site).routes(), *routes],
        lifespan=lifespan,
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS),
            Middleware(Guard, token=token, cookie=cookie),
        ],
        exception_handlers={HTTPException: refused, PipelineError: refused, OSError: refused, Exception: refused},
    )
