"""The project's own log lines on the terminal."""

from __future__ import annotations

import logging
import sys

from pipeline.console.progress import IN_BAR
from pipeline.ranks.environment import rank


class _Lines(logging.StreamHandler):
    """Writes to the current sys.stderr, which rich replaces while a bar is shown so that lines appear above it."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, IN_BAR, False):
            self.stream = sys.stderr
            super().emit(record)


def log_to_terminal() -> None:
    """Show the project's own log lines on rank 0; other libraries keep their levels."""
    logger = logging.getLogger("pipeline")
    if not logger.handlers:
        handler = _Lines()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
