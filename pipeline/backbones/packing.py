"""Packing: the tokens of several short sequences in one row of the decoder's batch, in place of padding.

Sequences are put into as few rows as they fit, none longer than the longest of them, so the decoder computes fewer
tokens and its attention is never larger than that of the padded batch. A mask lets a token see its own sequence only,
and each keeps the positions it has alone, so states are those of the padded batch up to rounding.

FlashAttention takes the lengths of sequences in place of a mask. With it all of them stand in one row, in which no
column is empty, and nothing is computed between two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.backbones.attentions import MASKS, takes_lengths
from pipeline.backbones.layer_hooks import attention_of
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM

NOBODY = -1  # the owner of a column that no token has


@dataclass
class Fill:
    """Tokens of all batches so far, and the columns that the decoder computed for them, padding included."""

    tokens: int = 0
    padded: int = 0  # columns of the batches as they came
    computed: int = 0  # columns of the packed rows

    def __str__(self) -> str:
        share, before = (self.tokens / max(columns, 1) for columns in (self.computed, self.padded))
        return f"{share:.3f} of the decoder's columns are tokens, {before:.3f} without packing"


@dataclass(frozen=True)
class Packed:
    """Where the tokens of B sequences [B, N] stand in R rows of W columns."""

    attention: Tensor  # [B, N] bool
    rows: Tensor  # [B] each sequence's row
    columns: Tensor  # [B, N] the column of each token in it; of padding that of a token of the same sequence
    turns: Tensor  # [B] how many sequences stand before it in its row
    shape: tuple[int, int]  # R, W
    lengths: tuple[int, ...]  # of the B sequences

    @classmethod
    def of(cls, attention: Tensor, one_row: bool = False) -> Packed:
        """Pack sequences with this attention mask [B, N]; `one_row`: all behind each other, in their order."""
        lengths = attention.sum(1).tolist()
        rows, starts, turns = in_one_row(lengths) if one_row else first_fit(lengths)
        device = attention.device
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        order = (attention.cumsum(1) - 1).clamp(min=0)
        return cls(
            attention.bool(),
            torch.tensor(rows, device=device),
            order + torch.tensor(starts, device=device)[:, None],
            torch.tensor(turns, device=device),
            (max(rows) + 1, max(ends)),
            tuple(lengths),
        )

    @property
    def saves(self) -> bool:
        """Whether fewer columns are computed, in fewer rows than there are sequences."""
        return self.shape[0] < len(self.rows) and self.shape[0] * self.shape[1] < self.attention.numel()

    def count(self, fill: Fill) -> None:
        """Add this batch to a count."""
        fill.tokens += int(self.attention.sum())
        fill.padded += self.attention.numel()
        fill.computed += self.shape[0] * self.shape[1] if self.saves else self.attention.numel()

    def moved(self, values: Tensor, empty: int = 0) -> Tensor:
        """Values [B, N, ...] of tokens as [R, W, ...], with gradients; `empty` where no token is."""
        packed = values.new_full((self.shape[0] * self.shape[1], *values.shape[2:]), empty)
        return packed.index_put((self._flat[self.attention],), values[self.attention]).unflatten(0, self.shape)

    @property
    def owners(self) -> Tensor:
        """Whose token stands in each column [R, W]."""
        samples = torch.arange(len(self.rows), device=self.rows.device)
        return self.moved(samples[:, None].expand_as(self.columns), NOBODY)

    @property
    def visible(self) -> Tensor:
        """Which columns each column attends to [R, 1, W, W]: those of its own sequence up to itself."""
        owners = self.owners
        return (owners[:, :, None] == owners[:, None, :]).tril()[:, None]

    @property
    def boundaries(self) -> dict[str, Any]:
        """Where the sequences of a single row begin and end, as FlashAttention takes it from transformers."""
        ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.rows.device)
        longest = max(self.lengths)
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}

    def places(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, A] in sequences as positions [R, P] in the rows, and the place [B, A] of each among the P."""
        wanted = at.shape[1]
        among = self.turns[:, None] * wanted + torch.arange(wanted, device=at.device)
        columns = at.new_zeros(self.shape[0], int(self.turns.max() + 1) * wanted)
        columns[self.rows[:, None].expand_as(at), among] = self.columns.gather(1, at)
        return columns, among

    @property
    def _flat(self) -> Tensor:
        return self.rows[:, None] * self.shape[1] + self.columns


def first_fit(lengths: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """For each sequence its row, its first column there, and how many stand before it in the row.

    Longest first, each in the first row that has room; a row is as wide as the longest sequence.
    """
    width = max(lengths)
    used: list[int] = []  # columns of each row
    held: list[int] = []  # sequences of each row
    rows, starts, turns = [0] * len(lengths), [0] * len(lengths), [0] * len(lengths)
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        row = next((row for row, full in enumerate(used) if full + lengths[number] <= width), len(used))
        if row == len(used):
            used.append(0)
            held.append(0)
        rows[number], starts[number], turns[number] = row, used[row], held[row]
        used[row] += lengths[number]
        held[row] += 1
    return rows, starts, turns


def in_one_row(lengths: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """As `first_fit`, of sequences that all stand in the first row."""
    starts = [0, *accumulate(lengths)][:-1]
    return [0] * len(lengths), starts, list(range(len(lengths)))


def pack(lmm: LMM, attention: Tensor) -> Packed:
    """Sequences with this attention mask [B, N], packed as the model's attention takes them."""
    return Packed.of(attention, one_row=takes_lengths(attention_of(lmm)))


def hidden_of_packed(
    packed: Packed,
    lmm: LMM,
    embeddings: Tensor,
    attention: Tensor,
    image_mask: Tensor | None,
    images: dict[str, Tensor],
    at: Tensor,
) -> Tensor:
    """`LMM.hidden` of padded sequences, which are computed in the rows of `packed`.

    `require_packing` has to hold for the model.
    """
    positions = lmm.decoder_inputs(embeddings, attention, image_mask, images).get("position_ids")
    if positions is None:
        positions = (packed.attention.cumsum(1) - 1).clamp(min=0)
    # M-RoPE has three positions of each token [3, B, N].
    moved = packed.moved(positions) if positions.dim() == 2 else torch.stack([packed.moved(one) for one in positions])
    columns, among = packed.places(at)
    hidden = lmm.decode(
        columns,
        inputs_embeds=packed.moved(embeddings),
        use_cache=False,
        position_ids=moved,
        **_apart(packed, attention_of(lmm), embeddings.dtype),
    )
    return hidden[packed.rows[:, None], among]


def _apart(packed: Packed, implementation: str, dtype: torch.dtype) -> dict[str, Any]:
    """What keeps the sequences of a row apart, as arguments of the decoder."""
    if takes_lengths(implementation):
        return {"attention_mask": None, **packed.boundaries}
    mask = packed.visible
    if implementation == "eager":  # which adds its mask
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return {"attention_mask": mask}


def require_packing(lmm: LMM) -> None:
    """Raise UserError where sequences of this model cannot be computed packed."""
    reason, used = lmm.family.needs_one_pass(), attention_of(lmm)
    if not reason and used not in MASKS and not takes_lengths(used):
        reason = (
            f"attention '{used}' takes neither a mask with a row per position, as {' and '.join(MASKS)} do, nor the "
            "lengths of sequences, as flash_attention_2 does"
        )
    if reason:
        raise UserError(f"train.packing samples is not possible with this model: {reason}. Set train.packing to none.")
