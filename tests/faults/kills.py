"""kill -9 at random moments, inside writes too: the resumed run must equal the one that was never killed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults.bench import Bench, Process, Row

# What a run writes through these, by (module, name): killed before, in the middle of, or after one of the calls; and
# how many there are at least.
WRITERS = {
    "checkpoint in a stage": (
        [("pipeline.training.resume", "write_synced"), ("pipeline.training.resume", "sync_folder")],
        16,
    ),
    "stage's checkpoint": ([("pipeline.runs.finished", "write_synced"), ("pipeline.runs.finished", "sync_folder")], 6),
    "any file": ([("pipeline.files.atomic", "os.replace"), ("pathlib", "Path.rename")], 16),
}
ATTEMPTS = 6  # at a kill that came too late, each twice as early as the one before


def die() -> None:
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_a_write(kind: str, number: int, moment: float) -> Callable[[], None]:
    """Sabotage: die in the `number`-th write of a kind, `moment` 0 before it, 1 after it, in between half-way."""

    def sabotage() -> None:
        import importlib

        calls = []
        for module, name in WRITERS[kind][0]:
            *path, attribute = name.split(".")
            owner: Any = importlib.import_module(module)
            for part in path:
                owner = getattr(owner, part)

            original = getattr(owner, attribute)

            def dying(*arguments: Any, original: Any = original, **named: Any) -> Any:
                calls.append(1)
                if len(calls) != number:
                    return original(*arguments, **named)
                if moment < 1 and len(arguments) > 1 and isinstance(arguments[1], bytes):
                    Path(arguments[0]).write_bytes(arguments[1][: int(len(arguments[1]) * moment)])
                    die()
                if moment < 0.5:
                    die()
                original(*arguments, **named)
                die()

            setattr(owner, attribute, dying)

    return sabotage


def moments(kills: int, lasts_s: float, seed: int) -> Iterator[tuple[str, float | tuple[str, int, float]]]:
    """Half of the kills by the clock over a run's length, half inside writes."""
    chance = random.Random(seed)
    for number in range(kills):
        if number % 2:
            yield "by the clock", chance.uniform(0, lasts_s)
        else:
            kind = list(WRITERS)[number // 2 % len(WRITERS)]
            yield (
                f"in a write: {kind}",
                (kind, chance.randint(1, WRITERS[kind][1]), chance.choice([0.0, 0.3, 0.7, 1.0])),
            )


def killed_runs(bench: Bench, kills: int = 30, seed: int = 0) -> Row:
    """One rank: kill a run once, run it again to its end, compare; as often as said."""
    recipe = bench.recipe("timed")
    began = time.monotonic()
    assert bench.run(recipe)[0] == 0
    lasts = time.monotonic() - began
    struck, different = 0, []
    for number, (what, moment) in enumerate(moments(kills, lasts, seed)):
        code, attempt = 0, 0
        while code == 0 and attempt < ATTEMPTS:
            # Over before its end came (it ran faster, or wrote less often, than was thought): sooner, then.
            recipe = bench.recipe(f"killed-{number}-{attempt}")
            if isinstance(moment, tuple):
                kind, write, part = moment
                code, _ = bench.run(recipe, die_in_a_write(kind, max(1, write >> attempt), part))
            else:
                process = bench.start(["run", str(recipe)])
                time.sleep(moment / 2**attempt)
                code = end(process)
            attempt += 1
        struck += code == -signal.SIGKILL
        code, process = bench.run(recipe)
        wrong = bench.differences(recipe) if code == 0 else [f"exit code {code}: {process.said()}"]
        if wrong:
            different.append(f"{number} ({what} {moment}): {', '.join(wrong)}")
        print(f"  kill {number + 1}/{kills} {what} {moment}: {'; '.join(wrong) or 'equal'}", flush=True)
    happens = f"{struck} of {kills} hit before their end; {kills - len(different)} resumed runs equal the whole one"
    fault, passed = f"kill -9 at {kills} random moments, half of them in writes", struck == kills and not different
    return Row(fault, happens, "steps since the last checkpoint", "-9, then 0", passed, "; ".join(different))


def killed_ranks(bench: Bench, kills: int = 3, seed: int = 1) -> Row:
    """Two ranks under ZeRO-3: kill one, see the other leave, start both again, compare with two not killed."""
    chance = random.Random(seed)
    changes: dict[str, Any] = {"train__deepspeed": "ds_configs/zero3.json", "train__watchdog_s": 60}
    whole = bench.recipe("two-whole", **changes)
    began = time.monotonic()
    assert [process.wait() for process in bench.ranks(whole)] == [0, 0]
    lasts = time.monotonic() - began
    different, codes, struck = [], [], 0
    for number in range(kills):
        victim, moment, attempt, code = number % 2, lasts * chance.uniform(0.5, 0.9), 0, 0
        while code == 0 and attempt < ATTEMPTS:
            recipe = bench.recipe(f"two-killed-{number}-{attempt}", **changes)
            processes = bench.ranks(recipe)
            time.sleep(moment / 2**attempt)
            code, other = end(processes[victim]), processes[1 - victim].wait()
            attempt += 1
        struck += code == -signal.SIGKILL
        codes.append(other)
        again = [process.wait() for process in bench.ranks(recipe)]
        wrong = bench.differences(recipe, whole) if again == [0, 0] else [f"exit codes {again}"]
        different += [f"{number}: {', '.join(wrong)}"] if wrong else []
        print(f"  rank {victim} killed, the other: {codes[-1]}; {'; '.join(wrong) or 'equal'}", flush=True)
    happens = f"the other rank ends too (codes {codes}); {kills - len(different)} resumed runs equal the whole one"
    passed = struck == kills and not different and 0 not in codes
    fault = f"kill -9 of one of two ranks, {kills} times"
    return Row(fault, happens, "steps since the last checkpoint", "1, then 0", passed, "; ".join(different))


def end(process: Process) -> int:
    """kill -9, unless it has ended already; its exit code."""
    os.kill(process.pid, signal.SIGKILL)
    return process.wait()


def stopped_rank(bench: Bench) -> Row:
    """TERM on one of two ranks, and again while it saves."""
    recipe = bench.recipe("told", train__steps=200, train__save_steps=None)
    processes = bench.ranks(recipe)
    wait_for(bench.stage(recipe, 1, unfinished=True) / "metrics.jsonl")
    for _ in range(3):
        os.kill(processes[1].pid, signal.SIGTERM)
        time.sleep(0.01)
    codes = [process.wait() for process in processes]
    saved = list(bench.stage(recipe, 1, unfinished=True).glob("resume/step-*/state.json"))
    happens, passed = "both ranks save after the same step and leave", codes == [75, 75] and len(saved) == 1
    said = processes[0].said("stopped: ")
    return Row("TERM on one of two ranks, three times", happens, "nothing", str(codes[0]), passed, said)


def wait_for(path: Path, limit_s: float = 300) -> None:
    """Wait until a file is there."""
    until = time.monotonic() + limit_s
    while not path.is_file():
        if time.monotonic() > until:
            raise TimeoutError(f"{path} did not appear")
        time.sleep(0.02)
