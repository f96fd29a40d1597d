"""Low-rank updates of the input embeddings: every word that the decoder reads, in training and in decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

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
from pipeline.prompts.parts.low_rank import LowRankEntry, low_rank_output
from tests.training.test_low_rank import (
    ALPHA,
    ATTENTION,
    ELEMENT,
    RANK,
    SELECTION,
    after_backward,
    batch_of_one,
    modules,
    planned_more,
)
from tests.training.worlds import make_recipe, make_samples

WORDS = "low_rank.embed_tokens"


@pytest.fixture(scope="module")
def lmm(llava: Path) -> LMM:
    return load_lmm(ModelConfig(path=str(llava)))


@pytest.mark.parametrize(("length", "numbers"), [(20, [[7, 2], [4, -1]]), (1, [[7, 2], [4, -1]]), (5, [[3], [3]])])
def test_words_are_read_as_one_hot_vectors_row_by_row(length: int, numbers: list[list[int]]) -> None:
    """Rows that gather their own modules, rows with shares of the used ones, and rows that all have the same one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, (2, length), generator=generator)
    a, b = torch.randn(9, RANK, 8, generator=generator), torch.randn(9, 6, RANK, generator=generator)
    weights = torch.tensor([[0.25, 0.75], [0.5, 0.0]])[:, : len(numbers[0])]
    selection = Selection(torch.tensor(numbers), weights)
    found = low_rank_output(ids, a, b, selection)
    torch.testing.assert_close(found, low_rank_output(one_hot(ids, 8).float(), a, b, selection))
    for row, chosen in enumerate(selection.listed()):
        alone = sum(share * (b[n] @ a[n])[:, ids[row]].T for n, share in chosen)
        torch.testing.assert_close(found[row], alone)


@pytest.mark.parametrize("bank", [False, True])
def test_updated_input_embeddings_are_read_by_each_sample_as_with_its_modules_merged_in(lmm: LMM, bank: bool) -> None:
    """The loss over all samples is the sum of those of single samples, and so are its gradients."""
    found, ups, downs, earlier = after_backward(lmm, "embed_tokens", bank)
    layer, plain, expected = lmm.input_embeddings, LearnerOnLMM(lmm, Learner({})), 0.0
    frozen = layer.weight
    gradient = torch.zeros_like(frozen)
    for row, chosen in enumerate(SELECTION.listed()):
        added = ups @ downs
        for number, share in chosen if bank else []:
            added = added + share * (earlier[WORDS + ".b"][number] @ earlier[WORDS + ".a"][number])
        layer.weight = nn.Parameter((frozen + ALPHA / RANK * added.T).detach())  # not that of the output layer
        loss = plain.unlikeliness(batch_of_one(lmm, row))
        loss.backward()
        assert layer.weight.grad is not None
        gradient += layer.weight.grad
        expected += float(loss.detach())
    layer.weight = frozen
    assert float(found) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(ups.grad, ALPHA / RANK * gradient.T @ downs.T, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(downs.grad, ALPHA / RANK * ups.T @ gradient.T, atol=1e-4, rtol=1e-3)


def test_updated_words_are_decoded_as_they_are_trained(lmm: LMM) -> None:
    """The scores of answers' tokens in training are those of decoding the same tokens one by one, row by row."""
    entry, tensors = LowRankEntry(ALPHA / RANK), modules(lmm, targets=(*ATTENTION, "embed_tokens"))
    data = StageData([(*make_samples(4, text_only=(1,)), None)])
    asked = collate_prompts(Examples(data, lmm.conversation), range(4), SELECTION)
    with torch.no_grad():
        found = embed_with_modules(lmm, asked, entry, tensors)
        prompts = Prompts(found.vectors, found.attention, found.places, asked.images, selection=asked.selection)
        answers = generate(lmm, prompts, 4, 4, entry.on(lmm, tensors))
        assert len({tuple(answer) for answer in answers}) > 1
        for row, (chosen, answer) in enumerate(zip(SELECTION.listed(), answers, strict=True)):
            ids = torch.cat([asked.input_ids[row][asked.attention[row].bool()], torch.tensor(answer[:-1])])[None]
            has_image, images = asked.has_image[row : row + 1], asked.images
            if has_image.any():
                place = int(asked.has_image[:row].sum())
                images = {name: value[place : place + 1] for name, value in images.items()}
            pairs = list(zip(*chosen, strict=True)) or [(0,), (0.0,)]
            alone = Selection(torch.tensor([pairs[0]]), torch.tensor([pairs[1]]))
            with entry.attached(lmm, tensors, alone):
                embeddings = lmm.embed(ids, images, has_image)
                scores = lmm.logits(lmm.hidden(embeddings, torch.ones_like(ids), lmm.image_places(ids), images))[0]
            stops = torch.zeros(scores.shape[-1]).index_fill(0, torch.tensor(lmm.stops), -torch.inf)
            assert [int((line + stops).argmax()) for line in scores[-len(answer) :]] == answer


def test_routing_keys_of_the_models_own_are_those_of_the_frozen_one(lmm: LMM, llava: Path) -> None:
    encoder = key_encoder(llava, kind="own")
    assert isinstance(encoder, OwnKeys)
    before, tensors = encoder.text(["what is it?"]), modules(lmm, targets=("embed_tokens",))
    with LowRankEntry(ALPHA / RANK).attached(encoder.lmm, tensors, Selection.same(1, [0])):
        ids = torch.tensor([[5]])
        assert not torch.equal(encoder.lmm.words(ids), lmm.words(ids))
        assert torch.equal(encoder.text(["what is it?"]), before)


@pytest.mark.parametrize("name", ["moelora", "core_moe"])
def test_methods_on_linear_layers_alone_refuse_the_input_embeddings(lmm: LMM, llava: Path, name: str) -> None:
    recipe = make_recipe(llava, method={"name": name, "targets": ["q_proj", "embed_tokens"], "rank": 2})
    method, message = make_method(recipe.method), r"'embed_tokens' is no layer of the decoder.*expected among .*q_proj"
    with pytest.raises(UserError, match=message):
        kind_of(method).of(lmm, method)
    with pytest.raises(UserError, match=message):
        trainable_groups(recipe.method, model_shape(meta_model(recipe.model)), 12, False)


def test_the_plan_has_the_input_embeddings_update_and_the_columns_that_it_keeps(lmm: LMM, llava: Path) -> None:
    layers = model_shape(meta_model(make_recipe(llava).model)).text.num_hidden_layers
    assert planned_more(lmm, llava, "embed_tokens") == 2 * 100 * (RANK * ELEMENT // layers) * (layers + 1)
