"""The chat's side of the answering process: starts it for a run, sends questions, and ends it."""

from __future__ import annotations

import contextlib
import multiprocessing
import subprocess
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.runs.layout import CONFIG, STAGES
from pipeline.ui.web import PageError

LOADED, ANSWER, REFUSED, FAILED = "loaded", "answer", "refused", "failed"  # kinds of the process's replies
WAITING = 4  # questions that wait for the model; further ones are refused
END_S = 5.0


@dataclass
class _Worker:
    """A running process: the run that it has loaded, as the run was then, and the pipe to it."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    run: Path
    version: tuple[Any, ...]


class Answering:
    """Answers questions with the models of one run at a time; a question for another run ends the former process."""

    def __init__(self) -> None:
        self._worker: _Worker | None = None
        self._busy = threading.Lock()
        self._waiting = threading.Semaphore(WAITING)

    def loaded(self, run: Path) -> bool:
        """Whether the run's models are in memory, so that an answer comes at once."""
        worker = self._worker
        if worker is None or worker.process.poll() is not None:
            return False
        return worker.run == run and worker.version == version_of(run)

    def ask(self, run: Path, text: str, image: bytes | None, task: str | None) -> dict[str, Any]:
        """The answer as a JSON object with the sets that were chosen; loads the run's models at first.

        Raises PageError for a question that is refused, for models that cannot be loaded, and while others wait.
        """
        if not self._waiting.acquire(blocking=False):
            raise PageError(f"{WAITING} questions wait for the model already; ask again when they are answered.", 429)
        try:
            with self._busy:
                worker = self._started(run)
                kind, content = self._reply(worker, (text, image, task))
        finally:
            self._waiting.release()
        if kind == REFUSED:
            raise PageError(content, 422)
        return content

    def close(self) -> None:
        """End the process."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.pipe.close()
        try:
            worker.process.wait(END_S)
        except subprocess.TimeoutExpired:  # it is loading or answering
            worker.process.kill()
            worker.process.wait()

    def _started(self, run: Path) -> _Worker:
        if self._worker is not None and self.loaded(run):
            return self._worker
        self.close()
        version = version_of(run)
        here, there = multiprocessing.Pipe()
        # In a session of its own, so that Ctrl-C in the terminal ends it by the end of its pipe.
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.ui.answerer", str(there.fileno()), str(run)],
            stdin=subprocess.DEVNULL,
            pass_fds=[there.fileno()],
            start_new_session=True,
        )
        there.close()
        self._worker = worker = _Worker(process, here, run, version)
        kind, content = self._reply(worker)
        if kind == FAILED:
            self.close()
            raise PageError(content, 422)
        return worker

    def _reply(self, worker: _Worker, question: object = None) -> tuple[str, Any]:
        """The next reply, to a question if there is one; PageError where the process ends without one."""
        try:
            if question is not None:
                worker.pipe.send(question)
            kind, content = worker.pipe.recv()
            return kind, content
        except (EOFError, OSError):
            self._worker = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(END_S)
            raise PageError(
                f"The process with the model ended (exit code {worker.process.returncode}); its message is in the "
                "terminal that the page was started from. Ask again to start it anew.",
                500,
            ) from None


def version_of(run: Path) -> tuple[Any, ...]:
    """What changes when a run learns another task or its recipe changes."""
    found = [(path.name, path.stat().st_mtime_ns) for path in sorted((run / STAGES).glob("*"))]
    config = run / CONFIG
    return (*found, config.stat().st_mtime_ns if config.is_file() else 0)
