"""Told to stop from the first second on: hang-ups, a process that is still starting, the workers of a rank's loader."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.errors import EXIT_RESUMABLE, UserError
from pipeline.ranks.environment import require_srun
from pipeline.ranks.outcome import OUTCOMES
from pipeline.ranks.shutdown import STOP_SIGNALS, handled_signals, stop_on_signals
from pipeline.training.loop import loaded_steps
from tests.processes import PROJECT
from tests.ranks.worker_threads import Numbers

BATCH_SHELL = {"SLURM_JOB_ID": "41", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_every_stop_signal_sets_the_flag(number: signal.Signals) -> None:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), number)
        assert stop.requested


def test_a_hang_up_is_ignored_under_nohup() -> None:
    assert signal.SIGHUP in handled_signals((signal.SIGINT, *STOP_SIGNALS))  # what `launch` hands on
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert signal.SIGHUP not in handled_signals((signal.SIGINT, *STOP_SIGNALS))
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_rank_that_is_still_starting_leaves_as_one_that_was_stopped(number: signal.Signals, tmp_path: Path) -> None:
    environment = {**os.environ, OUTCOMES: str(tmp_path), "RANK": "1", "WORLD_SIZE": "2"}
    rank = subprocess.Popen([sys.executable, "-m", "pipeline", "run", "nano"], cwd=PROJECT, env=environment)
    while not catches(rank.pid, number):
        assert rank.poll() is None
        time.sleep(0.005)
    rank.send_signal(number)
    assert rank.wait(60) == EXIT_RESUMABLE
    told = json.loads((tmp_path / "rank-1.json").read_text())
    assert (told["code"], "run the same command again" in told["error"]) == (EXIT_RESUMABLE, True)


def test_the_workers_of_a_loader_leave_signals_to_their_rank_and_end_with_the_loader() -> None:
    loader = loaded_steps(Numbers(), workers=1)
    before = psutil.Process().children()
    found = [next(loader)]
    (worker,) = [child for child in psutil.Process().children() if child not in before]
    for number in (*STOP_SIGNALS, signal.SIGINT):
        # From a launcher, which is another process than the rank.
        subprocess.run([sys.executable, "-c", f"import os; os.kill({worker.pid}, {number})"], check=True)
    found += loader
    assert found == [[number] for number in range(Numbers.steps)]
    worker.wait(20)


def test_no_thread_of_a_worker_but_the_listening_one_takes_a_signal() -> None:
    """Where the rank has set its threads, torch starts as many in each forked process before anything of ours runs.

    In a process of its own: whether torch does so depends on what was computed in the process before.
    """
    command = [sys.executable, "-m", "tests.ranks.worker_threads"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300, check=True)
    blocked = json.loads(done.stdout.splitlines()[-1])
    assert len(blocked) > 8 and blocked.count(0) <= 1


def test_a_rank_that_fails_ends_although_its_loader_is_still_there(tmp_path: Path) -> None:
    program = (
        "from pipeline.training.loop import loaded_steps; from tests.ranks.test_stopping import Numbers\n"
        "kept = loaded_steps(Numbers(), 1); next(kept); raise ValueError('a bug')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    assert "a bug" in done.stderr


def test_the_shell_of_a_job_with_several_tasks_is_not_taken_for_a_rank() -> None:
    with pytest.raises(UserError, match=r"shell of Slurm job 41 and not one of its 8 tasks.*run_sequence\.sh.*srun"):
        require_srun(BATCH_SHELL)
    for environment in (
        {},
        {**BATCH_SHELL, "SLURM_STEP_ID": "0"},
        {**BATCH_SHELL, "SLURM_NTASKS": "1"},
        {**BATCH_SHELL, "RANK": "0", "WORLD_SIZE": "8"},
    ):
        require_srun(environment)
