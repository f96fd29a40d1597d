"""Prompt schedules of both towers of a CLIP: how many prompts are removed, added and carried before each block.

Every method is one schedule; see `pipeline.backbones.prompt_schedule`, which the decoders of the other half use too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.backbones.prompt_schedule import Counts, First, Op, at_least_one, grown, replaced
from pipeline.errors import UserError

__all__ = [
    *("First", "Op", "PromptSchedule", "TowerSchedule", "coop", "ivlp", "keys_and_values", "maple", "mpl"),
    *("schedule", "vpt"),
]


@dataclass(frozen=True)
class TowerSchedule(Counts):
    """The operations of one tower, one per block.

    `kv` are the numbers of prompts by block that are keys and values of that block's attention alone (empty: none).
    They are no tokens: no block but theirs has them, so the sequence keeps its length, and `present` does not count
    them.

    Raises UserError, naming tower and block, for a negative count, for removing more prompts than are present, for
    a number of text prompts that changes between blocks (positions and causal mask of the text tower fit one length),
    and for prompts of both kinds in one tower.
    """

    tower: Literal["text", "vision"]
    ops: tuple[Op, ...]
    kv: tuple[int, ...] = ()

    def place(self, block: int) -> str:
        return f"Block {block} of the {self.tower} tower"

    def __post_init__(self) -> None:
        self.require_possible()
        for block, op in enumerate(self.ops):
            if self.tower == "text" and block > 0 and op.add != op.remove:
                raise UserError(
                    f"{self.place(block)} would remove {op.remove} and add {op.add} prompts, but the number of tokens "
                    "in the text tower cannot change between blocks. Add as many as are removed."
                )
        if self.kv and len(self.kv) != len(self.ops):
            raise UserError(
                f"{len(self.kv)} prompt lengths are given for the {self.tower} tower, which has {len(self.ops)} "
                "blocks; expected one for each block (0: none)."
            )
        for block, count in enumerate(self.kv):
            if count < 0:
                raise UserError(f"{self.place(block)} would get {count} prompts; expected a length of 0 or more.")
        if any(self.kv) and self.adds:
            raise UserError(
                f"The {self.tower} tower would get prompts in its sequence and as keys and values; expected one kind."
            )


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


def coop(n: int, blocks: tuple[int, int]) -> PromptSchedule:
    """`n` context tokens at the input of the text tower (docs/design.md 5.1), also for CoCoOp and KgCoOp."""
    return schedule([Op(add=at_least_one("length", n))], [], blocks)


def vpt(n: int, depth: int, blocks: tuple[int, int], carry: bool = False) -> PromptSchedule:
    """`n` image prompts before each of the first `depth` blocks, which replace or (`carry`) join those before."""
    at_least_one("length", n)
    ops = [Op(add=n)] * at_least_one("depth", depth) if carry else replaced(n, depth)
    return schedule([], ops, blocks)


def ivlp(n_text: int, n_vision: int, depth: int, blocks: tuple[int, int]) -> PromptSchedule:
    """Independent prompts in both towers, replaced before each of the first `depth` blocks (docs/design.md 5.8)."""
    at_least_one("length", min(n_text, n_vision))
    return schedule(replaced(n_text, depth), replaced(n_vision, depth), blocks)


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
    ops = grown(n, add, remove, depth, first)
    return schedule(replaced(n, depth), ops, blocks)


def keys_and_values(text: int | Sequence[int], vision: int | Sequence[int], blocks: tuple[int, int]) -> PromptSchedule:
    """Prompts as keys and values of single blocks (docs/clip_prompts.md); a single number is that of every block.

    Raises UserError for a negative length, and where lengths are not as many as the tower has blocks.
    """
    lengths = [
        (given,) * count if isinstance(given, int) else tuple(given)
        for given, count in zip((text, vision), blocks, strict=True)
    ]
    return PromptSchedule(
        TowerSchedule("text", (Op(),) * blocks[0], lengths[0]),
        TowerSchedule("vision", (Op(),) * blocks[1], lengths[1]),
    )
