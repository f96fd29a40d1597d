"""Starting the service: what is loaded, where it listens, and how it ends."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import signal
import socket
import threading
from pathlib import Path
from types import FrameType

import uvicorn

from pipeline.adapter.answering import Answerer
from pipeline.adapter.load import source_of
from pipeline.errors import UserError
from pipeline.serve.app import LOOPBACK, Service, Settings
from pipeline.serve.chat import Limits
from pipeline.serve.connection import ImpatientProtocol
from pipeline.serve.images import ImageLimits, bound_png_texts
from pipeline.serve.options import KEY_VARIABLE, Options
from pipeline.serve.worker import Worker

KEEP_ALIVE_S = 15
GRACE_S = 10
TOLD_S = 3  # for those who are told that the server stops to hear it
CONNECTIONS = 1024
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s*]+")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h


def serve(path: Path, options: Options, model: str | None = None, clip: str | None = None) -> None:
    """Serve a run or an adapter until SIGINT or SIGTERM.

    The key that clients have to send is in the environment, PIPELINE_API_KEY. Raises UserError for a folder that cannot
    be served, a port that is taken, and an address beyond this machine, or any page of any origin, without a key.
    """
    host, key = options.host, os.environ.get(KEY_VARIABLE, "").strip() or None
    if host not in LOOPBACK and key is None:
        raise UserError(
            f"--host {host} lets other machines ask, and there is no key; set {KEY_VARIABLE} to one that clients have "
            "to send, or leave --host at 127.0.0.1."
        )
    _check_origins(options.origins, key)
    listener = _listen(host, options.port)
    memory = None if options.memory_gib is None else int(options.memory_gib * (1 << 30))
    worker = Worker(Answerer(source_of(path, model, clip)), options.batch, options.queue, memory)
    limits = Limits(ImageLimits(options.max_pixels), tokens=options.max_tokens, ignores_system=options.ignore_system)
    waiting, name = max(Settings.waiting_bytes, 2 * options.max_body), options.name or path.resolve().name
    settings = Settings(
        name, host, key, options.max_body, waiting_bytes=waiting, limits=limits, origins=options.origins
    )
    _log_to_terminal(logging.WARNING if options.quiet else logging.INFO)
    return_large_blocks()
    bound_png_texts()
    config = uvicorn.Config(
        Service(worker, settings).app(),
        http=ImpatientProtocol,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S + TOLD_S,
        limit_concurrency=CONNECTIONS,
        h11_max_incomplete_event_size=64 << 10,
    )
    address = f"[{host}]" if ":" in host else host
    port = listener.getsockname()[1]
    listener.listen(CONNECTIONS)  # before it is announced: who connects at once waits and is not refused
    sets = len(worker.answerer.pool)

    server = Server(config, worker)
    for number in (signal.SIGINT, signal.SIGTERM):
        # Until uvicorn listens to these itself. It stops on them and then raises them once more: to be told to stop is
        # no failure.
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    print(f"serving {settings.model} ({sets} prompt sets) at http://{address}:{port}/v1", flush=True)
    server.run(sockets=[listener])


class Server(uvicorn.Server):
    """Ends what is still being answered after its time with a sentence, where uvicorn would drop it."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop as uvicorn does, and close the worker when the time to finish answers is over."""
        super().handle_exit(sig, frame)
        late = threading.Timer(GRACE_S, self.worker.close)
        late.daemon = True
        late.start()


def _check_origins(origins: tuple[str, ...], key: str | None) -> None:
    for origin in origins:
        if origin == "*" and key is None:
            raise UserError(
                f"--origin * lets every page in a browser ask, and there is no key; set {KEY_VARIABLE}, or name the "
                "origins, such as http://localhost:3000."
            )
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise UserError(
                f"--origin {origin} is no origin of a page; expected scheme and host without a path, such as "
                "http://localhost:3000."
            )


def _log_to_terminal(level: int) -> None:
    """Lines of the service on standard error: at level INFO one per request."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("pipeline.serve")
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


def return_large_blocks() -> None:
    """Let the C library give blocks of a megabyte and more back to the system as soon as they are freed.

    glibc raises that limit to 32 MB once such a block was freed, and keeps one heap per thread: after some large images
    in each reader the process would hold hundreds of megabytes that nobody uses.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for option, value in ((M_MMAP_THRESHOLD, 1 << 20), (M_TRIM_THRESHOLD, 4 << 20), (M_ARENA_MAX, 2)):
            library.mallopt(option, value)


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, port 0 for any free one; made before the model is loaded, so that a taken port shows at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(f"cannot listen at {host}:{port} ({error}); choose another --port or --host.") from error
    return listener
