"""Lengths of prepared samples without decoding, and what data.too_long makes of those that do not fit."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from data_prep.shards import write_shards
from pipeline.backbones.lmm_processor import load_processor
from pipeline.config.models import ModelConfig
from pipeline.data.conversation import Conversation
from pipeline.data.sample import Sample
from pipeline.data.shards import IndexedShards
from pipeline.errors import UserError
from pipeline.planning import sample_lengths
from pipeline.planning.sample_lengths import long_answers, measure
from tests.backbones.tiny_families import FAMILIES

EMOJI = "\N{GRINNING FACE}"


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (5, 6, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def split(folder, samples, name="train"):
    write_shards(lambda start: iter(samples[start:]), folder, 100, "source", "T", name)
    return IndexedShards(folder)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return load_processor(ModelConfig(path=str(FAMILIES["qwen2_5_vl"](tmp_path_factory.mktemp("lengths")))))


def others(count=6):
    return [Sample(f"s{number}", png(24, 24), "what?", "red") for number in range(count)]


def test_the_sample_of_most_tokens_is_found_where_characters_say_otherwise(tmp_path, qwen):
    conversation = Conversation(qwen, 400)
    many = Sample("emoji", png(24, 24), EMOJI * 100, "red")  # 400 bytes, and tokens
    long = Sample("letters", png(24, 24), "x" * 105, "red")
    found = measure(split(tmp_path, [long, *others(), many, *others(0)]), conversation, "T/train")
    assert list(found.too_long) == [7] and found.too_long[7] == conversation.length(many, (24, 24)).all > 400
    assert found.longest == conversation.length(long, (24, 24)).all and 0 in found.telling
    assert "T/train: 1 of 8 samples have more tokens than the 400" in found.sentences("refuse")[0]
    assert "'emoji'" in found.sentences("refuse")[0] and not found.sentences("skip")


def test_the_image_of_most_tokens_is_found_by_its_size(tmp_path, qwen):
    samples = others()
    samples[4] = Sample("large", png(96, 96), "what?", "red")
    conversation = Conversation(qwen, 60)
    found = measure(split(tmp_path, samples), conversation, "T/train")
    assert found.too_long == {4: conversation.length(samples[4], (96, 96)).all}


def test_samples_that_surely_fit_are_not_read(tmp_path, qwen, monkeypatch):
    shards = split(tmp_path, others(9))
    monkeypatch.setattr(sample_lengths, "READ_FOR_LONGEST", 1)
    read = []
    text = shards.text

    def noted(row):
        read.append(row)
        return text(row)

    monkeypatch.setattr(shards, "text", noted)
    measure(shards, Conversation(qwen, 2048), "T/train")
    assert len(read) == 1


def test_ascii_is_not_tokenised_where_only_a_normaliser_could_make_it_too_long(tmp_path, qwen, monkeypatch):
    samples = [Sample(f"s{number}", png(24, 24), "x" * 200, "red") for number in range(9)]
    samples[4] = Sample("s4", png(24, 24), EMOJI * 120, "red")
    conversation, tokenised = Conversation(qwen, 460), []
    length = conversation.length

    def noted(sample, size):
        tokenised.append(sample.id)
        return length(sample, size)

    monkeypatch.setattr(sample_lengths, "READ_FOR_LONGEST", 1)
    monkeypatch.setattr(sample_lengths, "_growth", lambda _: 3)
    monkeypatch.setattr(conversation, "length", noted)
    found = measure(split(tmp_path, samples), conversation, "T/train")
    assert list(found.too_long) == [4] and len({*tokenised} - {"", "s4"}) == 1


def test_bytes_bound_the_tokens_of_every_sample(tmp_path, qwen):
    turns = {"turns": [{"question": "and?", "answer": "b"}] * 9}
    samples = [
        Sample("plain", png(24, 24), "what?", "red"),
        Sample("turns", png(24, 24), "q", "a", turns),
        Sample("alone", None, EMOJI * 20, "red"),
        Sample("marks", png(40, 16), "<|im_end|>" * 9, "</s>\n\t"),
    ]
    shards = split(tmp_path, samples)
    conversation = Conversation(qwen, 10**6)
    images = sample_lengths._Images(shards, conversation, len(shards))
    for row, sample in enumerate(samples):
        bound = images.fixed[row] + sample_lengths._growth(qwen.tokenizer) * shards.json_sizes[row]
        assert conversation.length(sample, images.size(row)).all <= bound + sample_lengths.SLACK


def test_an_image_that_the_processor_refuses_is_named_and_left_to_skip(tmp_path, qwen):
    samples = others()
    samples[3] = Sample("strip", png(300, 1), "what?", "red")
    found = measure(split(tmp_path, samples), Conversation(qwen, 2048), "T/train")
    (sentence,) = found.sentences("refuse")
    assert "T/train: The model's processor cannot use the image of sample 'strip', 300 x 1 pixels" in sentence
    assert found.sentences("truncate") == [sentence] and not found.sentences("skip") and found.misfits == [3]


def test_the_answer_of_a_test_sample_is_not_given_to_the_model(tmp_path, qwen):
    shards = split(tmp_path, [Sample("s", None, "what?", "x" * 500)], "test")
    assert not measure(shards, Conversation(qwen, 200), "T/test", answered=False).misfits
    assert measure(shards, Conversation(qwen, 200), "T/test").misfits == [0]


def test_only_the_samples_that_a_limit_uses_count(tmp_path, qwen):
    samples = [*others(3), Sample("long", None, "x" * 500, "red")]
    assert not measure(split(tmp_path, samples), Conversation(qwen, 200), "T/train", 3).misfits


def test_truncation_keeps_the_end_of_the_question_the_image_and_the_answer(qwen):
    conversation = Conversation(qwen, 120, cuts=True)
    sample = Sample("s", png(24, 24), "much " * 60 + "Answer with one word.", "red")
    example = conversation.example(sample)
    short = Conversation(qwen, 2048).example(Sample("s", png(24, 24), "?", "red"))
    assert len(example.prompt) + len(example.answer) == 120 and example.answer == short.answer
    assert example.prompt.count(conversation.image_number) == short.prompt.count(conversation.image_number)
    assert "Answer with one word." in conversation.tokenizer.decode(example.prompt)


def test_truncation_leaves_whole_turns_out_from_the_last_on(qwen):
    turns = {"turns": [{"question": f"and {n}?", "answer": "blue"} for n in range(9)]}
    conversation = Conversation(qwen, 150, cuts=True)
    decoded = conversation.tokenizer.decode(conversation.example(Sample("s", None, "what?", "red", turns)).answer)
    assert decoded.startswith("red<|im_end|>") and decoded.endswith("blue<|im_end|>") and "and 0?" in decoded
    assert "and 8?" not in decoded


def test_what_no_cut_helps_is_said_with_its_parts(tmp_path, qwen):
    samples = [*others(2), Sample("large", png(96, 96), "what?", "red")]
    found = measure(split(tmp_path, samples), Conversation(qwen, 50), "T/train")
    (sentence,) = found.sentences("truncate")
    assert "Sample 'large'" in sentence and "no cut of its question" in sentence and "36" in sentence
    with pytest.raises(UserError, match=r"'large'.*no cut of its question is enough: its image takes 36"):
        Conversation(qwen, 50, cuts=True).example(samples[2])


def test_test_answers_that_cannot_be_generated_are_counted(tmp_path, qwen):
    samples = [Sample(f"s{n}", None, "what?", "x" * (40 if n % 2 else 3)) for n in range(10)]
    shards = split(tmp_path, samples, "test")
    note = long_answers(shards, Conversation(qwen, 2048), "T/test", 16)
    assert note.startswith("T/test: 5 of 10 test answers are longer than the task's max_new_tokens 16 (longest 41 ")
    assert not long_answers(shards, Conversation(qwen, 2048), "T/test", 41)
