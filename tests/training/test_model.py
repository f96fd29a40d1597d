"""The loss of a micro-batch: what counts, what is inserted, what gets gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.backbones.lmm import load_lmm
from pipeline.config.models import ModelConfig
from pipeline.data.collate import Batch, Examples, collate
from pipeline.data.conversation import Conversation
from pipeline.data.stage_data import StageData
from pipeline.prompts.generation import Decoding, generate_answers, prompt_sets
from pipeline.prompts.learner import Learner
from pipeline.prompts.model import LearnerOnLMM
from pipeline.training.normaliser import Normaliser
from tests.training.worlds import make_module, make_pool, make_samples

SELECTED = torch.tensor([[0, 1], [2, 0], [1, -1], [-1, -1], [2, 1], [0, 2]])


@pytest.fixture(scope="module")
def module(llava: Path) -> LearnerOnLMM:
    torch.manual_seed(0)
    module = make_module(load_lmm(ModelConfig(path=str(llava))))
    torch.nn.init.normal_(module.learner["module"].prompt, std=0.2)
    module.learner.start_stage(make_pool(3).tensors)
    return module


@pytest.fixture(scope="module")
def examples(module: LearnerOnLMM) -> Examples:
    data = StageData([(*make_samples(6, text_only=(1, 4)), None)])
    return Examples(data, Conversation(module.lmm.processor, 200))


def run(module: LearnerOnLMM, batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss terms [3] and prompt gradient of one step cut into these micro-batches."""
    module.zero_grad()
    counts = torch.tensor([batch.counts() for batch in batches]).sum(0)
    total = torch.zeros(3)
    for batch in batches:
        loss, terms = module(batch, Normaliser(float(counts[0]), float(counts[1])))
        loss.backward()
        total += torch.stack([*terms.values()])
    assert module.learner["module"].prompt.grad is not None
    return total, module.learner["module"].prompt.grad.clone()


def parts(examples: Examples, cuts: list[list[int]], selected: torch.Tensor = SELECTED) -> list[Batch]:
    return [collate(examples, cut, [1.0] * len(cut), selected) for cut in cuts]


def test_the_loss_does_not_depend_on_how_the_batch_is_cut(module: LearnerOnLMM, examples: Examples) -> None:
    whole = run(module, parts(examples, [[0, 1, 2, 3, 4, 5]]))
    for cuts in ([[0, 1, 2], [3, 4, 5]], [[0], [1], [2], [3], [4], [5]]):
        found = run(module, parts(examples, cuts))
        torch.testing.assert_close(found[0], whole[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(found[1], whole[1], atol=1e-5, rtol=0)


def test_a_duplicate_of_weight_zero_changes_nothing(module: LearnerOnLMM, examples: Examples) -> None:
    alone = run(module, parts(examples, [[0, 1]]))
    filled = run(module, [collate(examples, [0, 1, 2], [1.0, 1.0, 0.0], SELECTED)])
    # The rows are padded to another length, so sums are rounded in another order; losses are about 6.
    torch.testing.assert_close(filled[0], alone[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(filled[1], alone[1], atol=1e-6, rtol=1e-6)


def rows_of(module: LearnerOnLMM, batch: Batch) -> torch.Tensor:
    """The vectors that are inserted for each sample."""
    rows = module.learner.rows(batch)
    assert rows is not None
    return rows[0]


def test_selection_is_per_sample_and_follows_a_shuffled_batch(module: LearnerOnLMM, examples: Examples) -> None:
    straight = rows_of(module, parts(examples, [[0, 1, 2, 3]])[0])
    turned = rows_of(module, parts(examples, [[3, 1, 0, 2]])[0])
    assert torch.equal(turned, straight[[3, 1, 0, 2]])


def test_a_batch_without_answer_tokens_still_runs_every_part(module: LearnerOnLMM, examples: Examples) -> None:
    batch = parts(examples, [[0]])[0]
    batch.labels.fill_(-100)
    loss, terms = module(batch, Normaliser(5.0, 1.0))
    loss.backward()
    assert terms["loss_lm"] == 0
    assert torch.isfinite(loss)


def test_text_only_samples_train_behind_prompts_with_the_text_term_alone(
    module: LearnerOnLMM, examples: Examples
) -> None:
    terms, gradient = run(module, parts(examples, [[1, 4]]))
    assert terms[1] == 0
    assert 0 < terms[2] <= 4
    assert gradient.abs().sum() > 0


def test_the_language_loss_reaches_the_prompt_and_the_prototype_loss_the_head(
    module: LearnerOnLMM, examples: Examples
) -> None:
    batch = parts(examples, [[0, 1]])[0]
    for weight, reached in ((0.0, False), (1.0, True)):
        module.zero_grad()
        module.learner.terms[0].weight = weight
        module(batch, Normaliser(1.0, 1.0))[0].backward()
        assert module.learner["module"].prompt.grad is not None and module.learner["module"].prompt.grad.abs().sum() > 0
        assert module.learner["head"].fc1.weight.grad is not None
        assert bool(module.learner["head"].fc1.weight.grad.abs().sum() > 0) is reached
    assert all(parameter.grad is None for parameter in module.lmm.parameters())


def check_insertion(module: LearnerOnLMM, batch: Batch) -> None:
    """The decoder sees: first token, selected sets in their order, the current set, the other tokens."""
    seen: list[torch.Tensor] = []
    handle = module.lmm.model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, inputs: seen.append(inputs["inputs_embeds"].detach()), with_kwargs=True
    )
    module(batch, Normaliser(1.0, 1.0))
    handle.remove()
    tokens = module.lmm.embed(batch.input_ids, batch.images, batch.has_image)
    for row, chosen in enumerate(batch.selected.tolist()):
        sets = [module.learner.bank["prompt"][number] for number in chosen if number >= 0] + [
            module.learner["module"].prompt.detach()
        ]
        length = int(batch.attention[row].sum())
        expected = torch.cat([tokens[row, :1], *sets, tokens[row, 1:length]])
        found = seen[0][row, : len(expected)]
        assert found.shape == expected.shape, "another number of vectors than selected"
        assert torch.equal(found, expected), "not the selected sets in their order, with the current one last"


def test_the_decoder_sees_the_selected_sets_in_order_and_the_current_one_last(
    module: LearnerOnLMM, examples: Examples
) -> None:
    check_insertion(module, parts(examples, [[0, 1, 2, 3]])[0])


def seen_by_the_decoder(module: LearnerOnLMM, call: Callable[[], Any]) -> torch.Tensor:
    """The input vectors of the first pass through the decoder during `call`."""
    seen: list[torch.Tensor] = []
    handle = module.lmm.model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, inputs: seen.append(inputs["inputs_embeds"].detach()), with_kwargs=True
    )
    call()
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("insertion", ["after_bos", "before_image"])
def test_sets_stand_where_the_switch_says_in_training_and_generation(
    module: LearnerOnLMM, examples: Examples, monkeypatch: pytest.MonkeyPatch, insertion: str
) -> None:
    monkeypatch.setattr(module.learner["module"], "insertion", insertion)
    batch = parts(examples, [[0, 1]])[0]  # with an image, without one
    bank, own = module.learner.bank["prompt"], module.learner["module"].prompt.detach()
    sets = torch.cat([bank[[0, 1]].flatten(0, 1), own])
    trained = seen_by_the_decoder(module, lambda: module(batch, Normaliser(1.0, 1.0)))
    pool, chosen = (
        torch.cat([module.learner.bank["prompt"], module.learner["module"].prompt.detach()[None]]),
        torch.tensor([[0, 1, 3]]),
    )
    for number in (0, 1):
        place = 1
        if insertion == "before_image" and number == 0:
            place = examples[0].prompt.index(module.lmm.image_token)
            assert place > 1
        inserted = prompt_sets(pool, chosen.repeat(6, 1), insertion)
        ask = partial(generate_answers, module.lmm, examples, [number], inserted, Decoding(1, 1))
        asked = seen_by_the_decoder(module, ask)
        assert torch.equal(asked[0, place : place + 12], sets)
        if number == 0:
            assert torch.equal(trained[0, place : place + 12], sets)


def test_a_method_that_drops_the_current_set_is_noticed(
    module: LearnerOnLMM, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Learner.rows

    def dropped(self: Learner, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        vectors, valid = original(self, batch)  # type: ignore[misc]
        return vectors[:, :-4], valid[:, :-4]

    monkeypatch.setattr(Learner, "rows", dropped)
    with pytest.raises(AssertionError):
        check_insertion(module, parts(examples, [[0, 1]])[0])


def test_a_method_that_swaps_the_order_is_noticed(
    module: LearnerOnLMM, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Learner.rows

    def swapped(self: Learner, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        vectors, valid = original(self, batch)  # type: ignore[misc]
        sets = vectors.unflatten(1, (-1, 4))[:, [1, 0, 2]]
        return sets.flatten(1, 2), valid

    monkeypatch.setattr(Learner, "rows", swapped)
    with pytest.raises(AssertionError, match="order"):
        check_insertion(module, parts(examples, [[0, 1]])[0])


def test_batched_generation_equals_one_by_one(module: LearnerOnLMM, examples: Examples) -> None:
    inserted, indices = prompt_sets(make_pool(3).prompts, SELECTED), list(range(6))
    together = generate_answers(module.lmm, examples, indices, inserted, Decoding(6, batch=6))
    alone = generate_answers(module.lmm, examples, indices, inserted, Decoding(6, batch=1))
    assert together == alone
    assert len(set(together.values())) > 1
