"""What all pages have: the templates, the form token, the bodies of requests, and refusals as sentences."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from pipeline.errors import PipelineError

TEMPLATES = Path(__file__).with_name("templates")
STATIC = Path(__file__).with_name("static")
FORM_BYTES = 64 << 10  # most of a form
CSRF_FIELD, CSRF_HEADER = "csrf", "x-csrf-token"
JSON = "application/json"


class PageError(PipelineError):
    """A request is refused with this HTTP status; the message is a sentence for the page."""

    def __init__(self, message: str, status: int = 404) -> None:
        super().__init__(message)
        self.status = status


class Templates:
    """Renders pages; `csrf` is the token that every form of them sends."""

    def __init__(self, csrf: str, runs: Mapping[str, Path]) -> None:
        self.csrf = csrf
        self._environment = Environment(
            loader=FileSystemLoader(TEMPLATES),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters |= {"percent": percent, "spread": spread, "heat": heat, "path": path_part}
        self._environment.globals |= {"query": query, "names": list(runs), "csrf": csrf}

    def page(self, template: str, status: int = 200, **content: Any) -> HTMLResponse:
        """A page; jinja2 raises UndefinedError for a variable that is missing."""
        return HTMLResponse(self._environment.get_template(template).render(content), status)

    def refusal(self, http: Request, message: str, status: int) -> Response:
        """A refusal as a page, or as JSON for a script that asks for it."""
        if http.headers.get("accept", "").startswith(JSON):
            return JSONResponse({"error": message}, status)
        return self.page("refusal.html.j2", status, title="Not possible", message=message)

    def require_token(self, given: str | None) -> None:
        """Raise PageError unless a request that changes something has the token of this server's pages."""
        if given is None or not hmac.compare_digest(given.encode(), self.csrf.encode()):
            raise PageError(
                "The form is not one of this page, or the page was started anew. Reload it and try again.", 403
            )

    async def form(self, http: Request) -> dict[str, str]:
        """The fields of a sent form without their outer spaces; raises PageError without the token."""
        try:
            sent = parse_qs(
                (await body_of(http, FORM_BYTES)).decode("utf-8"), keep_blank_values=True, max_num_fields=50
            )
        except ValueError as error:
            raise PageError(f"The form cannot be read ({error}); expected the fields of this page.", 400) from None
        fields = {name: values[-1].strip() for name, values in sent.items()}
        self.require_token(fields.pop(CSRF_FIELD, None))
        return fields


async def body_of(http: Request, most: int) -> bytes:
    """The body of a request; raises PageError for more than `most` bytes without reading on."""
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > most:
            raise PageError(f"What was sent is larger than {most >> 10} KiB; expected less.", 413)
    return bytes(body)


def query(given: Mapping[str, Any], **changes: Any) -> str:
    """A query string of the given parameters with some changed; parameters without a value are left out."""
    found = {name: value for name, value in {**given, **changes}.items() if value not in (None, "")}
    return f"?{urlencode(found)}" if found else "?"


def path_part(name: str) -> str:
    """A name as one part of an address's path."""
    return quote(name, safe="")


def percent(score: float | None) -> str:
    """A number with one decimal, a dash for none."""
    return "–" if score is None else f"{score:.1f}"


def spread(value: tuple[float, float] | None) -> str:
    """A mean with its standard deviation."""
    return "–" if value is None else f"{value[0]:.1f} ± {value[1]:.1f}"


def heat(score: float | None) -> str:
    """The style sheet's class of a cell with a score in percent, in steps of five."""
    return "" if score is None else f"h{5 * round(min(max(score, 0.0), 100.0) / 5)}"
