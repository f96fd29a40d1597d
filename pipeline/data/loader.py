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
    """Makes items by their numbers."""

    def __getitem__(self, item: int, /) -> Any: ...


def loaded(
    data: Items, numbers: Sequence[int], workers: int, ahead: int = AHEAD, pinned: bool = False
) -> Iterator[Any]:
    """Yield the items of `data` in the order of `numbers`.

    Worker processes are forked, whatever the interpreter's default is (Python 3.14: forkserver). With other start
    methods `data` would be pickled: some models' processors have classes that cannot be pickled, and keys and records
    would be copied once per process instead of shared.

    Raises the UserError that an item raised, and UserError when shared memory is too small.

    Args:
        data: makes an item from its number.
        numbers: the items, in order.
        workers: number of worker processes; 0: items are made in this process.
        ahead: items that each worker makes in advance.
        pinned: items are handed over in pinned memory (their `pin_memory()`), copied there by a thread; needs a GPU.
    """
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": pinned}
    if workers:
        options |= {
            "persistent_workers": True,
            "prefetch_factor": ahead,
            "worker_init_fn": ignore_signals_from_others,
            "multiprocessing_context": "fork",
        }
    # A generator of its own, because the loader draws a number and would change the training's random numbers.
    own = torch.Generator()
    source = cast(Dataset[Any], _Telling(data))
    # Workers are forked with SIGTERM blocked. Where the rank called torch.set_num_threads, torch starts threads in a
    # worker before `ignore_signals_from_others` runs in it; unblocked, one of them would take the signal and the
    # process would die of it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if workers else ())
    try:
        loading = DataLoader(source, batch_size=None, sampler=numbers, generator=own, **options)
        found = iter(loading)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for _ in range(len(numbers)):
        try:
            item = next(found)
        except RuntimeError as error:
            # torch's message when a worker is killed because a page of shared memory cannot be allocated.
            if workers and "Bus error" in str(error):
                raise UserError(no_shared_memory(workers)) from error
            raise
        if isinstance(item, _Refused):
            raise UserError(item.sentence)
        yield item


def no_shared_memory(workers: int) -> str:
    """The error message for loader processes that ran out of shared memory."""
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
    """The error message of an item that could not be made."""

    sentence: str


class _Telling:
    """Returns a UserError as an item, because a DataLoader would re-raise it with the worker's traceback as message."""

    def __init__(self, data: Items) -> None:
        self.data = data

    def __getitem__(self, number: int) -> Any:
        try:
            return self.data[number]
        except UserError as error:
            return _Refused(str(error))
