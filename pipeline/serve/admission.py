"""Admission of requests: limits on the size and duration of a body and on memory, and clients that disconnect."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from pipeline.serve.refusal import RefusedError

Result = TypeVar("Result")
MIB = 1 << 20


class Budget:
    """Bytes that all requests together may hold until their answers begin; used by the event loop only."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0


class Share:
    """One request's share of a budget; released at the end of the block."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.size = budget, 0

    def hold(self, size: int) -> None:
        """Change the share to `size` bytes; RefusedError (429) where it grows beyond the budget."""
        held = self.budget.held - self.size + size
        if size > self.size and held > self.budget.limit:
            raise RefusedError(
                f"the requests that wait hold {self.budget.held // MIB} MiB of the {self.budget.limit // MIB} MiB that "
                "they may; ask again in a second.",
                429,
                "rate_limit_exceeded",
            )
        self.budget.held, self.size = held, size

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        self.hold(0)


async def read_body(http: HttpRequest, limit: int, seconds: float, share: Share) -> bytearray:
    """Read a request's body; raises RefusedError where it is not JSON, is too large or too slow.

    Args:
        http: the request.
        limit: most bytes.
        seconds: time for the whole body.
        share: is charged with the bytes that were received.
    """
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A browser sends this content type across origins only after a CORS preflight request.
        raise RefusedError("content-type is not application/json; expected a JSON body.", 415)
    too_large = RefusedError(f"the body is too large; expected at most {limit} bytes.", 413)
    announced = http.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large

    async def whole() -> bytearray:
        body = bytearray()  # not a list of parts: of a body sent byte by byte that would take fifty times the memory
        async for part in http.stream():
            if len(body) + len(part) > limit:
                raise too_large
            share.hold(len(body) + len(part))
            body += part
        return body

    try:
        return await asyncio.wait_for(whole(), seconds)
    except asyncio.TimeoutError:
        raise RefusedError(f"the body did not arrive within {seconds:g} seconds.", 408, "timeout") from None
    except ClientDisconnect:
        raise _left() from None


async def unless_gone(http: HttpRequest, awaited: Awaitable[Result]) -> Result:
    """The result of `awaited`; RefusedError (499) as soon as the client disconnects. The body must have been read."""

    async def until_gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    result, gone = asyncio.ensure_future(awaited), asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise _left()
        return result.result()
    finally:
        result.cancel()
        gone.cancel()


def _left() -> RefusedError:
    return RefusedError("the caller left before its answer was whole.", 499, "caller_left")
