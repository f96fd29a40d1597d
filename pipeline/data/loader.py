"""Loader processes: items of a data set made beside the loop that uses them."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import UserError
from pipeline.ranks.shutdown import ignore_signals_from_others

AHEAD = 4  # items that each process makes ahead
SHARED_MEMORY = Path("/dev/shm")


class Items(Protocol):
    """What makes the item of a number."""

    def __getitem__(self, item: int, /) -> Any: ...


def loaded(data: Items, numbers: Sequence[int], workers: int, ahead: int = AHEAD) -> Iterator[Any]:
    """The items of `data` in the order of `numbers`, made by so many processes, or by this one without any; each makes
    up to `ahead` items before they are asked for.

    The processes are forked, whatever the interpreter's default is (Python 3.14: forkserver). Others would be sent
    `data` in a pickle: processors of some models have classes that cannot be pickled, and keys and records would be
    copied once per process where forked ones share them.

    Raises the UserError that an item raised, with its own sentence; UserError when shared memory was too small.
    """
    options: dict[str, Any] = {}
    if workers:
        options = {
            "persistent_workers": True,
            "prefetch_factor": ahead,
            "worker_init_fn": ignore_signals_from_others,
            "multiprocessing_context": "fork",
        }
    # A generator of its own: the loader draws a number that the training's own random numbers must not miss.
    own = torch.Generator()
    source = cast(Dataset[Any], _Telling(data))
    # Workers are forked with SIGTERM blocked. Where the rank called torch.set_num_threads, torch starts threads in a
    # worker before `ignore_signals_from_others` runs in it; unblocked, one of them would take the signal and the
    # process would die of it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if workers else ())
    try:
        loading = DataLoader(source, batch_size=None, sampler=numbers, num_workers=workers, generator=own, **options)
        found = iter(loading)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for _ in range(len(numbers)):
        try:
            item = next(found)
        except RuntimeError as error:
            # What torch says when a page of shared memory that was promised cannot be had.
            if workers and "Bus error" in str(error):
                raise UserError(no_shared_memory(workers)) from error
            raise
        if isinstance(item, _Refused):
            raise UserError(item.sentence)
        yield item


def no_shared_memory(workers: int) -> str:
    """The sentence for loader processes that ran out of shared memory."""
    try:
        size = f" of {shutil.disk_usage(SHARED_MEMORY).total >> 20} MiB"
    except OSError:
        size = ""
    return (
        f"The {workers} loader processes ran out of shared memory ({SHARED_MEMORY}{size}), through which they hand "
        "over what they load. Give the machine or the container more (docker run --shm-size=8g), or set "
        "train.workers to a smaller number, or to 0."
    )


@dataclass(frozen=True)
class _Refused:
    """An item that could not be made: what the user is told."""

    sentence: str


class _Telling:
    """Hands a UserError over as an item: a loader would raise it with the process's traceback as its text."""

    def __init__(self, data: Items) -> None:
        self.data = data

    def __getitem__(self, number: int) -> Any:
        try:
            return self.data[number]
        except UserError as error:
            return _Refused(str(error))
