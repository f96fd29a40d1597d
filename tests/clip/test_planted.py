"""A search finds the option that a frozen model was labelled with, and with the released validation batch it need not.

The prompts are random and stay as they are; the labels are what the model answers with one option of one block alone,
and only images are kept whose answer that option changes. So one option of one block is right, whatever is chosen
elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from pipeline.clip.images.prepared import ClassGroup
from pipeline.clip.images.ready_pixels import ReadyPixels
from pipeline.clip.learning.model import ImageBatch, PromptedCLIP
from pipeline.clip.search.choice import Choice, choose
from pipeline.clip.search.engine import Rates, SearchEngine
from pipeline.clip.search.validation import ValidationBatches
from pipeline.clip.search_space import SearchSpace, TowerOptions
from pipeline.clip.towers.backbone import Backbone
from pipeline.ranks.world import World
from pipeline.training.normaliser import Normaliser
from tests.clip.project import NAMES
from tests.clip.tiny import byte_tokenizer, clip_model, images

LENGTHS = (0, 1, 2)
PLANTED = 2  # the place of the option, and its length
STEPS, BATCH, RATE, FOUND = 200, 24, 0.05, 0.95
RELEASED_BATCH = 16
CLASSES = (*NAMES, "chain saw", "truck")
WORLD = World(0, 1, 0, torch.device("cpu"))


@dataclass(frozen=True)
class Planted:
    """A search space, the images that its planted option changes, and the answers with that option alone."""

    module: PromptedCLIP
    pixels: Tensor  # [N, 3, 16, 16]
    labels: Tensor  # [N]


def planted(tower: str, block: int, seed: int) -> Planted:
    """A tiny model whose answers are spread over the classes, with one option planted."""
    model = clip_model(seed=1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() and "norm" not in name:
                value.mul_(2)
        model.logit_scale.fill_(4.6)  # CLIP's own: 100
    backbone = Backbone(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        space = SearchSpace(backbone.sizes, TowerOptions(LENGTHS, LENGTHS), start="released")
    module = PromptedCLIP(backbone, space, backbone.words(byte_tokenizer()), CLASSES)
    pixels = images(800, seed=9)
    without, wanted = answers(module, pixels), answers(module, pixels, tower, block)
    changed = wanted != without
    return Planted(module, pixels[changed], wanted[changed])


@torch.no_grad()
def answers(module: PromptedCLIP, pixels: Tensor, tower: str = "", block: int = 0) -> Tensor:
    """The classes [N] that the model answers with the planted option in one block alone, or without any prompt."""
    space = cast(SearchSpace, module.learner)
    before = {name: alphas.clone() for name, alphas in space.alphas.items()}
    for name, alphas in space.alphas.items():
        alphas.fill_(-1e9)
        alphas[:, 0] = 0
        if name == tower:
            alphas[block, 0], alphas[block, PLANTED] = -1e9, 0
    texts = module.text_features()
    found = torch.cat([module.logits(part, text_features=texts).argmax(dim=1) for part in pixels.split(200)])
    for name, alphas in space.alphas.items():
        alphas.copy_(before[name])
    return found


class Pictures:
    """Images in memory, in the place of prepared ones."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels, self.shards = pixels, self
        self.ids = [str(row) for row in range(len(pixels))]

    def batches(self, rows: list[int], size: int, device: Any) -> Any:
        return iter([self.pixels[rows]])


def searched(case: Planted, size: int, order: Tensor | None = None, first: bool = False) -> dict[str, Tensor]:
    """The weights of the options [blocks, C + 1] by tower after a search that changes no prompt.

    `order` [N] is that in which the validation images are listed.
    """
    space = cast(SearchSpace, case.module.learner)
    with torch.no_grad():
        for alphas in space.alphas.values():
            alphas.zero_()
    listed = torch.arange(len(case.labels)) if order is None else order
    group = ClassGroup(CLASSES, tuple(listed.tolist()), tuple(case.labels[listed].tolist()))
    validation = ValidationBatches(cast(ReadyPixels, Pictures(case.pixels)), group, size, 1, WORLD, first)
    engine = SearchEngine(case.module, Rates(0.0, RATE, 0.0, 0.0), validation, 1, STEPS)
    before = {name: value.detach().clone() for name, value in space.vectors.items()}
    batch = ImageBatch(case.pixels[:1], case.labels[:1])
    for _ in range(STEPS):
        engine.accumulate(batch, Normaliser(*batch.counts()))
        engine.step()
    assert all(torch.equal(value, before[name]) for name, value in space.vectors.items())
    return {tower: alphas.detach().clone() for tower, alphas in space.alphas.items()}


CASES = [(tower, block, seed) for tower in ("vision", "text") for block in range(3) for seed in (1, 2)]
QUICK = ("vision", 1, 1)


@pytest.mark.parametrize(
    ("tower", "block", "seed"),
    [pytest.param(*case, marks=() if case == QUICK else pytest.mark.slow) for case in CASES],
)
def test_the_planted_option_is_found(tower: str, block: int, seed: int) -> None:
    case = planted(tower, block, seed)
    assert len(case.labels) > 2 * BATCH and len(case.labels.unique()) > 4
    weights = searched(case, BATCH)[tower].softmax(dim=1)
    assert float(weights[block, PLANTED]) >= FOUND


@pytest.mark.slow
def test_with_the_released_batch_the_choice_depends_on_which_classes_come_first() -> None:
    """It is always the first sixteen images. Shuffled batches find the option whatever the order of the classes."""
    tower, block, seed = QUICK
    case = planted(tower, block, seed)
    choices: dict[bool, list[Choice]] = {}
    for first in (True, False):
        for descending in (False, True):
            order = case.labels.argsort(stable=True, descending=descending)
            found = searched(case, RELEASED_BATCH, order, first)
            choices.setdefault(first, []).append(choose(found[tower], LENGTHS))
    ascending, descending_ = choices[True]
    assert ascending.lengths != descending_.lengths
    assert descending_.lengths[block] != PLANTED  # all sixteen are of one class, which says nothing of the others
    assert [choice.lengths[block] for choice in choices[False]] == [PLANTED, PLANTED]
