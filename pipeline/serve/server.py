"""Starting the service: what is loaded, where it listens, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path
from types import FrameType

from pipeline.errors import UserError

KEY_VARIABLE = "PIPELINE_API_KEY"
KEEP_ALIVE_S = 15
GRACE_S = 10
TOLD_S = 3  # for those who are told that the server stops to hear it
CONNECTIONS = 1024


def serve(
    path: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    batch: int = 32,
    queue: int = 256,
    max_tokens: int = 256,
    max_pixels: int = 4096 * 4096,
    max_body: int = 8 << 20,
    name: str | None = None,
    model: str | None = None,
    clip: str | None = None,
) -> None:
    """Serve a run or an adapter until SIGINT or SIGTERM.

    `batch` rows are decoded together, `queue` requests may wait; `name` is what clients call the model. The key that
    clients have to send is in the environment, PIPELINE_API_KEY. Raises UserError for a folder that cannot be served,
    a port that is taken, and an address beyond this machine without a key.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed; serving needs starlette and uvicorn (`pip install starlette uvicorn`)."
        ) from error
    from pipeline.adapter import source_of
    from pipeline.answering import Answerer
    from pipeline.serve.app import LOOPBACK, Service, Settings
    from pipeline.serve.chat import Limits
    from pipeline.serve.connection import ImpatientProtocol
    from pipeline.serve.worker import Worker

    key = os.environ.get(KEY_VARIABLE, "").strip() or None
    if host not in LOOPBACK and key is None:
        raise UserError(
            f"--host {host} lets other machines ask, and there is no key; set {KEY_VARIABLE} to one that clients have "
            "to send, or leave --host at 127.0.0.1."
        )
    listener = _listen(host, port)
    worker = Worker(Answerer(source_of(path, model, clip)), batch, queue)
    limits = Limits(image_pixels=max_pixels, tokens=max_tokens)
    waiting = max(Settings.waiting_bytes, 2 * max_body)
    settings = Settings(name or path.resolve().name, host, key, max_body, waiting_bytes=waiting, limits=limits)
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

    class Server(uvicorn.Server):
        """Ends what is still being answered after its time with a sentence, where uvicorn would drop it."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            super().handle_exit(sig, frame)
            late = threading.Timer(GRACE_S, worker.close)
            late.daemon = True
            late.start()

    server = Server(config)
    for number in (signal.SIGINT, signal.SIGTERM):
        # Until uvicorn listens to these itself. It stops on them and then raises them once more: to be told to stop is
        # no failure.
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    print(f"serving {settings.model} ({sets} prompt sets) at http://{address}:{port}/v1", flush=True)
    server.run(sockets=[listener])


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
