"""HTTP connections of the service: a deadline for the head of a request."""

from __future__ import annotations

import asyncio
import http
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_S = 20.0


class HeadDeadlineProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 connection, closed when a request's head is incomplete `request_seconds` after its start.

    uvicorn has no such timeout: it waits for the first byte, for a slowly sent head, and for the rest of a body that is
    not read because the reply has been sent. The time for a body that is read is limited in `admission.read_body`.
    """

    request_seconds = REQUEST_S

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # An existing deadline is kept: otherwise every received byte would postpone it.
        if self._is_answering:
            self._forget_deadline()
        elif self.timeout_keep_alive_task is None:
            self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        super().connection_lost(exc)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_request(self) -> None:
        if self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self.request_seconds, self._give_up)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self.transport.is_closing() or self._is_answering:
            return
        if self.conn.our_state is h11.IDLE:
            status = http.HTTPStatus.REQUEST_TIMEOUT
            reply = h11.Response(
                status_code=status, headers=[("content-length", "0"), ("connection", "close")], reason=status.phrase
            )
            self.transport.write(self.conn.send(reply) or b"")
        self.transport.close()
