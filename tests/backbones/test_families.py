"""Every supported architecture: what the plain model computes, trained and generated through our adapter."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.backbones.decoding import Prompts, generate
from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config.models import ModelConfig
from pipeline.data.collate import Batch, Examples, collate, collate_prompts
from pipeline.data.order import Order
from pipeline.data.sample import Sample
from pipeline.data.sample_list import SampleList
from pipeline.data.stage_data import StageData
from pipeline.prompts.generation import Decoding, generate_answers, prompt_sets
from pipeline.prompts.insertion import insert_gaps, insert_prompts, insertion_place
from pipeline.prompts.pool import PromptPool
from pipeline.ranks.world import init_world
from pipeline.sequence.engine import lmm_engine
from pipeline.training.normaliser import Normaliser
from tests.training.worlds import KEY_WIDTH, make_module, make_recipe, make_samples, train_once

NEW = 6  # tokens generated


def photo(width: int, height: int, seed: int) -> bytes:
    """A PNG of noise: no two crops are alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


SAMPLES = SampleList(
    [
        Sample("wide", photo(60, 40, 0), "what is this?", "red"),
        Sample("text", None, "why?", "so"),
        Sample("tall", photo(33, 90, 1), "how many stripes are there?", "seven"),
        Sample("small", photo(24, 24, 2), "and?", "no"),
        Sample("more text", None, "where to?", "home"),
        Sample("other text", None, "when?", "now"),
    ]
)
EVERY = list(range(len(SAMPLES)))
NONE = torch.zeros(len(SAMPLES), 0, dtype=torch.long)


@pytest.fixture(scope="module")
def examples(lmm: LMM) -> Examples:
    _, keys = make_samples(len(SAMPLES))
    return Examples(StageData([(SAMPLES, keys, None)]), lmm.conversation)


def plain_inputs(lmm: LMM, sample: Sample) -> dict[str, Any]:
    """What transformers itself makes of a question, through the processor's chat template."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": sample.question}]
    picture = sample.picture()
    if picture is not None:
        parts.insert(0, {"type": "image", "image": picture})
    return dict(
        lmm.processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    )


def our_logits(lmm: LMM, batch: Batch, words: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits [B, N, V] of a batch and its attention, with the vectors of `words` inserted as prompts."""
    embeddings, attention, places, images = seen(lmm, batch, words, left=False)
    return lmm.logits(lmm.hidden(embeddings, attention, places, images)), attention


def seen(lmm: LMM, batch: Batch, words: Tensor | None, left: bool) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    embeddings, attention = lmm.embed(batch.input_ids, batch.images, batch.has_image), batch.attention
    places = lmm.image_places(batch.input_ids)
    if words is not None:
        vectors = lmm.vocabulary_rows(words).expand(len(attention), -1, -1)
        valid = torch.ones(vectors.shape[:2], dtype=torch.bool)
        valid[1] = False  # one sample without prompts: its neighbours' must not shift it
        place = insertion_place(attention)
        places = insert_gaps(places, attention, valid, place, left)
        embeddings, attention, _ = insert_prompts(embeddings, attention, vectors, valid, left=left, place=place)
    return embeddings, attention, places, batch.images


def with_words(inputs: dict[str, Any], words: Tensor) -> dict[str, Any]:
    """The plain model's inputs with `words` behind the first token."""
    changed = dict(inputs)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            value = inputs[name]
            new = {"input_ids": words, "attention_mask": torch.ones_like(words)}.get(name, torch.zeros_like(words))
            changed[name] = torch.cat([value[:, :1], new[None], value[:, 1:]], dim=1)
    return changed


@pytest.fixture(scope="module")
def words(lmm: LMM) -> Tensor:
    return torch.tensor(lmm.tokenizer("abcd", add_special_tokens=False).input_ids)


def test_prompts_are_tokenised_as_the_processor_does(lmm: LMM, examples: Examples) -> None:
    for index, sample in enumerate(SAMPLES):
        inputs = plain_inputs(lmm, sample)
        assert examples[index].prompt == inputs["input_ids"][0].tolist()
        assert (examples[index].images is None) == ("pixel_values" not in inputs)


@torch.no_grad()
def test_without_prompts_logits_equal_the_plain_models(lmm: LMM, examples: Examples) -> None:
    logits, _ = our_logits(lmm, collate(examples, EVERY, [1.0] * len(EVERY), NONE))
    for row, sample in enumerate(SAMPLES):
        expected = lmm.model(**plain_inputs(lmm, sample)).logits[0]
        torch.testing.assert_close(logits[row, : len(expected)], expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_prompts_count_as_words_for_positions_and_masks(lmm: LMM, examples: Examples, words: Tensor) -> None:
    logits, _ = our_logits(lmm, collate(examples, EVERY, [1.0] * len(EVERY), NONE), words)
    for row, sample in enumerate(SAMPLES):
        inputs = plain_inputs(lmm, sample)
        expected = lmm.model(**(inputs if row == 1 else with_words(inputs, words))).logits[0]
        torch.testing.assert_close(logits[row, : len(expected)], expected, atol=2e-5, rtol=1e-4)


def test_prompts_before_the_image_stand_before_what_announces_it(lmm: LMM, examples: Examples) -> None:
    batch = collate(examples, EVERY, [1.0] * len(EVERY), NONE)
    places = lmm.image_spans(lmm.image_places(batch.input_ids))
    found = insertion_place(batch.attention, places, "before_image")
    announced = {
        "qwen2_5_vl": "<|vision_start|>",
        "internvl": "<img>",
        "idefics3": "<fake_token_around_image>",
        "smolvlm": "<fake_token_around_image>",
        "gemma3": "<start_of_image>",
    }
    wanted = lmm.tokenizer.convert_tokens_to_ids(announced.get(lmm.family.kind, "<image>"))
    for row, sample in enumerate(SAMPLES):
        ids = batch.input_ids[row].tolist()
        assert int(found[row]) == (1 if sample.image is None else ids.index(wanted))


def plain_answer(lmm: LMM, inputs: dict[str, Any]) -> list[int]:
    pad = lmm.tokenizer.pad_token_id
    output = lmm.model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=pad, eos_token_id=lmm.stops)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("prompted", [False, True])
def test_greedy_answers_equal_the_plain_models(lmm: LMM, examples: Examples, words: Tensor, prompted: bool) -> None:
    batch = collate_prompts(examples, EVERY, NONE)
    embeddings, attention, places, images = seen(lmm, batch, words if prompted else None, left=True)
    found = generate(lmm, Prompts(embeddings, attention, places, images), NEW)
    for row, sample in enumerate(SAMPLES):
        inputs = plain_inputs(lmm, sample)
        expected = plain_answer(lmm, with_words(inputs, words) if prompted and row != 1 else inputs)
        assert found[row] == expected


@torch.no_grad()
def test_the_image_and_its_crops_matter(lmm: LMM, examples: Examples) -> None:
    batch = collate(examples, EVERY, [1.0] * len(EVERY), NONE)
    before, _ = our_logits(lmm, batch)
    batch.images["pixel_values"] = batch.images["pixel_values"].roll(1, dims=0)
    after, _ = our_logits(lmm, batch)
    assert (after[0] - before[0]).abs().max() > 1e-3
    torch.testing.assert_close(after[1], before[1])


@torch.no_grad()
def test_a_batch_of_questions_alone_is_what_it_is_beside_images(lmm: LMM, examples: Examples) -> None:
    alone, _ = our_logits(lmm, collate(examples, [1, 4], [1.0, 1.0], NONE))
    mixed, _ = our_logits(lmm, collate(examples, [0, 1, 4], [1.0] * 3, NONE))
    torch.testing.assert_close(mixed[1:, : alone.shape[1]], alone, atol=2e-5, rtol=1e-4)


def batches_of(seed: int) -> list[list[int]]:
    """The global batches of two of the first epoch."""
    order = Order(len(SAMPLES), 2, seed, 0)
    return [order.batch(0, number)[0].tolist() for number in range(order.batches_per_epoch)]


def test_steps_under_zero3_are_the_whole_models_and_saved_prompts_answer_the_same(
    checkpoint: Path, lmm: LMM, examples: Examples, tmp_path: Path
) -> None:
    # An order whose second batch has no image: the vision tower has to run all the same.
    seed = next(s for s in range(100) if all(SAMPLES[index].image is None for index in batches_of(s)[1]))
    recipe = make_recipe(checkpoint, seed=seed, train__steps=3, train__global_batch=2)
    engine = lmm_engine(recipe, init_world(), KEY_WIDTH)
    assert engine.zero_stage == 3
    values = engine.module.learner.start(engine.module.lmm, seed, 0)
    samples = (SAMPLES, make_samples(len(SAMPLES))[1])
    history, learned = train_once(engine, recipe, init_world(), tmp_path / "stage", PromptPool(), samples)

    whole = make_module(lmm)
    torch.testing.assert_close(values["prompt"], whole.learner.start(lmm, seed, 0)["prompt"])
    trainables = whole.learner.trainables()
    for name, value in trainables.items():
        value.data.copy_(values[name])
    groups = [{"params": group.parameters, "lr": group.rate} for group in whole.learner.groups(recipe.train)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step, indices in enumerate(batches_of(seed)):
        batch = collate(examples, indices, [1.0, 1.0], NONE)
        optimizer.zero_grad()
        loss, _ = whole(batch, Normaliser(*batch.counts()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trainables.values()), 1.0)
        optimizer.step()
        assert history[step].loss == pytest.approx(loss.item(), abs=1e-4)
    torch.testing.assert_close(learned["prompt"], trainables["prompt"].data, atol=1e-3, rtol=0)

    pool = PromptPool()
    pool.append("a", {"prompt": learned["prompt"]}, {"prototype": torch.zeros(KEY_WIDTH)})
    pool.save(tmp_path / "prompts.safetensors")
    again = PromptPool.load(tmp_path / "prompts.safetensors")
    selected = torch.zeros(len(SAMPLES), 1, dtype=torch.long)
    fresh = load_lmm(ModelConfig(path=str(checkpoint)))
    first, second = (
        generate_answers(model, examples, EVERY, prompt_sets(sets.prompts, selected), Decoding(NEW, batch=4))
        for model, sets in ((lmm, pool), (fresh, again))
    )
    assert first == second
    assert len(first) == len(SAMPLES)
