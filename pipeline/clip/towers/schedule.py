"""Prompt schedules: how many prompts are removed, added and carried before each block of each tower.

Every method is one schedule. Before a block runs, the `remove` newest prompts are removed and `add` new ones appended.
All others are carried: they enter the block as the hidden states of the block before (docs/design.md 5.4).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from pipeline.errors import UserError, nearest

First = Literal["code", "figure"]


@dataclass(frozen=True)
class Op:
    """The operation before one block: remove the `remove` newest prompts, then append `add` new ones."""

    remove: int = 0
    add: int = 0


@dataclass(frozen=True)
class TowerSchedule:
    """The operations of one tower, one per block.

    Raises UserError, naming tower and block, for a negative count, for removing more prompts than are present, and for
    a number of text prompts that changes between blocks: positions and causal mask of the text tower fit one length.
    """

    tower: Literal["text", "vision"]
    ops: tuple[Op, ...]

    def __post_init__(self) -> None:
        present = 0
        for block, op in enumerate(self.ops):
            place = f"Block {block} of the {self.tower} tower"
            if op.remove < 0 or op.add < 0:
                raise UserError(
                    f"{place} would remove {op.remove} and add {op.add} prompts; expected counts of 0 or more. "
                    "Correct the method's prompt counts."
                )
            if op.remove > present:
                raise UserError(
                    f"{place} would remove {op.remove} prompts, but only {present} are there when it begins. Remove "
                    f"at most {present}, or add more before."
                )
            if self.tower == "text" and block > 0 and op.add != op.remove:
                raise UserError(
                    f"{place} would remove {op.remove} and add {op.add} prompts, but the number of tokens in the "
                    "text tower cannot change between blocks. Add as many as are removed."
                )
            present += op.add - op.remove

    @property
    def present(self) -> tuple[int, ...]:
        """The number of prompts in each block."""
        counts, count = [], 0
        for op in self.ops:
            count += op.add - op.remove
            counts.append(count)
        return tuple(counts)

    def carried(self, block: int) -> int:
        """The number of prompts that enter `block` from the block before."""
        return 0 if block == 0 else self.present[block - 1] - self.ops[block].remove

    @property
    def adds(self) -> dict[int, int]:
        """The number of new prompts by block, for blocks that have some."""
        return {block: op.add for block, op in enumerate(self.ops) if op.add}


@dataclass(frozen=True)
class PromptSchedule:
    """The schedules of both towers."""

    text: TowerSchedule
    vision: TowerSchedule


def schedule(text: Iterable[Op], vision: Iterable[Op], blocks: tuple[int, int]) -> PromptSchedule:
    """A schedule from the operations of the first blocks; UserError when a tower has fewer blocks than operations.

    `blocks` are the numbers of blocks of the text and the image tower.
    """
    first, second = list(text), list(vision)
    for tower, ops, count in (("text", first, blocks[0]), ("vision", second, blocks[1])):
        if len(ops) > count:
            raise UserError(
                f"A prompt depth of {len(ops)} reaches beyond the {tower} tower, which has {count} blocks. Set the "
                f"depth to {count} or less."
            )
        ops.extend([Op()] * (count - len(ops)))
    return PromptSchedule(TowerSchedule("text", tuple(first)), TowerSchedule("vision", tuple(second)))


def _replaced(count: int, depth: int) -> list[Op]:
    """`count` prompts before block 0, replaced before each of the next `depth` - 1 blocks."""
    return [Op(add=count), *[Op(remove=count, add=count)] * (at_least_one("depth", depth) - 1)]


def at_least_one(name: str, value: int) -> int:
    """The value; UserError when it is below 1."""
    if value < 1:
        raise UserError(f"The prompt {name} is {value}; expected 1 or more. Correct it, or choose another method.")
    return value


def coop(n: int, blocks: tuple[int, int]) -> PromptSchedule:
    """`n` context tokens at the input of the text tower (docs/design.md 5.1), also for CoCoOp and KgCoOp."""
    return schedule([Op(add=at_least_one("length", n))], [], blocks)


def vpt(n: int, depth: int, blocks: tuple[int, int], carry: bool = False) -> PromptSchedule:
    """`n` image prompts before each of the first `depth` blocks, which replace or (`carry`) join those before."""
    at_least_one("length", n)
    ops = [Op(add=n)] * at_least_one("depth", depth) if carry else _replaced(n, depth)
    return schedule([], ops, blocks)


def ivlp(n_text: int, n_vision: int, depth: int, blocks: tuple[int, int]) -> PromptSchedule:
    """Independent prompts in both towers, replaced before each of the first `depth` blocks (docs/design.md 5.8)."""
    at_least_one("length", min(n_text, n_vision))
    return schedule(_replaced(n_text, depth), _replaced(n_vision, depth), blocks)


def maple(n: int, depth: int, blocks: tuple[int, int]) -> PromptSchedule:
    """`n` prompts in both towers, replaced before each of the first `depth` blocks (docs/design.md 5.7)."""
    return ivlp(n, n, depth, blocks)


def mpl(n: int, add: int, remove: int, depth: int, blocks: tuple[int, int], first: First = "code") -> PromptSchedule:
    """Text prompts are replaced in each block, image prompts removed, added and carried (docs/design.md 5.3, 5.4).

    Args:
        n: the number of text prompts per block.
        add: the number of image prompts per text prompt that are added before each block.
        remove: the number of the newest image prompts that are removed before each block after the first.
        depth: the number of prompted blocks.
        blocks: the numbers of blocks of the text and the image tower.
        first: image prompts of the first block: code: `n`, as in the released code; figure: `add * n`, as in the
            paper's figure. Another value is a UserError.
    """
    at_least_one("length", n)
    at_least_one("number of added groups", add)
    if first not in get_args(First):
        expected = ", ".join(get_args(First)) + "." + nearest(first, get_args(First))
        raise UserError(f"The first block follows '{first}'; expected one of {expected}")
    start = n if first == "code" else add * n
    grown = [Op(add=start), *[Op(remove=remove, add=add * n)] * (at_least_one("depth", depth) - 1)]
    return schedule(_replaced(n, depth), grown, blocks)
