"""Starting the ranks of a run on this machine with the deepspeed launcher, and bringing their outcome back whole.

The launcher reports little: the code of whichever rank it saw failing first, and its own log between the ranks'
output. So every rank writes how it ended to a file, and the process that started the launcher reads it from there.
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
from pipeline.ranks.shutdown import STOP_SIGNALS, heeded


def end_as_rank(work: Callable[[], object]) -> None:
    """Do a process's `work`; a process that is a rank then ends right after its exit handlers.

    Without it a rank may die of SIGABRT after all its work: a thread of gloo that lets go of its last tensor while the
    interpreter is already being torn down cannot take its lock any more, and C++ ends the process.
    """
    code: list[int] = [EXIT_FAILURE]

    def ended() -> None:
        # Whatever ended the work, a launcher that ends the ranks because of it must not break off the exit handlers.
        if is_distributed():
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def leave() -> None:
        if is_distributed():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code[0])

    atexit.register(leave)  # before the work registers handlers of its own, which thus run first
    try:
        work()
        code[0] = EXIT_OK
    except SystemExit as leaving:
        code[0] = leaving.code if isinstance(leaving.code, int) else EXIT_FAILURE if leaving.code else EXIT_OK
        raise
    finally:
        ended()


def local_processes(wanted: int | None) -> int:
    """Return how many ranks to start here: as many as `wanted`, at most one per GPU where there are GPUs.

    None: one per GPU, one without GPUs.
    """
    import torch

    accelerators = torch.cuda.device_count()
    if not accelerators:
        return wanted or 1
    return min(wanted or accelerators, accelerators)


def launch(arguments: list[str], processes: int, module: str = "pipeline") -> Outcome:
    """Run `python -m <module> <arguments>` on `processes` ranks of this machine and return how it ended.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP reach the ranks as SIGTERM, which have the launcher's 30 seconds to save and
    leave. A hang-up that this process ignores (`nohup`) does not.
    """
    with tempfile.TemporaryDirectory(prefix="pipeline-") as folder:
        command = launcher_command([module, *arguments], processes)
        # A session of its own: a Ctrl-C reaches the ranks once, through us, and not a second time from the terminal.
        launcher = subprocess.Popen(command, env=launcher_environment(processes, folder), start_new_session=True)
        stopped = False

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal stopped
            stopped = True
            _terminate(launcher)

        before = {number: signal.signal(number, stop) for number in heeded((signal.SIGINT, *STOP_SIGNALS))}
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
        # An empty name, for a hostfile in the launcher's default place would send the ranks to other machines.
        *["--hostfile", "", "--num_accelerators", str(processes)],
        *["--master_port", str(free_port()), "--no_local_rank", "--log_level", "error"],
        *[
            "--module",
            "pipeline.ranks.launched",
            *arguments,
        ],  # which first undoes what the launcher does to the devices
    ]


def launcher_environment(processes: int, outcomes: str) -> dict[str, str]:
    """Return the launcher's environment: ours, plus what DeepSpeed needs to count ranks on a machine without GPUs."""
    import torch

    # Without what the ranks get back, of which the launcher would say that it ignores it.
    env = {name: value for name, value in os.environ.items() if name not in NUMBERED}
    env |= {OUTCOMES: outcomes, GIVEN: given_devices()}
    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")
        env["LOCAL_SIZE"] = str(processes)  # without it DeepSpeed takes the number of NUMA nodes for that of the ranks
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    return env


def combined(outcomes: list[Outcome], launcher_code: int, stopped: bool) -> Outcome:
    """Return the outcome of the launch from those of its ranks.

    A rank that fails makes the launcher terminate the others, so a wrong input or a failure goes before an
    interruption.
    """
    for code in (EXIT_USER, EXIT_FAILURE, EXIT_RESUMABLE):
        found = next((outcome for outcome in outcomes if outcome.code == code), None)
        if found is not None:
            return found
    if stopped:
        return Outcome(EXIT_RESUMABLE, "stopped before the end; the same command goes on.")
    if launcher_code or not outcomes:
        return Outcome(EXIT_FAILURE, f"the ranks died (launcher's exit code {launcher_code}); see their output.")
    return Outcome(EXIT_OK, result=outcomes[0].result)


def _terminate(launcher: subprocess.Popen[bytes]) -> None:
    # The outer launcher dies of SIGTERM and would leave the ranks behind; its child, the inner one, stops them.
    import psutil

    try:
        inner = psutil.Process(launcher.pid).children()
    except psutil.NoSuchProcess:
        return
    for child in inner:
        child.terminate()
    if not inner:
        launcher.terminate()
