"""Prefixes of keys and values: what they compute, their start, answers with a cache, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config.method import method_options
from pipeline.config.models import ModelConfig
from pipeline.data.collate import Examples, StageData, collate
from pipeline.data.selection import Selection
from pipeline.errors import UserError
from pipeline.methods import make_method
from pipeline.prompts.generation import Decoding, Modules, generate_answers
from pipeline.prompts.learner import Learner
from pipeline.prompts.model import LearnerOnLMM
from pipeline.prompts.parts.prefix import PrefixEntry, PrefixRows
from pipeline.prompts.parts.shapes import DecoderShape
from pipeline.training.normaliser import Normaliser
from tests import tiny
from tests.prompts.prefix_reference import Part, hidden_of
from tests.training.worlds import make_samples

LENGTH = 3
# Samples with one module, two with weights, none, and one.
NUMBERS = torch.tensor([[1, -1], [0, 1], [-1, -1], [1, -1]])
WEIGHTS = torch.tensor([[1.0, 0.0], [0.5, 0.25], [0.0, 0.0], [2.0, 0.0]])


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def lmm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LMM:
    folder = tmp_path_factory.mktemp("prefix") / "llava"
    folder.mkdir()
    return load_lmm(ModelConfig(path=str(tiny.save_llava(folder, layers=3)), attn_implementation=request.param))


def modules_of(part: PrefixRows, count: int, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, *value.shape, generator=generator) for name, value in part.trainables().items()}


def parts_of(tensors: dict[str, Tensor], layers: list[int], number: int, weight: float) -> dict[int, list[Part]]:
    named = {layer: (tensors[f"prefix.{layer}.keys"], tensors[f"prefix.{layer}.values"]) for layer in layers}
    return {layer: [Part(keys[number], values[number], weight)] for layer, (keys, values) in named.items()}


@pytest.mark.parametrize("layers", [[0, 1, 2], [1]])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradients_are_those_of_attention_written_out(lmm: LMM, layers: list[int], weighted: bool) -> None:
    selection = Selection(NUMBERS, WEIGHTS if weighted else None)
    part = PrefixRows(lmm, LENGTH, layers)
    learner = Learner({"module": part})
    own = {name: value[0] for name, value in modules_of(part, 1, seed=9).items()}
    bank = modules_of(part, 2)
    for name, parameter in learner.trainables().items():
        parameter.data.copy_(own[name])
    learner.start_stage(bank)
    batch = collate(
        Examples(StageData([(*make_samples(4, text_only=(1,)), None)]), lmm.conversation),
        range(4),
        [1.0] * 4,
        selection,
    )
    wanted = {name: value.clone().requires_grad_() for name, value in own.items()}
    expected, pictured = torch.zeros(()), 0
    for sample in range(4):
        kept = batch.attention[sample].bool()
        ids, labels, has_image = batch.input_ids[sample][kept], batch.labels[sample][kept], batch.has_image[sample]
        image = {"pixel_values": batch.images["pixel_values"][pictured : pictured + 1]}
        pictured += int(has_image)
        tokens = lmm.embed(ids[None], image, has_image[None])[0] if has_image else lmm.words(ids)
        prefixes = parts_of({name: value[None] for name, value in wanted.items()}, layers, 0, 1.0)
        for number, weight in batch.selection.chosen(sample):
            for layer, more in parts_of(bank, layers, number, weight).items():
                prefixes[layer] += more
        logits = lmm.logits(hidden_of(lmm, tokens, prefixes))
        expected = expected + cross_entropy(logits[:-1], labels[1:], reduction="sum")
    expected.backward()
    for policy in ("none", "selective", "full"):
        learner.zero_grad()
        loss, _ = LearnerOnLMM(lmm, learner, policy)(batch, Normaliser(1, 1))
        loss.backward()
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
        for name, parameter in learner.trainables().items():
            torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-4, rtol=1e-3, msg=f"{policy} {name}")


@pytest.mark.parametrize("weighted", [False, True])
def test_answers_with_a_cache_are_those_of_attention_written_out(lmm: LMM, weighted: bool) -> None:
    layers, selection = [0, 2], Selection(NUMBERS, WEIGHTS if weighted else None)
    tensors = modules_of(PrefixRows(lmm, LENGTH, layers), 2)
    samples, keys = make_samples(4, text_only=(1,))
    examples = Examples(StageData([(samples, keys, None)]), lmm.conversation)
    found = generate_answers(lmm, examples, range(4), Modules(tensors, selection, PrefixEntry()), Decoding(5, 3))
    for sample in range(4):
        batch = collate(examples, [sample], [1.0], selection, with_answer=False)
        tokens = lmm.embed(batch.input_ids, batch.images, batch.has_image)[0]
        prefixes: dict[int, list[Part]] = {layer: [] for layer in layers}
        for number, weight in selection.chosen(sample):
            for layer, more in parts_of(tensors, layers, number, weight).items():
                prefixes[layer] += more
        answer: list[int] = []
        with torch.no_grad():
            while len(answer) < 5 and not set(answer) & set(lmm.stops):
                words = [lmm.words(torch.tensor(answer))] if answer else []
                answer.append(int(lmm.logits(hidden_of(lmm, torch.cat([tokens, *words]), prefixes)[-1]).argmax()))
        assert found[sample] == lmm.conversation.decode(answer), sample


def test_they_start_from_the_frozen_models_own_keys_and_values(lmm: LMM) -> None:
    part = PrefixRows(lmm, LENGTH)
    values = part.start(lmm, torch.Generator().manual_seed(1), {})
    again = part.start(lmm, torch.Generator().manual_seed(1), {})
    assert all(torch.equal(value, again[name]) for name, value in values.items())
    # In the first layer they are linear in the word: some row of the vocabulary has exactly these values.
    layer: Any = lmm.decoder.layers[0]  # type: ignore[index]
    rows = layer.input_layernorm(lmm.vocabulary_rows(torch.arange(len(lmm.tokenizer))))
    of_words = layer.self_attn.v_proj(rows)
    # Not by products, whose rounding depends on the CPU and is squared here.
    exact = "donot_use_mm_for_euclid_dist"
    nearest = torch.cdist(values["prefix.0.values"].flatten(1), of_words, compute_mode=exact).min(1).values
    assert float(nearest.max()) < 1e-4
    carried = PrefixRows(lmm, LENGTH, carried=True).start(lmm, torch.Generator(), values)
    assert all(torch.equal(value, values[name]) for name, value in carried.items())


def test_numbers_follow_the_layers(lmm: LMM) -> None:
    method = make_method(
        method_options(name="independent", part={"name": "prefix", "prefix_length": 5, "layers": [0, 2]})
    )
    part = PrefixRows.of(lmm, method)
    text = lmm.model.config.text_config
    trained = sum(value.numel() for value in part.trainables().values())
    assert trained == 2 * 2 * 5 * text.num_key_value_heads * text.head_dim
    assert sum(PrefixRows.sizes(method, DecoderShape(text))) == trained


def test_what_cannot_carry_them_is_refused(lmm: LMM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method.layers names layer 3; the decoder has 3 layers, 0 to 2"):
        PrefixRows(lmm, LENGTH, [1, 3])
    used = lmm.decoder.config._attn_implementation  # type: ignore[union-attr]
    lmm.decoder.config._attn_implementation = "flash_attention_2"  # type: ignore[union-attr]
    try:
        with pytest.raises(UserError, match=r"with attention 'flash_attention_2', .*expected sdpa or eager"):
            PrefixRows(lmm, LENGTH)
    finally:
        lmm.decoder.config._attn_implementation = used  # type: ignore[union-attr]
