"""Commands that the page starts, one after the other, such as `new-task` and `add`: their output and their end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import EXIT_OK, EXIT_RESUMABLE
from pipeline.files.paths import command
from pipeline.ui.web import PageError

SHOWN_BYTES = 64 << 10  # most of an output that one request gets
STOP_S = 30.0  # from the end of the server to that of a command that does not heed it
QUIET = {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "COLUMNS": "100", "TERM": "dumb"}


@dataclass
class Job:
    """Commands for one run, and the form that follows: after a foretelling it does it, after a stop it goes on."""

    number: int
    run: str
    title: str
    commands: Sequence[Sequence[str]]
    form: Mapping[str, str]  # its fields
    button: str  # its text
    changes: bool  # whether the commands change the run; else they foretell
    place: str = "add"  # where it is sent, below the run's page
    output: Path = Path()
    state: str = "running"  # then done, stopped or failed
    code: int | None = None
    process: subprocess.Popen[bytes] | None = None
    stopping: bool = False
    guard: threading.Lock = field(default_factory=threading.Lock)

    def read(self, start: int) -> tuple[str, int]:
        """The output from this byte on, at most SHOWN_BYTES of it, and the byte after it; parts of characters wait."""
        with self.output.open("rb") as file:
            file.seek(max(0, start))
            found = file.read(SHOWN_BYTES)
        for cut in range(min(4, len(found) + 1)):  # a character has at most four bytes
            whole = found[: len(found) - cut]
            with contextlib.suppress(UnicodeDecodeError):
                return whole.decode("utf-8"), max(0, start) + len(whole)
        return found.decode("utf-8", "replace"), max(0, start) + len(found)


class Jobs:
    """The jobs of this server; their outputs are files that are removed when it ends."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._guard = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._folder = tempfile.TemporaryDirectory(prefix="pipeline-ui-")

    def start(self, job: Job) -> Job:
        """Run a job's commands in the background; PageError while another job of its run is running."""
        with self._guard:
            other = next((one for one in self._jobs.values() if one.run == job.run and one.state == "running"), None)
            if other is not None:
                raise PageError(
                    f"job {other.number} of {job.run} is still running ({other.title}); stop it first.", 409
                )
            job.number = len(self._jobs) + 1
            job.output = Path(self._folder.name) / f"{job.number}.txt"
            job.output.touch()
            self._jobs[job.number] = job
        thread = threading.Thread(target=_run, args=(job,), name=f"job-{job.number}", daemon=True)
        self._threads.append(thread)
        thread.start()
        return job

    def get(self, number: int) -> Job:
        """The job of that number; PageError where there is none."""
        if number not in self._jobs:
            raise PageError(f"there is no job {number}; the page was started anew, or it never was.")
        return self._jobs[number]

    def of(self, run: str) -> list[Job]:
        """The jobs of a run, the latest first."""
        return [job for job in reversed(self._jobs.values()) if job.run == run]

    def close(self) -> None:
        """Stop what is running, as `stop` does, wait for it, and remove the outputs."""
        for job in self._jobs.values():
            stop(job)
        for thread in self._threads:
            thread.join(STOP_S)
        for job in self._jobs.values():
            if job.state == "running":
                stop(job, kill=True)
        self._folder.cleanup()


def stop(job: Job, kill: bool = False) -> None:
    """Ask a job's command to stop: training saves and ends with 75, and the same command resumes it; `kill` ends it."""
    with job.guard:
        job.stopping = True
        if job.process is None or job.process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            if kill:
                os.killpg(job.process.pid, signal.SIGKILL)  # its ranks too
            else:
                job.process.terminate()


def _run(job: Job) -> None:
    with job.output.open("ab") as output:
        for words in job.commands:
            output.write(f"$ {command(words[0], *words[1:])}\n".encode())
            output.flush()
            with job.guard:
                if job.stopping:
                    break
                job.process = subprocess.Popen(
                    [sys.executable, "-m", "pipeline", *words],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **QUIET},
                    start_new_session=True,
                )
            job.code = job.process.wait()
            if job.code != EXIT_OK:
                break
    ended = job.code == EXIT_RESUMABLE or job.stopping
    job.state = "done" if job.code == EXIT_OK and not job.stopping else "stopped" if ended else "failed"
