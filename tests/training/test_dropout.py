"""Dropout of what an update reads: which numbers, the published formula in a step, and where nothing is dropped."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config.method import method_options
from pipeline.config.models import ModelConfig
from pipeline.data.collate import Batch, Examples, MicroBatches, StageData, collate
from pipeline.data.order import Order
from pipeline.data.selection import Selection
from pipeline.methods import make_method
from pipeline.planning.model_shape import meta_model, model_shape
from pipeline.prompts.learner import Learner
from pipeline.prompts.model import LearnerOnLMM
from pipeline.prompts.parts.dropout import Dropout
from pipeline.prompts.parts.low_rank import LowRank, added_to_outputs
from pipeline.sequence.engine import learner_of
from pipeline.training.normaliser import Normaliser
from tests.training.worlds import KEY_WIDTH, make_recipe, make_samples

RATE, RANK, ALPHA = 0.25, 3, 6.0


@pytest.fixture(scope="module")
def lmm(llava: Path) -> LMM:
    return load_lmm(ModelConfig(path=str(llava)))


def batch_of(lmm: LMM) -> Batch:
    examples = Examples(StageData([(*make_samples(4, text_only=(1,)), None)]), lmm.conversation)
    return collate(examples, range(4), [1.0] * 4, Selection.none(4))


def begun(rate: float = RATE, seed: int = 0) -> Dropout:
    dropout = Dropout(rate)
    dropout.begin(torch.Generator().manual_seed(seed))
    return dropout


def kept(dropout: Dropout, places: list[int], length: int = 40, width: int = 64, layer: int = 0) -> Tensor:
    """Where something is kept [B, N, D]."""
    return dropout(torch.ones(len(places), length, width), torch.tensor(places), layer) > 0


def agreement(one: Tensor, other: Tensor) -> float:
    """The correlation of two masks."""
    return float(torch.corrcoef(torch.stack([one.flatten().float(), other.flatten().float()]))[0, 1])


def test_the_share_is_dropped_and_the_rest_scaled_up() -> None:
    for rate in (0.05, 0.5, 0.9):
        values = begun(rate)(torch.ones(8, 100, 97), torch.arange(8), 3)
        assert float((values == 0).float().mean()) == pytest.approx(rate, abs=0.005)
        assert float(values.max()) == pytest.approx(1 / (1 - rate), rel=1e-3)
        by_column, by_token = (values == 0).float().mean((0, 1)), (values == 0).float().mean((0, 2))
        assert float(by_column.std()) < 2 * (rate * (1 - rate) / 800) ** 0.5
        assert float(by_token.std()) < 2 * (rate * (1 - rate) / 776) ** 0.5


def test_samples_places_layers_columns_and_stages_have_masks_of_their_own() -> None:
    first = kept(begun(), [0, 1])
    others = {
        "sample": (first[0], first[1]),
        "place": (first, kept(begun(), [2, 3])),
        "layer": (first, kept(begun(), [0, 1], layer=1)),
        "stage": (first, kept(begun(seed=1), [0, 1])),
        "token": (first[:, 1:], first[:, :-1]),
        "column": (first[..., 1:], first[..., :-1]),
        "half of a word": (first[..., 0::2], first[..., 1::2]),
    }
    for name, pair in others.items():
        assert abs(agreement(*pair)) < 0.06, name


def test_rows_of_the_output_layer_are_tokens_with_masks_of_their_own() -> None:
    selection = Selection(torch.tensor([[0], [1]]), torch.tensor([[1.0], [0.5]]), torch.tensor([7, 9]))
    tokens = selection.tokens(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]))
    assert tokens.numbers.tolist() == [[0], [0], [1]] and tokens.weights is not None and tokens.places is not None
    masks = begun()(torch.ones(3, 1, 4000), tokens.places, 0) > 0
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(agreement(masks[one], masks[other])) < 0.06
    again = selection.tokens(torch.tensor([1]), torch.tensor([0]))
    assert again.places is not None and torch.equal(begun()(torch.ones(1, 1, 4000), again.places, 0) > 0, masks[2:])


def test_a_samples_mask_depends_neither_on_its_batch_nor_on_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    together = kept(begun(), [5, 9, 7], length=40)
    assert torch.equal(kept(begun(), [9], length=33)[0], together[1, :33])
    monkeypatch.setattr("pipeline.prompts.parts.dropout.AT_ONCE", 1)  # as in batches of which each sample is large
    assert torch.equal(kept(begun(), [5, 9, 7], length=40), together)


def test_the_gradient_passes_where_the_value_did() -> None:
    inputs = torch.randn(2, 5, 8, requires_grad=True)
    places = torch.tensor([3, 4])
    begun()(inputs, places, 2).sum().backward()
    assert torch.equal(inputs.grad, begun()(torch.ones(2, 5, 8), places, 2))  # type: ignore[arg-type]


def test_nothing_is_dropped_outside_of_training_or_without_a_rate() -> None:
    inputs, generator = torch.randn(2, 5, 8), torch.Generator().manual_seed(0)
    assert begun()(inputs, None, 0) is inputs
    assert begun(0.0)(inputs, torch.arange(2), 0) is inputs
    before = generator.get_state()
    Dropout(0.0).begin(generator)
    assert torch.equal(generator.get_state(), before)


def test_the_batches_of_all_ranks_and_cuts_have_the_same_places(lmm: LMM) -> None:
    examples, order = Examples(StageData([(*make_samples(10), None)]), lmm.conversation), Order(10, 4, 0, 0)

    def places(rank: int, world: int, accumulation: int) -> list[list[int]]:
        batches = MicroBatches(examples, order, Selection.none(10), 3, accumulation, rank, world)
        found = [batches[item].places for item in range(len(batches))]
        steps = range(0, len(found), accumulation)
        return [torch.cat(found[first : first + accumulation]).tolist() for first in steps]  # type: ignore[arg-type]

    whole = places(0, 1, 1)
    assert whole == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert places(0, 1, 2) == whole
    assert [sorted(one + two) for one, two in zip(places(0, 2, 1), places(1, 2, 1), strict=True)] == whole


METHODS: dict[str, dict[str, Any]] = {"task_lora": {}, "hide": {}, "moelora": {"experts": 1}, "core_moe": {}}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_the_published_formula_and_answers_have_no_dropout(lmm: LMM, name: str) -> None:
    """y = W x + (alpha / rank) B A dropout(x), of which only the masks are taken from the project."""
    size = {"rank": RANK, "alpha": ALPHA, "targets": ["q_proj", "down_proj"], **METHODS[name]}
    learner = learner_of(lmm, make_method(method_options(name=name, dropout=RATE, **size)), KEY_WIDTH)
    module, parameters = LearnerOnLMM(lmm, learner), learner.trainables()
    plain = learner_of(lmm, make_method(method_options(name=name, **size)), KEY_WIDTH)
    start, without = learner.start(lmm, 0, 0), plain.start(lmm, 0, 0)
    assert all(torch.equal(value, without[key]) for key, value in start.items())
    generator = torch.Generator().manual_seed(1)
    for key, parameter in parameters.items():
        parameter.data.copy_(start[key] + torch.randn(start[key].shape, generator=generator) * 0.1)
        plain.trainables()[key].data.copy_(parameter.data)
    batch = batch_of(lmm)
    places = torch.tensor([4, 2, 11, 7])
    in_training, counted = dataclasses.replace(batch, places=places), Normaliser(*batch.counts())
    loss, _ = module(in_training, counted)

    layers, prefix = list(learner["module"].layers), learner["module"].prefix

    def update(number: int, inputs: Tensor) -> Tensor:
        mask = learner["module"].dropout(torch.ones_like(inputs), places, number)
        a, b = (parameters[prefix + layers[number] + end] for end in (".a", ".b"))  # an expert's are [1, ...]
        return ALPHA / RANK * (inputs * mask) @ a.reshape(RANK, -1).T @ b.reshape(-1, RANK).T

    with added_to_outputs((lmm.decoder.get_submodule(layer), partial(update, n)) for n, layer in enumerate(layers)):
        expected, _ = LearnerOnLMM(lmm, Learner({}))(batch, counted)
    torch.testing.assert_close(loss, expected)
    nothing_dropped, _ = LearnerOnLMM(lmm, plain)(in_training, counted)
    torch.testing.assert_close(module(batch, counted)[0], nothing_dropped, atol=0, rtol=0)
    assert abs(float(loss.detach() - nothing_dropped.detach())) > 1e-3


def test_it_decides_on_nothing_once_a_module_is_learned() -> None:
    for name in METHODS:
        assert "dropout" in type(method_options(name=name)).training_only()
    assert "keys_per_task" in type(method_options(name="task_lora")).training_only()
    with pytest.raises(ValidationError, match="dropout"):
        method_options(name="task_lora", dropout=1.0)


def test_the_memory_plan_has_what_each_layer_reads_with_dropout(llava: Path) -> None:
    recipe = make_recipe(llava, method={"name": "task_lora"})
    shape = model_shape(meta_model(recipe.model)).decoder
    read = {rate: LowRank.read(make_method(method_options(name="task_lora", dropout=rate)), shape) for rate in (0, 0.1)}
    assert read == {0: 2 * 2 * shape.width, 0.1: 2 * 4 * shape.width}  # two layers; query, key and value read the same
