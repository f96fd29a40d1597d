"""The chat about a picture: pictures that are sent, questions, and answers with the sets that were chosen."""

from __future__ import annotations

import json
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.runs.layout import COMPLETE, STAGES
from pipeline.ui.app import KEPT_BRIEFLY, Site
from pipeline.ui.boxes import answered_frames, unit_of
from pipeline.ui.examples import Evaluation, shown_sets
from pipeline.ui.pictures import LARGE, MOST_BYTES, file_for_browser
from pipeline.ui.predictions import Unready
from pipeline.ui.web import CSRF_HEADER, FORM_BYTES, PageError, body_of

MOST_QUESTION = 4000  # characters


class Chat:
    """The pages of the chat."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def routes(self) -> list[Route]:
        return [
            Route("/run/{name}/chat", self.page),
            Route("/run/{name}/chat", self.ask, methods=["POST"]),
            Route("/sent", self.send, methods=["POST"]),
            Route("/sent/{picture}", self.sent),
        ]

    def page(self, http: Request) -> Response:
        """The chat, with a test sample's picture and question where the address names one."""
        entry, given = self.site.entry(http), http.query_params
        run, picture, question = self.site.run(http), "", ""
        if given.get("row", "").isdecimal():
            evaluation = Evaluation(run, self.site.predictions, given.get("stage", ""))
            try:
                item = evaluation.item(given.get("task", ""), int(given["row"][:12]))
            except Unready as unready:
                raise PageError(f"{unready}; reload the page.", 503) from None
            sample = self.site.samples.sample(run, item["task"], item["row"], item["id"])
            question = item["question"]
            picture = self.site.sent.add(sample.image) if sample and sample.image else ""
        return self.site.templates.page(
            "chat.html.j2",
            title=f"Ask {entry.name}",
            name=entry.name,
            run=run,
            picture=picture,
            question=question,
            finished=any(run.path.glob(f"{STAGES}/*/{COMPLETE}")) or run.learned_nothing,
            loaded=self.site.answering.loaded(entry.path),
            most_bytes=MOST_BYTES,
            most_question=MOST_QUESTION,
        )

    async def send(self, http: Request) -> Response:
        """Keep a picture that a person has chosen, and return its name."""
        self.site.templates.require_token(http.headers.get(CSRF_HEADER))
        encoded = await body_of(http, MOST_BYTES)
        return JSONResponse({"picture": await run_in_threadpool(self.site.sent.add, encoded)})

    def sent(self, http: Request) -> Response:
        """A picture that was sent, written anew."""
        content, kind = file_for_browser(self.site.sent.get(http.path_params["picture"]), LARGE)
        return Response(content, media_type=kind, headers=KEPT_BRIEFLY)

    async def ask(self, http: Request) -> Response:
        """The answer to a question as JSON."""
        self.site.templates.require_token(http.headers.get(CSRF_HEADER))
        try:
            asked = json.loads(await body_of(http, FORM_BYTES))
            question, picture, task = (asked.get(name) or "" for name in ("question", "picture", "task"))
        except (ValueError, AttributeError):
            raise PageError("expected a JSON object with question, picture and task.", 400) from None
        if not all(isinstance(value, str) for value in (question, picture, task)):
            raise PageError("expected texts as question, picture and task.", 400)
        return JSONResponse(await run_in_threadpool(self._answer, http, question.strip(), picture, task))

    def _answer(self, http: Request, question: str, picture: str, task: str) -> dict[str, Any]:
        if not 0 < len(question) <= MOST_QUESTION:
            raise PageError(f"the question has {len(question)} characters; expected 1 to {MOST_QUESTION}.", 400)
        entry, run = self.site.entry(http), self.site.run(http)
        encoded = self.site.sent.get(picture) if picture else None
        found = self.site.answering.ask(entry.path, question, encoded, task or None)
        frames = []
        if encoded and found["selected"]:  # the box counts as in the task whose set is next to the question
            unit = unit_of(self.site.samples, run, found["selected"][-1])
            frames = answered_frames(unit, encoded, found["answer"])
        probability, weights = found.get("probability") or {}, found.get("weights")
        return {
            "answer": found["answer"],
            "unfamiliar": found.get("unfamiliar") is True,
            "sets": shown_sets(found["selected"], found["similarity"], probability, weights),
            "frames": [vars(frame) for frame in frames],
        }
