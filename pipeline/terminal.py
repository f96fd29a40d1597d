"""The project's own log lines on the terminal."""

from __future__ import annotations

import logging
import os


def log_to_terminal() -> None:
    """Show the project's own log lines on rank 0; other libraries keep their levels."""
    logger = logging.getLogger("pipeline")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING)
