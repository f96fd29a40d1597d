"""Low-rank updates that a real vLLM has loaded, one per task: each request gets the one that routing chose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.front.test_loras import save_lora_adapter
from tests.vllm.models import TASKS, nano_question, nano_questions, save_loadable
from tests.vllm.test_end_to_end import Running, answers, in_front, require_equal_answers, running

pytestmark = [pytest.mark.vllm, pytest.mark.e2e]

QUESTIONS = 60


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    return save_lora_adapter(folder / "adapter", save_loadable(folder), tuple(range(len(TASKS))), nano_question)


@pytest.fixture(scope="module")
def own(adapter: Path) -> Iterator[Running]:
    yield from running(adapter)


@pytest.fixture(scope="module")
def front(adapter: Path) -> Iterator[Running]:
    yield from in_front(adapter, "lora")


def test_answers_are_those_of_the_own_engine(own: Running, front: Running) -> None:
    questions = nano_questions(QUESTIONS)
    found, expected = (whole_characters(answers(service, questions)) for service in (front, own))
    require_equal_answers(found, expected)


def whole_characters(answers: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """The answers without the beginnings of characters: random updates write such bytes, and vLLM leaves them out."""
    return [(text.replace("\N{REPLACEMENT CHARACTER}", "").strip(), sets) for text, sets in answers]
