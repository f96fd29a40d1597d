"""What the runs of a comparison are at, from the logs that they write: a line per finished stage, and one a minute."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path

EVERY_S = 60.0  # between two lines about one run in which no stage ends
LOOK_S = 1.0  # between two looks at a log, which may be on a file server
MOST = 1 << 20  # bytes read at once
_LINE = re.compile(r"\d\d:\d\d:\d\d (?P<text>\S.*)")  # of the project's own log, see `pipeline.console.log`
_STAGE = re.compile(r"(stage \d+/\d+ [^:]+): \d+ samples")  # a stage begins
_ROW = re.compile(r"after stage \d+ |zero-shot: ")  # its scores, which end it


class FollowedLog:
    """A log that a command adds to, from its present end on.

    Args:
        path: the log; it need not be there yet.
        now: the clock, in seconds.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.monotonic) -> None:
        self.path, self._now = path, now
        self._read = path.stat().st_size if path.is_file() else 0
        self._rest = b""
        self._stage, self._newest = "", ""  # the stage in training, and the newest line
        self._told = self._looked = now()

    def news(self, last: bool = False) -> list[str]:
        """What is to be said now: the scores after each stage that ended, else once a minute the newest line.

        `last`: the command has ended, so the log is looked at now.
        """
        now = self._now()
        if now - self._looked < LOOK_S and not last:
            return []
        self._looked = now
        said = []
        for text in self._new_lines():
            begins = _STAGE.match(text)
            if begins:
                self._stage = begins[1]
            elif _ROW.match(text):
                self._stage = ""
                said.append(text)
            self._newest = "" if said and text == said[-1] else text
        if not said and self._newest and now - self._told >= EVERY_S:
            stage = "" if not self._stage or self._newest.startswith(self._stage) else f"{self._stage}, "
            said.append(f"{stage}{self._newest}")
            self._newest = ""
        if said:
            self._told = now
        return said

    def _new_lines(self) -> list[str]:
        """The texts of the complete lines of the project's own log that were added since the last call."""
        added = b""
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            file.seek(self._read)
            added = file.read(MOST)
        self._read += len(added)
        *lines, self._rest = (self._rest + added).split(b"\n")
        found = (_LINE.match(line.decode("utf-8", errors="replace").strip()) for line in lines)
        return [line["text"] for line in found if line is not None]
