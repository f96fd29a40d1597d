"""Input rows: a prompt set whose vectors stand among the input embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.data.selection import Selection
from pipeline.prompts.insertion import gather_sets
from pipeline.prompts.parts.base import Entry, Part, shape_of, with_own

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM
    from pipeline.data.collate import Batch
    from pipeline.prompts.parts.shapes import DecoderShape

PROMPT = "prompt"  # the name of a stage's prompt set [L, D] in files


class RowsEntry(Entry):
    """Rows stand where `insertion` says (see `insertion_place`)."""

    def __init__(self, insertion: str) -> None:
        self.insertion = insertion

    def length(self, tensors: Mapping[str, Tensor]) -> int:
        return int(tensors[PROMPT].shape[1]) if PROMPT in tensors else 0

    def rows(self, tensors: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor] | None:
        sets = tensors.get(PROMPT)
        if sets is None or not len(sets) or not batch.selected.shape[1]:
            return None
        return gather_sets(sets, batch.selected, batch.selected_weights)


class InputRows(Part):
    """A prompt set [L, D].

    `init` vocab_rows: rows of the frozen input embedding picked at random (docs/design.md 4.2); normal: deviation
    0.02; previous: the previous stage's set, vocab_rows in the first stage.
    """

    sized_by = "prompt_length"

    def __init__(self, lmm: LMM, length: int, insertion: str = "after_bos", init: str = "vocab_rows") -> None:
        super().__init__()
        self.insertion, self.init = insertion, init
        if insertion == "after_image":
            lmm.require_two_passes()
        # In the model's precision; DeepSpeed keeps a float32 master of it (docs/design.md 7.2).
        self.prompt = nn.Parameter(torch.zeros(length, lmm.width, dtype=lmm.dtype))

    @classmethod
    def of(cls, lmm: LMM, method: Any) -> InputRows:
        """Those of a method's options."""
        init = "previous" if method.carries_prompt else method.init
        return cls(lmm, method.prompt_length, method.insertion, init)

    @classmethod
    def entry(cls, method: Any) -> Entry:
        """How finished prompt sets of a method enter."""
        return RowsEntry(method.insertion)

    @classmethod
    def keeps(cls, name: str) -> bool:
        return name == PROMPT

    @classmethod
    def length(cls, method: Any) -> int:
        return int(method.prompt_length)

    @classmethod
    def sizes(cls, method: Any, shape: DecoderShape) -> list[int]:
        return [method.prompt_length * shape.width]

    def forward(self, bank: Tensor | None = None, selection: Selection | None = None) -> tuple[Tensor, Tensor | None]:
        """The sets of each sample [B, (m + 1) * L, D] and their validity: the selected ones of the bank [t-1, L, D],
        then the current one. Without a selection the current set [L, D] alone."""
        if selection is None:
            return self.prompt.clone(), None
        sets, mine = with_own(bank, self.prompt, selection)
        return gather_sets(sets, mine.numbers, mine.weights)

    def rows(self, bank: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor] | None:
        found: tuple[Tensor, Tensor] = self(bank.get(PROMPT), batch.selection)
        return found

    def start(self, lmm: LMM, generator: torch.Generator, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        length, width = shape_of(self.prompt)
        if self.init == "normal":
            return {PROMPT: torch.randn(length, width, generator=generator) * 0.02}
        words = usable_rows(lmm)
        rows = lmm.vocabulary_rows(words[torch.randint(len(words), (length,), generator=generator)])
        return {PROMPT: previous[PROMPT].clone() if self.init == "previous" and PROMPT in previous else rows}


def usable_rows(lmm: LMM) -> Tensor:
    """Numbers of the vocabulary rows that are ordinary words: no special tokens, no padding of the table."""
    special: set[Any] = {*lmm.tokenizer.all_special_ids, lmm.image_token}
    size = min(len(lmm.tokenizer), lmm.model.config.text_config.vocab_size)
    return torch.tensor([row for row in range(size) if row not in special])
