"""The forms of conversation: what the model reads, what is learned, what an image looks like."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.backbones.lmm import load_processor
from pipeline.config.models import ModelConfig
from pipeline.data.collate import Examples, collate
from pipeline.data.conversation import Conversation
from pipeline.data.example import Example
from pipeline.data.sample import Sample
from pipeline.data.sample_list import SampleList
from pipeline.data.stage_data import StageData
from pipeline.errors import UserError
from tests import tiny
from tests.backbones.tiny_families import FAMILIES
from tests.training.worlds import make_samples

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TURNS = Sample(
    "a",
    tiny.png((9, 8, 7)),
    "what?",
    "red",
    {"turns": [{"question": "and this?", "answer": "blue"}, {"question": "why?", "answer": "so"}]},
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llava(tmp_path_factory.mktemp("conversation") / "llava")


@pytest.fixture(scope="module")
def vicuna(llava: Path) -> Conversation:
    return Conversation(load_processor(ModelConfig(path=str(llava))), 512, "vicuna_v1")


def texts(conversation: Conversation, example: Example) -> tuple[str, str, list[str]]:
    """Prompt without image tokens, everything after it, and the learned stretches of that."""
    decode, image = conversation.tokenizer.decode, conversation.tokenizer.convert_tokens_to_ids("<image>")
    learned: list[str] = []
    stretch: list[int] = []
    for token, label in zip([*example.answer, -1], [*example.labels, -100], strict=True):
        if label == -100 and stretch:
            learned.append(decode(stretch))
            stretch = []
        elif label != -100:
            assert label == token
            stretch.append(label)
    return decode([token for token in example.prompt if token != image]), decode(example.answer), learned


def test_vicuna_v1_is_llavas_conversation(vicuna: Conversation) -> None:
    example = vicuna.example(Sample("a", tiny.png((1, 2, 3)), "what?", "red"))
    prompt, answer, learned = texts(vicuna, example)
    assert prompt == f"<s>{SYSTEM} USER: \nwhat? ASSISTANT:"
    assert answer == " red</s>"
    assert learned == [" red</s>"]


def test_vicuna_v1_without_an_image_has_no_place_for_one(vicuna: Conversation) -> None:
    prompt, _, _ = texts(vicuna, vicuna.example(Sample("a", None, "what?", "red")))
    assert prompt == f"<s>{SYSTEM} USER: what? ASSISTANT:"


def test_every_answer_of_several_turns_is_learned_and_no_question(vicuna: Conversation) -> None:
    prompt, rest, learned = texts(vicuna, vicuna.example(TURNS))
    assert prompt == f"<s>{SYSTEM} USER: \nwhat? ASSISTANT:"
    assert rest == " red</s>USER: and this? ASSISTANT: blue</s>USER: why? ASSISTANT: so</s>"
    assert learned == [" red</s>", " blue</s>", " so</s>"]


def test_labels_of_a_batch_are_the_learned_tokens_in_place(vicuna: Conversation) -> None:
    samples = SampleList([TURNS, Sample("b", None, "what?", "red")])
    examples = Examples(StageData([(samples, make_samples(2)[1], None)]), vicuna)
    batch = collate(examples, [0, 1], [1.0, 1.0], torch.zeros(2, 0, dtype=torch.long))
    for row in (0, 1):
        kept = batch.labels[row] != -100
        assert torch.equal(batch.labels[row][kept], batch.input_ids[row][kept])
        assert int(kept.sum()) == sum(label != -100 for label in examples[row].labels)
    assert batch.counts() == (len(" red|") + len(" blue|") + len(" so|") + len(" red|"), 2)


@pytest.mark.parametrize(
    ("kind", "answered"),
    [
        ("qwen2_5_vl", ["red<|im_end|>", "blue<|im_end|>", "so<|im_end|>"]),
        ("gemma3", ["red<end_of_turn>", "blue<end_of_turn>", "so<end_of_turn>"]),
        ("smolvlm", [" red<end_of_utterance>", " blue<end_of_utterance>", " so<end_of_utterance>"]),
    ],
)
def test_turns_of_a_chat_template_are_those_it_writes_itself(tmp_path: Path, kind: str, answered: list[str]) -> None:
    conversation = Conversation(load_processor(ModelConfig(path=str(FAMILIES[kind](tmp_path)))), 512)
    example = conversation.example(Sample("a", None, TURNS.question, TURNS.answer, TURNS.meta))
    assert texts(conversation, example)[2] == answered
    turns = [("what?", "red"), *((turn["question"], turn["answer"]) for turn in TURNS.meta["turns"])]
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    whole = conversation.processor.apply_chat_template(messages, tokenize=False)
    assert conversation.tokenizer.decode([*example.prompt, *example.answer]) == whole.rstrip("\n")


def test_a_template_that_drops_answers_refuses_several_turns(llava: Path) -> None:
    conversation = Conversation(load_processor(ModelConfig(path=str(llava))), 512)
    with pytest.raises(UserError, match=r"'a' has 3 turns.*vicuna_v1"):
        conversation.example(TURNS)


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (255, 255, 255)).save(buffer, "PNG")
    return buffer.getvalue()


def test_square_padding_puts_the_image_in_the_middle_of_the_mean_colour(llava: Path) -> None:
    processor = load_processor(ModelConfig(path=str(llava)))
    for size, bars in (((32, 16), (slice(0, 7), slice(25, 32))), ((16, 32), None)):
        example = Conversation(processor, 512, image_padding="square").example(Sample("a", picture(*size), "?", "!"))
        assert example.images is not None
        pixels = example.images["pixel_values"][0]
        if bars is None:
            pixels, bars = pixels.transpose(1, 2), (slice(0, 7), slice(25, 32))
        for bar in bars:
            assert pixels[:, bar].abs().max() < 0.02  # the mean, normalised
        assert pixels[:, 9:23].min() > 1


def test_stretching_shows_the_whole_picture_of_which_the_processor_would_cut_the_sides(llava: Path) -> None:
    processor = load_processor(ModelConfig(path=str(llava)))
    wide = Image.new("RGB", (128, 32), (255, 255, 255))
    wide.paste((0, 0, 0), (0, 0, 32, 32))  # black on the left quarter, which is outside of the central square
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    sample = Sample("a", buffer.getvalue(), "?", "!")
    cut, whole = (
        Conversation(processor, 512, image_padding=fit).example(sample).images["pixel_values"][0]  # type: ignore[index]
        for fit in ("none", "stretch")
    )
    assert cut.shape == whole.shape
    assert cut.min() > 1, "without it only white is seen"
    quarter = whole.shape[-1] // 4
    assert whole[..., : quarter - 2].max() < 0 < 1 < whole[..., quarter + 2 :].min()
    assert Conversation(processor, 512, image_padding="stretch").length(
        Sample("a", picture(128, 32), "?", "!"), (128, 32)
    )


def test_a_model_of_many_image_sizes_is_not_stretched(tmp_path: Path) -> None:
    processor = load_processor(ModelConfig(path=str(FAMILIES["qwen2_5_vl"](tmp_path))))
    with pytest.raises(UserError, match=r"model\.image_padding is stretch, and this model takes images in their own"):
        Conversation(processor, 512, image_padding="stretch")


def test_without_padding_the_processor_alone_decides(llava: Path) -> None:
    processor = load_processor(ModelConfig(path=str(llava)))
    example = Conversation(processor, 512).example(Sample("a", picture(32, 16), "?", "!"))
    assert example.images is not None
    assert example.images["pixel_values"].min() > 1
