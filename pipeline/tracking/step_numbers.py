"""Metrics of a training step: its line in metrics.jsonl, memory, and shares of samples that get earlier sets."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from pipeline.console.progress import Progress
from pipeline.data.collate import MicroBatches
from pipeline.data.selection import Selection


def set_shares(selection: Selection, names: Sequence[str]) -> dict[str, float]:
    """Percent of a stage's training samples that get each earlier set, by the names in `names`."""
    shares = [100.0 * float((selection.numbers == number).any(1).float().mean()) for number in range(len(names))]
    return {f"routing_share.{name}": share for name, share in zip(names, shares, strict=True)}


class StepNumbers:
    """Computes the metrics of a step for tracking.

    These are its line in metrics.jsonl, this rank's memory in GiB (the peak on a GPU, else the resident memory of the
    process), and for each earlier set the percent of the samples since the line before that got it. Sets that no sample
    of the stage gets are left out. No communication is needed: the order of samples gives the global batches.
    """

    def __init__(self, batches: MicroBatches, names: Sequence[str], start: int = 0) -> None:
        self.batches, self.done = batches, start
        used = [number for number in batches.selection.numbers.unique().tolist() if number >= 0]
        self.names = {number: names[number] for number in used}

    def __call__(self, progress: Progress) -> dict[str, float]:
        numbers = {**progress.numbers(), "memory_gib": _memory_gib()}
        if self.names:
            selected = self.batches.selection.numbers[self.batches.samples_of(range(self.done, progress.step))]
            for number, name in self.names.items():
                numbers[f"routing_share_of_step.{name}"] = 100.0 * float((selected == number).any(1).float().mean())
        self.done = progress.step
        return numbers


def _memory_gib() -> float:
    on_device = torch.cuda.is_available()
    used = torch.cuda.max_memory_allocated() if on_device else psutil.Process().memory_info().rss
    return round(used / 2**30, 3)
