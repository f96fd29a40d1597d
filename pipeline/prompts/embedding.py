"""From a batch of tokenised questions to what the decoder reads: word and image vectors with the sets among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.prompts.insertion import gather_sets, insert_gaps, insert_prompts, insertion_place

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM
    from pipeline.data.collate import Batch


def embed_with_sets(lmm: LMM, batch: Batch, bank: Tensor, insertion: str) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors [B, N, D], attention [B, N] and the image's places [B, N] of a batch padded on the left.

    Every sample's selected sets of the `bank` [T, L, D] stand where `insertion` says (see `insertion_place`); columns
    that are padding in every row are left out.
    """
    embeddings, attention = lmm.embed(batch.input_ids, batch.images, batch.has_image), batch.attention
    places = lmm.image_places(batch.input_ids)
    if not batch.selected.shape[1] or not len(bank):
        return embeddings, attention, places
    vectors, valid = gather_sets(bank, batch.selected, batch.selected_weights)
    place = insertion_place(attention, lmm.image_spans(places), insertion)
    places = insert_gaps(places, attention, valid, place, left=True)
    embeddings, attention, _ = insert_prompts(embeddings, attention, vectors, valid, left=True, place=place)
    used = int(attention.sum(1).max())
    return embeddings[:, -used:], attention[:, -used:], places[:, -used:]
