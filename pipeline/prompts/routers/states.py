"""The states of tasks: what a router keeps of each, as tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

State = Mapping[str, Tensor]  # what a router keeps of one task: tensors by name
Made = TypeVar("Made")


class States(Sequence[State]):
    """The states of T tasks in the order of their stages; they never change.

    A state has tensors of any number and shape: one vector, several centres, a covariance. Where all tasks have a
    tensor of the same shape, `stacked` gives them as one.
    """

    def __init__(self, states: Sequence[State]) -> None:
        self._states: list[State] = list(states)
        self._stacks: dict[str, Tensor] = {}
        self._made: dict[str, Any] = {}

    @classmethod
    def of_stacked(cls, tensors: Mapping[str, Tensor]) -> States:
        """The states whose tensors [T, ...] stand one behind the other."""
        count = len(next(iter(tensors.values()), torch.zeros(0)))
        states = cls([{name: rows[number] for name, rows in tensors.items()} for number in range(count)])
        states._stacks = dict(tensors)
        return states

    def __len__(self) -> int:
        return len(self._states)

    @overload
    def __getitem__(self, index: int) -> State: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[State]: ...
    def __getitem__(self, index: int | slice) -> State | Sequence[State]:
        return self._states[index]

    def stacked(self, name: str) -> Tensor:
        """The tensors of this name of all tasks [T, ...] on the CPU, where keys are."""
        if name not in self._stacks:
            self._stacks[name] = torch.stack([state[name] for state in self._states])
        return self._stacks[name].cpu()

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """What a router makes of all states together, such as the solution of a linear system: made at the first
        call and kept with the states, for scores are asked for with every batch of questions that is served."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def put(self, made: Mapping[str, Any]) -> None:
        """Keep what `once` would make, by name: read from a file."""
        self._made.update(made)
