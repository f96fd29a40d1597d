"""Low-rank updates of the image projector, in training and in decoding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.backbones.decoding import Prompts, generate
from pipeline.backbones.key_encoders import OwnKeys, key_encoder
from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config.recipe import ModelConfig
from pipeline.data.collate import Examples, StageData, collate_prompts
from pipeline.data.selection import Selection
from pipeline.errors import UserError
from pipeline.methods import make_method
from pipeline.planning.memory_plan import trainable_groups
from pipeline.planning.model_shape import meta_model, model_shape
from pipeline.prompts.embedding import embed_with_modules
from pipeline.prompts.learner import Learner
from pipeline.prompts.model import LearnerOnLMM
from pipeline.prompts.parts.base import kind_of
from pipeline.prompts.parts.low_rank import LowRank, LowRankEntry
from tests.training.test_low_rank import (
    ALPHA,
    ATTENTION,
    ELEMENT,
    RANK,
    SELECTION,
    after_backward,
    batch_of,
    batch_of_one,
    modules,
    planned_more,
)
from tests.training.worlds import make_recipe, make_samples

IMAGES = "low_rank.image_projector"


@pytest.fixture(scope="module")
def lmm(llava: Path) -> LMM:
    return load_lmm(ModelConfig(path=str(llava)))


@contextmanager
def projected_by(lmm: LMM, matrix: Tensor) -> Iterator[None]:
    """While the block runs, the projector adds matrix x to its outputs."""
    handle = lmm.projector().register_forward_hook(lambda _, inputs, output: output + inputs[0] @ matrix.T)
    try:
        yield
    finally:
        handle.remove()


def added(tensors: dict[str, Tensor], chosen: list[tuple[int, float]]) -> Tensor:
    """The matrix that a sample's modules add, [D, V]."""
    up, down = tensors[IMAGES + ".b"], tensors[IMAGES + ".a"]
    nothing = torch.zeros(up.shape[1], down.shape[2])
    return ALPHA / RANK * sum((share * up[n] @ down[n] for n, share in chosen), nothing)


@pytest.mark.parametrize("bank", [False, True])
def test_each_samples_image_features_are_those_of_its_own_projector(lmm: LMM, bank: bool) -> None:
    """The loss over all samples is the sum of those of single samples, and so are its gradients."""
    found, ups, downs, earlier = after_backward(lmm, "image_projector", bank)
    plain, expected = LearnerOnLMM(lmm, Learner({})), 0.0
    matrix = nn.Parameter(torch.zeros(lmm.width, lmm.image_layer.in_features))
    for row, chosen in enumerate(SELECTION.listed()):
        fixed = (ALPHA / RANK * ups @ downs).detach() + (added(earlier, chosen) if bank else 0)
        batch = batch_of_one(lmm, row)
        lmm.trains_projector = True  # so that the features get gradients
        try:
            with projected_by(lmm, fixed + matrix):
                loss = plain.unlikeliness(batch)
                if row != 1:  # which has no image
                    loss.backward()
        finally:
            lmm.trains_projector = False
        expected += float(loss.detach())
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert matrix.grad is not None and float(matrix.grad.abs().max()) > 0
    torch.testing.assert_close(ups.grad, ALPHA / RANK * matrix.grad @ downs.T, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(downs.grad, ALPHA / RANK * ups.T @ matrix.grad, atol=1e-4, rtol=1e-3)


def test_samples_without_images_call_the_update_for_other_ranks_and_get_nothing_from_it(lmm: LMM) -> None:
    learner = Learner({"module": LowRank(lmm, ("image_projector",), RANK, ALPHA)})
    for value in learner.trainables().values():
        value.data.normal_()
    learner.start_stage({})
    batch = batch_of_one(lmm, 1)
    found = LearnerOnLMM(lmm, learner).unlikeliness(batch)
    found.backward()
    assert torch.equal(found, LearnerOnLMM(lmm, Learner({})).unlikeliness(batch))
    assert all(value.grad is not None and not value.grad.any() for value in learner.trainables().values())


def test_changed_images_are_decoded_as_they_are_trained(lmm: LMM) -> None:
    """Answers of a batch whose rows have different modules are those of each row alone with a projector of its own."""
    entry, tensors = LowRankEntry(ALPHA / RANK), modules(lmm, targets=(*ATTENTION, "image_projector"))
    decoder = {name: value for name, value in tensors.items() if not name.startswith(IMAGES)}
    tensors = {name: value * (1 if name in decoder else 5) for name, value in tensors.items()}
    data = StageData([(*make_samples(4, text_only=(1,)), None)])
    asked = collate_prompts(Examples(data, lmm.conversation), range(4), SELECTION)
    with torch.no_grad():
        found = embed_with_modules(lmm, asked, entry, tensors)
        prompts = Prompts(found.vectors, found.attention, found.places, asked.images, selection=asked.selection)
        answers = generate(lmm, prompts, 4, 4, entry.on(lmm, tensors))
        unchanged = embed_with_modules(lmm, asked, entry, decoder)
        assert not torch.equal(found.vectors[0], unchanged.vectors[0])
        assert torch.equal(found.vectors[1], unchanged.vectors[1])  # no image
        for row, (chosen, answer) in enumerate(zip(SELECTION.listed(), answers, strict=True)):
            alone = collate_prompts(
                Examples(StageData([(*make_samples(4, text_only=(1,)), None)]), lmm.conversation), [row], SELECTION
            )
            with projected_by(lmm, added(tensors, chosen)):
                one = embed_with_modules(lmm, alone, entry, decoder)
            rows = Prompts(one.vectors, one.attention, one.places, alone.images, selection=alone.selection)
            assert generate(lmm, rows, 4, 4, entry.on(lmm, decoder)) == [answer]


def test_routing_keys_of_the_models_own_are_those_of_the_frozen_one(lmm: LMM, llava: Path) -> None:
    encoder = key_encoder(llava, kind="own")
    assert isinstance(encoder, OwnKeys)
    pixels = batch_of(lmm).images["pixel_values"][:1]
    before = encoder.image(pixels)
    with LowRankEntry(ALPHA / RANK).attached(
        encoder.lmm, modules(lmm, targets=("image_projector",)), Selection.same(1, [0])
    ):
        assert torch.equal(encoder.image(pixels), before)


@pytest.mark.parametrize("name", ["moelora", "core_moe"])
def test_methods_on_linear_layers_alone_refuse_it(lmm: LMM, llava: Path, name: str) -> None:
    recipe = make_recipe(llava, method={"name": name, "targets": ["q_proj", "image_projector"], "rank": 2})
    method, message = (
        make_method(recipe.method),
        r"'image_projector' is no layer of the decoder.*expected among .*q_proj",
    )
    with pytest.raises(UserError, match=message):
        kind_of(method).of(lmm, method)
    with pytest.raises(UserError, match=message):
        trainable_groups(recipe.method, model_shape(meta_model(recipe.model)), 12, False)


@pytest.mark.parametrize(("given", "rank"), [(5, 5), (None, RANK)])
def test_its_update_has_a_rank_of_its_own_which_the_plan_knows(
    lmm: LMM, llava: Path, given: int | None, rank: int
) -> None:
    options = {"targets": ["q_proj", "image_projector"], "rank": RANK, "image_rank": given}
    recipe = make_recipe(llava, method={"name": "task_lora", **options})
    method = make_method(recipe.method)
    found = {name: value.shape for name, value in kind_of(method).of(lmm, method).trainables().items()}
    assert (found[IMAGES + ".a"][0], found[IMAGES + ".b"][1]) == (rank, rank)
    assert {shape[0] for name, shape in found.items() if name.endswith("q_proj.a")} == {RANK}
    planned = kind_of(method).sizes(method, model_shape(meta_model(recipe.model)).decoder)
    assert sorted(planned) == sorted(shape.numel() for shape in found.values())


def test_the_plan_has_what_the_update_reads(lmm: LMM, llava: Path) -> None:
    layers = model_shape(meta_model(make_recipe(llava).model)).text.num_hidden_layers
    assert planned_more(lmm, llava, "image_projector") == 2 * 100 * (
        lmm.image_layer.in_features * ELEMENT // layers
    ) * (layers + 1)
