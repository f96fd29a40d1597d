"""What a router is: the state that it keeps of each task, and the scores of samples that follow from the states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor

from pipeline.config import registry
from pipeline.config.base import Section
from pipeline.config.method import Choice, chosen_options

if TYPE_CHECKING:
    from pipeline.data.keys import AnyKeys

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


class Router:
    """Recognises the task of a sample from its CLIP keys.

    The state of a task is made when its stage is trained, and lies in the stage's file, the pool and the adapter. A
    further task changes no state of another one. `Options` are what a recipe may say: fields of the same names in the
    method's options are handed to the router.
    """

    Options: ClassVar[type[Section]] = Section
    # Whether the state is learned with the module. Then `observe` gives one that stands in until it is.
    learned: ClassVar[bool] = False

    def __init__(self, options: Any) -> None:
        """`options` is an instance of the class's own `Options`."""
        self.options = options

    def observe(self, keys: AnyKeys) -> State:
        """The state of a task, in closed form from the keys of its training samples."""
        raise NotImplementedError

    def scores(self, keys: AnyKeys, states: States) -> Tensor:
        """How well each of N samples fits each of T tasks [N, T]; higher fits better."""
        raise NotImplementedError

    def views(self) -> dict[str, Router]:
        """The router under the names that `routing` of matrix.json has: itself, and reduced to one kind of key."""
        return {"accuracy": self}


def make_router(choice: Choice, options: Section | None = None) -> Router:
    """The router that a recipe chooses, with its own options and those that the method's have in common with it."""
    kind = registry.load("routers", choice if isinstance(choice, str) else choice["name"])
    return kind(chosen_options("routers", kind.Options, choice, options))
