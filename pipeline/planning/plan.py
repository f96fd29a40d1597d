"""The memory plan's data: entries per GPU, and the lengths of the sample that it is made for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

FLOAT32 = 4

GIB = 1 << 30

BESIDE = "plus about 1 GiB for CUDA and what its allocator cannot reuse"


@dataclass(frozen=True)
class Tokens:
    """Lengths of one sample in tokens; `source` says in words how they were determined."""

    image: int
    text: int  # the question with its template
    answer: int
    source: str
    # Maxima over all images; the longest sample need not have them:
    crops: int = 1  # crops that the vision tower encodes
    patches: int = 0  # of the whole image, where the tower takes images of any size
    values: int = 0  # pixel values that the processor returns


@dataclass(frozen=True)
class Entry:
    """Bytes per GPU for one purpose, in training and in evaluation."""

    name: str
    training: int
    evaluation: int
    note: str


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of each GPU, by purpose."""

    ranks: int
    zero_stage: int
    entries: tuple[Entry, ...]
    # Bytes of host memory per rank for the pixels of batches that loader processes have prepared.
    waiting: int = 0
    pool: int = 0  # and for the modules of all finished stages

    @property
    def most(self) -> int:
        """Bytes per GPU at the peak of the run."""
        return max(self.training, self.evaluation)

    @property
    def training(self) -> int:
        """Bytes per GPU at the peak of a training step."""
        return sum(entry.training for entry in self.entries)

    @property
    def evaluation(self) -> int:
        """Bytes per GPU while answers are generated."""
        return sum(entry.evaluation for entry in self.entries)

    def bytes_of(self, *names: str) -> int:
        """Bytes of the entries with these names, in training."""
        return sum(entry.training for entry in self.entries if entry.name in names)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON, in bytes."""
        totals = {"training": self.training, "evaluation": self.evaluation}
        parts = {entry.name: {k: v for k, v in asdict(entry).items() if k != "name"} for entry in self.entries}
        return {
            "ranks": self.ranks,
            "zero_stage": self.zero_stage,
            "bytes_per_gpu": totals,
            "parts": parts,
            "waiting_pixels": self.waiting,
            "pool": self.pool,
        }
