"""Who is let in: the browser that opened the printed address, and no page but the server's own.

The address has a token, which a cookie keeps from then on, so addresses of pages can be kept as bookmarks. Other users
of the machine do not have it: they could otherwise start `add` as the user who started the page.
"""

from __future__ import annotations

import hmac
from urllib.parse import urlencode

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN = "token"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with no-referrer a form of the page is sent with the origin `null`
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Middleware that refuses requests without the token's cookie, and requests of other pages that change something.

    All responses get the headers that keep scripts and frames of others out, unless they have their own.
    """

    def __init__(self, app: ASGIApp, token: str, cookie: str) -> None:
        self.app, self.token, self.cookie = app, token, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        answer = self._answer(Request(scope))
        await (answer or self.app)(scope, receive, with_headers)

    def _answer(self, http: Request) -> Response | None:
        """What a request gets that is not let in, or that comes to be let in; None for one that is."""
        given = http.query_params.get(TOKEN)
        if given is not None and http.method == "GET":
            if not self._is_token(given):
                return PlainTextResponse("The address has another token than this page's; open the printed one.", 403)
            rest = urlencode([(name, value) for name, value in http.query_params.multi_items() if name != TOKEN])
            place = "/" + http.url.path.lstrip("/")  # `//host` would be the address of another server
            answer = RedirectResponse(place + (f"?{rest}" if rest else ""), 303)
            answer.set_cookie(self.cookie, self.token, httponly=True, samesite="lax")
            return answer
        if not self._is_token(http.cookies.get(self.cookie, "")):
            return PlainTextResponse(
                "This page is for the browser that opened the address with the token, which `python -m pipeline ui` "
                "printed in its terminal; open that address here.",
                403,
            )
        origin = http.headers.get("origin")
        if http.method != "GET" and origin is not None and origin != f"http://{http.headers.get('host', '')}":
            return PlainTextResponse("Requests of other pages are refused.", 403)
        return None

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())
