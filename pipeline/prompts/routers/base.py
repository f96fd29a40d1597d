"""What a router is: the state that it keeps of each task, and the scores of samples that follow from the states."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from pipeline.config import registry
from pipeline.config.base import Section
from pipeline.config.method import Choice, chosen_options
from pipeline.errors import UserError
from pipeline.prompts.routers.kept_keys import kept_keys, picked
from pipeline.prompts.routers.states import State, States

if TYPE_CHECKING:
    from pipeline.data.keys import AnyKeys

__all__ = ["Router", "State", "States", "make_router"]


class Router:
    """Recognises the task of a sample from its CLIP keys.

    The state of a task is made when its stage is trained, and lies in the stage's file, the pool and the adapter. A
    further task changes no state of another one. `Options` are what a recipe may say: fields of the same names in the
    method's options are handed to the router.
    """

    Options: ClassVar[type[Section]] = Section
    # Whether the state is learned with the module. Then `observe` gives one that stands in until it is.
    learned: ClassVar[bool] = False
    # By what a learned state is: a projection head on the module's prompt set, or the module itself.
    learned_in: ClassVar[Literal["head", "module"]] = "head"
    # Whether scores are computed from the kept keys of the states (`pipeline.prompts.routers.kept_keys`).
    needs_keys: ClassVar[bool] = False
    # Whether the score of a task depends on which other tasks there are.
    joint: ClassVar[bool] = False
    fewest: ClassVar[int] = 1  # kept samples of a task that the statistics need
    passing: ClassVar[tuple[str, ...]] = ()  # what `fit` makes for the held-out scores alone, which nobody needs later
    names: ClassVar[tuple[str, ...]] = ()  # the tensors of a state without which it cannot score, other than kept keys

    def __init__(self, options: Any) -> None:
        """`options` is an instance of the class's own `Options`."""
        self.options = options

    def observe(self, keys: AnyKeys) -> State:
        """The state of a task, in closed form from the keys of its training samples."""
        raise NotImplementedError

    def scores(self, keys: AnyKeys, states: States) -> Tensor:
        """How well each of N samples fits each of T tasks [N, T]; higher fits better."""
        raise NotImplementedError

    def fit(self, states: States) -> dict[str, Tensor]:
        """What is made of all states together, such as the solution of a linear system; `fitted` keeps it."""
        return {}

    def fitted(self, states: States) -> dict[str, Tensor]:
        """The result of `fit` for these states, made at the first call."""
        return states.once(self.label, lambda: self.fit(states))

    @property
    def word(self) -> str:
        """What messages call it: its name here, else its class."""
        target = f"{type(self).__module__}:{type(self).__qualname__}"
        named = [name for name, known in registry.BUILT_IN["routers"].items() if known == target]
        return named[0] if named else type(self).__qualname__

    @functools.cached_property
    def label(self) -> str:
        """The router with its options, by which what is made of states is known."""
        return f"{type(self).__module__}:{type(self).__qualname__} {self.options!r}"

    def held_out_scores(self, states: States, rows: Tensor) -> Tensor:
        """The scores [B, T] of kept keys as though each had been left out of the states.

        Where that is not known, those of the router as it is; one sample of many hardly changes a mean.

        Args:
            states: those of T tasks, which keep keys.
            rows: [B] places among the kept keys of all tasks.
        """
        kept = kept_keys(states)
        if kept is None:
            raise ValueError("states without kept keys have no held-out scores")
        return self.scores(picked(kept.keys, rows), states)

    def views(self) -> dict[str, Router]:
        """The router under the names that `routing` of matrix.json has: itself, and reduced to one kind of key."""
        return {"accuracy": self}


def require_numbers(scores: Tensor, router: Router) -> None:
    """Raise UserError where scores [N, T] of finite keys are not numbers, because the states of some tasks are not.

    Such a task would rank first for every sample.
    """
    lost = scores.isnan().any(0).nonzero()[:, 0].tolist()
    if lost:
        raise UserError(
            f"The router {router.word} has no score for {len(lost)} of {scores.shape[1]} tasks (the first: number "
            f"{lost[0] + 1}), because what they keep for routing is not finite numbers. Train these tasks anew, or get "
            "the adapter again."
        )


def make_router(choice: Choice, options: Section | None = None) -> Router:
    """The router that a recipe chooses, with its own options and those that the method's have in common with it."""
    kind = registry.load("routers", choice if isinstance(choice, str) else choice["name"])
    return kind(chosen_options("routers", kind.Options, choice, options))
