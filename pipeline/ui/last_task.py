"""The last task of a run: a further attempt at it, its undoing, and the return of what was undone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from pipeline.config.load import load_run
from pipeline.errors import UserError
from pipeline.methods import make_method
from pipeline.runs.attempts import open_attempt
from pipeline.runs.layout import UNDO
from pipeline.sequence.again import OF_A_STAGE, require_last
from pipeline.sequence.taken_back import kept_tasks
from pipeline.sequence.undo import Undo, foretold_redo, foretold_undo
from pipeline.ui.app import Site
from pipeline.ui.forms import CHOICES, FORETELL, GO_ON, LEARN, choices_of, learning, refuse_in_use
from pipeline.ui.jobs import Job
from pipeline.ui.web import PageError

UNDOES, RETURNS, COMPLETES = "undo", "return", "complete"
SETTING = re.compile(r"train\.(\w+) *=.+")
PLACE = "last"


@dataclass(frozen=True)
class Change:
    """A change of the run that a form offers: what it does in a sentence, and by what a repeated look knows it."""

    task: str
    sentence: str
    foretold: str

    @classmethod
    def of(cls, found: Undo, run: Path) -> Change:
        """The change that `undo` or `redo` foretells."""
        return cls(found.task, found.sentence(run), f"{found.kind}/{found.number}/{found.former}/{found.aside}")


@dataclass(frozen=True)
class LastTask:
    """What can be done with a run's last task now; a fault says why something cannot."""

    name: str = ""
    is_half_undone: bool = False
    again_fault: str = ""
    given: Mapping[str, str] = field(default_factory=dict)  # fields of the form: those of an attempt that is open
    undo: Change | None = None
    undo_fault: str = ""
    returns: Mapping[str, Change] = field(default_factory=dict)  # by task


def look_at(run: Path) -> LastTask:
    """What can be done with the last task of a run; changes nothing."""
    if (run / UNDO).exists():
        return LastTask(is_half_undone=True)
    try:
        recipe = load_run(run)
    except UserError as error:
        return LastTask(again_fault=str(error), undo_fault=str(error))
    names = [task.name for task in recipe.data.tasks]
    again_fault = undo_fault = ""
    undo, returns, given = None, {}, {}
    try:
        if not make_method(recipe.method).has_next_stage:
            raise UserError(f"{run} was made with method {recipe.method.name}, which has one stage for all tasks.")
        found = {task: foretold_redo(run, task) for task in kept_tasks(run, names)}
        returns = {task: Change.of(one, run) for task, one in found.items() if one is not None}
        require_last(run, names, names[-1])
        given = _given(run)
    except UserError as error:
        again_fault = str(error)
    try:
        undo = Change.of(foretold_undo(run), run)
    except UserError as error:
        undo_fault = str(error)
    return LastTask(names[-1], False, again_fault, given, undo, undo_fault, returns)


def _given(run: Path) -> dict[str, str]:
    """The fields of the form for an attempt that is open, with which the same command goes on."""
    attempt = open_attempt(run)
    settings = attempt.settings if attempt is not None else ()
    chosen = dict(text.removeprefix("method.").split("=", 1) for text in settings if text.startswith("method."))
    lines = "\n".join(text for text in settings if not text.startswith("method."))
    return {"settings": lines, **{name: chosen.get(name, "") for name in CHOICES}}


class LastTaskForms:
    """What the forms about the last task start; they are on the page of `add`."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def routes(self) -> list[Route]:
        return [Route(f"/run/{{name}}/{PLACE}", self.start, methods=["POST"])]

    async def start(self, http: Request) -> Response:
        """Start the command that a form asks for, and go to its page."""
        fields = await self.site.templates.form(http)
        job = await run_in_threadpool(self._start, http, fields)
        return RedirectResponse(f"/job/{job.number}", 303)

    def _start(self, http: Request, fields: dict[str, str]) -> Job:
        entry, run = self.site.entry(http), self.site.run(http).path
        refuse_in_use(entry)
        last, what, task = look_at(run), fields.get("what", ""), fields.get("task", "")
        rest = {"what": COMPLETES}
        if what == COMPLETES:
            words = ["undo" if last.is_half_undone else "evaluate", "--", str(run)]
            return self.site.jobs.start(Job(0, entry.name, "complete", [words], rest, "Go on", True, PLACE))
        if last.is_half_undone:
            raise PageError(f"an undo of {entry.name} was interrupted; complete it first.", 409)
        if what == UNDOES:
            _require(last.undo, fields, last.undo_fault)
            words, title = ["undo", "--", str(run)], f"take back {task}"
        elif what == RETURNS:
            _require(last.returns.get(task), fields, f"nothing of {task} that was taken back fits the run.")
            words, title = ["add", "--again", "--", str(run), task], f"bring back {task}"
        else:
            return self._again(entry.name, run, last, fields)
        return self.site.jobs.start(Job(0, entry.name, title, [words], rest, "Go on", True, PLACE))

    def _again(self, name: str, run: Path, last: LastTask, fields: dict[str, str]) -> Job:
        learns, task = learning(fields), fields.get("task", "")
        if last.again_fault:
            raise PageError(last.again_fault, 422)
        if task != last.name:
            raise PageError(f"the last task of {name} is {last.name} now, not {task}; look at the form again.", 409)
        settings, choices = _settings(fields.get("settings", "")), choices_of(fields)
        if not settings and not choices:
            raise PageError(f"{task} would be learned as it was; expected a setting, gate or share that differs.", 422)
        options = [f"--set={text}" for text in settings] + [f"--{key}={value}" for key, value in choices.items()]
        words = ["add", "--again", *options, *([] if learns else ["--dry-run"]), "--", str(run), task]
        form = {"task": task, "settings": "\n".join(settings), **choices, "what": LEARN}
        button = f"{GO_ON} {task}" if learns else f"Learn {task} again"
        title = f"{LEARN if learns else FORETELL} {task} again"
        return self.site.jobs.start(Job(0, name, title, [words], form, button, learns, PLACE))


def _require(now: Change | None, fields: dict[str, str], fault: str) -> None:
    """Raise PageError unless a form was confirmed and foretold what would be done now; `fault`: why nothing would."""
    if now is None:
        raise PageError(fault, 422)
    if (now.task, now.foretold) != (fields.get("task"), fields.get("foretold")):
        raise PageError(f"the run has changed since this form was shown, and now it would be: {now.sentence}", 409)
    if not fields.get("sure"):
        raise PageError(f"expected the tick that confirms it. After it: {now.sentence}", 422)


def _settings(text: str) -> list[str]:
    """The lines of settings; PageError for one that is none of how a stage is trained."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        found = SETTING.fullmatch(line)
        if found is None or found[1] not in OF_A_STAGE:
            raise PageError(
                f"'{line[:40]}' is no setting of how a stage is trained; expected lines such as train.lr_prompt=3e-3, "
                f"with one of {', '.join(OF_A_STAGE)}.",
                422,
            )
    return lines
