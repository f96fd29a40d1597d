"""Routers that compare a sample's keys with one vector per task: learned (ModalPrompt) or the mean of its keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.config.base import Section
from pipeline.prompts.routers.base import Router, State, States

if TYPE_CHECKING:
    from pipeline.data.keys import AnyKeys, Rows

PROTOTYPE = "prototype"  # the tensor [K] of a task's state
SAMPLES_AT_ONCE = 1 << 14  # whose keys are in memory as float32
SUMMED_BYTES = 256 << 20  # of unit keys that are summed at once, unless a few columns take more
COLUMNS = 64  # a multiple of what torch adds side by side, so that columns apart are summed like columns together


class KeyWeights(Section):
    """How much either key counts."""

    image_weight: float = Field(0.5, ge=0, le=1, description="share of the image in the similarity")


class Mean(Router):
    """The cosines of both keys to the normalised sum of the task's unit keys, `image_weight` of it the image's.

    A sample without an image is compared by its text key alone.
    """

    Options = KeyWeights
    names = (PROTOTYPE,)

    def observe(self, keys: AnyKeys) -> State:
        return {PROTOTYPE: provisional_prototype(keys.image, keys.text, keys.has_image)}

    def scores(self, keys: AnyKeys, states: States) -> Tensor:
        if not len(states):
            return torch.zeros(len(keys.text), 0)
        return similarities(keys, states.stacked(PROTOTYPE), self.options.image_weight)

    def views(self) -> dict[str, Router]:
        either = {"image_only": 1.0, "text_only": 0.0}
        alone = {name: type(self)(KeyWeights(image_weight=weight)) for name, weight in either.items()}
        return {"accuracy": self, **alone}


class Prototype(Mean):
    """The same with a learned vector: what the stage's projection head makes of its prompt set (ModalPrompt).

    Its loss terms are those whose minimum `Mean` computes, which therefore stands in for it before it is learned.
    """

    learned = True


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

    The loss is the mean of 1 - cos(key, prototype) over both keys (docs/design.md 4.8), so its minimiser points along
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
