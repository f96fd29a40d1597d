"""Low-rank updates: what they add, to which rows, and that they learn alike however a step is computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config.recipe import ModelConfig
from pipeline.data.collate import Batch, Examples, StageData, collate
from pipeline.data.selection import Selection
from pipeline.errors import UserError
from pipeline.planning.memory_plan import Tokens, trainable_groups, training_activations
from pipeline.planning.model_shape import head_size, meta_model, model_shape
from pipeline.planning.workload import Workload
from pipeline.prompts.generation import Decoding, Modules, generate_answers
from pipeline.prompts.learner import Learner
from pipeline.prompts.model import LearnerOnLMM
from pipeline.prompts.parts.base import Entry
from pipeline.prompts.parts.low_rank import LowRank, LowRankEntry, low_rank_output
from pipeline.training.normaliser import Normaliser
from tests.training.worlds import make_recipe, make_samples

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
OUTPUT = "low_rank.lm_head"
RANK, ALPHA = 3, 6.0
ELEMENT = 4  # bytes of a float32
# Rows with one module, two with weights, one at half, and none.
NUMBERS, WEIGHTS = [[0, -1], [2, 1], [1, -1], [-1, -1]], [[1.0, 0.0], [0.7, 0.3], [0.5, 0.0], [0.0, 0.0]]
SELECTION = Selection(torch.tensor(NUMBERS), torch.tensor(WEIGHTS))


@pytest.fixture(scope="module")
def lmm(llava: Path) -> LMM:
    return load_lmm(ModelConfig(path=str(llava)))


def modules(lmm: LMM, count: int = 3, targets: tuple[str, ...] = EVERY) -> dict[str, Tensor]:
    """Random finished modules, stacked."""
    generator = torch.Generator().manual_seed(3)
    part = LowRank(lmm, targets, RANK, ALPHA)
    return {
        name: torch.randn(count, *value.shape, generator=generator) * 0.2 for name, value in part.trainables().items()
    }


def batch_of(lmm: LMM, selection: Selection | None = None) -> Batch:
    data = StageData([(*make_samples(4, text_only=(1,)), None)])
    examples = Examples(data, lmm.conversation)
    return collate(examples, range(4), [1.0] * 4, selection or Selection.none(4))


def batch_of_one(lmm: LMM, row: int) -> Batch:
    """One sample of `batch_of`, without a module."""
    data = StageData([(*make_samples(4, text_only=(1,)), None)])
    return collate(Examples(data, lmm.conversation), [row], [1.0], Selection.none(4))


def after_backward(lmm: LMM, target: str, bank: bool) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """The loss over all samples of an update of one layer, its B and A with their gradients, and the earlier modules.

    With `bank` the samples get those that SELECTION names.
    """
    learner = Learner({"module": LowRank(lmm, (target,), RANK, ALPHA)})
    own, earlier = learner.trainables(), modules(lmm, targets=(target,))
    assert own.keys() == {f"low_rank.{target}.a", f"low_rank.{target}.b"}
    for name, value in own.items():
        value.data.copy_(earlier[name].mean(0))
    learner.start_stage(earlier if bank else {})
    found = LearnerOnLMM(lmm, learner).unlikeliness(batch_of(lmm, SELECTION if bank else None))
    found.backward()
    return found.detach(), own[f"low_rank.{target}.b"], own[f"low_rank.{target}.a"], earlier


@torch.no_grad()
def test_each_row_is_computed_as_by_the_model_with_its_own_modules_merged_in(lmm: LMM) -> None:
    tensors = modules(lmm)
    torch.manual_seed(0)
    embeddings, attention = torch.randn(4, 7, lmm.width) * 0.3, torch.ones(4, 7, dtype=torch.long)
    with LowRankEntry(ALPHA / RANK).attached(lmm, tensors, SELECTION):
        together = lmm.hidden(embeddings, attention)
    names = {name.removeprefix("low_rank.")[:-2] for name in tensors}
    weights = {name: lmm.decoder.get_parameter(f"{name}.weight") for name in names}
    before = {name: weight.clone() for name, weight in weights.items()}
    for row, chosen in enumerate(SELECTION.listed()):
        for name, weight in weights.items():
            for number, share in chosen:
                update = tensors[f"low_rank.{name}.b"][number] @ tensors[f"low_rank.{name}.a"][number]
                weight.add_(ALPHA / RANK * share * update)
        alone = lmm.hidden(embeddings[row : row + 1], attention[row : row + 1])
        for name, weight in weights.items():
            weight.copy_(before[name])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)


def test_gathered_modules_give_what_all_weighted_ones_give() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 20, 8, generator=generator)  # long enough that gathering takes fewer operations
    a, b = torch.randn(9, RANK, 8, generator=generator), torch.randn(9, 6, RANK, generator=generator)
    weights, used = torch.tensor([[0.25, 0.75], [1.0, 0.0]]), torch.tensor([2, 4, 7])
    gathered = low_rank_output(inputs, a, b, Selection(torch.tensor([[7, 2], [4, -1]]), weights))
    weighted = low_rank_output(inputs, a[used], b[used], Selection(torch.tensor([[2, 0], [1, -1]]), weights))
    torch.testing.assert_close(gathered, weighted)


def test_samples_that_all_get_no_module_are_answered_by_the_frozen_model(lmm: LMM) -> None:
    examples = Examples(StageData([(*make_samples(4, text_only=(1,)), None)]), lmm.conversation)
    nothing = Selection(torch.full((4, 2), -1))

    def answers(tensors: dict[str, Tensor], entry: Entry) -> dict[int, str]:
        return generate_answers(lmm, examples, range(4), Modules(tensors, nothing, entry), Decoding(5, 4))

    assert answers(modules(lmm), LowRankEntry(ALPHA / RANK)) == answers({}, Entry())


def trained(
    lmm: LMM, checkpointing: str, bank: bool, targets: tuple[str, ...] = EVERY
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a step."""
    learner = Learner({"module": LowRank(lmm, targets, RANK, ALPHA)})
    module = LearnerOnLMM(lmm, learner, checkpointing)
    generator = torch.Generator().manual_seed(5)
    for value in learner.trainables().values():
        value.data.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    learner.start_stage(modules(lmm, targets=targets) if bank else {})
    batch = batch_of(lmm, SELECTION if bank else None)
    loss, terms = module(batch, Normaliser(*batch.counts()))
    loss.backward()
    assert tuple(terms) == module.term_names == ("loss_lm",)
    gradients = {name: value.grad for name, value in learner.trainables().items() if value.grad is not None}
    assert len(gradients) == len(learner.trainables()) and all(value.abs().sum() > 0 for value in gradients.values())
    return loss.detach(), gradients


@pytest.mark.parametrize("targets", [EVERY, (*EVERY, "lm_head", "embed_tokens")])
@pytest.mark.parametrize("bank", [False, True])
def test_recomputed_layers_are_computed_with_the_updates_too(lmm: LMM, bank: bool, targets: tuple[str, ...]) -> None:
    loss, gradients = trained(lmm, "none", bank, targets)
    for policy in ("selective", "full"):
        again, found = trained(lmm, policy, bank, targets)
        torch.testing.assert_close(again, loss)
        for name, value in gradients.items():
            torch.testing.assert_close(found[name], value, msg=name)


def test_a_new_module_changes_nothing_and_its_gradient_is_that_of_the_loss(lmm: LMM) -> None:
    learner = Learner({"module": LowRank(lmm, ATTENTION, RANK, ALPHA)})
    module, batch = LearnerOnLMM(lmm, learner), batch_of(lmm)
    values = learner.start(lmm, 0, 0)
    for name, parameter in learner.trainables().items():
        parameter.data.copy_(values[name])
    loss, _ = module(batch, Normaliser(*batch.counts()))
    loss.backward()
    frozen, _ = LearnerOnLMM(lmm, Learner({}))(batch, Normaliser(*batch.counts()))
    torch.testing.assert_close(loss, frozen)
    ups = [value for name, value in learner.trainables().items() if name.endswith(".b")]
    slope = sum(float(value.grad.square().sum()) for value in ups if value.grad is not None)
    step = 1e-3 / slope**0.5
    with torch.no_grad():
        for value in ups:
            value.sub_(step * value.grad)
        moved, _ = module(batch, Normaliser(*batch.counts()))
    assert float((loss - moved).detach()) == pytest.approx(step * slope, rel=0.05)


@pytest.fixture
def untied(lmm: LMM) -> Iterator[nn.Linear]:
    """The output layer with weights of its own, which the test may change without the input embeddings changing."""
    output = lmm.model.get_output_embeddings()
    tied = output.weight
    output.weight = nn.Parameter(tied.detach().clone(), requires_grad=False)
    yield output
    output.weight = tied


@pytest.mark.parametrize("bank", [False, True])
def test_an_updated_output_layer_scores_each_sample_as_the_model_with_its_modules_merged_in(
    lmm: LMM, untied: nn.Linear, bank: bool
) -> None:
    """The loss over all samples' tokens is the sum of those of single samples, and so are its gradients."""
    found, ups, downs, earlier = after_backward(lmm, "lm_head", bank)
    plain, gradient, weight = LearnerOnLMM(lmm, Learner({})), torch.zeros_like(untied.weight), untied.weight.clone()
    expected = 0.0
    for row, chosen in enumerate(SELECTION.listed()):
        added = ups @ downs
        for number, share in chosen if bank else []:
            added = added + share * (earlier[OUTPUT + ".b"][number] @ earlier[OUTPUT + ".a"][number])
        untied.weight = nn.Parameter((weight + ALPHA / RANK * added).detach())
        loss = plain.unlikeliness(batch_of_one(lmm, row))
        loss.backward()
        assert untied.weight.grad is not None
        gradient += untied.weight.grad
        expected += float(loss.detach())
    untied.weight = nn.Parameter(weight, requires_grad=False)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(ups.grad, ALPHA / RANK * gradient @ downs.T, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(downs.grad, ALPHA / RANK * ups.T @ gradient, atol=1e-4, rtol=1e-3)


def test_targets_that_name_no_layer_are_refused(lmm: LMM) -> None:
    with pytest.raises(UserError, match=r"ends in 'wq'; expected among .*embed_tokens, .*q_proj"):
        LowRank(lmm, ("q_proj", "wq"), RANK, ALPHA)


def test_the_plan_has_the_inputs_that_gradients_of_updates_need(lmm: LMM, llava: Path) -> None:
    """Beside what frozen layers keep: one copy of what query, key and value read, one of what the output reads."""
    method = {"name": "task_lora", "targets": list(ATTENTION), "rank": RANK}
    recipe, plain = make_recipe(llava, method=method), make_recipe(llava, method={"name": "independent"})
    shape, tokens = model_shape(meta_model(recipe.model)), Tokens(image=0, text=100, answer=1, source="")
    length, element = 100, 4
    more = training_activations(Workload.of(recipe, 12), shape, 1, length, tokens, element)
    more -= training_activations(Workload.of(plain, 12), shape, 1, length, tokens, element)
    layers, heads = shape.text.num_hidden_layers, shape.text.num_attention_heads * head_size(shape.text)
    assert more == (layers + 1) * length * (shape.text.hidden_size + heads) * element
    parameters = sum(value.numel() for value in LowRank(lmm, ATTENTION, RANK, ALPHA).trainables().values())
    assert sum(map(sum, trainable_groups(recipe.method, shape, 12, False))) == parameters


def planned_more(lmm: LMM, llava: Path, target: str) -> int:
    """Bytes that the plan of two samples of 100 tokens, 7 of them an answer's, has more with one more target.

    The planned parameters are compared with the part's on the way.
    """
    shape = model_shape(meta_model(make_recipe(llava).model))
    tokens, planned = Tokens(image=0, text=100, answer=7, source=""), []
    for targets in (ATTENTION, (*ATTENTION, target)):
        recipe = make_recipe(llava, method={"name": "task_lora", "targets": list(targets), "rank": RANK})
        planned.append(training_activations(Workload.of(recipe, 12), shape, 2, 100, tokens, ELEMENT))
        parameters = sum(value.numel() for value in LowRank(lmm, targets, RANK, ALPHA).trainables().values())
        assert sum(map(sum, trainable_groups(recipe.method, shape, 12, False))) == parameters
    return planned[1] - planned[0]


def test_the_plan_has_the_output_layers_update_and_what_it_adds_to_the_scores(lmm: LMM, llava: Path) -> None:
    text = model_shape(meta_model(make_recipe(llava).model)).text
    assert planned_more(lmm, llava, "lm_head") == 2 * 7 * text.vocab_size * ELEMENT
