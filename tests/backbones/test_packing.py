"""Packed samples give the loss and gradient of padded ones on every architecture, in fewer columns."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.backbones.lmm import LMM
from pipeline.backbones.packing import NOBODY, Packed, first_fit, require_packing
from pipeline.data.collate import Examples, collate
from pipeline.data.sample import Sample
from pipeline.data.sample_list import SampleList
from pipeline.data.stage_data import StageData
from pipeline.errors import UserError
from pipeline.prompts.model import LearnerOnLMM
from pipeline.training.normaliser import Normaliser
from tests.backbones.test_two_passes import EVERY, SELECTED, SHARED, examples_of
from tests.training.worlds import make_module, make_pool, make_samples

CANNOT = ("gemma3",)
# Beside pictures of several sizes, questions of which two or more fit into one row.
SHORT = SampleList(
    [
        *SHARED[:3],
        dataclasses.replace(SHARED[0], id="long", question="and how many of them are there in all? " * 6),
        *(Sample(f"short {number}", None, f"{number}?", "red" * (1 + number % 2)) for number in range(4)),
    ]
)
CHOSEN = torch.tensor([[0, 1], [2, 0], [1, -1], [0, -1], [-1, -1], [2, 1], [1, -1], [0, 2]])
DATA = (SHORT, make_samples(len(SHORT))[1], None)


def learner_on(lmm: LMM, insertion: str, checkpointing: str) -> LearnerOnLMM:
    torch.manual_seed(0)
    module = make_module(lmm, 4, insertion, checkpointing)
    torch.nn.init.normal_(module.learner["module"].prompt, std=0.2)
    module.learner.start_stage(make_pool(3, width=lmm.width).tensors)
    return module


def trained(module: LearnerOnLMM) -> tuple[Tensor, Tensor]:
    """Loss terms of a step, and the gradient of its prompt set."""
    module.zero_grad()
    batch = collate(Examples(StageData([DATA]), module.lmm.conversation), range(len(SHORT)), [1.0] * len(SHORT), CHOSEN)
    loss, terms = module(batch, Normaliser(*batch.counts()))
    loss.backward()
    assert module.learner["module"].prompt.grad is not None
    return torch.stack([*terms.values()]), module.learner["module"].prompt.grad.clone()


@pytest.mark.parametrize(
    ("insertion", "checkpointing"), [("after_bos", "none"), ("before_image", "none"), ("after_bos", "full")]
)
def test_loss_and_gradient_are_those_of_padded_samples_and_fewer_columns_are_computed(
    lmm: LMM, insertion: str, checkpointing: str
) -> None:
    if lmm.family.kind in CANNOT:
        with pytest.raises(UserError, match=r"packing samples is not possible with this model: Gemma 3 has sliding"):
            require_packing(lmm)
        return
    require_packing(lmm)
    module = learner_on(lmm, insertion, checkpointing)
    expected = trained(module)
    assert expected[1].abs().max() > 1e-3
    module.packing = True
    for implementation in ("sdpa", "eager"):
        before, lmm.decoder.config._attn_implementation = lmm.decoder.config._attn_implementation, implementation  # type: ignore[union-attr]
        try:
            torch.testing.assert_close(trained(module), expected, atol=1e-5, rtol=1e-5)
        finally:
            lmm.decoder.config._attn_implementation = before  # type: ignore[union-attr]
    fill = module.fill
    assert fill.tokens < fill.computed < fill.padded  # the samples without an image share rows


def test_a_batch_that_packing_does_not_shrink_is_computed_as_it_is(lmm: LMM) -> None:
    module = learner_on(lmm, "after_bos", "none")
    batch = collate(examples_of(lmm, "none"), EVERY[:1], [1.0], SELECTED)
    expected = module(batch, Normaliser(*batch.counts()))[0]
    module.packing = True
    assert torch.equal(module(batch, Normaliser(*batch.counts()))[0], expected)
    assert module.fill.computed == module.fill.padded


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12))
def test_every_sequence_has_a_place_of_its_own_in_rows_no_longer_than_the_longest(lengths: list[int]) -> None:
    rows, starts, turns = first_fit(lengths)
    taken = {(row, start + n) for row, start, length in zip(rows, starts, lengths, strict=True) for n in range(length)}
    assert len(taken) == sum(lengths) and max(column for _, column in taken) < max(lengths)
    assert {*rows} == {*range(max(rows) + 1)} and len({*zip(rows, turns, strict=True)}) == len(lengths)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans())
def test_tokens_see_their_own_sequence_up_to_themselves_and_are_found_again(lengths: list[int], left: bool) -> None:
    width = max(lengths)
    attention = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        attention[row, width - length if left else 0 :][:length] = 1
    packed = Packed.of(attention)
    numbers = torch.arange(attention.numel()).view_as(attention)
    moved = packed.moved(numbers, NOBODY)
    assert moved[moved != NOBODY].sort().values.tolist() == numbers[attention.bool()].tolist()
    visible = packed.visible[:, 0]
    for row, columns in enumerate(moved.tolist()):
        for column, token in enumerate(columns):
            seen = [columns[other] for other in visible[row, column].nonzero()[:, 0].tolist()]
            if token != NOBODY:
                first = token - token % width + int(attention[token // width].argmax())
                assert seen == list(range(first, token + 1))
    last = attention.shape[1] - 1 - attention.flip(1).argmax(1, keepdim=True)
    columns, among = packed.places(last)
    found = moved[packed.rows[:, None], columns[packed.rows[:, None], among]]
    assert torch.equal(found, numbers.gather(1, last))


def test_an_attention_without_masks_and_lengths_is_refused(lmm: LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    if lmm.family.kind in CANNOT:
        pytest.skip("its layers are in the way already")
    monkeypatch.setattr(lmm.decoder.config, "_attn_implementation", "flex_attention")
    told = r"'flex_attention' takes neither a mask with a row .* nor the lengths of sequences, .* Set train.packing"
    with pytest.raises(UserError, match=told):
        require_packing(lmm)
