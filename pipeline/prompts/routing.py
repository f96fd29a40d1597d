"""Routing: how similar samples are to the tasks, and which prompt sets they get (modalprompt.md 3.5, 3.6).

A selection is a tensor of set numbers, one row per sample, in the order of insertion: the least similar set first, so
that the most similar one stands nearest to the text. Rows are filled up with `NO_SET` on the right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.data.selection import NO_SET

if TYPE_CHECKING:
    from pipeline.data.keys import AnyKeys, Rows

SAMPLES_AT_ONCE = 1 << 14  # whose keys are in memory as float32
SUMMED_BYTES = 256 << 20  # of unit keys that are summed at once, unless a few columns take more
COLUMNS = 64  # a multiple of what torch adds side by side, so that columns apart are summed like columns together


def similarity(
    image_key: Tensor, text_key: Tensor, prototypes: Tensor, image_weight: float = 0.5, has_image: Tensor | None = None
) -> Tensor:
    """Weighted mean of the cosines of both keys with every prototype.

    `image_key`, `text_key` [B, K], `prototypes` [T, K], `has_image` [B] (all when None) -> [B, T] in [-1, 1].
    A sample without an image is compared by its text key alone.
    """
    targets = normalize(prototypes.float(), dim=-1)
    image = normalize(image_key.float(), dim=-1) @ targets.T  # [B, T]
    text = normalize(text_key.float(), dim=-1) @ targets.T
    weight = torch.full((len(text), 1), float(image_weight), dtype=text.dtype, device=text.device)
    if has_image is not None:
        weight = weight * has_image.to(weight).reshape(-1, 1)
    return weight * image + (1.0 - weight) * text


def prototype_term_weights(has_image: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample weights ([B], [B]) of the image and text prototype terms: 1 and 1, or 0 and 2 without an image."""
    image = has_image.float()
    return image, 2.0 - image


def similarities(keys: AnyKeys, prototypes: Tensor, image_weight: float = 0.5) -> Tensor:
    """`similarity` of many samples [N, T], whose keys are converted to float32 a part at a time."""
    parts = zip(*(rows.split(SAMPLES_AT_ONCE) for rows in (keys.image, keys.text, keys.has_image)), strict=True)
    found = [similarity(image, text, prototypes, image_weight, has_image) for image, text, has_image in parts]
    return torch.cat(found) if found else torch.zeros(0, len(prototypes))


def provisional_prototype(image_key: Rows, text_key: Rows, has_image: Tensor) -> Tensor:
    """The prototype [K] that minimises the prototype loss over a task's samples, in closed form.

    The loss is the mean of 1 - cos(key, prototype) over both keys (modalprompt.md 3.8), so its minimiser points along
    the sum of the unit keys. It stands in for the current task's prototype before that is learned.
    """
    image_weight, text_weight = prototype_term_weights(has_image)
    return normalize(_sum_of_unit_rows(image_key, image_weight) + _sum_of_unit_rows(text_key, text_weight), dim=-1)


def _sum_of_unit_rows(rows: Rows, weights: Tensor) -> Tensor:
    """The weighted sum [K] of the rows [N, K], each divided by its length.

    A large table is summed some columns at a time, all of a column's rows together: the order of additions and so
    every bit are the same as for the whole table at once, which would take N * K floats and copies of them.
    """
    count, width = rows.shape
    step = max(COLUMNS, SUMMED_BYTES // (4 * max(count, 1)) // COLUMNS * COLUMNS)
    if step >= width:
        parts = list(rows.split(max(count, 1)))
        return (weights[:, None] * normalize(parts[0].float(), dim=-1)).sum(0)
    lengths = torch.cat([part.float().norm(dim=-1).clamp_min(1e-12) for part in rows.split(SAMPLES_AT_ONCE)])
    sums = []
    for first in range(0, width, step):
        columns = torch.empty(count, min(step, width - first))
        for number, part in enumerate(rows.split(SAMPLES_AT_ONCE)):
            place = slice(number * SAMPLES_AT_ONCE, number * SAMPLES_AT_ONCE + len(part))
            unit = part[:, first : first + step].float() / lengths[place, None]
            columns[place] = weights[place, None] * unit
        sums.append(columns.sum(0))
    return torch.cat(sums)


def _best_in_ascending_order(scores: Tensor, count: int, allowed: Tensor) -> Tensor:
    """The `count` best allowed sets of each row, least similar first, filled up on the right. [B, T] -> [B, count]."""
    ranked = scores.masked_fill(~allowed, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[:, :count]
    kept = torch.gather(allowed, 1, ranked)
    ranked = ranked.masked_fill(~kept, NO_SET).flip(-1)
    # After the flip the unused places stand on the left; a stable sort moves them behind the used ones.
    order = (ranked == NO_SET).to(torch.int8).sort(dim=-1, stable=True).indices
    return torch.gather(ranked, 1, order)


def select_for_training(scores: Tensor, k: int, gate: float | None = None, reference: Tensor | None = None) -> Tensor:
    """The earlier sets that accompany the current one in training: at most k - 1 per sample.

    `scores` [B, t-1] similarities to the earlier prototypes -> [B, min(k-1, t-1)]. Without a gate the k - 1 most
    similar (all, in their natural order, when there are fewer than k - 1). With a gate a set is inserted only if its
    similarity is at least max(reference, best earlier) - gate, where `reference` [B] is the similarity to the current
    task's provisional prototype.
    """
    earlier = scores.shape[1]
    count = min(k - 1, earlier)
    if count <= 0:
        return torch.full((len(scores), 0), NO_SET, dtype=torch.long, device=scores.device)
    if gate is None:
        if earlier < k - 1:
            return torch.arange(earlier, device=scores.device).expand(len(scores), -1)
        return _best_in_ascending_order(scores, count, torch.ones_like(scores, dtype=torch.bool))
    best = scores.max(dim=-1).values
    if reference is not None:
        best = torch.maximum(best, reference.to(best))
    return _best_in_ascending_order(scores, count, scores >= (best - gate)[:, None])


def select_for_inference(scores: Tensor, k: int, gate: float | None = None) -> Tensor:
    """The sets inserted at inference: the k most similar of all, those within `gate` of the best.

    `scores` [B, T] -> [B, min(k, T)], least similar first.
    """
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if gate is not None:
        allowed = scores >= (scores.max(dim=-1, keepdim=True).values - gate)
    return _best_in_ascending_order(scores, min(k, scores.shape[1]), allowed)
