"""The web application of the labelling page.

Other pages and users of the machine are kept out: the address has a token, requests by another host name or from the
origin of another page are refused, and the page loads nothing but itself.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from pipeline.clip.labelling.answers import Answers, OtherQuestion
from pipeline.errors import UserError

PAGE = Path(__file__).with_name("page.html")
NONCE_MARK = "{{nonce}}"
HOSTS = ["127.0.0.1", "localhost"]
MOST_BODY = 4096  # bytes of a request: one answer


class LabellingPage:
    """The page of one run.

    Args:
        answers: the run's answers.
        token: part of every address; without it nothing is served.
        done: called when the person says that all images are labelled.
    """

    def __init__(self, answers: Answers, token: str, done: Callable[[], None]) -> None:
        self.answers, self.token, self.done = answers, token, done

    def app(self) -> Starlette:
        """The application for an ASGI server."""
        routes = [
            Route("/{token}/", self._page),
            Route("/{token}/state", self._state),
            Route("/{token}/picture/{question}/{number:int}", self._picture),
            Route("/{token}/answer", self._answer, methods=["POST"]),
            Route("/{token}/done", self._done, methods=["POST"]),
        ]
        return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)])

    def _refused(self, http: Request) -> Response | None:
        """The refusal of a request without the token, or, if it changes something, from another page; else None."""
        if not hmac.compare_digest(http.path_params["token"].encode(), self.token.encode()):
            return JSONResponse({"error": "the address is not that of this page"}, 404)
        if http.method != "POST":
            return None
        origin = http.headers.get("origin")
        if origin is not None and origin != f"http://{http.headers.get('host', '')}":
            return JSONResponse({"error": "requests of other pages are refused"}, 403)
        if http.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return JSONResponse({"error": "expected application/json"}, 415)
        return None

    async def _page(self, http: Request) -> Response:
        refused = self._refused(http)
        if refused is not None:
            return refused
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src 'nonce-{nonce}'"
        headers = {
            "content-security-policy": f"{policy}; style-src 'nonce-{nonce}'; frame-ancestors 'none'; base-uri 'none'",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            "cache-control": "no-store",
        }
        return HTMLResponse(PAGE.read_text("utf-8").replace(NONCE_MARK, nonce), headers=headers)

    async def _state(self, http: Request) -> Response:
        refused = self._refused(http)
        return refused if refused is not None else await self._reply(self.answers.state)

    async def _picture(self, http: Request) -> Response:
        refused = self._refused(http)
        if refused is not None:
            return refused
        path = self.answers.picture(http.path_params["question"], http.path_params["number"])
        if path is None or not path.is_file():
            return JSONResponse({"error": "there is no such picture"}, 404)
        return FileResponse(path, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})

    async def _answer(self, http: Request) -> Response:
        refused = self._refused(http)
        if refused is not None:
            return refused
        content = await _body(http)
        match content:
            case {"question": str(question), "number": int(number), "label": str() | None as label}:
                return await self._reply(lambda: self.answers.answer(question, number, label))
        return JSONResponse({"error": "expected question, number and label"}, 400)

    async def _done(self, http: Request) -> Response:
        refused = self._refused(http)
        if refused is not None:
            return refused
        waiting = self.answers.waiting()
        if waiting:
            return JSONResponse({"error": f"{waiting} images have no answer yet"}, 409)
        self.done()
        return JSONResponse({})

    @staticmethod
    async def _reply(work: Callable[[], Any]) -> Response:
        try:
            return JSONResponse(await run_in_threadpool(work), headers={"cache-control": "no-store"})
        except OtherQuestion as error:
            return JSONResponse({"error": str(error)}, 409)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 422)


async def _body(http: Request) -> Any:
    """The JSON of a request's body; None where it is none or too long."""
    body = b""
    async for part in http.stream():
        body += part
        if len(body) > MOST_BODY:
            return None
    try:
        return json.loads(body)
    except ValueError:
        return None
