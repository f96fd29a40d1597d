"""A random Qwen2.5-VL behind the front: positions in three dimensions, images of any size, no first token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.adapter.load import load_adapter
from tests import tiny_clip
from tests.adapters import Models, save_adapter
from tests.backbones.tiny_families import save_qwen2_5_vl
from tests.vllm.test_end_to_end import Running, asked, in_front

pytestmark = [pytest.mark.vllm, pytest.mark.e2e]

WIDTH = 128  # the least with which heads have 32 values, as vLLM's kernels for CPUs want
QUESTIONS = 40


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "base").mkdir()
    models = Models(save_qwen2_5_vl(folder / "base", WIDTH), tiny_clip.save_clip(folder / "clip"), WIDTH)
    return save_adapter(folder / "adapter", models, insertion="after_image")


@pytest.fixture(scope="module", params=["vocabulary", "parts"])
def front(adapter: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    yield from in_front(adapter, request.param)


def test_answers_are_those_of_the_own_engine(adapter: Path, front: Running) -> None:
    """Tokens are compared: a random model writes bytes that are no text, which decoders treat differently."""
    answerer = load_adapter(adapter)
    conversation = answerer.lmm.conversation
    questions = [asked(number) for number in range(QUESTIONS)]
    expected = answerer.answer(questions)
    for question, answer in zip(questions, expected, strict=True):
        reply = front.ask(question, extra_body={"return_token_ids": True})
        assert reply.prompt_sets["selected"] == answer.selected
        tokens = [token for token in reply.choices[0].token_ids if token != conversation.tokenizer.eos_token_id]
        assert conversation.decode(tokens) == answer.text
    assert len({answer.text for answer in expected}) > 5
