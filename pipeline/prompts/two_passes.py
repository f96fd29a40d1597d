"""Cutting a batch behind its images: what samples begin with, which those on one image share, and the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.backbones.lmm import LMM
from pipeline.backbones.prefix_cache import PrefixCache, compute_prefix
from pipeline.data.collate import Batch
from pipeline.prompts.insertion import gather_sets, insert_gaps, insert_prompts, insertion_place


@dataclass(frozen=True)
class Cut:
    """A batch of B samples with G prefixes, run through the decoder up to the end of their images."""

    prefix: PrefixCache
    groups: Tensor  # [B] whose prefix each sample has
    embeddings: Tensor  # [B, R, D] of the rest, padded on the right
    attention: Tensor  # [B, R]
    labels: Tensor  # [B, R]


def cut_behind_images(lmm: LMM, batch: Batch, bank: Tensor | None = None, insertion: str = "after_image") -> Cut:
    """Run what stands before the end of the images, without gradients, and embed what follows.

    With a `bank` [T, L, D] the selected sets of each sample are put where `insertion` says, unless that is behind the
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
    if bank is not None and len(bank) and batch.selected.shape[1] and insertion != "after_image":
        selection = batch.selection.rows(leaders)
        vectors, valid = gather_sets(bank, selection.numbers, selection.weights)
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
