"""Cutting a batch behind its images: what samples begin with, which those on one image share, and the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.backbones.lmm import LMM
from pipeline.backbones.prefix_cache import PrefixCache, compute_prefix
from pipeline.data.collate import Batch
from pipeline.prompts.insertion import insert_gaps, insert_prompts, insertion_place


@dataclass(frozen=True)
class Cut:
    """A batch of B samples with G prefixes, run through the decoder up to the end of their images."""

    prefix: PrefixCache
    groups: Tensor  # [B] whose prefix each sample has
    embeddings: Tensor  # [B, R, D] of the rest, padded on the right
    attention: Tensor  # [B, R]
    labels: Tensor  # [B, R]

    def behind_prefix(self, numbers: Tensor) -> Tensor:
        """Row numbers [B, S] of the rest as those of whole sequences [B, P + S], in whose prefixes no rows stand."""
        return pad(numbers, (self.prefix.attention.shape[1], 0))


def cut_behind_images(
    lmm: LMM, batch: Batch, rows: tuple[Tensor, Tensor] | None = None, insertion: str = "after_image"
) -> Cut:
    """Run what stands before the end of the images, without gradients, and embed what follows.

    Each sample's `rows` (vectors [B, P, D], valid [B, P]) are put where `insertion` says, unless that is behind the
    image: then the rest has to get them. Samples without an image are cut after their first token.
    """
    spans = lmm.image_spans(lmm.image_places(batch.input_ids))
    end = insertion_place(batch.attention, spans, "after_image")
    everyone = torch.arange(len(end), device=end.device)
    groups = everyone if batch.groups is None else batch.groups
    leaders = everyone if batch.leaders is None else batch.leaders
    before = torch.arange(batch.attention.shape[1], device=end.device) < end[:, None]
    first, first_attention = _moved_left(before[leaders] & batch.attention[leaders].bool())
    rest, attention = _moved_left(~before & batch.attention.bool())
    ids, behind = batch.input_ids[leaders].gather(1, first), batch.input_ids.gather(1, rest)
    # In one call, so that ZeRO-3 gathers the vocabulary once.
    words = lmm.words(torch.cat([ids.flatten(), behind.flatten()]))
    embeddings = lmm.place_features(
        words[: ids.numel()].unflatten(0, ids.shape), ids, batch.images, batch.has_image[leaders]
    )
    places = lmm.image_places(ids)
    if rows is not None and insertion != "after_image":
        vectors, valid = (part[leaders] for part in rows)
        place = insertion_place(first_attention, lmm.image_spans(places), insertion)
        places = insert_gaps(places, first_attention, valid, place)
        embeddings, first_attention, _ = insert_prompts(embeddings, first_attention, vectors, valid, place=place)
    return Cut(
        compute_prefix(lmm, embeddings, first_attention, places, batch.images),
        groups,
        words[ids.numel() :].unflatten(0, behind.shape),
        attention,
        batch.labels.gather(1, rest).masked_fill(attention == 0, -100),
    )


def _moved_left(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Columns [B, n] that bring the kept tokens [B, N] to the left, for the longest row, and which are kept [B, n]."""
    counts = kept.sum(1)
    width = int(counts.max())
    order = (~kept).to(torch.int8).sort(dim=1, stable=True).indices[:, :width]
    return order, (torch.arange(width, device=kept.device) < counts[:, None]).long()
