"""Which prompts stand in each block of each tower: remove, add, carry. Every method is one such schedule.

Before block b runs, `remove` of the newest prompts are dropped and `add` fresh ones appended; all others are carried
with what the blocks before made of them. Source: docs/design.md 5.4 and 5.8.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from pipeline.errors import UserError, nearest

First = Literal["code", "figure"]


@dataclass(frozen=True)
class Op:
    """What happens before one block runs: drop the `remove` newest prompts, then append `add` fresh ones."""

    remove: int = 0
    add: int = 0


@dataclass(frozen=True)
class TowerSchedule:
    """The operations of one tower, one per block.

    Raises UserError naming tower and block for a negative count, for removing more prompts than there are, and in the
    text tower for a number of prompts that changes: its positions and causal mask fit one length.
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
        """The number of prompts when each block runs."""
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
        """The number of fresh prompts by block, where there are any."""
        return {block: op.add for block, op in enumerate(self.ops) if op.add}


@dataclass(frozen=True)
class PromptSchedule:
    """The schedules of both towers."""

    text: TowerSchedule
    vision: TowerSchedule


def schedule(text: Iterable[Op], vision: Iterable[Op], blocks: tuple[int, int]) -> PromptSchedule:
    """A schedule from the operations of the first blocks; `blocks` (text, vision) are what the towers have.

    Raises UserError when a tower has fewer blocks than operations.
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
    """`count` prompts before block 0 and as many in their place before each of the next `depth` - 1 blocks."""
    return [Op(add=count), *[Op(remove=count, add=count)] * (at_least_one("depth", depth) - 1)]


def at_least_one(name: str, value: int) -> int:
    """The value; UserError when it is below 1."""
    if value < 1:
        raise UserError(f"The prompt {name} is {value}; expected 1 or more. Correct it, or choose another method.")
    return value


def coop(n: int, blocks: tuple[int, int]) -> PromptSchedule:
    """`n` context tokens at the input of the text tower (docs/design.md 5.1); CoCoOp and KgCoOp have the same."""
    return schedule([Op(add=at_least_one("length", n))], [], blocks)


def vpt(n: int, depth: int, blocks: tuple[int, int], carry: bool = False) -> PromptSchedule:
    """`n` image prompts before each of the first `depth` blocks: in place of the last ones, or besides (`carry`)."""
    at_least_one("length", n)
    ops = [Op(add=n)] * at_least_one("depth", depth) if carry else _replaced(n, depth)
    return schedule([], ops, blocks)


def ivlp(n_text: int, n_vision: int, depth: int, blocks: tuple[int, int]) -> PromptSchedule:
    """Independent prompts in both towers, replaced before each of the first `depth` blocks (docs/design.md 5.8)."""
    at_least_one("length", min(n_text, n_vision))
    return schedule(_replaced(n_text, depth), _replaced(n_vision, depth), blocks)


def maple(n: int, depth: int, blocks: tuple[int, int]) -> PromptSchedule:
    """As many prompts in both towers, replaced before each of the first `depth` blocks (docs/design.md 5.8)."""
    return ivlp(n, n, depth, blocks)


def mpl(n: int, add: int, remove: int, depth: int, blocks: tuple[int, int], first: First = "code") -> PromptSchedule:
    """Text prompts replaced, image prompts removed, added and carried (docs/design.md 5.3 to 5.4).

    Each text prompt makes `add` image prompts per block; `remove` of the newest ones go. The first block gets `n` image
    prompts as in the released code, or `add * n` as in the paper's figure. Raises UserError for another `first`.
    """
    at_least_one("length", n)
    at_least_one("number of added groups", add)
    if first not in get_args(First):
        expected = ", ".join(get_args(First)) + "." + nearest(first, get_args(First))
        raise UserError(f"The first block follows '{first}'; expected one of {expected}")
    start = n if first == "code" else add * n
    grown = [Op(add=start), *[Op(remove=remove, add=add * n)] * (at_least_one("depth", depth) - 1)]
    return schedule(_replaced(n, depth), grown, blocks)
