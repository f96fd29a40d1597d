"""Prints, as `python -m tests.ranks.worker_threads`, 1 or 0 for each thread of a worker: whether it blocks SIGTERM."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import psutil
import torch

from pipeline.training.loop import loaded_steps


class Numbers:
    """A loader's batches that are the numbers of their steps."""

    steps, accumulation = 30, 1

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, item: int, /) -> int:
        return item


def main() -> None:
    """Print a JSON list of the worker's threads."""
    torch.set_num_threads(8)
    before = psutil.Process().children()
    loader = loaded_steps(Numbers(), workers=1)
    next(loader)
    (worker,) = [child for child in psutil.Process().children() if child not in before]
    blocked = [
        int(re.findall(r"SigBlk:\s*(\w+)", path.read_text())[0], 16) >> (signal.SIGTERM - 1) & 1
        for path in Path(f"/proc/{worker.pid}/task").glob("*/status")
    ]
    print(json.dumps(blocked))


if __name__ == "__main__":
    main()
