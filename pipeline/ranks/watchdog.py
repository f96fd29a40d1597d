"""Ends a job that hangs, and logs in which collective each rank waits and the stacks of all its threads.

A rank that diverges from its peers or stops responding leaves the others in a collective that never ends
(docs/design.md 7.3). On each rank a thread adds its progress to a counter that all ranks share. When the counter has
not changed for longer than the limit, every rank logs its stacks and the job ends with exit code 1.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from pipeline.errors import EXIT_FAILURE
from pipeline.ranks.outcome import Outcome, leave_outcome
from pipeline.ranks.world import World

SLOW_S = 1800.0  # smallest limit for what is done once (loading, saving, the first step of a stage)
MARGIN_S = 600.0  # by which the timeout of collectives exceeds the watchdog's limit
POLLS = 20  # polls within the limit; at least one every five seconds
GRACE_S = 10.0  # time for the other ranks to log their stacks too
_BEATS, _HUNG, _WHERE = "pipeline/beats", "pipeline/hung", "pipeline/where/{}"
_COLLECTED, _COLLECTORS = "pipeline/collected", "pipeline/collectors"
_PACKAGE = Path(__file__).resolve().parents[1]
_PROJECT = _PACKAGE.parent


def collective_timeout(limit_s: float | None) -> datetime.timedelta:
    """The timeout of collectives: longer than the watchdog's limit, because torch's own error names no place."""
    return datetime.timedelta(seconds=max(limit_s or 0.0, SLOW_S) + MARGIN_S)


class Watchdog:
    """Watches the progress of all ranks while its block runs; with `limit_s` None it is off."""

    def __init__(self, world: World, limit_s: float | None) -> None:
        self.world, self.limit_s = world, limit_s
        store: Any = dist.distributed_c10d._get_default_store() if limit_s and world.size > 1 else None
        self._store = (
            store.clone() if store else None
        )  # a connection of its own; calls on a shared one wait for each other
        self._pause = min(5.0, (limit_s or 0.0) / POLLS)
        self._beats, self._doing, self._slow = 0, "starting", True
        self._total = 0  # progress of all ranks
        self._hung: str | None = None  # message of the first rank that finds the job hanging
        self._told = False  # whether this rank's place has been written to the store
        self._main = threading.get_ident()
        self._ended = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watch until the block ends."""
        if self.limit_s is None:
            yield self
            return
        threads = [threading.Thread(target=work, name="watchdog", daemon=True) for work in (self._count, self._watch)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            for thread in threads:
                thread.join(GRACE_S)
            faulthandler.cancel_dump_traceback_later()

    def beat(self, doing: str, slow: bool = False) -> None:
        """Count progress and name the next activity; `slow` for one that may take longer than a step."""
        self._doing, self._slow = doing, slow
        self.progress()

    def progress(self) -> None:
        """Count progress within the current activity."""
        self._beats += 1

    # ------------------------------------------------------------------ the threads

    def _count(self) -> None:
        """Add this rank's progress to the shared counter.

        In a thread of its own, because a call of the store blocks while rank 0, which serves it, hangs.
        """
        own = 0
        while not self._ended.wait(self._pause):
            new = self._beats - own
            own += new
            if self._store is None:
                self._total += new
                continue
            with contextlib.suppress(Exception):  # rank 0 is gone: the total no longer changes, which `_watch` detects
                self._total = self._store.add(_BEATS, new)
                if self._store.check([_HUNG]):
                    self._hung = self._store.get(_HUNG).decode()

    def _watch(self) -> None:
        assert self.limit_s is not None
        total, limit = -1, 0.0
        since = looked = time.monotonic()
        while not self._ended.wait(self._pause):
            now = time.monotonic()
            # The time counts anew when the limit changes with the activity, and after the job was suspended.
            allowed = max(self.limit_s, SLOW_S) if self._slow else self.limit_s
            suspended = now - looked > 5 * self._pause + 1.0
            if self._total != total or allowed != limit or suspended:
                total, limit, since = self._total, allowed, now
            looked = now
            # If a library never releases the interpreter's lock, this thread cannot run. faulthandler's timer is a C
            # thread that then writes the stacks and ends the process. It also runs while a job is suspended, so its
            # time is that of the collectives.
            timer = collective_timeout(self.limit_s).total_seconds()
            with contextlib.suppress(ValueError, OSError):  # no stderr to write to
                faulthandler.dump_traceback_later(timer, exit=True, file=2)
            if self._hung is None and now - since >= limit:
                self._hung = f"No rank has made progress for {now - since:.0f} s (limit {limit:.0f} s)."
            if self._hung is not None and not self._ended.is_set():
                self._end(self._hung)

    def _end(self, hung: str) -> None:
        rank = self.world.rank
        place = where(sys._current_frames(), self._main)
        if self._doing:
            place = f"{self._doing}: {place}"
        text = f"watchdog, rank {rank}: {hung} Here: {place}\n{stacks(sys._current_frames(), self._main)}"
        print(text, file=sys.stderr, flush=True)
        places = {rank: place}
        sharing = threading.Thread(target=self._share, args=(hung, place, places), daemon=True)
        sharing.start()
        sharing.join(GRACE_S)
        if sharing.is_alive() and self._told:  # the store responds, so wait for the places of the other ranks
            sharing.join(2 * GRACE_S)
        places = dict(places)
        silent = [other for other in range(self.world.size) if other not in places]
        summary = "; ".join(f"rank {number} {text}" for number, text in sorted(places.items()))
        lost = f"; rank {', '.join(map(str, silent))} does not answer at all (stopped or dead)" if silent else ""
        message = (
            f"The job hung and was ended. {hung} {summary}{lost}. The stacks of all ranks that answer are in the log; "
            "finished stages and checkpoints are kept. Run the same command again to resume from them."
        )
        leave_outcome(Outcome(EXIT_FAILURE, message))
        if rank == min(places):
            print(f"error: {message}", file=sys.stderr, flush=True)
        if self.world.main and self._store is not None:
            time.sleep(min(GRACE_S, 2.0))  # the other ranks still read from the store, which this rank serves
        os._exit(EXIT_FAILURE)  # the main thread hangs in a collective, where no exception can be raised

    def _share(self, hung: str, place: str, places: dict[int, str]) -> None:
        """Write this rank's place to the store and fill `places` with those of all ranks.

        Rank 0 collects the places and the others read its result: with every rank reading those of every other, 512
        ranks would send a quarter of a million requests to one store, too many for the time there is. Where rank 0
        does not respond but its store does, one of the others collects.
        """
        if self._store is None:
            return
        with contextlib.suppress(Exception):  # the store ended with rank 0
            self._store.set(_WHERE.format(self.world.rank), json.dumps(place))
            self._store.set(_HUNG, hung)
            self._told = True
            if self.world.main:
                self._collect(places, GRACE_S)
                return
            try:  # for longer than rank 0 collects, as it may have found the hang later
                self._store.wait([_COLLECTED], datetime.timedelta(seconds=1.7 * GRACE_S))
            except Exception:
                if self._store.add(_COLLECTORS, 1) == 1:
                    self._collect(places, GRACE_S / 2)
                    return
                self._store.wait([_COLLECTED], datetime.timedelta(seconds=GRACE_S))
            found = json.loads(self._store.get(_COLLECTED))
            places.update({int(rank): text for rank, text in found.items()})

    def _collect(self, places: dict[int, str], seconds: float) -> None:
        """Fill `places` from the store for at most `seconds`, then write the result to the store."""
        assert self._store is not None
        until = time.monotonic() + seconds
        missing = set(range(self.world.size)) - places.keys()
        while missing and time.monotonic() < until:
            for rank in sorted(missing):
                if self._store.check([_WHERE.format(rank)]):
                    places[rank] = json.loads(self._store.get(_WHERE.format(rank)))
                    missing.discard(rank)
            if missing:
                time.sleep(0.2)
        self._store.set(_COLLECTED, json.dumps(places))


# ---------------------------------------------------------------------- reading stacks


@dataclass(frozen=True)
class Place:
    """One call on a stack."""

    file: str
    line: int
    function: str
    text: str

    @property
    def ours(self) -> bool:
        file = Path(self.file)
        return file.is_relative_to(_PACKAGE) or (file.is_relative_to(_PROJECT) and "site-packages" not in self.file)

    @property
    def collective(self) -> str | None:
        """The name of the collective operation that this call runs, as torch or DeepSpeed name it; else None."""
        if self.function.startswith("_") or self.function in ("wrapper", "log_wrapper"):
            return None
        if self.file.endswith(("distributed/distributed_c10d.py", "deepspeed/comm/comm.py", "deepspeed/comm/torch.py")):
            return self.function
        if self.function == "wait" and "deepspeed" in self.file:
            return f"wait for a gather of {Path(self.file).stem}"
        return None

    def __str__(self) -> str:
        file = Path(self.file)
        shown = file.relative_to(_PROJECT) if self.ours else Path(*file.parts[-3:])
        return f"{shown}:{self.line} in {self.function}" + (f": {self.text}" if self.text else "")


def calls(frame: FrameType) -> list[Place]:
    """The calls on a stack, outermost first."""
    return [
        Place(part.filename, part.lineno or 0, part.name, part.line or "") for part in traceback.extract_stack(frame)
    ]


def where(frames: dict[int, FrameType], main: int) -> str:
    """The collective that this process waits in and the project's line that called it; else the main thread's line.

    On GPUs collectives are asynchronous; the process then waits in the line that needs the result.
    """
    found: tuple[str, list[Place]] | None = None
    for thread in sorted(frames, key=lambda number: number != main):  # backward passes have threads of their own
        stack = calls(frames[thread])
        name = next((name for place in stack if (name := place.collective)), None)
        if name is not None and found is None:
            found = name, stack
    if found is None:
        stack = calls(frames[main])
        return f"is in no collective but at {_ours(stack)}" if stack else "is nowhere to be seen"
    return f"waits in {found[0]}, called at {_ours(found[1])}"


def stacks(frames: dict[int, FrameType], main: int) -> str:
    """All threads' stacks, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for thread in sorted(frames, key=lambda number: number != main):
        if thread != threading.get_ident():
            lines = "".join(traceback.format_stack(frames[thread]))
            parts.append(f"  thread {names.get(thread, thread)}:\n{lines}")
    return "".join(parts)


def _ours(stack: list[Place]) -> str:
    """The innermost two lines of this project, or the innermost of all."""
    own = [place for place in stack if place.ours] or stack[-1:]
    return " < ".join(str(place) for place in reversed(own[-2:]))
