"""The projector, and its first training: words for the places of pictures, without the language model's layers.

The projected feature of a place is to be the mean embedding of the words for it: a drawing's own, and for a photograph
the classes that the vision tower's classifier gives the place and the whole picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.assemble.language import Language
from data_prep.assemble.vision import Classifier
from data_prep.small.drawings import PLACES
from data_prep.small.features import Pictures

PLACES_PER_STEP = 192  # of drawings, of photographs, and of pushed photographs
PUSH = 18.0  # by how much a pushed feature raises the score of its class
OWN_PLACE = 0.5  # weight of a place's classes in its target; the rest is the whole picture's


class Projector(nn.Module):
    """The two layers that transformers' LLaVA and FastVLM have between features [..., V] and embeddings [..., D]."""

    def __init__(self, vision: int, language: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision, language)
        self.linear_2 = nn.Linear(language, language)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))

    @torch.no_grad()
    def expect(self, features: Tensor) -> None:
        """Fold the normalisation of features [n, V] into the first layer."""
        mean, deviation = features.mean(0), features.std(0).clamp_min(1e-3)
        self.linear_1.weight.div_(deviation)
        self.linear_1.bias.sub_(self.linear_1.weight @ mean)


@dataclass(frozen=True)
class Words:
    """Mean embeddings of names in a language model's vocabulary, scaled to the usual length of its rows."""

    language: Language

    def of(self, names: Sequence[str]) -> Tensor:
        """The vectors [n, D] of these names."""
        return torch.stack([self._of(name) for name in names])

    def scaled(self, vectors: Tensor) -> Tensor:
        """Vectors [..., D] at the mean length of the vocabulary's rows."""
        return vectors * (self._usual / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-6))

    @cached_property
    def _usual(self) -> Tensor:
        return self.language.model.get_input_embeddings().weight.float().norm(dim=-1).mean()

    def _of(self, name: str) -> Tensor:
        tokens = self.language.tokenizer(" " + name, add_special_tokens=False)["input_ids"]
        rows: Tensor = self.language.model.get_input_embeddings().weight[tokens].float()
        return rows.mean(0)


def pushed(features: Tensor, towards: Tensor, head: Classifier, strength: float) -> Tensor:
    """Features [n, V] as they might be of other classes [n]: moved along a class's weights, within the range of ReLU6.

    Photographs at hand show few of the classifier's classes; this gives examples of all.
    """
    directions = head.weight[towards]
    moved = features + strength * directions / directions.square().sum(-1, keepdim=True)
    return moved.clamp(0, 6)


def teach_places(
    projector: Projector, pictures: Pictures, head: Classifier, names: list[str], words: Words, steps: int
) -> None:
    """Regression of word embeddings at random places of drawings, photographs, and photographs that are `pushed`."""
    classes, draw = words.of(names), torch.Generator().manual_seed(0)
    vector = lru_cache(maxsize=None)(lambda said: words.scaled(words.of(said).mean(0)).half())
    drawn_words = torch.stack(
        [
            torch.stack([vector(drawing.at(row, column)) for row in range(PLACES) for column in range(PLACES)])
            for drawing in pictures.drawings
        ]
    )
    whole = torch.cat([head.probabilities(maps.float().mean(1)) for maps in pictures.photographs.split(64)])
    some = torch.cat([pictures.photographs[::20].flatten(0, 1), pictures.drawn[::20].flatten(0, 1)]).float()
    projector.expect(some)

    def places(maps: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        number = torch.randint(len(maps), (count,), generator=draw)
        place = torch.randint(maps.shape[1], (count,), generator=draw)
        return number, place, maps[number, place].float()

    def batch() -> tuple[Tensor, Tensor]:
        number, _, seen = places(pictures.photographs, PLACES_PER_STEP)
        share = OWN_PLACE * head.probabilities(seen) + (1 - OWN_PLACE) * whole[number]
        towards = torch.randint(len(names), (PLACES_PER_STEP,), generator=draw)
        other = pushed(seen, towards, head, float(torch.rand(1, generator=draw)) * 2 * PUSH)
        shown = words.scaled(torch.cat([share, head.probabilities(other)]) @ classes)
        number, place, drawn = places(pictures.drawn, PLACES_PER_STEP)
        return torch.cat([seen, other, drawn]), torch.cat([shown, drawn_words[number, place].float()])

    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    average = 1.0
    for step in range(1, steps + 1):
        features, target = batch()
        loss = F.mse_loss(projector(features), target) / target.var(0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        average = 0.98 * average + 0.02 * loss.item()
        if step % 100 == 0:
            print(f"places step {step}: unexplained variance {average:.3f}", flush=True)
