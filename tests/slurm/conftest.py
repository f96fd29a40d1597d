"""A Slurm cluster of two virtual nodes, and how long things took on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import PROJECT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
LIMIT_S = 600  # minutes on a machine that does other things at the same time
MEASURED: list[str] = []


@dataclass
class Cluster:
    """The running cluster; `environment` is that of its commands and jobs."""

    environment: dict[str, str]

    def call(self, *command: str, **environment: str) -> str:
        """Run a command of Slurm's, or one that calls them, and return its output."""
        environment = {**self.environment, **environment}
        done = subprocess.run(
            command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, output: Path, *arguments: str) -> Job:
        """Submit slurm/run_sequence.sh; `arguments` begin with sbatch's options, and the script's follow after `--`."""
        where = arguments.index("--")
        command = ["sbatch", "--parsable", f"--output={output}", *arguments[:where], "slurm/run_sequence.sh"]
        return Job(self, int(self.call(*command, *arguments[where + 1 :])), output)

    def several(self, output: Path, *command: str, **environment: str) -> list[Job]:
        """The jobs that a script says it has submitted; `output` has a %j for a job's number."""
        said = self.call(*command, **environment)
        numbers = [int(number) for number in re.findall(r"^.+: job (\d+)$", said, re.MULTILINE)]
        return [Job(self, number, Path(str(output).replace("%j", str(number)))) for number in numbers]


@dataclass
class Job:
    """A job of the cluster."""

    cluster: Cluster
    number: int
    output: Path

    def field(self, name: str) -> str:
        """One field of what Slurm knows of the job, as JobState or Restarts."""
        found = re.search(rf"\b{name}=(\S*)", self.cluster.call("scontrol", "show", "job", "--oneliner", str(self)))
        assert found is not None
        return found[1]

    def until(self, condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> float:
        """Wait until a condition holds and return how long that took."""
        began = time.monotonic()
        while not condition():
            waited = time.monotonic() - began
            assert waited < limit_s, f"not {what} within {limit_s:.0f} s:\n{self.text()[-4000:]}"
            time.sleep(0.05)
        return time.monotonic() - began

    def ended(self, state: str = "COMPLETED", limit_s: float = LIMIT_S) -> float:
        """Wait until the job is in a state that it does not leave, which has to be this one."""
        took = self.until(lambda: self.field("JobState") not in RUNNING, "ended", limit_s)
        assert self.field("JobState") == state, self.text()[-4000:]
        return took

    def text(self) -> str:
        """What the job has printed, over all its starts."""
        return self.output.read_text("utf-8") if self.output.exists() else "(no output)"

    def __str__(self) -> str:
        return str(self.number)


RUNNING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes of two processors each."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(missing) or 'no more'}; `make test-slurm` installs what is missing")
    script = str(PROJECT / "tests" / "slurm" / "cluster.sh")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # short: sockets have to fit into 108 characters
        subprocess.run([script, "start", folder], check=True, timeout=120)
        environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "PYTHON": sys.executable}
        for name in ("SITE_ENV", "OMP_NUM_THREADS"):
            environment.pop(name, None)
        try:
            yield Cluster({**environment, "OMP_NUM_THREADS": "1"})
        finally:
            subprocess.run([script, "stop", folder], check=True, timeout=120)


@pytest.fixture(scope="session")
def note() -> Callable[[str], None]:
    """Keep a line about a measurement for the end of the test run."""
    return MEASURED.append


@pytest.fixture(scope="session")
def measured(note: Callable[[str], None]) -> Callable[[str, float], None]:
    """Keep a duration in seconds for the end of the test run."""
    return lambda what, seconds: note(f"{what}: {seconds:.1f} s")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was measured."""
    for line in MEASURED:
        terminalreporter.write_line(f"measured: {line}")
