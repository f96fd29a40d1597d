"""What a caller gets who connects and takes its time: raw sockets against the connection that the service uses."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from pipeline.serve.connection import HeadDeadlineProtocol
from tests.serve.conftest import Served

HEAD = b"GET /answer HTTP/1.1\r\nHost: localhost\r\n"


class HalfASecond(HeadDeadlineProtocol):
    request_seconds = 0.5


async def answer_late(_: Request) -> PlainTextResponse:
    await asyncio.sleep(1.0)
    return PlainTextResponse("late")


async def answer(_: Request) -> PlainTextResponse:
    return PlainTextResponse("here")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Port of a server that waits half a second for a request and keeps a connection open for thirty."""
    app = Starlette(routes=[Route("/answer", answer, methods=["GET", "POST"]), Route("/late", answer_late)])
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=HalfASecond, log_level="error", timeout_keep_alive=30)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(10)


@contextmanager
def connected(port: int, sent: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(sent)
        yield connection


def seconds_of_drops(connection: socket.socket, drop: bytes) -> float:
    """How long the other side lets itself be sent the same drop again and again; ten seconds are given up on."""
    began = time.monotonic()
    try:
        while time.monotonic() - began < 10:
            connection.sendall(drop)
            time.sleep(0.05)
    except OSError:
        pass
    return time.monotonic() - began


def assert_answered(connection: socket.socket) -> None:
    received = b""
    while not received.endswith(b"here"):
        part = connection.recv(4096)
        assert part, received
        received += part


def until_closed(connection: socket.socket) -> bytes:
    """All that the other side sends until it ends the connection."""
    received = b""
    try:
        while part := connection.recv(4096):
            received += part
    except ConnectionResetError:
        pass  # it had more to read when it ended
    return received


@pytest.mark.parametrize("sent", [b"", HEAD, b"GE"], ids=["silent", "half a head", "two letters"])
def test_a_head_that_does_not_come_ends_the_connection(port: int, sent: bytes) -> None:
    with connected(port, sent) as connection:
        assert until_closed(connection).startswith(b"HTTP/1.1 408 ")


def test_a_head_that_comes_drop_by_drop_is_not_waited_for_longer(port: int) -> None:
    with connected(port, HEAD) as connection:
        assert seconds_of_drops(connection, b"X-Drop: 1\r\n") < 5


def test_a_second_request_on_the_same_connection_has_as_long(port: int) -> None:
    with connected(port, HEAD + b"\r\n") as connection:
        assert_answered(connection)
        connection.sendall(HEAD)
        assert until_closed(connection).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_nobody_reads_ends_with_the_answer(port: int) -> None:
    with connected(port, b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n") as connection:
        assert_answered(connection)
        assert seconds_of_drops(connection, b"x") < 5


def test_who_waits_for_a_late_answer_is_left_alone(port: int) -> None:
    with connected(port, b"GET /late HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") as connection:
        assert until_closed(connection).endswith(b"late")


def test_an_idle_connection_is_kept_for_the_next_request(port: int) -> None:
    with connected(port, HEAD + b"\r\n") as connection:
        assert_answered(connection)
        time.sleep(1.0)
        connection.sendall(HEAD + b"Connection: close\r\n\r\n")
        assert until_closed(connection).endswith(b"here")


@pytest.mark.slow
@pytest.mark.e2e
def test_the_service_gives_up_on_a_silent_caller(served: Served) -> None:
    with connected(served.port, HEAD) as connection:
        connection.settimeout(40)
        assert until_closed(connection).startswith(b"HTTP/1.1 408 ")
