"""Serves the page on loopback until Ctrl-C."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from pipeline.ranks.environment import LOOPBACK, bound
from pipeline.ui.adding import Adding
from pipeline.ui.app import Site, application
from pipeline.ui.chat import Chat
from pipeline.ui.last_task import LastTaskForms
from pipeline.ui.runs import names_of
from pipeline.ui.web import Templates


def site_of(paths: Sequence[Path]) -> Site:
    """The state of a page with these runs; raises UserError for a path that is no run."""
    runs = names_of(paths)
    return Site(runs, Templates(secrets.token_urlsafe(18), runs))


def app_of(site: Site, token: str, port: int) -> Starlette:
    """The application; browsers keep cookies for all ports of a host together, so the cookie's name has the port."""
    changing = [*Chat(site).routes(), *Adding(site).routes(), *LastTaskForms(site).routes()]
    return application(site, token, f"pipeline_ui_{port}", changing)


def serve(paths: Sequence[Path], port: int) -> None:
    """Serve the page of these runs; raises UserError for a path that is no run, or a port that is in use."""
    site = site_of(paths)
    listener = bound(port)
    port, token = listener.getsockname()[1], secrets.token_urlsafe(18)
    config = uvicorn.Config(
        app_of(site, token, port),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal again after its shutdown, which must not change the exit code.
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    listener.listen()  # an early browser waits
    print(f"page: http://{LOOPBACK}:{port}/?token={token} (Ctrl-C stops it)", flush=True)
    server.run(sockets=[listener])
