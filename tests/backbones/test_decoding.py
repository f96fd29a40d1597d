"""The greedy decoder: on every architecture what transformers generates, whoever shares the batch, by its rules."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.backbones.decoding import GreedyDecoder, Prompts, Row, generate
from pipeline.backbones.kv_cache import CacheSpace
from pipeline.backbones.lmm import LMM
from pipeline.backbones.static_decoding import StaticDecoder, require_static
from pipeline.data.collate import Examples, collate_prompts
from pipeline.data.selection import Selection
from pipeline.data.stage_data import StageData
from pipeline.errors import UserError
from pipeline.prompts.generation import Decoding, generate_answers, prompt_sets
from tests.backbones.test_families import EVERY, NEW, NONE, SAMPLES, plain_answer, plain_inputs, seen
from tests.backbones.test_two_passes import SELECTED, examples_of
from tests.training.worlds import make_pool, make_samples


@pytest.fixture(scope="module")
def examples(lmm: LMM) -> Examples:
    return Examples(StageData([(SAMPLES, make_samples(len(SAMPLES))[1], None)]), lmm.conversation)


def prompts(lmm: LMM, examples: Examples, chosen: list[int]) -> Prompts:
    with torch.no_grad():
        return Prompts(*seen(lmm, collate_prompts(examples, chosen, NONE), None, left=True))


@pytest.fixture(scope="module")
def expected(lmm: LMM) -> list[list[int]]:
    """Answers of the plain model, each alone."""
    return [plain_answer(lmm, plain_inputs(lmm, sample)) for sample in SAMPLES]


def test_rows_join_and_leave_and_each_answer_is_that_of_the_plain_model(
    lmm: LMM, examples: Examples, expected: list[list[int]]
) -> None:
    rows = [Row(number, NEW - number % 3) for number in EVERY]
    decoder = GreedyDecoder[Row](lmm, space=CacheSpace(slots=4, whole=True))  # as in the service
    for chosen in ([3], [0, 4], [1], [2, 5]):
        joining = [rows[number] for number in chosen]
        assert decoder.join(prompts(lmm, examples, chosen), joining) == joining
        decoder.step()
    while decoder.rows:
        decoder.step()
    assert [row.tokens for row in rows] == [tokens[: row.longest] for row, tokens in zip(rows, expected, strict=True)]
    assert {row.finish for row in rows} <= {"stop", "length"}
    assert [row.prompt_tokens for row in rows] == [len(examples[number].prompt) for number in EVERY]


def test_rows_that_were_parked_go_on_where_they_were(lmm: LMM, examples: Examples, expected: list[list[int]]) -> None:
    decoder, rows = GreedyDecoder[Row](lmm), [Row(number, NEW) for number in EVERY]
    decoder.join(prompts(lmm, examples, EVERY), rows)
    decoder.step()
    parked = decoder.park(len(decoder.rows) // 2)
    decoder.step()
    for part in parked.halves():
        decoder.resume(part)
    while decoder.rows:
        decoder.step()
    assert [row.tokens for row in rows] == expected


@pytest.mark.parametrize("checkpoint", ["llava"], indirect=True)
def test_every_row_keeps_its_own_modules_whoever_joins_and_leaves(lmm: LMM, examples: Examples) -> None:
    """Modules that add a vector to what an MLP of the decoder gives, each with the weight that a row has for it."""
    torch.manual_seed(0)
    modules = torch.randn(3, lmm.width)
    layer: Any = lmm.decoder.layers[0]  # type: ignore[index]

    @contextlib.contextmanager
    def attached(selection: Selection, inserted: Tensor | None = None) -> Iterator[None]:
        chosen = modules[selection.numbers.clamp(min=0)] * selection.full_weights()[..., None]  # [B, m, D]
        handle = layer.mlp.register_forward_hook(lambda _module, _inputs, output: output + chosen.sum(1)[:, None])
        yield
        handle.remove()

    numbers = torch.tensor([[0, 1], [2, -1], [1, 0], [-1, -1], [2, 1], [0, 2]])
    weights = torch.tensor([[0.5, 2.0], [1.0, 0.0], [0.1, 3.0], [0.0, 0.0], [1.0, 1.0], [4.0, 0.2]])

    def asked(chosen: list[int], width: int = 2) -> Prompts:
        selection = Selection(numbers[chosen, :width], weights[chosen, :width])
        return dataclasses.replace(prompts(lmm, examples, chosen), selection=selection)

    alone = [generate(lmm, asked([number]), NEW, attached=attached)[0] for number in EVERY]
    decoder, rows = GreedyDecoder[Row](lmm, attached), [Row(number, NEW - number % 3) for number in EVERY]
    for chosen in ([3, 0], [1], [4, 2], [5]):
        width = 1 if chosen == [1] else 2  # row 1 has fewer modules than the others
        decoder.join(asked(chosen, width), [rows[number] for number in chosen])
        decoder.step()
    decoder.resume(decoder.park(1))
    while decoder.rows:
        decoder.step()
    assert [row.tokens for row in rows] == [tokens[: row.longest] for row, tokens in zip(rows, alone, strict=True)]
    without = generate(lmm, prompts(lmm, examples, EVERY), NEW)
    assert [number for number in EVERY if alone[number] == without[number]] == [3]


# The tiny model's answers begin with 227, 153, 207, 25, 196 and 149.
SETTINGS: dict[str, Any] = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(40, 200)),
    "begin_suppress_tokens": [25, 227],
    "bad_words_ids": [[number] for number in range(40, 200)],
    "sequence_bias": [[[45], 30.0], [[45, 46], 60.0]],
    "exponential_decay_length_penalty": (1, 30.0),
    "forced_bos_token_id": 45,
    "forced_eos_token_id": 46,
    "min_new_tokens": 5,
    "remove_invalid_values": True,
}
NO_EFFECT = ("remove_invalid_values",)  # on scores that are all finite


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("checkpoint", ["llava"], indirect=True)
def test_the_checkpoints_rules_of_generation_hold(
    lmm: LMM, examples: Examples, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(lmm.model.generation_config, "eos_token_id", [25, 51])
    without = generate(lmm, prompts(lmm, examples, EVERY), NEW)
    monkeypatch.setattr(lmm.model.generation_config, name, SETTINGS[name])
    alone = [prompts(lmm, examples, [number]) for number in EVERY]
    expected = [
        lmm.model.generate(
            inputs_embeds=one.embeddings,
            attention_mask=one.attention,
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=lmm.stops,
            pad_token_id=lmm.tokenizer.pad_token_id,
        )[0].tolist()
        for one in alone
    ]
    # Alone, because in a padded batch transformers lets the penalty spare as many tokens as there is padding.
    assert [generate(lmm, one, NEW)[0] for one in alone] == expected
    assert generate(lmm, prompts(lmm, examples, EVERY), NEW) == expected
    assert (expected != without) is (name not in NO_EFFECT)


@pytest.mark.parametrize("checkpoint", ["llava"], indirect=True)
def test_no_answer_ends_before_it_has_as_many_tokens_as_asked(
    lmm: LMM, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmm.model.generation_config, "eos_token_id", list(range(100, 256)))
    decoder, rows = GreedyDecoder[Row](lmm), [Row(number, NEW, shortest=number) for number in EVERY]
    decoder.join(prompts(lmm, examples, EVERY), rows)
    while decoder.rows:
        decoder.step()
    assert all(len(row.tokens) >= min(number, NEW) for number, row in enumerate(rows))
    assert len(rows[0].tokens) == 1 and rows[0].finish == "stop"
    found = generate(lmm, prompts(lmm, examples, EVERY), NEW, min_new_tokens=NEW)
    assert [len(tokens) for tokens in found] == [NEW] * len(EVERY)


@pytest.mark.parametrize("checkpoint", ["llava"], indirect=True)
def test_a_rule_that_cannot_hold_is_refused(lmm: LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmm.model.generation_config, "guidance_scale", 2.0)
    with pytest.raises(
        UserError, match=r"guidance_scale to 2\.0, which greedy .* not support. Expected it to be left out"
    ):
        GreedyDecoder(lmm)


@pytest.mark.parametrize("sharing", ["none", "image", "sets"])
def test_a_cache_of_fixed_size_gives_the_same_answers(lmm: LMM, sharing: str) -> None:
    if lmm.family.needs_one_pass():
        with pytest.raises(UserError, match=r"evaluate.static_cache is not possible with this model: Gemma 3 has"):
            require_static(lmm)
        return
    require_static(lmm)
    insertion = {"none": "after_bos", "image": "after_image", "sets": "before_image"}[sharing]
    modules = prompt_sets(make_pool(3, width=lmm.width).prompts, SELECTED, insertion)
    asked = partial(generate_answers, lmm, examples_of(lmm, sharing), range(len(SELECTED)), modules)
    expected = asked(Decoding(9, len(SELECTED)))
    assert len(set(expected.values())) > 1
    for batch in (1, 3, len(SELECTED)):
        assert asked(Decoding(9, batch, static=True)) == expected


def test_rows_of_a_fixed_cache_stay_until_half_have_finished_and_end_at_their_own_lengths(
    lmm: LMM, examples: Examples, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if lmm.family.needs_one_pass():
        pytest.skip("it has no fixed cache, and says so")
    monkeypatch.setattr(LMM, "stops", [])
    longest = [2, NEW, 3, NEW - 1, NEW, 2]
    rows, decoder = [Row(number, longest[number]) for number in EVERY], StaticDecoder[Row](lmm)
    decoder.join(prompts(lmm, examples, EVERY), rows)
    sizes = []
    while decoder.rows:
        sizes.append(len(decoder.rows))
        decoder.step()
    assert [len(row.tokens) for row in rows] == longest and {row.finish for row in rows} == {"length"}
    assert sizes == [6, 6, *[3] * (NEW - 3)]
    for row, plain in zip(rows, expected, strict=True):
        common = min(len(plain) - 1, len(row.tokens))  # behind the stop token there is nothing to compare with
        assert row.tokens[:common] == plain[:common]
