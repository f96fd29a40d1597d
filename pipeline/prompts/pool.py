"""The pool: what all finished stages have learned, as constant stacked tensors by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import UserError
from pipeline.prompts.answer_head import head_of, without_head
from pipeline.prompts.parts.base import SHARED
from pipeline.prompts.parts.input_rows import PROMPT
from pipeline.prompts.parts.projector import projector_of
from pipeline.prompts.routers import State, States
from pipeline.prompts.routers.kept_keys import KEPT, TEXT, kept_print
from pipeline.prompts.routers.mean import PROTOTYPE

FORMAT = "prompt-pool-1"
# The names of stacked tensors in a file, where they are not those of a stage's tensors.
STACKED = {PROMPT: "prompts"}
STATE = "router."  # how the names of a router's tensors begin, other than the prototypes'
PROTOTYPES = "prototypes"
MEMORY = "memory."  # how the names begin of what the last stage tells later ones; no adapter has it


def tensor_fingerprint(tensor: Tensor) -> str:
    """SHA-256 (hex) of a tensor's float32 values: equal values give equal fingerprints."""
    values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
    return hashlib.sha256(str(tuple(values.shape)).encode() + values.numpy().tobytes()).hexdigest()


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of named tensors; "" of none."""
    if not tensors:
        return ""
    return _joined_prints({name: tensor_fingerprint(tensor) for name, tensor in tensors.items()})


def _joined_prints(prints: Mapping[str, str]) -> str:
    lines = [f"{name}:{found}" for name, found in sorted(prints.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass
class PromptPool:
    """Finished modules in the order of their stages; values never change, modules are only appended.

    `names` T strings; `tensors` [T, ...] float32, of each name that a module's tensors have ("prompt" [T, L, D]);
    `states` what the router knows of each task; `shared` what all modules have in common as the last stage left it,
    such as a trained projector; `memory` what terms of the loss remember of earlier stages.
    """

    names: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    states: States = field(default_factory=lambda: States([]))
    shared: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    _prints: dict[int, str] = field(default_factory=dict, repr=False, compare=False)
    _printed: list[tuple[Tensor, int]] = field(default_factory=list, repr=False, compare=False)  # at which versions

    @classmethod
    def of_prompts(cls, names: Sequence[str], prompts: Tensor, prototypes: Tensor) -> PromptPool:
        """Prompt sets [T, L, D] with their prototypes [T, K]."""
        return cls(list(names), {PROMPT: prompts}, States.of_stacked({PROTOTYPE: prototypes}))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def prompts(self) -> Tensor:
        """The prompt sets [T, L, D]; [T, 0, 0] of modules of another kind."""
        return self.tensors.get(PROMPT, torch.zeros(len(self), 0, 0))

    @property
    def prototypes(self) -> Tensor:
        """The prototypes [T, K]; [0, 0] where not every task has one."""
        if not len(self) or not all(PROTOTYPE in state for state in self.states):
            return torch.zeros(0, 0)
        return self.states.stacked(PROTOTYPE)

    def append(
        self, name: str, tensors: Mapping[str, Tensor], state: State, shared: Mapping[str, Tensor] | None = None
    ) -> None:
        """Add a finished module.

        Args:
            name: its stage's.
            tensors: what samples select, by name.
            state: what the router knows of its task.
            shared: what all modules have in common from this stage on; None for nothing.
        """
        added = {key: value.detach().float().clone()[None] for key, value in tensors.items()}
        if self.names:
            self._require_alike(name, added, state)
            joined = {key: torch.cat([old, added[key].to(old.device)]) for key, old in self.tensors.items()}
        else:
            joined = added
        # Kept keys are not copied: they may be views of the stage's file, whose pages take no memory until read.
        state = {key: value if key.startswith(KEPT) else value.detach().float().clone() for key, value in state.items()}
        self.tensors, self.states = joined, States([*self.states, state])
        self.shared, self.names = dict(shared or {}), [*self.names, name]

    def _require_alike(self, name: str, added: Mapping[str, Tensor], state: State) -> None:
        found = {key: tuple(value.shape[1:]) for key, value in added.items()}
        known = {key: tuple(value.shape[1:]) for key, value in self.tensors.items()}
        widths = {
            key: (tuple(state[key].shape[-1:]), tuple(self.states[-1][key].shape[-1:]))
            for key in (PROTOTYPE, TEXT)
            if key in state and key in self.states[-1]
        }
        shapes = {key: (found.get(key), known.get(key)) for key in {**known, **found}} | widths
        differing = [key for key, (one, other) in shapes.items() if one != other]
        if not differing:
            return
        here, there = shapes[differing[0]]
        raise UserError(
            f"The module '{name}' has {differing[0]} of shape {here}, the pool holds {there}. All stages of a run need "
            "the same method, prompt length, language model and CLIP model."
        )

    def newest(self) -> dict[str, Tensor]:
        """What the last stage learned, by name; empty before the first."""
        return {**{name: value[-1] for name, value in self.tensors.items()}, **self.shared} if self.names else {}

    @property
    def common(self) -> dict[str, Tensor]:
        """What all modules have in common, besides a projector, which is loaded into the frozen model."""
        return {name: value for name, value in self.shared.items() if name.startswith(SHARED)}

    def picked(self, numbers: Sequence[int]) -> PromptPool:
        """The pool of these modules alone."""
        rows = torch.tensor(list(numbers), dtype=torch.long)
        tensors = {name: value[rows.to(value.device)] for name, value in self.tensors.items()}
        states = States([self.states[number] for number in numbers])
        return PromptPool([self.names[number] for number in numbers], tensors, states, dict(self.shared))

    @classmethod
    def joined(cls, pools: Sequence[PromptPool]) -> PromptPool:
        """The modules of several pools, one pool behind the other, with what all of them have in common."""
        tensors = {name: torch.cat([pool.tensors[name] for pool in pools]) for name in pools[0].tensors}
        states = States([state for pool in pools for state in pool.states])
        return cls([name for pool in pools for name in pool.names], tensors, states, pools[0].common)

    def fingerprint(self, index: int) -> str:
        """SHA-256 (hex) of one module's values, computed once as long as they are not written to."""
        printed = [(value, value._version) for value in self.tensors.values()]
        same = len(printed) == len(self._printed)
        if not same or any(a is not b or x != y for (a, x), (b, y) in zip(printed, self._printed, strict=True)):
            self._prints, self._printed = {}, printed
        if index not in self._prints:
            module = {name: value[index] for name, value in self.tensors.items()} | head_of(self.states[index])
            # Of prompt sets it is the set's own, under which answers of earlier versions are kept.
            alone = tensor_fingerprint(module[PROMPT]) if list(module) == [PROMPT] else fingerprint_of(module)
            self._prints[index] = alone
        return self._prints[index]

    def shared_fingerprint(self) -> str:
        """SHA-256 (hex) of what all modules have in common, "" of nothing."""
        return fingerprint_of({**projector_of(self.shared), **self.common})

    def states_fingerprint(self, heads: bool = True) -> str:
        """SHA-256 (hex) of what the router knows of all tasks, and of their answer heads unless `heads` is False."""
        states = self._states(heads)
        if len(self) and any(set(state) != {PROTOTYPE} for state in states):
            return _joined_prints(
                {
                    f"{number}.{key}": kept_print(value) if key.startswith(KEPT) else tensor_fingerprint(value)
                    for number, state in enumerate(states)
                    for key, value in state.items()
                }
            )
        return tensor_fingerprint(self.prototypes)

    def _states(self, heads: bool) -> Sequence[State]:
        """What the router knows of each task, with the answer heads or without."""
        return self.states if heads else [without_head(state) for state in self.states]

    def whole_fingerprint(self, heads: bool = True) -> str:
        """SHA-256 (hex) of all modules and states; without answer heads, which no training depends on, if `heads` is
        False, as a stage begun beside them records it."""
        if set(self.tensors) <= {PROMPT} and not (self.common or self.memory):
            prompts = self.prompts if len(self) else torch.zeros(0, 0, 0)
            found = fingerprint_of({"prompts": prompts, PROTOTYPES: self.prototypes})
            more = any({*state} - {PROTOTYPE} for state in self._states(heads))
            return found + self.states_fingerprint(heads) if more else found
        kept = {**self.tensors, **self.common, **self.memory, STATE: torch.zeros(0)}
        return fingerprint_of(kept) + self.states_fingerprint(heads)

    def stacked(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """All modules and states as a file has them: modules in this precision, states in float32."""
        modules = {**self.tensors, **self.common}
        content = {STACKED.get(name, name): value.cpu().to(dtype) for name, value in modules.items()}
        for key in {key: None for state in self.states for key in state}:
            values = [state[key] for state in self.states if key in state]
            if key == PROTOTYPE and len(values) == len(self):
                content[PROTOTYPES] = torch.stack(values).cpu()
                continue
            # One by one: centres of tasks may differ in number.
            content |= {f"{STATE}{n}.{key}": state[key].cpu() for n, state in enumerate(self.states) if key in state}
        return {name: value.contiguous() for name, value in content.items()}

    def save(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write modules, what they share and states as one safetensors file, without a projector and `memory`."""
        save_file(self.stacked(dtype), path, metadata={"names": "\n".join(self.names), "format": FORMAT})

    @classmethod
    def load(cls, path: Path) -> PromptPool:
        """Read a pool written by `save`."""
        if not Path(path).is_file():
            raise UserError(f"No prompt pool at {path}. Expected a safetensors file written by an earlier run.")
        with safe_open(str(path), framework="pt") as file:
            names = [name for name in (file.metadata() or {}).get("names", "").split("\n") if name]
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        states: list[dict[str, Tensor]] = [{} for _ in names]
        for number, prototype in enumerate(content.pop(PROTOTYPES, ())):
            states[number][PROTOTYPE] = prototype
        for name in [name for name in content if name.startswith(STATE)]:
            number, _, key = name.removeprefix(STATE).partition(".")
            states[int(number)][key] = content.pop(name)
        shared = {name: content.pop(name) for name in list(content) if name.startswith(SHARED)}
        plain = {stacked: name for name, stacked in STACKED.items()}
        tensors = {plain.get(name, name): value for name, value in content.items()}
        return cls(names, tensors, States(states), shared)
