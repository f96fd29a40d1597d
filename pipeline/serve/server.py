"""Starts the service: loads the model, listens, and shuts down gracefully."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from pipeline.adapter.answering import Answerer
from pipeline.adapter.load import source_of
from pipeline.errors import UserError
from pipeline.ranks.environment import bound
from pipeline.ranks.heap import return_freed_blocks
from pipeline.serve.app import Service
from pipeline.serve.chat import Limits
from pipeline.serve.connection import HeadDeadlineProtocol
from pipeline.serve.images import ImageLimits, bound_png_texts
from pipeline.serve.options import KEY_VARIABLE, Options
from pipeline.serve.web import LOOPBACK, Settings, WebService
from pipeline.serve.worker import Worker

KEEP_ALIVE_S = 15
GRACE_S = 10
FAREWELL_S = 3  # for clients to receive the error that the server is stopping
CONNECTIONS = 1024
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s*]+")


def serve(path: Path, options: Options, model: str | None = None, clip: str | None = None) -> None:
    """Serve a run or an adapter until SIGINT or SIGTERM.

    The key that clients have to send is read from the environment variable PIPELINE_API_KEY. Raises UserError for a
    folder that cannot be served, for a port in use, and without a key for an address beyond this machine or the
    origin `*`.
    """
    door = opened(path, options)
    memory = None if options.memory_gib is None else int(options.memory_gib * (1 << 30))
    source = source_of(path, model, clip).with_unfamiliar(options.unfamiliar)
    worker = Worker(Answerer(source), options.batch, options.queue, memory)
    run(Service(worker, door.settings), door, options.quiet, worker.close)


@dataclass(frozen=True)
class Door:
    """A bound socket, and the settings of the service that answers at it."""

    listener: socket.socket
    settings: Settings


def opened(path: Path, options: Options) -> Door:
    """Check the options of access and bind the socket, before anything is loaded; raises UserError as `serve` does."""
    host, key = options.host, os.environ.get(KEY_VARIABLE, "").strip() or None
    if host not in LOOPBACK and key is None:
        raise UserError(
            f"--host {host} accepts requests from other machines, but there is no API key; set {KEY_VARIABLE} to a "
            "key that clients have to send, or leave --host at 127.0.0.1."
        )
    _check_origins(options.origins, key)
    listener = bound(options.port, host)
    limits = Limits(ImageLimits(options.max_pixels), tokens=options.max_tokens, ignores_system=options.ignore_system)
    waiting, name = max(Settings.waiting_bytes, 2 * options.max_body), options.name or path.resolve().name
    settings = Settings(
        name, host, key, options.max_body, waiting_bytes=waiting, limits=limits, origins=options.origins
    )
    return Door(listener, settings)


def run(service: WebService, door: Door, quiet: bool, close: Callable[[], None], behind: str = "") -> None:
    """Answer requests until SIGINT or SIGTERM.

    Args:
        service: what answers.
        door: where.
        quiet: whether requests are not logged.
        close: ends unfinished answers at the end of the grace period.
        behind: what is printed of an engine behind the service.
    """
    settings = door.settings
    log_to_terminal(logging.WARNING if quiet else logging.INFO)
    return_freed_blocks()
    bound_png_texts()
    config = uvicorn.Config(
        service.app(),
        http=HeadDeadlineProtocol,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S + FAREWELL_S,
        limit_concurrency=CONNECTIONS,
        h11_max_incomplete_event_size=64 << 10,
    )
    address = f"[{settings.host}]" if ":" in settings.host else settings.host
    port = door.listener.getsockname()[1]
    # Before the address is printed, so that early connections wait and are not refused.
    door.listener.listen(CONNECTIONS)
    sets = len(service.source.pool)

    server = Server(config, close)
    for number in (signal.SIGINT, signal.SIGTERM):
        # Handles signals until uvicorn installs its own handlers. uvicorn raises the signal again after its shutdown,
        # which must not change the exit code either.
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    print(
        f"serving {settings.model} ({sets} prompt set{'s' * (sets != 1)}) at http://{address}:{port}/v1{behind}",
        flush=True,
    )
    server.run(sockets=[door.listener])


class Server(uvicorn.Server):
    """uvicorn's server; unfinished answers get an error at the end of the grace period, where uvicorn drops them."""

    def __init__(self, config: uvicorn.Config, close: Callable[[], None]) -> None:
        super().__init__(config)
        self.close = close

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop as uvicorn does, and close what answers at the end of the grace period."""
        super().handle_exit(sig, frame)
        late = threading.Timer(GRACE_S, self.close)
        late.daemon = True
        late.start()


def _check_origins(origins: tuple[str, ...], key: str | None) -> None:
    for origin in origins:
        if origin == "*" and key is None:
            raise UserError(
                f"--origin * accepts requests of any web page, but there is no API key; set {KEY_VARIABLE}, or name "
                "the origins, such as http://localhost:3000."
            )
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise UserError(
                f"--origin {origin} is not an origin; expected scheme and host without a path, such as "
                "http://localhost:3000."
            )


def log_to_terminal(level: int) -> None:
    """Log to standard error; level INFO includes one line per request."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("pipeline.serve")
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
