"""A server on the loopback for the time of a test, on threads of this process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Says nothing on the terminal, and takes clients that leave."""

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().handle()


@contextlib.contextmanager
def serving(handler: Callable[..., Any], before_the_end: Callable[[], None] = lambda: None) -> Iterator[str]:
    """The address of a server whose requests this handler answers; `before_the_end` frees handlers that wait."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        before_the_end()
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
