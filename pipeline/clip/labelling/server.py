"""Serves the labelling page on loopback until every image has an answer and the person says so."""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from pipeline.clip.labelling.answers import Answers
from pipeline.clip.labelling.app import LabellingPage
from pipeline.errors import UserError, require_extras
from pipeline.files.paths import command
from pipeline.ranks.environment import LOOPBACK, bound
from pipeline.runs.layout import ASK, CONFIG


@dataclass
class Desk:
    """The address of the page, which stays the same from round to round; port 0 becomes the one that is free."""

    port: int = 8000
    token: str = field(default_factory=lambda: secrets.token_urlsafe(12))

    @property
    def address(self) -> str:
        """The page's address."""
        return f"http://{LOOPBACK}:{self.port}/{self.token}/"


def label(run: Path, desk: Desk) -> int:
    """Serve the page of a run until all images are labelled and the person is done; returns how many are not.

    That is not 0 where a signal ended it. UserError for a run that asks for nothing, a damaged file, or a port in use.
    """
    require_extras("serve")
    answers = Answers(run)
    if not (run / CONFIG).is_file():
        raise UserError(f"'{run}' is no run (it has no {CONFIG}); expected the folder of a run that asks for labels.")
    if answers.state() is None:
        raise UserError(
            f"'{run}' has no {ASK}: it asks for no labels now. With active.oracle: file, "
            f"`{command('run', 'RECIPE')}` writes it when a round needs them."
        )
    listener = bound(desk.port)
    desk.port = listener.getsockname()[1]
    config = uvicorn.Config(
        LabellingPage(answers, desk.token, lambda: setattr(server, "should_exit", True)).app(),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    listener.listen()  # an early browser waits
    print(f"labelling page: {desk.address} (Ctrl-C stops it; every answer is kept)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after its shutdown
        server.run(sockets=[listener])
    return answers.waiting()
