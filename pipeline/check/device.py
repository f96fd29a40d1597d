"""The devices that `check` plans the memory for: those of this machine, or GPUs that the user describes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.planning.auto import allowed, gpu_memory
from pipeline.planning.plan import GIB
from pipeline.ranks.environment import USUAL_NODE, launched_place, launched_ranks_per_node
from pipeline.ranks.launch import local_processes

GB = 10**9


@dataclass(frozen=True)
class Device:
    """What one rank of a run computes on."""

    memory: int | None  # bytes of a GPU; None: CPUs
    name: str = ""  # of a GPU that is here
    asked: bool = False  # described by --gpu-memory, and perhaps not on this machine

    @classmethod
    def of(cls, gigabytes: float | None) -> Device:
        """GPUs of so many GB (1e9 bytes); None: those of this machine, or its CPUs."""
        if gigabytes is not None:
            return cls(int(gigabytes * GB), asked=True)
        if not torch.cuda.is_available():
            return cls(None)
        first = torch.device("cuda", 0)
        return cls(gpu_memory(first), torch.cuda.get_device_name(first))

    def ranks(self, wanted: int | None, recipe: Any, env: Mapping[str, str] = os.environ) -> int:
        """The ranks to plan for: `wanted`, else those of this launch, else 1 on GPUs that are not here and otherwise
        those that `run` would start."""
        place = launched_place(env)
        if wanted or place:
            return wanted or (place.size if place else 1)
        return 1 if self.asked else local_processes(recipe.train.processes)

    def node(self, env: Mapping[str, str] = os.environ) -> int | None:
        """Ranks on each node of GPUs that may not be here; None: as on this machine."""
        return (launched_ranks_per_node(env) or USUAL_NODE) if self.asked else None

    def words(self, ranks: int) -> str:
        """So many devices: "1 GPU of 24 GB", "2 ranks on CPUs"."""
        many = "s" * (ranks > 1)
        if self.memory is None:
            return f"{ranks} rank{many} on CPUs"
        size = f"{self.memory / GB:g} GB" if self.asked else f"{self.memory / GIB:.1f} GiB ({self.name})"
        return f"{ranks} GPU{many} of {size}"

    def sentence(self, ranks: int) -> str:
        """For which devices a plan is, and which option plans for others."""
        if self.asked:
            return f"for {self.words(ranks)} (--gpu-memory), not for this machine"
        if self.memory is None:
            return f"for {self.words(ranks)}, as torch sees no GPU here (--gpu-memory 24 plans for GPUs of 24 GB)"
        return f"for {self.words(ranks)}, as here"

    def room(self) -> str:
        """How much of a GPU may be planned, in words."""
        memory = self.memory or 0
        return f"{max(allowed(memory), 0) / GIB:.2f} GiB of a GPU's {memory / GIB:.2f} GiB"

    def to_json(self, ranks: int, fits: bool | None) -> dict[str, Any]:
        """The fields of `memory` in the result of `check --json`: `fits` is null where there is no GPU to fit into."""
        kind = "cpu" if self.memory is None else "gpu"
        device = {"kind": kind, "bytes": self.memory, "name": self.name or None, "here": not self.asked}
        return {"device": {**device, "words": self.words(ranks)}, "fits": fits}
