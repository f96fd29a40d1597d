"""A plan of the memory of each GPU: its entries, and the sample that it is made for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

FLOAT32 = 4

GIB = 1 << 30

BESIDE = "plus about 1 GiB for CUDA and what its allocator cannot reuse"


@dataclass(frozen=True)
class Tokens:
    """Lengths of one sample; `source` says where they are from."""

    image: int
    text: int  # the question with its template
    answer: int
    source: str
    # Of the images with most of each, which need not be the longest sample's:
    crops: int = 1  # images that the vision tower sees
    patches: int = 0  # of all of it, where the tower takes images of any size
    values: int = 0  # numbers that the processor hands over


@dataclass(frozen=True)
class Entry:
    """Bytes per GPU of one kind of content, while training and while evaluating."""

    name: str
    training: int
    evaluation: int
    note: str


@dataclass(frozen=True)
class MemoryPlan:
    """What lies in the memory of each GPU."""

    ranks: int
    zero_stage: int
    entries: tuple[Entry, ...]
    # Bytes of the host's memory per rank for the pixels of batches that wait in loader processes.
    waiting: int = 0

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
        """Bytes while training of the entries with these names."""
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
        }
