"""From samples to tokens to batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.backbones.lmm import load_lmm, load_processor
from pipeline.config.models import ModelConfig
from pipeline.data.collate import Examples, MicroBatches, collate, collate_prompts
from pipeline.data.conversation import Conversation
from pipeline.data.order import Order
from pipeline.data.sample import Sample
from pipeline.data.stage_data import StageData
from pipeline.errors import UserError
from tests import tiny
from tests.training.worlds import make_samples

NONE = torch.zeros(10, 0, dtype=torch.long)


@pytest.fixture(scope="module")
def conversation(llava: Path) -> Conversation:
    return Conversation(load_processor(ModelConfig(path=str(llava))), max_length=200)


def examples_of(conversation: Conversation, count: int = 10, text_only: tuple[int, ...] = ()) -> Examples:
    return Examples(StageData([(*make_samples(count, text_only=text_only), None)]), conversation)


def test_an_example_begins_with_bos_holds_all_image_tokens_and_ends_with_eos(conversation: Conversation) -> None:
    example = conversation.example(Sample("a", tiny.png((1, 2, 3)), "what?", "red"))
    assert example.prompt[0] == 1
    assert example.prompt.count(3) == 16
    assert example.answer[-1] == 2
    text = conversation.tokenizer.decode([token for token in example.prompt[1:] if token != 3])
    assert text == "USER: \nwhat? ASSISTANT:"
    assert conversation.tokenizer.decode(example.answer[:-1]) == " red"


def test_a_sample_without_an_image_has_no_image_token(conversation: Conversation) -> None:
    example = conversation.example(Sample("a", None, "what?", "red"))
    assert 3 not in example.prompt
    assert example.images is None


def test_an_image_tag_in_the_question_is_not_a_second_image(conversation: Conversation) -> None:
    example = conversation.example(Sample("a", tiny.png((1, 2, 3)), "<image>\nwhat?", "red"))
    assert example.prompt.count(3) == 16


def test_a_model_without_chat_template_gets_the_llava_form(tmp_path: Path, conversation: Conversation) -> None:
    folder = tiny.save_llava(tmp_path / "plain", chat_template=False)
    plain = Conversation(load_processor(ModelConfig(path=str(folder))), max_length=200)
    sample = Sample("a", tiny.png((1, 2, 3)), "what?", "red")
    assert plain.example(sample).prompt == conversation.example(sample).prompt


def test_a_sample_longer_than_the_model_takes_is_named(conversation: Conversation) -> None:
    with pytest.raises(UserError, match=r"'long'.*max_length"):
        conversation.example(Sample("long", None, "why " * 100, "red"))


def test_labels_cover_the_answer_and_its_end_token_only(conversation: Conversation) -> None:
    examples = examples_of(conversation, text_only=(1,))
    batch = collate(examples, [0, 1, 2], [1, 1, 0], NONE)
    for row, index in enumerate([0, 1, 2]):
        kept = batch.labels[row][batch.labels[row] != -100].tolist()
        assert kept == examples[index].answer
        length = int(batch.attention[row].sum())
        assert batch.input_ids[row, :length].tolist() == examples[index].prompt + examples[index].answer
    assert batch.has_image.tolist() == [True, False, True]
    assert len(batch.images["pixel_values"]) == 2
    assert batch.counts() == (len(examples[0].answer) + len(examples[1].answer), 2)


def test_prompts_for_generation_are_padded_on_the_left(conversation: Conversation) -> None:
    examples = examples_of(conversation)
    batch = collate_prompts(examples, [0, 3], NONE)
    assert batch.attention[:, -1].tolist() == [1, 1]
    assert batch.input_ids[1][batch.attention[1].bool()].tolist() == examples[3].prompt


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_share_out_the_same_global_batch(
    conversation: Conversation, world: int, accumulation: int
) -> None:
    examples, order = examples_of(conversation), Order(10, 4, 0, 0)
    found = []
    for step in range(3):
        for rank in range(world):
            batches = MicroBatches(examples, order, NONE, 3, accumulation, rank, world)
            for micro in range(accumulation):
                batch = batches[step * accumulation + micro]
                found += list(zip(batch.ids, batch.weights.tolist(), strict=True))
    expected = [
        (examples.data.ids[i], float(w)) for step in range(3) for i, w in zip(*order.batch(0, step), strict=True)
    ]
    assert found == expected
    assert sorted(name for name, weight in found if weight) == sorted(examples.data.ids)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [("no/such/folder", r"model\.path is 'no/such/folder', which is neither"), ("tests/metrics", "lacks weights")],
)
def test_what_is_no_multimodal_model_is_refused_in_a_sentence(path: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_lmm(ModelConfig(path=path))
