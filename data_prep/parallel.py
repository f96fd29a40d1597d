"""A parallel map over threads that yields results in order and bounds the memory of those that wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4  # items submitted ahead of the consumer, per worker
FEWEST = 2  # items in flight at least, however large their results are


def ordered_map(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    most_bytes: int | None = None,
    size: Callable[[Result], int] = lambda result: 0,
) -> Iterator[Result]:
    """Yield `work(item)` for every item in order, computed ahead by `workers` threads.

    Threads instead of processes, because image decoding and tensor operations release the GIL and a process would
    have to import torch.

    Args:
        work: computes a result.
        items: its inputs.
        workers: number of threads.
        most_bytes: bound on the items in flight (running or waiting for the consumer): as many as results of the
            largest size so far fit into it, and one per worker until the first result. None: AHEAD per worker.
        size: bytes of a result.
    """
    ahead, largest = workers * AHEAD if most_bytes is None else workers, 0
    with ThreadPoolExecutor(max_workers=workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                while len(waiting) > ahead:
                    result = waiting.popleft().result()
                    largest = max(largest, size(result))
                    if most_bytes is not None:
                        ahead = max(FEWEST, min(workers * AHEAD, most_bytes // max(largest, 1)))
                    yield result
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
