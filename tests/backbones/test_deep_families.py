"""Rows of every layer, and prefixes, in every supported architecture: cached answers are those without a cache."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from pipeline.backbones.decoding import GreedyDecoder, Prompts, Row
from pipeline.backbones.lmm import LMM
from pipeline.backbones.prompt_schedule import LayerSchedule, grown
from pipeline.data.collate import Examples, collate, collate_prompts
from pipeline.data.selection import NO_SET, Selection
from pipeline.data.stage_data import StageData
from pipeline.prompts.embedding import Embedded, embed_with_rows
from pipeline.prompts.insertion import gather_sets
from pipeline.prompts.learner import Learner
from pipeline.prompts.model import LearnerOnLMM
from pipeline.prompts.parts.base import Entry, Part
from pipeline.prompts.parts.deep_rows import DeepEntry, DeepRows
from pipeline.prompts.parts.prefix import PrefixEntry, PrefixRows
from pipeline.training.normaliser import Normaliser
from tests.backbones.test_families import EVERY, NEW, SAMPLES, plain_answer, plain_inputs
from tests.training.worlds import make_samples

# Rows with one module, two with weights, one at half, and none.
CHOSEN = Selection(
    torch.tensor([[0, -1], [2, 1], [1, -1], [-1, -1], [2, -1], [0, 2]]),
    torch.tensor([[1.0, 0.0], [0.7, 0.3], [0.5, 0.0], [0.0, 0.0], [1.0, 0.0], [0.2, 0.8]]),
)
SCHEDULES = {"replaced": grown(3, 1, 3, 2), "grown": grown(2, 2, 1, 2)}


@pytest.fixture(scope="module")
def examples(lmm: LMM) -> Examples:
    return Examples(StageData([(SAMPLES, make_samples(len(SAMPLES))[1], None)]), lmm.conversation)


def scheduled(lmm: LMM, name: str) -> tuple[DeepEntry, dict[str, Tensor]]:
    """Three random modules of a schedule, as large as the word embeddings."""
    schedule = LayerSchedule(tuple(SCHEDULES[name]))
    generator = torch.Generator().manual_seed(11)
    trainables = DeepRows(lmm, schedule).trainables()
    size = float(lmm.vocabulary_rows(torch.arange(20)).std())
    tensors = {name: torch.randn(3, *value.shape, generator=generator) * size for name, value in trainables.items()}
    return DeepEntry("after_bos", schedule), tensors


def entered(lmm: LMM, name: str) -> tuple[Entry, Part, dict[str, Tensor]]:
    """A kind of part with three random modules."""
    if name in SCHEDULES:
        entry, tensors = scheduled(lmm, name)
        return entry, DeepRows(lmm, entry.schedule), tensors
    part, generator = PrefixRows(lmm, 3), torch.Generator().manual_seed(11)
    shapes = {key: value.shape for key, value in part.trainables().items()}
    return PrefixEntry(), part, {key: torch.randn(3, *shape, generator=generator) for key, shape in shapes.items()}


@torch.no_grad()
def whole_answer(lmm: LMM, examples: Examples, entry: Entry, tensors: Mapping[str, Tensor], row: int) -> list[int]:
    """The answer to a sample alone, the whole sequence computed for each of its tokens."""
    batch = collate_prompts(examples, [row], CHOSEN)
    answer: list[int] = []
    while len(answer) < NEW and not set(answer) & set(lmm.stops):
        found = embed_with_rows(lmm, batch, entry.rows(tensors, batch), "after_bos")
        words = lmm.words(torch.tensor([answer], dtype=torch.long))
        vectors, attention = torch.cat([found.vectors, words], 1), torch.ones(1, found.vectors.shape[1] + len(answer))
        none = torch.zeros(1, len(answer), dtype=torch.long)
        assert found.inserted is None or not len(none[0]) or found.inserted.shape[1] == found.vectors.shape[1]
        inserted = None if found.inserted is None else torch.cat([found.inserted, none], 1)
        places = torch.cat([found.places, none.bool()], 1)
        with entry.attached(lmm, tensors, batch.selection, inserted):
            hidden = lmm.hidden(vectors, attention.long(), places, batch.images)
        answer.append(int(lmm.logits(hidden[0, -1]).argmax()))
    return answer


@pytest.mark.parametrize("name", [*SCHEDULES, "prefix"])
def test_rows_that_join_leave_and_are_parked_keep_their_modules(lmm: LMM, examples: Examples, name: str) -> None:
    entry, _, tensors = entered(lmm, name)
    expected = [whole_answer(lmm, examples, entry, tensors, row) for row in EVERY]
    frozen = [plain_answer(lmm, plain_inputs(lmm, SAMPLES[row])) for row in EVERY]
    assert frozen[3] == expected[3] and frozen != expected
    attached = functools.partial(entry.attached, lmm, tensors)
    decoder, rows = GreedyDecoder[Row](lmm, attached), [Row(number, NEW - number % 3) for number in EVERY]
    for chosen in ([3], [0, 4], [1], [2, 5]):
        with torch.no_grad():
            batch = collate_prompts(examples, chosen, CHOSEN)
            found: Embedded = embed_with_rows(lmm, batch, entry.rows(tensors, batch), "after_bos")
        prompts = Prompts(
            found.vectors,
            found.attention,
            found.places,
            batch.images,
            selection=batch.selection,
            inserted=found.inserted,
        )
        decoder.join(prompts, [rows[number] for number in chosen])
        parked = decoder.park(len(decoder.rows) // 2) if len(decoder.rows) > 1 else None
        decoder.step()
        if parked is not None:
            decoder.resume(parked)
    while decoder.rows:
        decoder.step()
    assert [row.tokens for row in rows] == [tokens[: row.longest] for row, tokens in zip(rows, expected, strict=True)]


@pytest.mark.parametrize("name", [*SCHEDULES, "prefix"])
def test_gradients_are_the_same_however_layers_are_computed(lmm: LMM, examples: Examples, name: str) -> None:
    found = []
    for policy in ("none", "selective", "full"):
        _, part, tensors = entered(lmm, name)
        learner = Learner({"module": part})
        for key, value in learner.trainables().items():
            value.data.copy_(tensors[key][0])
        learner.start_stage(tensors)
        batch = collate(examples, EVERY, [1.0] * len(SAMPLES), CHOSEN)
        loss, _ = LearnerOnLMM(lmm, learner, policy)(batch, Normaliser(*batch.counts()))
        loss.backward()
        found.append((loss.detach(), {key: value.grad for key, value in learner.trainables().items()}))
    assert all(value.grad is None for value in lmm.parameters())
    assert all(value is not None and value.abs().sum() > 0 for value in found[0][1].values())
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        for key, gradient in found[0][1].items():
            torch.testing.assert_close(gradients[key], gradient, msg=key)


@torch.no_grad()
def test_the_layers_start_where_the_frozen_model_is(lmm: LMM, examples: Examples) -> None:
    """Behind the first token a new module makes of every sample what its rows at the input alone make of it."""
    entry, _ = scheduled(lmm, "replaced")
    part = DeepRows(lmm, entry.schedule)
    values = part.start(lmm, torch.Generator().manual_seed(1), {})
    one = {name: value[None] for name, value in values.items()}
    batch = collate_prompts(examples, EVERY, torch.zeros(len(EVERY), 1, dtype=torch.long))
    found = embed_with_rows(lmm, batch, entry.rows(one, batch), "after_bos")
    alone, valid = gather_sets(one["prompt"], batch.selected)
    assert valid.all() and torch.equal(alone, entry.rows(one, batch)[0])  # type: ignore[index]
    plain = lmm.hidden(found.vectors, found.attention, found.places, batch.images)
    with entry.attached(lmm, one, batch.selection, found.inserted):
        deep = lmm.hidden(found.vectors, found.attention, found.places, batch.images)
    real = found.attention.bool()
    begins = lmm.tokenizer.bos_token_id
    same = [row for row in EVERY if int(batch.input_ids[row][batch.attention[row].bool()][0]) == begins]
    for row in same:
        torch.testing.assert_close(deep[row][real[row]], plain[row][real[row]], atol=2e-4, rtol=1e-3)
    assert NO_SET not in batch.selected
