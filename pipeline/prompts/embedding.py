"""From a batch of tokenised questions to what the decoder reads: word and image vectors with the sets among them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.prompts.insertion import gather_sets, insert_gaps, insert_prompts, insertion_place, row_numbers

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM
    from pipeline.data.collate import Batch
    from pipeline.prompts.parts.base import Entry


@dataclass(frozen=True)
class Embedded:
    """The decoder's inputs for B questions, padded on the left."""

    vectors: Tensor  # [B, N, D]
    attention: Tensor  # [B, N]
    places: Tensor  # [B, N] which columns are an image's
    inserted: Tensor | None  # [B, N] the number from 1 of the inserted row at each column, 0: none


def embed_with_modules(lmm: LMM, batch: Batch, entry: Entry, tensors: Mapping[str, Tensor]) -> Embedded:
    """A batch padded on the left with what finished modules make of its input: their rows, and what they change.

    Args:
        lmm: the frozen model.
        batch: questions with their selections of modules.
        entry: how the modules enter.
        tensors: M modules' tensors [M, ...] by name, see `Entry.attached`.
    """
    inputs = entry.updates_inputs(tensors)
    with entry.attached(lmm, tensors, entry.chosen(tensors, batch)) if inputs else nullcontext():
        return embed_with_rows(lmm, batch, entry.rows(tensors, batch), entry.insertion or "after_bos")


def embed_with_rows(lmm: LMM, batch: Batch, rows: tuple[Tensor, Tensor] | None, insertion: str) -> Embedded:
    """A batch padded on the left, with each sample's `rows` (vectors [B, P, D], valid [B, P]) where `insertion` says.

    Columns that are padding in every row are left out. For places see `insertion_place`.
    """
    embeddings, attention = lmm.embed(batch.input_ids, batch.images, batch.has_image), batch.attention
    places = lmm.image_places(batch.input_ids)
    if rows is None:
        return Embedded(embeddings, attention, places, None)
    vectors, valid = rows
    place = insertion_place(attention, lmm.image_spans(places), insertion)
    places = insert_gaps(places, attention, valid, place, left=True)
    inserted = row_numbers(attention, valid, place, left=True)
    embeddings, attention, _ = insert_prompts(embeddings, attention, vectors, valid, left=True, place=place)
    used = int(attention.sum(1).max())
    return Embedded(embeddings[:, -used:], attention[:, -used:], places[:, -used:], inserted[:, -used:])


def embed_with_sets(lmm: LMM, batch: Batch, bank: Tensor, insertion: str) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors [B, N, D], attention [B, N] and the image's places [B, N] of a batch with the selected sets of the `bank`
    [T, L, D]; see `embed_with_rows`."""
    none = not batch.selected.shape[1] or not len(bank)
    rows = None if none else gather_sets(bank, batch.selected, batch.selected_weights)
    found = embed_with_rows(lmm, batch, rows, insertion)
    return found.vectors, found.attention, found.places
