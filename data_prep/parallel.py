"""Work on many items in threads, results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Results that wait for the consumer, per worker: enough to keep the workers busy, few enough to fit in memory.
AHEAD = 4
FEWEST = 2  # pieces of work under way, however large their results are


def ordered_map(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    most_bytes: int | None = None,
    size: Callable[[Result], int] = lambda result: 0,
) -> Iterator[Result]:
    """Yield `work(item)` for every item in order, computed ahead by `workers` threads.

    With `most_bytes` so many pieces of work are under way or wait as results of the largest `size` so far fit into it;
    before the first result, one for each worker. Threads and not processes: image decoding and tensor work release the
    GIL, and a process costs an import of torch.
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
