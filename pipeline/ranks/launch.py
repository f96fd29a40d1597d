"""Launch the ranks of a run on this machine with DeepSpeed's launcher, and collect their outcomes.

The launcher reports only the exit code of the rank that it saw fail first. So every rank writes its exit code, error
and result to a file, which the launching process reads.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from pipeline.errors import EXIT_FAILURE, EXIT_OK, EXIT_RESUMABLE, EXIT_USER
from pipeline.ranks.devices import GIVEN, NUMBERED, given_devices
from pipeline.ranks.environment import free_port, is_distributed
from pipeline.ranks.outcome import OUTCOMES, Outcome
from pipeline.ranks.shutdown import STOP_SIGNALS, handled_signals


def end_as_rank(work: Callable[[], object]) -> None:
    """Run `work`; the process then exits by `os._exit` right after its exit handlers, as a rank has to.

    A rank may abort (SIGABRT) after it finished: when a gloo thread releases its last tensor while the interpreter is
    being torn down, it cannot take the interpreter's lock, and C++ terminates the process. A process alone saves the
    time of the teardown, which with transformers' modules is a third of torch's import.
    """
    code: list[int] = [EXIT_FAILURE]

    def ended() -> None:
        # A launcher that terminates the ranks because one of them ended must not interrupt the exit handlers.
        if is_distributed():
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code[0])

    atexit.register(leave)  # handlers run in reverse order, so those that `work` registers run before this one
    try:
        work()
        code[0] = EXIT_OK
    except SystemExit as leaving:
        code[0] = leaving.code if isinstance(leaving.code, int) else EXIT_FAILURE if leaving.code else EXIT_OK
        raise
    finally:
        ended()


def local_processes(wanted: int | None) -> int:
    """Return the number of ranks to start here: `wanted`, at most one per GPU where there are GPUs.

    With None: one per GPU, or one without GPUs.
    """
    import torch

    accelerators = torch.cuda.device_count()
    if not accelerators:
        return wanted or 1
    return min(wanted or accelerators, accelerators)


def launch(arguments: list[str], processes: int, module: str = "pipeline") -> Outcome:
    """Run `python -m <module> <arguments>` on `processes` ranks of this machine and return how it ended.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP are handed to the ranks as SIGTERM; the launcher gives them 30 seconds to save
    and exit. A SIGHUP that this process ignores (`nohup`) is not handed on.
    """
    with tempfile.TemporaryDirectory(prefix="pipeline-") as folder:
        command = launcher_command([module, *arguments], processes)
        # In a session of its own, so that a Ctrl-C reaches the ranks through this process only and not from the
        # terminal too.
        launcher = subprocess.Popen(command, env=launcher_environment(processes, folder), start_new_session=True)
        stopped = False

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal stopped
            stopped = True
            _terminate(launcher)

        before = {number: signal.signal(number, stop) for number in handled_signals((signal.SIGINT, *STOP_SIGNALS))}
        try:
            code = launcher.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        outcomes = [Outcome(**json.loads(path.read_text())) for path in sorted(Path(folder).glob("rank-*.json"))]
    return combined(outcomes, code, stopped)


def launcher_command(arguments: list[str], processes: int) -> list[str]:
    """Return the deepspeed launcher's command line for ranks on this machine only."""
    return [
        *[sys.executable, "-m", "deepspeed.launcher.runner"],
        # An empty name: a hostfile in the launcher's default place would start the ranks on other machines.
        *["--hostfile", "", "--num_accelerators", str(processes)],
        *["--master_port", str(free_port()), "--no_local_rank", "--log_level", "error"],
        # This module restores the visible devices, which the launcher overwrites, and then runs the command.
        *["--module", "pipeline.ranks.launched", *arguments],
    ]


def launcher_environment(processes: int, outcomes: str) -> dict[str, str]:
    """Return the launcher's environment: ours, plus what DeepSpeed needs to count ranks on a machine without GPUs."""
    import torch

    # Without the variables that the ranks restore: the launcher would warn that it ignores them.
    env = {name: value for name, value in os.environ.items() if name not in NUMBERED}
    env |= {OUTCOMES: outcomes, GIVEN: given_devices()}
    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")
        env["LOCAL_SIZE"] = str(processes)  # otherwise DeepSpeed takes the number of NUMA nodes as that of the ranks
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    return env


def combined(outcomes: list[Outcome], launcher_code: int, stopped: bool) -> Outcome:
    """Return the outcome of the launch from those of its ranks.

    The launcher terminates the other ranks when one fails, so bad input and failures take precedence over
    interruptions.
    """
    for code in (EXIT_USER, EXIT_FAILURE, EXIT_RESUMABLE):
        found = next((outcome for outcome in outcomes if outcome.code == code), None)
        if found is not None:
            return found
    if stopped:
        return Outcome(EXIT_RESUMABLE, "stopped before the end; run the same command again to resume.")
    if launcher_code or not outcomes:
        return Outcome(EXIT_FAILURE, f"the ranks died (launcher's exit code {launcher_code}); see their output.")
    return Outcome(EXIT_OK, result=outcomes[0].result)


def _terminate(launcher: subprocess.Popen[bytes]) -> None:
    # SIGTERM ends the outer launcher without its ranks; its child process, the inner launcher, terminates them.
    import psutil

    try:
        inner = psutil.Process(launcher.pid).children()
    except psutil.NoSuchProcess:
        return
    for child in inner:
        child.terminate()
    if not inner:
        launcher.terminate()
