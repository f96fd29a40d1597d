"""Prompt schedules: how many prompts are removed, added and carried before each layer of a transformer.

Before a layer runs, the `remove` newest prompts are removed and `add` new ones appended. All others are carried: they
enter the layer as the hidden states of the layer before (docs/design.md 5.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import Field

from pipeline.config.base import Section
from pipeline.errors import UserError, nearest

First = Literal["code", "figure"]


@dataclass(frozen=True)
class Op:
    """The operation before one layer: remove the `remove` newest prompts, then append `add` new ones."""

    remove: int = 0
    add: int = 0


class Counts:
    """What follows from a tower's operations, one per layer."""

    ops: tuple[Op, ...]

    def place(self, block: int) -> str:
        """What a message calls this layer."""
        return f"Layer {block} of the decoder"

    def require_possible(self) -> None:
        """Raise UserError, naming the layer, for a negative count or for removing more prompts than are there."""
        present = 0
        for block, op in enumerate(self.ops):
            if op.remove < 0 or op.add < 0:
                raise UserError(
                    f"{self.place(block)} would remove {op.remove} and add {op.add} prompts; expected counts of 0 or "
                    "more. Correct the method's prompt counts."
                )
            if op.remove > present:
                raise UserError(
                    f"{self.place(block)} would remove {op.remove} prompts, but only {present} are there when it "
                    f"begins. Remove at most {present}, or add more before."
                )
            present += op.add - op.remove

    @property
    def present(self) -> tuple[int, ...]:
        """The number of prompts in each layer."""
        counts, count = [], 0
        for op in self.ops:
            count += op.add - op.remove
            counts.append(count)
        return tuple(counts)

    def carried(self, block: int) -> int:
        """The number of prompts that enter `block` from the layer before."""
        return 0 if block == 0 else self.present[block - 1] - self.ops[block].remove

    @property
    def adds(self) -> dict[int, int]:
        """The number of new prompts by layer, for layers that have some."""
        return {block: op.add for block, op in enumerate(self.ops) if op.add}


@dataclass(frozen=True)
class LayerSchedule(Counts):
    """The operations of a decoder's first layers; the others carry what there is."""

    ops: tuple[Op, ...]

    def __post_init__(self) -> None:
        self.require_possible()

    @property
    def most(self) -> int:
        """The most prompts in any layer: so many columns of the sequence one module takes."""
        return max(self.present, default=0)

    def of(self, block: int) -> tuple[int, int]:
        """Of a layer, the numbers of prompts that are carried into it and that are there when it runs."""
        if block < len(self.ops):
            return self.carried(block), self.present[block]
        return self.present[-1], self.present[-1]


def replaced(count: int, depth: int) -> list[Op]:
    """`count` prompts before layer 0, replaced before each of the next `depth` - 1 layers."""
    return [Op(add=count), *[Op(remove=count, add=count)] * (at_least_one("depth", depth) - 1)]


def grown(n: int, add: int, remove: int, depth: int, first: First = "code") -> list[Op]:
    """The operations of Modular Prompt Learning on the first `depth` layers (docs/design.md 5.4).

    Args:
        n: prompts in a group.
        add: groups that are added before each layer.
        remove: the number of the newest prompts that are removed before each layer after the first.
        depth: the number of layers.
        first: prompts of the first layer: code: `n`, as in the released code; figure: `add * n`, as in the paper's
            figure. Another value is a UserError.
    """
    at_least_one("length", n)
    at_least_one("number of added groups", add)
    if first not in get_args(First):
        expected = ", ".join(get_args(First)) + "." + nearest(first, get_args(First))
        raise UserError(f"The first block follows '{first}'; expected one of {expected}")
    start = n if first == "code" else add * n
    return [Op(add=start), *[Op(remove=remove, add=add * n)] * (at_least_one("depth", depth) - 1)]


def at_least_one(name: str, value: int) -> int:
    """The value; UserError when it is below 1."""
    if value < 1:
        raise UserError(f"The prompt {name} is {value}; expected 1 or more. Correct it, or choose another method.")
    return value


class ScheduleOptions(Section):
    """The rows of a module in the layers of a decoder, by Modular Prompt Learning's schedule (docs/design.md 5.4)."""

    prompt_length: int = Field(10, ge=1, description="L, vectors per prompt set")
    depth: int = Field(4, ge=1, description="layers of the decoder, from the first, that get rows of their own")
    add: int = Field(1, ge=1, description="groups of prompt_length rows that are added before each of these layers")
    remove: int | None = Field(
        None,
        ge=0,
        description="rows, the newest ones, that are removed before each of them but the first; null: prompt_length, "
        "so that with add 1 every layer's rows replace those of the layer before",
    )
    first: First = Field("code", description="rows at the input: code: prompt_length; figure: add times as many")

    @property
    def schedule(self) -> LayerSchedule:
        """The schedule; UserError where it removes more rows than there are."""
        remove = self.prompt_length if self.remove is None else self.remove
        return LayerSchedule(tuple(grown(self.prompt_length, self.add, remove, self.depth, self.first)))
