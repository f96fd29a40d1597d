"""Ends a job that hangs: which rank waits where, in which collective, and a stack of every thread of every rank.

A rank that takes another path than its peers, or stops answering, leaves the others waiting in a collective for ever
(docs/design.md 7.3). Each rank has a thread that counts its progress into one number for all ranks; when that number
stands still for too long, every rank writes its stacks and the job ends with exit code 1.
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

SLOW_S = 1800.0  # what is done once (loading, saving, the first step of a stage) may take longer than a step
MARGIN_S = 600.0  # by which the process group waits longer than the watchdog
POLLS = 20  # looks at the clock within the limit, at least one every five seconds
GRACE_S = 10.0  # for the other ranks to write their stacks too
_BEATS, _HUNG, _WHERE = "pipeline/beats", "pipeline/hung", "pipeline/where/{}"
_COLLECTED, _COLLECTORS = "pipeline/collected", "pipeline/collectors"
_PACKAGE = Path(__file__).resolve().parents[1]
_PROJECT = _PACKAGE.parent


def collective_timeout(limit_s: float | None) -> datetime.timedelta:
    """How long a collective may wait: longer than the watchdog, for torch would end the job without saying where."""
    return datetime.timedelta(seconds=max(limit_s or 0.0, SLOW_S) + MARGIN_S)


class Watchdog:
    """Watches the progress of all ranks while its block runs; `limit_s` None watches nothing."""

    def __init__(self, world: World, limit_s: float | None) -> None:
        self.world, self.limit_s = world, limit_s
        store: Any = dist.distributed_c10d._get_default_store() if limit_s and world.size > 1 else None
        self._store = store.clone() if store else None  # a connection for each thread
        self._pause = min(5.0, (limit_s or 0.0) / POLLS)
        self._beats, self._doing, self._slow = 0, "starting", True
        self._total = 0  # progress of all ranks
        self._hung: str | None = None  # what the first rank that gives up says
        self._told = False  # whether the store has taken what this rank says
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
        """Tell that there was progress and what comes next; `slow` for what may take longer than a step."""
        self._doing, self._slow = doing, slow
        self.progress()

    def progress(self) -> None:
        """Tell that there was progress in what goes on."""
        self._beats += 1

    # ------------------------------------------------------------------ the threads

    def _count(self) -> None:
        """Add own progress to that of all ranks; a thread of its own, for the store is a rank that may hang too."""
        own = 0
        while not self._ended.wait(self._pause):
            new = self._beats - own
            own += new
            if self._store is None:
                self._total += new
                continue
            with contextlib.suppress(Exception):  # rank 0 is gone: the total stands still, and that is what it means
                self._total = self._store.add(_BEATS, new)
                if self._store.check([_HUNG]):
                    self._hung = self._store.get(_HUNG).decode()

    def _watch(self) -> None:
        assert self.limit_s is not None
        total, limit = -1, 0.0
        since = looked = time.monotonic()
        while not self._ended.wait(self._pause):
            now = time.monotonic()
            # A limit that has just changed is for what begins now, and a job that was suspended must get its time back.
            allowed = max(self.limit_s, SLOW_S) if self._slow else self.limit_s
            suspended = now - looked > 5 * self._pause + 1.0
            if self._total != total or allowed != limit or suspended:
                total, limit, since = self._total, allowed, now
            looked = now
            # Should this thread itself be kept from running (a library that never gives the interpreter back), this
            # timer, which needs no interpreter, writes the stacks and ends the process. It goes on while a job is
            # suspended, so it gives as much time as the collectives do.
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
        if sharing.is_alive() and self._told:  # the store answers, so what the others say is still to come
            sharing.join(2 * GRACE_S)
        places = dict(places)
        silent = [other for other in range(self.world.size) if other not in places]
        summary = "; ".join(f"rank {number} {text}" for number, text in sorted(places.items()))
        lost = f"; rank {', '.join(map(str, silent))} does not answer at all (stopped or dead)" if silent else ""
        message = (
            f"The job hung and was ended. {hung} {summary}{lost}. The stacks of all ranks that answer are in the log; "
            "what was finished and the checkpoints are kept, and the same command goes on from them."
        )
        leave_outcome(Outcome(EXIT_FAILURE, message))
        if rank == min(places):
            print(f"error: {message}", file=sys.stderr, flush=True)
        if self.world.main and self._store is not None:
            time.sleep(min(GRACE_S, 2.0))  # the others still read from the store that rank 0 may hold
        os._exit(EXIT_FAILURE)  # a rank that hangs in a collective cannot be asked to leave

    def _share(self, hung: str, place: str, places: dict[int, str]) -> None:
        """Tell the other ranks where this one is, and put in `places` what all of them say.

        Rank 0 collects, and the others ask for what it has collected: were each to ask for each, 512 ranks would put a
        quarter of a million questions to one store, and most would have no answer in time. Where rank 0 does not
        answer but its store does, one of the others does it.
        """
        if self._store is None:
            return
        with contextlib.suppress(Exception):  # what the others say is lost with rank 0
            self._store.set(_WHERE.format(self.world.rank), json.dumps(place))
            self._store.set(_HUNG, hung)
            self._told = True
            if self.world.main:
                self._collect(places, GRACE_S)
                return
            try:  # for longer than rank 0 collects, which may have noticed later
                self._store.wait([_COLLECTED], datetime.timedelta(seconds=1.7 * GRACE_S))
            except Exception:
                if self._store.add(_COLLECTORS, 1) == 1:
                    self._collect(places, GRACE_S / 2)
                    return
                self._store.wait([_COLLECTED], datetime.timedelta(seconds=GRACE_S))
            found = json.loads(self._store.get(_COLLECTED))
            places.update({int(rank): text for rank, text in found.items()})

    def _collect(self, places: dict[int, str], seconds: float) -> None:
        """Put where the ranks are in `places`, for at most so long, and then into the store."""
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
        """The collective operation that this call is, in torch's or DeepSpeed's words."""
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
    """In which collective this process waits and which line of ours called it; without one, where the main thread is.

    On GPUs the collective runs on its own; then the line that waits for its result tells.
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
