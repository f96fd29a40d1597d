"""What comes in before the model is asked: a request's body within limits, the bytes that wait, a caller who leaves."""

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
    """The bytes that all requests may hold together until their answers begin; for the event loop alone."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0


class Share:
    """What one request holds of a budget; leaving the block gives it back."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.size = budget, 0

    def hold(self, size: int) -> None:
        """Hold so many bytes in place of those held before; refused with 429 when the budget has no room for more."""
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
    """The request's body, which has to be JSON, at most `limit` bytes, and there in time; `share` holds what came.

    Raises RefusedError with a sentence: what was found, what was expected.
    """
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Also what keeps pages of other origins in a browser from posting here without being asked first.
        raise RefusedError("content-type is not application/json; expected a JSON body.", 415)
    too_large = RefusedError(f"the body is too large; expected at most {limit} bytes.", 413)
    announced = http.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large

    async def whole() -> bytearray:
        body = bytearray()  # one piece: a body that comes byte by byte would take fifty times its size as a list
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
    """The result of `awaited`; RefusedError (499) as soon as the caller closes the connection, its body being read."""

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
