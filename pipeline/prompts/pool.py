"""The prompt pool: the finished prompt sets and their prototypes, as constant stacked tensors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import UserError
from pipeline.prompts.routers import States
from pipeline.prompts.routers.mean import PROTOTYPE


def tensor_fingerprint(tensor: Tensor) -> str:
    """SHA-256 (hex) of a tensor's float32 values: equal values give equal fingerprints."""
    values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
    return hashlib.sha256(str(tuple(values.shape)).encode() + values.numpy().tobytes()).hexdigest()


def fingerprint_of(tensors: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of named tensors; "" of none."""
    if not tensors:
        return ""
    prints = [f"{name}:{tensor_fingerprint(tensor)}" for name, tensor in sorted(tensors.items())]
    return hashlib.sha256("\n".join(prints).encode()).hexdigest()


@dataclass
class PromptPool:
    """Finished prompt sets in the order of their stages; values never change, sets are only appended.

    `names` T strings, `prompts` [T, L, D] and `prototypes` [T, K], both float32.
    """

    names: list[str] = field(default_factory=list)
    prompts: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0))
    prototypes: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    _prints: dict[int, str] = field(default_factory=dict, repr=False, compare=False)
    _printed: tuple[Tensor, int] | None = field(default=None, repr=False, compare=False)  # whose, at which version
    _states: tuple[Tensor, States] | None = field(default=None, repr=False, compare=False)  # of which prototypes

    def __len__(self) -> int:
        return len(self.names)

    @property
    def states(self) -> States:
        """What the router knows of each task, the same object as long as no set is added."""
        if self._states is None or self._states[0] is not self.prototypes:
            self._states = (self.prototypes, States.of_stacked({PROTOTYPE: self.prototypes}))
        return self._states[1]

    def append(self, name: str, prompt: Tensor, prototype: Tensor) -> None:
        """Add one finished set `prompt` [L, D] with its `prototype` [K]."""
        prompt = prompt.detach().float().clone()[None]
        prototype = prototype.detach().float().clone()[None]
        if not self.names:
            self.prompts, self.prototypes = prompt, prototype
        else:
            if prompt.shape[1:] != self.prompts.shape[1:] or prototype.shape[1:] != self.prototypes.shape[1:]:
                raise UserError(
                    f"Prompt set '{name}' has shapes {tuple(prompt.shape[1:])} and {tuple(prototype.shape[1:])}, the "
                    f"pool holds {tuple(self.prompts.shape[1:])} and {tuple(self.prototypes.shape[1:])}. All stages of "
                    "a run need the same prompt length, language model and CLIP model."
                )
            self.prompts = torch.cat([self.prompts, prompt.to(self.prompts.device)])
            self.prototypes = torch.cat([self.prototypes, prototype.to(self.prototypes.device)])
        self.names = [*self.names, name]

    def fingerprint(self, index: int) -> str:
        """SHA-256 (hex) of one prompt set's values, computed once as long as they are not written to."""
        version = self.prompts._version
        if self._printed is None or self._printed[0] is not self.prompts or self._printed[1] != version:
            self._prints, self._printed = {}, (self.prompts, version)
        if index not in self._prints:
            self._prints[index] = tensor_fingerprint(self.prompts[index])
        return self._prints[index]

    def save(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the pool as one safetensors file (names in the metadata), the prompts in this precision."""
        prompts = self.prompts.to(dtype).cpu().contiguous()
        save_file(
            {"prompts": prompts, "prototypes": self.prototypes.cpu().contiguous()},
            path,
            metadata={"names": "\n".join(self.names), "format": "prompt-pool-1"},
        )

    @classmethod
    def load(cls, path: Path) -> PromptPool:
        """Read a pool written by `save`."""
        if not Path(path).is_file():
            raise UserError(f"No prompt pool at {path}. Expected a safetensors file written by an earlier run.")
        with safe_open(str(path), framework="pt") as file:
            names = [name for name in (file.metadata() or {}).get("names", "").split("\n") if name]
            return cls(names, file.get_tensor("prompts"), file.get_tensor("prototypes"))
