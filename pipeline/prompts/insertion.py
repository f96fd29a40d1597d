"""Where prompt sets stand: after the first token of each sample (docs/design.md 4.7), before its image or behind it."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

from pipeline.data.selection import NO_SET


def gather_sets(bank: Tensor, selected: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pick the selected sets of each sample from a bank.

    `bank` [M, L, D], `selected` [B, m] (NO_SET = none) -> vectors [B, m*L, D] and their validity [B, m*L]. With
    `weights` [B, m] every set's vectors are multiplied by its weight.
    """
    samples, places = selected.shape
    length, width = bank.shape[-2:]
    if places == 0:
        return bank.new_zeros(samples, 0, width), torch.zeros(samples, 0, dtype=torch.bool, device=bank.device)
    sets = bank[selected.clamp(min=0)]
    if weights is not None:
        sets = sets * weights.to(sets)[..., None, None]
    vectors = rearrange(sets, "b m l d -> b (m l) d")
    valid = repeat(selected != NO_SET, "b m -> b (m l)", l=length)
    return vectors, valid


def insertion_place(attention: Tensor, is_image: Tensor | None = None, insertion: str = "after_bos") -> Tensor:
    """Column [B] of the token that the prompts are put in front of.

    `attention` and `is_image` [B, N]; `insertion` after_bos: the second real token; before_image: the first image
    token; after_image: the one behind the last image token. In samples without an image always the second real token.
    """
    second = attention.float().argmax(dim=1) + 1
    if insertion == "after_bos" or is_image is None:
        return second
    image = is_image & attention.bool()
    if insertion == "after_image":
        place = image.shape[1] - image.flip(1).float().argmax(dim=1)
    else:
        place = image.float().argmax(dim=1)
    return torch.where(image.any(dim=1), place, second)


def insert_gaps(flags: Tensor, attention: Tensor, valid: Tensor, place: Tensor, left: bool = False) -> Tensor:
    """What `insert_prompts` makes of flags [B, N] that tokens have and prompts have not: flags [B, N+P]."""
    marks, gaps = flags[..., None].float(), torch.zeros(*valid.shape, 1, device=flags.device)
    return insert_prompts(marks, attention, gaps, valid, left=left, place=place)[0][..., 0] > 0


def row_numbers(attention: Tensor, valid: Tensor, place: Tensor, left: bool = False) -> Tensor:
    """Of each column [B, N+P] that `insert_prompts` makes, the number from 1 of the inserted row; 0 for the others."""
    counted = (torch.arange(1, valid.shape[1] + 1, device=valid.device) * valid)[..., None].float()
    none = torch.zeros(*attention.shape, 1, device=attention.device)
    return insert_prompts(none, attention, counted, valid, left=left, place=place)[0][..., 0].long()


def insert_prompts(
    embeddings: Tensor,
    attention: Tensor,
    prompts: Tensor,
    valid: Tensor,
    labels: Tensor | None = None,
    left: bool = False,
    place: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Insert each sample's prompt vectors in front of the token at `place`, by default directly after the first token.

    `embeddings` [B, N, D], `attention` [B, N], `prompts` [B, P, D] with `valid` [B, P], `place` [B] (see
    `insertion_place`); the batch is padded on the right, or on the left when `left`. Returns embeddings [B, N+P, D],
    attention [B, N+P] and labels (-100 on prompts); invalid prompt vectors become padding.
    """
    attention = attention.bool()
    if place is None:
        place = insertion_place(attention)
    columns = torch.arange(attention.shape[1], device=attention.device)
    # A stable sort by these ranks gives the new order: tokens before, prompts, tokens after, padding at its side.
    padding = -1 if left else 3
    rank = torch.where(attention, torch.where(columns < place[:, None], 0, 2), padding)
    prompt_rank = torch.where(valid, 1, padding)
    order = torch.cat([rank, prompt_rank], dim=1).sort(dim=1, stable=True).indices  # [B, N+P]
    mixed = torch.cat([embeddings, prompts.to(embeddings.dtype)], dim=1)
    mixed = torch.gather(mixed, 1, order[..., None].expand(-1, -1, mixed.shape[-1]))
    mask = torch.gather(torch.cat([attention, valid], dim=1), 1, order)
    if labels is None:
        return mixed, mask.long(), None
    unlabelled = labels.new_full(valid.shape, -100)
    return mixed, mask.long(), torch.gather(torch.cat([labels, unlabelled], dim=1), 1, order)
