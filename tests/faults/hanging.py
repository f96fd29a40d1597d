"""Ranks that stop answering or take another path than their peers: the watchdog ends the job and says where."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from tests.faults.bench import Bench, Row
from tests.faults.kills import wait_for

LIMIT_S = 20.0  # the watchdog's, in these runs: longer than a step on a machine that has other things to do
ENDS_WITHIN_S = 300.0


def at_step(number: int, do: Callable[[], object]) -> None:
    """Sabotage: do something in the `number`-th forward pass of this process."""
    from pipeline.prompts.model import LearnerOnLMM

    forward, calls = LearnerOnLMM.forward, []

    def sabotaged(self: LearnerOnLMM, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            do()
        return forward(self, *arguments)

    LearnerOnLMM.forward = sabotaged  # type: ignore[method-assign, assignment]


def other_path() -> None:
    """A rank's own idea of what comes next: a sum that the other rank knows nothing of, and for ever."""
    import torch
    import torch.distributed as dist

    group = dist.new_group([0, 1], use_local_synchronization=False)
    dist.all_reduce(torch.zeros(1), group=group)


def asleep() -> None:
    """A loader, a file system, a lock that never comes back."""
    while True:
        time.sleep(1)


def _hang(bench: Bench, name: str, fault: str, do: Callable[[], None], expected: list[str], limit_s: float) -> Row:
    recipe = bench.recipe(name, train__steps=50, train__watchdog_s=limit_s)

    def sabotage(rank: int) -> None:
        if rank == 1:
            at_step(5, do)

    processes = bench.ranks(recipe, sabotage)
    wait_for(bench.stage(recipe, 1, unfinished=True) / "metrics.jsonl")
    began = time.monotonic()
    codes = [process.wait(ENDS_WITHIN_S) for process in processes]
    took = time.monotonic() - began
    said = processes[0].said("error: The job hung") or processes[1].said("error: The job hung")
    logs = [process.log.read_text(errors="replace") for process in processes]
    stacks = all("watchdog, rank" in log and "thread MainThread" in log for log in logs)
    passed = codes == [1, 1] and stacks and all(word in said for word in expected)
    happens = f"ended after {took:.0f} s (limit {limit_s:.0f} s), stacks of both ranks in the log"
    return Row(fault, happens, "steps since the last checkpoint", str(codes[0]), passed, said)


def sleeping_rank(bench: Bench, limit_s: float = LIMIT_S) -> Row:
    """One of two ranks waits for something that never comes."""
    expected = ["rank 0", "all_reduce", "rank 1", "in no collective", "asleep"]
    return _hang(bench, "asleep", "a rank stops working", asleep, expected, limit_s)


def diverging_rank(bench: Bench, limit_s: float = LIMIT_S) -> Row:
    """One of two ranks enters another collective than its peer."""
    expected = ["rank 0", "rank 1", "other_path"]
    return _hang(bench, "diverges", "a rank takes another path", other_path, expected, limit_s)


def stopped_process(bench: Bench) -> Row:
    """One of two processes is stopped as a whole, and cannot write a stack."""
    recipe = bench.recipe("stopped", train__steps=200, train__watchdog_s=LIMIT_S)
    processes = bench.ranks(recipe)
    wait_for(bench.stage(recipe, 1, unfinished=True) / "metrics.jsonl")
    os.kill(processes[1].pid, signal.SIGSTOP)
    code = processes[0].wait(ENDS_WITHIN_S)
    os.kill(processes[1].pid, signal.SIGKILL)  # which is what a launcher does next
    processes[1].wait()
    said = processes[0].said("error: The job hung")
    passed = code == 1 and "rank 1 does not answer" in said and "rank 0" in said
    return Row(
        "a rank's process is stopped",
        f"the other ends after the limit of {LIMIT_S:.0f} s and names it",
        "steps since the last checkpoint",
        str(code),
        passed,
        said,
    )
