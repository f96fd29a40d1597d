"""The switches to what the released code of DPL does: each changes results, and the default has not its defect."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pipeline.clip.images.prepared import ClassGroup
from pipeline.clip.images.ready_pixels import ReadyPixels
from pipeline.clip.learning.model import PromptedCLIP
from pipeline.clip.methods.regularisers import Consistency
from pipeline.clip.search.choice import choose
from pipeline.clip.search.engine import Rates, SearchEngine
from pipeline.clip.search.validation import ValidationBatches
from pipeline.clip.search_space import SearchSpace, Start, TowerOptions, search_space
from pipeline.clip.templates import PROMPTSRC
from pipeline.clip.towers.backbone import Backbone
from pipeline.ranks.world import World
from pipeline.training.normaliser import Normaliser
from tests.clip.tiny import NAMES, batch, byte_tokenizer, classifier, clip_model

BATCH, PER_CLASS, CLASSES = 16, 4, 10  # of validation images; the numbers of EuroSAT


class Pictures:
    """Images of one number each, their row, in the place of prepared ones."""

    def __init__(self, count: int) -> None:
        self.shards, self.ids = self, [str(row) for row in range(count)]

    def batches(self, rows: list[int], size: int, device: Any) -> Any:
        return iter([torch.tensor(rows)])


def validation(first: bool, rank: int = 0, ranks: int = 1, size: int = BATCH) -> ValidationBatches:
    """The batches of validation images that are listed class by class, as they are drawn."""
    labels = tuple(label for label in range(CLASSES) for _ in range(PER_CLASS))
    group = ClassGroup(tuple(map(str, range(CLASSES))), tuple(range(len(labels))), labels)
    pictures = cast(ReadyPixels, Pictures(len(labels)))
    world = World(rank, ranks, rank, torch.device("cpu"))
    return ValidationBatches(pictures, group, size, 1, world, first)


def seen(batches: ValidationBatches, steps: int) -> list[int]:
    """The classes that the weights of the options learn from in so many steps."""
    found: set[int] = set()
    for step in range(steps):
        images, _ = batches(step)
        assert images.weights is not None
        found.update(images.labels[images.weights > 0].tolist())
    return sorted(found)


def test_the_released_search_validates_on_the_first_classes_alone() -> None:
    assert seen(validation(first=True), 30) == [0, 1, 2, 3]
    assert seen(validation(first=False), 3) == list(range(CLASSES))


def test_shuffled_validation_batches_pass_through_every_image_before_any_comes_again() -> None:
    batches = validation(first=False)
    for epoch in range(2):
        rows: list[int] = []
        for step in range(3 * epoch, 3 * epoch + 3):
            images, weight = batches(step)
            assert images.pixel_values is not None and images.weights is not None
            rows += images.pixel_values[images.weights > 0].tolist()
            assert weight == float(images.weights.sum())
        assert sorted(rows) == list(range(CLASSES * PER_CLASS))
    assert not torch.equal(batches(0)[0].labels, batches(3)[0].labels)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("ranks", "size"), [(2, 16), (3, 16), (5, 4), (3, 100)])
def test_ranks_share_a_validation_batch(first: bool, ranks: int, size: int) -> None:
    for step in (0, 2):
        whole, weight = validation(first, size=size)(step)
        parts = [validation(first, rank, ranks, size)(step) for rank in range(ranks)]
        assert {part[1] for part in parts} == {weight}
        assert len({len(part[0].labels) for part in parts}) == 1  # every rank runs the same shapes

        def rows(images: Any) -> list[int]:
            return images.pixel_values[images.weights > 0].tolist()

        assert sorted(row for part, _ in parts for row in rows(part)) == sorted(rows(whole))


def turned(start: Start) -> float:
    """By how much prompts turn in a few steps of a search, as 1 - cosine, on average."""
    backbone = Backbone(clip_model())
    space = search_space(backbone.sizes, TowerOptions((0, 1, 2), (0, 1, 2)), start=start, seed=1)
    module = PromptedCLIP(backbone, space, backbone.words(byte_tokenizer()), NAMES)
    told = (batch(count=4, seed=2), 4.0)
    engine = SearchEngine(module, Rates(0.0035, 0.0035, 0.9, 0.0), lambda step: told, 1, 1)
    before = {name: value.detach().clone() for name, value in space.vectors.items()}
    for step in range(5):
        given = batch(count=4, seed=step)
        engine.accumulate(given, Normaliser(*given.counts()))
        engine.step()
    cosines = [cosine_similarity(value, before[name], dim=-1).mean() for name, value in space.vectors.items()]
    return float(1 - torch.stack(cosines).mean().detach())


def test_prompts_of_the_released_start_hardly_move() -> None:
    assert turned("small") > 100 * turned("released")


def test_the_ensemble_of_texts_changes_what_is_read() -> None:
    template, ensemble = (classifier("dpl", text=1, vision=1, texts=texts) for texts in ("template", "ensemble"))
    ensemble.learner.load_state_dict(template.learner.state_dict())
    different = (template.text_features() - ensemble.text_features()).abs().max()
    assert float(different) > 1e-3
    assert ensemble.texts.averaged is not None and template.texts.averaged is None


def test_the_released_teacher_is_the_last_template_alone() -> None:
    module = classifier("dpl", text=1, vision=1)
    terms = {}
    for name, templates in (("all", PROMPTSRC), ("last", PROMPTSRC[-1:])):
        module.regularisers = (Consistency(0.0, 0.0, 1.0, templates),)
        module.set_classes(NAMES)
        terms[name] = module(batch())[1]["logit_consistency"]
    assert PROMPTSRC[-1] == "itap of the {}."
    assert float((terms["all"] - terms["last"]).abs()) > 1e-6


def test_options_that_are_the_same_function_stay_tied() -> None:
    """Nothing but chance could choose between them, so the first is taken."""
    backbone = Backbone(clip_model())
    space = search_space(backbone.sizes, TowerOptions((0, 2, 2), (0, 2, 2)), seed=1)  # both are the same prompts
    with torch.no_grad():
        for alphas in space.alphas.values():
            alphas.zero_()
    module = PromptedCLIP(backbone, space, backbone.words(byte_tokenizer()), NAMES)
    told = (batch(count=4, seed=2), 4.0)
    engine = SearchEngine(module, Rates(0.05, 0.05, 0.9, 0.0), lambda step: told, 1, 1)
    for step in range(20):
        given = batch(count=4, seed=step)
        engine.accumulate(given, Normaliser(*given.counts()))
        engine.step()
    moved: list[Tensor] = []
    for alphas in space.alphas.values():
        torch.testing.assert_close(alphas[:, 1], alphas[:, 2], atol=1e-5, rtol=0)
        moved.append(alphas.detach().abs().max())
    assert min(map(float, moved)) > 0.3
    assert isinstance(space, SearchSpace)
    assert choose(torch.tensor([[0.0, 1.0, 1.0]]), (0, 2, 2)).lengths == [2]
