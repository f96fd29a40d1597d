"""Questions on their way to the model: decoded once, tokenised in any thread, in parts where there are many."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pipeline.adapter.answering import Answerer, Question
from pipeline.adapter.load import load_adapter
from pipeline.data import sample
from tests.adapters import question, save_adapter, save_models

QUESTIONS = [question(n % 3, variant=n % 2, with_image=n != 2) for n in range(5)]


@pytest.fixture(scope="module")
def answerer(tmp_path_factory: pytest.TempPathFactory) -> Answerer:
    folder: Path = tmp_path_factory.mktemp("answering")
    return load_adapter(save_adapter(folder / "adapter", save_models(folder)))


def test_an_image_is_decoded_once(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, decode = list[bytes](), sample.decode_image
    monkeypatch.setattr(sample, "decode_image", lambda encoded: decoded.append(encoded) or decode(encoded))  # type: ignore[func-returns-value]
    answerer.answer([question(0)])
    assert decoded == [question(0).image]


def test_many_questions_are_answered_as_few_are(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answerer.answer(QUESTIONS)
    monkeypatch.setattr("pipeline.adapter.answering.TOGETHER", 2)
    assert answerer.answer(QUESTIONS) == expected


def test_questions_tokenised_in_several_threads_are_answered_as_in_one(answerer: Answerer) -> None:
    with ThreadPoolExecutor(4) as threads:
        tokenised = list(threads.map(answerer.tokenise, QUESTIONS * 20))
    routed = answerer.route(tokenised)
    alone = answerer.route(QUESTIONS * 20)
    assert routed.selection.numbers.equal(alone.selection.numbers)
    assert [e.prompt for e in routed.examples.ready or []] == [e.prompt for e in alone.examples.ready or []]


def test_routing_looks_at_the_text_that_is_answered(answerer: Answerer) -> None:
    """The image's placeholder and spaces, which some clients write around a question, are not part of it."""
    asked = question(1)
    written = Question(f"{answerer.lmm.conversation.image_token}\n {asked.text} ", asked.image)
    assert answerer.answer([written]) == answerer.answer([asked])
    keys = (answerer.chooser.keys([answerer.tokenise(one)]).text for one in (written, asked))
    assert torch.equal(next(keys), next(keys))
